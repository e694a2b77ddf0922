"""What runs inside a scoring process: built-in designs response by response, a user's functions batch by batch.

The process imports the reward modules and the user's function and nothing else of this package. It is started afresh
(never forked) without sight of the accelerators, and ends with its parent, however that dies.
"""

import faulthandler
import importlib
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.reward import rules
from crpo_jax.reward.rules import Score, TokenIds


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a response has no score; it carries no gradient."""

    error: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a scoring process needs once: the settings, the effective-token table, the user's functions by name."""

    settings: Reward
    effective: np.ndarray | None
    functions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """Responses to be scored by one part of the design."""

    part: str
    questions: Sequence[Question]
    responses: Sequence[str]
    token_ids: Sequence[TokenIds] | None


Value = Score | float | None  # a built-in's score, or a function's reward; None: not applicable, TRL's convention


class Desk:
    """The parts of a design, loaded once and ready to work."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.functions = {name: load_function(name) for name in setup.functions}

    def work(self, job: Job) -> Sequence[Value | Failure] | Failure:
        """A value per response; a Failure alone where a function raised on a batch, whose responses can be tried one by one."""
        if job.part not in self.functions:
            return self.score_each(job)
        function = self.functions[job.part]
        if isinstance(function, Failure):
            return [function] * len(job.responses)
        try:
            return call(function, job)
        except NotRewards as error:  # it would be no better with single responses, or only seem so
            return [failure(error)] * len(job.responses)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a user's function may raise anything; it is recorded, never hidden)
            return failure(error) if len(job.responses) > 1 else [failure(error)]

    def score_each(self, job: Job) -> Sequence[Value | Failure]:
        settings, values = replace(self.setup.settings, design=job.part), []
        for row, (question, response) in enumerate(zip(job.questions, job.responses, strict=True)):
            ids = None if job.token_ids is None else job.token_ids[row]
            try:
                values.append(rules.score(question, response, settings, token_ids=ids, effective=self.setup.effective))
            except Exception as error:  # noqa: BLE001 (recorded with its traceback; one response must not end the others)
                values.append(failure(error))
        return values


def failure(error: BaseException) -> Failure:
    return Failure(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


class NotRewards(Exception):
    """A function returned something else than a list with a reward for each completion."""


def load_function(name: str) -> Callable[..., Any] | Failure:
    """The function named `module:function`, looked for in the working directory as well; a Failure that says why not."""
    module, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
        if not callable(found):
            raise TypeError(f"{name} is no function but {found!r}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 (an import runs any code)
        return failure(error)
    return found


RESERVED = ("prompts", "completions", "completion_ids")


def call(function: Callable[..., Any], job: Job) -> list[float | Failure | None]:
    """A user's rewards for a whole batch, TRL's convention.

    The function gets `prompts` (the questions' texts), `completions`, `completion_ids` where the tokens are known, and
    by name a list per column: id, answer, options, source, split and every extra column of the questions.
    """
    columns: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for question in job.questions for key in question.columns):
        columns[key] = [question.columns.get(key) for question in job.questions]
    for key in ("id", "answer", "options", "source", "split"):
        columns[key] = [getattr(question, key) for question in job.questions]
    for key in RESERVED:
        columns.pop(key, None)
    if job.token_ids is not None:
        columns["completion_ids"] = [list(map(int, ids)) for ids in job.token_ids]
    rewards = function(
        prompts=[question.question for question in job.questions], completions=list(job.responses), **columns
    )
    try:
        rewards = list(rewards)
    except TypeError:
        raise NotRewards(f"{job.part}: expected a list of {len(job.responses)} rewards, got {rewards!r}") from None
    if len(rewards) != len(job.responses):
        raise NotRewards(f"{job.part}: expected {len(job.responses)} rewards, one per completion, got {len(rewards)}")
    return [None if reward is None else number(reward, job.part) for reward in rewards]


def number(reward: Any, name: str) -> float | Failure:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        return Failure(f"{name}: expected a number or None as reward, got {reward!r}")
    return value if math.isfinite(value) else Failure(f"{name}: expected a finite reward, got {value}")


def die_with_parent(lifeline: int) -> None:
    """End this process when the parent's end of the pipe closes, which the kernel does however the parent dies.

    On Linux the kernel sends the signal itself, so that it also ends code that never lets go of the interpreter (a regular
    expression that backtracks for ever). Elsewhere a thread waits for it.
    """
    if sys.platform == "linux":
        import fcntl  # not on every system

        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> None:
        os.read(lifeline, 1)  # nothing is ever written: this returns when the other end is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(connection_fd: int, lifeline_fd: int, stack_fd: int) -> None:
    """Receive a Setup, answer "ready", then answer every Job with its values until the parent hangs up."""
    die_with_parent(lifeline_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when an interrupted run ends its workers
    faulthandler.register(signal.SIGUSR1, file=stack_fd, all_threads=False)  # where was it, when its time was up
    connection = Connection(connection_fd)
    try:
        desk = Desk(connection.recv())
        connection.send("ready")
        while True:
            connection.send(desk.work(connection.recv()))
    except (EOFError, ConnectionError):
        return
