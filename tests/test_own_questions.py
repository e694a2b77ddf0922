"""Questions of one's own: every kind of answer, columns by path, conversations, and random rows in every format."""

import csv
import datetime
import decimal
import json
import os
import random
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.answer.records import Answer, answer_to_row, question_digest, question_to_row, read_answers
from crpo_jax.config import Columns, Data, load_config
from crpo_jax.data.question import Question
from crpo_jax.data.readers import QUESTION_FIELDS, questions_from, read_questions
from crpo_jax.errors import InputError


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path, *rows, **settings):
    return read_questions("file", lines(tmp_path / "own.jsonl", *rows), "train", Data(**settings))


@pytest.mark.parametrize(
    ("row", "stated", "kind", "answer", "aliases"),
    [
        ({"options": {"A": "x", "B": "y"}, "answer": "B"}, "auto", "choice", "B", ()),
        ({"options": ["x", "y", "z"], "answer": "B"}, "auto", "choice", "B", ()),
        ({"options": ["x", "y", "z"], "answer": 2}, "auto", "choice", "C", ()),
        ({"options": '["x", "y"]', "answer": "A"}, "auto", "choice", "A", ()),
        ({"answer": 18}, "auto", "number", "18", ()),
        ({"answer": 18.0}, "auto", "number", "18", ()),
        ({"answer": 0.1}, "auto", "number", "0.1", ()),
        ({"answer": "1,200 mg"}, "number", "number", "1,200 mg", ()),
        ({"answer": "18"}, "auto", "text", "18", ()),
        ({"answer": 18}, "text", "text", "18", ()),
        ({"answer": ["gout", "podagra"]}, "auto", "text", "gout", ("podagra",)),
        ({}, "auto", "none", "", ()),
        ({"answer": None}, "auto", "none", "", ()),
        ({"answer": "a reference"}, "none", "none", "a reference", ()),
        ({"options": {"A": "x", "B": "y"}, "answer": "the x"}, "text", "text", "the x", ()),
        ({"answer": "5", "answer_kind": "number"}, "text", "number", "5", ()),
    ],
)
def test_kinds_of_answers(tmp_path, row, stated, kind, answer, aliases):
    (question,) = read(tmp_path, {"question": "Which?", **row}, answer=stated)
    assert (question.kind, question.answer, question.aliases) == (kind, answer, aliases)
    assert not set(question.columns) & set(QUESTION_FIELDS)


@pytest.mark.parametrize(
    ("row", "stated", "expected"),
    [
        ({"answer": "many"}, "number", "answer: expected a finite number of moderate length, got 'many'"),
        ({"answer": float("nan")}, "auto", "answer: expected a finite number of moderate length, got nan"),
        ({"answer": float("inf")}, "number", "answer: expected a finite number of moderate length, got inf"),
        (
            {"answer": 10**400},
            "auto",
            "answer: expected a finite number of moderate length, got a whole number of 1329",
        ),
        ({"answer": True}, "number", "answer: expected a number, got True"),
        ({"answer": True}, "auto", "answer: expected a text, or a list of texts, got True"),
        ({"answer": []}, "auto", "answer: expected a text, or a list of texts, got []"),
        ({"answer": ["gout", 5]}, "auto", "answer.1: expected a text, got 5"),
        ({"answer": " "}, "auto", "answer: expected a text that is not empty, got ' '"),
        ({"answer": "A"}, "choice", "options: expected an object of texts by letter, or a list, got None"),
        ({}, "text", "answer: expected a field of this name, got question"),
        (
            {"id": 10**1000, "answer": 5},
            "auto",
            "id: expected an id of moderate length, got a whole number of 3322 bits",
        ),
        ({"answer": 5, "answer_kind": "maths"}, "auto", "answer_kind: expected one of choice, number, text, none"),
        ({"options": ["x", "y"], "answer": "x"}, "auto", "answer: expected a letter among A, B, got 'x'"),
        ({"options": ["x"] * 27, "answer": "A"}, "auto", "options: expected an object of texts by letter, or a list, "),
    ],
)
def test_answers_that_do_not_fit(tmp_path, row, stated, expected):
    with pytest.raises(InputError) as caught:
        read(tmp_path, {"question": "Which?", **row}, answer=stated)
    assert str(caught.value).startswith(f"{tmp_path}/own.jsonl:1: {expected}")


def test_a_file_does_not_mix_questions_with_and_without_an_answer(tmp_path):
    """A misspelt key in one row would make it a question that nothing is compared with."""
    right, bad = {"question": "1?", "answer": 1}, {"question": "2?", "anwser": 2}
    with pytest.raises(
        InputError, match=r"own\.jsonl:2: answer: expected answer in all records or in none, got one unl"
    ):
        read(tmp_path, right, bad)
    assert [question.kind for question in read(tmp_path, right, {**bad, "answer_kind": "none"})] == ["number", "none"]
    assert [question.kind for question in read(tmp_path, right, {"question": "2?", "answer": "two"})] == [
        "number",
        "text",
    ]


def test_columns_by_name_and_by_path(tmp_path):
    row = {
        "uid": 7,
        "body": {"stem": "Which?", "note": "n"},
        "choices": {"text": ["one", "two"], "label": ["A", "B"]},
        "gold": [{"letter": "B"}],
        "a.b": "kept",
        "question": "not this one",
    }
    columns = Columns(id="uid", question="body.stem", options="choices.text", answer="gold.0.letter")
    (question,) = read(tmp_path, row, columns=columns)
    assert (question.id, question.question, question.answer) == ("7", "Which?", "B")
    assert question.options == {"A": "one", "B": "two"}
    assert question.columns == {name: row[name] for name in ("body", "choices", "gold", "a.b")}
    (dotted,) = read(tmp_path, {"a.b": "Which?", "answer": 1}, columns=Columns(question="a.b"))
    assert dotted.question == "Which?"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"question": "text"}, "text: expected what data.columns.question names, got q, gold, body"),
        ({"question": "body.stem"}, "body.stem: expected what data.columns.question names, got q, gold, body"),
        ({"question": "body.2"}, "body.2: expected what data.columns.question names, got q, gold, body"),
        ({"question": "gold"}, "gold: expected a text, got 5"),
        ({"question": "q", "answer": "body"}, "body: expected a text, or a list of texts, got []"),
        ({"question": ""}, "question: expected a field of this name, got q, gold, body"),
    ],
)
def test_a_column_that_does_not_fit_is_named_as_the_file_has_it(tmp_path, columns, expected):
    with pytest.raises(InputError) as caught:
        read(tmp_path, {"q": "Which?", "gold": 5, "body": []}, columns=Columns(**columns))
    assert str(caught.value) == f"{tmp_path}/own.jsonl:1: {expected}"


def test_columns_and_kinds_are_only_for_questions_of_ones_own():
    for override in ("data.columns.answer=final", "data.answer=number"):
        key = override.partition("=")[0]
        with pytest.raises(InputError, match=rf"^{key}: expected it with data\.source=file or hub only, got data\.sou"):
            load_config(None, [override], model=False)
        assert load_config(None, [override, "data.source=file"], model=False)


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "My head hurts."},
    {"role": "assistant", "content": "Since when?"},
    {"role": "user", "content": "Since noon."},
]


def test_conversations(tmp_path):
    (question,) = read(tmp_path, {"messages": TALK})
    assert question.question == "Since noon."
    assert question.turns == (("system", "Be brief."), ("user", "My head hurts."), ("assistant", "Since when?"))
    assert read(tmp_path, {"messages": TALK, "question": "Since noon."}) == [question]
    assert read(tmp_path, {"messages": TALK[-1:]})[0].turns == ()
    assert read(tmp_path, {"messages": TALK[-1:]})[0].id != question.id
    assert read(tmp_path, {"talk": json.dumps(TALK)}, columns=Columns(messages="talk")) == [question]
    with pytest.raises(
        InputError, match=r"question: expected the last message, or no such column \(data\.columns\.que"
    ):
        read(tmp_path, {"messages": TALK, "question": "Other"})
    with pytest.raises(InputError, match=r"messages\.2\.role: expected user in the last message, got 'assistant'"):
        read(tmp_path, {"messages": TALK[:3]})


def test_tables_of_questions_without_options(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text('problem,solution,topic\n"How many?",18,sums\n"What of $5?",,\n')
    columns = Columns(question="problem", answer="solution")
    first, second = read_questions("file", str(path), "train", Data(columns=columns, answer="none"))
    assert (first.question, first.answer, first.columns) == ("How many?", "18", {"topic": "sums"})
    assert (second.question, second.answer) == ("What of $5?", "")
    with pytest.raises(InputError, match=r"own\.csv:3: solution: expected a number, got None"):
        read_questions("file", str(path), "train", Data(columns=columns, answer="number"))
    with pytest.raises(InputError, match=r"own\.csv:1: expected a header of different names, question or messages amo"):
        read_questions("file", str(path), "train")
    path.write_text("question,A,B,answer\nWhich?,one,two,A\n")
    assert read_questions("file", str(path), "train")[0].kind == "choice"


def test_dates_and_decimals_of_a_table_are_plain_and_bytes_are_refused(tmp_path):
    path = str(tmp_path / "own.parquet")
    row = {"question": "Which?", "answer": decimal.Decimal("1.50"), "day": datetime.date(2020, 1, 2)}
    pq.write_table(pa.Table.from_pylist([row]), path)
    (question,) = read_questions("file", path)
    assert (question.kind, question.answer, question.columns) == ("number", "1.5", {"day": "2020-01-02"})
    pq.write_table(pa.Table.from_pylist([{**row, "image": {"bytes": b"\x00\x01"}}]), path)
    with pytest.raises(
        InputError, match=r"row 1: image\.bytes: expected texts, numbers, lists or objects, got 2 bytes"
    ):
        read_questions("file", path)


def test_a_data_set_on_the_hub_by_its_id(tmp_path, monkeypatch):
    """Through `datasets` itself, on a folder laid out as the hub's repository is."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("easy", "hard"):
        (tmp_path / "hub" / name).mkdir(parents=True)
        lines(tmp_path / "hub" / name / "test.jsonl", {"q": f"{name}?", "gold": {"value": 5}})
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.jsonl\n"
        for name in ("easy", "hard")
    )
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    data = Data(source="hub", config="hard,easy", columns=Columns(question="q", answer="gold.value"))
    questions = read_questions("hub", str(tmp_path / "hub"), "test", data)
    assert [question.question for question in questions] == ["hard?", "easy?"]
    assert {question.kind for question in questions} == {"number"}
    with pytest.raises(InputError, match=r"hub \[hard/test\]: row 1: label: expected what data\.columns\.answer names"):
        read_questions(
            "hub", str(tmp_path / "hub"), "test", replace(data, columns=Columns(question="q", answer="label"))
        )


# ---- written and read back -------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(
    lambda value: value == value.strip()
)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), text), max_size=2).map(tuple)


@st.composite
def questions(draw):
    kind = draw(st.sampled_from(["choice", "number", "text", "none"]))
    options = {"A": draw(text), "B": draw(text)} if kind == "choice" or draw(st.booleans()) else {}
    answers = {"choice": st.just("B"), "number": st.integers().map(str), "text": text, "none": st.just("")}
    aliases = tuple(draw(st.lists(text, max_size=2))) if kind == "text" else ()
    columns = draw(st.dictionaries(text.filter(lambda name: name not in QUESTION_FIELDS), st.integers(), max_size=2))
    parts = draw(text), draw(text), options, draw(answers[kind]), draw(text), draw(text)
    return Question(*parts, columns, kind, aliases, draw(turns))


@settings(max_examples=25, deadline=None)
@given(st.lists(questions(), min_size=1, max_size=3, unique_by=lambda question: question.id))
def test_written_questions_read_back_the_same(tmp_path_factory, questions):
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    rows = [question_to_row(question) | dict(question.columns) for question in questions]
    # a question of kind none that has options, or a reference, is told from others by its answer_kind alone
    assert read_questions("file", lines(path, *rows)) == questions
    assert questions_from(rows) == questions
    answers = [Answer(question, 0, "text") for question in questions]
    read = read_answers(lines(path, *map(answer_to_row, answers)))
    reserved = {"response", "sample", "token_ids", "tokens", "stopped"}
    expected = [
        replace(question, columns={name: value for name, value in question.columns.items() if name not in reserved})
        for question in questions
    ]
    assert [answer.question for answer in read] == expected


def test_digests_tell_questions_apart_and_those_with_options_keep_theirs():
    choice = Question("q", "Which?", {"A": "one", "B": "two"}, "A")
    assert question_digest(choice) == "5dd3c61cec8e922c"
    number = Question("q", "Which?", {}, "5", kind="number")
    variants = [choice, number, replace(number, kind="text"), replace(number, kind="text", aliases=("five",))]
    variants += [replace(number, turns=(("user", "Hello"),)), replace(number, answer="6")]
    assert len({question_digest(question) for question in variants}) == len(variants)


# ---- random rows -----------------------------------------------------------------------------------------------------

ROWS = int(os.environ.get("CRPO_JAX_FUZZ_ROWS", "150"))
"""Per format."""

NAMES = ["id", "question", "messages", "options", "answer", "answer_kind", "source", "split", "A", "B", "x", "a.b", ""]
SCALARS = [
    None, True, 0, 1, -1, 10**400, 2.5, float("nan"), float("inf"), "", " ", "A", "B", "5", "1/0", "Which?", "\ud800",
    "\x00", "[", "{", '["one", "two"]', '{"A": "one", "B": "two"}', '[{"role": "user", "content": "Hi"}]', "number",
]  # fmt: skip


def random_value(dice, depth=2):
    shape = dice.random()
    if depth == 0 or shape < 0.6:
        return dice.choice(SCALARS)
    if shape < 0.7:
        return {letter: random_value(dice, 0) for letter in "ABC"[: dice.randint(0, 3)]}
    if shape < 0.8:
        content = dice.choice(["Hi", "", None, 5])
        return [{"role": dice.choice(["user", "assistant", "tool", None]), "content": content}] * dice.randint(0, 2)
    return [random_value(dice, depth - 1) for _ in range(dice.randint(0, 3))]


def random_row(dice):
    row = {"question": f"Which {dice.random()}?"} if dice.random() < 0.8 else {}
    return row | {dice.choice(NAMES): random_value(dice) for _ in range(dice.randint(0, 4))}


def random_table(dice):
    """Columns of any type, with the names that matter among them."""
    types = {
        pa.string(): ["A", "5", "Which?", "", None, '["a", "b"]'],
        pa.int64(): [0, 1, -5, None],
        pa.float64(): [0.5, float("nan"), float("inf"), None],
        pa.bool_(): [True, None],
        pa.binary(): [b"x", None],
        pa.date32(): [datetime.date(1, 1, 1), None],
        pa.timestamp("ns"): [1, 10**18 + 1, None],
        pa.duration("us"): [datetime.timedelta(5), None],
        pa.decimal128(9, 2): [decimal.Decimal("1.25"), None],
        pa.list_(pa.string()): [["a", "b"], [], None, [None]],
        pa.struct([("A", pa.string()), ("B", pa.string())]): [{"A": "x", "B": "y"}, {"A": None, "B": None}, None],
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])): [
            [{"role": "user", "content": "Hi"}],
            [{"role": None, "content": None}],
        ],
        pa.map_(pa.string(), pa.string()): [[("A", "x")], None],
    }
    count = dice.randint(1, 4)
    table = {"question": pa.array([f"Which {dice.random()}?" for _ in range(count)])} if dice.random() < 0.8 else {}
    for _ in range(dice.randint(0, 4)):
        kind = dice.choice(list(types))
        table[dice.choice(NAMES[:-1])] = pa.array([dice.choice(types[kind]) for _ in range(count)], kind)
    return pa.table(table or {"x": pa.array([1])})


def write_random(dice, path):
    """A file of a few random rows in the format of its ending; how many."""
    if path.suffix == ".parquet":
        table = random_table(dice)
        pq.write_table(table, path)
        return table.num_rows
    rows = [random_row(dice) for _ in range(dice.randint(1, 4))]
    if path.suffix == ".csv":
        names = ["question", *dice.sample(NAMES[:-1], dice.randint(0, 3))]
        rows = rows[:2]
        with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            cells = [[f"Which {dice.random()}?", *(str(random_value(dice, 1)) for _ in names[1:])] for _ in rows]
            csv.writer(file).writerows([names, *cells] if dice.random() < 0.9 else cells)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=dice.choice([None, 1])))
    else:
        lines(path, *rows)
    return len(rows)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_random_rows_are_questions_or_refused_in_one_line(tmp_path, ending):
    """What is read can be written as samples are, and read back the same."""
    dice, path, rows, read, refusals = random.Random(ending), tmp_path / f"own{ending}", 0, 0, []
    while rows < ROWS:
        rows += write_random(dice, path)
        data = Data(answer=dice.choice(["auto", "auto", "choice", "number", "text", "none"]))
        if dice.random() < 0.3:
            names = dict.fromkeys(["id", "question", "messages", "options", "answer"])
            data = replace(
                data, columns=Columns(**{name: dice.choice([name, name, "x", "a.b", "x.0", ""]) for name in names})
            )
        try:
            questions = read_questions("file", str(path), "train", data)
        except InputError as error:
            refusals.append(str(error))
            continue
        read += len(questions)
        written = [question_to_row(question) | dict(question.columns) for question in questions]
        again = questions_from(json.loads(json.dumps(written)))
        assert json.dumps(list(map(asdict, again))) == json.dumps(list(map(asdict, questions)))
    assert read > rows / 50, "some of them are questions"
    assert all(line.startswith(str(path)) and "\n" not in line for line in refusals)


# ---- as data sets of an evaluation -----------------------------------------------------------------------------------


def test_data_sets_of_an_evaluation_by_name_file_and_folder(tmp_path, monkeypatch):
    from crpo_jax.evaluate import load_data_sets

    (tmp_path / "folder").mkdir()
    lines(tmp_path / "folder" / "test.jsonl", {"q": "In a folder?", "gold": 1})
    sums = lines(tmp_path / "sums.jsonl", {"q": "How many?", "gold": 5})
    gsm8k = lines(tmp_path / "gsm8k.jsonl", {"question": "How many?", "answer": "Two.\n#### 2"})
    settings = load_config(
        None, ["data.source=file", "data.columns.question=q", "data.columns.answer=gold"], model=False
    )
    sets = load_data_sets([sums, f"file={tmp_path}/folder", f"gsm8k={gsm8k}"], settings)
    assert [(name, question.question, question.answer) for name, (question,) in sets.items()] == [
        ("sums", "How many?", "5"),
        ("folder", "In a folder?", "1"),
        ("gsm8k", "How many?", "2"),
    ]
    with pytest.raises(
        InputError, match=r"^--data gsm=x: expected vignettes, arithmetic, medqa, .*, a file of questions, file=FOLDER"
    ):
        load_data_sets(["gsm=x"], settings)


def test_numbers_are_counted_right_in_an_evaluation():
    from crpo_jax.answer.statistics import summarize

    number = Question("n", "How many?", {}, "1200", kind="number")
    texts = ("1,200", "$1200", "1300", "many")
    answers = [
        Answer(number, sample, f"<think>so</think><answer>\\boxed{{{text}}}</answer>")
        for sample, text in enumerate(texts)
    ]
    summary, _ = summarize(answers, load_config(None, ["reward.workers=0"], model=False))
    assert (summary["accuracy"]["mean"], summary["valid"]["mean"]) == (0.5, 0.75)
