"""The equations of CRPO against the same written out token by token in float64, and their edge cases."""

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

from crpo_jax.config import Crpo
from crpo_jax.update.losses import (
    Batch,
    adapted_kl_coef,
    choose_groups,
    clipped_objective,
    combine_metrics,
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


# --- weights of the rows ----------------------------------------------------------------------------------------------

LENGTHS = np.array([4, 1, 10, 5])
ALL = np.ones(4, bool)


def test_token_mean_weighs_tokens_alike():
    np.testing.assert_allclose(row_weights(LENGTHS, ALL, "token_mean"), [1 / 20] * 4)


def test_sequence_mean_weighs_responses_alike():
    """1/4 each, shared among its tokens: as equation 1 averages."""
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
    """In a public trainer truncated responses stayed in the denominator and shrank every gradient."""
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
    """One token of log-ratio 10 would count 22,015 and outweigh its mini-batch. The bound is the authors' trainer's."""
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
    """The ratio is reference over policy: a gap of -1 costs 1 / e, one of +1 costs e - 2."""
    policy, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -1.0]])
    np.testing.assert_allclose(k3(policy, reference), [[math.exp(-1), math.e - 2]], rtol=1e-5)


@pytest.mark.parametrize("gap", [21.0, 100.0, 1e4, 3e38])
@pytest.mark.parametrize("sign", [-1, 1])
def test_k3_of_extreme_log_ratios_is_finite(gap: float, sign: int):
    """exp(89) is inf in float32, and 0 * inf in the mask's gradient makes the whole batch NaN: public runs ended so."""
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
    """clip_low 0.2, clip_high 0.3: each side has its own bound. `slope`: d objective / d log-ratio, over the ratio."""

    def value(log_ratio: jax.Array) -> Any:
        return clipped_objective(log_ratio, jnp.array([advantage]), 0.2, 0.3)

    log_ratio = jnp.log(jnp.array([[ratio]]))
    values, was_clipped = value(log_ratio)
    assert float(values[0, 0]) == pytest.approx(objective, rel=1e-5)
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

B, T, LONGEST = 4, 8, 9
RESPONSE_LENGTHS = np.array([3, 7, 1, 5])
MASK = np.arange(T) < RESPONSE_LENGTHS[:, None]
COEFFICIENTS = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.07, "entropy_coef": 0.05}


def inputs(seed: int = 0, drift: float = 0.3, aggregation: Any = "token_mean") -> dict[str, Any]:
    """Log-probs around -2, entropies, and the fields of a batch: old and reference log-probs `drift` apart."""
    rng = np.random.default_rng(seed)
    logprobs = rng.normal(size=(B, T)) - 2
    arrays = {
        "logprobs": logprobs,
        "entropy": rng.uniform(0, 3, size=(B, T)),
        "old": logprobs + drift * rng.normal(size=(B, T)),
        "reference": logprobs + drift * rng.normal(size=(B, T)),
        "sampler": logprobs + 0.01 * rng.normal(size=(B, T)),
        "advantages": rng.normal(size=B),
        "weights": row_weights(RESPONSE_LENGTHS, np.ones(B, bool), aggregation, LONGEST),
    }
    return {name: jnp.float32(value) for name, value in arrays.items()} | {"lengths": jnp.int32(RESPONSE_LENGTHS)}


def batch_of(x: dict[str, Any]) -> Batch:
    """All of the inputs but log-probs and entropies; the losses do not look at the tokens."""
    fields = {name: value for name, value in x.items() if name not in ("logprobs", "entropy")}
    return Batch(jnp.zeros(x["logprobs"].shape, jnp.int32), **fields)


def loss_and_metrics(
    x: dict[str, Any],
    *,
    ratio: Any = "token",
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """crpo_loss of the inputs. `kl_coef` is an argument of the loss; that of the settings must not matter."""
    prefix = "sequence_" if ratio == "sequence" else ""
    bounds: Any = {f"{prefix}clip_low": clip_low, f"{prefix}clip_high": clip_high}
    crpo = Crpo(ratio=ratio, kl_coef=1e9, entropy_coef=entropy_coef, **bounds)
    return crpo_loss(x["logprobs"], x["entropy"], batch_of(x), crpo, kl_coef)


def written_out(
    x: dict[str, Any],
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
    mask: np.ndarray = MASK,
) -> float:
    """Equation 1 with PPO-clip, token by token in float64."""
    total = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
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
    assert float(loss_and_metrics(x, **COEFFICIENTS)[0]) == pytest.approx(written_out(x, **COEFFICIENTS), rel=1e-5)


def test_aggregations_read_literally():
    """token_mean is the mean over all 16 tokens; sequence_mean the mean over the 4 responses of the mean over their
    tokens; constant the mean over the 4 responses of the sum over their tokens, divided by the longest possible, 9."""
    x = inputs() | {"weights": jnp.ones(B)}
    per_token = np.zeros((B, T))
    for i, j in zip(*np.nonzero(MASK), strict=True):
        alone = np.zeros((B, T), bool)
        alone[i, j] = True
        per_token[i, j] = written_out(x, **COEFFICIENTS, mask=alone)
    losses = {name: float(loss_and_metrics(inputs(aggregation=name), **COEFFICIENTS)[0]) for name in AGGREGATIONS}
    responses = [per_token[i][MASK[i]] for i in range(B)]
    assert losses["token_mean"] == pytest.approx(per_token[MASK].mean(), rel=1e-5)
    assert losses["sequence_mean"] == pytest.approx(np.mean([tokens.mean() for tokens in responses]), rel=1e-5)
    assert losses["constant"] == pytest.approx(np.mean([tokens.sum() / LONGEST for tokens in responses]), rel=1e-5)
    assert len({round(value, 3) for value in losses.values()}) == 3


def gspo_written_out(
    x: dict[str, Any], clip_low: float, clip_high: float, kl_coef: float, entropy_coef: float
) -> float:
    """GSPO's equation 5 response by response in float64, beside the KL and entropy of equation 1."""
    objectives = []
    for i in range(B):
        mask = MASK[i]
        log_ratio = (np.float64(x["logprobs"][i]) - np.float64(x["old"][i]))[mask]
        gap = (np.float64(x["reference"][i]) - np.float64(x["logprobs"][i]))[mask]
        ratio, advantage = math.exp(log_ratio.sum() / mask.sum()), float(x["advantages"][i])
        policy = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
        kl, entropy = np.minimum(np.exp(gap) - gap - 1, 10).mean(), np.float64(x["entropy"][i])[mask].mean()
        objectives.append(policy - kl_coef * kl + entropy_coef * entropy)
    return -float(np.mean(objectives))


@pytest.mark.parametrize("seed", range(3))
def test_one_ratio_per_response_is_gspo(seed: int):
    x, coefficients = inputs(seed, aggregation="sequence_mean"), COEFFICIENTS | {"clip_low": 0.05, "clip_high": 0.08}
    loss, metrics = loss_and_metrics(x, **coefficients, ratio="sequence")
    assert float(loss) == pytest.approx(gspo_written_out(x, **coefficients), rel=1e-5)
    log_ratio = np.array([np.asarray(x["logprobs"] - x["old"])[i][MASK[i]].mean() for i in range(B)])
    advantages = np.asarray(x["advantages"])
    assert float(metrics["max/log_ratio"]) == pytest.approx(max(log_ratio.max(), 0), rel=1e-4)
    assert float(metrics["min/log_ratio"]) == pytest.approx(min(log_ratio.min(), 0), rel=1e-4)
    for side, clipped in (
        ("high", (np.exp(log_ratio) > 1.08) & (advantages > 0)),
        ("low", (np.exp(log_ratio) < 0.95) & (advantages < 0)),
    ):
        assert float(metrics[f"sum/clipped_{side}"]) == MASK[clipped].sum()  # by token, each standing for its response


def test_gradients_of_gspo():
    """Equal on every token of a response that is not clipped: ratio * advantage / tokens, over the responses."""
    x = inputs(aggregation="sequence_mean")

    def loss(logprobs: Any) -> Any:
        return loss_of(logprobs, x, ratio="sequence", kl_coef=0.0, entropy_coef=0.0, clip_low=0.9, clip_high=9.0)

    log_ratio = np.asarray(x["logprobs"] - x["old"])
    for i, row in enumerate(np.asarray(jax.grad(loss)(x["logprobs"]))):
        expected = -math.exp(log_ratio[i][MASK[i]].mean()) * float(x["advantages"][i]) / MASK[i].sum() / B
        np.testing.assert_allclose(row, np.where(MASK[i], expected, 0), rtol=1e-4)
    check_grads(loss, (x["logprobs"],), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def loss_of(logprobs: Any, x: dict[str, Any], **changed: Any) -> Any:
    """The loss alone, for derivatives by the log-probs."""
    return loss_and_metrics(x | {"logprobs": jnp.asarray(logprobs)}, **(COEFFICIENTS | changed))[0]


def test_gradients_are_those_of_finite_differences():
    x = inputs()
    check_grads(lambda logprobs: loss_of(logprobs, x), (x["logprobs"],), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


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


@pytest.mark.parametrize("name", ["logprobs", "entropy"])
def test_metrics_have_no_gradient(name: str):
    x = inputs()
    gradient = jax.grad(lambda value: sum(loss_and_metrics(x | {name: value}, **COEFFICIENTS)[1].values()))(x[name])
    assert not np.any(gradient)


def test_entropy_is_a_bonus():
    """More entropy, less loss, by the coefficient and the token's weight."""
    x = inputs()
    gradient = jax.grad(lambda entropy: loss_and_metrics(x | {"entropy": entropy}, **COEFFICIENTS)[0])(x["entropy"])
    expected = -COEFFICIENTS["entropy_coef"] * MASK * np.asarray(x["weights"])[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def with_gradient(x: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Loss, metrics, and the gradient for the log-probs."""
    (loss, metrics), gradient = jax.value_and_grad(
        lambda logprobs: loss_and_metrics(x | {"logprobs": logprobs}, **COEFFICIENTS), has_aux=True
    )(x["logprobs"])
    return loss, metrics, gradient


@pytest.mark.parametrize("left_out_by", ["weights", "lengths"])
def test_masking_equals_deletion(left_out_by: str):
    """Rows and tokens that are masked may be cut out of the arrays: same loss, same gradient, same metrics."""
    x = inputs()
    x[left_out_by] = x[left_out_by].at[1].set(0)
    rows, t = np.array([0, 2, 3]), 7
    cut = {name: value[rows, :t] if value.ndim == 2 else value[rows] for name, value in x.items()}
    loss, metrics, gradient = with_gradient(x)
    loss_cut, metrics_cut, gradient_cut = with_gradient(cut)
    assert float(loss) == pytest.approx(float(loss_cut), rel=1e-6)
    np.testing.assert_allclose(gradient[rows, :t], gradient_cut, rtol=1e-6)
    assert not np.any(np.delete(gradient, rows, axis=0))
    assert not np.any(gradient[:, t:])
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(metrics_cut[name]), rel=1e-6), name


@pytest.mark.parametrize("name", ["logprobs", "entropy", "old", "reference", "sampler"])
@pytest.mark.parametrize("garbage", [1e30, -1e30, float("inf"), float("-inf"), float("nan")])
def test_values_under_the_mask_do_not_matter(name: str, garbage: float):
    """Prompts and padding hold arbitrary values; a NaN there must reach neither the loss nor the gradient."""
    x = inputs()
    loss, metrics, gradient = with_gradient(x)
    spoilt_loss, spoilt_metrics, spoilt_gradient = with_gradient(x | {name: jnp.where(MASK, x[name], garbage)})
    assert float(spoilt_loss) == float(loss)
    np.testing.assert_array_equal(spoilt_gradient, gradient)
    assert as_floats(spoilt_metrics) == as_floats(metrics)


def as_floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def test_metrics():
    """Sums are over the mask's tokens, whatever their weight; extremes are over those tokens and 0."""
    x = inputs(3)
    metrics = as_floats(loss_and_metrics(x, **COEFFICIENTS)[1])
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
    """Loss, gradients and metrics of two parts of a mini-batch combine to those of the whole."""
    x = inputs()
    parts = [{name: value[part] for name, value in x.items()} for part in (slice(None, cut), slice(cut, None))]
    loss, metrics, gradient = with_gradient(x)
    (first_loss, first_metrics, first_gradient), (second_loss, second_metrics, second_gradient) = map(
        with_gradient, parts
    )
    assert float(loss) == pytest.approx(float(first_loss + second_loss), rel=1e-5)
    assert as_floats(combine_metrics(first_metrics, second_metrics)) == pytest.approx(as_floats(metrics), rel=1e-5)
    np.testing.assert_allclose(np.concatenate([first_gradient, second_gradient]), gradient, rtol=1e-6)


def test_metrics_combine_by_their_prefix():
    old = {"sum/a": jnp.float32(1), "max/a": jnp.float32(1), "min/a": jnp.float32(1)}
    new = {"sum/a": jnp.float32(3), "max/a": jnp.float32(3), "min/a": jnp.float32(3)}
    assert combine_metrics(old, new) == combine_metrics(new, old) == {"sum/a": 4.0, "max/a": 3.0, "min/a": 1.0}


def test_a_batch_with_no_token_at_all():
    """Filling rows alone: everything is 0 and nothing NaN."""
    x = inputs() | {"lengths": jnp.zeros(B, jnp.int32), "weights": jnp.zeros(B)}
    loss, metrics = loss_and_metrics(x, **COEFFICIENTS)
    assert float(loss) == 0
    assert all(float(value) == 0 for value in metrics.values())


def test_advantages_of_the_wrong_shape_are_refused():
    """[b] in place of [b, t] would broadcast if b = t; the tests check the annotated shapes."""
    with pytest.raises(Exception, match=re.compile("advantages", re.DOTALL)):
        loss_and_metrics(inputs() | {"advantages": jnp.ones((B, T))}, **COEFFICIENTS)


# --- the adaptive KL coefficient --------------------------------------------------------------------------------------


def test_the_kl_coefficient_follows_its_target():
    """Against the controller written out: by at most a fiftieth, up while the KL is above its target, else down."""
    coefficient, expected = jnp.float32(0.01), 0.01
    for mean, tokens in ((0.3, 70.0), (0.11, 5.0), (0.1, 9.0), (0.09, 20.0), (0.0, 3.0), (0.5, 0.0)):
        coefficient = adapted_kl_coef(coefficient, jnp.float32(mean * tokens), jnp.float32(tokens), 0.1, 0.1)
        error = min(max((mean - 0.1) / 0.1, -0.2), 0.2) if tokens else 0.0  # a mini-batch without tokens says nothing
        expected *= 1 + 0.1 * error
        assert float(coefficient) == pytest.approx(expected, rel=1e-5)
    assert float(adapted_kl_coef(jnp.float32(1), jnp.float32(9), jnp.float32(1), 0.1, 0.1)) == pytest.approx(1.02)


# --- the cold start's loss --------------------------------------------------------------------------------------------


def test_supervised_loss_is_the_mean_negative_logprob():
    x = inputs()
    loss, metrics = supervised_loss(x["logprobs"], batch_of(x))
    nll = -np.asarray(x["logprobs"])[MASK]
    assert float(loss) == pytest.approx(nll.mean(), rel=1e-5)
    expected = {"sum/loss": nll.mean(), "sum/nll": nll.sum(), "sum/tokens": nll.size}
    assert as_floats(metrics) == pytest.approx(expected, rel=1e-5)


def test_supervised_masking_equals_deletion():
    x = inputs()

    def gradient(logprobs: jax.Array) -> jax.Array:
        return jax.grad(lambda logprobs: supervised_loss(logprobs, batch_of(x))[0])(logprobs)

    clean = gradient(x["logprobs"])
    np.testing.assert_array_equal(gradient(jnp.where(MASK, x["logprobs"], jnp.nan)), clean)
    np.testing.assert_allclose(clean, np.where(MASK, -np.asarray(x["weights"])[:, None], 0), rtol=1e-6)
