"""The transformer as the sampler runs it: layers unrolled, projections fused, the cache an explicit argument and
result.

Everything here is manual inside `shard_map`: each model shard holds its own heads, ffn columns and vocabulary rows, and
a collective is written where it happens. Blocks are unrolled, because scanning over stacked weights inside the token
loop would copy every layer's weights each token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from crpo_jax.model.attention import AttentionKind, causal_attention, decode_attention
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import add_bias, dot, rms_norm, rope


class SamplerWeights(NamedTuple):
    """A model in its sampling form: the weights outside the blocks by name, and every layer's buffers by name.

    What reads the same input stands side by side, one model shard after the other: `qkv` [d, (n + 2k) * h] has a
    shard's query heads, then its key heads, then its value heads; `gate_up` [d, 2f] its gate columns, then its up
    columns.
    """

    ends: dict[str, Array]
    layers: tuple[dict[str, Array], ...]

    @property
    def dtype(self) -> Any:
        return self.ends["embed_vd"].dtype


class Cache(NamedTuple):
    """Keys and values of one layer: the prompts', right-aligned and shared by the g rows of a group, and the rows'
    own."""

    prompt_k_pkth: Array
    prompt_v_pkth: Array
    k_bksh: Array
    v_bksh: Array


class Shard(NamedTuple):
    """The part of a tensor-parallel model that this device holds; `axis` None means the whole of it."""

    axis: str | None

    def sum(self, x: Array) -> Array:
        return x if self.axis is None else jax.lax.psum(x, self.axis)

    def max(self, x: Array) -> Array:
        return x if self.axis is None else jax.lax.pmax(x, self.axis)

    def gather(self, x: Array, dim: int) -> Array:
        return x if self.axis is None else jax.lax.all_gather(x, self.axis, axis=dim, tiled=True)

    def place(self) -> Array:
        return jnp.int32(0) if self.axis is None else jax.lax.axis_index(self.axis)


def embed(table_vd: Float[Array, "v d"], tokens: Int[Array, "..."], shard: Shard) -> Float[Array, "... d"]:
    """Rows of an embedding whose vocabulary is split over the model axis: each device adds those it holds."""
    if shard.axis is None:
        return table_vd[tokens]
    local = tokens - shard.place() * table_vd.shape[0]
    is_local = (local >= 0) & (local < table_vd.shape[0])
    return shard.sum(jnp.where(is_local[..., None], table_vd[jnp.where(is_local, local, 0)], 0))


def fused_qkv(
    layer: Mapping[str, Array], x: Float[Array, "... d"], positions: Int[Array, "..."], shape: Shape
) -> tuple[Array, Array, Array]:
    """Rotated queries [..., n, h], in float32 since attention rounds them, rotated keys [..., k, h] and values
    [..., k, h], of the block's input."""
    normed = rms_norm(x, layer["attn_norm_d"], shape.norm_eps)
    buffer = add_bias(dot(normed, layer["qkv"]), layer["qkv_bias"])
    heads = buffer.reshape(*x.shape[:-1], -1, shape.h)
    n = layer["o_nhd"].shape[0]
    k = (heads.shape[-2] - n) // 2
    rotated = rope(heads[..., : n + k, :], positions, shape.rope_theta)
    return rotated[..., :n, :], rotated[..., n:, :].astype(x.dtype), heads[..., n + k :, :]


def fused_mlp(layer: Mapping[str, Array], x: Float[Array, "... d"], shape: Shape) -> Float[Array, "... d"]:
    gate, up = jnp.split(dot(rms_norm(x, layer["mlp_norm_d"], shape.norm_eps), layer["gate_up"]), 2, axis=-1)
    return dot(jax.nn.silu(gate) * up, layer["down_fd"])


def last_logits(weights: SamplerWeights, x: Float[Array, "b d"], shape: Shape) -> Float[Array, "b v"]:
    """Float32 logits of the last block's output (this device's part of v)."""
    unembed = weights.ends["embed_vd"].T if shape.tied else weights.ends["unembed_dv"]
    return dot(rms_norm(x, weights.ends["final_norm_d"], shape.norm_eps), unembed, out=jnp.float32)


def prefill(
    weights: SamplerWeights,
    tokens: Int[Array, "p t"],
    lengths: Int[Array, " p"],
    shape: Shape,
    shard: Shard,
    attention: AttentionKind,
) -> tuple[Float[Array, "p v"], list[tuple[Array, Array]]]:
    """Logits after the last token of each right-padded prompt, and every layer's prompt keys and values [p, k, t, h].

    The keys and values come right-aligned, so that a response's follow its prompt's whatever the prompt's length.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, keys_values = embed(weights.ends["embed_vd"], tokens, shard), []

    def aligned(x_ptkh: Array) -> Array:
        return jax.vmap(lambda x, shift: jnp.roll(x, shift, axis=1))(
            x_ptkh.transpose(0, 2, 1, 3), tokens.shape[1] - lengths
        )

    for layer in weights.layers:
        q, k, v = fused_qkv(layer, x, positions, shape)
        keys_values.append((aligned(k), aligned(v)))
        x = x + shard.sum(dot(causal_attention(q, k, v, attention), layer["o_nhd"], 2))
        x = x + shard.sum(fused_mlp(layer, x, shape))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last_logits(weights, last, shape), keys_values


def decode(
    weights: SamplerWeights,
    tokens: Int[Array, " b"],
    positions: Int[Array, " b"],
    prompt_lengths: Int[Array, " p"],
    cursor: Int[Array, ""],
    cache: Sequence[Cache],
    shape: Shape,
    shard: Shard,
) -> tuple[Float[Array, "b v"], list[Cache]]:
    """Logits after one more token per row, the row's number `positions`, written into slot `cursor` of every layer's
    cache.

    A row sees as many slots before its token as it has tokens: its own back to slot 0, and then its prompt's.
    """
    t, s = cache[0].prompt_k_pkth.shape[2], cache[0].k_bksh.shape[2]
    own_seen: Bool[Array, "b s"] = (jnp.arange(s) >= cursor - positions[:, None]) & (jnp.arange(s) <= cursor)
    prompt_seen: Bool[Array, "p t"] = jnp.arange(t) >= t - prompt_lengths[:, None]
    x, new = embed(weights.ends["embed_vd"], tokens, shard), []
    for layer, old in zip(weights.layers, cache, strict=True):
        q, k, v = fused_qkv(layer, x, positions, shape)
        k_bksh = jax.lax.dynamic_update_slice_in_dim(old.k_bksh, k[:, :, None], cursor, axis=2)
        v_bksh = jax.lax.dynamic_update_slice_in_dim(old.v_bksh, v[:, :, None], cursor, axis=2)
        new.append(Cache(old.prompt_k_pkth, old.prompt_v_pkth, k_bksh, v_bksh))
        mixed = decode_attention(q, old.prompt_k_pkth, old.prompt_v_pkth, prompt_seen, k_bksh, v_bksh, own_seen)
        x = x + shard.sum(dot(mixed, layer["o_nhd"], 2))
        x = x + shard.sum(fused_mlp(layer, x, shape))
    return last_logits(weights, x, shape), new
