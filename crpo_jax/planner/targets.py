"""Targets by name, and compile-only devices for accelerators that are not attached.

A GPU target is a count and a card (`8xa6000`, `h100x8`, `h200`). A TPU target is a slice by its cloud name (`v5e-16`,
`v4-16`), which counts chips for v5e and v6e and cores, two per chip, for v4 and v5p.

Compiling needs `pip install 'crpo_jax[plan-tpu]'` or `'crpo_jax[plan-gpu]'`, but no accelerator. Parsing needs no jax.
"""

import difflib
import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crpo_jax.errors import InputError
from crpo_jax.hardware import CHIPS, GPUS_PER_HOST, Chip

if TYPE_CHECKING:
    from jax.sharding import Mesh

CHIP_ALIASES = {"a100-80gb": "a100", "rtx-a6000": "a6000", "h100-80gb": "h100"}
SLICE_UNITS_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
"""How much each chip adds to the number in a slice's name."""


@dataclass(frozen=True)
class Target:
    """Devices to plan for: `name` as the user wrote it, `count` devices as a JAX program sees them."""

    name: str
    chip: Chip
    count: int

    @property
    def usable(self) -> int:
        """Bytes of a device that programs can use."""
        return self.chip.memory - self.chip.reserved

    @property
    def extra(self) -> str:
        """The extra of this package that installs the target's compiler."""
        return f"plan-{self.chip.kind}"


def parse_target(name: str) -> Target:
    """The target of a name such as 8xa6000, h100x8, h200, v5e-16."""
    text = name.lower()
    if (tpu := re.fullmatch(r"(v\w+)-(\d{1,4})", text)) and tpu[1] in SLICE_UNITS_PER_CHIP:
        chip, units = CHIPS[tpu[1]], SLICE_UNITS_PER_CHIP[tpu[1]]
        count, rest = divmod(int(tpu[2]), units)
        if rest or not find_slice_sides(chip, count):
            sizes = ", ".join(str(size * units) for size in range(1, 257) if find_slice_sides(chip, size))
            raise InputError(f"--target {name}: expected a {tpu[1]} slice of {sizes}, got {tpu[2]}")
        return Target(name, chip, count)
    cards = [card for card, chip in CHIPS.items() if chip.kind == "gpu"]
    pattern = rf"(?:(?P<before>\d{{1,4}})x)?(?P<card>{'|'.join([*cards, *CHIP_ALIASES])})(?:x(?P<after>\d{{1,4}}))?"
    match = re.fullmatch(pattern, text)
    if not match or (match["before"] and match["after"]):
        examples = [*cards, "8xa6000", "h100x8", *(f"{tpu}-16" for tpu in SLICE_UNITS_PER_CHIP)]
        close = difflib.get_close_matches(text, examples, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"--target: expected a name such as {', '.join(examples)}, got {name!r}{hint}")
    card = CHIP_ALIASES.get(match["card"], match["card"])
    count = int(match["before"] or match["after"] or 1)
    most = 1024 if CHIPS[card].network_bandwidth else GPUS_PER_HOST
    if not 1 <= count <= most or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        hosts = f" or a multiple of {GPUS_PER_HOST} up to {most}" if most > GPUS_PER_HOST else ""
        raise InputError(f"--target {name}: expected 1 to {GPUS_PER_HOST}{hosts} {card}, got {count}")
    return Target(name, CHIPS[card], count)


def find_slice_sides(chip: Chip, count: int) -> tuple[int, ...] | None:
    """The sides of a TPU slice of `count` chips, or None if no slice has that size.

    v5e and v6e: a square or two squares side by side. v4 and v5p: a box whose sides are powers of two, the longest at
    most four times the shortest.
    """
    if count < 1 or count & (count - 1) or count > 256:
        return None
    power = count.bit_length() - 1
    if chip.topology in ("v5e", "v6e"):
        return (2 ** (power // 2), 2 ** (power - power // 2))
    if count == 4:
        return (2, 2, 1)
    return (2 ** (power // 3), 2 ** ((power + 1) // 3), 2 ** ((power + 2) // 3)) if count > 4 else None


def find_missing_compiler(target: Target) -> str:
    """A sentence that names the package to install before compiling for this target; empty if it is installed."""
    names = ["libtpu"] if target.chip.kind == "tpu" else ["jax_cuda13_plugin", "jax_cuda12_plugin"]
    if any(importlib.util.find_spec(name) for name in names):
        return ""
    return f"compiling for {target.name} needs its compiler: pip install 'crpo_jax[{target.extra}]'"


def prepare_environment(target: Target) -> None:
    """Sets the environment variables of the target's compiler; call before jax is imported."""
    variables = {"JAX_PLATFORMS": "cpu"}
    if target.chip.kind == "tpu":
        variables |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_LOG_DIR": "disabled",
            "TPU_MIN_LOG_LEVEL": "3",
        }
    else:
        variables |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for name, value in variables.items():
        os.environ.setdefault(name, value)


@functools.cache
def make_target_devices(target: Target) -> tuple[Any, ...]:
    """Devices to compile for, on which nothing can run.

    Lower with ShapeDtypeStructs whose shardings are over a mesh of these, and compile with `compiler_options(target)`.
    """
    if missing := find_missing_compiler(target):
        raise InputError(missing)
    prepare_environment(target)
    from jax._src import xla_bridge
    from jax.experimental import topologies

    chip = target.chip
    if chip.kind == "gpu":
        hosts = max(1, target.count // GPUS_PER_HOST)
        # Without a GPU jax (0.10, 0.11) cannot resolve the alias "gpu", which lowering rules of one platform look up.
        xla_bridge._alias_to_platforms["gpu"] = ["cuda"]
        xla_bridge.backends()  # registers the plug-ins
        description, grid = describe_gpu(target), f"1x{hosts}x{target.count // hosts}"
        topology = topologies.get_topology_desc(platform="cuda", topology=grid, target_config=description)
        return tuple(topology.devices)
    sides = find_slice_sides(chip, target.count)
    assert sides is not None  # parse_target refuses other sizes
    extra = {}
    if target.count == 1:
        extra = {"chips_per_host_bounds": (1, 1, 1)}
    elif len(sides) == 3:  # megacore: otherwise every chip counts as two devices
        bounds = {"chips_per_host_bounds": (2, 2, 1), "num_slices": 1, "wrap": (False,) * 3}
        extra = {"chip_config_name": "megacore", **bounds}
    name = f"{chip.topology}:{'x'.join(map(str, sides))}"
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **extra).devices)


def make_target_mesh(target: Target, data: int, model: int) -> "Mesh":
    """The training mesh over the target's compile-only devices."""
    import jax
    from jax.sharding import AxisType

    from crpo_jax.parallel.mesh import DATA, MODEL

    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=types, devices=make_target_devices(target))


def compiler_options(target: Target) -> dict[str, Any]:
    """Autotuning is off for GPUs: the compiler would time kernels on a GPU that is not attached."""
    return {"xla_gpu_autotune_level": 0} if target.chip.kind == "gpu" else {}


def describe_gpu(target: Target) -> str:
    """The GPU as text of XLA's stream_executor.GpuTargetConfigProto."""
    chip = target.chip
    capability, cores, l2 = chip.gpu
    shared, threads, units = {80: (164, 2048, 64), 86: (100, 1536, 128), 89: (100, 1536, 128), 90: (228, 2048, 128)}[
        capability
    ]
    accelerated = "feature_extension: ACCELERATED_FEATURES" if capability == 90 else ""
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": shared * 1024,
        "shared_memory_per_block_optin": (shared - 1) * 1024,
        "threads_per_core_limit": threads,
        "core_count": cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": l2,
        "clock_rate_ghz": 1.8,
        "device_memory_size": chip.memory,
    }
    lines = " ".join(f"{name}: {value}" for name, value in fields.items())
    compute = f"cuda_compute_capability {{ major: {capability // 10} minor: {capability % 10} {accelerated} }}"
    versions = 'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }'
    return f'gpu_device_info {{ {lines} {compute} }} {versions} device_description_str: "{target.name}"'
