"""What runs inside the process that renders a user's prompt file, in Jinja's sandbox and under limits of its own.

It imports jinja2 and nothing of this package. A question whose rendering takes too long ends the process by SIGALRM,
even inside a single operation such as 9**9**9.
"""

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

TIME_LIMIT = 10.0  # seconds for a question
MEMORY_LIMIT = 4 * 2**30  # bytes
LONGEST_TURN = 200_000  # characters


@dataclass(frozen=True, slots=True)
class Job:
    """A file's text and the variables of every question; the limit is in seconds for each."""

    source: str
    variables: Sequence[Mapping[str, Any]]
    limit: float


class TurnTooLong(Exception):
    """A turn has more than LONGEST_TURN characters."""


def sandbox() -> Any:
    """The environment of prompt files: undefined names are errors, and nothing is drawn at random.

    Blocks leave no blank lines behind, as in chat templates.
    """
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


def render(template: Any, variables: Mapping[str, Any]) -> str:
    """The user turn of a question."""
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST_TURN:
            raise TurnTooLong(f"expected a turn of at most {LONGEST_TURN:,} characters, got more")
    text = "".join(pieces).strip()
    if not text:
        raise ValueError("expected a turn, got nothing but white space")
    text.encode()  # a lone surrogate has no UTF-8
    return text


def line_of(error: BaseException) -> int | None:
    """The line of the file at which an error arose."""
    if line := getattr(error, "lineno", None):
        return line
    trace, line = error.__traceback__, None
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<template>" else line
        trace = trace.tb_next
    return line


def answer_job(job: Job, out: IO[str]) -> None:
    """A line of JSON per question: its turn, or at the first error what it was and the line where it arose."""
    try:
        signal.setitimer(signal.ITIMER_REAL, job.limit)
        template = sandbox().from_string(job.source)
        for variables in job.variables:
            signal.setitimer(signal.ITIMER_REAL, job.limit)
            out.write(json.dumps({"text": render(template, variables)}) + "\n")
            out.flush()
    except Exception as error:  # noqa: BLE001 (a template may raise anything; it is reported by the run)
        text = " ".join(str(error).split()) or type(error).__name__
        out.write(json.dumps({"error": text[:1000], "line": line_of(error)}) + "\n")
        out.flush()


def main() -> None:
    """Read a Job from standard input and answer it on standard output."""
    job = pickle.load(sys.stdin.buffer)  # noqa: S301 (from the run)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT if most < 0 else min(MEMORY_LIMIT, most), most))
    answer_job(job, sys.stdout)
    sys.stdout.flush()
    os._exit(0)
