"""A step's rollout: means over what could be scored alone, and the rows of samples.jsonl."""

import json
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from response_table import GOOD, GOUT

from crpo_jax.answer.evaluation import reward_means
from crpo_jax.answer.rollout import ScoredRollout, describe_failures, rollout_metrics, sample_rows
from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.reward.functions import Failure
from crpo_jax.reward.rules import score_response
from crpo_jax.reward.scorer import Scored, Scorer
from crpo_jax.rollout.engine import Response
from crpo_jax.update.advantages import choose_groups, group_advantages

score = import_module("crpo_jax.score")

RIGHT, WRONG = score_response(GOUT, GOOD, Reward()), score_response(GOUT, "no", Reward())
FAILED = Failure("mine:f: expected a finite reward, got nan")


def rollout(
    scores: list[Scored], group: int, texts: list[str] | None = None, question: Question = GOUT
) -> ScoredRollout:
    count = len(scores)
    responses = [Response(0, n % group, np.arange(4), np.zeros(4), True) for n in range(count)]
    totals = [math.nan if isinstance(scored, Failure) else scored.total for scored in scores]
    valid = np.array([not isinstance(scored, Failure) for scored in scores]).reshape(-1, group)
    rewards, texts = np.array(totals).reshape(-1, group), texts or [GOOD] * count
    prompts = {question.id: "<|im_start|>user"}
    return ScoredRollout([question] * count, responses, prompts, texts, scores, rewards, valid, np.arange(count), {})


def test_a_response_that_could_not_be_scored_is_in_no_mean():
    """It counted as a reward of 0: the spread of a step of equal rewards was 5.7, and a group of them had variance."""
    metrics = rollout_metrics(rollout([RIGHT, FAILED, RIGHT, RIGHT, RIGHT, FAILED], 3))
    assert metrics["reward/std"] == 0
    assert metrics["reward/zero_variance_groups"] == 1
    scores = [RIGHT, FAILED, WRONG, WRONG, WRONG, FAILED]
    metrics = rollout_metrics(rollout(scores, 2))
    assert metrics["reward/std"] == pytest.approx(np.std([RIGHT.total, WRONG.total, WRONG.total, WRONG.total]))
    assert metrics["reward/zero_variance_groups"] == 1, "of one group: the others have one scored response each"
    means = reward_means(scores)
    assert means["reward/mean"] == pytest.approx((RIGHT.total + 3 * WRONG.total) / 4)
    assert means["reward/accuracy"] == 0.25
    assert means["reward/failed"] == pytest.approx(2 / 6)


def test_means_of_nothing_are_not_zero():
    metrics = rollout_metrics(rollout([FAILED] * 4, 2)) | reward_means([FAILED] * 4)
    assert metrics.pop("reward/failed") == 1
    assert all(math.isnan(value) for value in metrics.values()), metrics
    cited = rollout_metrics(rollout([WRONG] * 4, 2))
    assert math.isnan(cited["reward/cited_terms"]), "no conclusion was read for citations"


def test_a_failed_response_neither_has_an_advantage_nor_makes_a_group_differ():
    mixed = rollout([RIGHT, RIGHT, FAILED, RIGHT, WRONG, FAILED], 3)
    chosen, varied = choose_groups(mixed.rewards, mixed.valid, 1)
    assert (chosen.tolist(), varied) == ([1], 1)
    advantages = group_advantages(mixed.rewards, mixed.valid)
    assert advantages[0].tolist() == [0, 0, 0]
    assert advantages[1].tolist() == pytest.approx([0.7071, -0.7071, 0], abs=1e-4)


def test_failures_are_counted_and_the_first_is_named():
    assert describe_failures([GOUT] * 2, [RIGHT, WRONG]) == ""
    assert describe_failures([GOUT] * 3, [RIGHT, FAILED, FAILED]) == (
        "2 of 3 responses could not be scored and carry no gradient; the first, of question gout: "
        "mine:f: expected a finite reward, got nan"
    )


def test_samples_hold_all_that_scoring_them_again_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The score command refused a run's own samples: they had no question."""
    question = Question(**{**vars(GOUT), "columns": {"subject": "joints", "total": "a column of the question"}})
    settings = Reward(design="crpo+length*0.5", workers=0)
    with Scorer(settings, functions={"length": lambda completions, **_: list(map(len, completions))}) as scorer:
        scores = [*scorer.score([question] * 2, [GOOD, "no"]), FAILED]
    rows = sample_rows(7, rollout(scores, 3, [GOOD, "no", "odd"], question), np.zeros(3))
    first = rows[0]
    assert (first["step"], first["id"], first["sample"]) == (7, "gout", 0)
    assert (first["question"], first["options"], first["answer"]) == (GOUT.question, dict(GOUT.options), "C")
    assert first["prompt"] == "<|im_start|>user"
    assert first["subject"] == "joints"
    assert first["components"] == {"crpo": 12.0, "length": len(GOOD)}
    assert first["total"] == 12 + 0.5 * len(GOOD), "what the run says comes before a column of the same name"
    assert rows[2]["error"] == FAILED.error

    path, out = tmp_path / "samples.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert score.main(["--responses", str(path), "--out", str(out), "reward.workers=0"]) == 0
    again = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["total"] for row in again] == [12.0, 0.5, 0.5]
    record = score.parse_line(json.dumps(first), "line")
    assert score.read_response(record, None).question.columns == {"subject": "joints"}, "as in the run"
    assert capsys.readouterr().err.count("\n") == 1
