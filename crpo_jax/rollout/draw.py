"""Draws one token per row from logits whose vocabulary may be split over devices.

Sampling inverts the cumulative distribution level by level: first a block of the vocabulary, then a smaller block in
it, then a token, each by a random word of its own. It needs no sort and no noise per vocabulary entry. The shares of a
level are whole numbers, so their cumulative sums are exact and what has no share is never drawn. Blocks depend on the
vocabulary, not on how many devices share it, and their sums are always added up in the same order, so every mesh
computes the same numbers and draws the same token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from crpo_jax.model.decode import Shard

MAX_BLOCKS = 64  # of a level; the first has the largest power of two up to this that divides the vocabulary


class Sampling(NamedTuple):
    """How tokens are drawn; hashable, so that each setting compiles once."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()
    renormalize: bool = False  # log-probs are of what top-p and top-k left, and not of all tokens


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

    The log-prob ignores top-p and top-k, as the trainer's does; with them, tokens come from a narrower distribution,
    whose log-prob it is where `sampling.renormalize`.
    """
    widths = block_widths(vocabulary)
    if logits.shape[1] % widths[0]:  # blocks cross devices only past 64 model shards or with odd vocabularies
        logits, shard = shard.gather(logits, 1), Shard(None)
    local = logits.shape[1]
    first = shard.place() * local
    top = shard.max(jnp.max(logits, axis=-1))
    temperature = max(sampling.temperature, jnp.finfo(jnp.float32).tiny) if sampling.temperature else 1.0
    mass = jnp.exp((logits - top[:, None]) / temperature)  # of at most 0: a small temperature leads to -inf, not NaN
    sums = block_sums(mass, widths[0], shard)
    total = jnp.sum(sums, axis=-1)
    if sampling.temperature == 0:
        best = jnp.where(logits == top[:, None], first + jnp.arange(local), vocabulary)
        tokens = -shard.max(-jnp.min(best, axis=-1))  # the lowest id among equals, whichever device has it
    else:
        if sampling.top_k or sampling.top_p < 1:
            mass = filter_mass(mass, logits, sampling, widths[0], shard)
            sums = block_sums(mass, widths[0], shard)
            total = jnp.sum(sums, axis=-1) if sampling.renormalize else total
        at_position = jax.vmap(jax.random.fold_in)(keys, positions)
        words = jax.vmap(lambda key: jax.random.bits(key, (len(widths),), jnp.uint32))(at_position)
        tokens = invert_cumulative(mass, sums, words, widths, shard)
    tokens = jnp.minimum(tokens, vocabulary - 1)  # where logits are NaN nothing is drawn, yet the id must exist
    on_shard = (tokens >= first) & (tokens < first + local)
    logit = jnp.take_along_axis(logits, jnp.where(on_shard, tokens - first, 0)[:, None], axis=-1)[:, 0]
    return tokens, (shard.sum(jnp.where(on_shard, logit, 0)) - top) / temperature - jnp.log(total)


# --- top-k and top-p --------------------------------------------------------------------------------------------------


def filter_mass(
    mass: Float[Array, "b v"], logits: Float[Array, "b v"], sampling: Sampling, width: int, shard: Shard
) -> Float[Array, "b v"]:
    """The mass with 0 for what top-k removes, and then for what top-p removes of the rest.

    top-k keeps the k largest logits, top-p the fewest largest masses whose complement has at most 1 - top_p of the
    total. What equals the smallest of them stays as well, so there may be more.
    """
    b = mass.shape[0]
    if sampling.top_k:

        def enough(t: Float[Array, " b"]) -> Bool[Array, " b"]:
            count = jnp.sum(logits >= t[:, None], axis=-1, dtype=jnp.float32)  # exact up to 2^24, faster than in int32
            return shard.sum(count) >= sampling.top_k

        mass = jnp.where(logits >= largest_float(enough, -np.inf, np.inf, b)[:, None], mass, 0)
    if sampling.top_p < 1:
        removable = (1 - sampling.top_p) * jnp.sum(block_sums(mass, width, shard), axis=-1)

        def little(t: Float[Array, " b"]) -> Bool[Array, " b"]:
            return jnp.sum(block_sums(jnp.where(mass < t[:, None], mass, 0), width, shard), axis=-1) <= removable

        mass = jnp.where(mass >= largest_float(little, 0.0, 1.0, b)[:, None], mass, 0)  # the largest, 1, always stays
    return mass


def largest_float(
    holds: Callable[[Float[Array, " b"]], Bool[Array, " b"]], low: float, high: float, b: int
) -> Float[Array, " b"]:
    """In each of b rows the largest float32 from `low` to `high` for which `holds`; `low` itself where there is none.

    Bisects the order of floats, not their values, so the answer is exact however small it is. `holds` must not become
    true again above a float for which it is false.
    """
    first, last = (reorder(int(np.float32(bound).view(np.int32))) for bound in (low, high))

    def value(number: Int[Array, " b"]) -> Float[Array, " b"]:
        return jax.lax.bitcast_convert_type(reorder(number), jnp.float32)

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        lower, upper = bounds
        middle = (lower & upper) + ((lower ^ upper) >> 1)  # their mean, without overflow
        reached = holds(value(middle))
        return jnp.where(reached, middle, lower), jnp.where(reached, upper, middle)

    bounds = jnp.full(b, first, jnp.int32), jnp.full(b, last + 1, jnp.int32)
    return value(jax.lax.fori_loop(0, (last + 1 - first).bit_length(), halve, bounds)[0])


def reorder(bits: Any) -> Any:
    """The bits of a float32, read as an int32, to a number that orders as the floats do; or such a number to bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# --- the draw ---------------------------------------------------------------------------------------------------------


def block_widths(vocabulary: int) -> list[int]:
    """Tokens in a block of each level, down to 1; the last block of a level past the first may have fewer."""
    widths = [vocabulary // min(MAX_BLOCKS, vocabulary & -vocabulary)]
    while widths[-1] > 1:
        widths.append(-(-widths[-1] // MAX_BLOCKS))
    return widths


def block_sums(mass: Float[Array, "b v"], width: int, shard: Shard) -> Float[Array, "b blocks"]:
    """The sum of every block, also of those on other devices.

    The barrier stops the compiler from merging these sums with the sum over them: without a model axis it would add up
    all entries in another order than with one.
    """
    sums = jnp.sum(mass.reshape(mass.shape[0], -1, width), axis=-1)
    return jax.lax.optimization_barrier(shard.gather(sums, 1))


def invert_cumulative(
    mass: Float[Array, "b v"],
    sums: Float[Array, "b blocks"],
    words: UInt32[Array, "b levels"],
    widths: list[int],
    shard: Shard,
) -> Int[Array, " b"]:
    """The token that random words choose: a block by the first word, a block inside it by the next, and so on."""
    first, *finer = widths
    block = choose(sums, words[:, 0])
    token = block * first
    local_block = block - shard.place() * (mass.shape[1] // first)
    on_shard = (local_block >= 0) & (local_block < mass.shape[1] // first)
    inside = take_block(mass, jnp.where(on_shard, local_block, 0), first)
    for level, width in enumerate(finer, 1):
        inside = jnp.pad(inside, ((0, 0), (0, -inside.shape[1] % width)))
        block = choose(jnp.sum(inside.reshape(inside.shape[0], -1, width), axis=-1), words[:, level])
        token += block * width
        inside = take_block(inside, block, width)
    return shard.sum(jnp.where(on_shard, token, 0))


def take_block(mass: Float[Array, "b v"], block: Int[Array, " b"], width: int) -> Float[Array, "b width"]:
    return jnp.take_along_axis(mass.reshape(mass.shape[0], -1, width), block[:, None, None], axis=1)[:, 0]


def choose(mass: Float[Array, "b n"], word: UInt32[Array, " b"]) -> Int[Array, " b"]:
    """An index with the probability of its mass, for a word uniform over all 2^32; n is at most MAX_BLOCKS.

    Shares are rounded down to multiples of 2^-31, so their cumulative sums are exact, and divide the 2^32 words to
    within one word. Neither mass 0 nor a share below 2^-31 is ever chosen.
    """
    shares = (mass / jnp.sum(mass, axis=-1, keepdims=True) * 2.0**31).astype(jnp.uint32)
    cumulative = jnp.cumsum(shares, axis=-1)
    target = high_product(word, cumulative[:, -1])  # less than the sum, so the cumulative sum exceeds it somewhere
    return jnp.sum(cumulative <= target[:, None], axis=-1)


def high_product(x: UInt32[Array, " b"], y: UInt32[Array, " b"]) -> UInt32[Array, " b"]:
    """floor(x * y / 2^32), by halves of 16 bits: jax.lax.mulhi does not compile inside shard_map on CPUs."""
    x_high, x_low, y_high, y_low = x >> 16, x & 0xFFFF, y >> 16, y & 0xFFFF
    left = x_high * y_low + (x_low * y_low >> 16)
    right = x_low * y_high + (left & 0xFFFF)
    return x_high * y_high + (left >> 16) + (right >> 16)
