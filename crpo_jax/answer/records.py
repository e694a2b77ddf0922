"""Responses to questions, as files hold them, and what can be said of them by counting: accuracy, votes, formats, lengths.

A mean over responses has a 95% interval over questions: Wilson's, with as many independent answers as the spread between
questions says there are (at least one per question, at most one per response). So several samples of one question narrow it
only as far as they differ, and a share of 0 or 1 still has a width.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from crpo_jax.answer.truth import EXACT, exact, knows
from crpo_jax.config import Config
from crpo_jax.data.files import json_records
from crpo_jax.data.question import Question
from crpo_jax.data.readers import question_of
from crpo_jax.data.record import Record
from crpo_jax.errors import InputError
from crpo_jax.reward.parse import parse_response
from crpo_jax.reward.rules import Score, find_answer
from crpo_jax.reward.scorer import Scored, Scorer

OWN = ("sample", "response", "token_ids", "tokens", "stopped")
Z = 1.959964  # of a 95% interval
FORMATS = (("dx", "conclusion"), ("think", "answer"))


@dataclass(frozen=True)
class Answer:
    """One response; `tokens` and `stopped` are None where whoever wrote the file did not say."""

    question: Question
    sample: int
    response: str
    token_ids: Sequence[int] | None = None
    tokens: int | None = None
    stopped: bool | None = None


def row_of(answer: Answer) -> dict[str, Any]:
    """A line of a responses file: the question with all its columns and the response; `crpo_jax.score` reads it too."""
    question = answer.question
    row = {
        "id": question.id,
        "question": question.question,
        "options": dict(question.options),
        "answer": question.answer,
    }
    row |= {name: value for name, value in (("source", question.source), ("split", question.split)) if value} | dict(
        question.columns
    )
    return row | {name: getattr(answer, name) for name in OWN}


def read_answers(path: str | Path, text: str = "--responses") -> list[Answer]:
    """The responses of a file, of ours or of someone else's; samples without a number are numbered as they come."""
    if not Path(path).is_file():
        raise InputError(f"{text} {path}: expected a file of responses, got none there")
    seen: Counter[str] = Counter()
    answers = []
    for record in json_records(Path(path)):
        answers.append(answer_of(record, seen))
        seen[answers[-1].question.id] += 1
    if not answers:
        raise InputError(f"{text} {path}: expected at least one response, got an empty file")
    return answers


def answer_of(record: Record, seen: Mapping[str, int]) -> Answer:
    whole = question_of(record)
    columns = {name: value for name, value in whole.columns.items() if name not in OWN}
    question = Question(whole.id, whole.question, whole.options, whole.answer, whole.source, whole.split, columns)
    response, ids, tokens = record.fields.get("response"), record.fields.get("token_ids"), record.fields.get("tokens")
    if not isinstance(response, str):
        record.fail("response", "a text", response)
    if ids is not None and not (isinstance(ids, list) and all(isinstance(one, int) and one >= 0 for one in ids)):
        record.fail("token_ids", "a list of token ids", ids)
    if tokens is not None and not isinstance(tokens, int):
        record.fail("tokens", "a whole number", tokens)
    sample = record.fields.get("sample")
    return Answer(
        question,
        sample if isinstance(sample, int) else seen.get(whole.id, 0),
        response,
        ids,
        tokens,
        record.fields.get("stopped"),
    )


def letter_of(answer: Answer, settings: Config) -> str | None:
    """The option that a response answers with: what its only box holds, where evaluate.answer wants it; None where that is no option."""
    question = answer.question
    if settings.evaluate.answer == "anywhere":
        box = parse_response(answer.response).box
        letter = box.text.strip() if box and box.text is not None else None
        return letter if letter in question.options else None
    for tags in dict.fromkeys((*FORMATS, tuple(settings.reward.grpo_tags))):
        parsed = parse_response(answer.response, tags, systems=False)
        if parsed.conclusion is not None:
            return find_answer(parsed, question, tags[1])[0]
    return None


def majority(letters: Sequence[str | None]) -> str | None:
    """The letter given most often; of several equally often, the one given first. No vote without a readable answer."""
    votes = Counter(letter for letter in letters if letter is not None)
    return (
        max(votes, key=lambda letter: votes[letter]) if votes else None
    )  # a Counter keeps the order of arrival, and max takes the first


def share(by_question: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and 95% interval of numbers in [0, 1], given question by question; every question weighs the same."""
    means = np.array([np.mean(values) for values in by_question])
    questions, responses = len(by_question), sum(map(len, by_question))
    mean = float(means.mean())
    variance = float(means.var(ddof=1)) / questions if questions > 1 else 0.0
    n = questions
    if 0 < mean < 1:
        n = responses if variance == 0 else min(max(mean * (1 - mean) / variance, questions), responses)
    middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return {"mean": mean, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def count(by_question: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean and 95% interval of counts, by the normal approximation over questions."""
    means = np.array([np.mean(values) for values in by_question])
    half = Z * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    mean = float(means.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half}


def grouped(answers: Sequence[Answer]) -> list[list[int]]:
    """The positions of each question's responses, samples in order."""
    found: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        found.setdefault(answer.question.id, []).append(index)
    return [sorted(indices, key=lambda index: answers[index].sample) for indices in found.values()]


def scored(answers: Sequence[Answer], settings: Config, effective: np.ndarray | None) -> tuple[list[Scored], str]:
    """Scores under the `crpo` reward, which all designs are compared by, and whether consistency is by tokens or characters."""
    by_tokens = effective is not None and all(answer.token_ids is not None for answer in answers)
    ids = [answer.token_ids or [] for answer in answers] if by_tokens else None
    with Scorer(
        replace(settings.reward, design="crpo", max_failed_share=1.0), effective if by_tokens else None
    ) as scorer:
        return scorer.score([answer.question for answer in answers], [answer.response for answer in answers], ids), (
            "tokens" if by_tokens else "characters"
        )


def summary(answers: Sequence[Answer], settings: Config, effective: np.ndarray | None = None) -> dict[str, Any]:
    """All that counting says of a data set's responses; plain values, as summary.json holds them."""
    groups = grouped(answers)
    letters = [letter_of(answer, settings) for answer in answers]
    right = [letter == answer.question.answer for letter, answer in zip(letters, answers, strict=True)]
    voted = [majority([letters[index] for index in group]) == answers[group[0]].question.answer for group in groups]
    scores, by = scored(answers, settings, effective)
    good = [index for index, score in enumerate(scores) if isinstance(score, Score)]

    def each(values: Sequence[float]) -> list[list[float]]:
        return [[float(values[index]) for index in group] for group in groups]

    def component(name: str) -> dict[str, float]:
        of = {index: float(getattr(scores[index], name)) for index in good}
        rows = [[of[index] for index in group if index in of] for group in groups]
        return (count if name == "total" else share)([row for row in rows if row])

    found: dict[str, Any] = {
        "questions": len(groups),
        "samples": max(map(len, groups)),
        "responses": len(answers),
        "accuracy": share(each(right)),
        "valid": share(each([letter is not None for letter in letters])),
        "majority": share([[float(vote)] for vote in voted]),
        "unscored": len(answers) - len(good),
    }
    if good:
        found |= {name: component(name) for name in ("format", "cross_reference", "consistency")}
        found |= {"consistency_by": by, "reward": component("total"), "reward_of": settings.reward.k + 2}
    found["length"] = lengths(answers)
    found["subjects"] = subjects(answers, groups, right, settings)
    if all(knows(answers[group[0]].question) for group in groups):
        measured = [exact(answer.question, answer.response) for answer in answers]
        found["exact"] = {name: count(each([one[name] for one in measured])) for name in EXACT}
    return found


def lengths(answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens, where the file has them, else words; and how many were cut off."""
    sizes, unit = [answer.tokens for answer in answers if answer.tokens is not None], "tokens"
    if len(sizes) < len(answers):
        sizes, unit = [len(answer.response.split()) for answer in answers], "words"
    cut = [not answer.stopped for answer in answers if answer.stopped is not None]
    return {
        "unit": unit,
        "mean": statistics.fmean(sizes),
        "median": statistics.median(sizes),
        "p95": float(np.quantile(sizes, 0.95)),
        "truncated": statistics.fmean(cut) if cut else None,
    }


def subjects(
    answers: Sequence[Answer], groups: Sequence[Sequence[int]], right: Sequence[bool], settings: Config
) -> dict[str, Any]:
    """Accuracy by each column of evaluate.subjects that the questions have, the largest subjects first."""
    tables: dict[str, Any] = {}
    for column in settings.evaluate.subjects:
        of: dict[str, list[list[float]]] = {}
        for group in groups:
            value = answers[group[0]].question.columns.get(column)
            if value is not None:
                of.setdefault(str(value), []).append([float(right[index]) for index in group])
        if of:
            ranked = sorted(of.items(), key=lambda item: (-len(item[1]), item[0]))
            tables[column] = {value: {"questions": len(rows), "accuracy": share(rows)} for value, rows in ranked}
    return tables
