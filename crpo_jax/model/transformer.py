"""The decoder-only transformer as training runs it: a scan over stacked blocks, which the compiler splits by the
layout.

The weights are those that `model/architecture.py` declares. The sampler's forward pass, over weights of another form,
is in `decode.py`. Parity with transformers is a test.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from crpo_jax.model.adapters import Adapters
from crpo_jax.model.architecture import Weight
from crpo_jax.model.attention import causal_attention
from crpo_jax.model.rotary import rope
from crpo_jax.model.shape import Shape

MakeWeight = Callable[[Weight], Any]
"""What stands for a weight: an array, a ShapeDtypeStruct, a sharding."""


class Block(nnx.Module):
    """A layer: attention and a gated feed-forward network, each added to the residual stream. `block[name]` is a
    weight."""

    def __init__(self, shape: Shape, make: MakeWeight) -> None:
        self.shape = shape
        for weight in shape.weights:
            if weight.stacked:
                setattr(self, weight.name, nnx.Param(make(weight)))

    def __getitem__(self, name: str) -> Array:
        return getattr(self, name)[...]

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        adapters: Adapters | None = None,
        placement: "Placement | None" = None,
        windowed: Bool[Array, ""] | bool = False,
    ) -> Float[Array, "b t d"]:
        """`adapters` are one layer's; `windowed`: attention sees the last shape.window tokens only."""
        place = placement or Placement()
        with jax.named_scope("attention"):
            q, k, v = self.qkv(x, positions, adapters, windowed)
            mixed = attend(q, place.kv_heads(k), place.kv_heads(v), self.shape, windowed, place)
            x = place.activations(x + self.normed("attn_post_norm_d", self.linear("o_nhd", mixed, adapters)))
        with jax.named_scope("mlp"):
            return place.activations(x + self.normed("mlp_post_norm_d", self.mlp(x, adapters)))

    def normed(self, name: str, x: Array) -> Array:
        """x through the norm of this name; x itself where the architecture has none."""
        return rms_norm(x, self[name], self.shape.norm_eps, self.shape.norm_offset) if hasattr(self, name) else x

    def qkv(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        adapters: Adapters | None,
        windowed: Bool[Array, ""] | bool,
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
        """Rotated queries and keys, and values, of the block's input."""
        x = self.normed("attn_norm_d", x)
        q, k, v = (self.linear(name, x, adapters) for name in ("q_dnh", "k_dkh", "v_dkh"))
        if hasattr(self, "q_bias_nh"):
            q, k, v = q + self["q_bias_nh"], k + self["k_bias_kh"], v + self["v_bias_kh"]
        q, k = self.normed("q_norm_h", q), self.normed("k_norm_h", k)
        frequencies = self.shape.frequencies(windowed)
        return rope(q, positions, frequencies), rope(k, positions, frequencies), v

    def mlp(self, x: Float[Array, "b t d"], adapters: Adapters | None) -> Float[Array, "b t d"]:
        x = self.normed("mlp_norm_d", x)
        gated = self.shape.activation(self.linear("gate_df", x, adapters)) * self.linear("up_df", x, adapters)
        return self.linear("down_fd", gated, adapters)

    def linear(self, name: str, x: Array, adapters: Adapters | None) -> Array:
        """x W, and where that weight is adapted x W + scale * (x A) B, rounded once as one sum."""
        weight, contracted = self[name], len(self.shape.weight(name).inputs)
        if adapters is None or name not in adapters.adapted:
            return dot(x, weight, contracted)
        a, b = adapters.pair(name)
        low_rank = adapters.scale * dot(dot(x, a, contracted), b, out=jnp.float32)
        return (dot(x, weight, contracted, out=jnp.float32) + low_rank).astype(x.dtype)


class Transformer(nnx.Module):
    """A model: embedding, stacked blocks, final norm and, unless the embedding is tied, the output projection."""

    def __init__(self, shape: Shape, make: MakeWeight) -> None:
        self.shape = shape
        for weight in shape.weights:
            if not weight.stacked:
                setattr(self, weight.name, nnx.Param(make(weight)))
        self.blocks = Block(shape, make)

    def __getitem__(self, name: str) -> Array:
        """A weight by its name; those of the blocks have a leading dim l."""
        return getattr(self, name)[...] if hasattr(self, name) else self.blocks[name]

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        adapters: Adapters | None = None,
        placement: "Placement | None" = None,
        remat: bool = False,
        unroll: bool = False,
    ) -> Float[Array, "b t d"]:
        """The normed hidden state of every token of right-padded rows, in the type of the weights."""
        place = placement or Placement()
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        mixed = len(set(self.shape.windowed)) > 1  # layers of both kinds: which one, the scan says
        windowed = jnp.array(self.shape.windowed) if mixed else None

        def layer(x: Array, weights: tuple[Block, Adapters | None, Array | None]) -> tuple[Array, None]:
            block, low_rank, of_layer = weights
            low_rank = None if low_rank is None else place.adapters(low_rank)
            kind = self.shape.windowed[0] if of_layer is None else of_layer
            return place.block(block)(x, positions, low_rank, place, kind), None

        with jax.named_scope("embed"):
            x = place.activations(scale_embedding(self["embed_vd"][tokens], self.shape))
        layers = (self.blocks, adapters, windowed)
        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, layers, unroll=unroll)
        return rms_norm(x, self["final_norm_d"], self.shape.norm_eps, self.shape.norm_offset)

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Float32 logits of normed hidden states."""
        with jax.named_scope("unembed"):
            return dot(hidden, self["embed_vd"].T if self.shape.tied else self["unembed_dv"], out=jnp.float32)


class Placement(NamedTuple):
    """How a mesh splits the training forward: functions that constrain the weights of a block, its adapters,
    activations [b, t, d] and KV heads [b, t, k, h], and attention [b, t, n, h] as the mesh computes it."""

    block: Callable[[Block], Block] = lambda block: block
    adapters: Callable[[Adapters], Adapters] = lambda adapters: adapters
    ends: Callable[[Transformer], Transformer] = lambda model: model
    activations: Callable[[Array], Array] = lambda x: x
    kv_heads: Callable[[Array], Array] = lambda x: x
    attend: Callable[[Array, Array, Array, float, int], Array] = lambda q, k, v, scale, window: causal_attention(
        q, k, v, "xla", scale, window
    )


def model_shapes(shape: Shape, dtype: Any = jnp.float32) -> Transformer:
    """The model's shapes without its memory."""
    return Transformer(shape, lambda weight: jax.ShapeDtypeStruct(shape.dims(weight.stacked_dims), dtype))


def random_model(shape: Shape, key: Array) -> Transformer:
    """A float32 model from scratch. Each weight's key follows from its name, not from the order of the declarations."""

    def make(weight: Weight) -> Array:
        own_key = jax.random.fold_in(key, zlib.crc32(weight.name.encode()))
        return weight.initializer(own_key, shape.dims(weight.stacked_dims), shape)

    return Transformer(shape, make)


def parameter_count(shape: Shape) -> int:
    return sum(math.prod(shape.dims(weight.stacked_dims)) for weight in shape.weights)


def attend(
    q: Array, k: Array, v: Array, shape: Shape, windowed: Bool[Array, ""] | bool, place: Placement
) -> Float[Array, "b t n h"]:
    """Attention over all earlier tokens or over a window of them; a kernel is compiled for each."""

    def over(window: int) -> Callable[[Array, Array, Array], Array]:
        return lambda q, k, v: place.attend(q, k, v, shape.scale, window)

    if isinstance(windowed, bool):
        return over(shape.window if windowed else 0)(q, k, v)
    return jax.lax.cond(windowed, over(shape.window), over(0), q, k, v)


def scale_embedding(x: Float[Array, "... d"], shape: Shape) -> Float[Array, "... d"]:
    """Embeddings as the first layer reads them; Gemma's factor d^1/2 is rounded to their type, as in transformers."""
    return x * jnp.asarray(shape.d**0.5, x.dtype) if shape.architecture.scaled_embedding else x


def rms_norm(
    x: Float[Array, "... d"], weight: Float[Array, " d"], eps: float, offset: float = 0.0
) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), in float32 until the end."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def dot(x: Array, weight: Array, contracted: int = 1, *, out: Any = None) -> Array:
    """Contracts the last `contracted` dims of x with the first of weight, as one two-dimensional product.

    XLA on CPU runs the same contraction of three or four dims at half the speed.
    """
    rows, inner = x.shape[: x.ndim - contracted], weight.shape[:contracted]
    size = math.prod(inner)
    flat = jnp.dot(x.reshape(-1, size), weight.reshape(size, -1), preferred_element_type=out)
    return flat.reshape(*rows, *weight.shape[contracted:])
