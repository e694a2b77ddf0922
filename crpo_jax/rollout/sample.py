"""The jitted sampling loop: prefill once per prompt, then one token per row until every row stopped.

Everything here runs inside `shard_map`, manual over both axes. Each data shard loops on its own rows and stops on its
own: no collective per token unless the model axis is longer than 1. All rows of a wave write their caches at one shared
cursor, in place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key

from crpo_jax.model.attention import Implementation
from crpo_jax.model.placement import sampling_shardings
from crpo_jax.model.qwen2 import Cache, Qwen2, Shard, decode, prefill
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import CACHE_BKSH, ROWS_B, TOKENS_BT
from crpo_jax.parallel.mesh import DATA, MODEL, model_size
from crpo_jax.rollout.draw import Sampling, draw

RUNNING, STOPPED, TRUNCATED = 0, 1, 2
"""Why a row ended: not yet, by a stop token (which belongs to the response), or at its longest length."""


class Wave(NamedTuple):
    """The state of rows decoded together; b = p * g rows, prompt-major."""

    tokens: Int[Array, "b s"]
    logprobs: Float[Array, "b s"]
    lengths: Int[Array, " b"]
    reason: Int[Array, " b"]
    limits: Int[Array, " b"]
    keys: Key[Array, " b"]
    prompt_lengths: Int[Array, " p"]
    last: Int[Array, " b"]
    cursor: Int[Array, " shards"]  # the slot that `last` will be written to, one number per data shard
    cache: tuple[Cache, ...]


def wave_specs(layers: int) -> Wave:
    """How a wave is split: rows and prompts over the data axis, KV heads over the model axis."""
    rows: Any = dict.fromkeys(Wave._fields, ROWS_B) | {"tokens": TOKENS_BT, "logprobs": TOKENS_BT}
    cache: Any = dict.fromkeys(Cache._fields, CACHE_BKSH)
    return Wave(**{**rows, "cache": (Cache(**cache),) * layers})


def record(wave: Wave, at: Int[Array, ""], drawn: Int[Array, " b"], logprob: Float[Array, " b"], stop_ids: tuple[int, ...]) -> Wave:
    """The wave with the tokens drawn for position `at`; rows that had ended keep what they have."""
    running = wave.reason == RUNNING
    stops: Bool[Array, " b"] = functools.reduce(jnp.logical_or, [drawn == stop for stop in stop_ids], jnp.zeros_like(running))
    reason = jnp.where(stops, STOPPED, jnp.where(at + 1 >= wave.limits, TRUNCATED, RUNNING))

    def write(into: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(into, jnp.where(running, new, 0).astype(into.dtype)[:, None], at, axis=1)

    return wave._replace(
        tokens=write(wave.tokens, drawn),
        logprobs=write(wave.logprobs, logprob),
        lengths=wave.lengths + running,
        reason=jnp.where(running, reason, wave.reason),
        last=drawn,
    )


def start(
    model: Qwen2,
    prompts: Int[Array, "p t"],
    prompt_lengths: Int[Array, " p"],
    keys: Key[Array, " b"],
    limits: Int[Array, " b"],
    *,
    shape: Shape,
    shard: Shard,
    how: Sampling,
    slots: int,
    width: int,
    attention: Implementation,
) -> Wave:
    """Prefills the prompts, draws every row's first token and makes room for `slots` cached ones; `width` is the longest response.

    A row with limit 0 is padding: it never runs.
    """
    scores, kept = prefill(model, prompts, prompt_lengths, shape, shard, attention)
    b = limits.shape[0]
    group = b // prompts.shape[0]
    wave = Wave(
        tokens=jnp.zeros((b, width), jnp.int32),
        logprobs=jnp.zeros((b, width), jnp.float32),
        lengths=jnp.zeros(b, jnp.int32),
        reason=jnp.where(limits > 0, RUNNING, TRUNCATED),
        limits=limits,
        keys=keys,
        prompt_lengths=prompt_lengths,
        last=jnp.zeros(b, jnp.int32),
        cursor=jnp.zeros(1, jnp.int32),
        cache=tuple(Cache(k, v, *(jnp.zeros((b, k.shape[1], slots, k.shape[3]), k.dtype) for _ in range(2))) for k, v in kept),
    )
    drawn, logprob = draw(jnp.repeat(scores, group, axis=0), keys, jnp.int32(0), how, shard, shape.v)
    return record(wave, jnp.int32(0), drawn, logprob, how.stop_ids)


def advance(model: Qwen2, wave: Wave, *, shape: Shape, shard: Shard, how: Sampling) -> Wave:
    """Decodes until the cache's slots are full or every row of this shard ended."""
    slots = wave.cache[0].k_bksh.shape[2]

    def unfinished(wave: Wave) -> Bool[Array, ""]:
        return (wave.cursor[0] < slots) & jnp.any(wave.reason == RUNNING)

    def step(wave: Wave) -> Wave:
        cursor = wave.cursor[0]
        scores, cache = decode(model, wave.last, wave.prompt_lengths, cursor, wave.cache, shape, shard)
        drawn, logprob = draw(scores, wave.keys, cursor + 1, how, shard, shape.v)
        return record(wave._replace(cache=tuple(cache), cursor=wave.cursor + 1), cursor + 1, drawn, logprob, how.stop_ids)

    return jax.lax.while_loop(unfinished, step, wave)


class Programs(NamedTuple):
    """The compiled sampler of one model, mesh and way of sampling."""

    start: Any
    advance: Any
    grow: Any
    finished: Any


@functools.cache
def programs(shape: Shape, mesh: Mesh, how: Sampling, width: int, attention: Implementation) -> Programs:
    """Jitted `start(model, prompts, prompt_lengths, keys, limits, slots=)`, `advance(model, wave)`, `grow(layer's cache, slots=)`
    and `finished(reason)`, the same on every process."""
    shard = Shard(MODEL if model_size(mesh) > 1 else None)
    weights, waves = sampling_shardings(shape, mesh, specs=True), wave_specs(shape.l)

    def mapped(function: Any, inputs: tuple[Any, ...]) -> Any:
        # Outputs are equal on all model shards because every draw ends in a sum over them; JAX cannot see that.
        return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=waves, axis_names={DATA, MODEL}, check_vma=False)

    def start_all(model: Qwen2, prompts: Array, prompt_lengths: Array, keys: Array, limits: Array, slots: int) -> Wave:
        one = functools.partial(start, shape=shape, shard=shard, how=how, slots=slots, width=width, attention=attention)
        return mapped(one, (weights, TOKENS_BT, ROWS_B, ROWS_B, ROWS_B))(model, prompts, prompt_lengths, keys, limits)

    def advance_all(model: Qwen2, wave: Wave) -> Wave:
        return mapped(functools.partial(advance, shape=shape, shard=shard, how=how), (weights, waves))(model, wave)

    def grow(old: Cache, slots: int) -> Cache:
        def pad(x: Array) -> Array:
            wider = jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))
            return jax.lax.with_sharding_constraint(wider, NamedSharding(mesh, CACHE_BKSH))

        return old._replace(k_bksh=pad(old.k_bksh), v_bksh=pad(old.v_bksh))

    return Programs(
        start=jax.jit(start_all, static_argnames="slots"),
        advance=jax.jit(advance_all, donate_argnums=1),
        grow=jax.jit(grow, static_argnames="slots"),
        finished=jax.jit(lambda reason: jnp.all(reason != RUNNING), out_shardings=NamedSharding(mesh, P())),
    )
