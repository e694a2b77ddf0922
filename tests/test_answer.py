"""Where a response's answer stands, and whether it is right: every place, every kind, and hostile responses."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from response_table import GOOD, GOUT

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward.answer import PatternTimeout, answer_place, find_answer, is_right
from crpo_jax.reward.functions import Failure
from crpo_jax.reward.parse import parse_response
from crpo_jax.reward.rules import score_response
from crpo_jax.reward.scorer import Scorer

CHOICE = Question("c", "Which?", {"A": "one", "B": "two"}, "B")
NUMBER = Question("n", "How many?", {}, "1,200", kind="number")
TEXT = Question("t", "Who?", {}, "the gout", kind="text", aliases=("Podagra",))
NONE = Question("o", "Explain.", {}, "", kind="none")


def read(response, question=NUMBER, answer_in="box", **settings):
    return find_answer(response, question, Reward(answer_in=answer_in, **settings))


@pytest.mark.parametrize(
    ("answer_in", "response", "answer"),
    [
        ("box", r"so \boxed{1200}", "1200"),
        ("box", r"\boxed{1} or \boxed{1200}", None),
        ("box", "1200", None),
        ("box", r"\boxed 1200", None),
        ("box", r"\boxed{" + "0" * 150 + "1200}", "0" * 150 + "1200"),
        ("box", r"\boxed{" + "0" * 1500 + "1200}", None),
        ("tag:answer", "<answer> 1200 </answer>", "1200"),
        ("tag:answer", "<answer>1</answer><answer>1200</answer>", None),
        ("tag:answer", "</answer>1200<answer>", None),
        ("tag:answer", "<answer>1200", None),
        ("tag:final-answer", "<final-answer>1200</final-answer>", "1200"),
        ("after:####", "9 * 100 = 900\n#### 1200\n", "1200"),
        ("after:####", "#### 5\n#### 1200", "1200"),
        ("after:####", "1200", None),
        ("after:####", "####\n1200", None),
        ("after:The answer is", "The answer is 1200", "1200"),
        ("pattern:answer is ([\\d,]+)", "answer is 5, no: answer is 1,200.", "1,200"),
        ("pattern:^Answer: (.*)$", "Why.\nAnswer: 1200\nThat is all.", "1200"),
        ("pattern:(x)?answer", "answer", None),
        ("pattern:answer is (\\d+)", "1200", None),
    ],
)
def test_places(answer_in, response, answer):
    assert read(response, answer_in=answer_in)[0] == answer


@pytest.mark.parametrize("answer_in", ["", "boxed", "tag:", "tag:a b", "after:", "after: ", "pattern:", "Box"])
def test_a_place_that_says_nothing_is_refused(answer_in):
    with pytest.raises(InputError, match=r"reward\.answer_in: expected box, tag:NAME, after:MARK or pattern:REGEX"):
        answer_place(answer_in)


@pytest.mark.parametrize(("pattern", "problem"), [("(", "a regular expression"), ("a", "one group"), ("(a)(b)", "one")])
def test_a_pattern_that_cannot_be_used_is_refused_before_anything_is_scored(pattern, problem):
    with pytest.raises(InputError, match=rf"^reward\.answer_in: expected .*{problem}"):
        Scorer(Reward(answer_in=f"pattern:{pattern}"))


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (r"<think>\boxed{1200}</think><answer>so</answer>", "the box stands outside the answer"),
        (r"<think>a</think><answer>\boxed{1200}</answer>", "right"),
        (r"<think>a</think>\boxed{1200}", "the box stands outside the answer"),
    ],
)
def test_an_answer_must_stand_in_the_part_that_the_design_asks_for(response, why):
    parsed = parse_response(response, ("think", "answer"), systems=False)
    assert find_answer(response, NUMBER, Reward(), parsed, "answer")[1] == why


@pytest.mark.parametrize(
    ("answer_in", "response", "answer"),
    [
        ("tag:answer", "<think>1</think><answer>1200</answer>", "1200"),
        ("tag:final", "<think><final>1200</final></think><answer>so</answer>", None),
        ("tag:final", "<think>a</think><answer>so <final>1200</final></answer>", "1200"),
        ("after:####", "<think>#### 5</think><answer>#### 1200</answer> #### 7", "1200"),
        ("after:####", "<think>#### 1200</think><answer>so</answer>", None),
        ("after:####", "#### 1200", None),
        ("pattern:is (\\d+)", "<think>is 5</think><answer>is 1200</answer>", "1200"),
    ],
)
def test_other_places_in_a_design_of_two_parts(answer_in, response, answer):
    score = score_response(NUMBER, response, Reward(design="grpo", answer_in=answer_in))
    assert (score.answer_found, score.accuracy) == (answer, float(answer is not None))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        *((text, True) for text in ("Gout", "the gout.", " GOUT ", "a gout", "\\text{gout}", "podagra!", "ｇｏｕｔ")),
        *((text, False) for text in ("", "gouty arthritis", "no gout", "gout or sepsis")),
    ],
)
def test_texts(text, right):
    assert is_right(TEXT, text, Reward()) == right


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [
        ("beta blocker", "beta-blocker", True),
        ("Crohns disease", "Crohn's disease", True),
        ("US", "U.S.", True),
        ("hepatitis", "hepatitis A", False),
        ("vitamin", "Vitamin A", False),
        ("HER2", "HER2+", False),
        ("Rh-", "Rh+", False),
        ("-5 degrees below", "5 degrees below", False),
        ("15 mg of it", "1.5 mg of it", False),
        ("1,200 patients in all", "1200 patients in all", True),
        ("42.0", "42", True),
        ("5mg", "5 mg", True),
        ("Straße", "strasse", True),
        ("x^2+1", "x^2-1", False),
        ("x^{2} + 1", "x^2+1", True),
        (r"\frac12 \pi", r"\dfrac{1}{2}\pi", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
        (r"11\sqrt2", r"11\sqrt{2}", True),
        ("(1,2)", "(12)", False),
        ("a", "A", False),
        (r"\text{Evelyn}", "Evelyn", True),
        ("the", "a", False),
        ("...", "!!!", False),
    ],
)
def test_texts_and_formulas(given, right, same):
    assert is_right(replace(TEXT, answer=right, aliases=()), given, Reward()) == same


def test_every_kind_is_scored_and_explained():
    settings = Reward(design="grpo", tolerance=0.01)
    shape = "<think>so</think><answer>\\boxed{%s}</answer>"
    for question, text, accuracy, total, why in [
        (CHOICE, "B", 1.0, 11.0, "right"),
        (CHOICE, "b", 0.0, 1.0, "the box holds 'b', not one of the letters A, B"),
        (NUMBER, "$1,205", 1.0, 11.0, "right"),
        (NUMBER, "1300", 0.0, 1.0, "wrong: 1,200 is right"),
        (NUMBER, "many", 0.0, 1.0, "the box holds 'many', no number"),
        (TEXT, "Podagra.", 1.0, 11.0, "right"),
        (TEXT, " ", 0.0, 1.0, "the box is empty"),
        (NONE, "anything", None, 1.0, "the question has no answer to compare with"),
    ]:
        score = score_response(question, shape % text, settings)
        assert (score.accuracy, score.total, score.why["answer"]) == (accuracy, total, why)
        assert "NaN" not in json.dumps(score.why)


def test_the_clinical_design_scores_any_kind_of_answer():
    number = replace(GOUT, options={}, answer="4.0", kind="number")
    assert score_response(number, GOOD.replace(r"\boxed{C}", r"\boxed{4}"), Reward()).total == 12.0
    none = score_response(replace(GOUT, options={}, answer="", kind="none"), GOOD, Reward())
    assert (none.accuracy, none.total) == (None, 2.0), "format, citation and consistency remain"


def test_the_released_design_refuses_what_it_cannot_score():
    problem = "expected questions with options for released, got question n with an answer of kind number"
    with Scorer(Reward(design="released", workers=0)) as scorer, pytest.raises(InputError, match=problem):
        scorer.submit([CHOICE, NUMBER], ["", ""])


HOSTILE = [
    r"\boxed{" * 140_000, "{" * 1_000_000, r"\boxed{" + "{" * 1_000_000, "<answer>" * 125_000, "#### " * 200_000,
    "####" + "1" * 1_000_000, "answer is " * 100_000, "a" * 1_000_000, "1," * 500_000, r"\boxed{" + "1," * 480 + "}",
    r"\boxed{" + r"\frac{" * 160 + "}", "<answer>" + "-" * 999_000 + "</answer>", " " * 1_000_000, "\n" * 1_000_000,
]  # fmt: skip


@pytest.mark.parametrize("answer_in", ["box", "tag:answer", "after:####", r"pattern:answer is\s*([\d.,]+)\s*$"])
def test_hostile_responses_of_a_megabyte_are_quick(answer_in):
    for response in HOSTILE:
        for question in (CHOICE, NUMBER, TEXT, NONE):
            began = time.process_time()
            read(response, question, answer_in)
            assert time.process_time() - began < 0.5, response[:20]


def test_a_pattern_that_backtracks_forever_leaves_its_response_unscored():
    settings = Reward(design="grpo", answer_in="pattern:(a+)+b", workers=0, max_failed_share=1)
    began = time.process_time()
    with pytest.raises(PatternTimeout, match=r"reward\.answer_in: '\(a\+\)\+b' took longer than 0\.2 seconds"):
        read("a" * 1_000_000, answer_in=settings.answer_in)
    assert time.process_time() - began < 0.5
    with Scorer(settings) as scorer:
        (scored,) = scorer.score([NUMBER], ["<think>x</think><answer>" + "a" * 5000 + "</answer>"])
    assert isinstance(scored, Failure)
    assert scored.error.startswith("PatternTimeout: reward.answer_in: ")


@given(st.text(max_size=60), st.sampled_from([CHOICE, NUMBER, TEXT, NONE]))
def test_any_text_is_right_or_wrong(text, question):
    assert is_right(question, text, Reward(tolerance=0.1)) in (True, False)
    find_answer(rf"\boxed{{{text}}}", question, Reward())
