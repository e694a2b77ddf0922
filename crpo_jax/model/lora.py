"""Low-rank adapters: a frozen weight W acts as W + scale * A B, and only A [in..., r] and B [r, out...] are trained.

In training and in sampling the two products stay apart, x W + scale * (x A) B, and are rounded as one sum: a change of
less than half a step of a bf16 weight would otherwise vanish. An export gets one matrix, W + scale * A B, added in
float32 and then cast.

Whether a run trains adapters or every weight is decided here alone: the rest of the program holds a `Policy` and a tree
of trained arrays. Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section 4.1.
"""

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from crpo_jax.config import Lora
from crpo_jax.model.adapters import Adapters, MakeMatrix
from crpo_jax.model.architecture import Weight
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Transformer, dot, model_shapes
from crpo_jax.parallel.layout import Axes, weight_spec


class Policy(NamedTuple):
    """A model as it computes: its weights, with adapters on them where it has any."""

    model: Transformer
    adapters: Adapters | None = None

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the weights that have adapters."""
        return frozenset() if self.adapters is None else self.adapters.adapted


def policy_of(trained: Any, frozen: Transformer | None) -> Policy:
    """What is trained as a policy: the weights themselves, or adapters on the frozen ones."""
    if not isinstance(trained, Adapters):
        return Policy(trained)
    assert frozen is not None
    return Policy(frozen, trained)


def linear_layers(shape: Shape) -> dict[str, Weight]:
    """The weights that may be adapted, by the names that users and PEFT know."""
    return {weight.layer_name: weight for weight in shape.weights if weight.inputs}


def matrix_sizes(shape: Shape, rank: int, dims: str) -> tuple[int, ...]:
    return tuple(rank if dim == "r" else getattr(shape, dim) for dim in dims)


# --- what a run trains: every weight, or with lora.rank > 0 adapters --------------------------------------------------


def make_adapters(shape: Shape, lora: Lora, make: MakeMatrix) -> Adapters:
    chosen = [weight for name, weight in linear_layers(shape).items() if name in lora.targets]
    return Adapters(chosen, lora.alpha / lora.rank, make)


def trained_shapes(shape: Shape, lora: Lora) -> Any:
    """The float32 arrays that are trained, without their memory."""
    if not lora.rank:
        return model_shapes(shape)
    return make_adapters(
        shape, lora, lambda dims, _: jax.ShapeDtypeStruct(matrix_sizes(shape, lora.rank, dims), jnp.float32)
    )


def trained_shardings(shape: Shape, lora: Lora, axes: Axes, mesh: Mesh) -> Any:
    """A NamedSharding for each of them. A and B are split as the dims of their weight are."""

    def place(dims: str) -> NamedSharding:
        return NamedSharding(mesh, weight_spec(axes, dims, mesh, shape.k))

    if not lora.rank:
        return Transformer(shape, lambda weight: place(weight.stacked_dims))
    return make_adapters(shape, lora, lambda dims, _: place(dims))


def initial_adapters(shape: Shape, lora: Lora, key: Array) -> Adapters:
    """Float32 adapters that change nothing yet: A uniform in +- 1 / sqrt(inputs), as PEFT draws it, and B zero."""

    def make(dims: str, weight: Weight) -> Array:
        sizes, bound = matrix_sizes(shape, lora.rank, dims), math.prod(shape.dims(weight.inputs)) ** -0.5
        own_key = jax.random.fold_in(key, zlib.crc32(weight.name.encode()))
        return jax.random.uniform(own_key, sizes, minval=-bound, maxval=bound) if dims[-1] == "r" else jnp.zeros(sizes)

    return make_adapters(shape, lora, make)


# --- merging ----------------------------------------------------------------------------------------------------------


def merged_weight(weight: Array, a: Array, b: Array, scale: float) -> Array:
    """W + scale * A B of one layer, added in float32 whatever W's type is, and cast back to it."""
    wide = [part.astype(jnp.float32) for part in (weight, a, b)]
    change = dot(wide[1].reshape(-1, a.shape[-1]), wide[2].reshape(b.shape[0], -1))
    return (wide[0] + scale * change.reshape(weight.shape)).astype(weight.dtype)


def merge_adapters(policy: Policy) -> Transformer:
    """The model with its adapters merged into the stacked weights, in place: the base is used up."""
    model, adapters = policy
    if adapters is None:
        return model
    scale = adapters.scale

    def stack(weight: Array, a: Array, b: Array) -> Array:
        def layer(index: Array, weight: Array) -> Array:
            return weight.at[index].set(merged_weight(weight[index], a[index], b[index], scale))

        return jax.lax.fori_loop(0, weight.shape[0], layer, weight)

    for name in sorted(adapters.adapted):
        weight = model[name]
        merged = jax.jit(stack, donate_argnums=0, out_shardings=weight.sharding)(weight, *adapters.pair(name))
        setattr(model.blocks, name, nnx.Param(merged))
    return model
