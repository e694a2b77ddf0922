"""Rotary position embedding: its frequencies, as config.json scales them, and the rotation of queries and keys."""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Rope:
    """Frequencies theta^(-i / half) of the half head width, then scaled.

    `linear` divides all of them by `factor`. `llama3` ("The Llama 3 Herd of Models", arXiv 2407.21783) divides those
    whose wavelength exceeds original_context / low, keeps those below original_context / high, and goes from one to the
    other in between.
    """

    theta: float
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192

    def frequencies(self, half: int) -> Float[Array, " half"]:
        """Radians per position, float32."""
        base = self.theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
        if self.scaling == "default":
            return base
        if self.scaling == "linear":
            return base / self.factor
        turns = self.original_context * base / (2 * math.pi)  # over the context of pretraining
        unscaled = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return (1 - unscaled) * base / self.factor + unscaled * base


def rope(
    x: Float[Array, "... n h"], positions: Int[Array, "..."], frequencies: Float[Array, " half"]
) -> Float[Array, "... n h"]:
    """Rotary position embedding in the half-split form, in float32; bf16 angles would round position 257 to 256."""
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
