"""Reads and writes LoRA adapters in PEFT's format: adapter_config.json beside adapter_model.safetensors.

The weight `model.layers.0.self_attn.q_proj.weight` has the adapters
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` [r, inputs] and `...lora_B.weight` [outputs, r].
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from crpo_jax.disk import written_at_once
from crpo_jax.errors import InputError
from crpo_jax.model.adapters import Adapters
from crpo_jax.model.architecture import Weight
from crpo_jax.model.config_json import read_mapping
from crpo_jax.model.huggingface import DTYPES, free_folder, read_header
from crpo_jax.model.lora import linear_layers, matrix_sizes
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import Axes, weight_spec
from crpo_jax.parallel.mesh import fetch, put

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

REQUIRED: Mapping[str, Any] = {"peft_type": "LORA", "bias": "none"}
UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
)
"""Settings that must be unset: each changes what the matrices mean, or adds others."""


class AdapterTensor(NamedTuple):
    """One layer's A or B of an adapted weight, as PEFT stores it."""

    weight: Weight
    half: str
    layer: int
    sizes: tuple[int, int]


def adapter_tensors(weights: Sequence[Weight], shape: Shape, rank: int) -> dict[str, AdapterTensor]:
    """Every tensor of the safetensors by its key."""
    tensors = {}
    for layer, weight in itertools.product(range(shape.l), weights):
        inputs, outputs = (math.prod(shape.dims(dims)) for dims in (weight.inputs, weight.outputs))
        stem = "base_model.model." + weight.key.format(l=layer).removesuffix("weight")
        for half, sizes in (("A", (rank, inputs)), ("B", (outputs, rank))):
            tensors[f"{stem}lora_{half}.weight"] = AdapterTensor(weight, half, layer, sizes)
    return tensors


def load_adapters(path: str | Path, shape: Shape, mesh: Mesh, axes: Axes) -> Adapters:
    """The float32 adapters of a folder, placed as `axes` place the weights they adapt, with the folder's own scale.

    Raises InputError, naming file and key, for a setting that is not supported and for a tensor that is missing, extra
    or mis-shaped. Weights are read from safetensors only.
    """
    config, file = (Path(path).expanduser() / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    if not config.is_file() or not file.is_file():
        expected = f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as PEFT's save_pretrained writes them"
        raise InputError(f"model.adapter: {config.parent}: expected {expected}")
    rank, scale = check_adapter_config(config)
    headers, layers = read_header(file), linear_layers(shape)
    weights = [weight for name, weight in layers.items() if any(f".{name}." in key for key in headers)]
    tensors = adapter_tensors(weights, shape, rank)
    for key in sorted(tensors.keys() - headers.keys()):
        raise InputError(f"{file}: {key}: missing; expected shape {list(tensors[key].sizes)}")
    for key in sorted(headers.keys() - tensors.keys()):
        model = f"{shape.l}-layer {shape.model_type} model"
        raise InputError(f"{file}: {key}: extra; expected no such key for a {model}")
    for key, (_, sizes, dtype) in headers.items():
        if sizes != tensors[key].sizes or dtype not in DTYPES:
            expected = f"shape {list(tensors[key].sizes)} of {', '.join(DTYPES)}"
            raise InputError(f"{file}: {key}: expected {expected}, got {list(sizes)} {dtype}")
    if not weights:
        raise InputError(f"{file}: expected adapters of some of {', '.join(layers)}, got none")

    with safe_open(file, framework="numpy") as source:

        def make(dims: str, weight: Weight) -> jax.Array:
            half = "A" if dims[-1] == "r" else "B"
            keys = [key for key, tensor in tensors.items() if (tensor.weight, tensor.half) == (weight, half)]
            stacked = np.stack([source.get_tensor(key).astype(np.float32).T for key in keys])
            return put(stacked.reshape(matrix_sizes(shape, rank, dims)), mesh, weight_spec(axes, dims, mesh, shape.k))

        return Adapters(weights, scale, make)


def check_adapter_config(file: Path) -> tuple[int, float]:
    """The rank and the scale in adapter_config.json: alpha / r, or with use_rslora alpha / sqrt(r)."""
    settings = read_mapping(file)
    for key, expected in REQUIRED.items():
        if settings.get(key, expected) != expected:
            raise InputError(f"{file}: {key}: expected {expected!r}, got {settings[key]!r}")
    for key in UNSUPPORTED:
        if settings.get(key):
            raise InputError(f"{file}: {key}: expected unset, since it is not supported, got {settings[key]!r:.60}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{file}: r: expected a positive whole number, got {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InputError(f"{file}: lora_alpha: expected a number, got {alpha!r}")
    return rank, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def save_adapters(adapters: Adapters, shape: Shape, folder: str | Path, *, base: str, dtype: Any = "float32") -> None:
    """Writes adapters in PEFT's format, with `base` as the model they belong to; refuses a folder that holds files.

    The folder appears whole or not at all. On a mesh of several processes each of them calls this and the first one
    writes.
    """
    folder, rank, on_host = free_folder(folder), adapters.rank, fetch(adapters)
    if jax.process_index() == 0:
        tensors = {}
        for key, (weight, half, layer, sizes) in adapter_tensors(adapters.weights, shape, rank).items():
            values = np.asarray(on_host.pair(weight.name)[half == "B"])[layer]
            tensors[key] = np.ascontiguousarray(values.reshape(sizes[::-1]).T).astype(jnp.dtype(dtype))
        settings = {
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": adapters.scale * rank,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": rank,
            "target_modules": [weight.layer_name for weight in adapters.weights],
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }
        with written_at_once(folder) as temporary:
            save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            (temporary / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    multihost_utils.sync_global_devices("the adapter is written")
