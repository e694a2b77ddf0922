"""One token from one row of logits, on a vocabulary that may be split over devices.

Sampling inverts the cumulative distribution with one uniform number per row and position, in two levels: a block of the
vocabulary first, then a token inside it. No sort, no noise per vocabulary entry, and the same numbers on every mesh, so
the same token: blocks are fixed by the vocabulary, not by how many devices share it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from crpo_jax.model.decode import Shard

BLOCKS = 64  # vocabulary blocks at most; the number used is the largest power of two that divides the vocabulary
BISECTIONS = 32  # halvings of the threshold search of top-p and top-k


class Sampling(NamedTuple):
    """How tokens are drawn; hashable, so that each setting compiles once."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()


def row_keys(key: Key[Array, ""], prompts: Int[Array, " b"], samples: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key per row from (step key, prompt, sample): a token depends on neither its slot nor who shares its batch."""
    fold = jax.random.fold_in
    return jax.vmap(lambda prompt, sample: fold(fold(key, prompt), sample))(prompts, samples)


def draw(
    logits: Float[Array, "b v"],
    keys: Key[Array, " b"],
    positions: Int[Array, " b"],
    how: Sampling,
    shard: Shard,
    vocabulary: int,
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """Token number `positions` of every row's response and its log-prob under softmax(logits / temperature), before top-p and top-k.

    The log-prob is the trainer's: with top-p or top-k on, tokens come from a narrower distribution than it describes.
    """
    local = logits.shape[1]
    scaled = logits if how.temperature == 0 else logits / how.temperature
    top = shard.max(jnp.max(scaled, axis=-1))
    mass = jnp.exp(scaled - top[:, None])
    total = shard.sum(jnp.sum(mass, axis=-1))
    first = shard.place() * local
    if how.temperature == 0:
        best = jnp.where(scaled == top[:, None], first + jnp.arange(local), vocabulary)
        tokens = -shard.max(-jnp.min(best, axis=-1))  # the first of equals, whichever device holds it
    else:
        kept = mass
        if how.top_k and how.top_k < vocabulary:
            kept = jnp.where(mass >= threshold(mass, float(how.top_k), shard, by_count=True)[:, None], mass, 0)
        if how.top_p < 1:
            within = how.top_p * shard.sum(jnp.sum(kept, axis=-1))
            kept = jnp.where(kept >= threshold(kept, within, shard, by_count=False)[:, None], kept, 0)
        uniform = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))(keys, positions)
        tokens = invert(kept, uniform, shard, vocabulary)
    held = (tokens >= first) & (tokens < first + local)
    picked = jnp.take_along_axis(scaled, jnp.where(held, tokens - first, 0)[:, None], axis=-1)[:, 0]
    return tokens, shard.sum(jnp.where(held, picked, 0)) - top - jnp.log(total)


def threshold(
    mass: Float[Array, "b v"], wanted: Float[Array, " b"] | float, shard: Shard, *, by_count: bool
) -> Float[Array, " b"]:
    """The largest mass t such that the entries of at least t number (by_count) or add up to at least `wanted`.

    Bisection over [0, 1], the range of exp(logit - max): ties are kept together, so slightly more may stay.
    """

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        above = mass >= middle[:, None]
        reached = (
            shard.sum(jnp.sum(above if by_count else jnp.where(above, mass, 0), axis=-1, dtype=jnp.float32)) >= wanted
        )
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    start = jnp.zeros(mass.shape[0])
    return jax.lax.fori_loop(0, BISECTIONS, halve, (start, start + 1.0))[0]


def invert(mass: Float[Array, "b v"], uniform: Float[Array, " b"], shard: Shard, vocabulary: int) -> Int[Array, " b"]:
    """The token at which the cumulative mass first exceeds uniform * total; a token of mass 0 is never chosen."""
    blocks = min(BLOCKS, vocabulary & -vocabulary)
    b, local = mass.shape
    width = vocabulary // blocks
    if local % width:  # a device holds part of a block only past 64 model shards or on odd vocabularies
        mass, local = shard.gather(mass, 1), vocabulary
        shard = Shard(None)
    parts = mass.reshape(b, local // width, width)
    sums = shard.gather(jnp.sum(parts, axis=-1), 1)
    cumulative = jnp.cumsum(sums, axis=-1)
    target = uniform * cumulative[:, -1]
    block = last_positive(jnp.sum(cumulative <= target[:, None], axis=-1), sums)
    before = jnp.where(block > 0, jnp.take_along_axis(cumulative, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0], 0)
    here = block - shard.place() * (local // width)
    held = (here >= 0) & (here < local // width)
    inside = jnp.take_along_axis(parts, jnp.where(held, here, 0)[:, None, None], axis=1)[:, 0]
    offset = last_positive(jnp.sum(jnp.cumsum(inside, axis=-1) <= (target - before)[:, None], axis=-1), inside)
    return shard.sum(jnp.where(held, block * width + offset, 0))


def last_positive(index: Int[Array, " b"], mass: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The index, or the last entry of positive mass where rounding carried it past that."""
    last = mass.shape[1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    return jnp.minimum(index, last)
