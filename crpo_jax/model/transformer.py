"""Qwen2 and Qwen2.5 in Flax: one declaration per weight, each name spelling its dims.

`hidden_states` is the training forward: a scan over stacked blocks under `jit`, where the compiler splits the work by
the layout. The sampler's forward, over weights of another form, is in `decode.py`.

Source: "Qwen2.5 Technical Report" (arXiv 2412.15115); parity with transformers' Qwen2ForCausalLM is a test.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from crpo_jax.model.attention import causal_attention
from crpo_jax.model.shape import Shape

if TYPE_CHECKING:
    from crpo_jax.model.lora import Adapters

Make = Callable[[str, str], Any]
"""What a weight becomes, from its name and its dims: an array, a ShapeDtypeStruct, a sharding."""


class Block(nnx.Module):
    """A transformer block; `stacked` gives every weight a leading dim l, one entry per layer."""

    def __init__(self, make: Make, stacked: bool) -> None:
        def weight(name: str) -> nnx.Param:
            return nnx.Param(make(name, ("l" if stacked else "") + dims_of(name)))

        self.attn_norm_d = weight("attn_norm_d")
        self.q_dnh = weight("q_dnh")
        self.q_bias_nh = weight("q_bias_nh")
        self.k_dkh = weight("k_dkh")
        self.k_bias_kh = weight("k_bias_kh")
        self.v_dkh = weight("v_dkh")
        self.v_bias_kh = weight("v_bias_kh")
        self.o_nhd = weight("o_nhd")
        self.mlp_norm_d = weight("mlp_norm_d")
        self.gate_df = weight("gate_df")
        self.up_df = weight("up_df")
        self.down_fd = weight("down_fd")


class Qwen2(nnx.Module):
    """The weights of a model; `unembed_dv` is absent where the embedding serves both ends (tied)."""

    def __init__(self, make: Make, *, tied: bool, stacked: bool = True, layers: int = 0) -> None:
        self.embed_vd = nnx.Param(make("embed_vd", "vd"))
        self.blocks: Any = (
            Block(make, stacked=True) if stacked else nnx.List([Block(make, stacked=False) for _ in range(layers)])
        )
        self.final_norm_d = nnx.Param(make("final_norm_d", "d"))
        if not tied:
            self.unembed_dv = nnx.Param(make("unembed_dv", "dv"))

    @property
    def tied(self) -> bool:
        return not hasattr(self, "unembed_dv")


def dims_of(name: str) -> str:
    """The dims that a weight's name spells: `q_bias_nh` -> "nh"."""
    return name.rsplit("_", 1)[1]


def abstract(shape: Shape, dtype: Any = jnp.float32) -> Qwen2:
    """The model's shapes without its memory."""
    return Qwen2(lambda name, dims: jax.ShapeDtypeStruct(shape.dims(dims), dtype), tied=shape.tied)


def initial(shape: Shape, key: Array) -> Qwen2:
    """A model from scratch in float32: matrices normal with deviation d^-1/2, those that write the residual stream smaller by
    depth, norms 1, biases 0. An embedding of its own (untied) has deviation 1, so that the first blocks do not drown it."""
    count, scale = iter(range(10**6)), shape.d**-0.5
    deviations = {
        "o_nhd": scale / (2 * shape.l) ** 0.5,
        "down_fd": scale / (2 * shape.l) ** 0.5,
        "embed_vd": scale if shape.tied else 1.0,
    }

    def make(name: str, dims: str) -> Array:
        sizes, here = shape.dims(dims), jax.random.fold_in(key, next(count))
        if "norm" in name:
            return jnp.ones(sizes)
        if "bias" in name:
            return jnp.zeros(sizes)
        return jax.random.normal(here, sizes) * deviations.get(name, scale)

    return Qwen2(make, tied=shape.tied)


def parameter_count(shape: Shape) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(shape)))


def rms_norm(x: Float[Array, "... d"], weight: Float[Array, " d"], eps: float) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + eps) * weight; the mean in float32, the product in x's type, as transformers has it."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * normed.astype(x.dtype)


def rope(x: Float[Array, "... n h"], positions: Int[Array, "..."], theta: float) -> Float[Array, "... n h"]:
    """Rotary position embedding in the half-split form; angles are float32, since bf16 rounds position 257 to 256."""
    half = x.shape[-1] // 2
    frequency = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def dot(x: Array, weight: Array, contracted: int = 1, *, out: Any = None) -> Array:
    """Contracts the last `contracted` dims of x with the first of weight, as one two-dimensional product.

    XLA on CPU runs the same contraction of three or four dims at half the speed.
    """
    rows, inner = x.shape[: x.ndim - contracted], weight.shape[:contracted]
    flat = jnp.dot(x.reshape(-1, _product(inner)), weight.reshape(_product(inner), -1), preferred_element_type=out)
    return flat.reshape(*rows, *weight.shape[contracted:])


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def linear(x: Array, block: Block, weight: str, adapters: "Adapters | None" = None, contracted: int = 1) -> Array:
    """x W, and where the weight of that name is adapted x W + scale * (x A) B."""
    if adapters is None or weight not in adapters.weights:
        return dot(x, getattr(block, weight)[...], contracted)
    a, b = adapters.pair(weight)
    whole = dot(x, getattr(block, weight)[...], contracted, out=jnp.float32)  # rounded once, with what the adapters add
    return (whole + adapters.scale * dot(dot(x, a, contracted), b, out=jnp.float32)).astype(x.dtype)


def qkv(
    block: Block,
    x: Float[Array, "... d"],
    positions: Int[Array, "..."],
    shape: Shape,
    adapters: "Adapters | None" = None,
) -> tuple[Array, Array, Array]:
    """Rotated queries [..., n, h] and keys [..., k, h], and values [..., k, h], of the block's normed input."""
    x = rms_norm(x, block.attn_norm_d[...], shape.norm_eps)
    q = linear(x, block, "q_dnh", adapters) + block.q_bias_nh[...]
    k = linear(x, block, "k_dkh", adapters) + block.k_bias_kh[...]
    v = linear(x, block, "v_dkh", adapters) + block.v_bias_kh[...]
    return rope(q, positions, shape.rope_theta), rope(k, positions, shape.rope_theta), v


def mlp(
    block: Block, x: Float[Array, "... d"], shape: Shape, adapters: "Adapters | None" = None
) -> Float[Array, "... d"]:
    x = rms_norm(x, block.mlp_norm_d[...], shape.norm_eps)
    return linear(
        jax.nn.silu(linear(x, block, "gate_df", adapters)) * linear(x, block, "up_df", adapters),
        block,
        "down_fd",
        adapters,
    )


def logits(model: Qwen2, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
    """Float32 logits of normed hidden states."""
    weight = model.embed_vd[...].T if model.tied else model.unembed_dv[...]
    return dot(hidden, weight, out=jnp.float32)


class Placement(NamedTuple):
    """How the training forward is split: functions that constrain weights, [b, t, d] activations and [b, t, k, h] KV heads, and
    attention [b, t, n, h] as a mesh computes it."""

    block: Callable[[Block], Block] = lambda block: block
    adapters: Callable[["Adapters"], "Adapters"] = lambda adapters: adapters
    ends: Callable[[Qwen2], Qwen2] = lambda model: model
    activations: Callable[[Array], Array] = lambda x: x
    kv_heads: Callable[[Array], Array] = lambda x: x
    attend: Callable[[Array, Array, Array], Array] = lambda q, k, v: causal_attention(q, k, v, "xla")


def hidden_states(
    model: Qwen2,
    tokens: Int[Array, "b t"],
    shape: Shape,
    *,
    adapters: "Adapters | None" = None,
    placement: Placement = Placement(),
    remat: bool = False,
    unroll: bool = False,
) -> Float[Array, "b t d"]:
    """The normed hidden state of every token of right-padded rows, in the type of the weights; `adapters` are stacked as they are."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def one(x: Array, layer: tuple[Block, "Adapters | None"]) -> tuple[Array, None]:
        block, low = placement.block(layer[0]), None if layer[1] is None else placement.adapters(layer[1])
        q, k, v = qkv(block, x, positions, shape, low)
        x = x + linear(placement.attend(q, placement.kv_heads(k), placement.kv_heads(v)), block, "o_nhd", low, 2)
        x = placement.activations(x)
        return placement.activations(x + mlp(block, x, shape, low)), None

    x = placement.activations(model.embed_vd[...][tokens])
    x, _ = jax.lax.scan(jax.checkpoint(one) if remat else one, x, (model.blocks, adapters), unroll=unroll)
    return rms_norm(x, model.final_norm_d[...], shape.norm_eps)
