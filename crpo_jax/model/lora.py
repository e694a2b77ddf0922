"""Low-rank adapters: a frozen weight W acts as W + scale * A B, and only A [in..., r] and B [r, out...] are trained.

In training the two products stay apart, x W + scale * (x A) B, and are rounded as one sum: what is below half a step of a
bf16 weight would vanish in it for every token alike. The sampler and an export get one matrix, W + scale * A B, added in
float32 and then cast: in float32 both forms agree to rounding; in bf16 the sampler's log-probs differ from the trainer's by
that one cast, which `policy/sampler_difference_*` shows.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section 4.1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from crpo_jax import config
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Qwen2, dims_of
from crpo_jax.parallel.layout import WeightTable, spec

TARGETS: Mapping[str, tuple[str, str]] = {
    "q_proj": ("q_dnh", "d"),
    "k_proj": ("k_dkh", "d"),
    "v_proj": ("v_dkh", "d"),
    "o_proj": ("o_nhd", "nh"),
    "gate_proj": ("gate_df", "d"),
    "up_proj": ("up_df", "d"),
    "down_proj": ("down_fd", "f"),
}
"""A linear layer by the name that users and PEFT know: its weight, and the weight's dims on the side of the input."""

INPUTS: Mapping[str, str] = dict(TARGETS.values())

Make = Callable[[str, str, str], Any]
"""What a matrix becomes, from its name, its dims and the name of the weight it adapts: ("o_a_nhr", "lnhr", "o_nhd")."""


def halves(weight: str) -> tuple[str, str]:
    """The names of A and B beside a weight: "o_nhd" -> ("o_a_nhr", "o_b_rd")."""
    stem, inputs = weight.rsplit("_", 1)[0], INPUTS[weight]
    return f"{stem}_a_{inputs}r", f"{stem}_b_r{dims_of(weight)[len(inputs) :]}"


class Adapters(nnx.Module):
    """A and B of every adapted weight, each name spelling its dims; `stacked` gives every one a leading dim l."""

    def __init__(self, make: Make, weights: Sequence[str], scale: float, stacked: bool = True) -> None:
        self.weights, self.scale = tuple(weights), scale
        for weight in weights:
            for name in halves(weight):
                setattr(self, name, nnx.Param(make(name, ("l" if stacked else "") + dims_of(name), weight)))

    @property
    def rank(self) -> int:
        return int(self.pair(self.weights[0])[0].shape[-1])

    def pair(self, weight: str) -> tuple[Array, Array]:
        """A and B of an adapted weight."""
        a, b = halves(weight)
        return getattr(self, a)[...], getattr(self, b)[...]


class Adapted(NamedTuple):
    """A frozen model and the adapters trained on top of it."""

    base: Qwen2
    adapters: Adapters


def policy(trained: Any, frozen: Qwen2 | None) -> Any:
    """What is trained, as a model: the weights themselves, or the frozen ones with the adapters on them."""
    return Adapted(frozen, trained) if isinstance(trained, Adapters) and frozen is not None else trained


# --- making -----------------------------------------------------------------------------------------------------------


def described(lora: config.Lora, make: Make) -> Adapters:
    """The adapters that the settings ask for, every matrix by `make`."""
    return Adapters(
        make, [weight for target, (weight, _) in TARGETS.items() if target in lora.targets], lora.alpha / lora.rank
    )


def sizes(shape: Shape, rank: int, dims: str) -> tuple[int, ...]:
    return tuple(rank if letter == "r" else getattr(shape, letter) for letter in dims)


def abstract(shape: Shape, lora: config.Lora) -> Adapters:
    """The adapters' shapes, float32, without their memory."""
    return described(lora, lambda _, dims, weight: jax.ShapeDtypeStruct(sizes(shape, lora.rank, dims), jnp.float32))


def initial(shape: Shape, lora: config.Lora, key: Array) -> Adapters:
    """Float32 adapters that change nothing yet: A uniform in +- 1 / sqrt(inputs), as PEFT draws it, and B zero."""
    count = iter(range(10**6))

    def make(_: str, dims: str, weight: str) -> Array:
        made, here = sizes(shape, lora.rank, dims), jax.random.fold_in(key, next(count))
        bound = math.prod(shape.dims(INPUTS[weight])) ** -0.5
        return jax.random.uniform(here, made, minval=-bound, maxval=bound) if dims[-1] == "r" else jnp.zeros(made)

    return described(lora, make)


def adapter_spec(table: WeightTable, weight: str, dims: str, mesh: Mesh, kv_heads: int) -> P:
    """A and B split as their weight's own dims are; r and l never."""
    by_letter = dict(zip(dims_of(weight), spec(table, weight, mesh, kv_heads, stacked=False), strict=True))
    return P(*(by_letter.get(letter) for letter in dims))


def shardings(shape: Shape, lora: config.Lora, table: WeightTable, mesh: Mesh) -> Adapters:
    """A NamedSharding in the place of every stacked matrix."""
    return described(
        lora, lambda _, dims, weight: NamedSharding(mesh, adapter_spec(table, weight, dims, mesh, shape.k))
    )


# --- merging ----------------------------------------------------------------------------------------------------------


def merged(weight: Array, a: Array, b: Array, scale: float) -> Array:
    """W + scale * A B of one layer, added in float32 whatever W's type is, and cast back to it."""
    wide = [part.astype(jnp.float32) for part in (weight, a, b)]
    change = wide[1].reshape(-1, a.shape[-1]) @ wide[2].reshape(b.shape[0], -1)
    return (wide[0] + scale * change.reshape(weight.shape)).astype(weight.dtype)


def merge(adapted: Adapted) -> Qwen2:
    """The model with its adapters merged into stacked weights, in place: the base is used up."""

    def stack(weight: Array, a: Array, b: Array) -> Array:
        def layer(index: Array, weight: Array) -> Array:
            return weight.at[index].set(merged(weight[index], a[index], b[index], adapted.adapters.scale))

        return jax.lax.fori_loop(0, weight.shape[0], layer, weight)

    for name in adapted.adapters.weights:
        weight = getattr(adapted.base.blocks, name)[...]
        whole = jax.jit(stack, donate_argnums=0, out_shardings=weight.sharding)(weight, *adapted.adapters.pair(name))
        setattr(adapted.base.blocks, name, nnx.Param(whole))
    return adapted.base
