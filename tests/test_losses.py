"""The equations of CRPO against the same written out in numpy float64, token by token, and against what they must never do."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from crpo_jax.update.losses import (
    adapted,
    chosen_groups,
    clipped_objective,
    combined,
    crpo_loss,
    group_advantages,
    k3,
    row_weights,
    supervised_loss,
)

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("strict_ranks")]

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


# --- advantages -------------------------------------------------------------------------------------------------------


def advantages_of(rewards: list[list[float]], counted: list[list[bool]] | None = None) -> np.ndarray:
    values = np.array(rewards, float)
    return group_advantages(values, np.ones(values.shape, bool) if counted is None else np.array(counted))


def test_one_hit_of_five():
    """The figure by which implementations are told apart: with ddof = 0 the hit would get 2.0."""
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
    """The mean of n copies of 0.1 may be another float than 0.1: a spread of 1e-17 divided by itself would be an advantage of 1."""
    for reward in np.random.default_rng(size).uniform(0, 12, 200):
        assert not np.any(advantages_of([[float(reward)] * size]))


def test_nearly_equal_rewards_stay_small():
    """Rewards one float apart differ by rounding alone; 1e-6 beside the deviation keeps that from becoming a signal."""
    first = 10.0 + 1 / 3
    found = advantages_of([[first, np.nextafter(first, 11), first, first, first]])
    assert np.all(np.abs(found) < 1e-6)
    assert np.all(np.isfinite(found))


def test_a_response_that_does_not_count_is_as_if_it_were_not_there():
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
    found = advantages_of([rewards])[0]
    assert np.all(np.isfinite(found))
    assert found.dtype == np.float32
    assert abs(found.sum()) < 1e-4
    assert np.all(np.diff(found[np.argsort(rewards)]) >= 0)
    assert (
        np.abs(found).max() <= (len(rewards) - 1) / math.sqrt(len(rewards)) + 1e-4
    )  # the most that one of n can stand out


def test_dr_grpo_centres_only():
    """A group of small differences keeps them small: no division by its deviation, which favours questions that are nearly always solved."""
    rewards = np.array([[1.0, 0, 0, 0, 0], [2.0, 2.0, 2.0, 2.0, 2.5], [3.0] * 5])
    counted = np.array([[True] * 5, [True] * 4 + [False], [True] * 5])
    found = group_advantages(rewards, counted, "dr_grpo")
    np.testing.assert_allclose(found[0], [0.8, -0.2, -0.2, -0.2, -0.2], rtol=1e-6)
    assert not np.any(found[1:])


# --- which groups are trained on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("varied", "wanted", "expected", "count"),
    [
        ([1, 1, 1], 3, [0, 1, 2], 3),
        ([1, 0, 0, 1, 1, 1], 3, [0, 3, 4], 3),  # those that teach something, in order
        ([0, 1, 0, 0, 0, 1], 3, [0, 1, 5], 2),  # too few: filled up by the first of the others
        ([0, 0, 0], 3, [0, 1, 2], 0),
    ],
)
def test_chosen_groups(varied: list[int], wanted: int, expected: list[int], count: int):
    rewards = np.array([[1.0, 2.0, 1.0] if one else [1.0, 1.0, 1.0] for one in varied])
    found, teaching = chosen_groups(rewards, np.ones(rewards.shape, bool), wanted)
    assert (found.tolist(), teaching) == (expected, count)


def test_a_group_varies_only_in_what_counts():
    rewards, counted = (
        np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 2.0, 3.0]]),
        np.array([[1, 0, 1], [1, 1, 1], [0, 0, 1]], bool),
    )
    assert chosen_groups(rewards, counted, 1)[0].tolist() == [1]
    assert chosen_groups(rewards, counted, 3)[1] == 1


# --- weights of the rows ----------------------------------------------------------------------------------------------

LENGTHS = np.array([4, 1, 10, 5])
ALL = np.ones(4, bool)


def test_token_mean_weighs_tokens_alike():
    np.testing.assert_allclose(row_weights(LENGTHS, ALL, "token_mean"), [1 / 20] * 4)


def test_sequence_mean_weighs_responses_alike():
    """1/4 each, shared among its tokens: equation 1 read literally."""
    np.testing.assert_allclose(row_weights(LENGTHS, ALL, "sequence_mean"), [1 / 16, 1 / 4, 1 / 40, 1 / 20])


def test_constant_weighs_every_token_the_same_in_every_batch():
    """Dr. GRPO: whatever the lengths, a token weighs 1 / (responses * the longest one possible)."""
    np.testing.assert_allclose(row_weights(LENGTHS, ALL, "constant", 20), [1 / 80] * 4)
    np.testing.assert_allclose(row_weights(LENGTHS * 2, ALL, "constant", 20), [1 / 80] * 4)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 9, 0, 0, 1 / 9]),
        ("sequence_mean", [1 / 8, 0, 0, 1 / 10]),
        ("constant", [1 / 40, 0, 0, 1 / 40]),
    ],
)
def test_what_is_left_out_is_not_in_the_denominator(aggregation: Any, expected: list[float]):
    """Truncated responses once stayed in a public trainer's denominator and shrank every gradient."""
    np.testing.assert_allclose(row_weights(LENGTHS, np.array([True, False, False, True]), aggregation, 20), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_of_no_response_at_all(aggregation: Any):
    assert not np.any(row_weights(LENGTHS, ~ALL, aggregation))


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_k3_is_equation_2():
    draw = np.random.default_rng(0)
    policy, reference = draw.normal(size=(2, 3, 4)) - 2
    ratio = np.exp(reference - policy)
    expected = ratio - np.log(ratio) - 1
    assert 5 < expected.max() < 11
    np.testing.assert_allclose(
        k3(jnp.float32(policy), jnp.float32(reference)), np.minimum(expected, 10), rtol=1e-4, atol=1e-6
    )


def test_k3_is_at_most_10_and_has_no_gradient_beyond():
    """One token of log-ratio 10 would count 22,015 and be the whole mini-batch's loss. The bound is the authors' trainer's."""
    policy, reference = jnp.zeros((1, 4)), jnp.array([[2.5, 2.6, 10.0, -20.0]])
    expected = [math.exp(2.5) - 3.5, math.exp(2.6) - 3.6, 10, 10]
    np.testing.assert_allclose(k3(policy, reference)[0], expected, rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(k3(x, reference)))(policy)[0]
    np.testing.assert_allclose(gradient, [1 - math.exp(2.5), 1 - math.exp(2.6), 0, 0], rtol=1e-5)


def test_k3_is_zero_at_equality_and_nowhere_negative():
    """Down to log-ratios of 1e-7, where exp(x) - x - 1 in float32 would be rounding of either sign."""
    gap = jnp.concatenate([jnp.linspace(-30, 30, 999), 10.0 ** -jnp.arange(1, 9), -(10.0 ** -jnp.arange(1, 9))])[None]
    policy = jnp.full_like(gap, -3.0)
    np.testing.assert_array_equal(k3(policy, policy), 0)
    assert np.all(np.asarray(k3(jnp.zeros_like(gap), gap)) >= 0)
    np.testing.assert_allclose(k3(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-3)), [[5e-7]], rtol=2e-3)


def test_k3_of_a_flipped_pair_differs():
    """reference over policy, not policy over reference: -1 costs e - 2, +1 costs 1 / e."""
    policy, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -1.0]])
    np.testing.assert_allclose(k3(policy, reference), [[math.exp(-1), math.e - 2]], rtol=1e-5)


@pytest.mark.parametrize("gap", [21.0, 100.0, 1e4, 3e38])
@pytest.mark.parametrize("sign", [-1, 1])
def test_k3_of_extreme_log_ratios_is_finite(gap: float, sign: int):
    """exp(89) is inf in float32, and 0 * inf in the mask's gradient is NaN for the whole batch: it ended public runs."""
    reference = jnp.full((1, 1), sign * gap)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(k3(x, reference)))(jnp.zeros((1, 1)))
    assert np.isfinite(value)
    assert value > 0
    assert np.all(np.isfinite(gradient))


def test_k3_gradient():
    """d/d policy = 1 - ratio."""
    policy, reference = jnp.array([[-1.0, -2.0, -0.5]]), jnp.array([[-2.0, -1.0, -0.5]])
    gradient = jax.grad(lambda x: jnp.sum(k3(x, reference)))(policy)
    np.testing.assert_allclose(gradient, 1 - np.exp(np.asarray(reference - policy)), rtol=1e-5, atol=1e-6)
    check_grads(lambda x: k3(jnp.asarray(x), reference), (policy,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


# --- the clipped objective --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped", "slope"),
    [
        (1.5, 2.0, 1.3 * 2.0, True, 0.0),  # more likely and good: enough of it
        (0.5, 2.0, 0.5 * 2.0, False, 2.0),  # less likely and good: pulled back
        (1.5, -2.0, 1.5 * -2.0, False, -2.0),  # more likely and bad: pushed down
        (0.5, -2.0, 0.8 * -2.0, True, 0.0),  # less likely and bad: enough of it
        (1.1, 2.0, 1.1 * 2.0, False, 2.0),
        (0.9, -2.0, 0.9 * -2.0, False, -2.0),
        (1.0, 2.0, 2.0, False, 2.0),
        (1.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_clip_by_sign(ratio: float, advantage: float, objective: float, clipped: bool, slope: float):
    """clip_low 0.2, clip_high 0.3: each side has its own bound, and only the side that would go on is cut. Slope: d/d log-ratio over ratio."""

    def value(log_ratio: jax.Array) -> Any:
        return clipped_objective(log_ratio, jnp.array([advantage]), 0.2, 0.3)

    log_ratio = jnp.log(jnp.array([[ratio]]))
    found, was_clipped = value(log_ratio)
    assert float(found[0, 0]) == pytest.approx(objective, rel=1e-5)
    assert bool(was_clipped[0, 0]) is clipped
    gradient = jax.grad(lambda x: value(x)[0].sum())(log_ratio)
    assert float(gradient[0, 0]) / ratio == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 3e38, -3e38])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_extreme_ratios_are_finite(log_ratio: float, advantage: float):
    value, gradient = jax.value_and_grad(lambda x: clipped_objective(x, jnp.array([advantage]), 0.2, 0.2)[0].sum())(
        jnp.array([[log_ratio]])
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


# --- the whole loss ---------------------------------------------------------------------------------------------------

B, T, LONGEST = 4, 7, 9
COEFFICIENTS = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.07, "entropy_coef": 0.05}
MASK = np.arange(T) < np.array([[3], [7], [1], [5]])


def inputs(seed: int = 0, drift: float = 0.3, aggregation: Any = "token_mean") -> dict[str, Any]:
    """Log-probs around -2, old ones `drift` apart, as jnp arrays."""
    draw = np.random.default_rng(seed)
    logprobs = draw.normal(size=(B, T)) - 2
    arrays = {
        "logprobs": logprobs,
        "entropy": draw.uniform(0, 3, size=(B, T)),
        "old": logprobs + drift * draw.normal(size=(B, T)),
        "reference": logprobs + drift * draw.normal(size=(B, T)),
        "sampler": logprobs + 0.01 * draw.normal(size=(B, T)),
    }
    return {
        **{name: jnp.float32(value) for name, value in arrays.items()},
        "mask": jnp.asarray(MASK),
        "advantages": jnp.float32(draw.normal(size=B)),
        "weights": jnp.asarray(row_weights(MASK.sum(axis=1), np.ones(B, bool), aggregation, LONGEST)),
    }


def written_out(x: dict[str, Any], clip_low: float, clip_high: float, kl_coef: float, entropy_coef: float) -> float:
    """Equation 1 with PPO-clip, token by token in float64."""
    total = 0.0
    for i, j in zip(*np.nonzero(x["mask"]), strict=True):
        ratio = math.exp(float(x["logprobs"][i, j]) - float(x["old"][i, j]))
        advantage, gap = float(x["advantages"][i]), float(x["reference"][i, j]) - float(x["logprobs"][i, j])
        policy = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
        divergence = min(math.exp(gap) - gap - 1, 10.0)
        total -= float(x["weights"][i]) * (policy - kl_coef * divergence + entropy_coef * float(x["entropy"][i, j]))
    return total


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_equation(aggregation: Any, seed: int):
    x = inputs(seed, aggregation=aggregation)
    assert float(crpo_loss(**x, **COEFFICIENTS)[0]) == pytest.approx(written_out(x, **COEFFICIENTS), rel=1e-5)


def test_aggregations_read_literally():
    """token_mean: the mean over all 16 tokens. sequence_mean: the mean over 4 responses of the mean over a response's tokens.
    constant: the mean over 4 responses of the sum over a response's tokens, over the 9 that it might have had (Dr. GRPO)."""
    x = inputs()
    per_token = np.zeros((B, T))
    for i, j in zip(*np.nonzero(MASK), strict=True):
        alone = x | {"mask": jnp.zeros((B, T), bool).at[i, j].set(True), "weights": jnp.ones(B)}
        per_token[i, j] = written_out(alone, **COEFFICIENTS)
    found = {name: float(crpo_loss(**inputs(aggregation=name), **COEFFICIENTS)[0]) for name in AGGREGATIONS}
    assert found["token_mean"] == pytest.approx(per_token[MASK].mean(), rel=1e-5)
    assert found["sequence_mean"] == pytest.approx(np.mean([per_token[i][MASK[i]].mean() for i in range(B)]), rel=1e-5)
    assert found["constant"] == pytest.approx(np.mean([per_token[i][MASK[i]].sum() / 9 for i in range(B)]), rel=1e-5)
    assert len({round(value, 3) for value in found.values()}) == 3


def gspo_written_out(
    x: dict[str, Any], clip_low: float, clip_high: float, kl_coef: float, entropy_coef: float
) -> float:
    """GSPO's equation 5 response by response in float64, beside the KL and entropy of equation 1."""
    objectives = []
    for i in range(B):
        here = MASK[i]
        log_ratio = (np.float64(x["logprobs"][i]) - np.float64(x["old"][i]))[here]
        gap = (np.float64(x["reference"][i]) - np.float64(x["logprobs"][i]))[here]
        ratio, advantage = math.exp(log_ratio.sum() / here.sum()), float(x["advantages"][i])
        policy = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
        kl, entropy = np.minimum(np.exp(gap) - gap - 1, 10).mean(), np.float64(x["entropy"][i])[here].mean()
        objectives.append(policy - kl_coef * kl + entropy_coef * entropy)
    return -float(np.mean(objectives))


@pytest.mark.parametrize("seed", range(3))
def test_one_ratio_per_response_is_gspo(seed: int):
    x, coefficients = inputs(seed, aggregation="sequence_mean"), COEFFICIENTS | {"clip_low": 0.05, "clip_high": 0.08}
    loss, metrics = crpo_loss(**x, **coefficients, ratio="sequence")
    assert float(loss) == pytest.approx(gspo_written_out(x, **coefficients), rel=1e-5)
    log_ratio, advantages = (
        np.array([np.asarray(x["logprobs"] - x["old"])[i][MASK[i]].mean() for i in range(B)]),
        np.asarray(x["advantages"]),
    )
    assert float(metrics["max/log_ratio"]) == pytest.approx(max(log_ratio.max(), 0), rel=1e-4)
    assert float(metrics["min/log_ratio"]) == pytest.approx(min(log_ratio.min(), 0), rel=1e-4)
    for side, clipped in (
        ("high", (np.exp(log_ratio) > 1.08) & (advantages > 0)),
        ("low", (np.exp(log_ratio) < 0.95) & (advantages < 0)),
    ):
        assert float(metrics[f"sum/clipped_{side}"]) == MASK[clipped].sum()  # by token, each standing for its response


def test_gradients_of_gspo():
    """Every token of a response that is not clipped has the same one: ratio * advantage / tokens, over the responses."""
    x, coefficients = (
        inputs(aggregation="sequence_mean"),
        COEFFICIENTS | {"kl_coef": 0.0, "entropy_coef": 0.0, "clip_low": 0.9, "clip_high": 9.0},
    )

    def loss(logprobs: Any) -> Any:
        return crpo_loss(**(x | {"logprobs": jnp.asarray(logprobs)}), **coefficients, ratio="sequence")[0]

    log_ratio = np.asarray(x["logprobs"] - x["old"])
    for i, row in enumerate(np.asarray(jax.grad(loss)(x["logprobs"]))):
        expected = -math.exp(log_ratio[i][MASK[i]].mean()) * float(x["advantages"][i]) / MASK[i].sum() / B
        np.testing.assert_allclose(row, np.where(MASK[i], expected, 0), rtol=1e-4)
    check_grads(loss, (x["logprobs"],), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def loss_of(logprobs: Any, x: dict[str, Any], **changed: float) -> Any:
    return crpo_loss(**(x | {"logprobs": logprobs}), **(COEFFICIENTS | changed))[0]


def test_gradients_are_those_of_finite_differences():
    x = inputs()
    check_grads(
        lambda logprobs: loss_of(jnp.asarray(logprobs), x),
        (x["logprobs"],),
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
    )


def test_ratio_1_gives_the_reinforce_gradient():
    """At the old log-probs, d loss / d logprob is -weight * advantage on every token of the mask and 0 elsewhere."""
    x = inputs()
    x["old"] = x["reference"] = x["logprobs"]
    gradient = jax.grad(loss_of)(x["logprobs"], x)
    np.testing.assert_allclose(
        gradient, np.where(MASK, -np.asarray(x["weights"] * x["advantages"])[:, None], 0), rtol=1e-5
    )


def test_equal_rewards_give_no_policy_gradient():
    """With advantages 0, what is left is the KL alone: nothing without its coefficient, its gradient with it."""
    x = inputs() | {"advantages": jnp.zeros(B)}
    assert not np.any(jax.grad(loss_of)(x["logprobs"], x, kl_coef=0.0))
    ratio = np.exp(np.asarray(x["reference"] - x["logprobs"]))
    expected = COEFFICIENTS["kl_coef"] * MASK * (1 - ratio) * np.asarray(x["weights"])[:, None]
    np.testing.assert_allclose(jax.grad(loss_of)(x["logprobs"], x), expected, rtol=1e-4, atol=1e-7)


def test_no_gradient_flows_into_old_reference_and_sampler_metrics():
    """The metrics are constants: their sum has no gradient of its own."""
    x = inputs()
    for name in ("logprobs", "entropy"):
        gradient = jax.grad(lambda value, name=name: sum(crpo_loss(**(x | {name: value}), **COEFFICIENTS)[1].values()))(
            x[name]
        )
        assert not np.any(gradient), name


def test_entropy_is_a_bonus():
    """More entropy, less loss, by the coefficient and the token's weight."""
    x = inputs()
    gradient = jax.grad(lambda entropy: crpo_loss(**(x | {"entropy": entropy}), **COEFFICIENTS)[0])(x["entropy"])
    np.testing.assert_allclose(
        gradient, -COEFFICIENTS["entropy_coef"] * MASK * np.asarray(x["weights"])[:, None], rtol=1e-6
    )


def test_masking_equals_deletion():
    """Rows and tokens that are masked may be cut out of the arrays: same loss, same gradient, same metrics."""
    x = inputs()
    x["mask"] = x["mask"].at[1].set(False)
    keep = np.array([0, 2, 3])
    cut = {name: value[keep, :5] if value.ndim == 2 else value[keep] for name, value in x.items()}
    (loss, metrics), gradient = jax.value_and_grad(
        lambda v: crpo_loss(**(x | {"logprobs": v}), **COEFFICIENTS), has_aux=True
    )(x["logprobs"])
    (loss_cut, metrics_cut), gradient_cut = jax.value_and_grad(
        lambda v: crpo_loss(**(cut | {"logprobs": v}), **COEFFICIENTS), has_aux=True
    )(cut["logprobs"])
    assert float(loss) == pytest.approx(float(loss_cut), rel=1e-6)
    np.testing.assert_allclose(gradient[keep, :5], gradient_cut, rtol=1e-6)
    assert not np.any(np.delete(gradient, keep, axis=0))
    assert not np.any(gradient[:, 5:])
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(metrics_cut[name]), rel=1e-6), name


@pytest.mark.parametrize("name", ["logprobs", "entropy", "old", "reference", "sampler"])
@pytest.mark.parametrize("garbage", [1e30, -1e30, float("inf"), float("-inf"), float("nan")])
def test_what_stands_under_the_mask_does_not_matter(name: str, garbage: float):
    """Padding holds whatever the forward made of it; a NaN there must reach neither the loss nor the gradient."""
    x = inputs()
    spoilt = x | {name: jnp.where(x["mask"], x[name], garbage)}
    (clean, metrics), gradient = jax.value_and_grad(
        lambda v: crpo_loss(**(x | {"logprobs": v}), **COEFFICIENTS), has_aux=True
    )(x["logprobs"])
    (loss, found), spoilt_gradient = jax.value_and_grad(
        lambda v: crpo_loss(**(spoilt | {"logprobs": v}), **COEFFICIENTS), has_aux=True
    )(spoilt["logprobs"])
    assert float(loss) == float(clean)
    np.testing.assert_array_equal(spoilt_gradient, gradient)
    assert {key: float(value) for key, value in found.items()} == {key: float(value) for key, value in metrics.items()}


def test_metrics():
    """Sums are over the tokens of the mask, whatever their weight; extremes are of the mask, with 0 where nothing differs."""
    x = inputs(2)
    metrics = {name: float(value) for name, value in crpo_loss(**x, **COEFFICIENTS)[1].items()}
    log_ratio = np.asarray(x["logprobs"] - x["old"])[MASK]
    advantages = np.repeat(np.asarray(x["advantages"]), MASK.sum(axis=1))
    gap = np.asarray(x["reference"] - x["logprobs"])[MASK]
    kl = np.exp(gap) - gap - 1
    clipped = ((np.exp(log_ratio) > 1.3) & (advantages > 0)) | ((np.exp(log_ratio) < 0.8) & (advantages < 0))
    assert np.any(clipped & (log_ratio > 0))
    assert np.any(clipped & (log_ratio < 0))
    assert not clipped.all()
    expected = {
        "sum/loss": written_out(x, **COEFFICIENTS),
        "sum/policy": written_out(x, **(COEFFICIENTS | {"kl_coef": 0.0, "entropy_coef": 0.0})),
        "sum/kl": kl.sum(),
        "sum/entropy": np.asarray(x["entropy"])[MASK].sum(),
        "sum/clipped_high": (clipped & (log_ratio > 0)).sum(),
        "sum/clipped_low": (clipped & (log_ratio < 0)).sum(),
        "sum/tokens": MASK.sum(),
        "sum/sampler_difference": np.abs(np.asarray(x["old"] - x["sampler"]))[MASK].sum(),
        "max/sampler_difference": np.abs(np.asarray(x["old"] - x["sampler"]))[MASK].max(),
        "max/kl": kl.max(),
        "max/log_ratio": log_ratio.max(),
        "min/log_ratio": log_ratio.min(),
    }
    assert metrics == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_micro_batches_add_up(cut: int):
    """Loss, gradients and metrics of two parts of a mini-batch, combined, are those of the whole: the weights know the whole."""
    x = inputs()
    parts = [{name: value[part] for name, value in x.items()} for part in (slice(None, cut), slice(cut, None))]
    whole, one, two = (crpo_loss(**part, **COEFFICIENTS) for part in (x, *parts))
    assert float(whole[0]) == pytest.approx(float(one[0] + two[0]), rel=1e-5)
    together = combined(one[1], two[1])
    assert {name: float(value) for name, value in together.items()} == pytest.approx(
        {name: float(v) for name, v in whole[1].items()}, rel=1e-5
    )
    gradients = [np.asarray(jax.grad(lambda v, part=part: loss_of(v, part))(part["logprobs"])) for part in parts]
    np.testing.assert_allclose(np.concatenate(gradients), jax.grad(loss_of)(x["logprobs"], x), rtol=1e-6)


def test_combined_by_prefix():
    old = {"sum/a": jnp.float32(1), "max/a": jnp.float32(1), "min/a": jnp.float32(1)}
    new = {"sum/a": jnp.float32(3), "max/a": jnp.float32(3), "min/a": jnp.float32(3)}
    assert combined(old, new) == combined(new, old) == {"sum/a": 4.0, "max/a": 3.0, "min/a": 1.0}


def test_a_batch_with_no_token_at_all():
    """Filling rows alone: everything is 0 and nothing NaN."""
    x = inputs() | {"mask": jnp.zeros((B, T), bool), "weights": jnp.zeros(B)}
    loss, metrics = crpo_loss(**x, **COEFFICIENTS)
    assert float(loss) == 0
    assert all(float(value) == 0 for value in metrics.values())


def test_advantages_of_the_wrong_shape_are_seen():
    """[b] where [b, t] is meant broadcasts wherever b = t; the annotations say which, and tests check them."""
    with pytest.raises(Exception, match=re.compile("advantages", re.DOTALL)):
        crpo_loss(**(inputs() | {"advantages": jnp.ones((B, T))}), **COEFFICIENTS)


# --- the adaptive KL coefficient ---------------------------------------------------------------------------------------


def test_the_kl_coefficient_follows_its_target():
    """Against the controller written out: up by at most a fiftieth while the KL is above its target, down while it is below."""
    coefficient, expected = jnp.float32(0.01), 0.01
    for mean, tokens in ((0.3, 70.0), (0.11, 5.0), (0.1, 9.0), (0.09, 20.0), (0.0, 3.0), (0.5, 0.0)):
        coefficient = adapted(coefficient, jnp.float32(mean * tokens), jnp.float32(tokens), 0.1, 0.1)
        error = min(max((mean - 0.1) / 0.1, -0.2), 0.2) if tokens else 0.0  # a mini-batch without tokens says nothing
        expected *= 1 + 0.1 * error
        assert float(coefficient) == pytest.approx(expected, rel=1e-5)
    assert float(adapted(jnp.float32(1), jnp.float32(9), jnp.float32(1), 0.1, 0.1)) == pytest.approx(1.02)


# --- the cold start's loss --------------------------------------------------------------------------------------------


def test_supervised_loss_is_the_mean_negative_log_prob():
    x = inputs()
    loss, metrics = supervised_loss(x["logprobs"], x["mask"], x["weights"])
    nll = -np.asarray(x["logprobs"])[MASK]
    assert float(loss) == pytest.approx(nll.mean(), rel=1e-5)
    found = {name: float(value) for name, value in metrics.items()}
    assert found == pytest.approx({"sum/loss": nll.mean(), "sum/nll": nll.sum(), "sum/tokens": nll.size}, rel=1e-5)


def test_supervised_masking_equals_deletion():
    x = inputs()
    spoilt = jnp.where(x["mask"], x["logprobs"], jnp.nan)
    clean = jax.grad(lambda v: supervised_loss(v, x["mask"], x["weights"])[0])(x["logprobs"])
    found = jax.grad(lambda v: supervised_loss(v, x["mask"], x["weights"])[0])(spoilt)
    np.testing.assert_array_equal(found, clean)
    np.testing.assert_allclose(clean, np.where(MASK, -np.asarray(x["weights"])[:, None], 0), rtol=1e-6)
