"""Scores of many responses in worker processes, while the caller does other work.

A response is never scored 0 because something went wrong: what raises, or takes longer than `reward.time_limit`, becomes
a Failure with the traceback, and more failures than `reward.max_failed_share` end the run with an explanation.

Built-in designs go to the workers in small chunks, a user's function gets each submitted batch whole. A chunk or batch
that overruns the limit or loses its worker is done again response by response, each with the whole limit to itself: so
one that hangs costs only itself, and a function that is slower on a whole batch than the limit still gets its answers.
"""

import contextlib
import logging
import math
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward import rules
from crpo_jax.reward.rules import Score, TokenIds
from crpo_jax.reward.worker import Desk, Failure, Job, Setup, Value

__all__ = ["Batch", "Failure", "Scored", "Scorer", "ScoringError", "design_parts"]

Scored = Score | Failure

CHUNK = 32  # responses; large enough that sending them costs little, small enough to share out
START_LIMIT = 300.0  # seconds for a worker to import a user's module, which may be a large library


class ScoringError(RuntimeError):
    """Too many responses could not be scored, or no worker process can be started."""


def design_parts(settings: Reward) -> tuple[tuple[str, float], ...]:
    """The rewards that `settings.design` sums, each with its weight: "crpo*1.0+my.module:f*0.5"."""
    parts: dict[str, float] = {}
    for piece in settings.design.split("+"):
        name, star, factor = (text.strip() for text in piece.partition("*"))
        if name not in rules.DESIGNS and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name):
            raise InputError(
                f"reward.design: expected {', '.join(rules.DESIGNS)} or module:function, got {name!r} in {settings.design!r}"
            )
        if name in parts:
            raise InputError(f"reward.design: {name} stands twice in {settings.design!r}")
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise InputError(f"reward.design: expected a number after {name}*, got {factor!r}")
        parts[name] = weight
    tags = settings.grpo_tags
    if "grpo" in parts and not (
        len(tags) == 2 and tags[0] != tags[1] and all(re.fullmatch(r"[\w-]+", tag) for tag in tags)
    ):
        raise InputError(f"reward.grpo_tags: expected two different tag names, got {list(tags)}")
    return tuple(parts.items())


@dataclass(eq=False)
class Batch:
    """Responses handed in together; `Scorer.collect` waits for their scores."""

    questions: Sequence[Question]
    responses: list[str]
    token_ids: list[TokenIds | None]
    values: dict[str, list[Value | Failure]]
    missing: int  # values
    number: int
    awaited: int  # responses
    failed: set[int] = field(default_factory=set)
    error: ScoringError | None = None
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def job(self, part: str, rows: Sequence[int]) -> Job:
        known = [ids for row in rows if (ids := self.token_ids[row]) is not None]
        ids = known if len(known) == len(rows) else None  # a batch has all of them or none
        return Job(part, [self.questions[row] for row in rows], [self.responses[row] for row in rows], ids)

    def give_up(self, error: ScoringError) -> None:
        self.error = error
        self.done.set()


@dataclass(frozen=True)
class Task:
    batch: Batch
    part: str
    rows: Sequence[int]
    again: bool = False  # its worker died before: once may be bad luck, twice is the response's doing


class Overrun(Exception):
    """A worker did not answer in time; the text is its stack."""


class Process:
    """One worker process, the pipe to it, and the pipe whose end tells it that we are gone."""

    def __init__(self, setup: Setup) -> None:
        self.connection, theirs = Pipe()
        alive, self.lifeline = os.pipe()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        fds = (theirs.fileno(), alive, self.stacks.fileno())
        root = str(Path(__file__).parents[2])
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import sys; from crpo_jax.reward.worker import main; main(*map(int, sys.argv[1:]))",
                *map(str, fds),
            ],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a user's function prints must not mix with a command's output
            process_group=0,  # killed together with whatever it started; not interrupted by Ctrl-C, which is ours to handle
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
                "JAX_PLATFORMS": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
            }
            | {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        )
        theirs.close()
        os.close(alive)
        self.ready, self.ending = False, threading.Lock()
        self.connection.send(setup)

    def wait_until_ready(self) -> None:
        """Starting and importing count against START_LIMIT, not against any response's time."""
        if not self.ready:
            if not self.connection.poll(START_LIMIT):
                raise ScoringError(f"a scoring process was not ready after {START_LIMIT:g} seconds")
            try:
                self.connection.recv()
            except (EOFError, OSError):
                self.end()
                raise ScoringError(
                    f"a scoring process ended while starting: {self.fate()}; its own message stands on standard error"
                ) from None
            self.ready = True

    def ask(self, job: Job, limit: float) -> Sequence[Value | Failure] | Failure:
        """The values of a job; Overrun after `limit` seconds, EOFError or OSError where the process died."""
        self.connection.send(job)
        if not self.connection.poll(limit):
            raise Overrun(self.stack())
        return self.connection.recv()

    def stack(self) -> str:
        """Where the process stands, written by itself on a signal that needs no interpreter lock."""
        os.kill(self.process.pid, signal.SIGUSR1)
        for _ in range(50):
            time.sleep(0.01)
            self.stacks.seek(0)
            if text := self.stacks.read().decode(errors="replace"):
                return text
        return ""

    def end(self) -> None:
        """Kill the process and all it started, and wait for its end; more than once does no harm."""
        with self.ending:
            if self.process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.connection.close()
            self.stacks.close()
            os.close(self.lifeline)

    def fate(self) -> str:
        code = self.process.returncode
        return (
            f"killed by signal {-code} ({signal.Signals(-code).name})"
            if code is not None and code < 0
            else f"exit code {code}"
        )


class Scorer:
    """Scores under `settings.design`, in `settings.workers` processes; a context manager.

    Weighted sums and a user's functions have the parts of a built-in design in every Score too, for the logs: those of
    the first built-in named, or of `crpo`. Only the named parts are in `total` and in `components` (before weighting).
    """

    def __init__(self, settings: Reward, effective: np.ndarray | None = None) -> None:
        self.settings = settings
        self.parts = design_parts(settings)
        self.described_by = next((name for name, _ in self.parts if name in rules.DESIGNS), "crpo")
        functions = tuple(name for name, _ in self.parts if name not in rules.DESIGNS)
        self.names = tuple(dict.fromkeys((self.described_by, *(name for name, _ in self.parts))))
        self.setup = Setup(settings, effective, functions)
        self._desk: Desk | None = None
        self._queue: queue.PriorityQueue[tuple[float, int, Task | None]] = queue.PriorityQueue()
        self._order = count()
        self._batches = count()
        self._threads: list[threading.Thread] = []
        self._processes: dict[int, Process] = {}
        self._open = False

    def __enter__(self) -> "Scorer":
        self._open = True
        for number in range(self.settings.workers):
            self._processes[number] = Process(self.setup)
            self._threads.append(
                threading.Thread(target=self._serve, args=(number,), name=f"scoring-{number}", daemon=True)
            )
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; batches not collected by now are lost."""
        self._open = False
        for _ in self._threads:
            self._queue.put((-1, next(self._order), None))
        for process in list(self._processes.values()):
            process.end()  # which ends the thread that waits for it
        for thread in self._threads:
            thread.join(timeout=10)
        for process in self._processes.values():  # one may have been replaced meanwhile
            process.end()
        self._threads.clear()
        self._processes.clear()

    def score(
        self, questions: Sequence[Question], responses: Sequence[str], token_ids: Sequence[TokenIds] | None = None
    ) -> list[Scored]:
        """The scores of a batch, in its order."""
        return self.collect(self.submit(questions, responses, token_ids))

    def submit(
        self, questions: Sequence[Question], responses: Sequence[str], token_ids: Sequence[TokenIds] | None = None
    ) -> Batch:
        """Hand a batch to the workers and return at once; with no workers it is scored here and now."""
        n = len(responses)
        if len(questions) != n or (token_ids is not None and len(token_ids) != n):
            raise ValueError(
                f"Scorer: expected as many questions and token_ids as responses={n}, got {len(questions)} and {token_ids and len(token_ids)}"
            )
        batch = self.expect(questions)
        self.add(batch, range(n), responses, token_ids)
        return batch

    def expect(self, questions: Sequence[Question]) -> Batch:
        """A batch of one response per question, which `add` hands over a part at a time."""
        if not self._open:
            raise RuntimeError("Scorer: use it in a with statement; this one is not open")
        n = len(questions)
        values: dict[str, list[Value | Failure]] = {name: [None] * n for name in self.names}
        batch = Batch(questions, [""] * n, [None] * n, values, n * len(self.names), next(self._batches), n)
        if n == 0:
            batch.done.set()
        return batch

    def add(
        self, batch: Batch, rows: Sequence[int], responses: Sequence[str], token_ids: Sequence[TokenIds] | None = None
    ) -> None:
        """The responses to some of a batch's questions, each question's once. A user's function waits for all of them."""
        for place, row in enumerate(rows):
            batch.responses[row], batch.token_ids[row] = (
                responses[place],
                None if token_ids is None else token_ids[place],
            )
        batch.awaited -= len(rows)
        for name in self.names:
            if name in self.setup.functions:
                if not batch.awaited and batch.responses:
                    self._put(Task(batch, name, range(len(batch.responses))))
                continue
            chunk = max(1, min(CHUNK, math.ceil(len(rows) / (2 * max(1, self.settings.workers)))))
            for start in range(0, len(rows), chunk):
                self._put(Task(batch, name, rows[start : start + chunk]))

    def collect(self, batch: Batch) -> list[Scored]:
        """Wait for a batch; ScoringError when too many of its responses failed."""
        batch.done.wait()
        if batch.error is not None:
            raise batch.error
        return [self._combined(batch, row) for row in range(len(batch.responses))]

    def _put(self, task: Task) -> None:
        if self.settings.workers:
            self._queue.put((task.batch.number, next(self._order), task))
            return
        self._desk = self._desk or Desk(self.setup)
        self._record(task, self._desk.work(task.batch.job(task.part, task.rows)))

    def _one_by_one(self, task: Task, why: str) -> None:
        """A failure of several responses is no verdict on any of them."""
        if task.part in self.setup.functions:
            logging.getLogger(__name__).warning(
                "%s, on a batch of %d; now it is called with one response at a time", why, len(task.rows)
            )
        for row in task.rows:
            self._put(Task(task.batch, task.part, (row,)))

    def _serve(self, number: int) -> None:
        """Work off the queue with one process, a new one whenever it had to be killed or died."""
        while self._open:
            _, _, task = self._queue.get()
            if task is None:
                return
            if task.batch.done.is_set():  # given up
                continue
            try:
                if self._processes[number].process.returncode is not None:
                    self._processes[number] = Process(self.setup)
                self._work(task, self._processes[number])
            except Exception as error:  # noqa: BLE001 (a collector waits for this batch: it must hear of anything)
                if self._open:
                    known = isinstance(error, ScoringError)
                    task.batch.give_up(
                        error if known else ScoringError(f"scoring broke down: {type(error).__name__}: {error}")
                    )

    def _work(self, task: Task, process: Process) -> None:
        process.wait_until_ready()
        limit = self.settings.time_limit
        try:
            values = process.ask(task.batch.job(task.part, task.rows), limit)
        except Overrun as overrun:
            process.end()
            values = Failure(
                f"{task.part} took longer than reward.time_limit={limit:g} seconds; its process was killed",
                str(overrun),
            )
        except (EOFError, OSError):
            process.end()
            if not self._open:
                return
            if len(task.rows) == 1 and not task.again:
                return self._put(replace(task, again=True))
            values = Failure(f"{task.part}: the scoring process died: {process.fate()}")
        self._record(task, values)

    def _record(self, task: Task, values: Sequence[Value | Failure] | Failure) -> None:
        """Keep the values of a task's rows; a Failure stands for all of them."""
        if isinstance(values, Failure):
            if len(task.rows) > 1:
                return self._one_by_one(task, values.error)
            values = [values]
        batch, n = task.batch, len(task.batch.responses)
        with batch.lock:
            for row, value in zip(task.rows, values, strict=True):
                batch.values[task.part][row] = value
                batch.missing -= 1
                if isinstance(value, Failure):
                    batch.failed.add(row)
                    if len(batch.failed) > self.settings.max_failed_share * n and not batch.done.is_set():
                        batch.give_up(
                            ScoringError(
                                f"{len(batch.failed)} of a batch's {n} responses could not be scored so far, more than "
                                f"reward.max_failed_share={self.settings.max_failed_share:g} allows. The last one, of question "
                                f"{batch.questions[row].id}: {value.error}\n{value.traceback}".rstrip()
                            )
                        )
            if batch.missing == 0:
                batch.done.set()

    def _combined(self, batch: Batch, row: int) -> Scored:
        values: dict[str, Any] = {name: batch.values[name][row] for name in self.names}
        for name, value in values.items():
            if isinstance(value, Failure):
                return Failure(f"{name}: {value.error}" if len(self.names) > 1 else value.error, value.traceback)
        described: Score = values[self.described_by]
        if self.parts == ((self.described_by, 1.0),):
            return described
        components = {
            name: value.total if isinstance(value, Score) else value
            for name, value in values.items()
            if name in dict(self.parts)
        }
        total = sum(weight * components[name] for name, weight in self.parts if components[name] is not None)
        return replace(described, total=total, components=components, why=described.why | {"weights": dict(self.parts)})
