"""The parser: what it takes apart and where, and that its time grows with the length and no faster."""

import sys
import time
from pathlib import Path

import pytest

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.reward.parse import MAX_BOXES, Box, find_boxes, parse_response, split_systems
from crpo_jax.reward.rules import DESIGNS, score_response

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from bench_score import adversarial  # the same texts that the benchmark times

WHOLE = (
    " <dx>a (System 1: Intuitive) fast\n(System 2: Analytical) slow</dx>\n"
    "<conclusion>So. \\boxed{C} Yes.</conclusion>\n"
)


def test_the_parts_of_a_whole_response() -> None:
    parsed = parse_response(WHOLE)
    assert parsed.problems == ()
    assert parsed.dx == "a (System 1: Intuitive) fast\n(System 2: Analytical) slow"
    assert (parsed.system1, parsed.system2) == (" fast\n", " slow")
    assert parsed.conclusion == "So. \\boxed{C} Yes."
    assert parsed.conclusion_without_box() == "So.   Yes."
    assert parsed.box is not None
    assert WHOLE[parsed.box.start : parsed.box.end] == "\\boxed{C}"
    assert parsed.in_conclusion(parsed.box)


def test_other_tags_and_no_systems() -> None:
    parsed = parse_response("<think>a</think><answer>\\boxed{B}</answer>", ("think", "answer"), systems=False)
    assert (parsed.dx, parsed.system1, parsed.conclusion, parsed.problems) == ("a", None, "\\boxed{B}", ())


def test_every_problem_is_named() -> None:
    assert parse_response("").problems == ("no <dx>", "no </dx>", "no <conclusion>", "no </conclusion>")
    assert parse_response("x<dx></dx>y<conclusion></conclusion>z").problems == (
        "text before <dx>",
        "text between </dx> and <conclusion>",
        "text after </conclusion>",
        "no System 1 heading in dx",
        "no System 2 heading in dx",
    )


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", ()),
        ("\\boxed{C}", (Box("C", 0, 9),)),
        ("\\boxed{\\text{C}}.", (Box("\\text{C}", 0, 16),)),
        ("\\boxed{", (Box(None, 0, 6),)),
        ("\\boxed", (Box(None, 0, 6),)),
        ("\\boxed{}}", (Box("", 0, 8),)),
        ("\\boxed{a\\boxed{b}}", (Box("a\\boxed{b}", 0, 18), Box("b", 8, 17))),
        ("\\boxed{" + "x" * 200 + "}", (Box(None, 0, 6),)),
    ],
)
def test_boxes(text: str, boxes: tuple[Box, ...]) -> None:
    found, count = find_boxes(text)
    assert count == text.count("\\boxed")
    assert [(box.text, box.start) for box in found[: len(boxes)]] == [(box.text, box.start) for box in boxes]


def test_boxes_are_counted_beyond_those_kept() -> None:
    boxes, count = find_boxes("\\boxed{A}" * 50)
    assert (len(boxes), count) == (MAX_BOXES, 50)


@pytest.mark.parametrize(
    ("heading", "is_heading"),
    [
        ("(System 1: Intuitive)", True),
        ("(System 1)", True),
        ("System 1:", True),
        ("System 1", True),
        ("  ## System 1 - Intuitive", True),
        ("**System 1 (Intuitive)**", True),
        ("[System 1]", True),
        ("> System 1.", True),
        ("As System 1: says", False),
        ("System 1 says", False),
        ("System 11:", False),
        ("system 1:", False),
        ("System  1:", False),
        ("1. System 1:", False),
        ("（System 1：Intuitive）", False),
    ],
)
def test_headings(heading: str, is_heading: bool) -> None:
    _, _, problems = split_systems(f"{heading}\nfast\n(System 2: Analytical) slow")
    assert (problems == []) == is_heading
    _, _, problems = split_systems(f"Before.\n{heading}\nfast\n(System 2: Analytical) slow")
    assert (problems == []) == is_heading, "the same in a later line"


QUESTION = Question("q", "A man has tophi on the ear.", {"A": "Gout", "B": "Pseudogout"}, "A")


def seconds(response: str, design: str) -> float:
    start = time.perf_counter()
    score_response(QUESTION, response, Reward(design=design))
    return time.perf_counter() - start


@pytest.mark.parametrize("name", adversarial(1000))
def test_a_megabyte_of_anything_is_quick(name: str) -> None:
    """All take under 20 ms on an idle core (scripts/bench_score.py); a quadratic parser would take minutes.

    The bound is loose, and the best of three counts, since other work on a shared machine must not fail the test.
    """
    response = adversarial(1_000_000)[name]
    for design in DESIGNS:
        assert min(seconds(response, design) for _ in range(3)) < 1.0, design
