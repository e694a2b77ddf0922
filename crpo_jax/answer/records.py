"""Responses to questions as files hold them, one JSON object per line; no jax."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crpo_jax.data.files import json_records
from crpo_jax.data.question import Question
from crpo_jax.data.readers import question_of
from crpo_jax.data.record import Record
from crpo_jax.errors import InputError, brief
from crpo_jax.reward.scorer import SCORE_FIELDS
from crpo_jax.store.files import read_object

SAMPLE_FIELDS = ("step", "sample", "prompt", "tokens", "stopped", "advantage", "trained")
"""What a run's samples.jsonl says of a response besides its question, its text and its score."""

RESPONSE_FIELDS = ("sample", "response", "token_ids", "tokens", "stopped")


@dataclass(frozen=True)
class Answer:
    """One response; `tokens` and `stopped` are None if the file does not have them."""

    question: Question
    sample: int
    response: str
    token_ids: Sequence[int] | None = None
    tokens: int | None = None
    stopped: bool | None = None


def question_to_row(question: Question) -> dict[str, Any]:
    """A question without its further columns, in the project's own format."""
    row: dict[str, Any] = {"id": question.id, "question": question.question}
    if question.turns:
        turns = (*question.turns, ("user", question.question))
        row["messages"] = [{"role": role, "content": content} for role, content in turns]
    if question.options:
        row["options"] = dict(question.options)
    row["answer"] = [question.answer, *question.aliases] if question.aliases else question.answer
    origin = {"answer_kind": question.kind, "source": question.source, "split": question.split}
    if question.kind == "choice":
        del origin["answer_kind"]
    return row | {name: value for name, value in origin.items() if value}


def question_digest(question: Question) -> str:
    """Tells whether two questions are the same to a model: their text, their options and the right answers."""
    content: list[Any] = [question.question, sorted(question.options.items()), question.answer]
    if question.kind != "choice" or question.turns:
        content += [question.kind, question.aliases, question.turns]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def answer_to_row(answer: Answer) -> dict[str, Any]:
    """A line of a responses file: the question with all its columns and the response; `crpo_jax.score` reads it too."""
    fields = {name: getattr(answer, name) for name in RESPONSE_FIELDS}
    return question_to_row(answer.question) | dict(answer.question.columns) | fields


def read_answers(path: str | Path, flag: str = "--responses") -> list[Answer]:
    """The responses of a file, ours or someone else's; samples without a number are numbered in the file's order."""
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: expected a file of responses, got none there")
    samples: Counter[str] = Counter()
    answers = []
    for record in json_records(Path(path)):
        answers.append(read_answer(record, samples))
        samples[answers[-1].question.id] += 1
    if not answers:
        raise InputError(f"{flag} {path}: expected at least one response, got an empty file")
    return answers


def read_summary(path: Path) -> dict[str, Any]:
    """The content of an evaluation's summary.json."""
    way_out = "delete it, and crpo_jax.evaluate --workdir writes it again"
    summary = read_object(path, "the summary of an evaluation", way_out)
    data = summary.get("data")
    if not isinstance(data, dict) or not all(isinstance(results, dict) for results in data.values()):
        raise InputError(f"{path}: data: expected results by data set, got {brief(data)}; {way_out}")
    return summary


def read_dropped(folder: Path) -> dict[str, Any]:
    """The ids of the questions that were too long, by data set, from dropped.json; none where there is no such file."""
    path, way_out = folder / "dropped.json", "delete it, and an evaluation with --model writes it again"
    dropped = read_object(path, "the questions that were dropped", way_out) if path.exists() else {}
    if not all(isinstance(ids, list | dict) for ids in dropped.values()):
        raise InputError(f"{path}: expected questions by data set, got {brief(dropped)}; {way_out}")
    return dropped


def sample_columns(record: Record) -> tuple[str, ...]:
    """The fields of a line of a run's samples.jsonl that belong to its response and its score. In the run a reward
    function got the columns of the question alone, so it gets no more from here."""
    of_run = record.fields.keys() >= {*SAMPLE_FIELDS}
    return (*SAMPLE_FIELDS, *SCORE_FIELDS, "error", "traceback") if of_run else ()


def read_answer(record: Record, samples: Mapping[str, int]) -> Answer:
    """A record's response; `samples` counts the responses to each question that stand before it."""
    question = question_of(record)
    no_columns = {*RESPONSE_FIELDS, *sample_columns(record)}
    columns = {name: value for name, value in question.columns.items() if name not in no_columns}
    sample, response, ids, tokens, stopped = map(record.fields.get, RESPONSE_FIELDS)
    if not isinstance(response, str):
        record.fail("response", "a text", response)
    if ids is not None and not (isinstance(ids, list) and all(isinstance(token, int) and token >= 0 for token in ids)):
        record.fail("token_ids", "a list of token ids", ids)
    if tokens is not None and not isinstance(tokens, int):
        record.fail("tokens", "a whole number", tokens)
    sample = sample if isinstance(sample, int) else samples.get(question.id, 0)
    return Answer(replace(question, columns=columns), sample, response, ids, tokens, stopped)
