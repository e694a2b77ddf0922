"""Draws one token per row from logits whose vocabulary may be split over devices.

Sampling inverts the cumulative distribution with one uniform number per row and position, in two levels: first a block
of the vocabulary, then a token inside that block. It needs no sort and no noise per vocabulary entry. Blocks depend on
the vocabulary, not on how many devices share it, so every mesh computes the same numbers and draws the same token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from crpo_jax.model.decode import Shard

MAX_BLOCKS = 64  # the number of blocks is the largest power of two up to this that divides the vocabulary
BISECTIONS = 32  # of the threshold search of top-p and top-k


class Sampling(NamedTuple):
    """How tokens are drawn; hashable, so that each setting compiles once."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()


def row_keys(key: Key[Array, ""], prompts: Int[Array, " b"], samples: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key per row from (step key, prompt, sample): a token depends on neither its slot nor the rest of its batch."""
    fold = jax.random.fold_in
    return jax.vmap(lambda prompt, sample: fold(fold(key, prompt), sample))(prompts, samples)


def draw_tokens(
    logits: Float[Array, "b v"],
    keys: Key[Array, " b"],
    positions: Int[Array, " b"],
    sampling: Sampling,
    shard: Shard,
    vocabulary: int,
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """Token number `positions` of every row's response, and its log-prob under softmax(logits / temperature).

    The log-prob ignores top-p and top-k, as the trainer's does; with them, tokens come from a narrower distribution.
    """
    local = logits.shape[1]
    scaled = logits if sampling.temperature == 0 else logits / sampling.temperature
    top = shard.max(jnp.max(scaled, axis=-1))
    mass = jnp.exp(scaled - top[:, None])
    total = shard.sum(jnp.sum(mass, axis=-1))
    first = shard.place() * local
    if sampling.temperature == 0:
        best = jnp.where(scaled == top[:, None], first + jnp.arange(local), vocabulary)
        tokens = -shard.max(-jnp.min(best, axis=-1))  # the lowest id among equals, whichever device has it
    else:
        filtered = mass
        if sampling.top_k and sampling.top_k < vocabulary:
            lowest = find_threshold(mass, float(sampling.top_k), shard, by_count=True)
            filtered = jnp.where(mass >= lowest[:, None], mass, 0)
        if sampling.top_p < 1:
            target = sampling.top_p * shard.sum(jnp.sum(filtered, axis=-1))
            lowest = find_threshold(filtered, target, shard, by_count=False)
            filtered = jnp.where(filtered >= lowest[:, None], filtered, 0)
        uniform = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))(keys, positions)
        tokens = invert_cumulative(filtered, uniform, shard, vocabulary)
    on_shard = (tokens >= first) & (tokens < first + local)
    logit = jnp.take_along_axis(scaled, jnp.where(on_shard, tokens - first, 0)[:, None], axis=-1)[:, 0]
    return tokens, shard.sum(jnp.where(on_shard, logit, 0)) - top - jnp.log(total)


def find_threshold(
    mass: Float[Array, "b v"], target: Float[Array, " b"] | float, shard: Shard, *, by_count: bool
) -> Float[Array, " b"]:
    """The largest mass t such that the entries of at least t number (by_count) or add up to at least `target`.

    Bisects [0, 1], the range of exp(logit - max). Ties are kept together, so the entries may exceed the target.
    """

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        above = mass >= middle[:, None]
        size = jnp.sum(above if by_count else jnp.where(above, mass, 0), axis=-1, dtype=jnp.float32)
        reached = shard.sum(size) >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    zeros = jnp.zeros(mass.shape[0])
    return jax.lax.fori_loop(0, BISECTIONS, halve, (zeros, zeros + 1.0))[0]


def invert_cumulative(
    mass: Float[Array, "b v"], uniform: Float[Array, " b"], shard: Shard, vocabulary: int
) -> Int[Array, " b"]:
    """The token at which the cumulative mass first exceeds uniform * total; a token of mass 0 is never drawn."""
    blocks = min(MAX_BLOCKS, vocabulary & -vocabulary)
    b, local = mass.shape
    width = vocabulary // blocks
    if local % width:  # blocks cross devices only past 64 model shards or with odd vocabularies
        mass, local = shard.gather(mass, 1), vocabulary
        shard = Shard(None)
    local_blocks = local // width
    by_block = mass.reshape(b, local_blocks, width)
    sums = shard.gather(jnp.sum(by_block, axis=-1), 1)
    cumulative = jnp.cumsum(sums, axis=-1)
    target = uniform * cumulative[:, -1]
    block = clip_to_positive(jnp.sum(cumulative <= target[:, None], axis=-1), sums)
    before = jnp.where(block > 0, jnp.take_along_axis(cumulative, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0], 0)
    local_block = block - shard.place() * local_blocks
    on_shard = (local_block >= 0) & (local_block < local_blocks)
    inside = jnp.take_along_axis(by_block, jnp.where(on_shard, local_block, 0)[:, None, None], axis=1)[:, 0]
    offset = clip_to_positive(jnp.sum(jnp.cumsum(inside, axis=-1) <= (target - before)[:, None], axis=-1), inside)
    return shard.sum(jnp.where(on_shard, block * width + offset, 0))


def clip_to_positive(index: Int[Array, " b"], mass: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The index, or that of the last entry of positive mass where rounding moved the index past it."""
    last = mass.shape[1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    return jnp.minimum(index, last)
