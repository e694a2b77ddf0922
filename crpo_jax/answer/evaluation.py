"""Held-out questions answered by the policy and scored by the run's own reward."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from crpo_jax.answer.rollout import respond
from crpo_jax.data.prompts import Fitting
from crpo_jax.data.question import Question
from crpo_jax.model.decode import Weights
from crpo_jax.reward.rules import Score
from crpo_jax.reward.scorer import Scored, Scorer
from crpo_jax.rollout.engine import Engine, Response, RolloutProgress
from crpo_jax.runtime.setup import Text


class Answered(NamedTuple):
    """A question, the policy's response and its score."""

    question: Question
    response: str
    score: Scored


def answer(
    engine: Engine,
    weights: Weights,
    asked: Fitting,
    scorer: Scorer,
    text: Text,
    key: jax.Array,
    progress: Callable[[RolloutProgress], None] | None = None,
) -> tuple[list[Answered], dict[str, float]]:
    """One response per question, and the means of its measures.

    The same key draws the same random numbers before and after training, so that two evaluations differ by the policy alone.
    """
    found = respond(engine, weights, asked.questions, asked.prompts, scorer, text, key, progress=progress)
    texts, scored = found.scores()
    answered = [Answered(*parts) for parts in zip(found.questions, texts, scored, strict=True)]
    return answered, {**reward_means(scored), **response_means(found.responses)}


def reward_means(scored: Sequence[Scored]) -> dict[str, float]:
    """Means over the responses that could be scored, and the share that could not."""
    good = [one for one in scored if isinstance(one, Score)]
    names = ("accuracy", "format", "cross_reference", "consistency")
    means = {f"reward/{name}": mean([getattr(one, name) for one in good]) for name in names}
    summed = (
        sorted({name for one in good for name in one.components})
        if any(len(one.components) > 1 for one in good)
        else []
    )
    for name in summed:  # a design that sums several rewards: each on its own, before its weight
        means[f"reward/component/{name}"] = mean(
            [value for one in good if (value := one.components.get(name)) is not None]
        )
    return {
        "reward/mean": mean([one.total for one in good]),
        **means,
        "reward/failed": 1 - len(good) / max(len(scored), 1),
    }


def response_means(responses: Sequence[Response]) -> dict[str, float]:
    return {
        "response/length": mean([len(response.tokens) for response in responses]),
        "response/truncated": mean([not response.stopped for response in responses]),
    }


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def standard_error(share: float, count: int) -> float:
    """Of a share measured on `count` independent responses."""
    return math.sqrt(max(share * (1 - share), 0) / max(count, 1))
