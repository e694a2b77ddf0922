"""Questions put to the policy: responses sampled and, as they end, handed to the scorer, which works while others are decoded."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from crpo_jax.data.question import Question
from crpo_jax.model.decode import Weights
from crpo_jax.parallel.processes import gathered, share
from crpo_jax.reward.scoring import Scored, Scorer
from crpo_jax.rollout.engine import Engine, Response, Tally
from crpo_jax.run.setup import Text


class Responses(NamedTuple):
    """What a policy answered, question by question."""

    questions: list[Question]
    responses: list[Response]
    scores: Callable[[], tuple[list[str], list[Scored]]]  # texts and scores of all, once the last is scored; every process must ask


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
    """`group` responses to each question; `ids` and `group` are `Engine.generate`'s.

    Each process decodes and scores the responses to its share of the questions, and then all hold all: what follows from the
    scores is the same in every process, and the first one can write every response.
    """
    asked = [question for question in questions for _ in range(group)]
    prompts_here = share(len(questions))
    first, last = prompts_here.start * group, prompts_here.stop * group
    texts, scoring = [""] * (last - first), scorer.expect(asked[first:last])

    def score(ended: list[Response]) -> None:
        here = [response for response in ended if response.prompt in prompts_here]
        rows = [response.prompt * group + response.sample - first for response in here]
        for row, response in zip(rows, here, strict=True):
            texts[row] = text.of(response)
        if rows:
            scorer.add(scoring, rows, [texts[row] for row in rows], [text.body(response) for response in here])

    def scores() -> tuple[list[str], list[Scored]]:
        both = gathered(list(zip(texts, scorer.collect(scoring), strict=True)))
        return [said for said, _ in both], [scored for _, scored in both]

    groups = engine.generate(weights, prompts, key=key, group=group, ids=ids, finished=score, progress=progress)
    return Responses(asked, [response for responses in groups for response in responses], scores)
