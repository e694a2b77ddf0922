"""Attention in packed rows, which hold prompts once each and the responses that continue them, one after another.

A token sees its own sequence up to itself, and the prompt that its sequence continues. Scores and softmax are float32,
whatever the compute type.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jaxtyping import Array, Bool, Float, Int

from crpo_jax.model import attention
from crpo_jax.model.attention import MASKED, SPLASH_TILES, AttentionKind
from crpo_jax.model.precision import precision_of

TILE = 128  # XLA's attention skips tiles of so many queries and keys in which no query sees a key


class Packing(NamedTuple):
    """What belongs together in packed rows.

    The sequences of a row, first prompts and then responses, are numbered in ascending order; places that only fill up
    the row have a number each.
    """

    positions: Int[Array, "c t"]  # of a token in its prompt and response together
    sequences: Int[Array, "c t"]  # number of the prompt or response that a token is in
    prompts: Int[Array, "c t"]  # number of the prompt which that continues; a prompt's own


def visible(queries: Packing, keys: Packing, window: int) -> Bool[Array, "... q s"]:
    """Which keys each query sees; with a `window` among the last so many tokens, itself included."""
    (position, own, prompt), (of_key, sequence, _) = (
        (x[..., :, None] for x in queries),
        (x[..., None, :] for x in keys),
    )
    age = position - of_key
    seen = ((sequence == own) | (sequence == prompt)) & (age >= 0)
    return seen & (age < window) if window else seen


def packed_attention(
    q: Float[Array, "c t n h"],
    k: Float[Array, "c t k h"],
    v: Float[Array, "c t k h"],
    packing: Packing,
    kind: AttentionKind,
    scale: float,
    window: int = 0,
) -> Float[Array, "c t n h"]:
    """Attention within the sequences of packed rows, and to their prompts.

    Queries may come in float32 beside 16-bit keys: they are rounded here, by Splash once they are scaled. XLA and
    Splash compute the tiles in which anything is seen; cuDNN computes all that a causal mask leaves.
    """
    if kind == "splash" and q.shape[1] % SPLASH_TILES[-1] == 0:
        return jnp.stack([splash_row(*row, scale, window) for row in rows_of(q, k, v, packing)])
    q = q.astype(k.dtype)
    if kind == "cudnn":
        mask = visible(packing, packing, window)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=True, implementation="cudnn")
    return jnp.stack([tiled_row(*row, scale, window) for row in rows_of(q, k, v, packing)])


def rows_of(q: Array, k: Array, v: Array, packing: Packing) -> list[tuple[Array, Array, Array, Packing]]:
    """Each row by itself; a device has one."""
    return [(q[row], k[row], v[row], Packing(*(x[row] for x in packing))) for row in range(q.shape[0])]


def splash_row(q: Array, k: Array, v: Array, packing: Packing, scale: float, window: int) -> Float[Array, "t n h"]:
    """By the TPU's own kernel, which skips tiles of a mask that it is given as an array; `t` is a multiple of 128."""
    t, n, h = q.shape
    kv, tile = k.shape[1], next(size for size in SPLASH_TILES if t % size == 0)
    kernel: Any = splash_attention_kernel.make_splash_mha(
        visible(packing, packing, window)[None],
        block_sizes=splash_attention_kernel.BlockSizes(tile, tile, tile, tile, tile, tile, tile, tile),
        head_shards=1,
        q_seq_shards=1,
        interpret=attention.INTERPRET,
    )
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)  # a traced bool after make_splash_mha
    scaled = (q.astype(jnp.float32) * scale).astype(k.dtype)  # of float32 queries the only rounding
    queries = scaled.transpose(1, 0, 2).reshape(kv, n // kv, 1, t, h)
    keys, values = (x.transpose(1, 0, 2)[:, None] for x in (k, v))
    each_query_head = jax.vmap(kernel, in_axes=(0, None, None))  # one mask for all heads
    return jax.vmap(each_query_head)(queries, keys, values).reshape(n, t, h).transpose(1, 0, 2)


# --- XLA: a loop over the tiles of scores in which anything is seen ---------------------------------------------------


class Tiles(NamedTuple):
    """The pairs of tiles to compute, sorted by the queries' tile, and what the tiles hold."""

    pairs: Int[Array, ""]  # how many there are
    queries: Int[Array, " pairs"]
    keys: Int[Array, " pairs"]
    packing: Packing  # [tiles, tile]


def tile_length(t: int) -> int:
    return next(length for length in range(min(t, TILE), 0, -1) if t % length == 0)


def find_tiles(packing: Packing, length: int, window: int) -> Tiles:
    """All pairs of tiles with a query that sees a key, and few others: ranges of numbers and positions decide."""
    tiles = Packing(*(x.reshape(-1, length) for x in packing))
    (oldest, first, prompt), (newest, last, last_prompt) = (
        [limit(x, axis=1) for x in tiles] for limit in (jnp.min, jnp.max)
    )
    own = (first[:, None] <= last) & (last[:, None] >= first)
    of_prompt = (prompt[:, None] <= last) & (last_prompt[:, None] >= first)
    seen = jnp.tril(own | of_prompt)
    if window:
        seen &= oldest[:, None] - newest < window
    queries, keys = jnp.nonzero(seen, size=seen.size, fill_value=0)
    return Tiles(jnp.sum(seen), queries, keys, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def tiled_row(
    q: Float[Array, "t n h"],
    k: Float[Array, "t k h"],
    v: Float[Array, "t k h"],
    packing: Packing,
    scale: float,
    window: int,
) -> Float[Array, "t n h"]:
    """One row, tile by tile with the softmax carried along ("FlashAttention-2", arXiv 2307.08691, section 3.1).

    The number of tiles follows from the packing at run time, and no scores are stored.
    """
    return tiled_forward(q, k, v, packing, scale, window)[0]


def tiled_forward(q: Array, k: Array, v: Array, packing: Packing, scale: float, window: int) -> tuple[Array, Any]:
    n, kv, length = q.shape[1], k.shape[1], tile_length(q.shape[0])
    tiles = find_tiles(packing, length, window)
    queries, (keys, values) = split_queries(q, kv, length), [split_tiles(x, length) for x in (k, v)]

    def add_tile(pair: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        query, key = tiles.queries[pair], tiles.keys[pair]
        scores = tile_scores(queries[query], keys[key], tiles, query, key, scale, window)
        mixed, top, total = (x[query] for x in carry)
        highest = jnp.maximum(top, jnp.max(scores, axis=-1))
        mass, fade = jnp.exp(scores - highest[..., None]), jnp.exp(top - highest)
        added = tile_product("kqs,ksh->kqh", mass.astype(v.dtype), values[key])
        new = mixed * fade[..., None] + added, highest, total * fade + jnp.sum(mass, axis=-1)
        return tuple(x.at[query].set(part) for x, part in zip(carry, new, strict=True))

    empty = jnp.zeros(queries.shape, jnp.float32)
    start = (empty, jnp.full(queries.shape[:-1], MASKED), empty[..., 0])
    mixed, top, total = jax.lax.fori_loop(0, tiles.pairs, add_tile, start)
    out = mixed / total[..., None]
    return join_queries(out, n).astype(v.dtype), (q, k, v, packing, out.astype(v.dtype), top + jnp.log(total))


def tiled_backward(scale: float, window: int, saved: Any, gradient: Float[Array, "t n h"]) -> tuple[Any, ...]:
    q, k, v, packing, out, log_total = saved
    n, kv, length = q.shape[1], k.shape[1], tile_length(q.shape[0])
    tiles, of_out = find_tiles(packing, length, window), split_queries(gradient, kv, length)
    queries, (keys, values) = split_queries(q, kv, length), [split_tiles(x, length) for x in (k, v)]
    mean = jnp.sum(of_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def add_tile(pair: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        query, key = tiles.queries[pair], tiles.keys[pair]
        scores = tile_scores(queries[query], keys[key], tiles, query, key, scale, window)
        weights = jnp.exp(scores - log_total[query][..., None])
        of_weights = tile_product("kqh,ksh->kqs", of_out[query], values[key])
        of_scores = (weights * (of_weights - mean[query][..., None]) * scale).astype(k.dtype)
        of_q = tile_product("kqs,ksh->kqh", of_scores, keys[key])
        of_k = tile_product("kqs,kqh->ksh", of_scores, queries[query])
        of_v = tile_product("kqs,kqh->ksh", weights.astype(v.dtype), of_out[query])
        places = zip(carry, (query, key, key), (of_q, of_k, of_v), strict=True)
        return tuple(total.at[place].add(part) for total, place, part in places)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries, keys, values))
    of_q, of_k, of_v = jax.lax.fori_loop(0, tiles.pairs, add_tile, start)
    of_k, of_v = (x.transpose(0, 2, 1, 3).reshape(k.shape) for x in (of_k, of_v))
    return join_queries(of_q, n).astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype), None


tiled_row.defvjp(tiled_forward, tiled_backward)


def tile_product(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, precision=precision_of(x), preferred_element_type=jnp.float32)


def tile_scores(
    queries: Array, keys: Array, tiles: Tiles, query: Array, key: Array, scale: float, window: int
) -> Float[Array, "k rq s"]:
    """The scores of one pair of tiles, which the r queries of a KV head share a mask in."""
    of_query, of_key = (Packing(*(x[tile] for x in tiles.packing)) for tile in (query, key))
    seen = visible(of_query, of_key, window)
    hidden = jnp.tile(jnp.where(seen, 0.0, MASKED), (queries.shape[1] // seen.shape[0], 1))
    return tile_product("kqh,ksh->kqs", queries, keys) * scale + hidden


def split_tiles(x: Float[Array, "t k h"], length: int) -> Float[Array, "tiles k s h"]:
    return x.reshape(-1, length, *x.shape[1:]).transpose(0, 2, 1, 3)


def split_queries(x: Float[Array, "t n h"], kv: int, length: int) -> Float[Array, "tiles k rq h"]:
    """The queries of a KV head along one axis: plain batched products, XLA's fastest form."""
    _, n, h = x.shape
    return x.reshape(-1, length, kv, n // kv, h).transpose(0, 2, 3, 1, 4).reshape(-1, kv, n // kv * length, h)


def join_queries(x: Float[Array, "tiles k rq h"], n: int) -> Float[Array, "t n h"]:
    tiles, kv, queries, h = x.shape
    apart = x.reshape(tiles, kv, n // kv, queries * kv // n, h).transpose(0, 3, 1, 2, 4)
    return apart.reshape(-1, n, h)
