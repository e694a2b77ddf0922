"""What a response earns under the designs `crpo`, `grpo` and `released`, and why.

    total = k * accuracy + clinical_reasoning + consistency_weight * consistency

with the last term in `crpo` and `released` only. The weights and thresholds are the settings `reward.*`.
"""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward.answer import find_answer, is_right
from crpo_jax.reward.citation import cross_reference
from crpo_jax.reward.effective import effective_characters
from crpo_jax.reward.parse import BOX, Parsed, parse_response
from crpo_jax.reward.terms import FRAME, PUNCTUATION, TOKEN

TokenIds = Sequence[int] | np.ndarray

MAX_SECTION_TOKENS = 1000  # a part that repeats itself for longer than this has no content


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one response by parts; `components` holds the value of each reward that the total sums up.

    `format` and `cross_reference` are 0 or 1, each None where the design does not measure it. `consistency` is in
    [0, 1], and so is `accuracy` except in `released`, whose penalties are negative; it is None, and no part of the
    total, where the question has no right answer.
    `answer_found` is what the response answers with, None where it has no readable answer. `why` explains every part
    and can be written as JSON.
    """

    accuracy: float | None
    format: float | None
    cross_reference: float | None
    clinical_reasoning: float
    consistency: float
    total: float
    answer_found: str | None
    why: dict[str, Any]
    components: dict[str, float | None] = field(default_factory=dict)


def score_response(
    question: Question,
    response: str,
    settings: Reward,
    token_ids: TokenIds | None = None,
    effective: np.ndarray | None = None,
) -> Score:
    """The score of `response` under `settings.design`, one of DESIGNS.

    `token_ids` are the response's tokens without the one that ended it, `effective` the table of
    `effective.effective_table`; without either, consistency is the share of effective characters.
    """
    if settings.design not in DESIGNS:
        raise InputError(f"reward.design: expected one of {', '.join(DESIGNS)}, got {settings.design!r}")
    return DESIGNS[settings.design](question, response, settings, token_ids, effective)


def score_crpo(
    question: Question, response: str, settings: Reward, token_ids: TokenIds | None, effective: np.ndarray | None
) -> Score:
    """The paper's reward, equation (4); a cross-reference counts only where the format is right."""
    parsed = parse_response(response)
    answer, answer_why = find_answer(response, question, settings, parsed)
    conclusion = parsed.conclusion_without_box()
    problems = [*parsed.problems, *short_sections(parsed, conclusion, settings.min_section_words)]
    cited, citation_why = False, None
    if not problems and parsed.system1 is not None and parsed.system2 is not None:
        cited, citation_why = cross_reference(
            question, parsed.system1, parsed.system2, conclusion, settings.cross_reference
        )
    share, consistency_why = measure_consistency(response, token_ids, effective)

    accuracy, formatted = measure_accuracy(question, answer, settings), float(not problems)
    clinical_reasoning = settings.format * formatted + settings.citation * cited
    total = settings.k * (accuracy or 0.0) + clinical_reasoning + settings.consistency * share
    why = {"answer": answer_why, "format": problems, "cross_reference": citation_why, "consistency": consistency_why}
    return Score(accuracy, formatted, float(cited), clinical_reasoning, share, total, answer, why, {"crpo": total})


def score_grpo(
    question: Question, response: str, settings: Reward, token_ids: TokenIds | None, effective: np.ndarray | None
) -> Score:
    """The paper's baseline: accuracy and a general format of two tagged parts, neither of them blank.

    Consistency is reported, so that runs can be compared, but is not part of the total.
    """
    parsed = parse_response(response, settings.tags, systems=False)
    answer, answer_why = find_answer(response, question, settings, parsed, settings.tags[1])
    problems = list(parsed.problems)
    for name, text in zip(settings.tags, (parsed.dx, parsed.conclusion), strict=True):
        if text is not None and not text.strip():
            problems.append(f"{name} is empty")
    share, consistency_why = measure_consistency(response, token_ids, effective)

    accuracy, formatted = measure_accuracy(question, answer, settings), float(not problems)
    clinical_reasoning = settings.format * formatted
    total = settings.k * (accuracy or 0.0) + clinical_reasoning
    why = {"answer": answer_why, "format": problems, "cross_reference": None, "consistency": consistency_why}
    return Score(accuracy, formatted, None, clinical_reasoning, share, total, answer, why, {"grpo": total})


def measure_accuracy(question: Question, answer: str | None, settings: Reward) -> float | None:
    return None if question.kind == "none" else float(is_right(question, answer, settings))


def short_sections(parsed: Parsed, conclusion: str, min_words: int) -> list[str]:
    """The parts with fewer than `min_words` distinct words; the prompt's own frame and the box do not count."""
    parts = {
        "System 1": parsed.system1,
        "System 2": parsed.system2,
        "the conclusion": None if parsed.conclusion is None else conclusion,
    }
    counts = {name: count_words(text, min_words) for name, text in parts.items() if text is not None}
    return [f"{name} has {n} distinct words, {min_words} needed" for name, n in counts.items() if n < min_words]


def count_words(text: str, enough: int) -> int:
    """How many distinct words a part has, counted up to `enough` and among its first MAX_SECTION_TOKENS."""
    words: set[str] = set()
    for match in islice(TOKEN.finditer(text), MAX_SECTION_TOKENS):
        word = match[0].lower()
        if word not in PUNCTUATION and word not in FRAME:
            words.add(word)
            if len(words) >= enough:
                break
    return len(words)


def measure_consistency(
    response: str, token_ids: TokenIds | None, effective: np.ndarray | None
) -> tuple[float, dict[str, Any]]:
    """The share of effective tokens, or of characters where tokens are unknown; 0 for an empty response."""
    if token_ids is not None and effective is not None:
        ids = np.asarray(token_ids, np.int64)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(effective):
            raise ValueError(
                f"token_ids: expected ids from 0 to {len(effective) - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        by, count, of = "tokens", int(np.count_nonzero(effective[ids])), int(ids.size)
    else:
        by, (count, of) = "characters", effective_characters(response)
    return count / of if of else 0.0, {"by": by, "effective": count, "of": of}


# ---- the authors' published code -------------------------------------------------------------------------------------

RELEASED_CHARACTERS = (string.ascii_letters + string.digits + ".,!?;:'\"()[]{}<>-_/\\|`~@#$%^&*+= \n").encode()
RELEASED_TITLE = "## Final Response"
RELEASED_TURN = re.compile(r"</think>\s*<answer>")


def score_released(
    question: Question, response: str, settings: Reward, token_ids: TokenIds | None, effective: np.ndarray | None
) -> Score:
    """What the authors' published code scores (verl/utils/reward_score/medical_rule_based.py), in linear time.

    Its oddities are preserved: nothing before a title "## Final Response" is read; a response without a box scores 0
    and so more than one with an unreadable box; with n > 1 boxes accuracy is -n; the format looks at the outermost tags
    only. `accuracy` holds these penalties, `consistency` the share of plain ASCII characters, with blank and newline as
    the only white space among them.
    """
    require_choices(settings, [question])
    text = response.strip().replace("<\\think>", "</think>").replace("<\\answer>", "</answer>")
    if RELEASED_TITLE in text:
        text = text.split(RELEASED_TITLE, 2)[1].strip()
    answer, (accuracy, answer_why) = None, released_accuracy(text, question.answer)
    if accuracy >= 0 and BOX in text:
        answer = text[text.find(BOX) + len(BOX) + 1 :].split("}", 1)[0]

    problems, summary, turn = ["expected <think>...</think> <answer>...</answer> and nothing else"], False, None
    if text.startswith("<think>") and text.endswith("</answer>"):
        turn = RELEASED_TURN.search(text, len("<think>"))
    if turn is not None and turn.end() <= len(text) - len("</answer>"):
        problems, summary = [], released_summary(text[turn.end() : -len("</answer>")].strip())
    plain = text.encode("ascii", "ignore")
    count = len(plain) - len(plain.translate(None, RELEASED_CHARACTERS))
    share = count / len(text) if text else 0.0

    formatted = float(not problems)
    clinical_reasoning = settings.format * formatted + settings.citation * summary
    total = settings.k * accuracy + clinical_reasoning + settings.consistency * share
    why = {
        "answer": answer_why,
        "format": problems,
        "cross_reference": None,
        "summary": summary,
        "consistency": {"by": "ASCII characters", "effective": count, "of": len(text)},
    }
    return Score(accuracy, formatted, None, clinical_reasoning, share, total, answer, why, {"released": total})


def require_choices(settings: Reward, questions: Sequence[Question]) -> None:
    """InputError where the design names the published code and a question is one that it cannot score."""
    if "released" not in re.split(r"[\s+*]+", settings.design):
        return
    for question in questions:
        if question.kind != "choice":
            raise InputError(
                f"reward.design: expected questions with options for released, got question {question.id} with an "
                f"answer of kind {question.kind}"
            )


def released_accuracy(text: str, right: str) -> tuple[float, str]:
    count = text.count(BOX)
    if count != 1:
        return float(-count), f"{count} boxes: minus their number"
    start = text.find(BOX + "{")
    end = text.find("}", start) if start >= 0 else -1
    line_end = text.find("\n", start) if start >= 0 else -1
    if end < 0 or 0 <= line_end < end:
        return -1.0, "an unreadable box"
    letter = text[start + len(BOX) + 1 : end]
    if len(letter) != 1 or not "A" <= letter <= "Z":
        return -0.5, f"a box with {letter[:40]!r}, no letter"
    return float(letter == right), "right" if letter == right else f"wrong: {right} is right"


def released_summary(answer: str) -> bool:
    """Whether an answer part holds one readable box and text besides."""
    if answer.count(BOX) > MAX_SECTION_TOKENS:
        return False  # the published code would read them all
    boxes, at = [], 0
    while len(boxes) < 2 and (start := answer.find(BOX + "{", at)) >= 0 and (end := answer.find("}", start)) >= 0:
        line_start = answer.rfind("\n", start, end) + 1  # a box does not span lines
        start = answer.find(BOX + "{", max(start, line_start), end)
        if start >= 0:
            boxes.append(answer[start : end + 1])
        at = end + 1
    return len(boxes) == 1 and boxes[0] != answer


DESIGNS: dict[str, Callable[[Question, str, Reward, TokenIds | None, np.ndarray | None], Score]] = {
    "crpo": score_crpo,
    "grpo": score_grpo,
    "released": score_released,
}
