"""Samples responses and scores those that have ended while longer ones are still being decoded."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from crpo_jax.answer.records import question_to_row
from crpo_jax.config import Crpo
from crpo_jax.data.question import Question
from crpo_jax.model.decode import SamplerWeights
from crpo_jax.parallel.processes import gather_from_processes, process_share
from crpo_jax.reward.functions import Failure
from crpo_jax.reward.overlong import punish_overlong
from crpo_jax.reward.rules import Score
from crpo_jax.reward.scorer import Scored, Scorer, score_row
from crpo_jax.rollout.engine import Response, RolloutProgress
from crpo_jax.runtime.inputs import TrainingQuestions
from crpo_jax.runtime.run import TrainingRun
from crpo_jax.runtime.runtime import Runtime
from crpo_jax.runtime.signals import StopRequested
from crpo_jax.update.advantages import choose_groups, group_advantages
from crpo_jax.update.batches import Row


class Responses(NamedTuple):
    """What a policy answered, question by question."""

    questions: list[Question]
    responses: list[Response]
    scores: Callable[[], tuple[list[str], list[Scored]]]
    """Waits for the texts and scores of all responses; every process must call it."""


def respond(
    runtime: Runtime,
    weights: SamplerWeights,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    scorer: Scorer,
    key: jax.Array,
    *,
    ids: Sequence[int] | None = None,
    group: int = 1,
    progress: Callable[[RolloutProgress], None] | None = None,
) -> Responses:
    """`group` responses to each question; `ids` and `group` are `Engine.generate`'s.

    Each process decodes and scores the responses to its share of the questions, and the results are then shared with
    every process: what follows from the scores is the same in every process, and the first one can write every
    response.
    """
    repeated = [question for question in questions for _ in range(group)]
    local = process_share(len(questions))
    first, last = local.start * group, local.stop * group
    texts, pending = [""] * (last - first), scorer.expect(repeated[first:last])

    def score(ended: list[Response]) -> None:
        mine = [response for response in ended if response.prompt in local]
        rows = [response.prompt * group + response.sample - first for response in mine]
        for row, response in zip(rows, mine, strict=True):
            texts[row] = runtime.vocabulary.decode(response)
        if rows:
            ids = [runtime.vocabulary.content_ids(response) for response in mine]
            scorer.add(pending, rows, [texts[row] for row in rows], ids)

    def scores() -> tuple[list[str], list[Scored]]:
        pairs = gather_from_processes(list(zip(texts, scorer.collect(pending), strict=True)))
        return [text for text, _ in pairs], [score for _, score in pairs]

    groups = runtime.sampler.generate(
        weights, prompts, key=key, group=group, ids=ids, on_finished=score, on_progress=progress
    )
    return Responses(repeated, [response for responses in groups for response in responses], scores)


class ScoredRollout(NamedTuple):
    """What a step learns from: b responses, prompt-major, a group of g to each of p prompts."""

    questions: list[Question]  # of each response
    responses: list[Response]
    prompts: dict[str, str]  # as the model read them, by the question's id
    texts: list[str]
    scores: list[Scored]
    rewards: Float[np.ndarray, "p g"]  # nan where a response could not be scored: no mean may count it
    valid: Bool[np.ndarray, "p g"]  # whether it could be
    trained: Int[np.ndarray, " t"]  # the responses that go into mini-batches, in order
    seconds: dict[str, float]

    def rows(self, questions: TrainingQuestions) -> list[Row]:
        """The trained responses after their prompts, as token ids."""
        return [Row(questions.prompt_of[self.questions[i].id], self.responses[i].tokens.tolist()) for i in self.trained]

    def trained_logprobs(self) -> list[np.ndarray]:
        """The sampler's log-probs of the trained responses, one array each."""
        return [self.responses[i].logprobs for i in self.trained]

    def advantages(self, crpo: Crpo, penalties: Float[np.ndarray, " t"] | float = 0.0) -> Float[np.ndarray, " t"]:
        """Of the trained responses, whose rewards are less by their `penalties`."""
        shape = (-1, self.rewards.shape[1])
        rewards = (self.rewards.reshape(-1)[self.trained] - penalties).reshape(shape)
        lengths = np.array([len(self.responses[i].tokens) for i in self.trained]).reshape(shape)
        valid = self.valid.reshape(-1)[self.trained].reshape(shape)
        return group_advantages(rewards, valid, crpo.advantage, lengths).reshape(-1)

    def counted(self, *, truncated: bool) -> Bool[np.ndarray, " t"]:
        """Which of the trained responses carry gradient: those that were scored, and cut ones only where
        `truncated`."""
        stopped = np.array([response.stopped for response in self.responses])
        return (self.valid.reshape(-1) & (stopped | truncated))[self.trained]


def sample_rollout(
    runtime: Runtime,
    weights: SamplerWeights,
    questions: TrainingQuestions,
    scorer: Scorer,
    run: TrainingRun,
    step: int,
) -> ScoredRollout | None:
    """The responses of a step with their rewards; None where the run was asked to stop before they were complete.

    While fewer than crpo.prompts_per_step groups differ in reward, further questions follow, crpo.dynamic_sampling
    batches of them at most (DAPO, arXiv 2503.14476).
    """
    settings, crpo = runtime.settings, runtime.settings.crpo
    key, show = jax.random.fold_in(runtime.key, step), run.show_rollout(step)

    def progress(tally: RolloutProgress) -> None:
        show(tally)
        if run.stopping:
            raise StopRequested

    repeated, responses, texts, scores = list[Question](), list[Response](), list[str](), list[Scored]()
    seconds = {"rollout": 0.0, "score": 0.0}
    turn = 0
    while True:
        began, batch = time.perf_counter(), questions.batch(step, turn, crpo.dynamic_sampling)
        prompts, ids = (
            [questions.prompt_of[question.id] for question in batch],
            range(turn * len(batch), (turn + 1) * len(batch)),
        )
        try:
            new = respond(
                runtime, weights, batch, prompts, scorer, key, ids=ids, group=crpo.group_size, progress=progress
            )
        except StopRequested:
            return None
        sampled = time.perf_counter()
        new_texts, new_scores = new.scores()  # most were scored while the longest responses were decoded
        new_scores = [
            punish_overlong(score, len(response.tokens), settings.rollout.max_new_tokens, settings.reward)
            for score, response in zip(new_scores, new.responses, strict=True)
        ]
        repeated, responses = repeated + new.questions, responses + new.responses
        texts, scores = texts + new_texts, scores + new_scores
        valid = np.array([isinstance(score, Score) for score in scores]).reshape(-1, crpo.group_size)
        totals = [score.total if isinstance(score, Score) else math.nan for score in scores]
        rewards = np.array(totals).reshape(-1, crpo.group_size)
        groups, varied = choose_groups(rewards, valid, crpo.prompts_per_step)
        seconds["rollout"] += sampled - began
        seconds["score"] += time.perf_counter() - sampled
        if varied == crpo.prompts_per_step or turn == crpo.dynamic_sampling:
            break
        turn += 1
    if line := describe_failures(repeated, scores):
        run.progress.write(f"step {step}: {line}")
    trained = (groups[:, None] * crpo.group_size + np.arange(crpo.group_size)).reshape(-1)
    decode, distinct = runtime.vocabulary.tokenizer.decode, {question.id for question in repeated}
    prompts = {id_: str(decode(questions.prompt_of[id_], skip_special_tokens=False)) for id_ in distinct}
    return ScoredRollout(repeated, responses, prompts, texts, scores, rewards, valid, trained, seconds)


def describe_failures(questions: Sequence[Question], scores: Sequence[Scored]) -> str:
    """How many responses could not be scored, and why the first could not; empty where all were."""
    failed = [
        (question, score) for question, score in zip(questions, scores, strict=True) if isinstance(score, Failure)
    ]
    if not failed:
        return ""
    question, failure = failed[0]
    assert isinstance(failure, Failure)
    count = f"{len(failed)} of {len(scores)} responses could not be scored and carry no gradient"
    return f"{count}; the first, of question {question.id}: {failure.error}"


def rollout_metrics(rollout: ScoredRollout) -> dict[str, float]:
    """What the rewards of a step's groups say besides their means: spread, and how much conclusions cite and repeat.

    All of it is of the responses that could be scored; a group with fewer than two of them has no variance to speak of.
    """
    scores = [score for score in rollout.scores if isinstance(score, Score)]
    reasons = [score.why.get("cross_reference") for score in scores]
    cited = [why for why in reasons if why and "cited" in why]
    groups = [rewards[valid] for rewards, valid in zip(rollout.rewards, rollout.valid, strict=True)]
    return {
        "reward/std": float(np.std(np.concatenate(groups))) if scores else math.nan,
        "reward/zero_variance_groups": mean([np.ptp(group) == 0 for group in groups if len(group) > 1]),
        "reward/cited_terms": mean([len(why["cited"]) for why in cited]),
        "reward/repeated_terms": mean([why["repeats"] for why in cited]),
    }


def mean(values: Sequence[float]) -> float:
    """The mean; nan, which the logs write as null, where there is nothing to average."""
    return float(np.mean(values)) if values else math.nan


def sample_rows(step: int, rollout: ScoredRollout, advantages: np.ndarray) -> list[dict[str, Any]]:
    """What samples.jsonl records of a step: every response to its question, with its reward or the error that left it
    out; `crpo_jax.score` reads it too.

    `trained` says whether it was in a mini-batch: all are, unless dynamic sampling replaced their group. `advantages`
    are of those that were; the others have 0.
    """
    trained, rows = dict(zip(rollout.trained.tolist(), advantages.tolist(), strict=True)), []
    responses = zip(rollout.questions, rollout.responses, rollout.texts, rollout.scores, strict=True)
    for place, (question, response, text, score) in enumerate(responses):
        row = response_row(question, response, text) | {"step": step, "sample": response.sample}
        row |= {"prompt": rollout.prompts[question.id]}
        row |= {"advantage": round(trained.get(place, 0.0), 5), "trained": place in trained}
        rows.append(row | score_row(score))
    return rows


def response_row(question: Question, response: Response, text: str) -> dict[str, Any]:
    """A response after its question, with the columns that a reward function may read."""
    row = question_to_row(question) | dict(question.columns)
    return row | {"response": text, "tokens": len(response.tokens), "stopped": response.stopped}
