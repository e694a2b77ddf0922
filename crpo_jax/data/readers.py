"""Questions from the records of MedQA, MedMCQA, MedXpertQA, the project's own format, and lists in Python. No jax.

A reader returns every question of a split, or raises an InputError that names the file, the line and the field: a
question that is skipped or mended in silence changes a published number.
"""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from crpo_jax.config import Data
from crpo_jax.data.benchmarks import read_gsm8k, read_healthbench, read_math500, read_mmlu, read_pubmedqa
from crpo_jax.data.files import HUB_DATASETS, hub_records, load_records
from crpo_jax.data.question import LETTERS, AnswerKind, Question
from crpo_jax.data.record import Record, is_number, renamed
from crpo_jax.errors import InputError, brief

QUESTION_FIELDS = ("id", "question", "messages", "options", "answer", "answer_kind", "source", "split")
"""The project's own format; every other field becomes a column."""

OWN_SOURCES = ("file", "hub", "jsonl")
QUESTION_COLUMNS = {"math500": "problem", "healthbench": "prompt"}
"""The column with the question, of sources that do not call it so."""

CHOICES = "Answer Choices:"
MAX_DIFFERING_CHOICES = 2  # in MedXpertQA 3 of 2,455 questions repeat 1 or 2 of their choices in another wording


def read_questions(source: str, path: str = "", split: str = "train", data: Data | None = None) -> list[Question]:
    """Every question of a split, in the order of the file.

    `path` is a file (which is the split, whatever its name), a folder in which the split is found by name, or "" for
    the source's id on the hub; with source hub, an id there. `data` has the columns and answers of sources of one's
    own, and the named configuration. Ids are unique: the data's own, or where it has none `medqa-test-000012`, or a
    digest of question and options (`content_id`).
    """
    data = data or Data()
    if source not in READERS and source not in OWN_SOURCES:
        raise InputError(f"data.source: expected one of {', '.join((*READERS, *OWN_SOURCES))}, got {source!r}")
    name, config = HUB_DATASETS.get(source, ("", None))
    config = data.config or config
    if source == "hub":
        if not path:
            raise InputError("data.path: expected the id of a data set on the hub, got ''")
        records = hub_records(path, config, split)
    elif path:
        own = tuple(filter(None, (data.columns.question, data.columns.messages)))
        asked = own if source in OWN_SOURCES else (QUESTION_COLUMNS.get(source, "question"),)
        records = load_records(Path(path), source, split, config, [column.partition(".")[0] for column in asked])
    elif name:
        records = hub_records(name, config, split)
    else:
        raise InputError(f"data.path: expected a file or folder, since {source} has no hub id, got ''")
    if source in OWN_SOURCES:
        return check_ids(records, read_own(records, split, data, source))
    return check_ids(records, READERS[source](records, split))


def questions_from(rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Questions given in Python: mappings with question or messages, options if there are any, the answer, an id that
    may be missing, and any further columns."""
    records = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(
                f"questions[{number}]: expected a mapping with question, options and answer, got {brief(row)}"
            )
        records.append(Record(row, f"questions[{number}]"))
    return check_ids(records, read_own(records, ""))


def check_ids(records: Sequence[Record], questions: Iterable[Question]) -> list[Question]:
    """The questions of the records; an id that occurs twice is an error: samples, halves and resumed runs use it."""
    places: dict[str, str] = {}
    checked = []
    for record, question in zip(records, questions, strict=True):
        if question.id in places:
            record.fail("id", f"an id of its own (the same stands at {places[question.id]})", question.id)
        places[question.id] = record.where
        checked.append(question)
    return checked


def question_of(record: Record, split: str = "", data: Data | None = None, source: str = "jsonl") -> Question:
    """The question of a record in the project's own format; a source and split of its own are kept."""
    data = data or Data()
    record = renamed(record, dataclasses.asdict(data.columns))
    kind = answer_kind(record, data.answer)
    options = record.options() if kind == "choice" or record.has_options() else {}
    answers = read_answers_of(record, kind, options)
    *turns, (_, question) = (
        record.messages("messages") if record.has("messages") else [("user", record.text("question"))]
    )
    if turns and record.has("question") and record.text("question") != question:
        record.fail(
            "question", "the last message, or no such column (data.columns.question=)", record.value("question")
        )
    source = record.text("source") if record.has("source") else source
    split = record.text("split") if record.has("split") else split
    identity = record.identity("id", default=content_id(question, options, turns))
    columns = record.columns(*QUESTION_FIELDS)
    return Question(identity, question, options, answers[0], source, split, columns, kind, answers[1:], tuple(turns))


def answer_kind(record: Record, stated: str = "auto") -> AnswerKind:
    """What the record's answer is compared as: by its own `answer_kind`, by data.answer, or where that is auto by what
    the record has: options, a number, a text or several, or no answer."""
    own = record.fields.get("answer_kind")
    if own is not None:
        kinds = get_args(AnswerKind)
        return own if own in kinds else record.fail("answer_kind", f"one of {', '.join(kinds)}", own)
    if stated != "auto":
        return cast(AnswerKind, stated)
    if record.has_options():
        return "choice"
    if not record.has("answer"):
        return "none"
    return "number" if is_number(record.fields["answer"]) else "text"


def read_answers_of(record: Record, kind: AnswerKind, options: Mapping[str, str]) -> tuple[str, ...]:
    """The right answer, and for texts the others that are right as well. Without a right one a text is kept for the
    reward functions to read."""
    if kind == "choice":
        return (record.choice("answer", options),)
    if kind == "number":
        return (record.number("answer"),)
    if kind == "text":
        return record.texts("answer")
    value = record.fields.get("answer")
    return (record.text("answer") if isinstance(value, str) and value.strip() else "",)


def content_id(question: str, options: Mapping[str, str], turns: Sequence[tuple[str, str]] = ()) -> str:
    """The id of a question that has none: the same wherever it stands in whichever file."""
    content = json.dumps([question, dict(options), *([list(turns)] if turns else [])], sort_keys=True)
    return f"sha256-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def read_own(
    records: Sequence[Record], split: str, data: Data | None = None, source: str = "jsonl"
) -> Iterator[Question]:
    """The project's own format: question or messages, options if there are any, answer, an id that may be missing, and
    any further columns. Of equal questions without ids the second ends in -2, the third in -3.

    Where the kind of answer is told from the records, all have options and answers, or none: one that lacks them would
    be taken for a question of another kind.
    """
    data = data or Data()
    seen = collections.Counter[str]()
    first: tuple[Record, Question] | None = None
    for record in records:
        question = question_of(record, split, data, source)
        if data.answer == "auto" and not record.has("answer_kind"):
            first = first or (record, question)
            require_same_fields(record, question, *first)
        if not record.has(data.columns.id):
            seen[question.id] += 1
            if seen[question.id] > 1:
                question = dataclasses.replace(question, id=f"{question.id}-{seen[question.id]}")
        yield question


def require_same_fields(record: Record, question: Question, first: Record, like: Question) -> None:
    for name, given in (("options", "choice"), ("answer", "none")):
        if (question.kind == given) != (like.kind == given):
            raise InputError(
                f"{record.where}: {name}: expected {name} in all records or in none, got one unlike {first.where}; "
                "data.answer, or answer_kind in each record, says how to compare answers"
            )


# ---- MedQA and MedMCQA -----------------------------------------------------------------------------------------------


def read_medqa(records: Sequence[Record], split: str) -> Iterator[Question]:
    """MedQA: `options` by letter, the right one both as `answer_idx` (letter) and `answer` (text), which must agree."""
    for number, record in enumerate(records):
        options = record.options()
        answer = record.letter("answer_idx", options)
        check_answer_text(record, options, answer)
        identity = record.identity("id", default=f"medqa-{split}-{number:06d}")
        columns = record.columns("id", "question", "options", "answer", "answer_idx")
        yield Question(identity, record.text("question"), options, answer, "medqa", split, columns)


def check_answer_text(record: Record, options: Mapping[str, str], answer: str) -> None:
    if record.text("answer") != options[answer]:
        record.fail("answer", f"the text of option {answer}, {brief(options[answer])}", record.fields["answer"])


def read_medmcqa(records: Sequence[Record], split: str) -> Iterator[Question]:
    """MedMCQA: `opa` to `opd`, and `cop`, the position of the right one, from 0 or from 1 (see `first_position`)."""
    for record in records:
        cop = record.fields.get("cop")
        if cop == -1:
            record.fail("cop", "a right option (this split hides its answers; use train or validation)", cop)
        if not isinstance(cop, int) or isinstance(cop, bool) or not 0 <= cop <= 4:
            record.fail("cop", "a whole number from 0 to 4", cop)
    first = first_position(records)
    for record in records:
        options = {letter: record.text(f"op{letter.lower()}") for letter in "ABCD"}
        answer = LETTERS[record.fields["cop"] - first]
        columns = record.columns("id", "question", "cop", "opa", "opb", "opc", "opd")
        yield Question(record.identity("id"), record.text("question"), options, answer, "medmcqa", split, columns)


def first_position(records: Sequence[Record]) -> int:
    """What `cop` calls the first option: 0 in the hub's tables, 1 in the authors' JSON.

    Decided over the whole split: a schema that declares a class label counts from 0; otherwise any 0 means 0 and any 4
    means 1. Both, or neither, is refused: the wrong guess would move every answer by one and still train.
    """
    zero = next((record for record in records if record.fields["cop"] == 0), None)
    four = next((record for record in records if record.fields["cop"] == 4), None)
    is_label = records[0].zero_based
    if four and (zero or is_label):
        four.fail("cop", f"0 to 3 as {zero.where if zero else 'the class label of the schema'} says", 4)
    if zero or is_label:
        return 0
    if four:
        return 1
    raise InputError(
        f"{records[0].where}: cop: expected a 0 (counted from 0, as on the hub) or a 4 (counted from 1, as in the "
        "authors' JSON) somewhere in the split, got only 1 to 3, which does not tell the two apart; "
        "give the whole split, or convert it to source jsonl"
    )


# ---- MedXpertQA ------------------------------------------------------------------------------------------------------


def read_medxpertqa(records: Sequence[Record], split: str) -> Iterator[Question]:
    """MedXpertQA text: options A to J, `label`; the development items call it `answer_idx` and the id `realidx`.

    The question text repeats the choices; they are removed after a check that they are the options (`without_choices`).
    """
    for record in records:
        if record.fields.get("images"):
            record.fail("images", "a question of text alone (the MM part needs images)", record.fields["images"])
        options = record.options()
        answer = record.letter("label" if record.has("label") else "answer_idx", options)
        if record.has("label") and record.has("answer_idx") and record.letter("answer_idx", options) != answer:
            record.fail("answer_idx", f"{answer}, as label says", record.fields["answer_idx"])
        if record.has("answer"):
            check_answer_text(record, options, answer)
        question, differing = without_choices(record, options, answer)
        columns = record.columns("id", "realidx", "question", "options", "label", "answer_idx", "answer", "images")
        if differing:
            columns["differing_choices"] = differing
        yield Question(record.identity("id", "realidx"), question, options, answer, "medxpertqa", split, columns)


def without_choices(record: Record, options: Mapping[str, str], answer: str) -> tuple[str, dict[str, str]]:
    """The question without the choices at its end, and those choices that differ from the options, by letter.

    What is removed must be the options: the same letters in order, the right option word for word, and at most
    MAX_DIFFERING_CHOICES others in another wording.
    """
    text = record.text("question")
    stem, marker, tail = text.rpartition(CHOICES)
    if not marker:
        return text, {}
    stem = stem.strip()
    if not stem:
        record.fail("question", f"a question before {CHOICES!r}", text)
    if tail.split() == " ".join(f"({letter}) {option}" for letter, option in options.items()).split():
        return stem, {}
    marks = []
    for mark in re.finditer(r"(?:^|\s)\(([A-Z])\)(?=\s|$)", tail):
        # a choice may itself mention "(A)": only the next letter in order begins a choice
        if len(marks) < len(options) and mark[1] == LETTERS[len(marks)]:
            marks.append(mark)
    ends = [*(mark.start() for mark in marks[1:]), len(tail)]
    choices = {
        mark[1]: " ".join(tail[mark.end() : end].split()) for mark, end in zip(marks, ends[: len(marks)], strict=True)
    }
    differing = {letter: choice for letter, choice in choices.items() if choice != " ".join(options[letter].split())}
    if list(choices) != list(options) or tail[: marks[0].start()].strip():
        record.fail("question", f"the choices ({', '.join(options)}) after {CHOICES!r}", tail.strip())
    if answer in differing:
        expected = f"choice {answer}, the right one, as in the options, {brief(options[answer])}"
        record.fail("question", expected, differing[answer])
    if len(differing) > MAX_DIFFERING_CHOICES:
        expected = f"choices as in the options, at most {MAX_DIFFERING_CHOICES} in another wording"
        record.fail("question", expected, differing)
    return stem, differing


READERS: dict[str, Callable[[Sequence[Record], str], Iterator[Question]]] = {
    "medqa": read_medqa,
    "medmcqa": read_medmcqa,
    "medxpertqa": read_medxpertqa,
    "pubmedqa": read_pubmedqa,
    "mmlu": read_mmlu,
    "healthbench": read_healthbench,
    "gsm8k": read_gsm8k,
    "math500": read_math500,
}
"""The data sets in their published form."""
