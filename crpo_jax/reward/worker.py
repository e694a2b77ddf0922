"""What runs inside a scoring process: built-in designs response by response, reward functions batch by batch.

The process imports the reward modules and the user's functions and nothing else of this package. It is started afresh
(never forked) without access to the accelerators, and ends with its parent, whatever ends that.
"""

import faulthandler
import os
import pickle
import signal
import socket
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.reward.functions import BadRewards, Failure, RewardFunction, call_function, failure_of, load_function
from crpo_jax.reward.parts import score_parts
from crpo_jax.reward.rules import Score, TokenIds, score_response


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a scoring process needs once: the settings, the effective-token table, and how to import the functions."""

    settings: Reward
    effective: np.ndarray | None
    built_in: Sequence[str]  # the parts of reward.parts that the design names
    paths: Mapping[str, str]  # `module:function` by the function's name in the design
    search: Sequence[str]  # the parent's sys.path


BUILT_IN = "built-in parts"
"""The job of the parts of `reward.parts`, which are scored together: no function can have this name."""


@dataclass(frozen=True, slots=True)
class ScoringJob:
    """Responses to be scored by one part of the design, or by all BUILT_IN ones."""

    part: str
    questions: Sequence[Question]
    responses: Sequence[str]
    token_ids: Sequence[TokenIds] | None


HEADER = struct.Struct("!Q")
"""Before each message to the run: its length in bytes."""

SOCKET_CLOSED = 98
"""The exit code of a scoring process whose function closed the socket to the run."""

Value = Score | float | None  # a built-in's score, or a function's reward; None: not applicable, TRL's convention


class PartScorer:
    """Scores jobs by the parts of a design; the functions among them are imported once, or given as objects."""

    def __init__(self, setup: WorkerSetup, functions: Mapping[str, RewardFunction] | None = None) -> None:
        self.setup = setup
        sys.path.extend(folder for folder in setup.search if folder not in sys.path)
        self.functions = {name: load_function(path) for name, path in setup.paths.items()} | dict(functions or {})
        self.async_limit = setup.settings.time_limit if functions else None  # else the process is killed at its limit

    def problems(self) -> dict[str, str]:
        """What is wrong with the functions that could not be loaded, by name."""
        return {name: loaded.error for name, loaded in self.functions.items() if isinstance(loaded, Failure)}

    def score(self, job: ScoringJob) -> Sequence[Value | Failure] | Failure:
        """A value per response; a single Failure where a function raised on a batch of several."""
        if job.part not in self.functions:
            return self.score_each(job)
        function = self.functions[job.part]
        if isinstance(function, Failure):
            return [function] * len(job.responses)
        try:
            return call_function(function, job.questions, job.responses, job.token_ids, self.async_limit)
        except BadRewards as error:  # one by one it would be no better, or only seem so
            return [Failure(str(error))] * len(job.responses)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (a function may raise anything; it is recorded, never hidden)
            return failure_of(error) if len(job.responses) > 1 else [failure_of(error)]

    def score_each(self, job: ScoringJob) -> Sequence[Value | Failure]:
        setup, values = self.setup, []
        settings = replace(setup.settings, design=job.part)
        for row, (question, response) in enumerate(zip(job.questions, job.responses, strict=True)):
            ids = None if job.token_ids is None else job.token_ids[row]
            try:
                if job.part == BUILT_IN:
                    score = score_parts(question, response, setup.settings, ids, setup.effective, setup.built_in)
                else:
                    score = score_response(question, response, settings, ids, setup.effective)
                values.append(score)
            except Exception as error:  # noqa: BLE001 (recorded with its traceback; one response must not end the others)
                values.append(failure_of(error))
        return values


def die_with_parent(lifeline: int) -> None:
    """End this process when the parent's end of the pipe closes, which the kernel does however the parent dies.

    On Linux the kernel itself sends a signal, which also ends code that never releases the interpreter (a regular
    expression that backtracks forever). Elsewhere a thread waits for the end of the pipe.
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


def main(socket_fd: int, lifeline_fd: int, stack_fd: int) -> None:
    """Receive a WorkerSetup, answer with its problems, then answer every ScoringJob with its values until the run hangs
    up."""
    for fd in (socket_fd, lifeline_fd, stack_fd):
        os.set_inheritable(fd, False)  # a program that a function starts has no business with them
    process = os.getpid()
    die_with_parent(lifeline_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when an interrupted run ends its workers
    faulthandler.register(signal.SIGUSR1, file=stack_fd, all_threads=False)  # the stack of code that took too long
    stream = socket.socket(fileno=socket_fd).makefile("rwb")

    def answer(message: Any) -> None:
        if os.getpid() != process:  # a child that a function forked and let return: its parent answers
            os._exit(0)
        data = pickle.dumps(message)
        stream.write(HEADER.pack(len(data)) + data)
        stream.flush()

    try:
        part_scorer = PartScorer(pickle.load(stream))  # noqa: S301 (from the run)
        answer(part_scorer.problems())
        while True:
            answer(part_scorer.score(pickle.load(stream)))  # noqa: S301
    except EOFError:  # the run has hung up
        os._exit(0)
    except OSError:
        os._exit(SOCKET_CLOSED)
