"""Judges: a prompt per measure, replies on disk by prompt, unparsed replies counted and never read as 0, agreement."""

import json
from importlib import import_module

import pytest
from chat_server import ChatServer, complete, prompt_of

from crpo_jax.answer.records import Answer, answer_to_row
from crpo_jax.answer.truth import count_exactly
from crpo_jax.chat import client
from crpo_jax.data.question import Question
from crpo_jax.data.vignettes import teacher_response, vignettes
from crpo_jax.judge.measures import MEASURES, build_judge_turn, measure_agreement, parse_count, select_responses

evaluate = import_module("crpo_jax.evaluate")

QUESTIONS = vignettes("test", 6)
ANSWERS = [
    Answer(question, sample, teacher_response(question, sample)) for question in QUESTIONS for sample in range(2)
]


@pytest.fixture
def responses(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    (tmp_path / "vignettes.jsonl").write_text(
        "".join(json.dumps(answer_to_row(answer)) + "\n" for answer in ANSWERS), encoding="utf-8"
    )
    return [
        "--responses",
        str(tmp_path / "vignettes.jsonl"),
        "--workdir",
        str(tmp_path / "run"),
        "reward.workers=0",
        "judge.concurrency=3",
    ]


def read_summary(tmp_path):
    return json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["data"]["vignettes"]


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        *[
            (text, 3)
            for text in (
                "- a\n- b\n- c\nCOUNT: 3",
                "count = 3",
                "**COUNT: 3**",
                "COUNT: 1\nno, again\nCOUNT: 3\n",
                "<think>COUNT: 9</think>COUNT: 3",
            )
        ],
        ("COUNT: 0", 0),
        *[
            (text, None)
            for text in ("", "three", "3", "I count: 3 of them", "COUNT: many", "COUNT: -3", "COUNT: 12345")
        ],
    ],
)
def test_a_count_is_parsed_from_its_own_line_or_not_at_all(reply, number):
    assert parse_count(reply) == number


def test_every_measure_has_its_own_prompt_with_question_and_response():
    texts = {measure: build_judge_turn(measure, ANSWERS[0])[0]["content"] for measure in MEASURES}
    assert len(set(texts.values())) == len(MEASURES) == 8
    for text in texts.values():
        assert ANSWERS[0].response in text
        assert QUESTIONS[0].question in text


def test_two_judges_their_agreement_and_the_truth(tmp_path, responses, capsys):
    """The first judge counts exactly; the second counts one more, refuses backtracking and rejects subgoal."""
    truth = {answer.response: count_exactly(answer.question, answer.response) for answer in ANSWERS}

    def plan(request, times):
        text = prompt_of(request)
        measure = next(name for name, what in MEASURES.items() if what.instance in text)
        counts = next(exact for response, exact in truth.items() if response in text)
        number = counts[
            {"faithfulness": "true_claims", "cecd": "case_findings", "drc": "valid_rejections"}.get(
                measure, "findings_invented"
            )
        ]
        if request["model"] == "b" and measure == "backtracking":
            return complete("I would rather not say")
        if request["model"] == "b" and measure == "subgoal":
            return 400, {}, b"too long"
        return (
            (500, {}, b"")
            if times == 0 and number % 2
            else complete(f"<list>\nCOUNT: {number + (request['model'] == 'b')}")
        )

    with ChatServer(plan) as server:
        judge = [f"judge.base_url={server.url}", "judge.model=a", "judge.second.model=b", "judge.samples=1"]
        evaluate.main([*responses, *judge])
        requests = len(server.requests)
        summary = read_summary(tmp_path)
        assert {request["model"] for request in server.requests} == {"a", "b"}
        evaluate.main(["--workdir", str(tmp_path / "run"), *responses[:2], *judge])
        assert len(server.requests) == requests + len(QUESTIONS), "only what got no reply is sent again"
    cecd = sum(truth[answer.response]["case_findings"] for answer in ANSWERS if answer.sample == 0) / len(QUESTIONS)
    assert summary["judges"]["a"]["cecd"]["mean"] == pytest.approx(cecd)
    assert summary["judges"]["a"]["cecd"]["judged"] == len(QUESTIONS)
    assert summary["judges"]["b"]["cecd"]["mean"] == pytest.approx(cecd + 1)
    nothing = {"mean": None, "low": None, "high": None, "judged": 0}
    assert summary["judges"]["b"]["backtracking"] == nothing | {"unparsed": len(QUESTIONS), "missing": 0}
    assert summary["judges"]["b"]["subgoal"] == nothing | {"unparsed": 0, "missing": len(QUESTIONS)}
    assert summary["agreement"]["cecd"] | {"spearman": 1.0} == {
        "both": 6,
        "equal": 0,
        "within_one": 1,
        "difference": -1,
        "spearman": 1.0,
    }
    assert summary["judges_and_truth"]["a"]["drc"]["equal"] == 1
    assert summary["judges_and_truth"]["b"]["drc"]["difference"] == 1
    output = capsys.readouterr().out
    assert "no count (6 unparsed)" in output
    assert "no count (6 missing)" in output


def test_the_judged_questions_do_not_depend_on_the_order_of_responses():
    selected = select_responses(ANSWERS, 1, 2)
    assert select_responses(ANSWERS[::-1], 1, 2) == selected
    assert [answer.question.id for answer in selected] == sorted(question.id for question in QUESTIONS)[:2]


def test_agreement_against_worked_values():
    assert measure_agreement([1, 2, 3, None], [1, 3, 5, 7]) == {
        "both": 3,
        "equal": 1 / 3,
        "within_one": 2 / 3,
        "difference": -1,
        "spearman": pytest.approx(1),
    }
    assert measure_agreement([1, 1, 1], [1, 2, 3])["spearman"] is None
    assert measure_agreement([None], [1])["equal"] is None


def test_the_summary_is_written_even_if_the_judge_refuses(tmp_path, responses):
    with (
        ChatServer(lambda request, times: (401, {}, b"who are you")) as server,
        pytest.raises(SystemExit, match="who are you"),
    ):
        evaluate.main([*responses, f"judge.base_url={server.url}", "judge.model=a"])
    assert read_summary(tmp_path)["accuracy"]["mean"] > 0
    assert "judges" not in read_summary(tmp_path)


def test_a_judge_is_told_of_no_options_where_there_are_none():
    turns = (("user", "My toe hurts."), ("assistant", "Since when?"))
    for kind, right, shown in (
        ("text", "gout", "<right_answer>gout</right_answer>\n"),
        ("none", "", "</question>\n<resp"),
    ):
        question = Question("q", "Since noon.", {}, right, kind=kind, turns=turns)
        [message] = build_judge_turn("faithfulness", Answer(question, 0, "Gout."))
        assert "about a medical question." in message["content"]
        assert "user: My toe hurts.\n\nassistant: Since when?\n\nSince noon.\n</question>" in message["content"]
        assert shown in message["content"]
        assert "option>" not in message["content"]
