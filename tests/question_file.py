"""Questions written in the project's own format."""

import json
from collections.abc import Iterable
from pathlib import Path

from crpo_jax.data.question import Question


def write_jsonl(path: Path, questions: Iterable[Question]) -> None:
    """One question a line, as `read_questions("jsonl", path)` gives them back, columns included."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for question in questions:
            own = {
                name: value
                for name in ("id", "question", "answer", "source", "split")
                if (value := getattr(question, name)) or name == "id"
            }
            file.write(
                json.dumps(own | {"options": dict(question.options)} | dict(question.columns), ensure_ascii=False)
                + "\n"
            )
