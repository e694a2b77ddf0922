"""LoRA adapters in PEFT's format, in and out: adapter_config.json beside adapter_model.safetensors.

An adapted layer's key in the model, `model.layers.0.self_attn.q_proj.weight`, gives its two matrices here,
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` [r, inputs] and `...lora_B.weight` [outputs, r].
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from crpo_jax.errors import InputError
from crpo_jax.model.architecture import Weight
from crpo_jax.model.huggingface import DTYPES, free_folder, read_header, read_json, written_at_once
from crpo_jax.model.lora import Adapters, linear_layers, matrix_sizes
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import Axes, weight_spec
from crpo_jax.parallel.mesh import fetch, put

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PLAIN: Mapping[str, Any] = {"peft_type": "LORA", "bias": "none"}
OFF = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
)
OFF += ("layer_replication", "alora_invocation_tokens", "trainable_token_indices", "target_parameters")
"""What a config must say, and what it must leave empty: each changes what the matrices mean, or adds others."""


def adapter_tensors(
    weights: Sequence[Weight], shape: Shape, rank: int
) -> dict[str, tuple[Weight, str, int, tuple[int, int]]]:
    """Every key of the safetensors with its weight, "A" or "B", layer and sizes."""
    return {
        f"base_model.model.{weight.key.format(l=layer).removesuffix('weight')}lora_{half}.weight": (
            weight,
            half,
            layer,
            sizes,
        )
        for layer in range(shape.l)
        for weight in weights
        for half, sizes in (
            ("A", (rank, math.prod(shape.dims(weight.inputs)))),
            ("B", (math.prod(shape.dims(weight.outputs)), rank)),
        )
    }


def load_adapters(path: str | Path, shape: Shape, mesh: Mesh, axes: Axes) -> Adapters:
    """The float32 adapters of a folder, placed as `axes` place the weights they adapt; their scale is the folder's own.

    Raises InputError, naming file and key, for a setting that this model does not implement and for a tensor that is
    missing, extra or mis-shaped. Weights are read from safetensors only.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"model.adapter: {folder}: expected {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them"
        )
    settings, headers = read_json(folder / CONFIG), read_header(folder / WEIGHTS)
    rank, scale = check_config(folder / CONFIG, settings)
    layers = linear_layers(shape)
    weights = [weight for name, weight in layers.items() if any(f".{name}." in key for key in headers)]
    tensors = adapter_tensors(weights, shape, rank)
    for key in [*sorted(tensors.keys() - headers.keys()), *sorted(headers.keys() - tensors.keys())]:
        if key in tensors:
            raise InputError(f"{folder / WEIGHTS}: {key}: missing; expected shape {list(tensors[key][3])}")
        raise InputError(
            f"{folder / WEIGHTS}: {key}: extra; expected no such key on a {shape.l}-layer {shape.model_type} model"
        )
    for key, header in headers.items():
        if header.sizes != tensors[key][3] or header.dtype not in DTYPES:
            expected = f"shape {list(tensors[key][3])} of {', '.join(DTYPES)}"
            raise InputError(f"{folder / WEIGHTS}: {key}: expected {expected}, got {list(header.sizes)} {header.dtype}")
    if not weights:
        raise InputError(f"{folder / WEIGHTS}: expected adapters of some of {', '.join(layers)}, got none")

    with safe_open(folder / WEIGHTS, framework="numpy") as source:

        def make(dims: str, weight: Weight) -> jax.Array:
            half = "A" if dims[-1] == "r" else "B"
            keys = [key for key, tensor in tensors.items() if tensor[:2] == (weight, half)]
            stacked = np.stack([source.get_tensor(key).astype(np.float32).T for key in keys])
            return put(stacked.reshape(matrix_sizes(shape, rank, dims)), mesh, weight_spec(axes, dims, mesh, shape.k))

        return Adapters(weights, scale, make)


def check_config(file: Path, settings: Any) -> tuple[int, float]:
    """The rank and the scale that adapter_config.json gives, alpha / r or with use_rslora alpha / sqrt(r)."""
    if not isinstance(settings, dict):
        raise InputError(f"{file}: expected a mapping of settings, got {settings!r:.60}")
    for key, expected in PLAIN.items():
        if settings.get(key, expected) != expected:
            raise InputError(f"{file}: {key}: expected {expected!r}, got {settings[key]!r}")
    for key in OFF:
        if settings.get(key):
            raise InputError(
                f"{file}: {key}: expected none of it, which this model does not implement, got {settings[key]!r:.60}"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{file}: r: expected a positive whole number, got {rank!r}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InputError(f"{file}: lora_alpha: expected a number, got {alpha!r}")
    return rank, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def save_adapters(adapters: Adapters, shape: Shape, folder: str | Path, *, base: str, dtype: Any = "float32") -> None:
    """Writes adapters for PEFT, `base` being the model they belong to; refuses a folder that holds files.

    The folder appears whole or not at all. On a mesh of several processes every process calls this; the first one writes.
    """
    folder, rank = free_folder(folder), adapters.rank
    on_host: Adapters = fetch(adapters)
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
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    multihost_utils.sync_global_devices("the adapter is written")
