"""The device mesh: `DxM` is D devices on the data axis times M on the model axis."""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crpo_jax.errors import InputError

DATA, MODEL = "data", "model"


def parse_mesh(text: str) -> tuple[int, int]:
    """(data, model) sizes of `DxM`."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not match:
        raise InputError(f"--mesh: expected DxM in devices, such as 8x1, got {text!r}")
    return int(match[1]), int(match[2])


def make_mesh(text: str = "") -> Mesh:
    """The mesh of `DxM` over all devices of all processes; an empty text puts all of them on the data axis.

    Both axes are Auto: inside `jit` the compiler places what the layouts do not say; the sampler is manual by
    `shard_map`.
    """
    devices = jax.devices()
    data, model = parse_mesh(text) if text else (len(devices), 1)
    if data * model != len(devices):
        kind = devices[0].platform
        hint = (
            f"; XLA_FLAGS=--xla_force_host_platform_device_count={data * model} gives that many on a CPU"
            if kind == "cpu"
            else ""
        )
        raise InputError(
            f"--mesh {text}: expected data x model = the {len(devices)} {kind} devices here, "
            f"got {data} x {model} = {data * model}{hint}"
        )
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def put(values: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """A global array from values that every process holds; each one places only its own devices' part."""
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda index: values[index])


def fetch(tree: Any) -> Any:
    """NumPy values of global arrays, the parts of other processes included."""
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def data_size(mesh: Mesh) -> int:
    return mesh.shape[DATA]


def model_size(mesh: Mesh) -> int:
    return mesh.shape[MODEL]
