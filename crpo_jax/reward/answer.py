"""Where a response's answer stands, by `reward.answer_in`, and whether it is right, by the kind of the question."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from crpo_jax.config import Reward
from crpo_jax.data.number import read_number, same_number
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward.answer_text import same_text
from crpo_jax.reward.parse import BOX, Parsed, find_boxes, read_braces

if TYPE_CHECKING:
    import regex

LONGEST_ANSWER = 1000  # characters; a longer one is not read
PATTERN_CHARACTERS = 10_000  # at the end of a response, which a pattern searches
PATTERN_SECONDS = 0.2

Answer = tuple[str | None, str]
"""The answer's text, None where there is no readable one, and an explanation."""


class Place(NamedTuple):
    """Where answers stand: in a box, in a tag or after a mark of that name, or as the group of a pattern."""

    kind: Literal["box", "tag", "after", "pattern"]
    name: str = ""


class Region(NamedTuple):
    """The part of a response that may hold its answer: its name, and its offsets."""

    name: str
    start: int
    end: int


class PatternTimeout(Exception):
    """A pattern took longer than PATTERN_SECONDS: the response cannot be scored."""


def find_answer(
    response: str, question: Question, settings: Reward, parsed: Parsed | None = None, part: str = "conclusion"
) -> Answer:
    """The answer of a response, and whether it is right, in words.

    With `parsed` it must stand in the second tagged part, called `part`; without, anywhere. A response has one box, or
    one such tag, or its answer is none: else a policy would name several. A mark's or a pattern's last occurrence
    counts. The option of a question with options is the letter as the options write it, white space around it aside:
    `\\boxed{C.}`, `\\boxed{(C)}`, `\\boxed{c}`, `\\boxed{\\text{C}}`, full-width letters and zero-width characters are
    no answers: the prompt asks for one form, and a policy that is paid for many forms drifts to those that no other
    evaluator reads.
    """
    place = answer_place(settings.answer_in)
    region = Region("response", 0, len(response))
    if parsed is not None:
        if parsed.conclusion is not None:
            region = Region(part, parsed.conclusion_start, parsed.conclusion_start + len(parsed.conclusion))
        elif place.kind == "box":
            region = Region(part, 0, -1)  # a box outside is told from none
        else:
            return None, f"no {part} that can be told from the rest"
    text, problem = FINDERS[place.kind](response, region, place.name, question.kind)
    if text is None:
        return None, problem
    where = "the box" if place.kind == "box" else f"the answer in {settings.answer_in}"
    text = text.strip()
    if question.kind == "choice":
        if text not in question.options:
            return None, f"{where} holds {text!r}, not one of the letters {', '.join(question.options)}"
    elif not text:
        return None, f"{where} is empty"
    elif question.kind == "none":
        return text, "the question has no answer to compare with"
    elif question.kind == "number" and read_number(text) is None:
        return None, f"{where} holds {text!r}, no number"
    return text, "right" if is_right(question, text, settings) else f"wrong: {question.answer} is right"


def is_right(question: Question, answer: str | None, settings: Reward) -> bool:
    """Whether an answer is the right letter, a number within `reward.tolerance`, or one of the right texts; never where
    the question has no right answer."""
    if answer is None:
        return False
    if question.kind == "choice":
        return answer == question.answer
    if question.kind == "number":
        given, right = read_number(answer), read_number(question.answer)
        return given is not None and right is not None and same_number(given, right, settings.tolerance)
    if question.kind == "text":
        return any(same_text(answer, right) for right in (question.answer, *question.aliases))
    return False


def write_answer(answer: str, settings: Reward) -> str:
    """An answer as `find_answer` reads it; InputError where that is by a pattern, which cannot be written."""
    place = answer_place(settings.answer_in)
    if place.kind == "pattern":
        raise InputError(
            f"reward.answer_in: expected box, tag:NAME or after:MARK, in which an answer can be written, got "
            f"{settings.answer_in!r}"
        )
    forms = {"box": f"{BOX}{{{answer}}}", "tag": f"<{place.name}>{answer}</{place.name}>"}
    return forms.get(place.kind, f"\n{place.name} {answer}")


def without_marks(text: str, settings: Reward) -> str:
    """The text without the tags or the mark that an answer would be found by, and with what they enclose."""
    place = answer_place(settings.answer_in)
    marks = {"tag": (f"<{place.name}>", f"</{place.name}>"), "after": (place.name,)}
    for mark in marks.get(place.kind, ()):
        text = text.replace(mark, "")
    return text


@lru_cache(maxsize=64)
def answer_place(answer_in: str) -> Place:
    """The setting `reward.answer_in`, read; InputError where it says nothing."""
    kind, _, name = answer_in.partition(":")
    if answer_in == "box":
        return Place("box")
    if kind == "tag" and re.fullmatch(r"[\w-]+", name):
        return Place("tag", name)
    if kind == "after" and name.strip():
        return Place("after", name)
    if kind == "pattern" and name:
        compile_pattern(name)
        return Place("pattern", name)
    raise InputError(
        f"reward.answer_in: expected box, tag:NAME, after:MARK or pattern:REGEX with one group, got {answer_in!r}"
    )


@lru_cache(maxsize=64)
def compile_pattern(text: str) -> "regex.Pattern[str]":
    import regex  # unlike those of `re`, its searches can be limited in time

    try:
        pattern = regex.compile(text, regex.MULTILINE)
    except regex.error as error:
        raise InputError(f"reward.answer_in: expected a regular expression, got {text!r}: {error}") from None
    if pattern.groups != 1:
        raise InputError(f"reward.answer_in: expected a pattern with one group, got {pattern.groups} in {text!r}")
    return pattern


def find_in_box(response: str, region: Region, _: str, kind: str) -> Answer:
    boxes, count = find_boxes(response)
    if count != 1:
        return None, f"no {BOX}{{}}" if count == 0 else f"{count} boxes, one expected"
    box = boxes[0]
    text, end = box.text, box.end
    if text is None and kind != "choice":  # a letter is short, other answers need not be
        text = read_braces(response, box.start + len(BOX), LONGEST_ANSWER)
        end += len(text) + 2 if text is not None else 0
    if text is None:
        return None, f"a {BOX} without readable braces"
    if not region.start <= box.start <= end <= region.end:
        return None, f"the box stands outside the {region.name}"
    return text, ""


def find_in_tag(response: str, region: Region, name: str, _: str) -> Answer:
    opening, closing = f"<{name}>", f"</{name}>"
    counts = response.count(opening), response.count(closing)
    if counts != (1, 1):
        return None, f"{counts[0]} {opening} and {counts[1]} {closing}, one of each expected"
    start, end = response.find(opening) + len(opening), response.find(closing)
    if end < start:
        return None, f"{closing} stands before {opening}"
    if not region.start <= start <= end <= region.end:
        return None, f"{opening} stands outside the {region.name}"
    return bounded(response[start:end])


def find_after_mark(response: str, region: Region, mark: str, _: str) -> Answer:
    at = response.rfind(mark, region.start, region.end)
    if at < 0:
        return None, f"no {mark!r} in the {region.name}"
    line_end = response.find("\n", at + len(mark), region.end)
    return bounded(response[at + len(mark) : region.end if line_end < 0 else line_end])


def find_by_pattern(response: str, region: Region, pattern: str, _: str) -> Answer:
    start = max(region.start, region.end - PATTERN_CHARACTERS)
    try:
        matches = compile_pattern(pattern).finditer(response, start, region.end, timeout=PATTERN_SECONDS)
        texts = [match[1] for match in matches]
    except TimeoutError:
        raise PatternTimeout(
            f"reward.answer_in: {pattern!r} took longer than {PATTERN_SECONDS} seconds on the end of this response"
        ) from None
    if not texts or texts[-1] is None:
        return None, f"nothing in the {region.name} matches {pattern!r}"
    return bounded(texts[-1])


def bounded(text: str) -> Answer:
    if len(text) > LONGEST_ANSWER:
        return None, f"an answer of {len(text)} characters, at most {LONGEST_ANSWER} are read"
    return text, ""


FINDERS: dict[str, Callable[[str, Region, str, str], Answer]] = {
    "box": find_in_box,
    "tag": find_in_tag,
    "after": find_after_mark,
    "pattern": find_by_pattern,
}
