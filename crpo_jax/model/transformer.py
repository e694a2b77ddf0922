"""The decoder-only transformer as training runs it: a scan over stacked blocks, which the compiler splits by the
layout.

The weights are those that `model/architecture.py` declares. The sampler's forward pass, over weights of another form,
is in `decode.py`. Parity with transformers is a test.
"""

import functools
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
from crpo_jax.model.attention import AttentionKind, causal_attention
from crpo_jax.model.packed_attention import Packing, packed_attention
from crpo_jax.model.precision import precision_of
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
        packing: Packing | None = None,
    ) -> Float[Array, "b t d"]:
        """`adapters` are one layer's; `windowed`: attention sees the last shape.window tokens only."""
        place = placement or Placement()
        with jax.named_scope("attention"):
            q, k, v = self.qkv(x, positions, adapters, windowed)
            mixed = attend(q, place.kv_heads(k), place.kv_heads(v), packing, self.shape, windowed, place)
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
        """Rotated queries, in float32 since attention rounds them, rotated keys, and values, of the block's input."""
        x = self.normed("attn_norm_d", x)
        q, k, v = (self.linear(name, x, adapters) for name in ("q_dnh", "k_dkh", "v_dkh"))
        if hasattr(self, "q_bias_nh"):
            q, k, v = add_bias(q, self["q_bias_nh"]), add_bias(k, self["k_bias_kh"]), add_bias(v, self["v_bias_kh"])
        frequencies = self.shape.frequencies(windowed)
        q, k = (rope(self.normed(norm, x), positions, frequencies) for norm, x in (("q_norm_h", q), ("k_norm_h", k)))
        return q, k.astype(v.dtype), v

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
        packing: Packing | None = None,
        adapters: Adapters | None = None,
        placement: "Placement | None" = None,
        remat: bool = False,
        unroll: bool = False,
    ) -> Float[Array, "b t d"]:
        """The normed hidden state of every token, in the type of the weights. Rows are packed as `packing` says, or
        else are right-padded sequences."""
        place = placement or Placement()
        positions = packing.positions if packing else jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        mixed = len(set(self.shape.windowed)) > 1  # layers of both kinds: which one, the scan says
        windowed = jnp.array(self.shape.windowed) if mixed else None

        def layer(x: Array, weights: tuple[Block, Adapters | None, Array | None]) -> tuple[Array, None]:
            block, low_rank, of_layer = weights
            low_rank = None if low_rank is None else place.adapters(low_rank)
            kind = self.shape.windowed[0] if of_layer is None else of_layer
            return place.block(block)(x, positions, low_rank, place, kind, packing), None

        with jax.named_scope("embed"):
            embedded: Any = embed(place.embedding_gradient, self["embed_vd"], tokens)
            x = place.activations(scale_embedding(embedded, self.shape))
        layers = (self.blocks, adapters, windowed)
        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, layers, unroll=unroll)
        return rms_norm(x, self["final_norm_d"], self.shape.norm_eps, self.shape.norm_offset)

    @property
    def output(self) -> Array:
        """The output projection as it is stored: [d, v], or where it is tied the embedding [v, d]."""
        return self["embed_vd"] if self.shape.tied else self["unembed_dv"]

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Float32 logits of normed hidden states."""
        return unembed(hidden, self.output, self.shape.tied)


class Placement(NamedTuple):
    """How a mesh splits the training forward: functions that constrain the weights of a block, its adapters,
    activations [b, t, d] and KV heads [b, t, k, h], attention [b, t, n, h] as the mesh computes it, and the float32
    gradients of the embedding and of the output projection."""

    block: Callable[[Block], Block] = lambda block: block
    adapters: Callable[[Adapters], Adapters] = lambda adapters: adapters
    ends: Callable[[Transformer], Transformer] = lambda model: model
    activations: Callable[[Array], Array] = lambda x: x
    kv_heads: Callable[[Array], Array] = lambda x: x
    attend: Callable[[Array, Array, Array, Packing | None, float, int], Array] = lambda *inputs: attend_rows(
        *inputs, kind="xla"
    )
    embedding_gradient: Callable[[Array], Array] = lambda total: total
    output_gradient: Callable[[Array], Array] = lambda total: total


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


def attend_rows(
    q: Array, k: Array, v: Array, packing: Packing | None, scale: float, window: int, *, kind: AttentionKind
) -> Float[Array, "b t n h"]:
    """Attention within packed rows, or where nothing is packed of a row's tokens to all before them."""
    if packing is None:
        return causal_attention(q, k, v, kind, scale, window)
    return packed_attention(q, k, v, packing, kind, scale, window)


def attend(
    q: Array,
    k: Array,
    v: Array,
    packing: Packing | None,
    shape: Shape,
    windowed: Bool[Array, ""] | bool,
    place: Placement,
) -> Float[Array, "b t n h"]:
    """Attention over all tokens that are visible or over a window of them; a kernel is compiled for each."""

    def over(window: int) -> Callable[[Array, Array, Array], Array]:
        return lambda q, k, v: place.attend(q, k, v, packing, shape.scale, window)

    if isinstance(windowed, bool):
        return over(shape.window if windowed else 0)(q, k, v)
    return jax.lax.cond(windowed, over(shape.window), over(0), q, k, v)


def scale_embedding(x: Float[Array, "... d"], shape: Shape) -> Float[Array, "... d"]:
    """Embeddings as the first layer reads them; Gemma's factor d^1/2 is rounded to their type, as in transformers."""
    return x * jnp.asarray(shape.d**0.5, x.dtype) if shape.architecture.scaled_embedding else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def embed(
    constrain: Callable[[Array], Array], table: Float[Array, "v d"], tokens: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    """The tokens' rows. The gradients of a frequent token are summed in float32: in bf16 the sum would stop growing.

    `constrain` places the sum.
    """
    return table[tokens]


def embed_backward(
    constrain: Callable[[Array], Array], saved: tuple[Array, Array], gradient: Float[Array, "b t d"]
) -> tuple[Array, None]:
    table, tokens = saved
    zero, gradient = jax.lax.optimization_barrier((jnp.float32(0), gradient))  # or the zeros exist long before
    total = jnp.full(table.shape, zero).at[tokens].add(gradient.astype(jnp.float32))
    return constrain(total).astype(table.dtype), None


embed.defvjp(lambda constrain, *inputs: (embed(constrain, *inputs), inputs), embed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def unembed(hidden: Float[Array, "... d"], weight: Array, tied: bool) -> Float[Array, "... v"]:
    """Float32 logits by the output projection, stored as [v, d] where it is tied and else as [d, v].

    The weight is rounded to the type of `hidden`; its gradient is not, where the weight given is float32.
    """
    narrow = weight.astype(hidden.dtype)
    with jax.named_scope("unembed"):
        return dot(hidden, narrow.T if tied else narrow, out=jnp.float32)


def unembed_backward(tied: bool, saved: tuple[Array, Array], gradient: Float[Array, "... v"]) -> tuple[Array, Array]:
    """In float32: rounded to bf16, the gradients of all logits at a target would be off by one and the same factor."""
    hidden, weight = saved
    flat_hidden, flat_gradient = (x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in (hidden, gradient))
    wide = weight.astype(hidden.dtype).astype(jnp.float32)
    with jax.named_scope("unembed"):
        product = functools.partial(jnp.dot, precision=precision_of(hidden))
        of_hidden = product(flat_gradient, wide if tied else wide.T).astype(hidden.dtype)
        of_weight = product(flat_hidden.T, flat_gradient).astype(weight.dtype)
    return of_hidden.reshape(hidden.shape), of_weight.T if tied else of_weight


unembed.defvjp(lambda hidden, weight, tied: (unembed(hidden, weight, tied), (hidden, weight)), unembed_backward)


def rms_norm(
    x: Float[Array, "... d"], weight: Float[Array, " d"], eps: float, offset: float = 0.0
) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), in float32 and rounded once; so is the sum over tokens of its
    gradient."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * (weight.astype(jnp.float32) + offset)).astype(x.dtype)


def add_bias(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + bias, in float32 and rounded once; so is the sum over tokens of the bias's gradient."""
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def dot(x: Array, weight: Array, contracted: int = 1, *, out: Any = None) -> Array:
    """Contracts the last `contracted` dims of x with the first of weight, as one two-dimensional product.

    XLA on CPU runs the same contraction of three or four dims at half the speed.
    """
    rows, inner = x.shape[: x.ndim - contracted], weight.shape[:contracted]
    size = math.prod(inner)
    left, right = x.reshape(-1, size), weight.reshape(size, -1)
    flat = jnp.dot(left, right, precision=precision_of(x), preferred_element_type=out)
    return flat.reshape(*rows, *weight.shape[contracted:])
