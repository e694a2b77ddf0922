"""The dimensions of a model, read from its config.json."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array

from crpo_jax.errors import InputError
from crpo_jax.model.architecture import ARCHITECTURES, Architecture, Weight
from crpo_jax.model.rotary import Rope

SIZE_KEYS = {
    "d": "hidden_size",
    "n": "num_attention_heads",
    "k": "num_key_value_heads",
    "f": "intermediate_size",
    "v": "vocab_size",
    "l": "num_hidden_layers",
}
"""The keys of config.json by the dim they give."""


@dataclass(frozen=True)
class Shape:
    """d width, n query heads, k KV heads, h head width, f ffn, v vocabulary, l layers.

    Layers that are `windowed` attend to the last `window` tokens, their own included, and rotate by `window_rope` if
    there is one. Scores are multiplied by `scale`.
    """

    d: int
    n: int
    k: int
    h: int
    f: int
    v: int
    l: int  # noqa: E741 (the letter is the dim's name everywhere)
    tied: bool
    rope: Rope
    norm_eps: float
    model_type: str = "qwen2"
    window: int = 0
    window_rope: Rope | None = None
    layers_windowed: tuple[bool, ...] = ()
    query_scale: float | None = None  # None: h^-1/2

    def dims(self, letters: str) -> tuple[int, ...]:
        """Sizes of the dims that `letters` spell, such as "dnh"."""
        return tuple(getattr(self, letter) for letter in letters)

    @functools.cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every weight of this model. A tied model has no output projection: its embedding serves as both."""
        return tuple(weight for weight in self.architecture.weights if not (self.tied and weight.name == "unembed_dv"))

    def weight(self, name: str) -> Weight:
        return next(weight for weight in self.weights if weight.name == name)

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Of each layer, whether it attends to a window only."""
        return self.layers_windowed or (False,) * self.l

    def cache_slots(self, slots: int, windowed: bool) -> int:
        """Slots that a layer's cache needs where one without a window has so many."""
        return min(slots, self.window) if windowed else slots

    @property
    def scale(self) -> float:
        """What attention multiplies its scores by."""
        return self.h**-0.5 if self.query_scale is None else self.query_scale

    def frequencies(self, windowed: bool | Array) -> Array:
        """The rotary frequencies [h / 2] of a layer; `windowed` may be traced."""
        everywhere = self.rope.frequencies(self.h // 2)
        if self.window_rope is None:
            return everywhere
        return jnp.where(windowed, self.window_rope.frequencies(self.h // 2), everywhere)

    def activation(self, x: Array) -> Array:
        """The nonlinearity of the feed-forward network."""
        return jax.nn.silu(x) if self.architecture.activation == "silu" else jax.nn.gelu(x, approximate=True)


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

    def rope(settings: Any, theta: Any) -> Rope:
        if not isinstance(settings, dict):
            refuse("rope_parameters", "a mapping", settings)
        kind = option(
            "rope_parameters.rope_type",
            settings.get("rope_type", settings.get("type", "default")),
            "default",
            "linear",
            "llama3",
        )
        names = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())
        scaling = [number(f"rope_parameters.{name}", settings.get(name)) for name in names]
        context = (
            [
                whole(
                    "rope_parameters.original_max_position_embeddings", settings.get("original_max_position_embeddings")
                )
            ]
            if kind == "llama3"
            else []
        )
        return Rope(number("rope_theta", settings.get("rope_theta") or theta), kind, *scaling, *context)

    model_type = option("model_type", config.get("model_type", "qwen2"), *ARCHITECTURES)
    gemma = model_type == "gemma3_text"
    activation = "hidden_activation" if gemma else "hidden_act"
    option(
        activation,
        config.get(activation) or ("gelu_pytorch_tanh" if gemma else "silu"),
        "gelu_pytorch_tanh" if gemma else "silu",
    )
    option("use_sliding_window", config.get("use_sliding_window", False), False)
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local = None
    if gemma:
        if "full_attention" in parameters:
            local = rope(parameters["sliding_attention"], 1e4)
            parameters = parameters["full_attention"]
        else:
            local = rope({}, config.get("rope_local_base_freq") or 1e4)
    everywhere = rope(parameters, config.get("rope_theta") or (1e6 if gemma else 1e4))
    window, windowed = 0, ()
    layers = whole("num_hidden_layers", config.get("num_hidden_layers"))
    if gemma or model_type == "mistral":
        window = config.get("sliding_window") or 0
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        default = ["full_attention" if gemma and (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
        if window:
            windowed = tuple(kind == "sliding_attention" for kind in config.get("layer_types") or default)
    sizes = {dim: whole(key, config.get(key)) for dim, key in SIZE_KEYS.items()}
    d, n, k = sizes["d"], sizes["n"], sizes["k"]
    h = config.get("head_dim") or {"gemma3_text": 256, "qwen3": 128}.get(model_type)
    if n % k:
        refuse("num_attention_heads", f"a multiple of num_key_value_heads={k}", n)
    if not h and d % (2 * n):
        refuse("hidden_size", f"an even multiple of num_attention_heads={n}", d)
    if h and whole("head_dim", h) % 2:
        refuse("head_dim", "an even number", h)
    return Shape(
        **sizes,
        h=h or d // n,
        tied=bool(option("tie_word_embeddings", config.get("tie_word_embeddings", gemma), True, False)),
        rope=everywhere,
        window=window,
        window_rope=local,
        layers_windowed=windowed,
        query_scale=number("query_pre_attn_scalar", config.get("query_pre_attn_scalar", 256)) ** -0.5
        if gemma
        else None,
        norm_eps=number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        model_type=model_type,
    )


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
