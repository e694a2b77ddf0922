"""Readers: the published datasets whole, the hub's schemas in small, and every kind of bad record with its error."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from question_file import write_jsonl

from crpo_jax.data import readers
from crpo_jax.data.question import LETTERS, Question
from crpo_jax.data.readers import QUESTION_FIELDS, questions_from, read_questions
from crpo_jax.errors import InputError

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data"

MEDQA = {
    "question": "Which?",
    "answer": "two",
    "options": {"A": "one", "B": "two", "C": "3", "D": "4"},
    "meta_info": "step1",
    "answer_idx": "B",
}
MEDMCQA = {
    "id": "m0",
    "question": "Which?",
    "opa": "one",
    "opb": "two",
    "opc": "three",
    "opd": "four",
    "cop": 0,
    "exp": None,
    "choice_type": "single",
}
TEN = {letter: f"choice {letter.lower()}" for letter in LETTERS[:10]}
MEDXPERTQA = {"id": "Text-0", "question": "Which?", "options": TEN, "label": "J", "question_type": "Reasoning"}
OWN = {"id": "q0", "question": "Which?", "options": {"A": "one", "B": "two"}, "answer": "A"}


def repeated(question="Which?", **changed):
    """A MedXpertQA question text with its choices written out at the end."""
    return f"{question}\nAnswer Choices: " + " ".join(f"({letter}) {text}" for letter, text in (TEN | changed).items())


def lines(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# ---- the published data ----------------------------------------------------------------------------------------------


def raw(path):
    if not path.exists():
        pytest.skip(f"the published data is not here: {path.relative_to(SHARED.parent)}")
    return [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]


@pytest.mark.parametrize(("split", "count"), [("dev", 1272), ("test", 1273)])
def test_medqa_whole(split, count):
    records = raw(SHARED / "medqa" / f"{split}.jsonl")
    questions = read_questions("medqa", str(SHARED / "medqa"), split)
    assert len(questions) == len(records) == count
    for number, (question, record) in enumerate(zip(questions, records, strict=True)):
        assert question.id == f"medqa-{split}-{number:06d}"
        assert question.options[question.answer] == record["answer"].strip()
        assert question.columns["meta_info"] == record["meta_info"]


def test_medmcqa_whole_and_its_explanations_agree_with_the_position_counted_from_one():
    records = raw(SHARED / "medmcqa" / "dev.json")
    questions = read_questions("medmcqa", str(SHARED / "medmcqa"), "validation")
    assert len(questions) == len(records) == 4183
    stated = 0
    for question, record in zip(questions, records, strict=True):
        assert question.options[question.answer] == record["op" + "abcd"[record["cop"] - 1]].strip()
        found = re.match(r"\s*Ans(?:wer)?\.?(?: is)?[ .:]*[(\['‘]*([a-dA-D])[)\]'’., ]", record["exp"] or "")
        if found:  # the author of the explanation names the option by letter: evidence that no counting rule has made
            stated += 1
            assert question.answer == found[1].upper(), question.id
    assert stated > 500


@pytest.mark.parametrize(("split", "count"), [("dev", 5), ("test", 2450)])
def test_medxpertqa_whole_with_its_choices_shown_once(split, count):
    records = raw(SHARED / "medxpertqa" / f"{split}.jsonl")
    questions = read_questions("medxpertqa", str(SHARED / "medxpertqa"), split)
    assert len(questions) == len(records) == count
    for question, record in zip(questions, records, strict=True):
        assert question.id == record.get("id", record.get("realidx"))
        assert question.options == {letter: text.strip() for letter, text in record["options"].items()}
        assert list(question.options) == list(LETTERS[:10])
        assert question.answer == record.get("label", record.get("answer_idx"))
        assert "Answer Choices:" not in question.question
        assert record["question"].startswith(question.question)
    differing = {
        question.id: question.columns["differing_choices"]
        for question in questions
        if "differing_choices" in question.columns
    }
    assert set(differing) == ({"Text-2453"} if split == "dev" else {"Text-2230", "Text-2270"}), (
        "the published errata, kept and shown"
    )


# ---- the hub's schemas, in every form --------------------------------------------------------------------------------


def as_lines(path, records):
    lines(path.with_suffix(".jsonl"), *records)


def as_array(path, records):
    path.with_suffix(".json").write_text(json.dumps(records, indent=2))


def as_json_lines(path, records):
    lines(path.with_suffix(".json"), *records)


def as_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path.with_suffix(".parquet"))


def as_csv(path, records):
    rows = [{**record, "options": json.dumps(record["options"])} for record in records]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("source", ["medqa", "medxpertqa", "jsonl"])
def test_every_source_with_options_in_a_csv_table(tmp_path, source):
    """MedMCQA has a number, cop, which a table of texts cannot hold."""
    record = {"medqa": MEDQA, "medxpertqa": MEDXPERTQA, "jsonl": OWN}[source]
    as_csv(tmp_path / "test", [record])
    lines(tmp_path / "lines.jsonl", record)
    assert read_questions(source, str(tmp_path / "test.csv"), "test") == read_questions(
        source, str(tmp_path / "lines.jsonl"), "test"
    )


@pytest.mark.parametrize("write", [as_lines, as_array, as_json_lines, as_parquet])
@pytest.mark.parametrize(
    ("source", "records", "answers"),
    [
        ("medqa", [MEDQA, MEDQA | {"answer_idx": "D", "answer": "4"}], "BD"),
        ("medmcqa", [MEDMCQA, MEDMCQA | {"id": "m1", "cop": 3}], "AD"),
        ("medmcqa", [MEDMCQA | {"cop": 1}, MEDMCQA | {"id": "m1", "cop": 4}], "AD"),
        ("medxpertqa", [MEDXPERTQA, MEDXPERTQA | {"id": "Text-1", "label": "A", "question": repeated()}], "JA"),
        ("jsonl", [OWN, OWN | {"id": "q1", "answer": "B"}], "AB"),
    ],
    ids=["medqa", "medmcqa from 0", "medmcqa from 1", "medxpertqa", "jsonl"],
)
def test_every_source_in_every_form(tmp_path, write, source, records, answers):
    write(tmp_path / "test", records)
    questions = read_questions(source, str(tmp_path), "test")
    assert "".join(question.answer for question in questions) == answers
    assert [question.question for question in questions] == ["Which?", "Which?"]
    assert {question.split for question in questions} == {"test"}
    assert {question.source for question in questions} == {source}


def test_text_loses_surrounding_white_space_only(tmp_path):
    record = MEDQA | {
        "question": " A  man\u2028of 40.\n\nWhich? ",
        "options": {"A": "one ", "B": "two"},
        "answer": "two ",
    }
    path = tmp_path / "test.jsonl"
    path.write_text("\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n\r\n", encoding="utf-8")
    (question,) = read_questions("medqa", str(path), "test")
    assert question.question == "A  man\u2028of 40.\n\nWhich?", "a line separator inside a text ends no record"
    assert question.options == {"A": "one", "B": "two"}


def test_options_beyond_j_and_table_columns_that_a_record_lacks(tmp_path):
    many = OWN | {"options": {letter: f"text {letter}" for letter in LETTERS}, "answer": "Z"}
    pq.write_table(pa.Table.from_pylist([many, OWN | {"id": "q1"}]), tmp_path / "train.parquet")
    wide, narrow = read_questions("jsonl", str(tmp_path), "train")
    assert (len(wide.options), wide.answer) == (26, "Z")
    assert narrow.options == OWN["options"], "the struct's other letters are None, and are no options"


def test_class_label_of_the_schema_settles_where_cop_starts(tmp_path):
    datasets = pytest.importorskip("datasets")
    labels = datasets.Features(
        {name: datasets.Value("string") for name in MEDMCQA if name != "cop"}
        | {"cop": datasets.ClassLabel(names=list("abcd"))}
    )
    datasets.Dataset.from_list([MEDMCQA | {"cop": 1}], features=labels).to_parquet(tmp_path / "train.parquet")
    assert read_questions("medmcqa", str(tmp_path), "train")[0].answer == "B"


def test_no_position_is_guessed_where_zero_and_four_are_both_absent(tmp_path):
    """1, 2, 3 fit both countings. A guess would move every answer by one and still look like data."""
    path = lines(tmp_path / "train.json", MEDMCQA | {"cop": 1}, MEDMCQA | {"id": "m1", "cop": 3})
    with pytest.raises(InputError, match="which does not tell the two apart"):
        read_questions("medmcqa", str(path))


# ---- folders and the hub ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "record", "split", "names"),
    [
        ("medqa", MEDQA, "test", ["phrases_no_exclude_test.jsonl", "phrases_no_exclude_train.jsonl"]),
        ("medqa", MEDQA, "train", ["data/train.json", "data/test.json", ".cache/train.json", "dataset_infos.json"]),
        ("medmcqa", MEDMCQA, "dev", ["validation.json", "train.json"]),
        ("medxpertqa", MEDXPERTQA, "test", ["Text/test.jsonl", "Text/dev.jsonl", "MM/test.jsonl"]),
        ("medxpertqa", MEDXPERTQA, "validation", ["Text/dev.jsonl", "Text/test.jsonl", "MM/dev.jsonl"]),
        ("medxpertqa", MEDXPERTQA, "test", ["Text/test/0000.json", "Text/dev/0000.json"]),
    ],
)
def test_folder_layouts(tmp_path, source, record, split, names):
    for name in names:
        mark = name == names[0]
        lines(tmp_path / name, record | {"question": "the right file" if mark else "another"})
    assert [question.question for question in read_questions(source, str(tmp_path), split)] == ["the right file"]


def test_shards_are_one_split_in_order_and_none_may_be_missing(tmp_path):
    for shard in range(3):
        lines(tmp_path / f"data/train-{shard:05d}-of-00003.jsonl", MEDQA | {"question": f"shard {shard}"})
    questions = read_questions("medqa", str(tmp_path), "train")
    assert [(question.id, question.question) for question in questions] == [
        (f"medqa-train-{shard:06d}", f"shard {shard}") for shard in range(3)
    ]
    (tmp_path / "data/train-00001-of-00003.jsonl").unlink()
    with pytest.raises(InputError, match="expected all 3 shards of split train, got 2"):
        read_questions("medqa", str(tmp_path), "train")


def test_a_split_that_two_files_claim_is_refused(tmp_path):
    lines(tmp_path / "test.jsonl", MEDQA)
    lines(tmp_path / "4_options/phrases_no_exclude_test.jsonl", MEDQA)
    with pytest.raises(
        InputError, match=r"expected one file of split test.*got 4_options/phrases_no_exclude_test\.jsonl, test\.jsonl"
    ):
        read_questions("medqa", str(tmp_path), "test")


def test_hub(tmp_path, monkeypatch):
    """Through `datasets` itself, on a folder laid out as the hub's repository is."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines(tmp_path / "hub/Text/test.jsonl", MEDXPERTQA | {"question": repeated()})
    lines(tmp_path / "hub/Text/dev.jsonl", MEDXPERTQA | {"id": "Text-1"})
    lines(tmp_path / "hub/MM/test.jsonl", MEDXPERTQA | {"images": ["MM-0.jpeg"]})
    config = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.jsonl\n"
        for name in ("MM", "Text")
    )
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs:\n{config}  - split: dev\n    path: Text/dev.jsonl\n---\n")
    monkeypatch.setitem(readers.HUB_DATASETS, "medxpertqa", (str(tmp_path / "hub"), "Text"))
    assert [(question.id, question.question) for question in read_questions("medxpertqa", "", "test")] == [
        ("Text-0", "Which?")
    ]
    assert [question.id for question in read_questions("medxpertqa", "", "validation")] == ["Text-1"], (
        "dev by its other name"
    )
    with pytest.raises(InputError, match='Unknown split "train"'):
        read_questions("medxpertqa", "", "train")

    labels = datasets.Features(
        {name: datasets.Value("string") for name in MEDMCQA if name != "cop"}
        | {"cop": datasets.ClassLabel(names=list("abcd"))}
    )
    (tmp_path / "mcqa/data").mkdir(parents=True)
    datasets.Dataset.from_list([MEDMCQA | {"cop": 2}], features=labels).to_parquet(
        tmp_path / "mcqa/data/validation-00000-of-00001.parquet"
    )
    datasets.Dataset.from_list([MEDMCQA | {"cop": -1}], features=labels).to_parquet(
        tmp_path / "mcqa/data/test-00000-of-00001.parquet"
    )
    monkeypatch.setitem(readers.HUB_DATASETS, "medmcqa", (str(tmp_path / "mcqa"), None))
    assert [question.answer for question in read_questions("medmcqa", "", "dev")] == ["C"]
    with pytest.raises(InputError, match=r"row 1: cop: expected a right option \(this split hides its answers"):
        read_questions("medmcqa", "", "test")


def test_without_network_one_line_says_what_to_do(tmp_path):
    code = "from crpo_jax.data.readers import *\ntry: read_questions('medqa')\nexcept InputError as error: print(error)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1, done.stderr
    assert done.stdout.startswith("hub dataset GBaker/MedQA-USMLE-4-options: expected to load split train, got: ")
    assert "give a local copy as data.path" in done.stdout


def test_importing_the_record_brings_nothing_heavy():
    code = "import crpo_jax.data.readers, crpo_jax.data.prompts, sys\n"
    code += "print({'jax', 'datasets', 'pyarrow', 'transformers', 'grain'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


# ---- what is refused, and in which words -----------------------------------------------------------------------------


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


BAD = [
    # source, records (the last one is bad), the error after the file's name
    ("jsonl", [OWN | {"id": True}], ":1: id: expected a text, got True"),
    ("jsonl", [OWN | {"id": ""}], ":1: id: expected a text that is not empty, got ''"),
    ("jsonl", [OWN, OWN], ":2: id: expected an id of its own (the same stands at {path}:1), got 'q0'"),
    (
        "jsonl",
        [OWN | {"id": "7"}, OWN | {"id": 7}],
        ":2: id: expected an id of its own (the same stands at {path}:1), got '7'",
    ),
    ("jsonl", [OWN, OWN | {"id": "q1", "question": "  "}], ":2: question: expected a text that is not empty, got '  '"),
    ("jsonl", [OWN | {"question": 5}], ":1: question: expected a text, got 5"),
    ("jsonl", [OWN | {"question": "a \ud800"}], ":1: question: expected text that UTF-8 can write, got 'a \\\\ud800'"),
    ("jsonl", [OWN | {"question": ["x" * 200]}], f":1: question: expected a text, got ['{'x' * 37}...{'x' * 38}']"),
    (
        "jsonl",
        [OWN, without(OWN, "options") | {"id": "q1"}],
        ":2: options: expected options in all records or in none, got one unlike {path}:1; data.answer, or answer_kind "
        "in each record, says how to compare answers",
    ),
    ("medqa", [without(MEDQA, "options")], ":1: options: expected an object of texts by letter, or a list, got None"),
    ("jsonl", [OWN | {"options": 5}], ":1: options: expected an object of texts by letter, or a list, got 5"),
    (
        "jsonl",
        [OWN | {"options": ["one", "two"], "answer": 2}],
        ":1: answer: expected a letter, or a position from 0 to 1, got 2",
    ),
    (
        "jsonl",
        [OWN | {"options": {}}],
        ":1: options: expected letters A, B, ... without a gap, at least two, got 'none'",
    ),
    (
        "jsonl",
        [OWN | {"options": {"A": "one"}}],
        ":1: options: expected letters A, B, ... without a gap, at least two, got 'A'",
    ),
    (
        "jsonl",
        [OWN | {"options": {"A": "one", "C": "two"}}],
        ":1: options: expected letters A, B, ... without a gap, at least two, got 'A, C'",
    ),
    (
        "jsonl",
        [OWN | {"options": {"a": "one", "b": "two"}}],
        ":1: options: expected letters A, B, ... without a gap, at least two, got 'a, b'",
    ),
    ("jsonl", [OWN | {"options": {"A": "one", "B": None}}], ":1: options.B: expected a text, got None"),
    ("jsonl", [OWN | {"options": {"A": "one", "B": " "}}], ":1: options.B: expected a text that is not empty, got ' '"),
    ("jsonl", [without(OWN, "answer")], ":1: answer: expected a field of this name, got id, question, options"),
    ("jsonl", [OWN | {"answer": "C"}], ":1: answer: expected a letter among A, B, got 'C'"),
    ("jsonl", [OWN | {"answer": "a"}], ":1: answer: expected a letter among A, B, got 'a'"),
    ("jsonl", [OWN | {"answer": 0}], ":1: answer: expected a text, got 0"),
    ("medqa", [MEDQA, MEDQA | {"answer": "one"}], ":2: answer: expected the text of option B, 'two', got 'one'"),
    ("medqa", [MEDQA | {"answer_idx": "E"}], ":1: answer_idx: expected a letter among A, B, C, D, got 'E'"),
    (
        "medqa",
        [without(MEDQA, "answer")],
        ":1: answer: expected a field of this name, got question, options, meta_info, answer_idx",
    ),
    ("medmcqa", [MEDMCQA, MEDMCQA | {"cop": 4}], ":2: cop: expected 0 to 3 as {path}:1 says, got 4"),
    ("medmcqa", [MEDMCQA | {"cop": 5}], ":1: cop: expected a whole number from 0 to 4, got 5"),
    ("medmcqa", [MEDMCQA | {"cop": "1"}], ":1: cop: expected a whole number from 0 to 4, got '1'"),
    ("medmcqa", [MEDMCQA | {"cop": True}], ":1: cop: expected a whole number from 0 to 4, got True"),
    ("medmcqa", [without(MEDMCQA, "cop")], ":1: cop: expected a whole number from 0 to 4, got None"),
    (
        "medmcqa",
        [MEDMCQA | {"cop": -1}],
        ":1: cop: expected a right option (this split hides its answers; use train or validation), got -1",
    ),
    ("medmcqa", [MEDMCQA | {"opd": ""}], ":1: opd: expected a text that is not empty, got ''"),
    (
        "medmcqa",
        [without(MEDMCQA, "id")],
        ":1: id: expected a field of this name, got question, opa, opb, opc, opd, cop, exp, choice_type",
    ),
    (
        "medxpertqa",
        [MEDXPERTQA | {"images": ["MM-0.jpeg"]}],
        ":1: images: expected a question of text alone (the MM part needs images), got ['MM-0.jpeg']",
    ),
    (
        "medxpertqa",
        [MEDXPERTQA | {"label": "K"}],
        ":1: label: expected a letter among A, B, C, D, E, F, G, H, I, J, got 'K'",
    ),
    ("medxpertqa", [MEDXPERTQA | {"answer_idx": "A"}], ":1: answer_idx: expected J, as label says, got 'A'"),
    (
        "medxpertqa",
        [MEDXPERTQA | {"answer": "choice a"}],
        ":1: answer: expected the text of option J, 'choice j', got 'choice a'",
    ),
    (
        "medxpertqa",
        [MEDXPERTQA | {"question": repeated(J="another")}],
        ":1: question: expected choice J, the right one, as in the options, 'choice j', got 'another'",
    ),
    (
        "medxpertqa",
        [MEDXPERTQA | {"question": repeated(A="x", B="y", C="z")}],
        ":1: question: expected choices as in the options, at most 2 in another wording, "
        "got {{'A': 'x', 'B': 'y', 'C': 'z'}}",
    ),
    (
        "medxpertqa",
        [MEDXPERTQA | {"question": "Which?\nAnswer Choices: (A) choice a (B) choice b"}],
        ":1: question: expected the choices (A, B, C, D, E, F, G, H, I, J) after 'Answer Choices:', "
        "got '(A) choice a (B) choice b'",
    ),
    ("medxpertqa", [MEDXPERTQA | {"question": repeated("")}], None),
]


@pytest.mark.parametrize(
    ("source", "records", "expected"), BAD, ids=[f"{number:02d}-{source}" for number, (source, _, _) in enumerate(BAD)]
)
def test_bad_records(tmp_path, source, records, expected):
    path = lines(tmp_path / "data.jsonl", *records)
    with pytest.raises(InputError) as caught:
        read_questions(source, str(path))
    message = str(caught.value)
    assert "\n" not in message
    if expected is None:
        assert message.startswith(f"{path}:1: question: expected a question before 'Answer Choices:', got ")
    else:
        assert message == str(path) + expected.format(path=path)


BAD_FILES = [
    ("empty.jsonl", b"", ": expected at least one record, got an empty file"),
    ("blank.json", b" \n\n", ": expected at least one record, got an empty file"),
    ("array.json", b"[]", ": expected at least one record, got an empty file"),
    (
        "cut.jsonl",
        b'{"id": "a"',
        ":1: expected one JSON object a line, got Expecting ',' delimiter at column 11 in '{\"id\": \"a\"'",
    ),
    ("list.jsonl", b'{"id": "a"}\n\n3\n', ":3: expected a JSON object, got 3"),
    (
        "twice.jsonl",
        b'{"id": "a", "id": "b"}',
        """:1: expected one JSON object a line, got the key 'id' twice in '{"id": "a", "id": "b"}'""",
    ),
    ("latin.jsonl", b'\n{"id": "\xe9"}', ":2: expected UTF-8 text, got byte 0xe9 at offset 8"),
    ("latin.json", b'[{"id": "\xe9"}]', ": expected UTF-8 text, got byte 0xe9 at offset 9"),
    ("open.json", b'[\n{"id": "a"},\n', ":3: expected a JSON object in the array, got Expecting value at column 1"),
    ("gap.json", b'[\n{"id": "a"}\n{"id": "b"}]', ":2: expected ',' or ']' after the record, got '{\"id\": \"b\"}]'"),
    ("end.json", b'[{"id": "a"}', ":1: expected ',' or ']' after the record, got the end"),
    ("after.json", b'[{"id": "a"}] x', ": expected nothing after the array, got 'x'"),
    ("item.json", b'[\n{"id": "a"},\n\n"b"]', ":4: expected a JSON object, got 'b'"),
    ("deep.jsonl", b'{"id": ' + b"[" * 100_000, ":1: expected one JSON object a line, got "),
    ("table.tsv", b"id\tquestion\n", ": expected a file ending in .json, .jsonl, .csv, .parquet, got .tsv"),
    ("head.csv", b"id,question\n", ": expected at least one record, got an empty file"),
    (
        "semicolons.csv",
        b"id;question;A\n",
        ":1: expected a header of different names, question or messages among them, got ['id;question;A']",
    ),
    (
        "same.csv",
        b"question,A,A\n",
        ":1: expected a header of different names, question or messages among them, got ['question', 'A', 'A']",
    ),
    ("short.csv", b'question,A,B,answer\n"two\nlines",one,two\n', ":3: expected 4 cells as in the header, got 3"),
    ("open.csv", b'question,A\n"Which?,one\n', ":2: expected CSV, got unexpected end of data"),
    ("answer.csv", b"question,A,B,answer\nWhich?,one,two,C\n", ":2: answer: expected a letter among A, B, got 'C'"),
    (
        "options.csv",
        b"question,options,answer\nWhich?,{one,A\n",
        ":2: options: expected one JSON object a line, got Expecting property name enclosed in double quotes at "
        "column 2 in '{one'",
    ),
    ("latin.csv", b"question,A\n\xe9,one\n", ": expected UTF-8 text, got byte 0xe9 at offset 11"),
    ("not.parquet", b"PAR0", ": expected a parquet file, got "),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_files(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_questions("jsonl", str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path) + expected) if expected.endswith("got ") else message == str(path) + expected


def test_bad_rows_of_a_table_and_lines_of_an_array_are_named(tmp_path):
    pq.write_table(pa.Table.from_pylist([OWN, OWN | {"id": "q1", "answer": "D"}]), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet: row 2: answer: expected a letter among A, B, got 'D'"):
        read_questions("jsonl", str(tmp_path))
    (tmp_path / "dev.json").write_text(json.dumps([OWN, OWN | {"id": "q1", "answer": "D"}], indent=1))
    with pytest.raises(InputError, match=r"dev\.json:11: answer: expected a letter among A, B, got 'D'"):
        read_questions("jsonl", str(tmp_path), "dev")


def test_questions_given_in_python():
    """As from a file; any mapping will do, not only a dict."""
    rows = [
        MappingProxyType(OWN | {"topic": "heart"}),
        OWN | {"id": 7, "answer": "B", "source": "mine", "split": "dev"},
    ]
    assert questions_from(rows) == [
        Question("q0", "Which?", {"A": "one", "B": "two"}, "A", "jsonl", "", {"topic": "heart"}),
        Question("7", "Which?", {"A": "one", "B": "two"}, "B", "mine", "dev"),
    ]
    assert questions_from([]) == []


def test_questions_without_ids_have_one_that_neither_place_nor_company_changes(tmp_path):
    """Halves, samples and resumed runs go by it; of equal questions each has its own."""
    row, other = without(OWN, "id"), without(OWN, "id") | {"question": "When?"}
    [question] = questions_from([row])
    assert question.id == "sha256-a925fb7065584550"
    [first, own, again, second] = read_questions("jsonl", str(lines(tmp_path / "own.jsonl", other, OWN, row, row)))
    assert own.id == "q0"
    assert (again.id, second.id) == (question.id, f"{question.id}-2")
    assert first.id not in (question.id, "q0")
    assert questions_from([row | {"options": {"A": "one", "B": "three"}}])[0].id != question.id
    assert questions_from([row | {"id": None, "column": 5}])[0].id == question.id


def test_a_table_of_questions(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,question,A,B,C,answer,topic\r\n7,"Which, ""one""?\nHow?",one,two,,B,\r\n'
        b"\r\n,When?,a,b,c,C,heart\r\n"
    )
    first, second = read_questions("jsonl", str(path))
    options = {"A": "one", "B": "two"}
    assert first == Question("7", 'Which, "one"?\nHow?', options, "B", "jsonl", "train", {"topic": None})
    assert (second.options, second.answer, second.columns) == ({"A": "a", "B": "b", "C": "c"}, "C", {"topic": "heart"})
    path.write_text('question,options,answer\nWhich?,"{""A"": ""one"", ""B"": ""two""}",A\n')
    assert read_questions("jsonl", str(tmp_path)) == questions_from([without(OWN, "id") | {"split": "train"}])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (OWN, "id: expected an id of its own (the same stands at questions[0]), got 'q0'"),
        (OWN | {"id": "q1", "answer": "C"}, "answer: expected a letter among A, B, got 'C'"),
        (without(OWN, "question"), "question: expected a field of this name, got id, options, answer"),
        (OWN | {"options": ["one"]}, "options: expected letters A, B, ... without a gap, at least two, got 'A'"),
        ("q1", "expected a mapping with question, options and answer, got 'q1'"),
    ],
)
def test_bad_questions_given_in_python(row, expected):
    with pytest.raises(InputError) as caught:
        questions_from([OWN, row])
    assert str(caught.value) == f"questions[1]: {expected}"


def test_bad_places(tmp_path):
    for source, path, split, expected in [
        (
            "triviaqa",
            "",
            "train",
            "data.source: expected one of medqa, medmcqa, medxpertqa, pubmedqa, mmlu, healthbench, gsm8k, math500, "
            "file, hub, jsonl, got 'triviaqa'",
        ),
        ("hub", "", "train", "data.path: expected the id of a data set on the hub, got ''"),
        ("jsonl", "", "train", "data.path: expected a file or folder, since jsonl has no hub id, got ''"),
        (
            "medqa",
            str(tmp_path / "none"),
            "train",
            f"{tmp_path}/none: expected a file or folder with medqa questions, got no such path",
        ),
        (
            "medqa",
            str(tmp_path),
            "dev",
            f"{tmp_path}: expected a file of split dev or validation or val or valid, "
            "got no .json, .jsonl, .csv, .parquet file",
        ),
    ]:
        with pytest.raises(InputError) as caught:
            read_questions(source, path, split)
        assert str(caught.value) == expected


# ---- the repeated choices --------------------------------------------------------------------------------------------


def stripped(tmp_path, text, **options):
    path = lines(tmp_path / "test.jsonl", MEDXPERTQA | {"question": text, "options": TEN | options})
    return read_questions("medxpertqa", str(path), "test")[0]


def test_choices_are_stripped_however_they_are_wrapped(tmp_path):
    assert stripped(tmp_path, repeated().replace(" (", "\n(")).question == "Which?"
    assert stripped(tmp_path, repeated("Which, as (A) says?")).question == "Which, as (A) says?"
    assert stripped(tmp_path, "Which?").question == "Which?", "a copy of the data that repeats no choices"


def test_a_choice_that_speaks_of_another_letter_is_one_choice(tmp_path):
    own = {"B": "both (A) and (C) , never (D)"}
    question = stripped(tmp_path, repeated(**own), **own)
    assert question.question == "Which?"
    assert "differing_choices" not in question.columns


def test_a_choice_in_another_wording_is_kept_to_be_seen(tmp_path):
    question = stripped(tmp_path, repeated(C="another"))
    assert (question.question, question.options["C"]) == ("Which?", "choice c"), "the options decide"
    assert question.columns["differing_choices"] == {"C": "another"}


# ---- the project's own format ----------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda value: value == value.strip())


@st.composite
def questions_of_any_kind(draw):
    options = dict(zip(LETTERS, draw(st.lists(text, min_size=2, max_size=26)), strict=False))
    columns = draw(
        st.dictionaries(
            text.filter(lambda name: name not in QUESTION_FIELDS),
            st.none() | st.integers() | text | st.lists(text),
            max_size=3,
        )
    )
    return Question(
        draw(text), draw(text), options, draw(st.sampled_from(list(options))), draw(text), draw(text), columns
    )


@given(st.lists(questions_of_any_kind(), min_size=1, max_size=4, unique_by=lambda question: question.id))
def test_written_questions_read_back_the_same(tmp_path_factory, questions):
    path = tmp_path_factory.mktemp("own") / "questions.jsonl"
    write_jsonl(path, questions)
    assert read_questions("jsonl", str(path)) == questions
