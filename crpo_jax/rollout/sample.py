"""The jitted sampling loop and what moves rows between loops; everything runs inside `shard_map`, manual over both axes.

Each data shard loops on its own rows and stops on its own: no collective per token unless the model axis is longer than 1.
The rows of a cache are written at one shared cursor, in place; a row that came later begins at a later slot.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from crpo_jax.model.attention import AttentionKind
from crpo_jax.model.decode import Cache, SamplerWeights, Shard, decode, prefill
from crpo_jax.model.placement import sampler_specs
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import CACHE_BKSH, ROWS_B, TOKENS_BT, kv_copies
from crpo_jax.parallel.mesh import DATA, MODEL, model_size
from crpo_jax.rollout.draw import Sampling, draw, row_keys

RUNNING, STOPPED, TRUNCATED = 0, 1, 2
"""Why a row ended: not yet, by a stop token (which belongs to the response), or at its longest length."""

STRIDE = 8  # steps between two tests whether every row ended: a GPU's loop waits for the host at each


class Rows(NamedTuple):
    """What the host knows of the rows of a cache; one that ended, or only fills up, has limit 0."""

    last: Int[Array, " b"]  # the last token drawn, not yet in the cache
    lengths: Int[Array, " b"]  # of the response so far
    limits: Int[Array, " b"]  # of the response
    prompt_lengths: Int[Array, " b"]
    prompts: Int[Array, " b"]  # with `samples`: which random numbers are the row's
    samples: Int[Array, " b"]


class Drawn(NamedTuple):
    """What one call drew: row i's `counts[i]` new tokens stand first, and `reasons[i]` says whether it ended."""

    tokens: Int[Array, "b c"]
    logprobs: Float[Array, "b c"]
    counts: Int[Array, " b"]
    reasons: Int[Array, " b"]


def nothing_drawn(rows: Rows, width: int) -> Drawn:
    b = rows.last.shape[0]
    reasons = jnp.where(rows.lengths < rows.limits, RUNNING, TRUNCATED)
    return Drawn(jnp.zeros((b, width), jnp.int32), jnp.zeros((b, width), jnp.float32), jnp.zeros(b, jnp.int32), reasons)


def recorded(
    drawn: Drawn,
    rows: Rows,
    at: Int[Array, ""],
    tokens: Int[Array, " b"],
    logprobs: Float[Array, " b"],
    stop_ids: Int[Array, " x"],
) -> Drawn:
    """With these tokens as the call's number `at`; rows that had ended keep what they have."""
    running = drawn.reasons == RUNNING
    stops: Bool[Array, " b"] = jnp.any(tokens[:, None] == stop_ids, axis=1)
    reasons = jnp.where(stops, STOPPED, jnp.where(rows.lengths + at + 1 >= rows.limits, TRUNCATED, RUNNING))

    def write(into: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(into, new[:, None], at, axis=1)

    return Drawn(
        tokens=write(drawn.tokens, tokens),
        logprobs=write(drawn.logprobs, logprobs),
        counts=drawn.counts + running,
        reasons=jnp.where(running, reasons, drawn.reasons),
    )


def start(
    weights: SamplerWeights,
    tokens: Int[Array, "p t"],
    rows: Rows,
    key: Key[Array, ""],
    *,
    shape: Shape,
    shard: Shard,
    how: Sampling,
    slots: tuple[int, int],
    attention: AttentionKind,
) -> tuple[tuple[Cache, ...], Drawn]:
    """Prefills right-padded prompts and draws the first token of every row, b = p * g, prompt-major.

    `slots` of the cache: for a prompt, at least t, and for a response.
    """
    p, t = tokens.shape
    b = rows.last.shape[0]
    scores, kept = prefill(weights, tokens, rows.prompt_lengths.reshape(p, -1)[:, 0], shape, shard, attention)
    scores = jnp.repeat(scores, b // p, axis=0)
    stop_ids = jnp.array(how.stop_ids, jnp.int32)
    new = draw(scores, row_keys(key, rows.prompts, rows.samples), rows.lengths, how, shard, shape.v)

    def layer(k: Array, v: Array) -> Cache:
        prompt = [jnp.pad(x, ((0, 0), (0, 0), (slots[0] - t, 0), (0, 0))) for x in (k, v)]
        own = [jnp.zeros((b, k.shape[1], slots[1], k.shape[3]), k.dtype) for _ in range(2)]
        return Cache(*prompt, *own)

    drawn = recorded(nothing_drawn(rows, 1), rows, jnp.int32(0), *new, stop_ids)
    return tuple(layer(k, v) for k, v in kept), drawn


class Loop(NamedTuple):
    done: Int[Array, ""]
    last: Int[Array, " b"]
    drawn: Drawn
    cache: tuple[Cache, ...]


def advance(
    weights: SamplerWeights,
    cache: tuple[Cache, ...],
    rows: Rows,
    key: Key[Array, ""],
    cursor: Int[Array, ""],
    steps: Int[Array, ""],
    *,
    shape: Shape,
    shard: Shard,
    how: Sampling,
    chunk: int,
) -> tuple[tuple[Cache, ...], Drawn]:
    """Draws `steps` <= `chunk` more tokens per row, the first after writing `last` into slot `cursor`; fewer where every row of
    this shard ended. It may run on to the next multiple of STRIDE, so there must be room for a whole chunk or rows must end by then."""
    keys, stop_ids = row_keys(key, rows.prompts, rows.samples), jnp.array(how.stop_ids, jnp.int32)
    prompt_lengths = rows.prompt_lengths.reshape(cache[0].prompt_k_pkth.shape[0], -1)[:, 0]

    def step(_: Any, loop: Loop) -> Loop:
        lengths = rows.lengths + loop.done
        at = rows.prompt_lengths + lengths - 1
        scores, cache = decode(weights, loop.last, at, prompt_lengths, cursor + loop.done, loop.cache, shape, shard)
        tokens, logprobs = draw(scores, keys, lengths, how, shard, shape.v)
        drawn = recorded(loop.drawn, rows, loop.done, tokens, logprobs, stop_ids)
        return Loop(loop.done + 1, tokens, drawn, tuple(cache))

    def unfinished(loop: Loop) -> Bool[Array, ""]:
        return (loop.done < steps) & jnp.any(loop.drawn.reasons == RUNNING)

    stride = STRIDE if chunk % STRIDE == 0 else 1
    begun = Loop(jnp.int32(0), rows.last, nothing_drawn(rows, chunk), cache)
    ended = jax.lax.while_loop(unfinished, lambda loop: jax.lax.fori_loop(0, stride, step, loop), begun)
    return ended.cache, ended.drawn


def widen(old: Cache, *, slots: int) -> Cache:
    """One layer's cache with room for `slots` response tokens."""
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))) for x in (old.k_bksh, old.v_bksh))
    return old._replace(k_bksh=k, v_bksh=v)


def collect(old: Cache, into: Cache, rows: Int[Array, " b"], cursor: Int[Array, ""], to: Int[Array, ""]) -> Cache:
    """One layer's cache `into`, with row i from row `rows[i]` of `old`; -1 keeps what is there.

    A collected row holds its prompt itself (`into` has no prompt slots), and what ended at slot `cursor` of `old` ends at `to`.
    """
    slots = into.k_bksh.shape[2]
    taken, kept = jnp.maximum(rows, 0), (rows >= 0)[:, None, None, None]
    group = old.k_bksh.shape[0] // old.prompt_k_pkth.shape[0]

    def moved(prompt: Array, own: Array, there: Array) -> Array:
        whole = jnp.concatenate([prompt[taken // group], own[taken]], axis=2)
        padded = jnp.pad(whole, ((0, 0), (0, 0), (slots, slots), (0, 0)))
        first = slots + prompt.shape[2] + cursor - to
        return jnp.where(kept, jax.lax.dynamic_slice_in_dim(padded, first, slots, axis=2), there)

    k = moved(old.prompt_k_pkth, old.k_bksh, into.k_bksh)
    return into._replace(k_bksh=k, v_bksh=moved(old.prompt_v_pkth, old.v_bksh, into.v_bksh))


class Programs(NamedTuple):
    """The compiled sampler of one model, mesh and way of sampling, the same on every process:

    `start(weights, tokens, rows, key, slots=)` and `advance(weights, cache, rows, key, cursor, steps)` give a cache and what was
    drawn; `widen(layer, slots=)`, `collect(layer, into, rows, cursor, to)` and `empty(b=, slots=, dtype=)` give one layer's cache.
    """

    start: Any
    advance: Any
    widen: Any
    collect: Any
    empty: Any


@functools.cache
def programs(shape: Shape, mesh: Mesh, how: Sampling, chunk: int, attention: AttentionKind) -> Programs:
    shard = Shard(MODEL if model_size(mesh) > 1 else None)
    weights, layer = sampler_specs(shape, mesh), Cache._make([CACHE_BKSH] * len(Cache._fields))
    rows, drawn = Rows._make([ROWS_B] * len(Rows._fields)), Drawn._make([TOKENS_BT, TOKENS_BT, ROWS_B, ROWS_B])
    cache, one, fixed = (layer,) * shape.l, P(), {"shape": shape, "shard": shard, "how": how}

    def mapped(function: Any, inputs: tuple[Any, ...], outputs: Any) -> Any:
        # Outputs are equal on all model shards because every draw ends in a sum over them; JAX cannot see that.
        return jax.shard_map(
            function, mesh=mesh, in_specs=inputs, out_specs=outputs, axis_names={DATA, MODEL}, check_vma=False
        )

    def start_all(*inputs: Any, slots: tuple[int, int]) -> Any:
        begin = functools.partial(start, **fixed, slots=slots, attention=attention)
        return mapped(begin, (weights, TOKENS_BT, rows, one), (cache, drawn))(*inputs)

    def advance_all(*inputs: Any) -> Any:
        return mapped(
            functools.partial(advance, **fixed, chunk=chunk), (weights, cache, rows, one, one, one), (cache, drawn)
        )(*inputs)

    def widen_all(old: Cache, slots: int) -> Any:
        return mapped(functools.partial(widen, slots=slots), (layer,), layer)(old)

    def empty(b: int, slots: int, dtype: Any) -> Cache:
        heads = shape.k * kv_copies(mesh, shape.k)
        return Cache(*(jnp.zeros((b, heads, size, shape.h), dtype) for size in (0, 0, slots, slots)))

    return Programs(
        start=jax.jit(start_all, static_argnames="slots"),
        advance=jax.jit(advance_all, donate_argnums=1),
        widen=jax.jit(widen_all, static_argnames="slots"),
        collect=jax.jit(mapped(collect, (layer, layer, ROWS_B, one, one), layer), donate_argnums=1),
        empty=jax.jit(empty, static_argnames=("b", "slots", "dtype"), out_shardings=NamedSharding(mesh, CACHE_BKSH)),
    )
