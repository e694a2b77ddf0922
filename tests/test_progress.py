"""What a person sees of a run's progress."""

import io
import re
import threading
import time

import pytest

from crpo_jax.rollout.engine import RolloutProgress
from crpo_jax.runtime import progress as progress_module
from crpo_jax.runtime import report
from crpo_jax.runtime.progress import Progress, format_duration


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.6, "1:00:00"),
        (3661, "1:01:01"),
        (90061, "25:01:01"),
    ],
)
def test_clock(seconds: float, shown: str):
    assert format_duration(seconds) == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_one_line_on_a_terminal():
    screen = Terminal()
    progress = Progress(10, 0, stream=screen)
    progress.update(1, "reward 1.00")
    progress.update(2, "reward 2.00")
    progress.write("done")
    text = screen.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\r\x1b[2Kdone\n")
    assert re.search(r"\r\x1b\[2K2/10  reward 2\.00  \d+:\d\d left", text)


def test_progress_keeps_a_file_clean():
    """No escape codes and no passing states where nobody can see them pass."""
    file = io.StringIO()
    progress = Progress(10, 0, stream=file)
    progress.update(1, "reward 1.00")
    progress.write("step 1/10")
    assert file.getvalue() == "step 1/10\n"


def test_a_rollout_says_how_far_it_is():
    """30 of 40 responses in 60 seconds, 2,400 tokens in all: 40 tokens a second, and 20 seconds for the 10 left."""
    screen = Terminal()
    state = RolloutProgress(
        prompts=5, responses=30, total=40, tokens=2400, done_tokens=1500, steps=90, cache_bytes=0, seconds=60.0
    )
    Progress(10, 0, stream=screen).update(3, report.rollout_line(state))
    assert (
        "3/10  sampling: 5 prompts, 30 of 40 responses done  40 tok/s  mean length 50  about 0:20 left"
        in screen.getvalue()
    )


def test_time_left_counts_from_where_a_resumed_run_began():
    """90 of 100 steps were done before: what is left is measured by the steps of this process alone."""
    screen = Terminal()
    progress = Progress(100, 90, stream=screen)
    progress._started -= 50.0  # 50 seconds ago
    progress.update(95, "")
    assert screen.getvalue().endswith("0:50 left")
    progress.update(90, "")
    assert screen.getvalue().endswith("90/100    ")


def test_a_log_file_gets_a_line_every_few_steps():
    """Between evaluations, which may be hours apart, a Slurm log was silent."""
    file = io.StringIO()
    progress = Progress(100, 0, stream=file)
    for step in range(1, 21):
        progress.update(step, f"reward {step}")
    lines = file.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[f"{step}/100", f"reward {step}"] for step in (5, 10, 15, 20)]
    assert all(re.search(r"  \d+:\d\d left$", line) for line in lines)
    many = io.StringIO()
    progress = Progress(12_000, 0, stream=many)
    for step in range(1, 12_001):
        progress.update(step, "loss")
    assert len(many.getvalue().splitlines()) == 100


def test_a_log_file_gets_a_line_every_minute(monkeypatch: pytest.MonkeyPatch):
    """Within a step, as in a rollout of an hour; another line in between counts as one."""
    file, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = Progress(10, 0, stream=file)
    for clock[0] in range(0, 200, 10):
        progress.update(0, f"sampling {clock[0]}")
        if clock[0] == 90:
            progress.write("a note")
    assert file.getvalue().splitlines() == ["0/10  sampling 60", "a note", "0/10  sampling 150"]


def test_a_log_file_is_not_silent_while_nothing_is_reported(monkeypatch: pytest.MonkeyPatch):
    """A compilation reports nothing. And a block that is left leaves no thread behind."""
    file = io.StringIO()
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.05)
    threads = threading.active_count()
    with Progress(10, 0, stream=file) as progress:
        progress.update(0, "sampling")
        deadline = time.monotonic() + 10
        while file.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(file.getvalue().splitlines()) == {"0/10  sampling  nothing new for 0:00: computing or compiling"}
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads
    with Progress(10, 0, stream=Terminal()):
        assert threading.active_count() == threads


def test_the_first_estimate_says_so_and_the_next_leaves_compilation_out(monkeypatch: pytest.MonkeyPatch):
    screen, clock = Terminal(), [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: clock[0])
    progress = Progress(10, 0, stream=screen)
    for clock[0], done in ((100.0, 1), (105.0, 1), (110.0, 2)):
        progress.update(done, "")
    shown = [line.split("  ")[-1] for line in screen.getvalue().split("\r\x1b[2K")[1:]]
    assert shown == ["first estimate 15:00 left", "first estimate 15:00 left", "1:20 left"]
