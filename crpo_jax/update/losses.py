"""The equations of CRPO, and of the variants users compare it with, on plain arrays: no Flax, no mesh.

Per-token arrays are [b, t]. A mask is 1 where a token belongs to a response that carries gradient; `weights` [b] are
the aggregation's: the loss is sum over b, t of weights * mask * per-token loss, so that micro-batches and devices
simply add.

A variant is a choice of advantage, aggregation, ratio, clip range and of the groups trained on, within this one loss:
Dr. GRPO (arXiv 2503.20783) centres advantages only and divides by a constant length; GSPO (2507.18071) has one ratio
per response; DAPO (2503.14476) clips higher above than below and replaces groups whose rewards are all equal.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from crpo_jax.config import Crpo

Advantage = Literal["grpo", "dr_grpo"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]
Ratio = Literal["token", "sequence"]

ADVANTAGE_EPS = 1e-6
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
    reference: Float[Array, "b t"] | None = None  # log-probs of the frozen start
    old: Float[Array, "b t"] | None = None  # the trainer's log-probs before the rollout's first optimizer step
    on_policy: Bool[Array, " b"] | None = None  # rows of that step: the weights that compute have sampled them
    starts: Int[Array, " b"] | None = None  # place in its packed row that predicts a response's first token
    packed_tokens: Int[Array, "c s"] | None = None
    targets: Int[Array, "c s"] | None = None  # the response token that each place predicts; -1: none
    positions: Int[Array, "c s"] | None = None  # these three: `model.packed_attention.Packing`
    sequences: Int[Array, "c s"] | None = None
    prompts: Int[Array, "c s"] | None = None


def response_mask(batch: Batch) -> Bool[Array, "b t"]:
    """Tokens of responses that carry gradient. From lengths, never from token ids."""
    inside = jnp.arange(batch.tokens.shape[1])[None] < batch.lengths[:, None]
    return inside & (batch.weights > 0)[:, None]


def group_advantages(
    rewards: Float[np.ndarray, "p g"], counted: Bool[np.ndarray, "p g"], advantage: Advantage = "grpo"
) -> Float[np.ndarray, "p g"]:
    """(r - mean) / (std + 1e-6) within each group (equation 3), std with ddof = 1, over the responses that count;
    dr_grpo: r - mean.

    A response that does not count has advantage 0; so has every response of a group whose rewards are all equal.
    Two passes in float64, on the host: a handful of numbers.
    """
    rewards, out = np.asarray(rewards, np.float64), np.zeros(np.shape(rewards))
    for group, counts, advantages in zip(rewards, counted, out, strict=True):
        values = group[counts]
        if len(values) > 1 and np.ptp(values) > 0:
            spread = values.std(ddof=1) + ADVANTAGE_EPS if advantage == "grpo" else 1.0
            advantages[counts] = (values - values.mean()) / spread
    return out.astype(np.float32)


def choose_groups(
    rewards: Float[np.ndarray, "p g"], counted: Bool[np.ndarray, "p g"], wanted: int
) -> tuple[Int[np.ndarray, " chosen"], int]:
    """DAPO's dynamic sampling: the first `wanted` groups whose rewards differ, in order, and how many of them
    differ.

    If there are too few, groups with equal rewards fill the mini-batches: they carry the KL alone.
    """
    varied = np.array(
        [len(group[counts]) > 1 and np.ptp(group[counts]) > 0 for group, counts in zip(rewards, counted, strict=True)]
    )
    first = np.argsort(~varied, kind="stable")[:wanted]
    return np.sort(first), int(varied[first].sum())


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


def k3(logprobs: Float[Array, "b t"], reference: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Equation 2 per token: ratio - log ratio - 1 of reference over policy, never negative.

    The log-ratio is clamped before exp and the estimate bounded; beyond either it has no gradient.
    """
    log_ratio = jnp.clip(reference - logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return jnp.minimum(jnp.expm1(log_ratio) - log_ratio, KL_BOUND)


def clipped_objective(
    log_ratio: Float[Array, "b t"], advantages: Float[Array, " b"], clip_low: float, clip_high: float
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """PPO's min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), and where the clipped side was the smaller: above 1 for
    a good response, below it for a bad one."""
    ratio = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    free, clipped = ratio * advantages[:, None], jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages[:, None]
    return jnp.minimum(free, clipped), clipped < free


def response_log_ratio(log_ratio: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, "b t"]:
    """GSPO's log-ratio (equation 7): the mean over a response's tokens, on each of them."""
    mean = jnp.sum(jnp.where(mask, log_ratio, 0), axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1)
    return jnp.where(mask, mean[:, None], 0)


def crpo_loss(
    logprobs: Float[Array, "b t"],
    entropy: Float[Array, "b t"],
    batch: Batch,
    crpo: Crpo,
    kl_coef: float | Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The negated objective (equation 1 with PPO-clip) of some rows of a mini-batch, and its metrics.

    The ratio is exactly 1 in the rollout's first optimizer step, whose rows are `batch.on_policy`, and without
    `batch.old`, where there is no other step. With one ratio per response every token stands for its response: weights
    of sequence_mean make it GSPO's equation 5.

    Metrics named sum/... add over micro-batches, max/... and min/... combine by maximum and minimum.
    """
    mask, advantages = response_mask(batch), batch.advantages
    assert advantages is not None
    assert batch.sampler is not None
    assert batch.reference is not None
    old = jax.lax.stop_gradient(logprobs) if batch.old is None else batch.old
    if batch.old is not None and batch.on_policy is not None:  # two compiled programs round differently
        old = jnp.where(batch.on_policy[:, None], jax.lax.stop_gradient(logprobs), old)
    by_token = crpo.ratio == "token"
    clip_low, clip_high = (
        (crpo.clip_low, crpo.clip_high) if by_token else (crpo.sequence_clip_low, crpo.sequence_clip_high)
    )
    log_ratio = jnp.where(mask, logprobs - old, 0)
    if not by_token:
        log_ratio = response_log_ratio(log_ratio, mask)
    objective, was_clipped = clipped_objective(log_ratio, advantages, clip_low, clip_high)
    kl = jnp.where(mask, k3(jnp.where(mask, logprobs, 0), jnp.where(mask, batch.reference, 0)), 0)
    entropy = jnp.where(mask, entropy, 0)
    each = mask * batch.weights[:, None]
    policy, divergence, spread = jnp.sum(each * objective), jnp.sum(each * kl), jnp.sum(each * entropy)
    loss = -policy + kl_coef * divergence - (crpo.entropy_coef * spread if crpo.entropy_coef else 0.0)
    fixed = jax.lax.stop_gradient
    good = (advantages > 0)[:, None]
    difference = jnp.where(mask, jnp.abs(old - batch.sampler), 0)
    return loss, {
        "sum/loss": fixed(loss),
        "sum/policy": fixed(-policy),
        "sum/kl": jnp.sum(fixed(kl)),
        "sum/entropy": jnp.sum(fixed(entropy)),
        "sum/clipped_high": jnp.sum(fixed(was_clipped & mask & good), dtype=jnp.float32),
        "sum/clipped_low": jnp.sum(fixed(was_clipped & mask & ~good), dtype=jnp.float32),
        "sum/tokens": jnp.sum(mask, dtype=jnp.float32),
        "sum/sampler_difference": jnp.sum(difference),
        "max/sampler_difference": jnp.max(difference, initial=0),
        "max/kl": jnp.max(fixed(kl), initial=0),
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
