"""The loss of CRPO, and of the variants users compare it with, on plain arrays: no Flax, no mesh.

Per-token arrays are [b, t]. A mask is 1 where a token belongs to a response that carries gradient; `weights` [b] are
the aggregation's: the loss is sum over b, t of weights * mask * per-token loss, so that micro-batches and devices
simply add.

A variant is a choice of policy term, ratio, clip range, aggregation, KL estimate and importance weights within this one
loss, and of `update/advantages.py`. docs/reference/losses.md has all equations side by side.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from crpo_jax.config import Crpo
from crpo_jax.update.own_loss import LossArrays, call_loss

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
Estimator = Literal["k1", "k2", "k3"]
Metrics = dict[str, Float[Array, ""]]

LOG_RATIO_BOUND = 20.0  # beyond it exp would overflow float32 into inf - inf
KL_BOUND = 10.0  # ours: k3 has a tail: one token of log-ratio 10 would outweigh the whole mini-batch's policy gradient


class Batch(NamedTuple):
    """A micro-batch: its responses, right-padded [b, t], and the packed rows [c, t] that the model reads, one for every
    data shard.

    A row that only fills up the shape has length 0. Response rows are in the order of their shards, as many for each.
    """

    tokens: Int[Array, "b t"]  # of the responses
    lengths: Int[Array, " b"]  # of the responses
    weights: Float[Array, " b"]  # of each response token in the mini-batch's loss (`row_weights`); 0: no gradient
    advantages: Float[Array, " b"] | None = None
    sampler: Float[Array, "b t"] | None = None  # log-probs that the tokens were drawn with
    reference: Float[Array, "b t"] | None = None  # log-probs of the frozen start; None: no KL
    old: Float[Array, "b t"] | None = None  # the trainer's log-probs before the rollout's first optimizer step
    on_policy: Bool[Array, " b"] | None = None  # rows of that step: the weights that compute have sampled them
    responses: Int[Array, " b"] | None = None  # which of the rollout's trained responses a row is; -1: filling
    starts: Int[Array, " b"] | None = None  # place in its packed row that predicts a response's first token
    packed_tokens: Int[Array, "c s"] | None = None
    targets: Int[Array, "c s"] | None = None  # the response token that each place predicts; -1: none
    positions: Int[Array, "c s"] | None = None  # these three: `model.packed_attention.Packing`
    sequences: Int[Array, "c s"] | None = None
    prompts: Int[Array, "c s"] | None = None


def response_positions(batch: Batch) -> Bool[Array, "b t"]:
    """Tokens of responses. From lengths, never from token ids."""
    return jnp.arange(batch.tokens.shape[1])[None] < batch.lengths[:, None]


def response_mask(batch: Batch) -> Bool[Array, "b t"]:
    """Tokens of responses that carry gradient."""
    return response_positions(batch) & (batch.weights > 0)[:, None]


def row_weights(
    lengths: Int[np.ndarray, " b"], counted: Bool[np.ndarray, " b"], aggregation: Aggregation, longest: int = 1
) -> Float[np.ndarray, " b"]:
    """What each token of a response weighs in the mini-batch's loss; the denominators are of the whole mini-batch.

    token_mean: 1 / all response tokens. sequence_mean: 1 / (the response's tokens * responses), the averages of
    equation 1. constant: 1 / (`longest` * responses), the longest a response may be, so that length itself is not
    rewarded (Dr. GRPO).
    """
    lengths = np.where(counted, lengths, 0).astype(np.float64)
    if aggregation == "token_mean":
        weights = np.full(len(lengths), 1 / max(lengths.sum(), 1))
    else:
        weights = 1 / (
            max(counted.sum(), 1)
            * (np.maximum(lengths, 1) if aggregation == "sequence_mean" else np.full(len(lengths), longest))
        )
    return np.where(counted, weights, 0).astype(np.float32)


# --- KL ---------------------------------------------------------------------------------------------------------------


def estimate_kl(
    logprobs: Float[Array, "b t"], reference: Float[Array, "b t"], estimator: Estimator = "k3"
) -> Float[Array, "b t"]:
    """An estimate per token of the KL of policy to reference, from r = reference / policy of the sampled token.

    k1: -log r. k2: (log r)^2 / 2. k3: r - 1 - log r (equation 2), never negative. Source: Schulman, "Approximating KL
    Divergence" (joschu.net/blog/kl-approx.html). The log-ratio is clamped before exp and the estimate bounded; beyond
    either it has no gradient.
    """
    log_ratio = jnp.clip(reference - logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k3":
        return jnp.minimum(jnp.expm1(log_ratio) - log_ratio, KL_BOUND)
    return jnp.clip(-log_ratio if estimator == "k1" else log_ratio**2 / 2, -KL_BOUND, KL_BOUND)


def response_kl(batch: Batch, estimator: Estimator) -> Float[Array, " b"]:
    """The KL of the policy that sampled to the reference, summed over each response: what kl_in=reward takes off its
    reward."""
    assert batch.sampler is not None
    assert batch.reference is not None
    inside = response_positions(batch)
    sampler, reference = (jnp.where(inside, x, 0) for x in (batch.sampler, batch.reference))
    return jnp.sum(estimate_kl(sampler, reference, estimator), axis=1)


# --- the policy term --------------------------------------------------------------------------------------------------


def bounded_exp(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def clipped_objective(
    log_ratio: Float[Array, "b t"], advantages: Float[Array, " b"], clip_low: float, clip_high: float
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """PPO's min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), and where the clipped side was the smaller: above 1 for
    a good response, below it for a bad one."""
    ratio = bounded_exp(log_ratio)
    free, clipped = ratio * advantages[:, None], jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages[:, None]
    return jnp.minimum(free, clipped), clipped < free


def cispo_objective(
    logprobs: Float[Array, "b t"],
    log_ratio: Float[Array, "b t"],
    advantages: Float[Array, " b"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """clip(ratio, 1 - low, 1 + high) * A * log-prob, with no gradient through the ratio (arXiv 2506.13585, equations 4
    and 5), and where the ratio was clipped: every token keeps a gradient."""
    ratio = jax.lax.stop_gradient(bounded_exp(log_ratio))
    weight = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return weight * advantages[:, None] * logprobs, weight != ratio


def sapo_objective(
    log_ratio: Float[Array, "b t"], advantages: Float[Array, " b"], positive: float, negative: float
) -> Float[Array, "b t"]:
    """4 / tau * sigmoid(tau (ratio - 1)) * A, with a tau for good responses and one for the others (arXiv 2511.20347,
    equations 5 and 6): its slope is 1 at ratio 1 and fades away from there, where PPO cuts it off."""
    tau = jnp.where(advantages > 0, positive, negative)[:, None]
    return 4 / tau * jax.nn.sigmoid(tau * (bounded_exp(log_ratio) - 1)) * advantages[:, None]


def response_log_ratio(log_ratio: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """GSPO's log-ratio (equation 7): the mean over a response's tokens, on each of them."""
    mean = jnp.sum(jnp.where(mask, log_ratio, 0), axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return jnp.where(mask, mean[:, None], 0)


def policy_objective(
    arrays: LossArrays, log_ratio: Float[Array, "b t"], crpo: Crpo
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """The policy term of crpo.loss per token, to be maximized, and where its ratio was clipped."""
    advantages = arrays.advantages
    clip_low, clip_high = (
        (crpo.clip_low, crpo.clip_high) if crpo.ratio == "token" else (crpo.sequence_clip_low, crpo.sequence_clip_high)
    )
    if crpo.loss == "clip":
        return clipped_objective(log_ratio, advantages, clip_low, clip_high)
    if crpo.loss == "cispo":
        return cispo_objective(arrays.logprobs, log_ratio, advantages, clip_low, clip_high)
    unclipped = jnp.zeros_like(arrays.mask)
    if crpo.loss == "sapo":
        return sapo_objective(log_ratio, advantages, crpo.sapo_tau_positive, crpo.sapo_tau_negative), unclipped
    return -call_loss(crpo.loss, arrays), unclipped


# --- importance weights -----------------------------------------------------------------------------------------------


def importance_weights(
    log_ratio: Float[Array, "b t"], mask: Bool[Array, "b t"], crpo: Crpo
) -> tuple[Float[Array, "b t"], Metrics]:
    """What corrects for tokens drawn by the sampler and not by the trainer, whose log-probs are `log_ratio` above the
    sampler's, and its metrics.

    The weight is the ratio of a token or of its whole response, truncated at importance_cap ("truncated importance
    sampling", TIS), and 0 where the ratio leaves [1 / importance_bound, importance_bound] ("masked importance
    sampling"). Off: the metrics alone, of the tokens' ratios as they are. Not differentiated.
    """
    log_ratio, units = jax.lax.stop_gradient(jnp.where(mask, log_ratio, 0)), mask
    if crpo.importance == "sequence":
        log_ratio, units = jnp.sum(log_ratio, axis=1, keepdims=True), jnp.any(mask, axis=1, keepdims=True)
    ratio = bounded_exp(log_ratio)
    capped = masked = jnp.zeros_like(units)
    weights = ratio
    if crpo.importance != "off":
        capped = ratio > crpo.importance_cap
        if crpo.importance_bound:
            masked = (ratio > crpo.importance_bound) | (ratio < 1 / crpo.importance_bound)
        weights = jnp.where(masked, 0, jnp.minimum(ratio, crpo.importance_cap))
    counted = jnp.where(units, weights, 0)

    def count(where: Array) -> Array:
        return jnp.sum(units & where, dtype=jnp.float32)

    return jnp.broadcast_to(weights, mask.shape) if crpo.importance != "off" else jnp.ones(mask.shape), {
        "sum/importance": jnp.sum(counted),
        "sum/importance_squared": jnp.sum(counted**2),
        "sum/importance_units": count(units),
        "sum/importance_capped": count(capped & ~masked),
        "sum/importance_masked": count(masked),
    }


# --- the whole loss ---------------------------------------------------------------------------------------------------


def old_logprobs(logprobs: Float[Array, "b t"], batch: Batch, crpo: Crpo) -> Float[Array, "b t"]:
    """The ratio's denominator: the log-probs that tokens were drawn with, or the trainer's own of the same weights.

    The trainer's are `logprobs`, to the last digit, in the rollout's first optimizer step, whose rows are
    `batch.on_policy`, and without `batch.old`, where there is no other step: two compiled programs round differently.
    """
    if crpo.old_logprobs == "sampler":
        assert batch.sampler is not None
        return batch.sampler
    logprobs = jax.lax.stop_gradient(logprobs)
    if batch.old is None or batch.on_policy is None:
        return logprobs if batch.old is None else batch.old
    return jnp.where(batch.on_policy[:, None], logprobs, batch.old)


def crpo_loss(
    logprobs: Float[Array, "b t"],
    entropy: Float[Array, "b t"],
    batch: Batch,
    crpo: Crpo,
    kl_coef: float | Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """The negated objective (equation 1 with the policy term of crpo.loss) of some rows of a mini-batch, and its
    metrics.

    With one ratio per response every token stands for its response: weights of sequence_mean make it GSPO's equation 5.
    With old_logprobs=sampler the ratio is itself a weight of importance: a weight asked for replaces its size.

    Metrics named sum/... add over micro-batches, max/... and min/... combine by maximum and minimum.
    """
    mask, advantages, fixed = response_mask(batch), batch.advantages, jax.lax.stop_gradient
    assert advantages is not None
    assert batch.sampler is not None

    def inside(x: Array) -> Array:
        return jnp.where(mask, x, 0)

    by_sampler = crpo.old_logprobs == "sampler"
    old = inside(old_logprobs(logprobs, batch, crpo))
    logprobs, entropy, sampler = inside(logprobs), inside(entropy), inside(batch.sampler)
    trainer = fixed(logprobs) if by_sampler else old
    log_ratio = logprobs - old
    if crpo.ratio == "sequence":
        log_ratio = response_log_ratio(log_ratio, mask)
    reference = None if batch.reference is None else inside(batch.reference)
    arrays = LossArrays(logprobs, old, sampler, reference, entropy, advantages, mask, batch.weights)
    objective, was_clipped = policy_objective(arrays, log_ratio, crpo)
    importance, metrics = importance_weights(trainer - sampler, mask, crpo)
    if by_sampler and crpo.importance != "off":
        importance /= bounded_exp(fixed(log_ratio))
    each = mask * batch.weights[:, None]
    policy, spread = jnp.sum(each * importance * objective), jnp.sum(each * entropy)
    loss = -policy - (crpo.entropy_coef * spread if crpo.entropy_coef else 0.0)
    if reference is not None:
        kl = inside(estimate_kl(logprobs, reference, crpo.kl_estimator))
        loss += kl_coef * jnp.sum(each * kl) if crpo.kl_in == "loss" else 0.0
        metrics |= {"sum/kl": jnp.sum(fixed(kl)), "max/kl": jnp.max(fixed(kl), initial=0)}
    above = log_ratio > 0
    # With log-probs of the sampler alone, later optimizer steps would count what has been learned as a difference.
    compared = mask & batch.on_policy[:, None] if by_sampler and batch.on_policy is not None else mask
    difference = jnp.where(compared, jnp.abs(trainer - sampler), 0)
    return loss, metrics | {
        "sum/loss": fixed(loss),
        "sum/policy": fixed(-policy),
        "sum/entropy": jnp.sum(fixed(entropy)),
        "sum/clipped_high": jnp.sum(was_clipped & mask & above, dtype=jnp.float32),
        "sum/clipped_low": jnp.sum(was_clipped & mask & ~above, dtype=jnp.float32),
        "sum/tokens": jnp.sum(mask, dtype=jnp.float32),
        "sum/sampler_difference": jnp.sum(difference),
        "sum/sampler_tokens": jnp.sum(compared, dtype=jnp.float32),
        "max/sampler_difference": jnp.max(difference, initial=0),
        "max/log_ratio": jnp.max(fixed(log_ratio), initial=0),
        "min/log_ratio": jnp.min(fixed(log_ratio), initial=0),
    }


def adapted_kl_coef(
    kl_coef: Float[Array, ""], kl: Float[Array, ""], tokens: Float[Array, ""], target: float, gain: float
) -> Float[Array, ""]:
    """The KL coefficient after a mini-batch whose KL sums to `kl` over its tokens:
    beta (1 + gain * clip(mean / target - 1, -0.2, 0.2)), the proportional controller of arXiv 1909.08593, section 2.2.
    """
    error = jnp.clip(kl / jnp.maximum(tokens, 1) / target - 1, -0.2, 0.2)
    return jnp.where(tokens > 0, kl_coef * (1 + gain * error), kl_coef)


def supervised_loss(
    logprobs: Float[Array, "b t"], batch: Batch
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of the responses, aggregated like `crpo_loss`."""
    mask = response_mask(batch)
    nll = jnp.where(mask, -logprobs, 0)
    loss = jnp.sum(nll * batch.weights[:, None])
    fixed = jax.lax.stop_gradient
    tokens = jnp.sum(mask, dtype=jnp.float32)
    return loss, {"sum/loss": fixed(loss), "sum/nll": jnp.sum(fixed(nll)), "sum/tokens": tokens}


def combine_metrics(old: dict[str, Array], new: dict[str, Array]) -> dict[str, Array]:
    """Metrics of two micro-batches as one, by the prefix of their names."""
    how = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}
    return {name: how[name.split("/")[0]](old[name], new[name]) for name in old}
