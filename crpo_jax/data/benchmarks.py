"""Questions from the records of GSM8K, MATH-500, PubMedQA, MMLU and HealthBench, in their published form. No jax."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from crpo_jax.data.number import read_number
from crpo_jax.data.question import LETTERS, Question
from crpo_jax.data.record import Record, is_number

DECISIONS = ("yes", "no", "maybe")


def read_gsm8k(records: Sequence[Record], split: str) -> Iterator[Question]:
    """GSM8K: `answer` is the solution and, after ####, the number; the column `solution` keeps the former."""
    for number, record in enumerate(records):
        solution, mark, answer = record.text("answer").rpartition("####")
        if not mark or not read_number(answer):
            record.fail("answer", "a solution that ends in #### and a number", record.value("answer"))
        columns = {"solution": solution.strip(), **record.columns("id", "question", "answer", "solution")}
        identity = record.identity("id", default=f"gsm8k-{split}-{number:06d}")
        yield Question(identity, record.text("question"), {}, answer.strip(), "gsm8k", split, columns, "number")


def read_math500(records: Sequence[Record], split: str) -> Iterator[Question]:
    """MATH-500: `problem` and its `answer` in LaTeX, compared as a number where it is one without a unit."""
    for record in records:
        answer = record.text("answer")
        number = read_number(answer)
        kind = "number" if number and not number.unit else "text"
        columns = record.columns("unique_id", "problem", "answer")
        identity = record.identity("unique_id", "id")
        yield Question(identity, record.text("problem"), {}, answer, "math500", split, columns, kind)


def read_pubmedqa(records: Sequence[Record], split: str) -> Iterator[Question]:
    """PubMedQA: `context.contexts`, the abstract without its conclusion, then `question`; `final_decision` is yes, no
    or maybe."""
    for record in records:
        context = record.structure("context")
        passages = context.get("contexts") if isinstance(context, Mapping) else None
        if not isinstance(passages, Sequence) or isinstance(passages, str | bytes) or not passages:
            record.fail("context", "an object with a list of contexts", context)
        abstract = "\n".join(record.check_text(f"context.contexts.{n}", text) for n, text in enumerate(passages))
        decision = record.text("final_decision")
        if decision not in DECISIONS:
            record.fail("final_decision", f"one of {', '.join(DECISIONS)}", decision)
        question = f"{abstract}\n\n{record.text('question')}\nAnswer yes, no or maybe."
        columns = record.columns("pubid", "question", "final_decision")
        yield Question(record.identity("pubid", "id"), question, {}, decision, "pubmedqa", split, columns, "text")


def read_mmlu(records: Sequence[Record], split: str) -> Iterator[Question]:
    """MMLU: `choices` in a list, and `answer`, the position of the right one from 0."""
    rows = Counter[str]()
    for record in records:
        choices, answer = record.structure("choices"), record.value("answer")
        if not isinstance(choices, Sequence) or isinstance(choices, str | bytes) or not 2 <= len(choices) <= 26:
            record.fail("choices", "a list of two to 26 texts", choices)
        options = {LETTERS[n]: record.check_text(f"choices.{n}", text) for n, text in enumerate(choices)}
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
            record.fail("answer", f"a whole number from 0 to {len(options) - 1}", answer)
        columns = record.columns("id", "question", "choices", "answer")
        subject = record.text("subject") if record.has("subject") else "all"
        identity = record.identity("id", default=f"mmlu-{subject}-{split}-{rows[subject]:06d}")
        rows[subject] += 1
        yield Question(identity, record.text("question"), options, LETTERS[answer], "mmlu", split, columns)


def read_healthbench(records: Sequence[Record], split: str) -> Iterator[Question]:
    """HealthBench: the conversation in `prompt`, and `rubrics`, each with a criterion and its points, which stay a
    column for the reward; there is no right answer."""
    for record in records:
        *turns, (_, question) = record.messages("prompt")
        rubrics = record.structure("rubrics")
        if not isinstance(rubrics, Sequence) or isinstance(rubrics, str | bytes) or not rubrics:
            record.fail("rubrics", "a list of criteria with points", rubrics)
        for place, rubric in enumerate(rubrics):
            if not isinstance(rubric, Mapping):
                record.fail(f"rubrics.{place}", "an object with criterion and points", rubric)
            record.check_text(f"rubrics.{place}.criterion", rubric.get("criterion"))
            if not is_number(rubric.get("points")):
                record.fail(f"rubrics.{place}.points", "a number", rubric.get("points"))
        columns = {**record.columns("prompt_id", "prompt"), "rubrics": rubrics}
        identity = record.identity("prompt_id", "id")
        yield Question(identity, question, {}, "", "healthbench", split, columns, kind="none", turns=tuple(turns))
