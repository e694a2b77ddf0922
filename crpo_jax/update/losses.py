"""The equations of CRPO on plain arrays: no Flax, no mesh.

Per-token arrays are [b, t]. A mask is 1 where a token belongs to a response that carries gradient; `weights` [b] are the
aggregation's: the loss is sum over b, t of weights * mask * per-token loss, so that micro-batches and devices simply add.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Aggregation = Literal["token_mean", "sequence_mean"]

ADVANTAGE_EPS = 1e-6
LOG_RATIO_BOUND = 20.0  # beyond it exp would overflow float32 into inf - inf
KL_BOUND = 10.0  # ours: k3 has a tail: one token of log-ratio 10 would outweigh the whole mini-batch's policy gradient


def group_advantages(rewards: Float[np.ndarray, "p g"], counted: Bool[np.ndarray, "p g"]) -> Float[np.ndarray, "p g"]:
    """(r - mean) / (std + 1e-6) within each group (equation 3), std with ddof = 1, over the responses that count.

    A response that does not count has advantage 0; so has every response of a group whose rewards are all equal.
    Two passes in float64, on the host: a handful of numbers.
    """
    rewards, out = np.asarray(rewards, np.float64), np.zeros(np.shape(rewards))
    for group, here, advantages in zip(rewards, counted, out, strict=True):
        values = group[here]
        if len(values) > 1 and np.ptp(values) > 0:
            advantages[here] = (values - values.mean()) / (values.std(ddof=1) + ADVANTAGE_EPS)
    return out.astype(np.float32)


def row_weights(lengths: Int[np.ndarray, " b"], counted: Bool[np.ndarray, " b"], aggregation: Aggregation) -> Float[np.ndarray, " b"]:
    """What each token of a response weighs in the mini-batch's loss; the denominators are of the whole mini-batch.

    token_mean: 1 / all response tokens. sequence_mean: 1 / (the response's tokens * responses), equation 1 read literally.
    """
    lengths = np.where(counted, lengths, 0).astype(np.float64)
    if aggregation == "token_mean":
        weights = np.full(len(lengths), 1 / max(lengths.sum(), 1))
    else:
        weights = 1 / (np.maximum(lengths, 1) * max(counted.sum(), 1))
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
    """PPO's min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), and where the clipped side was the smaller."""
    ratio = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    free, clipped = ratio * advantages[:, None], jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages[:, None]
    return jnp.minimum(free, clipped), clipped < free


def crpo_loss(
    logprobs: Float[Array, "b t"],
    entropy: Float[Array, "b t"],
    old: Float[Array, "b t"],
    reference: Float[Array, "b t"],
    sampler: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    advantages: Float[Array, " b"],
    weights: Float[Array, " b"],
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float | Float[Array, ""],
    entropy_coef: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The negated objective (equation 1 with PPO-clip) of some rows of a mini-batch, and its metrics.

    `old` are the trainer's log-probs before the rollout's first optimizer step, `sampler` those the tokens were drawn with.

    Metrics named sum/... add over micro-batches, max/... and min/... combine by maximum and minimum.
    """
    log_ratio = jnp.where(mask, logprobs - old, 0)
    objective, was_clipped = clipped_objective(log_ratio, advantages, clip_low, clip_high)
    kl = jnp.where(mask, k3(jnp.where(mask, logprobs, 0), jnp.where(mask, reference, 0)), 0)
    entropy = jnp.where(mask, entropy, 0)
    each = mask * weights[:, None]
    policy, divergence, spread = jnp.sum(each * objective), jnp.sum(each * kl), jnp.sum(each * entropy)
    loss = -policy + kl_coef * divergence - entropy_coef * spread
    fixed = jax.lax.stop_gradient
    difference = jnp.where(mask, jnp.abs(old - sampler), 0)
    return loss, {
        "sum/loss": fixed(loss),
        "sum/policy": fixed(-policy),
        "sum/kl": jnp.sum(fixed(kl)),
        "sum/entropy": jnp.sum(fixed(entropy)),
        "sum/clipped": jnp.sum(fixed(was_clipped & mask), dtype=jnp.float32),
        "sum/tokens": jnp.sum(mask, dtype=jnp.float32),
        "sum/sampler_difference": jnp.sum(difference),
        "max/sampler_difference": jnp.max(difference, initial=0),
        "max/kl": jnp.max(fixed(kl), initial=0),
        "max/log_ratio": jnp.max(fixed(log_ratio), initial=0),
        "min/log_ratio": jnp.min(fixed(log_ratio), initial=0),
    }


def supervised_loss(
    logprobs: Float[Array, "b t"], mask: Bool[Array, "b t"], weights: Float[Array, " b"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of the responses, aggregated like `crpo_loss`."""
    nll = jnp.where(mask, -logprobs, 0)
    loss = jnp.sum(nll * weights[:, None])
    fixed = jax.lax.stop_gradient
    return loss, {"sum/loss": fixed(loss), "sum/nll": jnp.sum(fixed(nll)), "sum/tokens": jnp.sum(mask, dtype=jnp.float32)}


def combined(old: dict[str, Array], new: dict[str, Array]) -> dict[str, Array]:
    """Metrics of two micro-batches as one, by the prefix of their names."""
    how = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}
    return {name: how[name.split("/")[0]](old[name], new[name]) for name in old}
