"""Held-out questions answered by the policy and scored, and the means of what was measured."""

from collections.abc import Sequence
from pathlib import Path

import jax

from crpo_jax.answer.rollout import Responses, mean, respond, response_row
from crpo_jax.data.prompts import Fitting
from crpo_jax.disk import make_folder
from crpo_jax.model.decode import SamplerWeights
from crpo_jax.reward.rules import Score
from crpo_jax.reward.scorer import Scored, Scorer, score_row
from crpo_jax.rollout.engine import Response
from crpo_jax.runtime.report import step_line
from crpo_jax.runtime.run import TrainingRun
from crpo_jax.store.files import replace_rows, writing

EVALUATION = 2**31 - 1
"""Stands for the step in the keys of held-out evaluations: all of them draw the same random numbers."""


def evaluate_held_out(
    run: TrainingRun, weights: SamplerWeights, questions: Fitting, scorer: Scorer, step: int
) -> dict[str, float]:
    """One response per held-out question, written to the run's report; the means of their measures, as eval/....

    The same key draws the same random numbers before and after training, so that two evaluations differ by the policy
    alone.
    """
    key, progress = jax.random.fold_in(run.runtime.key, EVALUATION), run.show_rollout(step)
    responses = respond(run.runtime, weights, questions.questions, questions.prompts, scorer, key, progress=progress)
    texts, scores = responses.scores()
    means = {**reward_means(scores), **response_means(responses.responses)}
    run.log.check_in_place()
    if run.runtime.writes:
        write_evaluation(run.workdir, step, responses, texts, scores)
    run.progress.write(f"step {step}/{run.total}  {len(texts)} held-out questions: {step_line(means)}")
    return {f"eval/{name.split('/')[1]}": value for name, value in means.items()}


def write_evaluation(
    workdir: Path, step: int, responses: Responses, texts: Sequence[str], scores: Sequence[Scored]
) -> None:
    """The held-out responses after `step` steps, in report/held_out_<step>.jsonl."""
    path = workdir / "report" / f"held_out_{step:06d}.jsonl"
    with writing(path):
        make_folder(path.parent)
    rows = zip(responses.questions, responses.responses, texts, scores, strict=True)
    replace_rows(path, (response_row(*row[:3]) | score_row(row[3]) for row in rows))


def reward_means(scores: Sequence[Scored]) -> dict[str, float]:
    """Means over the responses that could be scored, and the share that could not."""
    good = [score for score in scores if isinstance(score, Score)]
    means = {"reward/mean": mean([score.total for score in good])}
    for name in ("accuracy", "format", "cross_reference", "consistency"):
        values = [getattr(score, name) for score in good]
        means[f"reward/{name}"] = mean([value for value in values if value is not None])
    if any(len(score.components) > 1 for score in good):  # a sum of several rewards: each on its own, before its weight
        for name in sorted({name for score in good for name in score.components}):
            values = [value for score in good if (value := score.components.get(name)) is not None]
            means[f"reward/component/{name}"] = mean(values)
    return {**means, "reward/failed": 1 - len(good) / max(len(scores), 1)}


def response_means(responses: Sequence[Response]) -> dict[str, float]:
    return {
        "response/length": mean([len(response.tokens) for response in responses]),
        "response/truncated": mean([not response.stopped for response in responses]),
    }
