"""A question with its right answer, and the division of questions by a hash of their ids: halves, held-out share. No
jax."""

import hashlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from crpo_jax.errors import InputError

LETTERS = string.ascii_uppercase

AnswerKind = Literal["choice", "number", "text", "none"]
"""What an answer is compared as: the letter of an option, a number, a text, or nothing: then reward functions judge."""

OTHER_HALF = {"first_half": "second_half", "second_half": "first_half", "auto": "first_half", "all": "all"}
"""The part that the cold start takes, by data.part, which RL trains on."""


@dataclass(frozen=True)
class Question:
    """A question and its right answer: of kind "choice", the letter of an option.

    `question` is the text without the options, and of a conversation its last turn; `turns` are the turns before it, as
    role and content. `aliases` are further right answers, for kind "text". `columns` keeps everything else the source
    had, for reward functions, prompts, tables by subject and the truth of the embedded world.
    """

    id: str
    question: str
    options: Mapping[str, str]
    answer: str
    source: str = ""
    split: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    kind: AnswerKind = "choice"
    aliases: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()


def hash_fraction(purpose: str, identity: str) -> float:
    """A number in [0, 1) that depends on the purpose and the id alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{identity}".encode()).digest()[:8], "big") / 2**64


def select_part(questions: Sequence[Question], part: str) -> list[Question]:
    """One half of the training split: `first_half` for the cold start, `second_half` for RL, or `all`; callers have
    resolved `auto` to one of these.

    A question's half follows from its id alone: neither the order nor the other questions can change it.
    """
    if part == "all":
        return list(questions)
    if part not in ("first_half", "second_half"):
        raise InputError(f"data.part: expected all, first_half or second_half, got {part!r}")
    return [question for question in questions if (hash_fraction("half", question.id) < 0.5) == (part == "first_half")]


def hold_out(questions: Sequence[Question], share: float) -> tuple[list[Question], list[Question]]:
    """The questions to train on and those held out, each in the given order: `share` of the distinct ids, at least one.

    The ids with the smallest hashes are held out, so that the order does not matter and all traces of a question stay
    on one side. The hash differs from that of `select_part`: a half has its fair share of held-out questions.
    """
    ranked = sorted({question.id for question in questions}, key=lambda id_: (hash_fraction("held out", id_), id_))
    count = min(max(round(share * len(ranked)), 1), len(ranked) - 1) if share > 0 and len(ranked) > 1 else 0
    held_out = set(ranked[:count])
    return (
        [question for question in questions if question.id not in held_out],
        [question for question in questions if question.id in held_out],
    )
