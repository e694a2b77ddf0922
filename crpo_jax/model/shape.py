"""The dimensions of a model, read from its config.json."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from crpo_jax.errors import InputError
from crpo_jax.model.architecture import ARCHITECTURES, Weight

SIZE_KEYS = {
    "d": "hidden_size",
    "n": "num_attention_heads",
    "k": "num_key_value_heads",
    "f": "intermediate_size",
    "v": "vocab_size",
    "l": "num_hidden_layers",
}
"""The keys of config.json by the dim they give."""

READ_KEYS = {
    *SIZE_KEYS.values(),
    "head_dim",
    "hidden_act",
    "layer_types",
    "model_type",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "use_sliding_window",
}
"""What `shape_of` reads."""

HARMLESS_KEYS = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"),
    *("max_position_embeddings", "max_window_layers", "sliding_window"),  # the windows only while they are in effect
    *("initializer_range", "use_cache", "use_mrope", "attn_implementation", "_attn_implementation"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "gradient_checkpointing"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "is_decoder", "is_encoder_decoder"),
    *("unsloth_version", "unsloth_fixed", "pretraining_tp"),
}
"""What a config.json may hold besides: nothing in it changes the logits of a Qwen2 without dropout."""

NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (True,),  # of queries, keys and values, as Qwen2 has them
    "attention_dropout": (0, None),
    "attention_multiplier": (1, None),
    "embedding_multiplier": (1, None),
    "hidden_dropout": (0, None),
    "layer_norm_type": ("rms_norm", None),
    "logit_scale": (1, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "qkv_bias": (True,),
    "quantization_config": (None,),
    "residual_multiplier": (1, None),
    "tie_encoder_decoder": (False, None),
    "use_qk_norm": (False, None),
}
"""What would change the mathematics, and the values at which it does not."""

NEUTRAL_ROPE: Mapping[str, tuple[Any, ...]] = {
    "attention_factor": (1, None),
    "factor": (1, None),
    "partial_rotary_factor": (1, None),
    "rope_type": ("default",),
    "type": ("default",),
}
"""The same in rope_parameters and rope_scaling, besides rope_theta."""


@dataclass(frozen=True)
class Shape:
    """d width, n query heads, k KV heads, h head width, f ffn, v vocabulary, l layers."""

    d: int
    n: int
    k: int
    h: int
    f: int
    v: int
    l: int  # noqa: E741 (the letter is the dim's name everywhere)
    tied: bool
    rope_theta: float
    norm_eps: float
    model_type: str = "qwen2"

    def dims(self, letters: str) -> tuple[int, ...]:
        """Sizes of the dims that `letters` spell, such as "dnh"."""
        return tuple(getattr(self, letter) for letter in letters)

    @functools.cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every weight of this model. A tied model has no output projection: its embedding serves as both."""
        declared = ARCHITECTURES[self.model_type].weights
        return tuple(weight for weight in declared if not (self.tied and weight.name == "unembed_dv"))

    def weight(self, name: str) -> Weight:
        return next(weight for weight in self.weights if weight.name == name)


def forward_flops(shape: Shape, length: int, adapter_weights: int = 0) -> float:
    """Floating-point operations of a forward pass over a row of `length` tokens, logits included.

    Two per token and weight of every matrix product; of causal attention, the half that is not masked.
    """
    return 2.0 * (matrix_weights(shape) + adapter_weights) * length + attention_flops(shape, length)


def backward_flops(shape: Shape, length: int, adapter_weights: int = 0) -> float:
    """Of the backward pass: two per token and weight for the gradient of a product's input, two for that of a weight
    which is trained. With adapters these are theirs alone."""
    inputs = matrix_weights(shape) + adapter_weights
    return 2.0 * (inputs + (adapter_weights or inputs)) * length + 2 * attention_flops(shape, length)


def matrix_weights(shape: Shape) -> int:
    """Weights that multiply every token: those of the blocks' matrices and of the output projection."""
    layer = sum(math.prod(shape.dims(weight.dims)) for weight in shape.weights if weight.inputs)
    return shape.l * layer + shape.d * shape.v


def attention_flops(shape: Shape, length: int) -> float:
    return 2.0 * shape.l * shape.n * shape.h * length * length


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape that a config.json describes. Raises InputError, naming the key, for what is not implemented."""

    def refuse(key: str, expected: str, value: Any) -> NoReturn:
        raise InputError(f"{where}: {key}: expected {expected}, got {value!r}")

    def option(key: str, value: Any, *allowed: Any) -> Any:
        return value if value in allowed else refuse(key, " or ".join(map(repr, allowed)), value)

    def whole(key: str, value: Any) -> int:
        return value if type(value) is int and value > 0 else refuse(key, "a positive whole number", value)

    def number(key: str, value: Any) -> float:
        return float(value) if type(value) in (int, float) and value > 0 else refuse(key, "a positive number", value)

    def rope_base() -> float:
        """rope_theta, which may stand in config.json and in rope_parameters: where it does in both, both are equal."""
        places = {"rope_theta": config.get("rope_theta")}
        for place in ("rope_parameters", "rope_scaling"):
            rope = config.get(place) or {}
            if not isinstance(rope, dict):
                refuse(place, "a mapping", rope)
            places[f"{place}.rope_theta"] = rope.get("rope_theta")
            for key in sorted(rope.keys() - {"rope_theta"}, reverse=True):  # the type first
                option(f"{place}.{key}", rope[key], *NEUTRAL_ROPE.get(key, (None,)))
        given = {key: number(key, value) for key, value in places.items() if value is not None}
        for key, value in given.items():
            option(key, value, next(iter(given.values())))
        return next(iter(given.values()), 10000.0)

    model_type = option("model_type", config.get("model_type", "qwen2"), *ARCHITECTURES)
    option("hidden_act", config.get("hidden_act", "silu"), "silu")
    option("use_sliding_window", config.get("use_sliding_window") or False, False)
    for kind in config.get("layer_types") or []:
        option("layer_types", kind, "full_attention")
    for key in sorted(config.keys() & NEUTRAL_VALUES.keys()):
        option(key, config[key], *NEUTRAL_VALUES[key])
    sizes = {dim: whole(key, config.get(key)) for dim, key in SIZE_KEYS.items()}
    d, n, k, h = sizes["d"], sizes["n"], sizes["k"], config.get("head_dim")
    if n % k:
        refuse("num_attention_heads", f"a multiple of num_key_value_heads={k}", n)
    if not h and d % (2 * n):
        refuse("hidden_size", f"an even multiple of num_attention_heads={n}", d)
    if h and whole("head_dim", h) % 2:
        refuse("head_dim", "an even number", h)
    return Shape(
        **sizes,
        h=h or d // n,
        tied=bool(option("tie_word_embeddings", config.get("tie_word_embeddings", False), True, False)),
        rope_theta=rope_base(),
        norm_eps=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        model_type=model_type,
    )


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """What a config.json sets without anyone here knowing what it means."""
    known = READ_KEYS | HARMLESS_KEYS | NEUTRAL_VALUES.keys()
    return sorted(key for key in config.keys() - known if config[key] is not None)


def read_shape(folder: str | Path) -> Shape:
    """The shape of a Hugging Face model folder."""
    path = Path(folder) / "config.json"
    return shape_of(read_mapping(path, "model.path: "), str(path))


def read_mapping(path: Path, prefix: str = "") -> dict[str, Any]:
    """The JSON object in a file; `prefix` opens the message where the file cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{prefix}{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping, got {content!r:.60}")
    return content
