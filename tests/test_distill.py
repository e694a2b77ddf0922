"""Distillation end to end against a failing server: every trace is on disk once and is converted by rules."""

import errno
import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from chat_server import ChatServer, complete, prompt_of
from question_file import write_jsonl

from crpo_jax import distill
from crpo_jax.chat import client
from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.data.readers import read_questions
from crpo_jax.errors import InputError
from crpo_jax.reward.rules import score_response
from crpo_jax.store import journal
from crpo_jax.traces import convert_trace, explain_wrong_answer, find_answer_letter, split_reasoning

REAL = Path(__file__).parents[2] / "shared" / "data" / "coldstart" / "think_traces.jsonl"
CASE = "A man of 60 has white ear tophi and a swollen big toe after heavy beer use."
THINK = (
    "A man with a swollen big toe and white ear tophi, so gout comes to mind first, since tophi are "
    "urate deposits and the toe is typical.\n\n"
    "A septic joint would need fever and pus, and the case tells of neither. Pseudogout would favour "
    "the knee and calcified cartilage.\n\n"
    "Heavy beer use raises urate, which fits as well. White ear tophi with a swollen big toe and heavy beer use leave "
    "only gout, option C, so the other options can be put aside with confidence."
)
QUESTIONS = [
    Question(f"q{n}", f"{CASE} Case {n}?", {"A": "septic joint", "B": "pseudogout", "C": "gout"}, "C")
    for n in range(12)
]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    data = [
        "data.source=jsonl",
        f"data.path={tmp_path / 'questions.jsonl'}",
        "data.part=all",
        "distill.model=teacher",
        "distill.concurrency=3",
    ]
    return ["--workdir", str(tmp_path / "run"), *data]


def number_of(request) -> int:
    return int(re.findall(r"Case (\d+)\?", prompt_of(request))[0])


def rows(tmp_path: Path, name: str = "traces.jsonl"):
    return [json.loads(line) for line in (tmp_path / "run" / name).read_text(encoding="utf-8").splitlines()]


def test_faults_lose_nothing_and_a_second_run_only_sends_what_failed(tmp_path, arguments):
    """Every second request fails, 5 is rejected, 7 answered wrongly and 8 cut off; then the server recovers."""
    healthy = False

    def plan(request, times):
        number = number_of(request)
        if not healthy and number == 5:
            return 400, {}, b"no"
        if not healthy and times == 0 and number % 2:
            return 500, {}, b"oops"
        if number == 7:
            return complete("The answer is A.", THINK)
        return complete("<think>Hm" if number == 8 else f"<think>{THINK}</think>\n\n**Answer: C**")

    with ChatServer(plan) as server:
        with pytest.raises(SystemExit, match="1 questions without a reply"):
            distill.main([*arguments, f"distill.base_url={server.url}"])
        assert {row["id"] for row in rows(tmp_path)} == {question.id for question in QUESTIONS} - {"q5"}
        before, healthy = (tmp_path / "run" / "traces.jsonl").read_bytes(), True
        count = len(server.requests)
        distill.main([*arguments, f"distill.base_url={server.url}"])
        assert [number_of(request) for request in server.requests[count:]] == [5]
    assert (tmp_path / "run" / "traces.jsonl").read_bytes().startswith(before)
    assert Counter(row["right"] for row in rows(tmp_path)) == {True: 10, False: 2}
    assert next(row for row in rows(tmp_path) if row["id"] == "q7")["reasoning"] == THINK
    good, bad = rows(tmp_path, "converted.jsonl"), {row["id"]: row["why"] for row in rows(tmp_path, "rejected.jsonl")}
    assert len(good) == 10
    assert bad == {"q7": "the answer is A, C is right", "q8": "the reasoning was cut off"}


def test_the_converted_file_is_read_by_fine_tuning_and_accepted_by_the_reward(tmp_path, arguments):
    with ChatServer(lambda request, times: complete(f"<think>{THINK}</think>C")) as server:
        distill.main([*arguments, f"distill.base_url={server.url}"])
    for question in read_questions("jsonl", str(tmp_path / "run" / "converted.jsonl")):
        scored = score_response(question, question.columns["response"], Reward())
        assert (scored.accuracy, scored.format, scored.cross_reference) == (1, 1, question.columns["cross_reference"])
    assert len(rows(tmp_path, "converted.jsonl")) == len(QUESTIONS)


def test_only_a_torn_trace_is_requested_again(tmp_path, arguments):
    with ChatServer(lambda request, times: complete("C")) as server:
        distill.main([*arguments, f"distill.base_url={server.url}"])
        path = tmp_path / "run" / "traces.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        distill.main([*arguments, f"distill.base_url={server.url}", "distill.concurrency=1"])
        assert len(server.requests) == len(QUESTIONS) + 1
    assert len({row["id"] for row in rows(tmp_path)}) == len(rows(tmp_path)) == len(QUESTIONS)


def test_only_wrong_answers_are_attempted_again(tmp_path, arguments):
    with ChatServer(lambda request, times: complete("C" if times >= number_of(request) % 3 else "A")) as server:
        distill.main([*arguments, f"distill.base_url={server.url}", "distill.attempts=3"])
        counts = Counter(map(number_of, server.requests))
    assert counts == {number: number % 3 + 1 for number in range(12)}
    assert len(rows(tmp_path)) == sum(counts.values())


def test_on_a_full_disk_a_reply_waits_for_room(tmp_path, arguments, monkeypatch, capsys):
    real, refusals = os.write, iter(range(4))

    def write(fd, data):
        if b'"id": "q3"' in data and next(refusals, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(journal.time, "sleep", lambda seconds: None)
    with ChatServer(lambda request, times: complete("C")) as server:
        distill.main([*arguments, f"distill.base_url={server.url}"])
        assert len(server.requests) == len(QUESTIONS)
    assert {row["id"] for row in rows(tmp_path)} == {question.id for question in QUESTIONS}
    assert "No space left on device; all earlier rows are kept; waiting for room" in capsys.readouterr().err


def test_rewriting_by_the_model_is_requested_once(tmp_path, arguments):
    formed = (
        "<dx>\n(System 1: Intuitive) Gout comes to mind.\n(System 2: Analytical) White ear tophi are urate.\n</dx>\n"
        "<conclusion>\nThe white ear tophi decide it. \\boxed{C}\n</conclusion>"
    )

    def plan(request, times):
        if "Write the notes down anew" in prompt_of(request):
            return complete(formed if number_of(request) else "I would rather not.", "hm")
        return complete("C", THINK)

    with ChatServer(plan) as server:
        for _ in range(2):
            distill.main([*arguments, f"distill.base_url={server.url}", "distill.convert=rewrite"])
        assert len(server.requests) == 2 * len(QUESTIONS)
    assert [row["response"] for row in rows(tmp_path, "converted.jsonl")] == [formed] * 11
    assert rows(tmp_path, "rejected.jsonl")[0]["why"].startswith("no <dx>")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *[
            (text, "C")
            for text in (
                "C",
                "**C**",
                "(C)",
                "C) gout",
                "C.\nBecause of the tophi.",
                "\\boxed{C}",
                "The answer is C.",
                "**Answer: C**",
            )
        ],
        *[
            (text, "C")
            for text in (
                "Gout.",
                "So the correct answer is **C**, as tophi show.",
                "It is option C.",
                "I think A at first.\n\nAnswer: C",
            )
        ],
        *[
            (text, None)
            for text in (
                "",
                "gout or not",
                "The answer is A.\n\nThe answer is C.",
                "\\boxed{A} \\boxed{C}",
                "\\boxed{F}",
                "A case of gout",
            )
        ],
    ],
)
def test_an_answer_settles_on_one_letter_or_none(answer, letter):
    assert find_answer_letter(answer, QUESTIONS[0])[0] == letter


def test_reasoning_and_answer_are_split_however_the_server_sends_them():
    assert split_reasoning("<think>a</think>b") == ("a", "b")
    assert split_reasoning("a</think> b") == ("a", "b")  # templates that open the tag in the prompt
    assert split_reasoning("b", "a") == ("a", "b")
    assert split_reasoning("<think>a") is None


def test_conversion_adds_no_word_and_drops_none_but_the_bare_answer():
    conversion = convert_trace(QUESTIONS[0], THINK, "**Answer: C**", Reward())
    assert conversion.response is not None
    bare = re.sub(r"</?\w+>|\(System [12]: \w+\)|\\boxed\{C\}", " ", conversion.response)
    assert bare.split() == THINK.split()


def test_conversion_by_rules_rejects_unusable_traces():
    assert (
        convert_trace(QUESTIONS[0], "Gout.", "C", Reward()).reason
        == "the reasoning is too short to be split into System 1 and System 2"
    )
    assert convert_trace(QUESTIONS[0], THINK + "<|im_end|>", "C", Reward()).reason == "the trace spells a special token"
    tagged = convert_trace(QUESTIONS[0], THINK.replace("Heavy", "</dx> System 2: \\boxed{A} Heavy"), "C", Reward())
    assert tagged.response is not None
    assert tagged.response.count("\\boxed") == 1


@pytest.mark.skipif(not REAL.is_file(), reason=f"no teacher traces at {REAL}")
def test_real_teacher_traces_convert(tmp_path):
    distill.main(["--traces", str(REAL), "--workdir", str(tmp_path / "run")])
    good = rows(tmp_path, "converted.jsonl")
    assert len(good) + len(rows(tmp_path, "rejected.jsonl")) == 1304
    assert len(good) >= 1290
    assert sum(row["cross_reference"] for row in good) > 300
    assert len(read_questions("jsonl", str(tmp_path / "run" / "converted.jsonl"))) == len(good)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["distill.base_url=nowhere"], "distill.base_url: expected an address"),
        (["distill.base_url=http://h/v1", "distill.model="], "distill.model: expected the name"),
        (["--traces", "/nowhere.jsonl"], "--traces /nowhere.jsonl: expected a file"),
        (["--convert"], "expected traces.jsonl to convert"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(tmp_path, arguments, changed, expected):
    with pytest.raises(InputError, match=expected):
        distill.main([*arguments, *changed])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "right", "answer", "reason", "end"),
    [
        ("text", "gout", "Beer, toe and tophi decide it. \\boxed{Gout}", "", "\\boxed{gout}"),
        ("text", "gout", "\\boxed{sepsis}", "the answer is sepsis, gout is right", ""),
        ("number", "60", "He is \\boxed{60 years} old.", "", "\\boxed{60}"),
        ("number", "60", "\\boxed{old}", "the box holds 'old', no number", ""),
        ("number", "60", "60", "no \\boxed{}", ""),
        ("none", "", "It is gout.", "", "the other options can be put aside with confidence.\n\nIt is gout."),
    ],
)
def test_traces_of_questions_without_options(kind, right, answer, reason, end):
    question = Question("q", f"{CASE} What now?", {}, right, kind=kind)
    assert explain_wrong_answer(answer, question, Reward()) == reason
    response = convert_trace(question, THINK, answer, Reward()).response
    assert (response is None) == bool(reason)
    if response is not None:
        assert response.endswith(f"{end}\n</conclusion>")
        assert score_response(question, response, Reward()).accuracy == (None if kind == "none" else 1.0)


def test_a_converted_trace_has_its_answer_where_the_reward_looks_for_it():
    question = Question("q", f"{CASE} How old?", {}, "60", kind="number")
    for place, written in (("after:####", "\n#### 60\n"), ("tag:final", "<final>60</final>\n")):
        settings = Reward(answer_in=place)
        conversion = convert_trace(question, THINK, f"He is 60.{written}", settings)
        assert conversion.response is not None
        assert conversion.response.endswith(f"{written}</conclusion>")
        assert conversion.score is not None
        assert conversion.score.accuracy == 1.0
    with pytest.raises(
        InputError, match=r"reward\.answer_in: expected box, tag:NAME or after:MARK, in which an answer can"
    ):
        convert_trace(question, THINK, "He is 60.", Reward(answer_in=r"pattern:is (\d+)"))
