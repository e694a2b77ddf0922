"""LoRA adapters in PEFT's format, in and out: adapter_config.json beside adapter_model.safetensors.

An adapted layer's key in the model, `model.layers.0.self_attn.q_proj.weight`, gives its two matrices here,
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` [r, inputs] and `...lora_B.weight` [outputs, r].
"""

import json
import math
from collections.abc import Mapping
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
from crpo_jax.model.huggingface import DTYPES, HF_KEYS, free_folder, headers_of, read_json, written_at_once
from crpo_jax.model.lora import INPUTS, TARGETS, Adapters, adapter_spec
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import dims_of
from crpo_jax.parallel.layout import WeightTable
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


def stored(weight: str, half: str, layer: int) -> str:
    """The key of one layer's "A" or "B"."""
    return f"base_model.model.{HF_KEYS[weight][0].format(l=layer).removesuffix('weight')}lora_{half}.weight"


def stored_sizes(weight: str, shape: Shape, rank: int) -> dict[str, tuple[int, int]]:
    inputs = INPUTS[weight]
    outputs = dims_of(weight)[len(inputs) :]
    return {"A": (rank, math.prod(shape.dims(inputs))), "B": (math.prod(shape.dims(outputs)), rank)}


def load(path: str | Path, shape: Shape, mesh: Mesh, table: WeightTable) -> Adapters:
    """The float32 adapters of a folder, placed beside the weights that `table` places; their scale is the folder's own.

    Raises InputError, naming file and key, for a setting that this model does not implement and for a tensor that is
    missing, extra or mis-shaped. Weights are read from safetensors only.
    """
    folder = Path(path).expanduser()
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"model.adapter: {folder}: expected {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes them"
        )
    settings, headers = read_json(folder / CONFIG), headers_of(folder / WEIGHTS)
    rank, scale = check_config(folder / CONFIG, settings)
    weights = [weight for target, (weight, _) in TARGETS.items() if any(f".{target}." in key for key in headers)]
    wanted = {
        stored(weight, half, layer): size
        for layer in range(shape.l)
        for weight in weights
        for half, size in stored_sizes(weight, shape, rank).items()
    }
    for key in [*sorted(wanted.keys() - headers.keys()), *sorted(headers.keys() - wanted.keys())]:
        kind, expected = (
            ("missing", f"shape {list(wanted[key])}")
            if key in wanted
            else ("extra", f"none such on a {shape.l}-layer Qwen2")
        )
        raise InputError(f"{folder / WEIGHTS}: {key}: {kind}; expected {expected}")
    for key, header in headers.items():
        if header.sizes != wanted[key] or header.dtype not in DTYPES:
            raise InputError(
                f"{folder / WEIGHTS}: {key}: expected shape {list(wanted[key])} of {', '.join(DTYPES)}, got {list(header.sizes)} {header.dtype}"
            )
    if not weights:
        raise InputError(f"{folder / WEIGHTS}: expected adapters of some of {', '.join(TARGETS)}, got none")

    with safe_open(folder / WEIGHTS, framework="numpy") as source:

        def make(_: str, dims: str, weight: str) -> jax.Array:
            half = "A" if dims[-1] == "r" else "B"
            layers = [source.get_tensor(stored(weight, half, layer)).astype(np.float32).T for layer in range(shape.l)]
            sizes = [rank if letter == "r" else getattr(shape, letter) for letter in dims]
            return put(np.stack(layers).reshape(sizes), mesh, adapter_spec(table, weight, dims, mesh, shape.k))

        return Adapters(make, weights, scale)


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


def save(adapters: Adapters, shape: Shape, folder: str | Path, *, base: str, dtype: Any = "float32") -> None:
    """Writes adapters for PEFT, `base` being the model they belong on; refuses a folder that holds files.

    The folder appears whole or not at all. On a mesh of several processes every process calls this; the first one writes.
    """
    folder, rank = free_folder(folder), adapters.rank
    found: Adapters = fetch(adapters)
    if jax.process_index() == 0:
        tensors = {}
        for weight in adapters.weights:
            sizes = stored_sizes(weight, shape, rank)
            for half, values in zip(("A", "B"), found.pair(weight), strict=True):
                for layer, each in enumerate(np.asarray(values)):
                    tensors[stored(weight, half, layer)] = np.ascontiguousarray(
                        each.reshape(sizes[half][::-1]).T
                    ).astype(jnp.dtype(dtype))
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
            "target_modules": [target for target, (weight, _) in TARGETS.items() if weight in adapters.weights],
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }
        with written_at_once(folder) as temporary:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    multihost_utils.sync_global_devices("the adapter is written")
