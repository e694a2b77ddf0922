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
from crpo_jax.rollout.draw import Sampling, draw_tokens, find_threshold, invert_cumulative, row_keys

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

WHOLE, PLAIN = Shard(None), Sampling()
invert = jax.jit(
    lambda mass, uniform, vocabulary: invert_cumulative(mass, uniform, WHOLE, vocabulary), static_argnums=2
)


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


@pytest.mark.parametrize("uniform", [0.0, np.float32(2**-24), 0.5, np.float32(1 - 2**-24), 1.0])
def test_the_ends_of_the_unit_interval(uniform: float):
    """Uniform 0 must not choose a leading token of mass 0, nor rounding at 1 one behind the last of positive mass."""
    random = np.random.default_rng(0)
    for vocabulary in (7, 40, 48):
        for _ in range(20):
            mass = np.float32(random.uniform(size=(1, vocabulary)) ** 8)
            mass[0, random.permutation(vocabulary)[: vocabulary // 2]] = 0
            mass[0, [0, -1]] = 0
            token = int(invert(jnp.asarray(mass), jnp.float32([uniform]), vocabulary)[0])
            assert mass[0, token] > 0
            assert uniform or token == np.flatnonzero(mass[0])[0]


def test_inversion_is_the_cumulative_sum():
    """Exact for every token in every block: the middle of a token's share of the cumulative mass draws that token."""
    for vocabulary in (9, 40, 128):
        mass = np.random.default_rng(vocabulary).uniform(0.5, 1.5, size=vocabulary)
        upper = np.cumsum(mass) / mass.sum()
        middle = upper - mass / mass.sum() / 2
        tokens = invert(jnp.float32(np.tile(mass, (vocabulary, 1))), jnp.float32(middle), vocabulary)
        np.testing.assert_array_equal(tokens, np.arange(vocabulary))


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


# --- top-k and top-p --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 39])
def test_top_k_keeps_what_sorting_keeps(k: int):
    logits = random_logits(100, 40)
    mass = np.exp(logits - logits.max(axis=1, keepdims=True))
    lowest = np.asarray(find_threshold(jnp.asarray(mass), float(k), WHOLE, by_count=True))
    np.testing.assert_array_equal(mass >= lowest[:, None], mass >= np.sort(mass, axis=1)[:, [-k]])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_keeps_what_sorting_keeps(p: float):
    """The fewest most probable tokens that reach p together."""
    logits = random_logits(100, 40)
    mass = np.exp(logits - logits.max(axis=1, keepdims=True))
    order = np.argsort(-mass, axis=1)
    ranked = np.take_along_axis(mass.astype(np.float64), order, 1)
    before = np.cumsum(ranked, axis=1) - ranked
    expected = np.zeros(mass.shape, bool)
    np.put_along_axis(expected, order, before < p * mass.astype(np.float64).sum(axis=1, keepdims=True), 1)
    lowest = np.asarray(find_threshold(jnp.asarray(mass), jnp.asarray(p * mass.sum(axis=1)), WHOLE, by_count=False))
    np.testing.assert_array_equal(mass >= lowest[:, None], expected)


def test_ties_are_kept_together():
    mass = jnp.float32([[1, 0.5, 0.5, 0.5, 0.1]])
    assert float(find_threshold(mass, 2.0, WHOLE, by_count=True)[0]) == pytest.approx(0.5)
    assert float(find_threshold(mass, jnp.float32([1.2]), WHOLE, by_count=False)[0]) == pytest.approx(0.5)


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
@pytest.mark.parametrize(("vocabulary", "shards"), [(40, 2), (40, 8), (1152, 4)])
def test_a_split_vocabulary_draws_the_same_tokens(sampling: Sampling, vocabulary: int, shards: int):
    """1,152 is 64 blocks of 18; 40 is 8 of 5, one per device at most."""
    logits = np.round(random_logits(300, vocabulary), 1)  # ties, also between devices
    tokens, logprobs = draw(logits, sampling, position=3)
    split_tokens, split_logprobs = draw(logits, sampling, position=3, shards=shards)
    np.testing.assert_array_equal(split_tokens, tokens)
    np.testing.assert_allclose(split_logprobs, logprobs, rtol=1e-5, atol=1e-5)
    assert len(set(tokens.tolist())) > 20


@pytest.mark.parametrize(("vocabulary", "shards"), [(9, 3), (12, 6), (35, 5), (37, 1), (1, 1)])
def test_odd_vocabularies(vocabulary: int, shards: int):
    """Blocks that cross devices are gathered first; the tokens are the same."""
    logits = random_logits(200, vocabulary)
    np.testing.assert_array_equal(draw(logits, shards=shards)[0], draw(logits)[0])
    assert draw(logits)[0].max() < vocabulary
