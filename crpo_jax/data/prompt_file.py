"""Prompts written by users: a Jinja file that makes the user turn of a question, rendered in a process of its own.

The process bounds the time and the memory that a question takes, and nothing that the file says can reach this one.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crpo_jax.data.prompt_worker import TIME_LIMIT, Job
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError

LONGEST_FILE = 1_000_000  # bytes


def read_text(key: str, path: Path) -> str:
    """A text file that a setting names."""
    try:
        with open(path.expanduser(), "rb") as file:
            text = file.read(LONGEST_FILE + 1)
        if len(text) > LONGEST_FILE:
            raise InputError(f"{key}: {path}: expected at most {LONGEST_FILE:,} bytes, got more")
        return text.decode("utf-8")
    except OSError as error:
        raise InputError(f"{key}: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at offset {error.start}"
        raise InputError(f"{key}: {path}: expected UTF-8 text, got byte {byte}") from None


def variables(question: Question) -> dict[str, Any]:
    """What a file can name: the question's fields without its right answers, and its other columns by their names."""
    fields = {
        "id": question.id,
        "question": question.question,
        "options": dict(question.options),
        "turns": [{"role": role, "content": content} for role, content in question.turns],
        "source": question.source,
        "split": question.split,
        "columns": dict(question.columns),
    }
    return {**question.columns, **fields}


def render_turns(path: Path, questions: Sequence[Question], limit: float = TIME_LIMIT) -> list[str]:
    """The user turn of every question, without white space around it; `limit` is in seconds for each of them.

    Raises InputError with the file, the line and the question where one fails, takes too long or says nothing.
    """
    job = Job(read_text("data.prompt", path), [variables(question) for question in questions], limit)
    search = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from crpo_jax.data.prompt_worker import main; main()"],
        input=pickle.dumps(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": search, "OPENBLAS_NUM_THREADS": "1"},  # columns may be arrays
        check=False,
    )
    replies = [json.loads(line) for line in done.stdout.split(b"\n")[:-1]]
    turns = [reply["text"] for reply in replies if "text" in reply]
    if len(turns) == len(questions):
        return turns
    where, question = f"data.prompt: {path}", f"question {questions[len(turns)].id}"
    if len(replies) > len(turns):
        line, error = replies[-1]["line"], replies[-1]["error"]
        raise InputError(f"{where}:{line}: {question}: {error}" if line else f"{where}: {question}: {error}")
    if done.returncode == -signal.SIGALRM:
        raise InputError(f"{where}: {question}: expected a turn within {limit:g} s, got none")
    raise InputError(f"{where}: {question}: expected a turn, got the end of its process, exit code {done.returncode}")
