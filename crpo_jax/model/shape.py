"""The dimensions of a model, and what else its forward pass needs to know besides weights."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from crpo_jax.model.architecture import ARCHITECTURES, Architecture, Weight
from crpo_jax.model.rotary import Rope


@dataclass(frozen=True)
class Shape:
    """d width, n query heads, k KV heads, h head width, f ffn, v vocabulary, l layers.

    Layers that are `windowed` attend to the last `window` tokens, their own included, and rotate by `window_rope` if
    there is one. Scores are divided by the square root of `score_width`.
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
    score_width: int | None = None  # None: h

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
    def norm_offset(self) -> float:
        return self.architecture.norm_offset

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Of each layer, whether it attends to a window only."""
        return self.layers_windowed or (False,) * self.l

    def cache_slots(self, slots: Any, windowed: bool) -> Any:
        """Slots that a layer's cache needs where one without a window has so many."""
        return min(slots, self.window) if windowed else slots

    @property
    def scale(self) -> float:
        """What attention multiplies its scores by."""
        return (self.score_width or self.h) ** -0.5

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
    return block_weights(shape) + shape.d * shape.v


def block_weights(shape: Shape) -> int:
    return shape.l * sum(math.prod(shape.dims(weight.dims)) for weight in shape.weights if weight.inputs)


def attention_flops(shape: Shape, length: int) -> float:
    """Four per query head, head width and pair of tokens of which the later sees the earlier."""

    def pairs(windowed: bool) -> float:
        seen = shape.cache_slots(length, windowed)  # by the last token
        return seen * seen / 2 + (length - seen) * seen

    return 4.0 * shape.n * shape.h * sum(map(pairs, shape.windowed))
