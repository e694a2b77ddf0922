"""Advantages of responses from their rewards, and which groups are trained on. NumPy in float64, on the host."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]

ADVANTAGE_EPS = 1e-6


def group_advantages(
    rewards: Float[np.ndarray, "p g"],
    counted: Bool[np.ndarray, "p g"],
    advantage: Advantage = "grpo",
    lengths: Int[np.ndarray, "p g"] | None = None,
) -> Float[np.ndarray, "p g"]:
    """What every response's reward says beside a baseline, over the responses that count; the others have 0.

    grpo: (r - mean) / (std + 1e-6) of the group, std with ddof = 1 (equation 3); 0 where all its rewards are equal.
    dr_grpo: r - mean of the group (arXiv 2503.20783, section 3.2). rloo: r - mean of the group's others (arXiv
    2402.14740). reinforce_plus_plus: r, normalized over all tokens of the batch (arXiv 2501.03262), of which a response
    has `lengths`; with _baseline: r - mean of the group, normalized likewise.
    """
    rewards, out = np.asarray(rewards, np.float64), np.zeros(np.shape(rewards))
    for group, counts, advantages in zip(rewards, counted, out, strict=True):
        values = group[counts]
        if advantage == "reinforce_plus_plus":
            advantages[counts] = values
        elif len(values) > 1 and np.ptp(values) > 0:
            centred = values - values.mean()
            scale = {"grpo": 1 / (values.std(ddof=1) + ADVANTAGE_EPS), "rloo": len(values) / (len(values) - 1)}
            advantages[counts] = centred * scale.get(advantage, 1.0)
    if advantage.startswith("reinforce_plus_plus"):
        assert lengths is not None
        out = np.where(counted, normalized(out, np.where(counted, lengths, 0)), 0)
    return out.astype(np.float32)


def normalized(values: Float[np.ndarray, "p g"], weights: Int[np.ndarray, "p g"]) -> Float[np.ndarray, "p g"]:
    """The values with weighted mean 0 and variance 1; 0 where all that have a weight are equal."""
    total = weights.sum()
    if not total or np.ptp(values[weights > 0]) == 0:
        return np.zeros(values.shape)
    centred = values - (weights * values).sum() / total
    return centred / (np.sqrt((weights * centred**2).sum() / total) + ADVANTAGE_EPS)


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
