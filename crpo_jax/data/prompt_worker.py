"""What runs inside the process that renders a user's prompt file, in Jinja's sandbox and under limits of its own.

It imports jinja2 and nothing of this package. A question whose rendering takes too long ends the process by SIGALRM,
even inside a single operation such as 9**(9**9), which Jinja computes as it reads the file.
"""

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TIME_LIMIT = 10.0  # seconds for a question
MEMORY_LIMIT = 2**30  # bytes, besides what the questions take
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


def replies(job: Job) -> Iterator[dict[str, Any]]:
    """The turn of every question, as far as the first error: what it was, and the line of the file."""
    environment = sandbox()
    try:
        signal.setitimer(signal.ITIMER_REAL, job.limit)
        template = environment.from_string(job.source)
        for variables in job.variables:
            signal.setitimer(signal.ITIMER_REAL, job.limit)
            yield {"text": render(template, variables)}
    except Exception as error:  # noqa: BLE001 (a template may raise anything; it is reported by the run)
        text = " ".join(str(error).split()) or type(error).__name__
        yield {"error": text[:1000], "line": line_of(error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Read a Job from standard input and write a line of JSON per reply to standard output."""
    data, most = sys.stdin.buffer.read(), resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_LIMIT + 10 * len(data)
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for reply in replies(pickle.loads(data)):  # noqa: S301 (from the run)
        print(json.dumps(reply), flush=True)
    os._exit(0)
