"""The record of one multiple-choice question, whatever it came from, and the readers of MedQA, MedMCQA, MedXpertQA and JSON lines. No jax.

A reader either returns every record of a split or raises an InputError that names the file, the line, the field, what
was expected and what stood there: a question that is skipped or mended in silence changes a published number.
"""

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from crpo_jax.errors import InputError


@dataclass(frozen=True)
class Question:
    """A question with its options by letter and the letter of the right one.

    `question` is the text without the options; `columns` keeps everything else the source had, for plug-in rewards,
    per-subject tables and the embedded world's truth.
    """

    id: str
    question: str
    options: Mapping[str, str]
    answer: str
    source: str = ""
    split: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


class HasId(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=HasId)

LETTERS = string.ascii_uppercase
HUB: dict[str, tuple[str, str | None]] = {  # published id and configuration
    "medqa": ("GBaker/MedQA-USMLE-4-options", None),
    "medmcqa": ("openlifescienceai/medmcqa", None),
    "medxpertqa": ("TsinghuaC3I/MedXpertQA", "Text"),
}
VALIDATION = (
    "dev",
    "validation",
    "val",
    "valid",
)  # one split, four spellings: MedXpertQA says dev, MedMCQA's hub validation
SUFFIXES = (".json", ".jsonl", ".parquet")
CHOICES = "Answer Choices:"
MAX_DIFFERING_CHOICES = (
    2  # MedXpertQA's own errata: 3 of its 2,455 records differ from their repeated choices in 1 or 2 places
)


# ---- reading ----------------------------------------------------------------------------------------------------------


def read(source: str, path: str = "", split: str = "train") -> list[Question]:
    """Every question of a split, in the order of the file.

    `path` is a file (which is the split, whatever its name), a folder in which the split is found by name, or "" for
    the source's published hub id. Ids are unique: the data's own, or `medqa-test-000012` where it has none.
    """
    if source not in READERS:
        raise InputError(f"data.source: expected one of {', '.join(READERS)}, got {source!r}")
    if path:
        records = records_of(Path(path), source, split)
    elif source in HUB:
        records = hub_records(*HUB[source], split)
    else:
        raise InputError(f"data.path: expected a file or folder, since {source} has no hub id, got ''")
    return unique(READERS[source](records, split))


@dataclass(frozen=True)
class Record:
    """A raw record and where it stands: `file:line`, or `file: row n` of a table."""

    fields: Mapping[str, Any]
    where: str
    table: bool = False  # from columns, where a struct's missing member is None
    zero_based: bool = False  # the schema itself says that `cop` is a class label, which counts from 0

    def fail(self, name: str, expected: str, got: Any) -> NoReturn:
        raise InputError(f"{self.where}: {name}: expected {expected}, got {shortened(got)}")

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def text(self, name: str) -> str:
        """The field's text without surrounding white space."""
        if name not in self.fields:
            self.fail(name, f"such a field among {', '.join(self.fields) or 'none'}", None)
        return self.checked(name, self.fields[name])

    def checked(self, name: str, value: Any) -> str:
        """The text without surrounding white space; empty text and lone surrogates, which no tokenizer takes, are errors."""
        if not isinstance(value, str):
            self.fail(name, "a text", value)
        if any("\ud800" <= character <= "\udfff" for character in value):
            self.fail(name, "text that UTF-8 can write", value.encode("ascii", "backslashreplace").decode())
        stripped = value.strip()
        if not stripped:
            self.fail(name, "a text that is not empty", value)
        return stripped

    def identity(self, *names: str, default: str = "") -> str:
        """The first id field the record has; `default` where it has none."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if value is not None:
                return self.text(name)
        return default or self.text(names[0])

    def options(self, name: str) -> dict[str, str]:
        """Options by letter, A, B, ... without a gap."""
        value = self.fields.get(name)
        if not isinstance(value, Mapping):
            self.fail(name, "an object of texts by letter", value)
        if self.table:  # the columns are the letters of the longest record
            value = {letter: text for letter, text in value.items() if text is not None}
        letters = sorted(value)
        if not 2 <= len(letters) <= len(LETTERS) or letters != list(LETTERS[: len(letters)]):
            self.fail(name, "letters A, B, ... without a gap, at least two", ", ".join(letters) or "none")
        return {letter: self.checked(f"{name}.{letter}", value[letter]) for letter in letters}

    def letter(self, name: str, options: Mapping[str, str]) -> str:
        value = self.text(name)
        if value not in options:
            self.fail(name, f"a letter among {', '.join(options)}", value)
        return value

    def rest(self, *used: str) -> dict[str, Any]:
        return {name: value for name, value in self.fields.items() if name not in used}


def shortened(value: Any, limit: int = 80) -> str:
    shown = repr(value)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def unique(pairs: Iterable[tuple[Record, Question]]) -> list[Question]:
    """The questions; an id that occurs twice is an error, because samples, halves and resumed runs are keyed by it."""
    seen: dict[str, str] = {}
    questions = []
    for record, question in pairs:
        if question.id in seen:
            record.fail("id", f"an id of its own (the same stands at {seen[question.id]})", question.id)
        seen[question.id] = record.where
        questions.append(question)
    return questions


# ---- one reader per source --------------------------------------------------------------------------------------------


def medqa(records: list[Record], split: str) -> Iterator[tuple[Record, Question]]:
    """MedQA: `options` by letter, the right one both as `answer_idx` (letter) and `answer` (text), which must agree."""
    for number, record in enumerate(records):
        options = record.options("options")
        answer = record.letter("answer_idx", options)
        if record.text("answer") != options[answer]:
            record.fail("answer", f"the text of option {answer}, {shortened(options[answer])}", record.fields["answer"])
        identity = record.identity("id", default=f"medqa-{split}-{number:06d}")
        columns = record.rest("id", "question", "options", "answer", "answer_idx")
        yield record, Question(identity, record.text("question"), options, answer, "medqa", split, columns)


def medmcqa(records: list[Record], split: str) -> Iterator[tuple[Record, Question]]:
    """MedMCQA: `opa` to `opd`, and `cop`, the position of the right one, counted from 0 or from 1 (see `first_position`)."""
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
        columns = record.rest("id", "question", "cop", "opa", "opb", "opc", "opd")
        yield (
            record,
            Question(record.identity("id"), record.text("question"), options, answer, "medmcqa", split, columns),
        )


def first_position(records: Sequence[Record]) -> int:
    """What `cop` calls the first option: 0 in the hub's tables, 1 in the authors' JSON.

    Decided over the whole split: a schema that declares a class label counts from 0; otherwise a 0 somewhere means 0 and
    a 4 means 1. Both, or neither, is refused: the wrong guess would move every answer by one and still train.
    """
    zero = next((record for record in records if record.fields["cop"] == 0), None)
    four = next((record for record in records if record.fields["cop"] == 4), None)
    labelled = records[0].zero_based
    if four and (zero or labelled):
        four.fail("cop", f"0 to 3 as {zero.where if zero else 'the class label of the schema'} says", 4)
    if zero or labelled:
        return 0
    if four:
        return 1
    raise InputError(
        f"{records[0].where}: cop: expected a 0 (counted from 0, as on the hub) or a 4 (counted from 1, as in the authors' JSON) somewhere in "
        "the split, got only 1 to 3, which does not tell the two apart; give the whole split, or convert it to source jsonl"
    )


def medxpertqa(records: list[Record], split: str) -> Iterator[tuple[Record, Question]]:
    """MedXpertQA text: options A to J, `label`; the development items call it `answer_idx` and the id `realidx`.

    The question text repeats the choices; they are taken out after a check that they are the options (`without_choices`).
    """
    for record in records:
        if record.fields.get("images"):
            record.fail("images", "a question of text alone (the MM part needs images)", record.fields["images"])
        options = record.options("options")
        answer = record.letter("label" if record.has("label") else "answer_idx", options)
        if record.has("label") and record.has("answer_idx") and record.letter("answer_idx", options) != answer:
            record.fail("answer_idx", f"{answer}, as label says", record.fields["answer_idx"])
        if record.has("answer") and record.text("answer") != options[answer]:
            record.fail("answer", f"the text of option {answer}, {shortened(options[answer])}", record.fields["answer"])
        question, differing = without_choices(record, options, answer)
        columns = record.rest("id", "realidx", "question", "options", "label", "answer_idx", "answer", "images")
        if differing:
            columns["differing_choices"] = differing
        yield (
            record,
            Question(record.identity("id", "realidx"), question, options, answer, "medxpertqa", split, columns),
        )


def without_choices(record: Record, options: Mapping[str, str], answer: str) -> tuple[str, dict[str, str]]:
    """The question without the choices at its end, and those choices that differ from the options, by letter.

    What is taken out must be the options: the same letters in order, the right option word for word, and at most
    MAX_DIFFERING_CHOICES others in another wording.
    """
    text = record.text("question")
    stem, marker, tail = text.rpartition(CHOICES)
    if not marker:
        return text, {}
    stem, written = stem.strip(), tail.split()
    if not stem:
        record.fail("question", f"a question before {CHOICES!r}", text)
    if written == " ".join(f"({letter}) {option}" for letter, option in options.items()).split():
        return stem, {}
    found: dict[str, str] = {}
    starts = []
    for mark in re.finditer(
        r"(?:^|\s)\(([A-Z])\)(?=\s|$)", tail
    ):  # a choice may itself speak of "(A)": only the next letter in order opens a choice
        if len(starts) < len(options) and mark[1] == LETTERS[len(starts)]:
            starts.append(mark)
    for mark, following in zip(starts, [*starts[1:], None], strict=True):
        found[mark[1]] = " ".join(tail[mark.end() : following.start() if following else None].split())
    differing = {letter: choice for letter, choice in found.items() if choice != " ".join(options[letter].split())}
    if list(found) != list(options) or tail[: starts[0].start()].strip():
        record.fail("question", f"the choices ({', '.join(options)}) after {CHOICES!r}", tail.strip())
    if answer in differing:
        record.fail(
            "question",
            f"choice {answer}, the right one, as in the options, {shortened(options[answer])}",
            differing[answer],
        )
    if len(differing) > MAX_DIFFERING_CHOICES:
        record.fail(
            "question", f"choices as in the options, at most {MAX_DIFFERING_CHOICES} in another wording", differing
        )
    return stem, differing


def jsonl(records: list[Record], split: str) -> Iterator[tuple[Record, Question]]:
    """The project's own format: id, question, options, answer (a letter), and any further columns."""
    for record in records:
        yield record, from_record(record, split)


def from_record(record: Record, split: str = "") -> Question:
    """One record of the project's own format; a source and split of its own are kept."""
    options = record.options("options")
    answer = record.letter("answer", options)
    source = record.text("source") if record.has("source") else "jsonl"
    split = record.text("split") if record.has("split") else split
    return Question(record.identity("id"), record.text("question"), options, answer, source, split, record.rest(*OWN))


OWN = ("id", "question", "options", "answer", "source", "split")
READERS: dict[str, Callable[[list[Record], str], Iterator[tuple[Record, Question]]]] = {
    "medqa": medqa,
    "medmcqa": medmcqa,
    "medxpertqa": medxpertqa,
    "jsonl": jsonl,
}


# ---- files and folders ------------------------------------------------------------------------------------------------


def records_of(path: Path, source: str, split: str) -> list[Record]:
    """Every record of a file, or of the split's files in a folder; none at all is an error."""
    if not path.exists():
        raise InputError(f"{path}: expected a file or folder with {source} questions, got no such path")
    files = [path] if path.is_file() else split_files(path, source, split)
    records: list[Record] = []
    for file in files:
        if file.suffix not in SUFFIXES:
            raise InputError(
                f"{file}: expected a file ending in {', '.join(SUFFIXES)}, got {file.suffix or 'no ending'}"
            )
        try:
            found = table_records(file) if file.suffix == ".parquet" else json_records(file)
        except OSError as error:
            raise InputError(f"{file}: expected a readable file, got {error.strerror or error}") from None
        if not found:
            raise InputError(f"{file}: expected at least one record, got an empty file")
        records += found
    return records


def spellings(split: str) -> tuple[str, ...]:
    return (split, *(name for name in VALIDATION if name != split)) if split in VALIDATION else (split,)


def split_files(folder: Path, source: str, split: str) -> list[Path]:
    """The split's file in a folder laid out as on the hub, or all its shards in order.

    The split is a word of the file's name (`phrases_no_exclude_test.jsonl`, `data/train-00000-of-00002.parquet`) or a
    folder's whole name (`Text/test/0000.parquet`). Two candidates that are not shards of each other are refused.
    """
    names = spellings(split)
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    config = HUB[source][1] if source in HUB else None
    if config and any(
        config in path.relative_to(folder).parts[:-1] for path in files
    ):  # MedXpertQA's other part has the same file names
        files = [path for path in files if config in path.relative_to(folder).parts[:-1]]
    chosen = [path for path in files if set(re.split(r"[^a-z0-9]+", path.stem.lower())) & set(names)]
    chosen = chosen or [path for path in files if set(path.relative_to(folder).parts[:-1]) & set(names)]
    if not chosen:
        listed = ", ".join(str(path.relative_to(folder)) for path in files[:8]) or f"no {', '.join(SUFFIXES)} file"
        raise InputError(f"{folder}: expected a file of split {' or '.join(names)}, got {listed}")
    families = {(path.parent, re.sub(r"(^|[-_.])\d+(-of-\d+)?$", "", path.stem), path.suffix) for path in chosen}
    if len(families) > 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in chosen[:8])
        raise InputError(
            f"{folder}: expected one file of split {split}, or the shards of one, got {listed}; name the file or its folder"
        )
    for path in chosen:
        total = re.search(r"-of-(\d+)$", path.stem)
        if total and int(total[1]) != len(chosen):
            raise InputError(f"{folder}: expected all {int(total[1])} shards of split {split}, got {len(chosen)}")
    return chosen


def json_records(path: Path) -> list[Record]:
    """Records of a JSON file, an array of objects or an object a line: the ending does not tell, MedMCQA's .json holds lines."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        return array_records(path, decoded(data, f"{path}:"))
    records = []
    for number, line in enumerate(
        data.split(b"\n"), start=1
    ):  # str.splitlines would also cut at the U+2028 inside a text
        if line.strip():
            where = f"{path}:{number}"
            text = decoded(line, f"{where}:")
            try:
                value = DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{where}: expected one JSON object a line, got {json_fault(error)} in {shortened(text.strip())}"
                ) from None
            records.append(record_at(value, where))
    return records


def array_records(path: Path, text: str) -> list[Record]:
    """Records of a JSON array, each with the line it starts on."""
    records = []
    position = text.index("[") + 1
    line, counted = 1, 0
    space = re.compile(r"[ \t\r\n]*")

    def skipped(at: int) -> int:
        found = space.match(text, at)
        return found.end() if found else at

    position = skipped(position)
    closed = text[position : position + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected a JSON object in the array, got {json_fault(error)}") from None
        records.append(record_at(value, where))
        position = skipped(position)
        mark = text[position : position + 1]
        if mark not in (",", "]") or not mark:
            raise InputError(
                f"{where}: expected ',' or ']' after the record, got {shortened(text[position : position + 20]) if mark else 'the end'}"
            )
        closed = mark == "]"
        position = position if closed else skipped(position + 1)
    if text[position + 1 :].strip():
        raise InputError(f"{path}: expected nothing after the array, got {shortened(text[position + 1 :].strip())}")
    return records


def decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} expected UTF-8 text, got byte {data[error.start]:#04x} at offset {error.start}"
        ) from None


def record_at(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {shortened(value)}")
    return Record(value, where)


def json_fault(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are each written once; plain JSON would keep the last option A and lose the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=no_duplicates)


def table_records(path: Path) -> list[Record]:
    """Rows of a parquet file, counted from 1."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: expected a parquet file, got {str(error).splitlines()[0]}") from None
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    cop = described.get("info", {}).get("features", {}).get("cop", {})
    label = isinstance(cop, dict) and cop.get("_type") == "ClassLabel"
    return [Record(row, f"{path}: row {number}", True, label) for number, row in enumerate(table.to_pylist(), start=1)]


def hub_records(name: str, config: str | None, split: str) -> list[Record]:
    """Rows of a split on the hub, or of the local copy that `datasets` keeps of it."""
    import datasets
    from huggingface_hub.utils import HfHubHTTPError
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its retries would bury the one line that says what is wrong
    try:
        dataset, refused = None, ""
        for spelling in spellings(split):
            try:
                dataset = datasets.load_dataset(name, config, split=spelling)
                break
            except ValueError as error:
                if not str(error).startswith("Unknown split"):
                    raise
                refused = refused or str(error)
        if dataset is None:
            raise InputError(f"hub dataset {name}: {refused}")
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"hub dataset {name}: expected to load split {split}, got: {first_line}; with no network, give a local copy as data.path"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
    cop = dataset.features.get("cop")
    label = isinstance(cop, datasets.ClassLabel)
    records = [
        Record(row, f"{name} [{split}]: row {number}", True, label)
        for number, row in enumerate(dataset.to_list(), start=1)
    ]
    if not records:
        raise InputError(f"hub dataset {name}: expected at least one record in split {split}, got none")
    return records


# ---- who gets which question ------------------------------------------------------------------------------------------


def fraction(salt: str, identity: str) -> float:
    """A number in [0, 1) that depends on nothing but the id and the purpose."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{identity}".encode()).digest()[:8], "big") / 2**64


def halves(questions: Sequence[Item], part: str) -> list[Item]:
    """One half of the training split: `first_half` for the cold start, `second_half` for RL, or `all`.

    A question's half follows from its id alone, so neither the order nor the rest of the file can move it across.
    """
    if part == "all":
        return list(questions)
    if part not in ("first_half", "second_half"):
        raise InputError(f"data.part: expected all, first_half or second_half, got {part!r}")
    return [question for question in questions if (fraction("half", question.id) < 0.5) == (part == "first_half")]


OTHER_HALF = {"first_half": "second_half", "second_half": "first_half", "all": "all"}
"""The part that the cold start takes, by data.part, which RL trains on."""


def held_out(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """What the cold start trains on and what it holds out, each in the given order: `share` of the distinct ids, at least one.

    The ids with the smallest hashes are held out, so the order does not matter, and several traces of one question stay
    on one side. The hash is not that of `halves`: a half is no less representative of it.
    """
    ranked = sorted({item.id for item in items}, key=lambda identity: (fraction("held out", identity), identity))
    count = min(max(round(share * len(ranked)), 1), len(ranked) - 1) if share > 0 and len(ranked) > 1 else 0
    held = set(ranked[:count])
    return [item for item in items if item.id not in held], [item for item in items if item.id in held]
