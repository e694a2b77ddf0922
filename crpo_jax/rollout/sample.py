"""The jitted sampling programs: prefill, the decode loop, and cache edits between loops, all manual inside `shard_map`.

Each data shard loops over its own rows and stops on its own, so no token costs a collective unless the model axis is
longer than 1. All rows of a cache are written in place at one shared cursor; rows that join later begin at a later
slot.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from crpo_jax.model.attention import AttentionKind
from crpo_jax.model.decode import Cache, SamplerWeights, Shard, decode, prefill
from crpo_jax.model.placement import adapted_names, sampler_specs
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import CACHE_BKSH, ROWS_B, TOKENS_BT, kv_copies
from crpo_jax.parallel.mesh import DATA, MODEL, model_size
from crpo_jax.rollout.draw import Sampling, draw_tokens, row_keys

RUNNING, STOPPED, TRUNCATED = 0, 1, 2
"""Finish reasons: not finished, a stop token (which belongs to the response), or the length limit."""

STRIDE = 8  # steps between tests for unfinished rows: a GPU's loop waits for the host at each test


class RowState(NamedTuple):
    """What the host passes of the rows of a cache; a finished row, or one that pads the batch, has limit 0."""

    last: Int[Array, " b"]  # the last token drawn, not yet in the cache
    lengths: Int[Array, " b"]  # of the response so far
    limits: Int[Array, " b"]  # of the response
    prompt_lengths: Int[Array, " b"]
    prompts: Int[Array, " b"]  # with `samples`: selects the row's random numbers
    samples: Int[Array, " b"]


class DecodedChunk(NamedTuple):
    """The result of one call: row i drew `counts[i]` new tokens, which come first in its row of `tokens`."""

    tokens: Int[Array, "b c"]
    logprobs: Float[Array, "b c"]
    counts: Int[Array, " b"]
    finish_reasons: Int[Array, " b"]


def empty_chunk(rows: RowState, width: int) -> DecodedChunk:
    b = rows.last.shape[0]
    reasons = jnp.where(rows.lengths < rows.limits, RUNNING, TRUNCATED)
    return DecodedChunk(
        jnp.zeros((b, width), jnp.int32), jnp.zeros((b, width), jnp.float32), jnp.zeros(b, jnp.int32), reasons
    )


def append_tokens(
    chunk: DecodedChunk,
    rows: RowState,
    step: Int[Array, ""],
    tokens: Int[Array, " b"],
    logprobs: Float[Array, " b"],
    stop_ids: Int[Array, " x"],
) -> DecodedChunk:
    """The chunk with the tokens of this step (from 0); finished rows neither count them nor change their reason."""
    running = chunk.finish_reasons == RUNNING
    stops: Bool[Array, " b"] = jnp.any(tokens[:, None] == stop_ids, axis=1)
    reasons = jnp.where(stops, STOPPED, jnp.where(rows.lengths + step + 1 >= rows.limits, TRUNCATED, RUNNING))

    def write(into: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(into, new[:, None], step, axis=1)

    return DecodedChunk(
        tokens=write(chunk.tokens, tokens),
        logprobs=write(chunk.logprobs, logprobs),
        counts=chunk.counts + running,
        finish_reasons=jnp.where(running, reasons, chunk.finish_reasons),
    )


def prefill_and_draw(
    weights: SamplerWeights,
    tokens: Int[Array, "p t"],
    rows: RowState,
    key: Key[Array, ""],
    *,
    shape: Shape,
    shard: Shard,
    sampling: Sampling,
    slots: tuple[int, int],
    attention: AttentionKind,
) -> tuple[tuple[Cache, ...], DecodedChunk]:
    """Prefills right-padded prompts and draws the first token of every row; b = p * g, prompt-major.

    `slots` are those of the cache for a prompt (at least t) and for a response.
    """
    p, t = tokens.shape
    b = rows.last.shape[0]
    with jax.named_scope("prefill"):
        prompt_lengths = rows.prompt_lengths.reshape(p, -1)[:, 0]
        logits, prompt_cache = prefill(weights, tokens, prompt_lengths, shape, shard, attention)
    logits = jnp.repeat(logits, b // p, axis=0)
    stop_ids = jnp.array(sampling.stop_ids, jnp.int32)
    with jax.named_scope("draw"):
        keys = row_keys(key, rows.prompts, rows.samples)
        drawn = draw_tokens(logits, keys, rows.lengths, sampling, shard, shape.v)

    def layer(k: Array, v: Array, windowed: bool) -> Cache:
        of_prompt, of_response = (shape.cache_slots(count, windowed) for count in slots)
        prompt = [jnp.pad(x, ((0, 0), (0, 0), (slots[0] - t, 0), (0, 0)))[:, :, slots[0] - of_prompt :] for x in (k, v)]
        response = [jnp.zeros((b, k.shape[1], of_response, k.shape[3]), k.dtype) for _ in range(2)]
        return Cache(*prompt, *response)

    chunk = append_tokens(empty_chunk(rows, 1), rows, jnp.int32(0), *drawn, stop_ids)
    return tuple(layer(k, v, windowed) for (k, v), windowed in zip(prompt_cache, shape.windowed, strict=True)), chunk


class LoopState(NamedTuple):
    step: Int[Array, ""]
    last: Int[Array, " b"]
    chunk: DecodedChunk
    cache: tuple[Cache, ...]


def decode_chunk(
    weights: SamplerWeights,
    cache: tuple[Cache, ...],
    rows: RowState,
    key: Key[Array, ""],
    cursor: Int[Array, ""],
    steps: Int[Array, ""],
    *,
    shape: Shape,
    shard: Shard,
    sampling: Sampling,
    chunk: int,
) -> tuple[tuple[Cache, ...], DecodedChunk]:
    """Draws `steps` <= `chunk` more tokens per row, or fewer once every row of this data shard has finished.

    The first step writes the keys and values of `last` into slot `cursor`. The loop may overrun `steps` up to the next
    multiple of STRIDE, so either the cache has room for a whole chunk or every row finishes by then.
    """
    keys, stop_ids = row_keys(key, rows.prompts, rows.samples), jnp.array(sampling.stop_ids, jnp.int32)
    prompt_lengths = rows.prompt_lengths.reshape(cache[0].prompt_k_pkth.shape[0], -1)[:, 0]

    def step(_: Any, state: LoopState) -> LoopState:
        lengths = rows.lengths + state.step
        positions, slot = rows.prompt_lengths + lengths - 1, cursor + state.step
        with jax.named_scope("decode"):
            logits, cache = decode(weights, state.last, positions, prompt_lengths, slot, state.cache, shape, shard)
        with jax.named_scope("draw"):
            tokens, logprobs = draw_tokens(logits, keys, lengths, sampling, shard, shape.v)
        new = append_tokens(state.chunk, rows, state.step, tokens, logprobs, stop_ids)
        return LoopState(state.step + 1, tokens, new, tuple(cache))

    def unfinished(state: LoopState) -> Bool[Array, ""]:
        return (state.step < steps) & jnp.any(state.chunk.finish_reasons == RUNNING)

    stride = STRIDE if chunk % STRIDE == 0 else 1
    start = LoopState(jnp.int32(0), rows.last, empty_chunk(rows, chunk), cache)
    end = jax.lax.while_loop(unfinished, lambda state: jax.lax.fori_loop(0, stride, step, state), start)
    return end.cache, end.chunk


def grow_cache(old: Cache, *, slots: int) -> Cache:
    """One layer's cache with room for `slots` response tokens."""
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))) for x in (old.k_bksh, old.v_bksh))
    return old._replace(k_bksh=k, v_bksh=v)


def gather_rows(
    old: Cache,
    into: Cache,
    sources: Int[Array, " b"],
    cursor: Int[Array, ""],
    new_cursor: Int[Array, ""],
    *,
    windowed: bool,
) -> Cache:
    """One layer's cache `into`, its row i replaced by row `sources[i]` of `old`; -1 leaves the row unchanged.

    A gathered row stores its prompt itself (`into` has no prompt slots), shifted so that slot `cursor` of `old` becomes
    slot `new_cursor`; the caches of a `windowed` layer are rings.
    """
    slots = into.k_bksh.shape[2]
    taken, replaced = jnp.maximum(sources, 0), (sources >= 0)[:, None, None, None]
    group = old.k_bksh.shape[0] // old.prompt_k_pkth.shape[0]

    def shift(prompt: Array, response: Array) -> Array:
        if windowed:
            return rewind_ring(newest_last(prompt, response, cursor), slots, new_cursor)
        padded = jnp.pad(jnp.concatenate([prompt, response], axis=2), ((0, 0), (0, 0), (slots, slots), (0, 0)))
        first = slots + prompt.shape[2] + cursor - new_cursor
        return jax.lax.dynamic_slice_in_dim(padded, first, slots, axis=2)

    def gather(prompt: Array, response: Array, unchanged: Array) -> Array:
        return jnp.where(replaced, shift(prompt[taken // group], response[taken]), unchanged)

    k = gather(old.prompt_k_pkth, old.k_bksh, into.k_bksh)
    return into._replace(k_bksh=k, v_bksh=gather(old.prompt_v_pkth, old.v_bksh, into.v_bksh))


def newest_last(
    prompt: Float[Array, "b k t h"], ring: Float[Array, "b k s h"], cursor: Int[Array, ""]
) -> Float[Array, "b k n h"]:
    """Prompt and ring in the order they were written, n = t + s; what was never written comes first."""
    t, s = prompt.shape[2], ring.shape[2]
    own = jax.lax.dynamic_slice_in_dim(jnp.concatenate([ring, ring], axis=2), cursor % s, s, axis=2)
    own = jnp.pad(own, ((0, 0), (0, 0), (t, 0), (0, 0)))
    before = jnp.pad(prompt, ((0, 0), (0, 0), (s, s), (0, 0)))  # up to where the ring's first token stands
    before = jax.lax.dynamic_slice_in_dim(before, jnp.minimum(cursor, s), t + s, axis=2)
    age = t + s - 1 - jnp.arange(t + s)
    return jnp.where((age < jnp.minimum(cursor, s))[:, None], own, before)


def rewind_ring(ordered: Float[Array, "b k n h"], slots: int, cursor: Int[Array, ""]) -> Float[Array, "b k s h"]:
    """The last `slots` of what stands newest last, as a ring whose next slot to write is `cursor`."""
    missing = max(slots - ordered.shape[2], 0)
    recent = jnp.pad(ordered, ((0, 0), (0, 0), (missing, 0), (0, 0)))[:, :, -slots:]
    return jax.lax.dynamic_slice_in_dim(jnp.concatenate([recent, recent], axis=2), -cursor % slots, slots, axis=2)


class SamplingPrograms(NamedTuple):
    """The functions above, jitted for one model, mesh and `Sampling`: they take the positional arguments and `slots`.

    `empty_cache(b=, slots=, dtype=)` returns one layer's cache without prompt slots. `decode_chunk` donates its cache,
    `gather_rows` its `into`.
    """

    prefill_and_draw: Any
    decode_chunk: Any
    grow_cache: Any
    gather_rows: Any
    empty_cache: Any


def sharded_call(function: Callable[..., Any], mesh: Mesh, inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over all axes of the mesh. Arguments may be empty, as the prompt slots of gathered rows are.

    Each device makes the empty ones itself: the compiler of jaxlib 0.11.2 crashes on several devices when it gets one.
    """

    def program(*arguments: Any) -> Any:
        arrays, tree = jax.tree.flatten(arguments)
        specs = tree.flatten_up_to(inputs)
        sizes = [NamedSharding(mesh, spec).shard_shape(x.shape) for x, spec in zip(arrays, specs, strict=True)]

        @functools.wraps(function)  # profiles show the name
        def local(*nonempty: Array) -> Any:
            given = iter(nonempty)
            every = [next(given) if x.size else jnp.zeros(size, x.dtype) for x, size in zip(arrays, sizes, strict=True)]
            return function(*tree.unflatten(every))

        nonempty = [place for place, x in enumerate(arrays) if x.size]
        # Outputs are equal on all model shards because every draw ends in a sum over them; JAX cannot see that.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=tuple(specs[place] for place in nonempty),
            out_specs=outputs,
            axis_names={DATA, MODEL},
            check_vma=False,
        )(*(arrays[place] for place in nonempty))

    return program


@functools.cache
def sampling_programs(
    shape: Shape, mesh: Mesh, sampling: Sampling, chunk: int, attention: AttentionKind
) -> SamplingPrograms:
    shard = Shard(MODEL if model_size(mesh) > 1 else None)
    layer = Cache._make([CACHE_BKSH] * len(Cache._fields))
    rows = RowState._make([ROWS_B] * len(RowState._fields))
    chunk_specs = DecodedChunk._make([TOKENS_BT, TOKENS_BT, ROWS_B, ROWS_B])
    cache, settings = (layer,) * shape.l, {"shape": shape, "shard": shard, "sampling": sampling}

    def mapped(function: Any, inputs: tuple[Any, ...], outputs: Any, **fixed: Any) -> Any:
        named = functools.wraps(function)(functools.partial(function, **fixed))
        return sharded_call(named, mesh, inputs, outputs)

    def specs_of(weights: SamplerWeights) -> SamplerWeights:
        return sampler_specs(shape, mesh, adapted_names(shape, weights))

    def prefill_program(*inputs: Any, slots: tuple[int, int]) -> Any:
        fixed = {**settings, "slots": slots, "attention": attention}
        specs = (specs_of(inputs[0]), TOKENS_BT, rows, P())
        return mapped(prefill_and_draw, specs, (cache, chunk_specs), **fixed)(*inputs)

    def grow_program(old: Cache, slots: int) -> Any:
        return mapped(grow_cache, (layer,), layer, slots=slots)(old)

    def empty_cache(b: int, slots: int, dtype: Any) -> Cache:
        heads = shape.k * kv_copies(mesh, shape.k)
        return Cache(*(jnp.zeros((b, heads, size, shape.h), dtype) for size in (0, 0, slots, slots)))

    def decode_program(*inputs: Any) -> Any:
        specs = (specs_of(inputs[0]), cache, rows, P(), P(), P())
        return mapped(decode_chunk, specs, (cache, chunk_specs), **settings, chunk=chunk)(*inputs)

    def gather_program(*inputs: Any, windowed: bool) -> Cache:
        return mapped(gather_rows, (layer, layer, ROWS_B, P(), P()), layer, windowed=windowed)(*inputs)

    placed = NamedSharding(mesh, CACHE_BKSH)
    return SamplingPrograms(
        prefill_and_draw=jax.jit(prefill_program, static_argnames="slots"),
        decode_chunk=jax.jit(decode_program, donate_argnums=1),
        grow_cache=jax.jit(grow_program, static_argnames="slots"),
        gather_rows=jax.jit(gather_program, donate_argnums=1, static_argnames="windowed"),
        empty_cache=jax.jit(empty_cache, static_argnames=("b", "slots", "dtype"), out_shardings=placed),
    )
