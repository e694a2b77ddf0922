"""The equations of CRPO against the same written out token by token in float64, and their edge cases."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from crpo_jax.config import Crpo
from crpo_jax.update.losses import (
    Batch,
    adapted_kl_coef,
    clipped_objective,
    combine_metrics,
    crpo_loss,
    estimate_kl,
    response_kl,
    row_weights,
    supervised_loss,
)

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("strict_ranks")]

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


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
        estimate_kl(jnp.float32(policy), jnp.float32(reference)), np.minimum(expected, 10), rtol=1e-4, atol=1e-6
    )


def test_k3_is_at_most_10_and_has_no_gradient_beyond():
    """One token of log-ratio 10 would count 22,015 and outweigh its mini-batch. The bound is the authors' trainer's."""
    policy, reference = jnp.zeros((1, 4)), jnp.array([[2.5, 2.6, 10.0, -20.0]])
    expected = [math.exp(2.5) - 3.5, math.exp(2.6) - 3.6, 10, 10]
    np.testing.assert_allclose(estimate_kl(policy, reference)[0], expected, rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(estimate_kl(x, reference)))(policy)[0]
    np.testing.assert_allclose(gradient, [1 - math.exp(2.5), 1 - math.exp(2.6), 0, 0], rtol=1e-5)


def test_k3_is_zero_at_equality_and_nowhere_negative():
    """Down to log-ratios of 1e-7, where exp(x) - x - 1 in float32 would be rounding of either sign."""
    gap = jnp.concatenate([jnp.linspace(-30, 30, 999), 10.0 ** -jnp.arange(1, 9), -(10.0 ** -jnp.arange(1, 9))])[None]
    policy = jnp.full_like(gap, -3.0)
    np.testing.assert_array_equal(estimate_kl(policy, policy), 0)
    assert np.all(np.asarray(estimate_kl(jnp.zeros_like(gap), gap)) >= 0)
    np.testing.assert_allclose(estimate_kl(jnp.zeros((1, 1)), jnp.full((1, 1), 1e-3)), [[5e-7]], rtol=2e-3)


def test_k3_of_a_flipped_pair_differs():
    """The ratio is reference over policy: a gap of -1 costs 1 / e, one of +1 costs e - 2."""
    policy, reference = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -1.0]])
    np.testing.assert_allclose(estimate_kl(policy, reference), [[math.exp(-1), math.e - 2]], rtol=1e-5)


@pytest.mark.parametrize("gap", [21.0, 100.0, 1e4, 3e38])
@pytest.mark.parametrize("sign", [-1, 1])
def test_k3_of_extreme_log_ratios_is_finite(gap: float, sign: int):
    """exp(89) is inf in float32, and 0 * inf in the mask's gradient makes the whole batch NaN: public runs ended so."""
    reference = jnp.full((1, 1), sign * gap)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(estimate_kl(x, reference)))(jnp.zeros((1, 1)))
    assert np.isfinite(value)
    assert value > 0
    assert np.all(np.isfinite(gradient))


def test_k3_gradient():
    """d/d policy = 1 - ratio."""
    policy, reference = jnp.array([[-1.0, -2.0, -0.5]]), jnp.array([[-2.0, -1.0, -0.5]])
    gradient = jax.grad(lambda x: jnp.sum(estimate_kl(x, reference)))(policy)
    np.testing.assert_allclose(gradient, 1 - np.exp(np.asarray(reference - policy)), rtol=1e-5, atol=1e-6)
    check_grads(
        lambda x: estimate_kl(jnp.asarray(x), reference), (policy,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2
    )


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
    mismatch = np.asarray(x["old"] - x["sampler"])[MASK]
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
        "sum/importance": np.exp(mismatch).sum(),
        "sum/importance_squared": np.exp(2 * mismatch).sum(),
        "sum/importance_units": MASK.sum(),
        "sum/importance_capped": 0,
        "sum/importance_masked": 0,
        "sum/sampler_tokens": MASK.sum(),
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


# --- variants ---------------------------------------------------------------------------------------------------------


def bounded(ratio: float, low: float, high: float) -> float:
    return min(max(ratio, 1 - low), 1 + high)


def variant_written_out(x: dict[str, np.ndarray], crpo: Crpo, logprobs: np.ndarray) -> float:
    """The loss of any variant token by token in float64 from the equations of docs/reference/losses.md.

    What has no gradient is read from x["logprobs"], the rest from `logprobs`, so that finite differences see the same.
    """
    by_sampler, total = crpo.old_logprobs == "sampler", 0.0
    for i in range(B):
        places, advantage = np.flatnonzero(MASK[i]), x["advantages"][i]
        trainer = x["logprobs"][i] if by_sampler else x["old"][i]
        old = x["sampler"][i] if by_sampler else x["old"][i]
        mismatch = trainer - x["sampler"][i]
        for j in places:
            ratio, fixed = (math.exp(p[j] - old[j]) for p in (logprobs[i], x["logprobs"][i]))
            if crpo.ratio == "sequence":
                ratio, fixed = (math.exp(np.mean((p - old)[places])) for p in (logprobs[i], x["logprobs"][i]))
            low, high = (
                (crpo.clip_low, crpo.clip_high)
                if crpo.ratio == "token"
                else (crpo.sequence_clip_low, crpo.sequence_clip_high)
            )
            tau = crpo.sapo_tau_positive if advantage > 0 else crpo.sapo_tau_negative
            objective = {
                "clip": min(ratio * advantage, bounded(ratio, low, high) * advantage),
                "cispo": bounded(fixed, low, high) * advantage * logprobs[i, j],
                "sapo": 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage,
            }[crpo.loss]
            weight = math.exp(mismatch[places].sum() if crpo.importance == "sequence" else mismatch[j])
            outside = crpo.importance_bound and not 1 / crpo.importance_bound <= weight <= crpo.importance_bound
            correction = 0.0 if outside else min(weight, crpo.importance_cap) / (fixed if by_sampler else 1)
            gap = x["reference"][i, j] - logprobs[i, j]
            kl = {"k1": -gap, "k2": gap**2 / 2, "k3": math.exp(gap) - gap - 1}[crpo.kl_estimator]
            each = objective * (correction if crpo.importance != "off" else 1.0)
            each += crpo.entropy_coef * x["entropy"][i, j] - (crpo.kl_coef * kl if crpo.kl_in == "loss" else 0)
            total -= x["weights"][i] * each
    return float(total)


VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "cispo": {"loss": "cispo"},
    "sapo": {"loss": "sapo"},
    "sapo with a ratio per response": {"loss": "sapo", "ratio": "sequence"},
    "cispo with a ratio per response": {"loss": "cispo", "ratio": "sequence"},
    "k1": {"kl_estimator": "k1"},
    "k2": {"kl_estimator": "k2"},
    "KL in the reward": {"kl_in": "reward"},
    "weights by token": {"importance": "token", "importance_cap": 1.1},
    "weights by token, masked": {"importance": "token", "importance_cap": 1.1, "importance_bound": 1.3},
    "weights by response": {"importance": "sequence", "importance_cap": 1.2},
    "weights by response, masked": {"importance": "sequence", "importance_bound": 1.5},
    "cispo of weighted responses": {"loss": "cispo", "importance": "sequence"},
    "sampler": {"old_logprobs": "sampler"},
    "sampler, weights by token": {"old_logprobs": "sampler", "importance": "token", "importance_cap": 1.1},
    "sampler, weights by response": {"old_logprobs": "sampler", "importance": "sequence", "importance_bound": 1.5},
    "sampler, a ratio per response": {"old_logprobs": "sampler", "importance": "sequence", "ratio": "sequence"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_its_equation(name: str):
    """Values, and gradients against finite differences of the equations in float64."""
    bounds: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "sequence_clip_low": 0.05, "sequence_clip_high": 0.08}
    crpo = Crpo(**bounds, kl_coef=0.07, entropy_coef=0.05, **VARIANTS[name])
    x = inputs(1)
    x["sampler"] = x["old"] + 8 * (x["sampler"] - x["logprobs"])  # about 0.08 off, so that caps and bounds are at work
    exact = {key: np.asarray(value, np.float64) for key, value in x.items()}

    def loss(logprobs: jax.Array) -> jax.Array:
        return crpo_loss(logprobs, x["entropy"], batch_of(x), crpo, crpo.kl_coef)[0]

    value, gradient = jax.value_and_grad(loss)(x["logprobs"])
    assert float(value) == pytest.approx(variant_written_out(exact, crpo, exact["logprobs"]), rel=1e-5)
    expected = np.zeros((B, T))
    for i, j in zip(*np.nonzero(MASK), strict=True):
        above, below = (
            variant_written_out(exact, crpo, exact["logprobs"] + step * (np.arange(B * T) == i * T + j).reshape(B, T))
            for step in (1e-6, -1e-6)
        )
        expected[i, j] = (above - below) / 2e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    plain = crpo_loss(x["logprobs"], x["entropy"], batch_of(x), Crpo(**bounds, entropy_coef=0.05), 0.07)[0]
    assert name == "clip" or float(plain) != float(value)


def test_importance_metrics():
    """One unit per token, or per response; what is masked is not counted as truncated too."""
    x = inputs()
    steps = np.zeros((B, T))
    steps[0, :3], steps[1, :7], steps[3, :5] = 0.5, -0.5, 0.05
    x["sampler"] = x["old"] - jnp.float32(steps)
    for level, per_unit in (("token", np.exp(steps[MASK])), ("sequence", np.exp([1.5, -3.5, 0, 0.25]))):
        crpo = Crpo(importance=level, importance_cap=1.2, importance_bound=3.0)
        metrics = as_floats(crpo_loss(x["logprobs"], x["entropy"], batch_of(x), crpo, 0.0)[1])
        masked = (per_unit > 3) | (per_unit < 1 / 3)
        weights = np.where(masked, 0, np.minimum(per_unit, 1.2))
        assert metrics["sum/importance_units"] == len(per_unit)
        assert metrics["sum/importance_masked"] == masked.sum() == (2 if level == "sequence" else 0)
        assert metrics["sum/importance_capped"] == (~masked & (per_unit > 1.2)).sum() > 0
        assert metrics["sum/importance"] == pytest.approx(weights.sum(), rel=1e-5)
        assert metrics["sum/importance_squared"] == pytest.approx((weights**2).sum(), rel=1e-5)


def test_the_sampler_is_compared_only_where_the_weights_are_its_own():
    """With the sampler's log-probs alone, rows of later optimizer steps would count what was learned in between."""
    x, crpo = inputs(), Crpo(old_logprobs="sampler")
    first = jnp.array([True, False, False, True])
    batch = batch_of(x)._replace(on_policy=first, old=None)
    metrics = as_floats(crpo_loss(x["logprobs"], x["entropy"], batch, crpo, 0.0)[1])
    compared = MASK & np.asarray(first)[:, None]
    assert metrics["sum/sampler_tokens"] == compared.sum()
    difference = np.abs(np.asarray(x["logprobs"] - x["sampler"]))[compared]
    assert metrics["max/sampler_difference"] == pytest.approx(difference.max(), rel=1e-5)
    log_ratio = np.asarray(x["logprobs"] - x["sampler"])[MASK]
    assert metrics["max/log_ratio"] == pytest.approx(log_ratio.max(), rel=1e-5), "not 1 in the first step either"


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_of_a_response_is_of_what_sampled_it(estimator: Any):
    """Also of a response without gradient, whose reward is in its group's mean all the same."""
    x = inputs() | {"weights": jnp.array([0.1, 0.0, 0.1, 0.1])}
    gap = np.float64(x["reference"]) - np.float64(x["sampler"])
    each = {"k1": -gap, "k2": gap**2 / 2, "k3": np.exp(gap) - gap - 1}[estimator]
    np.testing.assert_allclose(response_kl(batch_of(x), estimator), np.where(MASK, each, 0).sum(axis=1), rtol=1e-4)


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
