"""Questions put to the policy: responses sampled and, as they end, handed to the scorer, which works while others are decoded."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from crpo_jax.data.question import Question
from crpo_jax.model.decode import Weights
from crpo_jax.reward.scoring import Batch, Scorer
from crpo_jax.rollout.engine import Engine, Response, Tally
from crpo_jax.run.setup import Text


class Responses(NamedTuple):
    """What a policy answered, question by question; `scoring` is what `Scorer.collect` waits for."""

    questions: list[Question]
    responses: list[Response]
    texts: list[str]
    scoring: Batch


def respond(
    engine: Engine,
    weights: Weights,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    scorer: Scorer,
    text: Text,
    key: jax.Array,
    *,
    ids: Sequence[int] | None = None,
    group: int = 1,
    progress: Callable[[Tally], None] | None = None,
) -> Responses:
    """`group` responses to each question; `ids` and `group` are `Engine.generate`'s."""
    asked = [question for question in questions for _ in range(group)]
    texts, scoring = [""] * len(asked), scorer.expect(asked)

    def score(ended: list[Response]) -> None:
        rows = [response.prompt * group + response.sample for response in ended]
        for row, response in zip(rows, ended, strict=True):
            texts[row] = text.of(response)
        scorer.add(scoring, rows, [texts[row] for row in rows], [text.body(response) for response in ended])

    groups = engine.generate(weights, prompts, key=key, group=group, ids=ids, finished=score, progress=progress)
    return Responses(asked, [response for responses in groups for response in responses], texts, scoring)
