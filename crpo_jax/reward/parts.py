"""The parts that a design may sum besides whole designs and functions: each a value and the reason for it.

All but `length` are in [0, 1]. They read any tagged format (reward.tags) and any kind of answer.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.reward.answer import find_answer
from crpo_jax.reward.citation import cross_reference
from crpo_jax.reward.parse import find_boxes, split_systems, split_tags
from crpo_jax.reward.rules import Score, TokenIds, measure_accuracy, measure_consistency


@dataclass(frozen=True, slots=True)
class Reading:
    """A response taken apart once for all parts; `texts` are those between the tags, None where they cannot be told
    apart."""

    question: Question
    response: str
    settings: Reward
    token_ids: TokenIds | None
    effective: np.ndarray | None
    answer: str | None
    answer_why: str
    texts: tuple[str, ...] | None
    problems: list[str]


def accuracy(reading: Reading) -> tuple[float | None, Any]:
    """1 for the right answer wherever it stands in the response, which is for a format to say; None where the question
    has no right answer."""
    return measure_accuracy(reading.question, reading.answer, reading.settings), reading.answer_why


def tagged_format(reading: Reading) -> tuple[float, Any]:
    """1 where the response is the parts in reward.tags, each tag once, in order, none blank, and nothing outside."""
    blank = [
        f"{tag} is empty"
        for tag, text in zip(reading.settings.tags, reading.texts or (), strict=reading.texts is not None)
        if not text.strip()
    ]
    problems = reading.problems + blank
    return float(not problems), problems


def citation(reading: Reading) -> tuple[float, Any]:
    """1 where the last tagged part cross-references those before it, by the rule of the clinical design.

    Without headings of System 1 and System 2 all that is before the last part counts as System 2.
    """
    if reading.texts is None:
        return 0.0, {"failed": ["the tagged parts cannot be told apart"]}
    *analysis, conclusion = reading.texts
    before = "\n".join(analysis)
    system1, system2, _ = split_systems(before)
    boxes, count = find_boxes(conclusion)
    if count == 1:
        conclusion = f"{conclusion[: boxes[0].start]} {conclusion[boxes[0].end :]}"
    settings = reading.settings.cross_reference
    cited, why = cross_reference(reading.question, system1 or "", system2 or before, conclusion, settings)
    return float(cited), why


def consistency(reading: Reading) -> tuple[float, Any]:
    return measure_consistency(reading.response, reading.token_ids, reading.effective)


def length(reading: Reading) -> tuple[float | None, Any]:
    """0 up to reward.target_length tokens, from there linearly less, -1 from twice as many on; the stop token is not
    counted. None where the tokens are unknown."""
    if reading.token_ids is None:
        return None, "the tokens are unknown"
    tokens, target = len(reading.token_ids), reading.settings.target_length
    return min(0.0, max(-1.0, (target - tokens) / target)), {"tokens": tokens}


PARTS: dict[str, Callable[[Reading], tuple[float | None, Any]]] = {
    "accuracy": accuracy,
    "format": tagged_format,
    "citation": citation,
    "consistency": consistency,
    "length": length,
}

WHY = {"accuracy": "answer", "citation": "cross_reference"}
"""What the reason for a part is called in `Score.why`, as in the whole designs; others have the part's own name."""

DESCRIBING = ("accuracy", "consistency")
"""Parts that every score has for the logs, whether the design names them or not."""


def score_parts(
    question: Question,
    response: str,
    settings: Reward,
    token_ids: TokenIds | None,
    effective: np.ndarray | None,
    names: Collection[str],
) -> Score:
    """The named parts of the reward in `components`, before their weights, which `total` does not sum up yet."""
    answer, answer_why = find_answer(response, question, settings)
    texts, problems = split_tags(response, settings.tags)
    reading = Reading(question, response, settings, token_ids, effective, answer, answer_why, texts, problems)
    read = {name: part(reading) for name, part in PARTS.items() if name in names or name in DESCRIBING}
    values = {name: value for name, (value, _) in read.items()}
    why = {"cross_reference": None} | {WHY.get(name, name): reason for name, (_, reason) in read.items()}
    return Score(
        accuracy=values["accuracy"],
        format=values.get("format"),
        cross_reference=values.get("citation"),
        clinical_reasoning=0.0,
        consistency=values["consistency"] or 0.0,
        total=0.0,
        answer_found=answer,
        why=why,
        components={name: values[name] for name in PARTS if name in names},
    )
