"""metrics.jsonl, samples.jsonl and TensorBoard's events, which a resumed run continues."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crpo_jax.store.files import RESUME_HINT
from crpo_jax.store.logs import LOGS, Log
from crpo_jax.store.metrics import held_out_rewards, read_metrics


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_log_holds_one_object_per_step(tmp_path: Path):
    with Log(tmp_path, 0) as log:
        log.samples([{"step": 0, "response": "µ ≥ 3\u2028"}, {"step": 0, "response": "b"}])
        log.step(0, {"reward/mean": 1.5})
        assert read_metrics(tmp_path) == [{"step": 0, "reward/mean": 1.5}]  # readable while the run goes on
        log.step(1, {"reward/mean": 2.5, "kl/mean": 0.1})
    assert read_metrics(tmp_path) == [{"step": 0, "reward/mean": 1.5}, {"step": 1, "reward/mean": 2.5, "kl/mean": 0.1}]
    assert list((tmp_path / "tb").iterdir())


def write_three_steps(folder: Path) -> None:
    with Log(folder, 0) as log:
        for step in range(3):
            log.samples([{"step": step, "response": f"{step}-{i}"} for i in range(2)])
            log.step(step, {"reward/mean": float(step)})


def sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in LOGS}


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path):
    """The checkpoint was of step 1, the log went on to 2: those lines come again, and would stand twice."""
    with Log(tmp_path) as log:
        log.samples([{"step": 0, "response": f"0-{i}"} for i in range(2)])
        log.step(0, {"reward/mean": 0.0})
        saved = sizes(tmp_path)
        log.samples([{"step": 1, "response": "lost"}])
        log.step(1, {"reward/mean": 1.0})
        log.step(2, {"reward/mean": 2.0})
    with Log(tmp_path, 1, saved) as log:
        log.samples([{"step": 1, "response": "again"}])
        log.step(1, {"reward/mean": 7.0})
    assert [(row["step"], row["reward/mean"]) for row in read_metrics(tmp_path)] == [(0, 0.0), (1, 7.0)]
    assert [row["response"] for row in lines(tmp_path / "samples.jsonl")] == ["0-0", "0-1", "again"]


@pytest.mark.parametrize("cut", ['{"step": 1, "rew', '{"step": 1}', "{"])
def test_a_last_line_cut_off_by_a_crash_is_dropped(cut: str, tmp_path: Path):
    """Even one that happens to be whole JSON: without its line break, the next line would be glued to it."""
    with Log(tmp_path) as log:
        log.step(0, {"reward/mean": 0.0})
    saved, path = sizes(tmp_path), tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + cut)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    with Log(tmp_path, 1, saved) as log:
        log.step(1, {"reward/mean": 3.0})
    assert [row["step"] for row in lines(path)] == [0, 1]


def test_a_disk_full_in_the_middle_of_a_line_is_one_line_and_no_loss(tmp_path: Path):
    """A file that may not grow stands for a full disk: earlier lines stay, the cut one goes when the run resumes."""
    script = (
        "import resource, signal, sys; from pathlib import Path; from crpo_jax.store.logs import Log\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with Log(Path(sys.argv[1])) as log:\n"
        "    log.step(0, {'a': 1.0})\n"
        "    size = Path(sys.argv[1], 'metrics.jsonl').stat().st_size\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10,) * 2)\n"
        "    log.step(1, {'a': 2.0, 'b': 3.0, 'c': 4.0})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    line = f"Fault: {tmp_path / 'metrics.jsonl'}: cannot write: File too large; {RESUME_HINT}"
    assert done.stderr.splitlines()[-1].endswith(line)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]


def test_a_response_with_odd_line_breaks_is_one_line(tmp_path: Path):
    """JSON leaves U+2028 and U+0085 as they are, and Python's splitlines cuts there: such a run could not resume."""
    odd = "a\u2028b\u2029c\x85d\x0ce\x1cf\ng"
    with Log(tmp_path) as log:
        log.samples([{"step": 0, "response": odd}])
        log.step(0, {})
    with Log(tmp_path, 1, sizes(tmp_path)) as log:
        log.step(1, {})
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert kept == [{"step": 0, "response": odd}]


def test_a_process_that_does_not_write_leaves_nothing(tmp_path: Path):
    with Log(tmp_path / "run", 0, writer=False) as log:
        log.samples([{"step": 0}])
        log.step(0, {"a": 1.0})
    assert not (tmp_path / "run").exists()
    assert read_metrics(tmp_path / "run") == []


def test_held_out_rewards_are_those_that_were_measured(tmp_path: Path):
    with Log(tmp_path) as log:
        for step, values in enumerate(({"eval/mean": 3.0}, {}, {"eval/mean": float("nan")}, {"eval/mean": -1.0})):
            log.step(step, values)
        assert held_out_rewards(tmp_path) == {0: 3.0, 3: -1.0}
    assert held_out_rewards(tmp_path / "none") == {}
