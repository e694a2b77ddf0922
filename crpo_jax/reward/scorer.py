"""Scores of many responses in worker processes, while the caller does other work.

A response never scores 0 because of an error: where scoring raises, exceeds `reward.time_limit`, loses its process or
returns no number, the result is a Failure, and more failures than `reward.max_failed_share` end the run with an
explanation.

Built-in designs go to the workers in small chunks, a user's function gets each submitted batch whole. A chunk or batch
that exceeds the limit or loses its worker is repeated response by response, each with the whole limit to itself: so one
that hangs costs only itself, and a function that needs longer than the limit for a whole batch still gets its answers.
One that answers none of LOST_IN_A_ROW responses is not called for the rest of the batch.
"""

import functools
import hashlib
import logging
import math
import queue
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError, one_line
from crpo_jax.reward.design import JUDGE, design_parts
from crpo_jax.reward.functions import Failure, RewardFunction, import_path
from crpo_jax.reward.overlong import OVERLONG
from crpo_jax.reward.parts import PARTS
from crpo_jax.reward.process import START_LIMIT, Overrun, WorkerProcess
from crpo_jax.reward.rules import DESIGNS, Score, TokenIds, require_choices
from crpo_jax.reward.worker import BUILT_IN, PartScorer, ScoringJob, Value, WorkerSetup

if TYPE_CHECKING:
    from crpo_jax.reward.judge import JudgeScorer

Scored = Score | Failure

SCORE_FIELDS = (
    "accuracy",
    "format",
    "cross_reference",
    "clinical_reasoning",
    "consistency",
    "total",
    "answer_found",
    "why",
    "components",
)

CHUNK = 32  # responses; large enough to make sending them cheap, small enough to spread over the workers
LOST_IN_A_ROW = 8  # more than a usual group, all of whose responses may hold what one function cannot read


class ScoringError(RuntimeError):
    """Too many responses could not be scored, or no worker process can be started."""


@dataclass(eq=False)
class ScoringBatch:
    """Responses handed in together; `Scorer.collect` waits for their scores."""

    questions: Sequence[Question]
    responses: list[str]
    token_ids: list[TokenIds | None]
    values: dict[str, list[Any]]
    missing: int  # values
    number: int
    awaited: int  # responses
    failed: set[int] = field(default_factory=set)
    lost: Counter[str] = field(default_factory=Counter)  # by part, single responses in a row without an answer
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def job(self, part: str, rows: Sequence[int]) -> ScoringJob:
        known = [ids for row in rows if (ids := self.token_ids[row]) is not None]
        ids = known if len(known) == len(rows) else None  # a batch has all of them or none
        return ScoringJob(part, [self.questions[row] for row in rows], [self.responses[row] for row in rows], ids)

    def give_up(self, error: Exception) -> None:
        self.error = error
        self.done.set()


@dataclass(frozen=True)
class ScoringTask:
    """Rows of a batch to be scored by one part of the design."""

    batch: ScoringBatch
    part: str
    rows: Sequence[int]
    repeated: bool = False  # its worker died before: once may be bad luck, twice is the response's doing


class Scorer:
    """Scores under `settings.design`, in `settings.workers` processes, at least one for a user's functions; a context
    manager, which raises InputError where a function cannot be loaded.

    Every Score has accuracy, format and so on for the logs: as the first whole design named has them, else as the
    built-in parts have, and beside functions or a judge alone as `crpo` has, which for questions without options has no
    format. Only what the design names is in `total` and in
    `components` (before weighting).

    `functions` are Python objects by the names that the design gives them, also that of a built-in part. One that can
    be imported again runs in the workers like any other; a lambda, a closure or a function of a notebook is called in
    this process, by the `submit` or `add` that completes its batch, and has no time limit unless it is async: if it
    hangs or exits, so does this process. `setting` is what names functions in error messages.
    """

    def __init__(
        self,
        settings: Reward,
        effective: np.ndarray | None = None,
        functions: Mapping[str, RewardFunction] | None = None,
        setting: str = "reward.design",
    ) -> None:
        functions = functions or {}
        if taken := {*DESIGNS, *([OVERLONG] if settings.overlong else [])} & functions.keys():
            raise InputError(f"reward functions: expected other names than those of built-in rewards, got {min(taken)}")
        self.settings, self.setting = settings, setting
        self.parts = design_parts(settings, functions)
        self.built_in = tuple(name for name, _ in self.parts if name in PARTS and name not in functions)
        tasks = self.tasks = [BUILT_IN if name in self.built_in else name for name, _ in self.parts]
        described_by = [name for name in tasks if name in DESIGNS] or [name for name in tasks if name == BUILT_IN]
        self.described_by = described_by[0] if described_by else "crpo"
        self.names = tuple(dict.fromkeys((self.described_by, *tasks)))
        self.judge = open_judge(settings) if JUDGE in self.names and JUDGE not in functions else None
        own = (*DESIGNS, BUILT_IN, *([JUDGE] if self.judge else []))
        self.function_names = tuple(name for name in self.names if name not in own)
        paths = {name: import_path(functions[name]) if name in functions else name for name in self.function_names}
        imported = {name: path for name, path in paths.items() if path}
        self.setup = WorkerSetup(settings, effective, self.built_in, imported, tuple(sys.path))
        self._local_functions = {name: functions[name] for name in paths if name not in imported}
        self._workers = settings.workers or min(1, len(imported))
        self._in_workers = {
            name for name in self.names if name in imported or (name in (*DESIGNS, BUILT_IN) and settings.workers)
        }
        self._local: PartScorer | None = None
        self._queue: queue.PriorityQueue[tuple[float, int, ScoringTask | None]] = queue.PriorityQueue()
        self._order = count()
        self._batches = count()
        self._threads: list[threading.Thread] = []
        self._processes: dict[int, WorkerProcess] = {}
        self._open = False

    def __enter__(self) -> "Scorer":
        self._open = True
        for number in range(self._workers):
            self._processes[number] = WorkerProcess(self.setup)
        try:
            if self.setup.paths:  # whether a function can be loaded is to be known before anything else begins
                wait_for_functions(self._processes[0], self.setting)
        except BaseException:
            self.close()
            raise
        for number in self._processes:
            thread = threading.Thread(target=self._serve, args=(number,), name=f"scoring-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and the judge; batches that were not collected are lost."""
        self._open = False
        if self.judge:
            self.judge.close()
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

    def keep_replies(self, workdir: Path, name: str = "0") -> None:
        """Keeps the judge's replies in the workdir, a file per scorer and process of the run, and asks for none that is
        there."""
        if self.judge:
            self.judge.keep_replies(workdir / "judge" / f"reward_{name}.jsonl")

    def digests(self) -> dict[str, str]:
        """SHA-256 of what the reward depends on besides settings and questions."""
        rubric = self.judge.template if self.judge else ""
        return {"rubric of reward.judge": hashlib.sha256(rubric.encode()).hexdigest()} if rubric else {}

    def check_questions(self, questions: Sequence[Question]) -> None:
        """InputError where nothing in the design applies to a question, or the judge is to score one by criteria that
        it does not have."""
        if self.built_in == ("accuracy",) and len(self.parts) == 1:
            for question in questions:
                if question.kind == "none":
                    raise InputError(
                        f"reward.design: expected more than {self.settings.design} for questions without a right "
                        f"answer, such as {question.id}"
                    )
        if self.judge and not self.judge.template:
            for question in questions:
                self.judge.requests(question, "")

    def score(
        self, questions: Sequence[Question], responses: Sequence[str], token_ids: Sequence[TokenIds] | None = None
    ) -> list[Scored]:
        """The scores of a batch, in its order."""
        return self.collect(self.submit(questions, responses, token_ids))

    def submit(
        self, questions: Sequence[Question], responses: Sequence[str], token_ids: Sequence[TokenIds] | None = None
    ) -> ScoringBatch:
        """Hand a batch to the workers and return at once; with no workers it is scored before this returns."""
        n = len(responses)
        if len(questions) != n or (token_ids is not None and len(token_ids) != n):
            got = f"{len(questions)} and {token_ids and len(token_ids)}"
            raise ValueError(f"Scorer: expected as many questions and token_ids as responses={n}, got {got}")
        batch = self.expect(questions)
        self.add(batch, range(n), responses, token_ids)
        return batch

    def expect(self, questions: Sequence[Question]) -> ScoringBatch:
        """A batch of one response per question, to be handed over by `add`, some responses at a time."""
        if not self._open:
            raise RuntimeError("Scorer: use it in a with statement; this one is not open")
        if self.judge:
            self.judge.try_again()
        require_choices(self.settings, questions)
        n = len(questions)
        values: dict[str, list[Any]] = {name: [None] * n for name in self.names}
        batch = ScoringBatch(questions, [""] * n, [None] * n, values, n * len(self.names), next(self._batches), n)
        if n == 0:
            batch.done.set()
        return batch

    def add(
        self,
        batch: ScoringBatch,
        rows: Sequence[int],
        responses: Sequence[str],
        token_ids: Sequence[TokenIds] | None = None,
    ) -> None:
        """The responses to some of a batch's questions, once for each. A user's function waits until all are there."""
        for place, row in enumerate(rows):
            batch.responses[row] = responses[place]
            batch.token_ids[row] = None if token_ids is None else token_ids[place]
        batch.awaited -= len(rows)
        elsewhere = {*self._in_workers, *([JUDGE] if self.judge else [])}
        for name in sorted(self.names, key=lambda name: name not in elsewhere):  # what runs beside this process first
            if name in self.function_names:
                if not batch.awaited and batch.responses:
                    self._put(ScoringTask(batch, name, range(len(batch.responses))))
                continue
            chunk = max(1, min(CHUNK, math.ceil(len(rows) / (2 * max(1, self.settings.workers)))))
            for start in range(0, len(rows), chunk):
                self._put(ScoringTask(batch, name, rows[start : start + chunk]))

    def collect(self, batch: ScoringBatch) -> list[Scored]:
        """Wait for a batch; ScoringError when too many of its responses failed."""
        batch.done.wait()
        if batch.error is not None:
            raise batch.error
        return [self._combine(batch, row) for row in range(len(batch.responses))]

    def _put(self, task: ScoringTask) -> None:
        if task.part in self._in_workers:
            order = next(self._order)
            # A repeated one at once: else every response loses a process before the first of them is given up.
            self._queue.put((task.batch.number, -order if task.repeated else order, task))
            return
        if task.batch.done.is_set():  # given up
            return
        if task.part == JUDGE and self.judge:
            return self._judge(task)
        if self._local is None:
            self._local = PartScorer(replace(self.setup, paths={}), self._local_functions)
        self._record(task, self._local.score(task.batch.job(task.part, task.rows)))

    def _judge(self, task: ScoringTask) -> None:
        """Hand each of a task's responses to the judge, which records their values in time."""
        assert self.judge is not None
        batch = task.batch

        def record(row: int, judged: Any) -> None:
            if isinstance(judged, Exception):
                batch.give_up(judged)
            else:
                self._record(replace(task, rows=(row,)), [judged])

        for row in task.rows:
            self.judge.submit(
                batch.questions[row],
                batch.responses[row],
                functools.partial(record, row),
                lambda: not batch.done.is_set(),
            )

    def _one_by_one(self, task: ScoringTask, why: str) -> None:
        """Score the rows of a task singly: a failure of several responses does not tell which of them failed."""
        if task.part in self.function_names:
            logging.getLogger(__name__).warning(
                "%s: %s, on a batch of %d; now it is called with one response at a time", task.part, why, len(task.rows)
            )
        for row in task.rows:
            self._put(ScoringTask(task.batch, task.part, (row,)))

    def _serve(self, number: int) -> None:
        """Process the queue with one worker, a new one whenever it had to be killed or died."""
        while self._open:
            _, _, task = self._queue.get()
            if task is None:
                return
            if task.batch.done.is_set():  # given up
                continue
            try:
                if self._processes[number].ended:
                    self._processes[number] = WorkerProcess(self.setup)
                self._work(task, self._processes[number])
            except Exception as error:  # noqa: BLE001 (`collect` waits for this batch and must raise it)
                if self._open:
                    if isinstance(error, InputError):  # a function that could be loaded when the run began
                        error = ScoringError(str(error))
                    elif not isinstance(error, ScoringError):
                        error = ScoringError(f"scoring broke down: {type(error).__name__}: {error}")
                    task.batch.give_up(error)

    def _work(self, task: ScoringTask, process: WorkerProcess) -> None:
        limit, lost = self.settings.time_limit, task.batch.lost
        if lost[task.part] >= LOST_IN_A_ROW:
            return self._record(task, Failure(f"not called: none of the {LOST_IN_A_ROW} before it was answered"))
        wait_for_functions(process, self.setting)
        try:
            values = process.score(task.batch.job(task.part, task.rows), limit)
            lost[task.part] = 0
        except Overrun as overrun:
            process.end()
            values = Failure(
                f"scoring took longer than reward.time_limit={limit:g} seconds; its process was killed", str(overrun)
            )
            lost[task.part] += len(task.rows) == 1
        except (EOFError, OSError):
            fate = process.fate()
            process.end()
            if not self._open:
                return
            if len(task.rows) == 1 and not task.repeated:
                return self._put(replace(task, repeated=True))
            values = Failure(f"the scoring process died: {fate}")
            lost[task.part] += len(task.rows) == 1
        self._record(task, values)

    def _record(self, task: ScoringTask, values: Sequence[Value | Failure] | Failure) -> None:
        """Store the values of a task's rows; a single Failure is that of all of them."""
        if isinstance(values, Failure):
            if len(task.rows) > 1:
                return self._one_by_one(task, values.error)
            values = [values]
        batch = task.batch
        with batch.lock:
            for row, value in zip(task.rows, values, strict=True):
                if isinstance(value, Failure) and len(self.names) > 1:
                    value = replace(value, error=f"{task.part}: {value.error}")
                batch.values[task.part][row] = value
                batch.missing -= 1
            failed = [row for row in task.rows if isinstance(batch.values[task.part][row], Failure)]
            batch.failed |= {*failed}
            too_many = len(batch.failed) > self.settings.max_failed_share * len(batch.responses)
            if failed and too_many and not batch.done.is_set():
                batch.give_up(self._too_many_failed(batch, task.part, failed[-1]))
            if batch.missing == 0:
                batch.done.set()

    def _too_many_failed(self, batch: ScoringBatch, part: str, row: int) -> ScoringError:
        failure = batch.values[part][row]
        assert isinstance(failure, Failure)
        line = (
            f"{len(batch.failed)} of a batch's {len(batch.responses)} responses could not be scored so far, more than "
            f"reward.max_failed_share={self.settings.max_failed_share:g} allows. The last one, of question "
            f"{batch.questions[row].id}: {failure.error}"
        )
        return ScoringError(f"{one_line(line)}\n{failure.traceback}".rstrip())

    def _combine(self, batch: ScoringBatch, row: int) -> Scored:
        values: dict[str, Any] = {name: batch.values[name][row] for name in self.names}
        for value in values.values():
            if isinstance(value, Failure):
                return value
        described: Score = values[self.described_by]
        if self.described_by not in self.tasks and batch.questions[row].kind != "choice":
            described = replace(described, format=None, cross_reference=None)  # nobody asked for the clinical format
        if self.parts == ((self.described_by, 1.0),):
            return described
        weights = dict(self.parts)
        built_in: Score | None = values.get(BUILT_IN)
        by_part = values | (built_in.components if built_in else {})
        judged = {JUDGE: values[JUDGE].why} if self.judge else {}
        if self.judge:
            by_part[JUDGE] = values[JUDGE].value
        components: dict[str, Any] = {name: getattr(by_part[name], "total", by_part[name]) for name in weights}
        total = sum(weight * components[name] for name, weight in self.parts if components[name] is not None)
        why = (built_in.why if built_in else {}) | described.why | judged | {"weights": weights}
        return replace(described, total=total, components=components, why=why)


def open_judge(settings: Reward) -> "JudgeScorer":
    from crpo_jax.reward.judge import JudgeScorer  # with its client, which nothing else needs

    return JudgeScorer(settings.judge)


def score_row(scored: Scored) -> dict[str, Any]:
    """A result as the files hold it: the reward by parts with the reasons, or what kept it from being computed.

    A sum, or a function alone, has the value of each part in `components`.
    """
    if isinstance(scored, Failure):
        return {"error": scored.error, "traceback": scored.traceback}
    names = SCORE_FIELDS if "weights" in scored.why else SCORE_FIELDS[:-1]
    return {name: getattr(scored, name) for name in names}


def wait_for_functions(process: WorkerProcess, setting: str) -> None:
    """Wait until a process has started; InputError where it cannot load a user's function, which `setting` names."""
    paths = ", ".join(process.setup.paths.values())
    try:
        problems = process.wait_until_ready()
    except Overrun:
        process.end()
        loading = f"importing {paths}" if paths else "starting"
        raise ScoringError(f"a scoring process was still {loading} after {START_LIMIT:g} seconds") from None
    except (EOFError, OSError):
        fate = process.fate()
        process.end()
        if paths:
            raise InputError(f"{setting}: importing {paths} ended the scoring process: {fate}") from None
        raise ScoringError(f"a scoring process did not start: {fate}; see its message on standard error") from None
    for name, problem in problems.items():
        raise InputError(f"{setting}: expected a function {process.setup.paths[name]}, got {problem}")
