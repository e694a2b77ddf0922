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

from crpo_jax.model.adapters import matrix_names
from crpo_jax.model.architecture import Weight
from crpo_jax.model.attention import AttentionKind, causal_attention, decode_attention
from crpo_jax.model.rotary import rope
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import add_bias, dot, rms_norm, scale_embedding


class SamplerWeights(NamedTuple):
    """A model in its sampling form: the weights outside the blocks by name, and every layer's buffers by name.

    What reads the same input stands side by side, one model shard after the other: `qkv` [d, (n + 2k) * h] has a
    shard's query heads, then its key heads, then its value heads; `gate_up` [d, 2f] its gate columns, then its up
    columns.

    Adapters stay beside the weights, A and B of every weight of an adapted buffer, as in training: merged and rounded
    to bf16, a change of less than half a step of a weight would not be sampled from.
    """

    ends: dict[str, Array]
    layers: tuple[dict[str, Array], ...]

    @property
    def dtype(self) -> Any:
        return self.ends["embed_vd"].dtype


def sampler_buffers(shape: Shape) -> dict[str, list[Weight]]:
    """The buffers of a layer in the sampler: a weight, or those that read the same input side by side."""
    buffers: dict[str, list[Weight]] = {}
    for weight in shape.weights:
        if weight.stacked:
            buffers.setdefault(weight.fused or weight.name, []).append(weight)
    return buffers


class Cache(NamedTuple):
    """Keys and values of one layer: the prompts', right-aligned and shared by the g rows of a group, and the rows' own.

    A layer with a window keeps its last `window` slots of either: the prompts' latest, and a ring of the rows' own,
    where slot c is written at c modulo the ring's length.
    """

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


def normed(layer: Mapping[str, Array], name: str, x: Array, shape: Shape) -> Array:
    """x through the norm of this name; x itself where the architecture has none."""
    return rms_norm(x, layer[name], shape.norm_eps, shape.norm_offset) if name in layer else x


def project(layer: Mapping[str, Array], buffer: str, x: Array, shape: Shape) -> Array:
    """x times a buffer of weights, and where these are adapted + scale * (x A) B, rounded once as one sum, as in
    training.

    Where the input is split over the model axis, so is A, and what is returned is this device's part of a sum.
    """
    weights = sampler_buffers(shape)[buffer]
    contracted = len(weights[0].inputs)
    if matrix_names(weights[0])[0] not in layer:
        return dot(x, layer[buffer], contracted)
    changes = []
    for a, b in map(matrix_names, weights):
        change = dot(dot(x, layer[a], contracted), layer[b], out=jnp.float32)
        changes.append(change.reshape(*x.shape[:-contracted], -1))
    low_rank = layer["adapter_scale"] * jnp.concatenate(changes, axis=-1)
    return (dot(x, layer[buffer], contracted, out=jnp.float32) + low_rank).astype(x.dtype)


def fused_qkv(
    layer: Mapping[str, Array], x: Float[Array, "... d"], positions: Int[Array, "..."], shape: Shape, windowed: bool
) -> tuple[Array, Array, Array]:
    """Rotated queries [..., n, h], in float32 since attention rounds them, rotated keys [..., k, h] and values
    [..., k, h], of the block's input."""
    buffer = project(layer, "qkv", normed(layer, "attn_norm_d", x, shape), shape)
    if "qkv_bias" in layer:
        buffer = add_bias(buffer, layer["qkv_bias"])
    heads = buffer.reshape(*x.shape[:-1], -1, shape.h)
    n = layer["o_nhd"].shape[0]
    k = (heads.shape[-2] - n) // 2
    # Normed heads that are joined before their rotation do not compile for GPUs (XLA of jax 0.10.2).
    frequencies = shape.frequencies(windowed)
    q = rope(normed(layer, "q_norm_h", heads[..., :n, :], shape), positions, frequencies)
    keys = rope(normed(layer, "k_norm_h", heads[..., n : n + k, :], shape), positions, frequencies)
    return q, keys.astype(x.dtype), heads[..., n + k :, :]


def add_attention(layer: Mapping[str, Array], x: Array, mixed: Array, shape: Shape, shard: Shard) -> Array:
    """The residual stream after attention, of which `mixed` are the values mixed by this device's heads."""
    return x + normed(layer, "attn_post_norm_d", shard.sum(project(layer, "o_nhd", mixed, shape)), shape)


def add_mlp(layer: Mapping[str, Array], x: Float[Array, "... d"], shape: Shape, shard: Shard) -> Float[Array, "... d"]:
    """The residual stream after the gated feed-forward network."""
    gate, up = jnp.split(project(layer, "gate_up", normed(layer, "mlp_norm_d", x, shape), shape), 2, axis=-1)
    written = shard.sum(project(layer, "down_fd", shape.activation(gate) * up, shape))
    return x + normed(layer, "mlp_post_norm_d", written, shape)


def last_logits(weights: SamplerWeights, x: Float[Array, "b d"], shape: Shape) -> Float[Array, "b v"]:
    """Float32 logits of the last block's output (this device's part of v)."""
    unembed = weights.ends["embed_vd"].T if shape.tied else weights.ends["unembed_dv"]
    return dot(normed(weights.ends, "final_norm_d", x, shape), unembed, out=jnp.float32)


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
    x, keys_values = scale_embedding(embed(weights.ends["embed_vd"], tokens, shard), shape), []

    def aligned(x_ptkh: Array) -> Array:
        return jax.vmap(lambda x, shift: jnp.roll(x, shift, axis=1))(
            x_ptkh.transpose(0, 2, 1, 3), tokens.shape[1] - lengths
        )

    for layer, windowed in zip(weights.layers, shape.windowed, strict=True):
        q, k, v = fused_qkv(layer, x, positions, shape, windowed)
        keys_values.append((aligned(k), aligned(v)))
        mixed = causal_attention(q, k, v, attention, shape.scale, shape.window if windowed else 0)
        x = add_mlp(layer, add_attention(layer, x, mixed, shape, shard), shape, shard)
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

    A row sees as many slots before its token as it has tokens: its own back to slot 0, and then its prompt's; in a
    layer with a window, the last of them.
    """
    prompt_lengths = jnp.repeat(prompt_lengths, tokens.shape[0] // prompt_lengths.shape[0])
    x, new = scale_embedding(embed(weights.ends["embed_vd"], tokens, shard), shape), []
    for layer, old, windowed in zip(weights.layers, cache, shape.windowed, strict=True):
        q, k, v = fused_qkv(layer, x, positions, shape, windowed)
        slot = cursor % old.k_bksh.shape[2] if windowed else cursor
        k_bksh = jax.lax.dynamic_update_slice_in_dim(old.k_bksh, k[:, :, None], slot, axis=2)
        v_bksh = jax.lax.dynamic_update_slice_in_dim(old.v_bksh, v[:, :, None], slot, axis=2)
        new.append(Cache(old.prompt_k_pkth, old.prompt_v_pkth, k_bksh, v_bksh))
        window = shape.window if windowed else None
        seen = visible_slots(old, positions, prompt_lengths, cursor, window)
        mixed = decode_attention(q, old.prompt_k_pkth, old.prompt_v_pkth, seen[0], k_bksh, v_bksh, seen[1], shape.scale)
        x = add_mlp(layer, add_attention(layer, x, mixed, shape, shard), shape, shard)
    return last_logits(weights, x, shape), new


def visible_slots(
    cache: Cache,
    positions: Int[Array, " b"],
    prompt_lengths: Int[Array, " b"],
    cursor: Int[Array, ""],
    window: int | None,
) -> tuple[Bool[Array, "b t"], Bool[Array, "b s"]]:
    """Which slots of its prompt and of its own a row sees from `positions`; with a window by the tokens' ages."""
    t, s = cache.prompt_k_pkth.shape[2], cache.k_bksh.shape[2]
    if window is None:
        own = (jnp.arange(s) >= cursor - positions[:, None]) & (jnp.arange(s) <= cursor)
        return jnp.arange(t) >= t - prompt_lengths[:, None], own
    age = (cursor - jnp.arange(s)) % s
    own = (age <= jnp.minimum(positions, cursor)[:, None]) & (age < window)
    prompt_age = positions[:, None] - prompt_lengths[:, None] + t - jnp.arange(t)
    return (prompt_age <= positions[:, None]) & (prompt_age < window), own
