"""Advantages against their equations written out, and which groups are trained on."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.update.advantages import choose_groups, group_advantages

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("strict_ranks")]


def advantages_of(rewards: list[list[float]], counted: list[list[bool]] | None = None) -> np.ndarray:
    values = np.array(rewards, float)
    return group_advantages(values, np.ones(values.shape, bool) if counted is None else np.array(counted))


def test_one_hit_of_five():
    """Implementations differ here: with ddof = 0 the hit would get 2.0."""
    np.testing.assert_allclose(advantages_of([[1, 0, 0, 0, 0]])[0], [1.78885, *[-0.44721] * 4], atol=1e-5)


def test_advantages_are_equation_3():
    rewards = np.random.default_rng(0).normal(size=(7, 5)) * 6
    mean, std = rewards.mean(axis=1, keepdims=True), rewards.std(axis=1, ddof=1, keepdims=True)
    np.testing.assert_allclose(advantages_of(rewards.tolist()), (rewards - mean) / (std + 1e-6), rtol=1e-6)


def test_advantages_are_within_the_group():
    """Two groups, one of them twice as good: the same advantages, since only the group's own mean and spread count."""
    np.testing.assert_allclose(*advantages_of([[1.0, 2.0, 6.0], [102.0, 104.0, 112.0]]), rtol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 12.0, -3.5, 0.1 + 0.2, 1e12, 1 / 3])
def test_equal_rewards_are_exactly_zero(reward: float):
    assert not np.any(advantages_of([[reward] * 5]))


@pytest.mark.parametrize("size", [3, 5, 6, 7, 10, 16])
def test_equal_rewards_whose_mean_is_not_equal_to_them(size: int):
    """The mean of n copies of 0.1 may differ from 0.1: a spread of 1e-17, divided by itself, would count as 1."""
    for reward in np.random.default_rng(size).uniform(0, 12, 200):
        assert not np.any(advantages_of([[float(reward)] * size]))


def test_nearly_equal_rewards_stay_small():
    """Rewards one float apart differ by rounding alone; 1e-6 beside the deviation keeps that from becoming a signal."""
    first = 10.0 + 1 / 3
    advantages = advantages_of([[first, np.nextafter(first, 11), first, first, first]])
    assert np.all(np.abs(advantages) < 1e-6)
    assert np.all(np.isfinite(advantages))


def test_a_response_that_does_not_count_leaves_its_group_unchanged():
    """A rule that failed left reward 0 behind: it must move neither its group's mean nor its spread."""
    with_failed = advantages_of([[3.0, 0.0, 5.0, 10.0, -99.0]], [[True, False, True, True, False]])[0]
    np.testing.assert_array_equal(with_failed[[0, 2, 3]], advantages_of([[3.0, 5.0, 10.0]])[0])
    assert not np.any(with_failed[[1, 4]])


@pytest.mark.parametrize("counted", [[False] * 3, [True, False, False]])
def test_a_group_with_nothing_to_compare(counted: list[bool]):
    """One response alone has no spread: ddof = 1 would divide by 0."""
    assert not np.any(advantages_of([[1.0, 2.0, 3.0]], [counted]))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
@settings(max_examples=50, deadline=None)
def test_advantages_have_mean_0_and_order_of_the_rewards(rewards: list[float]):
    advantages, n = advantages_of([rewards])[0], len(rewards)
    assert np.all(np.isfinite(advantages))
    assert advantages.dtype == np.float32
    assert abs(advantages.sum()) < 1e-4
    assert np.all(np.diff(advantages[np.argsort(rewards)]) >= 0)
    assert np.abs(advantages).max() <= (n - 1) / math.sqrt(n) + 1e-4  # the largest advantage of any group of n


def test_dr_grpo_centres_only():
    """Small differences stay small: dividing by the deviation would favour questions that are nearly always solved."""
    rewards = np.array([[1.0, 0, 0, 0, 0], [2.0, 2.0, 2.0, 2.0, 2.5], [3.0] * 5])
    counted = np.array([[True] * 5, [True] * 4 + [False], [True] * 5])
    advantages = group_advantages(rewards, counted, "dr_grpo")
    np.testing.assert_allclose(advantages[0], [0.8, -0.2, -0.2, -0.2, -0.2], rtol=1e-6)
    assert not np.any(advantages[1:])


def test_rloo_leaves_its_own_reward_out_of_the_baseline():
    rewards, counted = np.random.default_rng(1).normal(size=(6, 5)), np.ones((6, 5), bool)
    counted[2, 3] = counted[4, :4] = False
    expected = np.zeros((6, 5))
    for i, j in zip(*np.nonzero(counted), strict=True):
        others = [rewards[i, k] for k in range(5) if k != j and counted[i, k]]
        expected[i, j] = rewards[i, j] - np.mean(others) if others else 0.0
    np.testing.assert_allclose(group_advantages(rewards, counted, "rloo"), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_plus_plus_normalizes_over_the_tokens_of_the_batch(baseline: bool):
    rng = np.random.default_rng(2)
    rewards, lengths, counted = rng.normal(size=(4, 3)) * 5, rng.integers(1, 50, size=(4, 3)), np.ones((4, 3), bool)
    counted[1, 2] = False
    values, tokens = {}, []
    for i, j in zip(*np.nonzero(counted), strict=True):
        group = [rewards[i, k] for k in range(3) if counted[i, k]]
        values[i, j] = rewards[i, j] - (np.mean(group) if baseline else 0)
        tokens += [values[i, j]] * lengths[i, j]
    expected = np.zeros((4, 3))
    for place, value in values.items():
        expected[place] = (value - np.mean(tokens)) / (np.std(tokens) + 1e-6)
    name = "reinforce_plus_plus_baseline" if baseline else "reinforce_plus_plus"
    np.testing.assert_allclose(group_advantages(rewards, counted, name, lengths), expected, rtol=1e-5, atol=1e-6)
    assert not np.any(group_advantages(np.full((2, 3), 0.1), np.ones((2, 3), bool), name, np.ones((2, 3), int)))
    assert not np.any(group_advantages(rewards, ~np.ones((4, 3), bool), name, lengths))


# --- which groups are trained on --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("varied", "wanted", "expected", "count"),
    [
        ([1, 1, 1], 3, [0, 1, 2], 3),
        ([1, 0, 0, 1, 1, 1], 3, [0, 3, 4], 3),  # those that teach something, in order
        ([0, 1, 0, 0, 0, 1], 3, [0, 1, 5], 2),  # too few: the first of the others fill the mini-batches
        ([0, 0, 0], 3, [0, 1, 2], 0),
    ],
)
def test_choose_groups(varied: list[int], wanted: int, expected: list[int], count: int):
    rewards = np.array([[1.0, 2.0 if varies else 1.0, 1.0] for varies in varied])
    groups, varied_count = choose_groups(rewards, np.ones(rewards.shape, bool), wanted)
    assert (groups.tolist(), varied_count) == (expected, count)


def test_a_group_varies_only_in_what_counts():
    rewards = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 2.0, 3.0]])
    counted = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 1]], bool)
    assert choose_groups(rewards, counted, 1)[0].tolist() == [1]
    assert choose_groups(rewards, counted, 3)[1] == 1
