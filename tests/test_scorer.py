"""The pool: order, exceptions, time limits that kill, dead workers, dead parents, a user's functions and sums."""

import ast
import asyncio
import functools
import importlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from response_table import GOOD, GOUT, ROWS

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward import scorer as scorer_module
from crpo_jax.reward.functions import Failure, design_name, import_path
from crpo_jax.reward.rules import Score, score_response
from crpo_jax.reward.scorer import CHUNK, Scorer, ScoringError, design_parts

RESPONSES = [row[2] for row in ROWS]

# What users write, some of it badly. `completions` starting with these words misbehave.
FUNCTIONS = """
import asyncio, os, re, signal, subprocess, sys, time

CALLS = "calls.txt"

def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def careless(prompts, completions, **columns):
    note(len(completions))
    for text in completions:
        if text.startswith("raise"):
            raise RuntimeError("cannot read " + text)
        if text.startswith("exit"):
            sys.exit("leaving")
        if text.startswith("hang"):
            child = subprocess.Popen(["sleep", "600"])
            note(f"pids {os.getpid()} {child.pid}")
            re.match(r"(a+)+$", "a" * 64 + "b")  # backtracks for years, and never lets go of the interpreter
        if text.startswith("sleep"):
            time.sleep(0.3)
        if text.startswith("die"):
            os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)

def columns(prompts, completions, answer, options, id, subject, **others):
    assert prompts == ["Q?"] * len(completions) and others["completion_ids"][0] == [1, 2], others
    rows = zip(subject, answer, options, id, strict=True)
    return [row == ("heart", "A", {"A": "x"}, str(n)) for n, row in enumerate(rows)]

def sometimes(prompts, completions, **columns):
    return [None if text.startswith("skip") else 2 for text in completions]

def short(prompts, completions, **columns):
    return [1.0]

def infinite(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def words(prompts, completions, **columns):
    return ["good"] * len(completions)

def world(prompts, completions, **columns):
    print("a function may print")
    hidden = os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    return [float(hidden and "jax" not in sys.modules and "transformers" not in sys.modules)] * len(completions)

def wrong(prompts, completions, **columns):
    # what the first completion names
    n = len(completions)
    return {
        "nothing": lambda: None,
        "short": lambda: [1.0] * (n - 1),
        "long": lambda: [1.0] * (n + 1),
        "endless": lambda: iter(int, 1),
        "number": lambda: 1.0,
        "text": lambda: "1" * n,
        "bytes": lambda: b"1" * n,
        "dictionary": lambda: dict.fromkeys(range(n), 1.0),
        "set": lambda: set(range(n)),
        "coroutine": lambda: later(),
        "unreadable list": lambda: Unreadable(),
        "digits": lambda: ["1.0"] * n,
        "surrogates": lambda: ["\\ud800"] * n,
        "long text": lambda: ["x" * 10**7] * n,
        "arrays": lambda: [[1.0]] * n,
        "complex": lambda: [1j] * n,
        "not a number": lambda: [float("nan")] * n,
        "infinite": lambda: [float("-inf")] * n,
        "immense": lambda: [10**400] * n,
        "unreadable": lambda: [Unreadable()] * n,
    }[completions[0]]()

async def later():
    return [1.0]

class Unreadable(Exception):
    def __repr__(self):
        raise RuntimeError("no text\\nat all")
    __str__ = __float__ = __repr__

class Odd(BaseException):
    pass

def rogue(prompts, completions, **columns):
    # does to its process what the completions name
    for text in completions:
        if text == "fork and return" and os.fork() == 0:
            return [7.0] * len(completions)
        if text.startswith("daemon") and os.fork() == 0:
            os.setsid()
            note(f"pids {os.getpid()}")
            time.sleep(600)
        while text.startswith("daemon") and not os.path.exists(CALLS):
            time.sleep(0.01)
        if text.endswith("exit"):
            os._exit(0)
        if text == "hang":
            re.match(r"(a+)+$", "a" * 64 + "b")
        if text == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if text == "close":
            os.closerange(3, 256)
        if text == "odd":
            raise Odd("odd")
        if text == "unreadable":
            raise Unreadable
        if text == "memory":
            raise MemoryError
    return [1.0] * len(completions)

async def awaited(prompts, completions, **columns):
    if any(text == "raise" for text in completions):
        raise RuntimeError("cannot await")
    await asyncio.sleep(600 if "hang" in completions else 0.01)
    return [float(len(text)) for text in completions]

def where(prompts, completions, **columns):
    return [float(os.getpid())] * len(completions)

def note(text):
    with open(CALLS, "a") as file:
        file.write(f"{text}\\n")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a user's module of its own name: the test's process keeps what it has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"mine_{tmp_path.name}.py").write_text(FUNCTIONS)
    return tmp_path


def named(here: Path, function: str) -> str:
    return f"mine_{here.name}:{function}"


def run(settings: Reward, responses: list[str]) -> list[Score | Failure]:
    with Scorer(settings) as scorer:
        return scorer.score([GOUT] * len(responses), responses)


def gone(pid: int) -> bool:
    """Whether a process has ended, within some seconds; one that nobody has waited for yet has ended too."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_pool_gives_what_the_rules_give_in_order(workers: int) -> None:
    settings = Reward(workers=workers)
    with Scorer(settings) as scorer:
        first, second = scorer.submit([GOUT] * len(RESPONSES), RESPONSES), scorer.submit([GOUT], [GOOD])
        assert scorer.collect(second) == [score_response(GOUT, GOOD, settings)]
        assert scorer.collect(first) == [score_response(GOUT, response, settings) for response in RESPONSES]
        assert scorer.score([], []) == []
    assert len(RESPONSES) > 4 * CHUNK, "several chunks to each worker"


def test_token_ids_and_the_table_reach_the_workers() -> None:
    effective = np.array([True, False, True])
    with Scorer(Reward(workers=1, max_failed_share=0.5), effective) as scorer:
        found = scorer.score([GOUT] * 3, [GOOD] * 3, [[0, 2], np.array([0, 1]), [0, 3]])
    assert isinstance(found[0], Score)
    assert isinstance(found[1], Score)
    assert [found[0].consistency, found[1].consistency] == [1.0, 0.5]
    assert found[0].why["consistency"]["by"] == "tokens"
    assert isinstance(found[2], Failure), "an id beyond the table"
    assert found[2].error == "ValueError: token_ids: expected ids from 0 to 2, got 0 to 3"
    assert "in measure_consistency" in found[2].traceback


def test_submit_returns_before_the_scores_are_there(here: Path) -> None:
    with Scorer(Reward(design=named(here, "careless"), workers=1)) as scorer:
        start = time.monotonic()
        batch = scorer.submit([GOUT] * 3, ["sleep"] * 3)
        assert time.monotonic() - start < 0.5
        assert not batch.done.is_set()
        assert len(scorer.collect(batch)) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("word", "error", "trace"),
    [("raise", "RuntimeError: cannot read raise", "careless"), ("exit", "SystemExit: leaving", "sys.exit")],
)
def test_an_exception_costs_its_response_only(here: Path, workers: int, word: str, error: str, trace: str) -> None:
    found = run(Reward(design=named(here, "careless"), workers=workers), ["a"] * 7 + [word] + ["b"] * 7)
    assert [isinstance(one, Failure) for one in found] == [False] * 7 + [True] + [False] * 7
    failed = found[7]
    assert isinstance(failed, Failure)
    assert failed.error.endswith(error)
    assert trace in failed.traceback


def test_a_response_that_hangs_is_killed_and_the_rest_scored(here: Path) -> None:
    start = time.monotonic()
    found = run(Reward(design=named(here, "careless"), workers=2, time_limit=0.5), ["a"] * 9 + ["hang"] + ["b"] * 9)
    assert time.monotonic() - start < 15
    assert [isinstance(one, Failure) for one in found] == [False] * 9 + [True] + [False] * 9
    failed = found[9]
    assert isinstance(failed, Failure)
    assert "took longer than reward.time_limit=0.5 seconds; its process was killed" in failed.error
    assert "in careless" in failed.traceback, "where it hung"
    pids = [
        int(pid)
        for line in (here / "calls.txt").read_text().splitlines()
        if line.startswith("pids")
        for pid in line.split()[1:]
    ]
    assert len(pids) == 4, "once in the batch, once alone; each a worker and the process it had started"
    assert all(gone(pid) for pid in pids)


def test_a_function_slower_than_the_limit_on_a_batch_is_called_one_by_one(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(Reward(design=named(here, "careless"), workers=2, time_limit=0.6), ["sleep"] * 4)
    assert not any(isinstance(one, Failure) for one in found)
    assert "now it is called with one response at a time" in caplog.text


def test_a_response_that_kills_its_worker(here: Path) -> None:
    found = run(Reward(design=named(here, "careless"), workers=1, max_failed_share=0.3), ["a", "die", "b", "c"])
    assert [isinstance(one, Failure) for one in found] == [False, True, False, False]
    assert isinstance(found[1], Failure)
    assert "killed by signal 9 (SIGKILL)" in found[1].error


def test_workers_killed_from_outside_lose_nothing() -> None:
    settings = Reward(workers=2)
    with Scorer(settings) as scorer:
        expected = [score_response(GOUT, response, settings) for response in RESPONSES]
        assert scorer.score([GOUT] * len(RESPONSES), RESPONSES) == expected
        killed = [process.process.pid for process in scorer._processes.values()]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert scorer.score([GOUT] * len(RESPONSES), RESPONSES) == expected, "killed while idle"
        batch = scorer.submit([GOUT] * 20 * len(RESPONSES), RESPONSES * 20)
        for process in list(scorer._processes.values()):
            os.kill(process.process.pid, signal.SIGKILL)
        assert scorer.collect(batch) == expected * 20, "killed at work"
        pids = [process.process.pid for process in scorer._processes.values()]
        assert not set(pids) & set(killed)
    assert all(gone(pid) for pid in pids), "closing ends the workers"


def test_too_many_failures_stop_with_an_explanation(here: Path) -> None:
    design = named(here, "careless")
    with pytest.raises(
        ScoringError,
        match=r"2 of a batch's 10 responses .* reward.max_failed_share=0.1 .* question gout: .*cannot read raise 2",
    ) as error:
        run(Reward(design=design, workers=1), ["a"] * 8 + ["raise 1", "raise 2"])
    assert "Traceback" in str(error.value)
    assert sum(isinstance(one, Failure) for one in run(Reward(design=design, workers=1), ["a"] * 9 + ["raise"])) == 1, (
        "one in ten is within"
    )


WRONG = {
    "nothing": "expected a list of 2 rewards, one per completion, got None",
    "short": "expected 2 rewards, one per completion, got 1",
    "long": "expected 2 rewards, one per completion, got more",
    "endless": "expected 2 rewards, one per completion, got more",
    "number": "expected a list of 2 rewards, one per completion, got 1.0",
    "text": "expected a list of 2 rewards, one per completion, got '11'",
    "bytes": "expected a list of 2 rewards, one per completion, got b'11'",
    "dictionary": "expected a list of 2 rewards, one per completion, got {0: 1.0, 1: 1.0}",
    "set": "expected a list of 2 rewards, one per completion, got {0, 1}",
    "coroutine": "expected 2 rewards, one per completion, got 1",
    "unreadable list": "expected a list of 2 rewards, one per completion, got <Unreadable instance at",
    "digits": "expected a number or None as reward, got '1.0'",
    "surrogates": r"expected a number or None as reward, got '\ud800'",
    "long text": "expected a number or None as reward, got 'xxx",
    "arrays": "expected a number or None as reward, got [1.0]",
    "complex": "expected a number or None as reward, got 1j",
    "not a number": "expected a finite reward, got nan",
    "infinite": "expected a finite reward, got -inf",
    "immense": "expected a number or None as reward, got a whole number of 1329 bits",
    "unreadable": "expected a number or None as reward, got <Unreadable instance at",
}
"""What the function `wrong` returns for two completions, and the line about it."""


@pytest.mark.parametrize("workers", [0, 2])
def test_every_wrong_return_is_one_line_without_a_traceback(
    here: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """A dictionary's keys and a text's digits were rewards; others ended their worker, or came with a traceback."""
    name = named(here, "wrong")
    with Scorer(Reward(design=name, workers=workers, max_failed_share=1)) as scorer:
        for wrong, line in WRONG.items():
            for scored in scorer.score([GOUT] * 2, [wrong] * 2):
                assert isinstance(scored, Failure), wrong
                assert scored.error.startswith(f"{name}: {line}"), wrong
                assert scored.error.isprintable(), wrong
                assert len(scored.error) < 300, wrong
                assert not scored.traceback, wrong
    with Scorer(Reward(design=name, workers=workers)) as scorer:
        for wrong in WRONG:
            with pytest.raises(ScoringError) as error:
                scorer.score([GOUT] * 2, [wrong] * 2)
            assert re.fullmatch(
                rf"2 of a batch's 2 responses could not be scored .* of question gout: {name}: .*", str(error.value)
            )
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("odd", "Odd: odd"),
        ("unreadable", "Unreadable: (an exception without a readable text)"),
        ("memory", "MemoryError: "),
        ("exit", "the scoring process died: exit code 0"),
        ("close", "the scoring process died: it closed its connection to the run"),
        ("hang", "scoring took longer than reward.time_limit=0.5 seconds; its process was killed"),
        ("stop", "scoring took longer than reward.time_limit=0.5 seconds; its process was killed"),
    ],
)
def test_what_a_function_does_to_its_process_costs_its_response_only(
    here: Path, word: str, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With reward.workers=0, the default of the tiny config, these ended the run, with exit code 0, or hung it."""
    began, name = time.monotonic(), named(here, "rogue")
    found = run(Reward(design=name, workers=0, time_limit=0.5, max_failed_share=0.5), ["a", word, "b"])
    assert time.monotonic() - began < 60
    assert [isinstance(scored, Score) for scored in found] == [True, False, True]
    assert isinstance(found[1], Failure)
    assert found[1].error == f"{name}: {line}"
    assert "Traceback" not in capfd.readouterr().err


def test_a_child_that_returns_from_the_function_does_not_answer_for_it(here: Path) -> None:
    """Both answered: the child's rewards were read as those of the next batch, in silence."""
    with Scorer(Reward(design=named(here, "rogue"), workers=1)) as scorer:
        for responses in (["fork and return"], ["a", "b"], ["c"]):
            scores = scorer.score([GOUT] * len(responses), responses)
            assert [isinstance(scored, Score) and scored.total for scored in scores] == [1.0] * len(responses)


@pytest.mark.parametrize("end", ["", " and exit", " and hang"])
def test_children_that_leave_the_group_hold_nothing_up_and_are_killed(here: Path, end: str) -> None:
    """A child in a session of its own keeps the socket open, so that its parent's end was not seen."""
    settings = Reward(design=named(here, "rogue"), workers=1, time_limit=1 if end == " and hang" else 60)
    words = ["daemon" + end] if end != " and hang" else ["daemon", "hang"]
    began = time.monotonic()
    with Scorer(replace(settings, max_failed_share=1)) as scorer:
        scores = scorer.score([GOUT] * len(words), words)
    assert time.monotonic() - began < 60
    assert isinstance(scores[-1], Score if not end else Failure)
    pids = [int(line.split()[1]) for line in (here / "calls.txt").read_text().splitlines() if line.startswith("pids")]
    assert pids
    assert all(gone(pid) for pid in pids)


def test_a_stopped_process_that_cannot_take_a_large_batch_is_killed_at_the_limit() -> None:
    """Its socket is full after some 200 KB: the run waited for ever to hand over the rest."""
    with Scorer(Reward(workers=1, time_limit=0.5, max_failed_share=0.5)) as scorer:
        assert scorer.score([GOUT], [GOOD]) == [score_response(GOUT, GOOD, Reward())]
        os.kill(scorer._processes[0].process.pid, signal.SIGSTOP)
        began, long = time.monotonic(), GOOD + " x" * 500_000
        stopped, after = scorer.score([GOUT] * 2, [long] * 2)
        assert time.monotonic() - began < 60
    assert isinstance(stopped, Failure)
    assert stopped.error == "scoring took longer than reward.time_limit=0.5 seconds; its process was killed"
    assert after == score_response(GOUT, long, Reward())


def test_a_function_that_never_answers_is_given_up_after_some_responses(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one of 256 responses waited out its limit, half an hour with the defaults."""
    monkeypatch.setattr(scorer_module, "LOST_IN_A_ROW", 3)
    found = run(Reward(design=named(here, "rogue"), workers=2, time_limit=0.2, max_failed_share=1), ["hang"] * 100)
    errors = [scored.error.partition(": ")[2] for scored in found if isinstance(scored, Failure)]
    assert len(errors) == 100
    assert errors.count("not called: none of the 3 before it was answered") >= 95


@pytest.mark.parametrize(
    ("function", "explanation"),
    [
        ("short", "expected 2 rewards, one per completion, got 1"),
        ("infinite", "expected a finite reward, got nan"),
        ("words", "expected a number or None as reward, got 'good'"),
    ],
)
def test_bad_functions_are_explained(here: Path, function: str, explanation: str) -> None:
    found = run(Reward(design=named(here, function), workers=0, max_failed_share=1), ["a", "b"])
    assert all(isinstance(one, Failure) and explanation in one.error for one in found)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("function", "explanation"),
    [
        ("lenght", "AttributeError: module 'mine_.*' has no attribute 'lenght'; similar: length$"),
        ("CALLS", "is no function but 'calls.txt'$"),
        ("length.absent", "AttributeError: 'function' object has no attribute 'absent'"),
    ],
)
def test_a_function_that_is_not_there_is_known_before_anything_is_scored(
    here: Path, workers: int, function: str, explanation: str
) -> None:
    path = named(here, function)
    with pytest.raises(InputError, match=rf"reward\.design: expected a function {path}, got .*{explanation}"):
        run(Reward(design=f"crpo+{path}", workers=workers), [])


@pytest.mark.parametrize(
    ("source", "explanation"),
    [
        (None, "expected a function broken:f, got ModuleNotFoundError: No module named 'broken'$"),
        ("x = 1\n1 / 0", r"got ZeroDivisionError: division by zero \(.*broken\.py, line 2\)$"),
        ("def f(:", r"got SyntaxError: .* \(.*broken\.py, line 1\)$"),
        ("import broken_too", "got ModuleNotFoundError: No module named 'broken_too' .*line 1"),
        ("raise BaseException('no')", "got BaseException: no"),
        ("import os; os._exit(0)", "importing broken:f ended the scoring process: exit code 0$"),
    ],
)
def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, explanation: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if source:
        (tmp_path / "broken.py").write_text(source)
    with pytest.raises(InputError, match=explanation):
        run(Reward(design="broken:f", workers=0), [])


def test_functions_get_whole_batches_and_columns(here: Path) -> None:
    from crpo_jax.data.question import Question

    n = 3 * CHUNK
    questions = [
        Question(str(row), "Q?", {"A": "x"}, "A", columns={"subject": "heart", "prompts": "not this"})
        for row in range(n)
    ]
    with Scorer(Reward(design=named(here, "columns"), workers=2)) as scorer:
        found = scorer.score(questions, ["a"] * n, [np.array([1, 2])] * n)
    assert all(isinstance(one, Score) and one.total == 1.0 for one in found)
    run(Reward(design=named(here, "careless"), workers=2), ["a"] * n)
    assert (here / "calls.txt").read_text() == f"{n}\n", "one call"


def test_workers_see_no_accelerator_and_import_no_jax(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = run(Reward(design=named(here, "world"), workers=1), ["a"])
    assert isinstance(found[0], Score)
    assert found[0].total == 1.0
    printed = capfd.readouterr()
    assert printed.out == "", "standard output is the command's"
    assert "a function may print" in printed.err


@pytest.mark.parametrize("workers", [0, 1])
def test_weighted_sums_report_every_part(here: Path, workers: int) -> None:
    design = f"crpo*1.0 + {named(here, 'length')}*0.5 + {named(here, 'sometimes')}*-2"
    found = run(Reward(design=design, workers=workers), [GOOD, "skip"])
    alone = score_response(GOUT, GOOD, Reward())
    assert isinstance(found[0], Score)
    assert isinstance(found[1], Score)
    assert found[0].components == {"crpo": 12.0, named(here, "length"): float(len(GOOD)), named(here, "sometimes"): 2.0}
    assert found[0].total == 12 + 0.5 * len(GOOD) - 2 * 2
    assert (found[0].accuracy, found[0].format, found[0].why["cross_reference"]) == (1, 1, alone.why["cross_reference"])
    assert found[1].components[named(here, "sometimes")] is None, "not applicable: TRL's None"
    assert found[1].total == score_response(GOUT, "skip", Reward()).total + 0.5 * 4


def test_a_users_function_alone_is_the_total_and_crpo_describes(here: Path) -> None:
    found = run(Reward(design=named(here, "sometimes"), workers=0), [GOOD])[0]
    assert isinstance(found, Score)
    assert (found.total, found.accuracy, found.clinical_reasoning, found.components) == (
        2.0,
        1,
        1.5,
        {named(here, "sometimes"): 2.0},
    )


def test_a_users_function_alone_has_no_format_where_there_are_no_options(here: Path) -> None:
    """A run with free-text answers and a function or a judge tabulated a format and citations of 0."""
    question = Question("q", "Which?", {}, "gout", kind="text")
    with Scorer(Reward(design=named(here, "sometimes"), workers=0)) as scorer:
        (found,) = scorer.score([question], [GOOD])
    assert isinstance(found, Score)
    assert (found.total, found.format, found.cross_reference, found.consistency) == (2.0, None, None, 1)


def test_weights_of_built_in_designs() -> None:
    found = run(Reward(design="grpo*0.5+released", workers=0), ["<think>a</think><answer>Gout. \\boxed{C}</answer>"])[0]
    assert isinstance(found, Score)
    assert found.components == {"grpo": 11.0, "released": 12.0}
    assert found.total == 17.5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_may_be_async(here: Path, workers: int) -> None:
    name = named(here, "awaited")
    settings = Reward(design=f"{name}*2", workers=workers, time_limit=0.5, max_failed_share=0.6)
    found = run(settings, ["ab", "raise", "hang", "a"])
    assert [scored.total if isinstance(scored, Score) else None for scored in found] == [4, None, None, 2]
    errors = [scored.error for scored in found if isinstance(scored, Failure)]
    assert errors[0] == f"{name}: RuntimeError: cannot await"
    assert errors[1].startswith(f"{name}: scoring took longer than reward.time_limit=0.5 seconds")


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_an_async_closure_is_bounded_also_in_a_notebook(in_a_loop: bool) -> None:
    """A notebook runs its cells in an event loop, in which asyncio.run refuses to start another."""

    async def slow_on_x(completions: list[str], **columns: Any) -> list[float]:
        if completions == ["own"]:
            raise TimeoutError("the server's")
        await asyncio.sleep(30 if "x" in completions else 0)
        return [1.0] * len(completions)

    async def cell() -> list[Score | Failure]:
        return score()

    def score() -> list[Score | Failure]:
        settings = Reward(design="slow", workers=0, time_limit=0.1, max_failed_share=1)
        with Scorer(settings, functions={"slow": slow_on_x}) as scorer:
            return scorer.score([GOUT] * 3, ["a", "x", "b"]) + scorer.score([GOUT], ["own"])

    found = asyncio.run(cell()) if in_a_loop else score()
    assert [isinstance(scored, Score) for scored in found] == [True, False, True, False]
    errors = [scored.error for scored in found if isinstance(scored, Failure)]
    assert errors[0] == "slow: TimeoutError: took longer than reward.time_limit=0.1 seconds and was cancelled"
    assert errors[1] == "slow: TimeoutError: the server's"


# ---- functions given as objects ------------------------------------------------------------------------------------


def user_function(here: Path, function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"mine_{here.name}"), function)


def short_or_fail(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Only this process has it under the name below."""
    if any(text.startswith("raise") for text in completions):
        raise RuntimeError(f"cannot read, in process {os.getpid()}")
    return [float(len(text) < 3) for text in completions]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_closure_is_called_in_this_process_with_whole_batches(workers: int) -> None:
    calls: list[tuple[int, int]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        calls.append((os.getpid(), len(completions)))
        assert columns["answer"] == ["C"] * len(completions)
        return [None if text == "skip" else float(len(text)) for text in completions]

    name = design_name(reward)
    assert re.fullmatch(r"\w+", name)
    n = 2 * CHUNK
    with Scorer(Reward(design=f"crpo+{name}*0.5", workers=workers), functions={name: reward}) as scorer:
        scores = scorer.score([GOUT] * n, ["skip", *["ab"] * (n - 1)])
    assert calls == [(os.getpid(), n)]
    assert isinstance(scores[0], Score)
    assert isinstance(scores[1], Score)
    assert (scores[0].components, scores[1].components) == ({"crpo": 0.5, name: None}, {"crpo": 0.5, name: 2.0})
    assert scores[1].total == 0.5 + 0.5 * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_object_that_can_be_imported_goes_to_the_workers(here: Path, workers: int) -> None:
    name = design_name(user_function(here, "where"))
    assert name == named(here, "where"), "as it is named on the command line"
    with Scorer(Reward(design=name, workers=workers), functions={name: user_function(here, "where")}) as scorer:
        (scored,) = scorer.score([GOUT], ["a"])
    assert isinstance(scored, Score)
    assert scored.total != os.getpid(), "a user's function may hang or exit, so it never runs in this process"


def test_a_module_beside_the_users_script_is_found_by_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python elsewhere/train_mine.py` has its own folder on sys.path, and neither PYTHONPATH nor cwd says so."""
    (tmp_path / "beside_the_script.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    scored = run(Reward(design="beside_the_script:length", workers=1), ["abc"])[0]
    assert isinstance(scored, Score)
    assert scored.total == 3.0


def test_failures_of_a_function_of_this_process_are_recorded_like_any_other() -> None:
    responses = ["a"] * 9 + ["raise"]
    with Scorer(Reward(design="mine", workers=1), functions={"mine": lambda **batch: short_or_fail(**batch)}) as scorer:
        scores = scorer.score([GOUT] * 10, responses)
        assert [isinstance(scored, Failure) for scored in scores] == [False] * 9 + [True]
        failed = scores[9]
        assert isinstance(failed, Failure)
        assert failed.error.endswith(f"RuntimeError: cannot read, in process {os.getpid()}")
        assert "in short_or_fail" in failed.traceback
        with pytest.raises(ScoringError, match=r"reward.max_failed_share=0.1 .*cannot read"):
            scorer.score([GOUT] * 2, ["raise", "a"])
        assert all(isinstance(scored, Score) for scored in scorer.score([GOUT], ["a"])), "the next batch is scored"


def test_which_functions_can_be_imported_again(here: Path) -> None:
    class Brevity:
        def __call__(self, **batch: Any) -> list[float]:
            return []

    assert import_path(short_or_fail) == "test_scorer:short_or_fail"
    assert import_path(user_function(here, "length")) == named(here, "length")
    functions = [lambda **batch: [], Brevity(), functools.partial(short_or_fail, [])]
    assert [import_path(function) for function in functions] == [None] * 3
    assert [design_name(function) for function in functions] == ["lambda", "Brevity", "partial"]
    module = types.ModuleType("no_file_has_it")
    exec("def f(**batch): return []", module.__dict__)  # noqa: S102 (as a notebook defines a function)
    sys.modules["no_file_has_it"] = module
    try:
        assert import_path(module.f) is None
    finally:
        del sys.modules["no_file_has_it"]


def test_names_of_functions_given_as_objects() -> None:
    with pytest.raises(
        InputError, match="reward functions: expected other names than those of built-in rewards, got crpo"
    ):
        Scorer(Reward(), functions={"crpo": short_or_fail})
    with pytest.raises(
        InputError, match=r"reward\.design: expected crpo, grpo, released, mine or module:function, got 'm'"
    ):
        Scorer(Reward(design="m"), functions={"mine": short_or_fail})
    assert design_parts(Reward(design="mine*2"), ["mine"]) == (("mine", 2.0),)


@pytest.mark.parametrize(
    ("design", "problem"),
    [
        ("", "expected crpo, grpo, released or module:function, got ''"),
        ("cpro", "got 'cpro'"),
        ("crpo+", "got '' in 'crpo\\+'"),
        ("crpo*a", "expected a number after crpo\\*, got 'a'"),
        ("crpo*inf", "expected a number after crpo\\*, got 'inf'"),
        ("crpo*1+crpo*2", "crpo stands twice"),
        ("0.5*crpo", "got '0.5'"),
        ("my.module", "got 'my.module'"),
        ("my module:f", "got 'my module:f'"),
    ],
)
def test_bad_designs_are_named_at_once(design: str, problem: str) -> None:
    with pytest.raises(InputError, match="reward.design: .*" + problem):
        Scorer(Reward(design=design))
    with pytest.raises(InputError, match=r"reward.tags: expected two different tag names, got \['a', 'a'\]"):
        Scorer(Reward(design="crpo+grpo", tags=("a", "a")))
    assert design_parts(Reward(design="crpo*2+a.b:c.d")) == (("crpo", 2.0), ("a.b:c.d", 1.0))


def test_misuse_is_refused() -> None:
    scorer = Scorer(Reward(workers=0))
    with pytest.raises(RuntimeError, match="with statement"):
        scorer.submit([GOUT], [GOOD])
    with scorer, pytest.raises(ValueError, match="as many questions and token_ids as responses=2"):
        scorer.submit([GOUT], [GOOD, GOOD])


def test_the_readme_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = map(ast.parse, re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    functions = [node for block in blocks for node in block.body if isinstance(node, ast.FunctionDef)]
    rewards = [node for node in functions if node.args.args[0].arg == "prompts"]
    assert rewards
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readme_rewards.py").write_text("\n".join(map(ast.unparse, rewards)))
    for name in (node.name for node in rewards):
        found = run(Reward(design=f"crpo*1.0+readme_rewards:{name}*0.5", workers=1), [GOOD, "no answer"])
        assert all(isinstance(one, Score) and one.components[f"readme_rewards:{name}"] is not None for one in found)


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_with_a_parent_that_is_killed(here: Path, busy: bool) -> None:
    """A run killed by -9 left workers behind that computed for ever on somebody else's machine."""
    script = f"""
        import sys, time
        from crpo_jax.config import Reward
        from crpo_jax.data.question import Question
        from crpo_jax.reward.scorer import Scorer
        with Scorer(Reward(design="{named(here, "careless")}", workers=1, time_limit=600)) as scorer:
            scorer.score([Question("q", "?", {{"A": "a"}}, "A")], ["a"])
            print(scorer._processes[0].process.pid, flush=True)
            scorer.submit([Question("q", "?", {{"A": "a"}}, "A")], ["hang"]) if {busy} else None
            time.sleep(600)
    """
    root = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{root}:{here}"},
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        for _ in range(200):
            if not busy or "pids" in (here / "calls.txt").read_text():
                break
            time.sleep(0.05)
        time.sleep(0.3)
        assert Path(f"/proc/{worker}").exists()
        parent.kill()
    assert gone(worker)
    for line in (here / "calls.txt").read_text().splitlines():
        if line.startswith("pids"):
            os.kill(int(line.split()[2]), signal.SIGKILL)  # the sleep it had started is nobody's now
