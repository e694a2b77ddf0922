"""A response parsed: the two tagged parts, System 1 and System 2, the boxes, and the problems of its format.

Time is linear in the length of the response, and nearly all of it is spent in `str.find` and `str.count`: a response of
a million tags or braces costs as little as one of a million letters. The rules:

- A tag is exactly `<dx>`, `</dx>` and so on. `<DX>`, `< dx >`, full-width `＜dx＞` and a tag with a zero-width
  character in it are text.
- White space is what `str.isspace` says; a zero-width character outside the tags is text and breaks the format.
- A heading is `System 1` or `System 2` in this spelling, either first in its line (`(`, `[`, `#`, `*`, `_`, `>` and
  white space may precede it) or after an opening parenthesis, and closed by one of `: ) ( ] * _ . -`, a dash or the end
  of the line. "System 1 suggested gout" is a sentence, not a heading.
- A box is any `\\boxed`, with or without a brace after it, so that a second answer in an odd spelling is still a second
  answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

BOX = "\\boxed"
MAX_BOXES = 8  # boxes read, for the explanation; an answer needs exactly one
MAX_BOX_CHARS = 100  # a box whose brace is not closed within this is unreadable: an answer is one letter
MAX_HEADING_CHARS = 40  # between "(System 1" and the parenthesis that closes it
MAX_MENTIONS = 64  # of `System 1` in dx; further ones are not read

# A literal first, so that the search runs at the speed of str.find, then bounded repeats only.
HEADINGS = {number: re.compile(rf"System {number}[ \t]{{0,4}}(?=[:)(\]*_.\-\u2013\u2014\r\n]|$)") for number in (1, 2)}
BEFORE_HEADING = " \t([#*_>"


@dataclass(frozen=True, slots=True)
class Box:
    """The text between the braces of a `\\boxed{...}`, None where they cannot be read; offsets in the response."""

    text: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Parsed:
    """The parts of a response, each None where it cannot be separated; `problems` is empty for the right format.

    `dx` and `conclusion` are the two tagged parts whatever the tags are called; `system1` and `system2` are in `dx`.
    """

    dx: str | None
    system1: str | None
    system2: str | None
    conclusion: str | None
    conclusion_start: int
    boxes: tuple[Box, ...]
    box_count: int
    problems: tuple[str, ...]

    @property
    def box(self) -> Box | None:
        """The only box of the response."""
        return self.boxes[0] if self.box_count == 1 else None

    def in_conclusion(self, box: Box) -> bool:
        return (
            self.conclusion is not None
            and self.conclusion_start <= box.start
            and box.end <= self.conclusion_start + len(self.conclusion)
        )

    def conclusion_without_box(self) -> str:
        """The prose of the conclusion: the response's only box is cut out of it."""
        if self.conclusion is None:
            return ""
        box = self.box
        if box is None or not self.in_conclusion(box):
            return self.conclusion
        start, end = box.start - self.conclusion_start, box.end - self.conclusion_start
        return self.conclusion[:start] + " " + self.conclusion[end:]


def parse_response(response: str, tags: tuple[str, ...] = ("dx", "conclusion"), systems: bool = True) -> Parsed:
    """The parts of `response` between two pairs of tags; with `systems`, System 1 and System 2 are read from the first.

    A part is separated where each of its two tags occurs once and in order, and no tag of the other part is in it or
    around it. So a lost `</dx>` does not cost the answer in a sound conclusion, and `<conclusion>` inside dx is none.
    """
    texts, problems = split_tags(response, tags)
    dx, conclusion = texts or (None, None)
    names = tuple(name for tag in tags for name in (f"<{tag}>", f"</{tag}>"))
    opened2, closed2 = response.find(names[2]), response.find(names[3])
    start, system1, system2 = opened2 + len(names[2]), None, None
    if conclusion is None and response.count(names[2]) == response.count(names[3]) == 1 and start <= closed2:
        torn = response.find(names[0], start, closed2) >= 0 or response.find(names[1], start, closed2) >= 0
        nested = response.find(names[0], 0, opened2) >= 0 and response.find(names[1], closed2) >= 0
        if not torn and not nested:
            conclusion = response[start:closed2]
    if systems and dx is not None:
        system1, system2, heading_problems = split_systems(dx)
        problems += heading_problems
    boxes, box_count = find_boxes(response)
    return Parsed(dx, system1, system2, conclusion, start, boxes, box_count, tuple(problems))


def split_tags(response: str, tags: Sequence[str]) -> tuple[tuple[str, ...] | None, list[str]]:
    """The texts between each pair of tags, None where they are not all there once and in order; and the problems, of
    which text outside the tags is one too."""
    names = [name for tag in tags for name in (f"<{tag}>", f"</{tag}>")]
    counts = [response.count(name) for name in names]
    if any(count != 1 for count in counts):
        return None, [
            f"{name} stands {count} times" if count else f"no {name}"
            for name, count in zip(names, counts, strict=True)
            if count != 1
        ]
    starts = [response.find(name) for name in names]
    if starts != sorted(set(starts)):
        return None, [f"the tags are out of order: expected {' '.join(names)}"]
    ends = [start + len(name) for start, name in zip(starts, names, strict=True)]
    texts = tuple(response[end:start] for end, start in zip(ends[::2], starts[1::2], strict=True))
    outside = {f"before {names[0]}": response[: starts[0]]}
    for closing in range(1, len(names) - 1, 2):
        outside[f"between {names[closing]} and {names[closing + 1]}"] = response[ends[closing] : starts[closing + 1]]
    outside[f"after {names[-1]}"] = response[ends[-1] :]
    return texts, [f"text {where}" for where, text in outside.items() if text and not text.isspace()]


def split_systems(dx: str) -> tuple[str | None, str | None, list[str]]:
    """The System 1 and System 2 parts of dx, without their headings, and the problems of the headings."""
    places = {number: find_headings(dx, number) for number in (1, 2)}
    problems = [
        f"more than one System {number} heading in dx" if spans else f"no System {number} heading in dx"
        for number, spans in places.items()
        if len(spans) != 1
    ]
    if problems:
        return None, None, problems
    (start1, end1), (start2, end2) = places[1][0], places[2][0]
    if start2 < start1:
        return None, None, ["System 2 stands before System 1"]
    return dx[end1:start2], dx[end2:], []


def find_headings(dx: str, number: int) -> list[tuple[int, int]]:
    """Where the headings of a system start and end, two at most: a second one is already one too many.

    "(System 1: Intuitive)" ends with its parenthesis; any other heading ends after the number.
    """
    spans: list[tuple[int, int]] = []
    for match in islice(HEADINGS[number].finditer(dx), MAX_MENTIONS):
        start, end = match.span()
        line = max(dx.rfind("\n", max(0, start - 16), start) + 1, start - 16, 0)
        before = dx[line:start]
        first_in_line = not before.strip(BEFORE_HEADING) and (line == 0 or dx[line - 1] == "\n")
        parenthesis = before.endswith("(")
        if not (first_in_line or parenthesis):
            continue
        if parenthesis:
            closed = dx.find(")", end, end + MAX_HEADING_CHARS)
            start, end = start - 1, end if closed < 0 or "\n" in dx[end:closed] else closed + 1
        spans.append((start, end))
        if len(spans) == 2:
            break
    return spans


def find_boxes(response: str) -> tuple[tuple[Box, ...], int]:
    """The first boxes of the response and how many there are in all."""
    count, boxes, at = response.count(BOX), [], 0
    for _ in range(min(count, MAX_BOXES)):
        start = response.find(BOX, at)
        at = start + len(BOX)
        text = read_braces(response, at)
        boxes.append(Box(text, start, at if text is None else at + len(text) + 2))
    return tuple(boxes), count


def read_braces(text: str, at: int, limit: int = MAX_BOX_CHARS) -> str | None:
    """The text between the brace at `at` and the one that closes it, None where that is missing or beyond `limit`."""
    if not text.startswith("{", at):
        return None
    depth = 0
    for offset, character in enumerate(text[at : at + limit]):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[at + 1 : at + offset]
    return None
