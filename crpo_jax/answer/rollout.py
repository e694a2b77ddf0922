"""Questions put to the policy: responses sampled and, as they end, handed to the scorer, which works while others are decoded."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from crpo_jax.config import Crpo
from crpo_jax.data.question import Question
from crpo_jax.model.decode import Weights
from crpo_jax.parallel.processes import gather_from_processes, process_share
from crpo_jax.reward.rules import Score
from crpo_jax.reward.scorer import Scored, Scorer
from crpo_jax.rollout.engine import Engine, Response, RolloutProgress
from crpo_jax.runtime.setup import Text
from crpo_jax.runtime.signals import StopRequested, StopSignal
from crpo_jax.update.losses import chosen_groups


class Responses(NamedTuple):
    """What a policy answered, question by question."""

    questions: list[Question]
    responses: list[Response]
    scores: Callable[
        [], tuple[list[str], list[Scored]]
    ]  # texts and scores of all, once the last is scored; every process must ask


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
    progress: Callable[[RolloutProgress], None] | None = None,
) -> Responses:
    """`group` responses to each question; `ids` and `group` are `Engine.generate`'s.

    Each process decodes and scores the responses to its share of the questions, and then all hold all: what follows from the
    scores is the same in every process, and the first one can write every response.
    """
    asked = [question for question in questions for _ in range(group)]
    prompts_here = process_share(len(questions))
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
        both = gather_from_processes(list(zip(texts, scorer.collect(scoring), strict=True)))
        return [said for said, _ in both], [scored for _, scored in both]

    groups = engine.generate(weights, prompts, key=key, group=group, ids=ids, on_finished=score, on_progress=progress)
    return Responses(asked, [response for responses in groups for response in responses], scores)


class Drawn(NamedTuple):
    """What a step learns from: `b` responses, a group of `g` to each of `p` prompts."""

    questions: list[Question]  # of each response
    responses: list[Response]
    texts: list[str]
    scored: list[Scored]
    rewards: Float[np.ndarray, "p g"]
    valid: Bool[np.ndarray, "p g"]  # whether it could be scored
    trained: Int[np.ndarray, " t"]  # the responses that go into mini-batches, in order
    seconds: dict[str, float]


def draw(
    engine: Engine,
    weights: Weights,
    turn_of: Callable[[int], list[Question]],
    prompt_of: Mapping[str, Sequence[int]],
    scorer: Scorer,
    text: Text,
    key: jax.Array,
    crpo: Crpo,
    *,
    stop: StopSignal,
    progress: Callable[[RolloutProgress], None],
) -> Drawn | None:
    """The responses of a step with their rewards; None where the run was asked to stop before they were drawn.

    `turn_of(0)` are the step's questions. While fewer than crpo.prompts_per_step groups differ in reward, further turns follow,
    crpo.dynamic_sampling of them at most (DAPO, arXiv 2503.14476).
    """

    def looked(tally: RolloutProgress) -> None:
        progress(tally)
        if stop.requested:
            raise StopRequested

    questions, responses, texts, scored = list[Question](), list[Response](), list[str](), list[Scored]()
    seconds, turn = {"rollout": 0.0, "score": 0.0}, 0
    while True:
        began, asked = time.perf_counter(), turn_of(turn)
        prompts, ids = [prompt_of[question.id] for question in asked], range(turn * len(asked), (turn + 1) * len(asked))
        try:
            new = respond(
                engine, weights, asked, prompts, scorer, text, key, ids=ids, group=crpo.group_size, progress=looked
            )
        except StopRequested:
            return None
        sampled = time.perf_counter()

        said, marks = new.scores()  # most were scored while the longest responses were decoded
        questions, responses, texts, scored = (
            questions + new.questions,
            responses + new.responses,
            texts + said,
            scored + marks,
        )
        valid = np.array([isinstance(one, Score) for one in scored]).reshape(-1, crpo.group_size)
        rewards = np.array([one.total if isinstance(one, Score) else 0.0 for one in scored]).reshape(
            -1, crpo.group_size
        )
        chosen, varied = chosen_groups(rewards, valid, crpo.prompts_per_step)
        seconds["rollout"] += sampled - began
        seconds["score"] += time.perf_counter() - sampled
        if varied == crpo.prompts_per_step or turn == crpo.dynamic_sampling:
            break
        turn += 1
    trained = (chosen[:, None] * crpo.group_size + np.arange(crpo.group_size)).reshape(-1)
    return Drawn(questions, responses, texts, scored, rewards, valid, trained, seconds)
