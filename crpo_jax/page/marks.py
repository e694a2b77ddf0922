"""Which places of a question and a response the parts of a reward speak of, as spans of characters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from crpo_jax.reward.effective import NOT_EFFECTIVE, character_classes
from crpo_jax.reward.parse import Parsed, find_headings, parse_response
from crpo_jax.reward.terms import BREAK, TOKEN, term_of

MAX_REPEATS = 16  # of a tag, marked
MAX_TOKENS = 20_000  # of a text, searched for cited terms
MAX_DEPTH = 4  # of `why`, searched for spans


class Mark(NamedTuple):
    """A span of a text and what it is: `fact`, `cited`, `box`, `format`, `language`, `tag`, or a kind of the user's."""

    start: int
    end: int
    kind: str


class Token(NamedTuple):
    start: int
    end: int
    term: str


def find_marks(
    question: str, response: str, why: Mapping[str, Any], tags: tuple[str, str], *, systems: bool
) -> tuple[list[Mark], list[Mark]]:
    """The marks of a question and of a response; `tags` and `systems` are those of the format that the response was
    asked for (`parse_response`)."""
    parsed, dx_start = parse_response(response, tags, systems), response.find(f"<{tags[0]}>") + len(f"<{tags[0]}>")
    of_question, of_response = citation_marks(question, parsed, why.get("cross_reference"), dx_start)
    of_response += [Mark(box.start, box.end, "box") for box in parsed.boxes]
    of_response += tag_marks(response, tags)
    of_response += format_marks(response, parsed, tags, why.get("format"))
    of_response += language_marks(response)
    of_response += user_marks(why, response)
    return of_question, sorted(set(of_response))


# ---- citation --------------------------------------------------------------------------------------------------------


def read_tokens(text: str) -> list[Token]:
    """The words, numbers and punctuation that have a term, as `reward.terms` reads them."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a letter whose lower case is two characters stays as it is
        lowered = "".join(low if len(low := character.lower()) == 1 else character for character in text)
    matches = islice(TOKEN.finditer(lowered.replace("\u03bc", "\u00b5")), MAX_TOKENS)
    return [Token(match.start(), match.end(), term) for match in matches if (term := term_of(match[0]))]


def citation_marks(question: str, parsed: Parsed, citation: Any, dx_start: int) -> tuple[list[Mark], list[Mark]]:
    """The cited terms and whole case facts in the question and in the response, by the lists of
    `why.cross_reference`."""
    cited, facts = texts_in(citation, "cited"), texts_in(citation, "case_facts")
    if not (cited or facts) or parsed.dx is None or parsed.conclusion is None:
        return [], []
    conclusion = read_tokens(parsed.conclusion)
    facts = [fact_terms(conclusion, fact) for fact in facts]
    places = ((read_tokens(parsed.dx), dx_start), (conclusion, parsed.conclusion_start))
    of_response = [
        Mark(at + start, at + end, kind)
        for tokens, at in places
        for start, end, kind in cited_spans(tokens, cited, facts)
    ]
    return cited_spans(read_tokens(question), cited, facts), of_response


def texts_in(citation: Any, name: str) -> list[str]:
    """A list of `why.cross_reference`; empty where there is none."""
    values = citation.get(name) if isinstance(citation, Mapping) else None
    return [value for value in values if isinstance(value, str) and value] if isinstance(values, list) else []


def cited_spans(tokens: Sequence[Token], cited: Sequence[str], facts: Sequence[Sequence[str]]) -> list[Mark]:
    """The cited terms among these tokens, and the case facts: any two of a fact's terms that stand together."""
    pairs, single = (
        {pair for terms in facts for pair in pairwise(terms)},
        {terms[0] for terms in facts if len(terms) == 1},
    )
    terms = {*cited} - {BREAK}
    marks = [Mark(token.start, token.end, "cited") for token in tokens if token.term in terms]
    spans = [(token.start, token.end) for token in tokens if token.term in single]
    spans += [(first.start, last.end) for first, last in pairwise(tokens) if (first.term, last.term) in pairs]
    return marks + [Mark(*span, "fact") for span in merged(spans)]


def fact_terms(conclusion: Sequence[Token], fact: str) -> list[str]:
    """The terms of a case fact, which the reward has joined with blanks, although a number with its unit has one."""
    terms = [token.term for token in conclusion]
    for start in range(len(terms)):
        joined, end = terms[start], start + 1
        while end < len(terms) and fact.startswith(f"{joined} "):
            joined, end = f"{joined} {terms[end]}", end + 1
        if joined == fact:
            return terms[start:end]
    return [fact]


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans in order, overlapping ones as one."""
    whole: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(end, whole[-1][1]))
        else:
            whole.append((start, end))
    return whole


# ---- format and language ---------------------------------------------------------------------------------------------


def occurrences(text: str, part: str) -> list[int]:
    starts: list[int] = []
    at = text.find(part)
    while at >= 0 and len(starts) < MAX_REPEATS:
        starts.append(at)
        at = text.find(part, at + len(part))
    return starts


def tag_names(tags: tuple[str, str]) -> list[str]:
    return [name for tag in tags for name in (f"<{tag}>", f"</{tag}>")]


def tag_marks(response: str, tags: tuple[str, str]) -> Iterator[Mark]:
    """Every tag of the two parts; `format` where it stands more than once."""
    for name in tag_names(tags):
        starts = occurrences(response, name)
        for start in starts:
            yield Mark(start, start + len(name), "tag" if len(starts) == 1 else "format")


def format_marks(response: str, parsed: Parsed, tags: tuple[str, str], problems: Any) -> Iterator[Mark]:
    """What broke the format and has a place: text around the parts, headings too many, sections without content."""
    if not isinstance(problems, list) or not problems:
        return
    if parsed.dx is None or parsed.conclusion is None:
        return
    opened, closed, _, closed2 = (response.find(name) for name in tag_names(tags))
    dx, after_dx = opened + len(tags[0]) + 2, closed + len(tags[0]) + 3
    outside = ((0, opened), (after_dx, parsed.conclusion_start - len(tags[1]) - 2), (closed2 + len(tags[1]) + 3, None))
    for start, end in outside:
        text = response[start:end]
        if stripped := text.strip():
            at = start + text.find(stripped)
            yield Mark(at, at + len(stripped), "format")
    for number in (1, 2):
        headings = find_headings(parsed.dx, number)
        if len(headings) > 1 or "System 2 stands before System 1" in problems:
            yield from (Mark(dx + start, dx + end, "format") for start, end in headings)
    sections = {"System 1": parsed.system1, "System 2": parsed.system2, "the conclusion": parsed.conclusion}
    for name, text in sections.items():
        short = any(isinstance(problem, str) and problem.startswith(f"{name} has ") for problem in problems)
        if short and text and text.strip():
            start = response.find(text, parsed.conclusion_start if name == "the conclusion" else dx)
            yield Mark(start, start + len(text), "format")


def language_marks(text: str) -> Iterator[Mark]:
    """Runs of characters that are not effective, which cost consistency."""
    if not text or (text.isascii() and text.isprintable()):
        return
    codes = np.array([text]).view(np.uint32)
    flags = np.concatenate([[False], character_classes()[codes] == NOT_EFFECTIVE, [False]])
    edges = np.flatnonzero(flags[1:] != flags[:-1]).tolist()
    yield from (Mark(start, end, "language") for start, end in zip(edges[::2], edges[1::2], strict=True))


# ---- spans that a reward names itself --------------------------------------------------------------------------------


def user_marks(why: Any, response: str, depth: int = 0) -> Iterator[Mark]:
    """Spans anywhere in `why`: objects with start, end, kind, and the text there."""
    if depth > MAX_DEPTH:
        return
    if is_span(why):
        if why.get("text", response[why["start"] : why["end"]]) == response[why["start"] : why["end"]]:
            yield Mark(why["start"], why["end"], str(why.get("kind", "span"))[:40])
    elif isinstance(why, Mapping | list):
        for value in why.values() if isinstance(why, Mapping) else why:
            yield from user_marks(value, response, depth + 1)


def is_span(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and type(value.get("start")) is int
        and type(value.get("end")) is int
        and 0 <= value["start"] < value["end"]
    )


# ---- texts as browsers count them ------------------------------------------------------------------------------------


def clip(text: str, marks: Iterable[Mark], head: int, tail: int, most: int) -> tuple[str, list[Mark]]:
    """A text without the middle of a long one, which is said in its place, and the marks that are left, `most` of
    them."""
    left_out = len(text) - head - tail
    if left_out > 0:
        note = f"\n[… {left_out:,} characters are not shown …]\n"
        shift = head + len(note) - (len(text) - tail)
        remaining = [mark for mark in marks if mark.end <= head]
        remaining += [
            Mark(mark.start + shift, mark.end + shift, mark.kind) for mark in marks if mark.start >= len(text) - tail
        ]
        text, marks = text[:head] + note + text[len(text) - tail :], remaining
    return text, [mark for mark in marks if mark.end <= len(text)][:most]


def in_utf16(text: str, marks: Sequence[Mark]) -> list[tuple[int, int, str]]:
    """The marks with offsets in UTF-16 units, by which JavaScript counts."""
    if not marks or max(text) <= "\uffff":
        return [(mark.start, mark.end, mark.kind) for mark in marks]
    units = np.concatenate([[0], np.cumsum([1 + (character > "\uffff") for character in text])])
    return [(int(units[mark.start]), int(units[mark.end]), mark.kind) for mark in marks]
