"""Data sets in their published form: rows of their schemas, with content of our own, and what is refused in them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crpo_jax.data.readers import read_questions
from crpo_jax.errors import InputError

GSM8K = {"question": "Two packs of 9. How many?", "answer": "2 * 9 = <<2*9=18>>18 swabs.\n#### 1,018"}
MATH500 = {
    "problem": "Solve $2x = 1$.",
    "solution": "Halve. $\\boxed{\\frac{1}{2}}$",
    "answer": "\\frac{1}{2}",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/1.json",
}
PUBMEDQA = {
    "pubid": 123,
    "question": "Does rest help?",
    "context": {
        "contexts": ["To see whether rest helps.", "Of 40 at rest, 30 were better."],
        "labels": ["OBJECTIVE", "RESULTS"],
        "meshes": ["Rest"],
        "reasoning_required_pred": ["y"],
        "reasoning_free_pred": ["y"],
    },
    "long_answer": "Rest helped.",
    "final_decision": "yes",
}
MMLU = {"question": "Which bone?", "subject": "anatomy", "choices": ["ulna", "tibia", "skull", "rib"], "answer": 2}
HEALTHBENCH = {
    "prompt_id": "p-1",
    "prompt": [
        {"role": "user", "content": "My head hurts."},
        {"role": "assistant", "content": "Since when?"},
        {"role": "user", "content": "Since noon."},
    ],
    "rubrics": [
        {"criterion": "Asks about fever", "points": 5, "tags": ["axis:completeness"]},
        {"criterion": "Prescribes opioids", "points": -8, "tags": ["axis:accuracy"]},
    ],
    "example_tags": ["theme:context_seeking"],
    "ideal_completions_data": None,
    "canary": "none",
}
FIVE = {
    "question": "Which?",
    "answer": "e",
    "options": {letter: letter.lower() for letter in "ABCDE"},
    "meta_info": "step2&3",
    "answer_idx": "E",
}
SETS = {"gsm8k": GSM8K, "math500": MATH500, "pubmedqa": PUBMEDQA, "mmlu": MMLU, "healthbench": HEALTHBENCH}


def as_lines(path, rows):
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


@pytest.mark.parametrize("write", [as_lines, as_parquet])
@pytest.mark.parametrize(
    ("source", "row", "identity", "question", "answer", "kind", "columns"),
    [
        ("gsm8k", GSM8K, "gsm8k-test-000000", GSM8K["question"], "1,018", "number", {"solution"}),
        ("math500", MATH500, "test/algebra/1.json", MATH500["problem"], "\\frac{1}{2}", "number", {"level", "subject"}),
        (
            "pubmedqa",
            PUBMEDQA,
            "123",
            "To see whether rest helps.\nOf 40 at rest, 30 were better.\n\nDoes rest help?\nAnswer yes, no or maybe.",
            "yes",
            "text",
            {"context", "long_answer"},
        ),
        ("mmlu", MMLU, "mmlu-anatomy-test-000000", "Which bone?", "C", "choice", {"subject"}),
        ("healthbench", HEALTHBENCH, "p-1", "Since noon.", "", "none", {"rubrics", "example_tags"}),
        ("medqa", FIVE, "medqa-test-000000", "Which?", "E", "choice", {"meta_info"}),
    ],
)
def test_a_row_of_the_published_schema(tmp_path, write, source, row, identity, question, answer, kind, columns):
    write(tmp_path / "test", [row])
    (read,) = read_questions(source, str(tmp_path), "test")
    assert (read.id, read.question, read.answer, read.kind, read.source) == (identity, question, answer, kind, source)
    assert columns <= set(read.columns)
    assert read.columns.get("rubrics") == row.get("rubrics")


def test_the_parts_that_are_no_text(tmp_path):
    as_lines(tmp_path / "mmlu", [MMLU, MMLU, MMLU | {"subject": "virology"}])
    questions = read_questions("mmlu", str(tmp_path / "mmlu.jsonl"), "test")
    assert questions[0].options == {"A": "ulna", "B": "tibia", "C": "skull", "D": "rib"}
    assert [question.id for question in questions[1:]] == ["mmlu-anatomy-test-000001", "mmlu-virology-test-000000"]
    as_lines(tmp_path / "bench", [HEALTHBENCH])
    (question,) = read_questions("healthbench", str(tmp_path / "bench.jsonl"), "test")
    assert question.turns == (("user", "My head hurts."), ("assistant", "Since when?"))
    rows = [MATH500 | {"answer": text, "unique_id": text} for text in ("5", "50\\%", "2\\pi", "\\text{even}", "(1,2)")]
    as_lines(tmp_path / "math", rows)
    kinds = [question.kind for question in read_questions("math500", str(tmp_path / "math.jsonl"), "test")]
    assert kinds == ["number", "text", "text", "text", "text"]


def test_medical_subjects_of_mmlu_by_default_and_any_by_name(tmp_path):
    from crpo_jax.config import Data
    from crpo_jax.data.files import MEDICAL_SUBJECTS

    for subject in (*MEDICAL_SUBJECTS.split(","), "astronomy"):
        folder = tmp_path / "mmlu" / subject
        folder.mkdir(parents=True)
        for split in ("dev", "validation", "test"):
            as_parquet(folder / f"{split}-00000-of-00001", [MMLU | {"subject": subject, "question": f"{split}?"}])
    questions = read_questions("mmlu", str(tmp_path / "mmlu"), "validation")
    assert [question.columns["subject"] for question in questions] == MEDICAL_SUBJECTS.split(",")
    assert {question.question for question in questions} == {"validation?"}
    (other,) = read_questions("mmlu", str(tmp_path / "mmlu"), "dev", Data(config="astronomy"))
    assert (other.columns["subject"], other.question) == ("astronomy", "dev?")
    with pytest.raises(InputError, match=r"expected a folder for each of data\.config=anatomy,law, got none for law"):
        read_questions("mmlu", str(tmp_path / "mmlu"), "dev", Data(config="anatomy,law"))


@pytest.mark.parametrize(
    ("source", "changed", "expected"),
    [
        ("gsm8k", {"answer": "18"}, "answer: expected a solution that ends in #### and a number, got '18'"),
        ("gsm8k", {"answer": "#### x"}, "answer: expected a solution that ends in #### and a number, got '#### x'"),
        ("math500", {"problem": None}, "problem: expected a text, got None"),
        ("pubmedqa", {"final_decision": "Yes"}, "final_decision: expected one of yes, no, maybe, got 'Yes'"),
        ("pubmedqa", {"context": "text"}, "context: expected an object with a list of contexts, got 'text'"),
        ("pubmedqa", {"context": {"contexts": [5]}}, "context.contexts.0: expected a text, got 5"),
        ("mmlu", {"answer": 4}, "answer: expected a whole number from 0 to 3, got 4"),
        ("mmlu", {"answer": "C"}, "answer: expected a whole number from 0 to 3, got 'C'"),
        ("mmlu", {"choices": ["one"]}, "choices: expected a list of two to 26 texts, got ['one']"),
        ("mmlu", {"choices": ["one", None]}, "choices.1: expected a text, got None"),
        ("healthbench", {"prompt": []}, "prompt: expected a list of messages with role and content, got []"),
        ("healthbench", {"prompt": [5]}, "prompt.0: expected a message with role and content, got 5"),
        (
            "healthbench",
            {"prompt": [{"role": "tool", "content": "x"}]},
            "prompt.0.role: expected one of system, user, assistant, got 'tool'",
        ),
        (
            "healthbench",
            {"prompt": [{"role": "assistant", "content": "x"}]},
            "prompt.0.role: expected user in the last message, got 'assistant'",
        ),
        ("healthbench", {"rubrics": [{"criterion": "x"}]}, "rubrics.0.points: expected a number, got None"),
        ("healthbench", {"rubrics": [{"points": 1}]}, "rubrics.0.criterion: expected a text, got None"),
    ],
)
def test_bad_rows(tmp_path, source, changed, expected):
    path = tmp_path / "test.jsonl"
    as_lines(path, [SETS[source], SETS[source] | {"id": "other"} | changed])
    with pytest.raises(InputError) as caught:
        read_questions(source, str(path), "test")
    assert str(caught.value) == f"{path}:2: {expected}"
