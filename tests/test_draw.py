"""Tokens drawn from logits: the distribution, its filters, and the same tokens however the vocabulary is split."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec as P
from scipy.stats import chisquare

from crpo_jax.model.decode import Shard
from crpo_jax.parallel.mesh import MODEL
from crpo_jax.rollout.draw import (
    Sampling,
    block_sums,
    block_widths,
    choose,
    draw_tokens,
    filter_mass,
    high_product,
    invert_cumulative,
    row_keys,
)

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

WHOLE, PLAIN = Shard(None), Sampling()


@functools.cache
def draw_program(sampling: Sampling, vocabulary: int, shards: int) -> Any:
    """(logits, keys, positions) -> tokens and log-probs, the vocabulary split over `shards` devices."""

    def draw_on_shard(logits: jax.Array, keys: jax.Array, positions: jax.Array) -> Any:
        return draw_tokens(logits, keys, positions, sampling, Shard(MODEL if shards > 1 else None), vocabulary)

    specs = (P(None, MODEL), P(), P())
    return jax.jit(
        jax.shard_map(draw_on_shard, mesh=mesh_of(1, shards), in_specs=specs, out_specs=P(), check_vma=False)
    )


def draw(
    logits: np.ndarray, sampling: Sampling = PLAIN, *, seed: int = 0, position: int = 0, shards: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    keys = row_keys(jax.random.key(seed), jnp.arange(len(logits)), jnp.zeros(len(logits), jnp.int32))
    tokens, logprobs = draw_program(sampling, logits.shape[1], shards)(
        jnp.float32(logits), keys, jnp.full(len(logits), position, jnp.int32)
    )
    return np.asarray(tokens), np.asarray(logprobs)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def random_logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return np.float32(np.random.default_rng(seed).normal(size=(rows, vocabulary)) * spread)


# --- the distribution -------------------------------------------------------------------------------------------------


def fits(tokens: np.ndarray, probabilities: np.ndarray) -> bool:
    """Chi-square at the 1% level over the tokens that are expected at all (none of the others may have come)."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert not counts[~possible].any()
    return bool(chisquare(counts[possible], probabilities[possible] * len(tokens)).pvalue > 0.01)


@pytest.mark.parametrize("vocabulary", [37, 40, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_softmax(vocabulary: int, temperature: float):
    logits = random_logits(1, vocabulary, spread=1.0)
    tokens, _ = draw(np.repeat(logits, 20000, axis=0), Sampling(temperature))
    assert fits(tokens, np.exp(log_softmax(logits[0] / temperature)))
    assert not fits(tokens, np.exp(log_softmax(logits[0] / (temperature * 1.15))))  # the test can tell the difference


def test_positions_of_one_row_are_independent():
    """A row's tokens over 500 positions follow the softmax too, and so do pairs of neighbours."""
    logits = random_logits(8, 4, spread=1.0)
    logits[:] = logits[0]
    tokens = np.stack([draw(logits, position=position)[0] for position in range(500)])
    single = np.exp(log_softmax(logits[0]))
    assert fits(tokens.reshape(-1), single)
    assert fits((tokens[:-1:2] * 4 + tokens[1::2]).reshape(-1), np.outer(single, single).reshape(-1))
    neighbours = tokens[:, :-1:2] * 4 + tokens[:, 1::2]  # of two rows at one position
    assert fits(neighbours.reshape(-1), np.outer(single, single).reshape(-1))


def test_a_token_of_no_probability_is_never_drawn():
    logits = np.repeat(random_logits(1, 40), 5000, axis=0)
    logits[:, [0, 3, 4, 17, 39]] = -np.inf
    tokens, logprobs = draw(logits)
    assert not set(tokens.tolist()) & {0, 3, 4, 17, 39}
    assert np.all(np.isfinite(logprobs))
    only = np.full((100, 40), -np.inf, np.float32)
    only[:, 23] = -7.0
    tokens, logprobs = draw(only)
    assert set(tokens.tolist()) == {23}
    assert not np.any(logprobs)


# --- the words --------------------------------------------------------------------------------------------------------

QWEN = 151_936
choices = jax.jit(choose)


def word_counts(mass: np.ndarray) -> np.ndarray:
    """How many of all 2^32 words choose each of n indices: bisects for the first word with at least each index."""
    rows, low, high = np.tile(mass, (len(mass), 1)), np.zeros(len(mass), np.int64), np.full(len(mass), 2**32)
    for _ in range(33):
        middle = np.minimum((low + high) // 2, 2**32 - 1)
        reached = (np.asarray(choices(rows, middle.astype(np.uint32))) >= np.arange(len(mass))) | (low == high)
        low, high = np.where(reached, low, middle + 1), np.where(reached, np.minimum(middle, high), high)
    return np.diff(low, append=2**32)


def level_masses() -> dict[str, np.ndarray]:
    """Masses of 64 blocks, as a level may have them."""
    random = np.random.default_rng(0)
    gaps = random.uniform(0.5, 1.5, 64) * 10.0 ** -random.integers(0, 20, 64)
    return {
        "flat": random.uniform(0.9, 1.1, 64),
        "gaps": gaps,
        "gaps and zeros": np.where(random.uniform(size=64) < 0.5, gaps, 0),
        "smallest first": np.r_[2e-16, np.ones(63)],
        "zeros at the ends": np.r_[np.zeros(20), random.uniform(size=24), np.zeros(20)],
        "only the last": np.r_[np.zeros(63), 1e-9],
    }


@pytest.mark.parametrize("name", level_masses())
def test_all_words_choose_by_the_share_of_mass(name: str):
    """Of all 2^32 words none chooses mass 0, and rounding does not make a rare index common.

    With cumulative sums in float32 a uniform number fell on removed tokens about once in a million draws, and 0 itself
    drew the first token however rare it was.
    """
    mass = level_masses()[name].astype(np.float32)
    counts, shares = word_counts(mass), mass / mass.sum(dtype=np.float64)
    assert counts.sum() == 2**32
    assert not counts[mass == 0].any()
    assert not counts[shares < 1e-10].any()
    np.testing.assert_allclose(counts / 2**32, shares, rtol=1e-6, atol=2**-30)


@pytest.mark.parametrize("name", level_masses())
def test_a_greater_word_never_chooses_a_smaller_index(name: str):
    """The whole range in steps of 2^16, and every word in its middle and at its ends."""
    rows = functools.partial(np.tile, level_masses()[name].astype(np.float32))
    few = np.arange(2**10)
    for words in (np.arange(0, 2**32, 2**16), 2**31 + few, few, 2**32 - 1 - few[::-1]):
        assert np.all(np.diff(np.asarray(choices(rows((len(words), 1)), words.astype(np.uint32)))) >= 0)


def test_the_product_of_words_is_exact():
    random = np.random.default_rng(0)
    edges = [0, 1, 0xFFFF, 0x10000, 0x10001, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    numbers = np.concatenate([np.array(edges, np.uint64), random.integers(0, 2**32, 200, np.uint64)])
    x, y = (grid.reshape(-1) for grid in np.meshgrid(numbers, numbers))
    product = jax.jit(high_product)(jnp.asarray(x, jnp.uint32), jnp.asarray(y, jnp.uint32))
    np.testing.assert_array_equal(product, (x * y) >> np.uint64(32))


def words_of(mass: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Words [tokens, levels] that lead to each token: at every level the middle of its block's share."""
    levels, start, parts = [], np.zeros(len(tokens), int), np.tile(mass.astype(np.float64), (len(tokens), 1))
    for width in block_widths(len(mass)):
        parts = np.pad(parts, ((0, 0), (0, -parts.shape[1] % width))).reshape(len(tokens), -1, width)
        blocks = (tokens - start) // width
        upper = np.cumsum(parts.sum(axis=2), axis=1)
        of_block = np.arange(len(tokens)), blocks
        middle = (upper[of_block] - parts.sum(axis=2)[of_block] / 2) / upper[:, -1]
        levels.append((middle * 2**32).astype(np.uint32))
        start, parts = start + blocks * width, parts[of_block]
    return np.stack(levels, axis=1)


@pytest.mark.parametrize("vocabulary", [1, 7, 40, 64, 4160, QWEN, QWEN + 1])
def test_words_lead_to_every_token(vocabulary: int):
    """The middle of a token's share at every level draws that token; the widths of levels need not divide."""
    random = np.random.default_rng(vocabulary)
    mass = random.uniform(0.5, 1.5, size=vocabulary).astype(np.float32)
    tokens = np.unique(np.r_[0, vocabulary - 1, random.integers(0, vocabulary, 30)])
    widths = block_widths(vocabulary)

    @jax.jit
    def invert(mass: jax.Array, words: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(mass, (len(words), vocabulary))
        return invert_cumulative(rows, block_sums(rows, widths[0], WHOLE), words, widths, WHOLE)

    np.testing.assert_array_equal(invert(mass, words_of(mass, tokens)), tokens)


@pytest.mark.parametrize("vocabulary", [7, 40, 48, 4160, QWEN])
def test_the_first_and_last_words_draw_tokens_of_positive_mass(vocabulary: int):
    random, widths = np.random.default_rng(0), block_widths(vocabulary)
    mass = random.uniform(size=vocabulary).astype(np.float32)
    mass[random.permutation(vocabulary)[: vocabulary // 2]] = 0
    mass[[0, -1]] = 0
    ends = np.uint32([0, 2**31, 2**32 - 1])
    words = np.stack(np.meshgrid(*[ends] * len(widths)), axis=-1).reshape(-1, len(widths))
    rows = jnp.broadcast_to(mass, (len(words), vocabulary))
    tokens = invert_cumulative(rows, block_sums(rows, widths[0], WHOLE), jnp.asarray(words), widths, WHOLE)
    assert np.all(mass[tokens] > 0)
    assert tokens[0] == np.flatnonzero(mass)[0]
    assert tokens[-1] == np.flatnonzero(mass)[-1]


# --- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.6), Sampling(1.7), Sampling(1.0, top_p=0.5), Sampling(0.6, top_k=3)], ids=str
)
def test_log_probs_are_of_the_softmax_at_this_temperature(sampling: Sampling):
    """With top-p or top-k on as well: the trainer's distribution, before they cut it."""
    logits = random_logits(50, 40)
    tokens, logprobs = draw(logits, sampling)
    np.testing.assert_allclose(
        logprobs, log_softmax(logits / sampling.temperature)[np.arange(50), tokens], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("sampling", [Sampling(0.6), Sampling(top_p=0.5), Sampling(0.6, top_k=3)], ids=str)
def test_renormalized_log_probs_are_of_what_was_kept(sampling: Sampling, shards: int):
    """The distribution that really sampled: those of all kept tokens sum to 1."""
    logits = random_logits(50, 40)
    tokens, logprobs = draw(logits, sampling._replace(renormalize=True), shards=shards)
    np.testing.assert_array_equal(tokens, draw(logits, sampling)[0])
    logits /= np.float32(sampling.temperature)
    left = np.where(kept(logits, sampling._replace(temperature=1.0)), log_softmax(logits), -np.inf)
    np.testing.assert_allclose(logprobs, log_softmax(left)[np.arange(50), tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_large_logits_stay_finite(offset: float):
    logits = random_logits(20, 40) + np.float32(offset)
    tokens, logprobs = draw(logits)
    np.testing.assert_allclose(logprobs, log_softmax(logits)[np.arange(20), tokens], rtol=1e-4, atol=1e-4)
    tokens, logprobs = draw(random_logits(20, 40, spread=1e6))
    assert np.all(np.isfinite(logprobs))


def test_greedy():
    """The most probable token, the first of equals; its log-prob is of the logits as they are."""
    logits = np.round(random_logits(60, 40))  # whole numbers: ties in most rows
    tokens, logprobs = draw(logits, Sampling(temperature=0))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    np.testing.assert_allclose(logprobs, log_softmax(logits)[np.arange(60), tokens], rtol=1e-5, atol=1e-5)
    assert np.array_equal(tokens, draw(logits, Sampling(temperature=0, top_p=0.3, top_k=2), seed=1, position=5)[0])


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 1e-300])
def test_a_temperature_near_0_draws_among_the_most_probable(temperature: float):
    """Dividing the logits themselves gave inf - inf."""
    logits = np.round(random_logits(60, 40))
    tokens, logprobs = draw(logits, Sampling(temperature))
    ties = logits == logits.max(axis=1, keepdims=True)
    assert np.all(ties[np.arange(60), tokens])
    np.testing.assert_allclose(logprobs, -np.log(ties.sum(axis=1)), atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.8, 0.9, 5)], ids=str)
@pytest.mark.parametrize("shards", [1, 4])
def test_logits_that_are_not_numbers_give_an_id_of_the_vocabulary(sampling: Sampling, shards: int):
    """A diverged policy must be found by the limits of the run, not by an embedding row that does not exist."""
    tokens, logprobs = draw(np.full((3, 40), np.nan), sampling, shards=shards)
    assert np.all((tokens >= 0) & (tokens < 40))
    assert np.all(np.isnan(logprobs))


# --- top-k and top-p --------------------------------------------------------------------------------------------------


@functools.cache
def filter_program(sampling: Sampling, vocabulary: int, shards: int) -> Any:
    def filter_on_shard(logits: jax.Array) -> jax.Array:
        shard = Shard(MODEL if shards > 1 else None)
        mass = jnp.exp(logits - shard.max(jnp.max(logits, axis=-1))[:, None])
        return filter_mass(mass, logits, sampling, block_widths(vocabulary)[0], shard)

    spec = P(None, MODEL)
    return jax.jit(
        jax.shard_map(filter_on_shard, mesh=mesh_of(1, shards), in_specs=spec, out_specs=spec, check_vma=False)
    )


def kept(logits: np.ndarray, sampling: Sampling, shards: int = 1) -> np.ndarray:
    """Which entries may be drawn."""
    return np.asarray(filter_program(sampling, logits.shape[1], shards)(jnp.float32(logits))) > 0


def kept_by_sorting(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """In float64: the k largest, then the fewest that leave at most 1 - p; all that equal the smallest of them."""
    logits = logits.astype(np.float64)
    if sampling.top_k:
        lowest = np.sort(logits, axis=1)[:, [-min(sampling.top_k, logits.shape[1])]]
        logits = np.where(logits >= lowest, logits, -np.inf)
    ascending = np.sort(np.exp(log_softmax(logits)), axis=1)
    place = np.minimum((np.cumsum(ascending, axis=1) <= 1 - sampling.top_p).sum(axis=1), logits.shape[1] - 1)
    lowest = np.sort(logits, axis=1)[np.arange(len(logits)), place if sampling.top_p < 1 else 0]
    return (logits >= lowest[:, None]) & np.isfinite(logits)


def hard_logits() -> np.ndarray:
    """Rows at which a search for a threshold can go wrong."""
    random = np.random.default_rng(0)
    normal, place = random.normal(size=40) * 3, np.arange(40)
    rows = [
        normal,
        np.round(normal),  # ties
        random.permutation(-2.0 * place),  # the 20th mass is far below 2^-32
        np.where(place == 11, 60.0, normal),
        np.where(place % 9 == 4, normal, -np.inf),
        np.where(place == 17, 2.5, -np.inf),
        np.where(place == 17, 2.5, -80.0),
        np.zeros(40),
        np.where(place % 2, 0.0, -0.0),
        normal - 3e4,
    ]
    return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("k", [1, 2, 7, 25, 39, 40, 99])
def test_top_k_keeps_what_sorting_keeps(k: int, shards: int):
    """Also where the k-th mass is below 2^-32 of the largest: a search that halved masses kept everything there."""
    for logits in (random_logits(100, 40), hard_logits()):
        sampling = Sampling(top_k=k)
        np.testing.assert_array_equal(kept(logits, sampling, shards), kept_by_sorting(logits, sampling))


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("p", [1e-9, 0.05, 0.5, 0.9, 0.99, 1 - 1e-6, 1 - 1e-12])
def test_top_p_keeps_what_sorting_keeps(p: float, shards: int):
    """The fewest most probable tokens that leave at most 1 - p, also where float32 does not tell p from 1."""
    for logits in (random_logits(100, 40), hard_logits()):
        sampling = Sampling(top_p=p)
        np.testing.assert_array_equal(kept(logits, sampling, shards), kept_by_sorting(logits, sampling))


@pytest.mark.parametrize("k", [2, 25])
def test_top_p_follows_top_k(k: int):
    sampling = Sampling(top_p=0.8, top_k=k)
    np.testing.assert_array_equal(kept(hard_logits(), sampling), kept_by_sorting(hard_logits(), sampling))


def test_ties_are_kept_together():
    logits = np.log(np.float32([[1, 0.5, 0.5, 0.5, 0.1]]))
    expected = [[True, True, True, True, False]]
    np.testing.assert_array_equal(kept(logits, Sampling(top_k=2)), expected)
    np.testing.assert_array_equal(kept(logits, Sampling(top_p=0.5)), expected)


def test_kept_tokens_are_those_of_transformers():
    """Its top-p breaks ties by the order of its sort, so only rows without them are compared."""
    torch = pytest.importorskip("torch", reason="needs torch, pip install 'crpo_jax[parity]'")
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    rows = hard_logits()
    untied = np.array([len(np.unique(row[np.isfinite(row)])) == np.isfinite(row).sum() for row in rows])
    ids = torch.zeros((len(rows), 1), dtype=torch.long)
    for k in (1, 7, 25, 99):
        warped = TopKLogitsWarper(k)(ids, torch.tensor(rows)).isfinite().numpy()
        np.testing.assert_array_equal(kept(rows, Sampling(top_k=k)), warped)
    for p in (1e-9, 0.5, 0.9, 1 - 1e-6):
        warped = TopPLogitsWarper(p)(ids, torch.tensor(rows, dtype=torch.float64)).isfinite().numpy()
        np.testing.assert_array_equal(kept(rows, Sampling(top_p=p))[untied], warped[untied])


@pytest.mark.parametrize(
    ("sampling", "cut"),
    [
        (Sampling(top_k=5), 5),
        (Sampling(top_p=0.7), None),
        (Sampling(0.8, top_k=12, top_p=0.6), None),
        (Sampling(top_k=40), 40),
        (Sampling(top_k=99), 40),
    ],
    ids=str,
)
def test_filtered_tokens_follow_the_renormalised_softmax(sampling: Sampling, cut: int | None):
    """top-k first, then top-p of what is left, as transformers and vLLM have it."""
    logits = random_logits(1, 40, spread=1.0)
    tokens, _ = draw(np.repeat(logits, 20000, axis=0), sampling)
    probabilities = np.exp(log_softmax(logits[0] / sampling.temperature))
    if sampling.top_k:
        probabilities[probabilities < np.sort(probabilities)[-min(sampling.top_k, 40)]] = 0
        probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    behind = order[(np.cumsum(probabilities[order]) - probabilities[order]) >= sampling.top_p]
    if sampling.top_p < 1:
        probabilities[behind] = 0
    assert fits(tokens, probabilities / probabilities.sum())
    assert cut is None or len(set(tokens.tolist())) == cut


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    logits = random_logits(50, 40)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6)):
        np.testing.assert_array_equal(draw(logits, sampling)[0], logits.argmax(axis=1))


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_belongs_to_prompt_and_sample():
    """A row's key is folded from its own two numbers, whatever the order and the rest of the batch."""
    key, prompts, samples = jax.random.key(3), np.repeat([5, 0, 9], 4), np.tile(np.arange(4), 3)

    def data(prompts: Any, samples: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(row_keys(key, jnp.array(prompts), jnp.array(samples))))

    all_ = data(prompts, samples)
    assert len({tuple(row.tolist()) for row in all_}) == 12
    shuffled = np.random.default_rng(0).permutation(12)[:7]
    np.testing.assert_array_equal(data(prompts[shuffled], samples[shuffled]), all_[shuffled])
    assert not np.array_equal(data([2], [0])[0], data([0], [2])[0])  # (prompt 0, sample 2) is not (prompt 2, sample 0)


def test_a_token_depends_on_its_key_and_position_alone():
    logits = np.repeat(random_logits(1, 40), 64, axis=0)
    first = draw(logits)[0]
    np.testing.assert_array_equal(draw(logits)[0], first)
    assert not np.array_equal(draw(logits, position=1)[0], first)
    assert not np.array_equal(draw(logits, seed=1)[0], first)
    other = logits.copy()
    other[1:] = random_logits(63, 40, seed=9)
    assert draw(other)[0][0] == first[0]


# --- a vocabulary over several devices --------------------------------------------------------------------------------

SETTINGS = [Sampling(0.6), Sampling(temperature=0), Sampling(0.8, top_p=0.8), Sampling(top_k=9)]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize(("vocabulary", "shards"), [(40, 2), (40, 8), (1152, 4), (4160, 8)])
def test_a_split_vocabulary_draws_the_same_tokens(sampling: Sampling, vocabulary: int, shards: int):
    """1,152 is 64 blocks of 18; 40 is 8 of 5, one per device at most; 4,160 has a third level.

    Log-probs are equal to the last bit, because sums over blocks are added up in the same order, but for (40, 8): the
    compiler adds up a device's only block in an order of its own.
    """
    logits = np.round(random_logits(300, vocabulary), 1)  # ties, also between devices
    tokens, logprobs = draw(logits, sampling, position=3)
    split_tokens, split_logprobs = draw(logits, sampling, position=3, shards=shards)
    np.testing.assert_array_equal(split_tokens, tokens)
    np.testing.assert_allclose(split_logprobs, logprobs, rtol=0, atol=1e-6 if shards == vocabulary // 5 else 0)
    assert len(set(tokens.tolist())) > 20


@pytest.mark.parametrize(("vocabulary", "shards"), [(9, 3), (12, 6), (35, 5), (37, 1), (1, 1)])
def test_odd_vocabularies(vocabulary: int, shards: int):
    """Blocks that cross devices are gathered first; the tokens are the same."""
    logits = random_logits(200, vocabulary)
    np.testing.assert_array_equal(draw(logits, shards=shards)[0], draw(logits)[0])
    assert draw(logits)[0].max() < vocabulary
