"""Responses on disk and their statistics: letters, votes, intervals, subjects, and the embedded world's truth."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crpo_jax import config
from crpo_jax.answer.attempts import majority_vote
from crpo_jax.answer.records import Answer, answer_to_row, read_answers
from crpo_jax.answer.statistics import estimate_count, estimate_share, extract_answer, summarize
from crpo_jax.answer.truth import count_exactly
from crpo_jax.data.question import Question
from crpo_jax.data.vignettes import FINDINGS, TeacherNoise, teacher_response, vignettes
from crpo_jax.errors import InputError
from crpo_jax.judge.table import format_summary

SETTINGS = config.load_config(None, ["reward.workers=0"], model=False)
QUESTION = Question("q", "Which?", {"A": "gout", "B": "flu"}, "A")


def answer(response: str, sample: int = 0, question: Question = QUESTION, **rest) -> Answer:
    return Answer(question, sample, response, **rest)


@pytest.mark.parametrize(
    ("response", "tagged", "anywhere"),
    [
        ("<dx>x</dx><conclusion>\\boxed{A}</conclusion>", "A", "A"),
        ("<think>x</think><answer>\\boxed{B}</answer>", "B", "B"),
        ("<think>\\boxed{B}</think><answer>so it is</answer>", None, "B"),
        ("The answer is \\boxed{A}.", None, "A"),
        ("<dx>x</dx><conclusion>\\boxed{A} \\boxed{A}</conclusion>", None, None),
        ("<dx>x</dx><conclusion>\\boxed{C}</conclusion>", None, None),
        ("", None, None),
    ],
)
def test_an_answer_is_the_only_box_where_its_format_wants_it(response, tagged, anywhere):
    assert extract_answer(answer(response), SETTINGS) == tagged
    assert (
        extract_answer(answer(response), config.load_config(None, ["evaluate.answer=anywhere"], model=False))
        == anywhere
    )


def test_the_vote_goes_to_the_most_frequent_and_of_equals_to_the_first():
    assert majority_vote(["B", "A", "A"]) == "A"
    assert majority_vote(["B", "A", "A", "B"]) == "B"
    assert majority_vote([None, None, "A"]) == "A", "what cannot be read has no vote"
    assert majority_vote([None, None]) is None


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_an_interval_holds_its_mean_and_narrows_with_independent_samples_only(groups):
    rows = [[float(value) for value in group] for group in groups]
    interval = estimate_share(rows)
    assert 0 <= interval["low"] <= interval["mean"] <= interval["high"] <= 1
    assert interval["low"] < interval["high"]
    copies = estimate_share([row * 2 for row in rows])
    assert copies["mean"] == pytest.approx(interval["mean"])
    if len({tuple(sorted(row)) for row in rows}) > 1:  # the same answers again are no news
        assert copies["high"] - copies["low"] == pytest.approx(interval["high"] - interval["low"], rel=0.5)


def test_intervals_against_hand_worked_values():
    """Wilson's for 8 of 10 is [0.490, 0.943]; ten questions answered the same four times are ten answers, not forty."""
    for samples in (1, 4):
        result = estimate_share([[1.0] * samples] * 8 + [[0.0] * samples] * 2)
        assert result["mean"] == 0.8
        assert result["low"] == pytest.approx(0.490, abs=0.02)
        assert result["high"] == pytest.approx(0.943, abs=0.02)
    assert estimate_count([[1.0], [3.0]]) == {
        "mean": 2.0,
        "low": pytest.approx(2 - 1.959964),
        "high": pytest.approx(2 + 1.959964),
    }


def test_rows_are_read_back_as_they_were_and_scored_by_the_score_command(tmp_path):
    from crpo_jax.score import main as score_main

    question = vignettes("test", 1)[0]
    whole = answer(teacher_response(question, 0), 2, question, token_ids=[5, 6], tokens=3, stopped=True)
    (tmp_path / "responses.jsonl").write_text(json.dumps(answer_to_row(whole)) + "\n", encoding="utf-8")
    assert read_answers(tmp_path / "responses.jsonl") == [whole]
    assert (
        score_main(
            ["--responses", str(tmp_path / "responses.jsonl"), "--out", str(tmp_path / "out.jsonl"), "reward.workers=0"]
        )
        == 0
    )


def test_responses_of_another_make_are_numbered_and_bad_ones_named(tmp_path):
    bare = {"id": "q", "question": "Which?", "options": {"A": "gout", "B": "flu"}, "answer": "A", "response": "x"}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(bare) + "\n" for _ in range(3)), encoding="utf-8")
    result = read_answers(tmp_path / "r.jsonl")
    assert [(answer.sample, answer.tokens) for answer in result] == [(0, None), (1, None), (2, None)]
    assert summarize(result, SETTINGS)[0]["length"]["unit"] == "words"
    (tmp_path / "r.jsonl").write_text(json.dumps(bare | {"response": None}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"r.jsonl:1: response: expected a text, got None"):
        read_answers(tmp_path / "r.jsonl")


def test_a_run_of_several_epochs_answers_a_question_again_and_no_other_file_may(tmp_path):
    """A report shows the response with number 0: of several it showed the last."""
    row = {"id": "q", "question": "?", "options": {"A": "a", "B": "b"}, "answer": "A", "response": "A", "tokens": 1}
    of_run = row | {"prompt": "?", "stopped": True, "advantage": 0.0, "trained": True}
    lines = [of_run | {"step": step, "sample": sample} for step in (0, 7) for sample in (0, 1)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [answer.sample for answer in read_answers(tmp_path / "samples.jsonl")] == [0, 1, 2, 3]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row | {"sample": 4}) + "\n" for _ in range(2)))
    with pytest.raises(InputError, match=r"r.jsonl:2: sample: expected another number for each response to q, got 4"):
        read_answers(tmp_path / "r.jsonl")


def test_a_summary_counts_what_is_there():
    """Three questions of two samples: both right, one right first, and one right second with an unreadable first."""
    questions = [
        Question(f"q{n}", "Which?", {"A": "gout", "B": "flu"}, "A", columns={"subject_name": "x" if n else "y"})
        for n in range(3)
    ]
    right, wrong = ("<dx>d</dx><conclusion>\\boxed{A}</conclusion>", "<dx>d</dx><conclusion>\\boxed{B}</conclusion>")
    responses = [(0, right), (0, right), (1, right), (1, wrong), (2, "?"), (2, right)]
    result, _ = summarize(
        [
            answer(text, index % 2, questions[n], tokens=4, stopped=index > 0)
            for index, (n, text) in enumerate(responses)
        ],
        SETTINGS,
    )
    assert (result["questions"], result["samples"], result["responses"], result["unscored"]) == (3, 2, 6, 0)
    assert result["accuracy"]["mean"] == pytest.approx(4 / 6)
    assert result["valid"]["mean"] == pytest.approx(5 / 6)
    assert result["majority"]["mean"] == 1.0, "ties go to the first, and only readable answers vote"
    assert result["length"] == {
        "unit": "tokens",
        "mean": 4.0,
        "median": 4.0,
        "p95": 4.0,
        "truncated": pytest.approx(1 / 6),
    }
    assert {name: subject["questions"] for name, subject in result["subjects"]["subject_name"].items()} == {
        "x": 2,
        "y": 1,
    }
    assert "exact" not in result


PERFECT = TeacherNoise(0, 0, 0, 1, 0, 0, 0, 0)


def test_a_perfect_teacher_says_nothing_but_the_truth():
    for question in vignettes("train", 200):
        result = count_exactly(question, teacher_response(question, 0, PERFECT))
        findings = len(question.columns["findings"])
        assert result["findings_invented"] == result["false_claims"] == 0
        assert result["case_findings"] == findings
        assert result["valid_rejections"] == 3
        assert result["true_claims"] == findings + 3
        assert result["conclusion_findings"] == 2


def test_each_untruth_shows_in_its_own_count():
    question = next(
        case
        for case in vignettes("train", 500)
        if case.columns["condition"] == "gout" and "pseudogout" in case.options.values()
    )
    findings = question.columns["findings"]
    hidden = next(finding for finding in FINDINGS["gout"] if finding not in findings)
    own = FINDINGS["pseudogout"][0]
    assert count_exactly(question, f"{hidden} can mean gout")["findings_invented"] == 1
    assert count_exactly(question, f"{hidden} can mean gout. {hidden} can mean gout")["true_claims"] == 1
    assert count_exactly(question, f"{findings[0]} can mean pseudogout") | {"x": 0} == dict.fromkeys(
        ("true_claims", "valid_rejections", "findings_invented", "conclusion_findings", "x"), 0
    ) | {"case_findings": 1, "false_claims": 1}
    assert count_exactly(question, f"A) pseudogout would need {own}")["valid_rejections"] == 1
    assert count_exactly(question, f"A) pseudogout would need {own}")["findings_invented"] == 0, (
        "to miss a finding is not to claim it"
    )
    assert count_exactly(question, f"A) pseudogout would need {hidden}")["false_claims"] == 1
    assert count_exactly(question, f"A) gout would need {hidden}")["valid_rejections"] == 0, (
        "the right option is no distractor"
    )
    assert not math.isnan(sum(count_exactly(question, "").values()))


def test_several_attempts_at_a_question_in_the_summary_and_by_question():
    right, wrong = ("<dx>d</dx><conclusion>\\boxed{A}</conclusion>", "<dx>d</dx><conclusion>\\boxed{B}</conclusion>")
    questions = [Question(f"q{n}", "Which?", {"A": "gout", "B": "flu"}, "A") for n in range(2)]
    texts = [[right, right, wrong], [wrong, right, wrong]]
    answers = [answer(text, sample, questions[n]) for n in (0, 1) for sample, text in enumerate(texts[n])]
    chosen = config.load_config(None, ["reward.workers=0", "evaluate.k=[1, 2, 4]"], model=False)
    summary, rows = summarize(answers, chosen)
    assert summary["pass@1"] == summary["majority@1"] == summary["accuracy"], "the interval too"
    assert summary["pass@2"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["majority@2"]["mean"] == pytest.approx(((1 + 0.5 + 0.5) / 3 + (0.5 + 0.5 + 0) / 3) / 2)
    assert summary["pass@2"]["low"] < summary["pass@2"]["mean"] < summary["pass@2"]["high"]
    assert "pass@4" not in summary
    assert summary["k_left_out"] == {"k": [4], "samples": 3}
    assert [row["pass@2"] for row in rows] == [1.0, pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("overrides", "response", "expected"),
    [
        ([], "<think>2</think><answer>\\boxed{1,200}</answer>", "1,200"),
        ([], "<think>\\boxed{1,200}</think><answer>so</answer>", None),
        ([], "It is \\boxed{1200}.", "1200"),
        (["reward.answer_in=after:####"], "So.\n#### 1200", "1200"),
        (["reward.answer_in=tag:final"], "<final>1200</final>", "1200"),
        (["reward.tags=[plan, think, answer]"], "It is \\boxed{1200}.", "1200"),
        ([], "twelve hundred", None),
    ],
)
def test_answers_of_other_kinds_are_found_where_the_reward_finds_them(overrides, response, expected):
    question = Question("q", "How many?", {}, "1200", kind="number")
    chosen = config.load_config(None, overrides, model=False)
    assert extract_answer(answer(response, 0, question), chosen) == expected


def test_questions_without_a_right_answer_have_no_accuracy():
    question = Question("q", "What now?", {}, "", kind="none")
    summary, rows = summarize([answer("Rest.", sample, question) for sample in range(2)], SETTINGS)
    assert not {"accuracy", "valid", "majority", "pass@1"} & summary.keys()
    assert not {"accuracy", "majority"} & rows[0].keys()
    printed = format_summary({"data": {"open": summary}}, SETTINGS)
    assert [line for line in printed.splitlines() if line.startswith(("accuracy", "pass@"))] == []
    assert "An answer is" not in printed


@pytest.mark.parametrize(
    ("design", "reward", "form", "note"),
    [
        ("grpo", 11.0, 1.0, "sums: format and reward are those of reward.design=grpo."),
        ("accuracy*10+consistency", 11.0, None, "sums: format and reward are those of reward.design=accuracy*10+cons"),
        ("accuracy+judge", None, None, "sums: no reward, for reward.design=accuracy+judge asks a judge or a function"),
        ("judge", None, None, "sums: no reward, for reward.design=judge asks a judge or a function of your own."),
    ],
)
def test_answers_that_are_no_options_are_scored_by_the_runs_own_design(design, reward, form, note):
    """An evaluation scored them by the clinical design, which they were never asked for."""
    question = Question("q", "2 + 3?", {}, "5", kind="number")
    text = "<think>2 and 3 are 5.</think><answer>\\boxed{5}</answer>"
    chosen = config.load_config(None, ["reward.workers=0", f"reward.design={design}"], model=False)
    summary, rows = summarize([answer(text, 0, question)], chosen)
    assert summary.get("reward", {}).get("mean") == reward
    assert rows[0].get("reward") == reward
    assert summary.get("format", {}).get("mean") == form
    assert "cross_reference" not in summary
    printed = format_summary({"data": {"sums": summary}}, chosen)
    assert note in printed
    assert "An answer is what stands in the only box, in the part its format reserves for it, where the resp" in printed
    assert "clinical" not in printed
    lettered, _ = summarize([answer(text)], chosen)
    assert (lettered["reward"]["mean"], lettered["design"]) == (0.5, "crpo")
    assert "An answer is the letter in the only box" in format_summary({"data": {"letters": lettered}}, chosen)
