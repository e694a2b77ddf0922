"""The dimensions of a model, read from its config.json."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crpo_jax.errors import InputError
from crpo_jax.model.architecture import ARCHITECTURES, Weight


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
        """Every weight of such a model; where the embedding serves both ends (tied) there is no output projection."""
        declared = ARCHITECTURES[self.model_type].weights
        return tuple(weight for weight in declared if not (self.tied and weight.name == "unembed_dv"))

    def weight(self, name: str) -> Weight:
        return next(weight for weight in self.weights if weight.name == name)


def forward_flops(shape: Shape, length: int) -> float:
    """Floating-point operations of a forward pass over one row of `length` tokens, logits included; a backward pass has twice as many.

    Two per weight and token of every product, and of causal attention the half that is not masked.
    """
    s = shape
    weights = s.l * (2 * s.d * s.n * s.h + 2 * s.d * s.k * s.h + 3 * s.d * s.f) + s.d * s.v
    return 2.0 * weights * length + 2.0 * s.l * s.n * s.h * length * length


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape that a Qwen2 config.json describes; what this model does not implement is refused by name."""

    def wanted(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
        if value not in allowed:
            raise InputError(f"{where}: {key}: expected {' or '.join(map(repr, allowed))}, got {value!r}")

    wanted("model_type", config.get("model_type", "qwen2"), ("qwen2",))
    wanted("hidden_act", config.get("hidden_act", "silu"), ("silu",))
    wanted("use_sliding_window", config.get("use_sliding_window", False), (False,))

    def number(value: Any, key: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise InputError(f"{where}: {key}: expected a positive number, got {value!r}")
        return float(value)

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: rope_parameters: expected a mapping, got {rope!r}")
    wanted("tie_word_embeddings", config.get("tie_word_embeddings", False), (True, False))
    wanted("rope_parameters.rope_type", rope.get("rope_type", rope.get("type", "default")), ("default",))
    sizes = {}
    for key in (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "num_hidden_layers",
    ):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}: {key}: expected a positive whole number, got {value!r}")
        sizes[key] = value
    n, k, d = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["hidden_size"]
    if n % k:
        raise InputError(f"{where}: num_attention_heads: expected a multiple of num_key_value_heads={k}, got {n}")
    head = config.get("head_dim") or d // n
    if not isinstance(head, int) or isinstance(head, bool) or head < 1:
        raise InputError(f"{where}: head_dim: expected a positive whole number, got {head!r}")
    if head % 2 or (not config.get("head_dim") and d % n):
        raise InputError(f"{where}: hidden_size: expected an even multiple of num_attention_heads={n}, got {d}")
    return Shape(
        d=d,
        n=n,
        k=k,
        h=head,
        f=sizes["intermediate_size"],
        v=sizes["vocab_size"],
        l=sizes["num_hidden_layers"],
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=number(rope.get("rope_theta") or config.get("rope_theta") or 10000.0, "rope_theta"),
        norm_eps=number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
    )


def read_shape(folder: str | Path) -> Shape:
    """The shape of a Hugging Face model folder."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"model.path: {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a mapping of settings, got {config!r:.60}")
    return shape_of(config, str(path))
