"""Records from JSON, CSV and parquet files, folders laid out as on the Hugging Face hub, and the hub itself. No jax.

All records of a split are returned, or an InputError names the file, the line and what is wrong there.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from datetime import date, timedelta
from datetime import time as clock
from decimal import Decimal
from pathlib import Path
from typing import Any

from crpo_jax.data.question import LETTERS
from crpo_jax.data.record import Record
from crpo_jax.data.strict_json import DECODER, json_fault
from crpo_jax.errors import InputError, brief

MEDICAL_SUBJECTS = "anatomy,clinical_knowledge,college_biology,college_medicine,medical_genetics,professional_medicine"
"""The subjects of MMLU that Med-PaLM (arXiv 2212.13138) and most since take as its medical part."""

HUB_DATASETS: dict[str, tuple[str, str | None]] = {  # id on the hub and named configuration, or several with commas
    "medqa": ("GBaker/MedQA-USMLE-4-options", None),
    "medmcqa": ("openlifescienceai/medmcqa", None),
    "medxpertqa": ("TsinghuaC3I/MedXpertQA", "Text"),
    "pubmedqa": ("qiaojin/PubMedQA", "pqa_labeled"),
    "mmlu": ("cais/mmlu", MEDICAL_SUBJECTS),
    "healthbench": ("openai/healthbench", None),
    "gsm8k": ("openai/gsm8k", "main"),
    "math500": ("HuggingFaceH4/MATH-500", None),
}
# One split, four spellings: MedXpertQA has dev, MedMCQA on the hub has validation.
VALIDATION = ("dev", "validation", "val", "valid")
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
JSON_SPACE = re.compile(r"[ \t\r\n]*")


def load_records(
    path: Path, source: str, split: str, config: str | None = None, asked: Sequence[str] = ("question",)
) -> list[Record]:
    """Every record of a file, or of the split's files in a folder; none at all is an error.

    `config` is the source's named configuration, or several with commas; `asked` are the columns with the question, one
    of which the header of a table must have.
    """
    if not path.exists():
        kind = "questions" if source in ("file", "jsonl") else f"{source} questions"
        raise InputError(f"{path}: expected a file or folder with {kind}, got no such path")
    records: list[Record] = []
    for file in [path] if path.is_file() else configured_files(path, config, split):
        if file.suffix not in SUFFIXES:
            raise InputError(
                f"{file}: expected a file ending in {', '.join(SUFFIXES)}, got {file.suffix or 'no ending'}"
            )
        try:
            if file.suffix == ".csv":
                in_file = csv_records(file, asked)
            else:
                in_file = parquet_records(file) if file.suffix == ".parquet" else json_records(file)
        except OSError as error:
            raise InputError(f"{file}: expected a readable file, got {error.strerror or error}") from None
        if not in_file:
            raise InputError(f"{file}: expected at least one record, got an empty file")
        records += in_file
    return records


def split_spellings(split: str) -> tuple[str, ...]:
    return (split, *(name for name in VALIDATION if name != split)) if split in VALIDATION else (split,)


def configured_files(folder: Path, config: str | None, split: str) -> list[Path]:
    """The split's files of every configuration that has a folder; of the whole folder where none has one."""
    names = config.split(",") if config else []
    missing = [name for name in names if not any(path.is_dir() for path in folder.rglob(name))]
    if missing and len(missing) < len(names):
        raise InputError(f"{folder}: expected a folder for each of data.config={config}, got none for {missing[0]}")
    return [file for name in ([""] if missing else names or [""]) for file in split_files(folder, name, split)]


def split_files(folder: Path, config: str, split: str) -> list[Path]:
    """The split's file of a configuration in a folder laid out as on the hub, or all its shards in order.

    The split is a word of the file's name (`phrases_no_exclude_test.jsonl`, `data/train-00000-of-00002.parquet`) or a
    folder's whole name (`Text/test/0000.parquet`). Two candidates that are not shards of each other are refused.
    """
    inside = {path: path.relative_to(folder) for path in sorted(folder.rglob("*"))}
    files = [
        path
        for path, name in inside.items()
        if path.suffix in SUFFIXES and path.is_file() and not any(part.startswith(".") for part in name.parts)
    ]
    if config:  # MedXpertQA's multimodal part has files of the same names
        files = [path for path in files if config in inside[path].parts[:-1]]
    chosen, names = [], split_spellings(split)
    for name in names:  # MMLU has both a dev and a validation split
        chosen = chosen or [path for path in files if name in re.split(r"[^a-z0-9]+", path.stem.lower())]
        chosen = chosen or [path for path in files if name in inside[path].parts[:-1]]
    if not chosen:
        listed = ", ".join(str(inside[path]) for path in files[:8]) or f"no {', '.join(SUFFIXES)} file"
        raise InputError(f"{folder}: expected a file of split {' or '.join(names)}, got {listed}")
    families = {(path.parent, re.sub(r"(^|[-_.])\d+(-of-\d+)?$", "", path.stem), path.suffix) for path in chosen}
    if len(families) > 1:
        listed = ", ".join(str(inside[path]) for path in chosen[:8])
        raise InputError(
            f"{folder}: expected one file of split {split}, or the shards of one, got {listed}; "
            "name the file or its folder"
        )
    for path in chosen:
        total = re.search(r"-of-(\d+)$", path.stem)
        if total and int(total[1]) != len(chosen):
            raise InputError(f"{folder}: expected all {int(total[1])} shards of split {split}, got {len(chosen)}")
    return chosen


# ---- JSON ------------------------------------------------------------------------------------------------------------


def json_records(path: Path) -> list[Record]:
    """Records of a JSON file: an array of objects or an object a line, both of which may be called .json."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        return parse_array(decode_utf8(data, str(path)), path)
    # str.splitlines would also cut at a U+2028 inside a text
    lines = ((f"{path}:{number}", line) for number, line in enumerate(data.split(b"\n"), start=1))
    return [parse_line(decode_utf8(line, where), where) for where, line in lines if line.strip()]


def parse_line(text: str, where: str) -> Record:
    """The record of one line of JSON."""
    try:
        return record_at(DECODER.decode(text), where)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: expected one JSON object a line, got {json_fault(error)} in {brief(text.strip())}"
        ) from None


def parse_array(text: str, path: Path) -> list[Record]:
    """Records of a JSON array, each with the line it starts on."""

    def after_space(at: int) -> int:
        space = JSON_SPACE.match(text, at)
        return space.end() if space else at

    records: list[Record] = []
    line, counted = 1, 0
    position = after_space(text.index("[") + 1)
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, position = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected a JSON object in the array, got {json_fault(error)}") from None
        records.append(record_at(value, where))
        position = after_space(position)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            got = brief(text[position : position + 20]) if position < len(text) else "the end"
            raise InputError(f"{where}: expected ',' or ']' after the record, got {got}")
        position = position if closed else after_space(position + 1)
    if rest := text[position + 1 :].strip():
        raise InputError(f"{path}: expected nothing after the array, got {brief(rest)}")
    return records


def decode_utf8(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte, offset = data[error.start], error.start
        raise InputError(f"{where}: expected UTF-8 text, got byte {byte:#04x} at offset {offset}") from None


def record_at(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {brief(value)}")
    return Record(value, where)


# ---- tables ----------------------------------------------------------------------------------------------------------


def csv_records(path: Path, asked: Sequence[str]) -> list[Record]:
    """Rows of a CSV file with commas and a header, each with the line it ends on. Columns A, B, ... are the options by
    letter, unless there is a column `options`, of JSON; an empty cell is None, or an option that the row lacks."""
    text = decode_utf8(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[Record] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names) or not set(asked) & set(names):
            wanted = f"a header of different names, {' or '.join(asked)} among them"
            raise InputError(f"{path}:1: expected {wanted}, got {brief(names)}")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not any(cells):
                continue
            if len(cells) != len(names):
                raise InputError(f"{where}: expected {len(names)} cells as in the header, got {len(cells)}")
            fields: dict[str, Any] = {
                name: cell if cell.strip() else None for name, cell in zip(names, cells, strict=True)
            }
            options = fields.get("options")
            if isinstance(options, str) and not options.lstrip().startswith("["):
                fields["options"] = parse_line(options, f"{where}: options").fields
            elif options is None and (letters := [name for name in names if len(name) == 1 and name in LETTERS]):
                fields["options"] = {letter: fields.pop(letter) for letter in letters}
            records.append(Record(fields, where, from_table=True))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: expected CSV, got {error}") from None
    return records


def parquet_records(path: Path) -> list[Record]:
    """Rows of a parquet file, counted from 1."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: expected a parquet file, got {problem}") from None
    if NO_JSON.search(str(table.schema)):
        rows = plain_rows(rows, str(path))
    schema = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    cop = schema.get("info", {}).get("features", {}).get("cop", {})
    return table_records(rows, str(path), isinstance(cop, dict) and cop.get("_type") == "ClassLabel")


NO_JSON = re.compile(r"\b(?:timestamp|date|time|duration|decimal|(?:large_|fixed_size_)?binary)")
"""Types of columns in an Arrow schema that hold what JSON cannot."""


def plain_rows(rows: list[dict[str, Any]], table: str) -> list[dict[str, Any]]:
    """The rows as JSON can write them: dates as text, decimals as numbers; InputError for bytes, such as an image's."""

    def plain(value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {name: plain(part, f"{where}.{name}") for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part, f"{where}.{place}") for place, part in enumerate(value)]
        if isinstance(value, Decimal):
            return int(value) if value == value.to_integral_value() else float(value)
        if isinstance(value, date | clock | timedelta):
            return str(value)
        if isinstance(value, bytes):
            raise InputError(f"{where}: expected texts, numbers, lists or objects, got {len(value)} bytes")
        return value

    return [
        {name: plain(value, f"{table}: row {number}: {name}") for name, value in row.items()}
        for number, row in enumerate(rows, start=1)
    ]


def table_records(rows: list[dict[str, Any]], table: str, zero_based: bool) -> list[Record]:
    return [Record(row, f"{table}: row {number}", True, zero_based) for number, row in enumerate(rows, start=1)]


def hub_records(name: str, config: str | None, split: str) -> list[Record]:
    """Rows of a split on the hub, or of the local copy that `datasets` keeps of it, of one configuration after the
    other."""
    return [record for each in (config or "").split(",") for record in hub_split(name, each or None, split)]


def hub_split(name: str, config: str | None, split: str) -> list[Record]:
    """Rows of a split of one configuration."""
    import datasets
    from huggingface_hub.utils import HfHubHTTPError
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # its retries would bury the one line that says what is wrong
    try:
        dataset, problem = None, ""
        for spelling in split_spellings(split):
            try:
                dataset = datasets.load_dataset(name, config, split=spelling)
                break
            except ValueError as error:
                if not str(error).startswith("Unknown split"):
                    raise
                problem = problem or str(error)
        if dataset is None:
            raise InputError(f"hub dataset {name}: {problem}")
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"hub dataset {name}: expected to load split {split}, got: {first_line}; "
            "with no network, give a local copy as data.path"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
    zero_based = isinstance(dataset.features.get("cop"), datasets.ClassLabel)
    table, rows = f"{name} [{f'{config}/' if config else ''}{split}]", dataset.to_list()
    if NO_JSON.search(str(dataset.data.schema)):
        rows = plain_rows(rows, table)
    records = table_records(rows, table, zero_based)
    if not records:
        raise InputError(f"hub dataset {name}: expected at least one record in split {split}, got none")
    return records
