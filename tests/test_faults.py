"""What happens to runs: killed, stopped, doubled, out of disk or memory, astray. `harness.py` does it to real ones.

CRPO_JAX_KILLS=40 kills forty times instead of three.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest
from ext4_image import missing_means

from crpo_jax import config
from crpo_jax.config import Config
from crpo_jax.errors import Fault, InputError
from crpo_jax.runtime import faults
from crpo_jax.runtime.compilations import enable_compilation_cache
from crpo_jax.runtime.limits import LimitWatch
from crpo_jax.store.metrics import read_metrics
from crpo_jax.store.workdir import check_inputs, open_workdir

KILLS = int(os.environ.get("CRPO_JAX_KILLS", "3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness's folder after its kills and faults."""
    folder = tmp_path_factory.mktemp("runs")
    command = [
        sys.executable,
        str(Path(__file__).with_name("harness.py")),
        "--folder",
        str(folder),
        "--kills",
        str(KILLS),
        "--steps",
        "4",
        "--faults",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, Any]:
    """How the runs ended that something else happened to: exit code and what they said."""
    return json.loads((folder / "faults.json").read_text())


# ---- real runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(folder: Path):
    """Contract 6: metrics, samples, masters and moments bit by bit; the harness compares and fails otherwise."""
    said = (folder / "said").read_text()
    print(said)  # where the kills fell
    assert re.search(rf"^{KILLS} kills, each followed by a resume", said, re.MULTILINE)
    assert "bitwise those of the run never stopped" in said


@pytest.mark.slow
def test_a_run_resumes_after_a_power_cut(folder: Path):
    """Bitwise, from what an ext4 image held at random moments of a start and a loop; CRPO_JAX_KILLS=40 takes ten times
    as many."""
    if lack := missing_means():
        pytest.skip(f"cannot mount images here: {lack}")
    command = [sys.executable, str(Path(__file__).with_name("power_cuts.py")), "--folder", str(folder)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    done = subprocess.run(
        [*command, "--cuts", str(-(-KILLS // 2)), "--steps", "4", "run.keep=1"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_nothing_compiles_after_the_first_epoch(folder: Path):
    """31 questions, 8 a step: by the fourth step every shape was seen."""
    compiled = [row["time/compilations"] for row in read_metrics(folder / "whole") if "time/compilations" in row]
    assert compiled[0] > 0
    assert compiled[3:] == [0] * len(compiled[3:])


@pytest.mark.slow
def test_a_second_run_in_a_workdir_is_refused(ended: dict[str, Any]):
    assert ended["second run"]["code"] == 2
    assert re.search(
        r"--workdir \S+: expected a folder that no other run is using, got one that process \d+ on \S+ has open\n$",
        ended["second run"]["said"],
    )


@pytest.mark.slow
def test_sigterm_ends_a_run_in_good_order(ended: dict[str, Any]):
    assert ended["SIGTERM"]["code"] == 0
    assert (
        "SIGTERM: finishing this part of the step, saving, then stopping; a second signal exits at once"
        in ended["SIGTERM"]["said"]
    )
    assert re.search(r"stopped after step \d of 4; the same command resumes from there\n$", ended["SIGTERM"]["said"])
    assert ended["its scoring processes killed"]["code"] == 0
    assert ended["same"]["stopped"], (
        "stopped, and its scoring processes killed after that: not the run it would have been"
    )


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(ended: dict[str, Any]):
    assert ended["SIGINT twice"]["code"] == 130
    assert ended["SIGINT twice"]["said"].endswith(
        "SIGINT again: exiting at once; the same command resumes from what is saved\n"
    )


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(ended: dict[str, Any]):
    assert ended["disk full"]["code"] == 1
    last = ended["disk full"]["said"].splitlines()[-1]  # orbax's own threads may have said something before it
    assert re.search(
        r"^crpo_jax.train: stopped: .*(No space left|File too large).*the same command (resumes|begins)", last
    )
    assert ended["disk free again"]["code"] == 0
    assert ended["same"]["twice"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_workdir_moved_or_deleted_ends_the_run_at_its_next_step(how: str, ended: dict[str, Any]):
    """It would train on, and everything after that moment would be lost."""
    assert ended[how]["code"] == 1, ended[how]["said"]
    assert "moved or deleted while it was being written" in ended[how]["said"].splitlines()[-1]
    assert "Traceback" not in ended[how]["said"]
    assert not ended[how]["left"], "something was written where the folder had been"


@pytest.mark.slow
def test_a_workdir_of_any_name_resumes_where_it_is(ended: dict[str, Any]):
    assert ended["moved back"]["code"] == 0, ended["moved back"]["said"]
    assert ended["same"]["moved back"]


@pytest.mark.slow
def test_updates_that_are_not_finite_are_not_applied_and_named(ended: dict[str, Any], folder: Path):
    """A learning rate of 1e30: the second update of the first step meets weights that overflow."""
    said = ended["not finite"]["said"]
    assert ended["not finite"]["code"] == 1
    assert re.search(
        r"^step 0, mini-batch 1: loss or gradient not finite, update not applied \(loss, .*norm", said, re.MULTILINE
    )
    assert re.search(
        r"^crpo_jax.train: stopped: step 1, mini-batch 1: .* It was the last of 3 in a row \(run.limits.skipped\)",
        said,
        re.MULTILINE,
    )
    assert [row["policy/skipped_updates"] for row in read_metrics(folder / "astray")] == [1, 2]
    assert sorted(path.name for path in (folder / "astray" / "skipped").iterdir()) == [
        f"step_{step:06d}_mini_{mini:03d}.npz" for step, mini in ((0, 1), (1, 0), (1, 1))
    ]


@pytest.mark.slow
def test_a_kept_batch_is_looked_at_again(ended: dict[str, Any]):
    assert ended["replay"]["code"] == 0
    assert re.search(
        r"step_000000_mini_001.npz: loss -?[\d.e-]+, gradient norm [\d.e-]+, not finite: nothing",
        ended["replay"]["said"],
    )
    assert ended["no replay"]["code"] == 2
    assert re.search(r"--replay 77: expected a step whose batch is in \S+, got \[0, 1\]\n$", ended["no replay"]["said"])


# ---- limits ----------------------------------------------------------------------------------------------------------

WELL = {"kl/mean": 0.1, "policy/entropy": 0.3, "reward/zero_variance_groups": 0.5, "response/truncated": 0.1}
BEYOND = [
    ("kl/mean", 1.5, "kl/mean is 1.5: nats a token from the start model, over run.limits.kl=1", "crpo.kl_coef"),
    (
        "policy/entropy",
        0.001,
        "policy/entropy is 0.001: nats a token, under run.limits.entropy=0.01",
        "crpo.entropy_coef",
    ),
    (
        "reward/zero_variance_groups",
        1.0,
        "reward/zero_variance_groups is 1: of the groups have responses that all earn the same",
        "crpo.group_size",
    ),
    (
        "response/truncated",
        1.0,
        "response/truncated is 1: of the responses were cut at rollout.max_new_tokens=4096",
        "rollout.stop",
    ),
]


def settings(*overrides: str) -> Config:
    return config.load_config(None, overrides, model=False)


@pytest.mark.parametrize(("name", "value", "line", "advice"), BEYOND, ids=[row[0] for row in BEYOND])
def test_a_measure_beyond_its_limit_is_explained(name: str, value: float, line: str, advice: str, tmp_path: Path):
    messages: list[str] = []
    watched = LimitWatch(settings(), tmp_path, messages.append, "crpo")
    for step in range(100):
        watched.check_measures(step, WELL | {name: value})
    assert [re.match(r"warning: step (\d+)", one)[1] for one in messages] == ["0", "9", "99"]  # pyright: ignore[reportOptionalSubscript]
    assert messages[0].startswith(f"warning: step 0: {line}")
    assert all(advice in one and "\n" not in one for one in messages)
    assert ", for 10 steps in a row: " in messages[1]
    stopping = LimitWatch(
        settings("run.limits.action=stop", "run.limits.patience=2"), tmp_path, messages.append, "crpo"
    )
    stopping.check_measures(0, WELL | {name: value})
    stopping.check_measures(1, WELL)  # not in a row
    stopping.check_measures(2, WELL | {name: value})
    with pytest.raises(Fault, match=f"step 3: {name} is .*, for 2 steps in a row: .*run.limits.action=stop"):
        stopping.check_measures(3, WELL | {name: value})


@pytest.mark.parametrize("measured", [WELL, WELL | {"kl/mean": float("nan"), "policy/entropy": float("nan")}])
def test_nothing_is_said_within_the_limits_or_of_what_could_not_be_measured(measured: dict[str, float], tmp_path: Path):
    messages: list[str] = []
    LimitWatch(settings(), tmp_path, messages.append, "crpo").check_measures(0, measured)
    assert messages == []


def test_limits_of_zero_are_off(tmp_path: Path):
    messages: list[str] = []
    off = [f"run.limits.{name}=0" for name in ("kl", "entropy", "zero_variance", "truncated")]
    LimitWatch(settings(*off), tmp_path, messages.append, "crpo").check_measures(
        0, {name: value for name, value, _, _ in BEYOND}
    )
    assert messages == []


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_names_the_phase_and_the_knob():
    """The message of a GPU, raised in the sampler and in the update."""
    said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12884901888 bytes."

    def raised(module: str) -> Fault | None:
        program = compile("raise error", str(Path(faults.__file__).parents[1] / module), "exec")
        try:
            exec(program, {"error": jax.errors.JaxRuntimeError(said)})  # noqa: S102 (a frame of that file)
        except jax.errors.JaxRuntimeError as error:
            return faults.out_of_memory(error)

    assert str(raised("rollout/engine.py")).startswith(
        "out of device memory while sampling (requested 12884901888 bytes): try rollout.slots smaller"
    )
    assert str(raised("train.py")).startswith(
        "out of device memory while the update (requested 12884901888 bytes): try parallel.micro_batch_tokens"
    )
    assert str(raised("model/huggingface.py")).startswith("out of device memory while loading the model")
    assert faults.out_of_memory(ValueError("something else")) is None


# ---- the workdir -----------------------------------------------------------------------------------------------------


def test_another_config_is_refused_unless_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scratch = "tokenizer.path=somewhere"
    open_workdir(tmp_path / "run", settings(scratch)).close()
    other = settings(scratch, "crpo.kl_coef=0.5", "crpo.steps=7", "parallel.mesh=1x1", "run.limits.kl=2")
    with pytest.raises(
        InputError,
        match=r"got crpo.kl_coef: 0.001 -> 0.5. Choose another --workdir, or continue in this one with --allow-changes",
    ):
        open_workdir(tmp_path / "run", other)
    assert config.load_config(tmp_path / "run" / "config.yaml").crpo.kl_coef == 0.001
    open_workdir(tmp_path / "run", other, allow_changes=True).close()
    assert (
        capsys.readouterr().err
        == "--allow-changes: crpo.kl_coef: 0.001 -> 0.5; the previous config is in config.1.yaml\n"
    )
    assert config.load_config(tmp_path / "run" / "config.yaml") == other
    assert config.load_config(tmp_path / "run" / "config.1.yaml").crpo.kl_coef == 0.001


@pytest.mark.parametrize("depends", [["optimizer.schedule=cosine"], ["optimizer.warmup_ratio=0.1"]])
def test_how_long_it_runs_may_change_unless_the_learning_rate_depends_on_it(depends: list[str], tmp_path: Path):
    first = ("tokenizer.path=somewhere", "crpo.steps=5", *depends)
    open_workdir(tmp_path / "run", settings(*first)).close()
    with pytest.raises(InputError, match=r"crpo\.steps: 5 -> 6"):
        open_workdir(tmp_path / "run", settings(*first, "crpo.steps=6"))


def test_a_warm_up_counted_in_steps_leaves_the_length_free(tmp_path: Path):
    first = ("tokenizer.path=somewhere", "crpo.steps=5", "optimizer.warmup_steps=2", "optimizer.warmup_ratio=0.1")
    open_workdir(tmp_path / "run", settings(*first)).close()
    open_workdir(tmp_path / "run", settings(*first, "crpo.steps=6")).close()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        InputError, match=r"expected a new folder or one with a run's config.yaml, got a folder with other files"
    ):
        open_workdir(tmp_path, settings())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_workdir_is_one_runs_until_that_is_over(tmp_path: Path):
    with (
        open_workdir(tmp_path / "run", settings("tokenizer.path=a")),
        pytest.raises(InputError, match=f"process {os.getpid()} on .* has open"),
    ):
        open_workdir(tmp_path / "run", settings("tokenizer.path=a"))
    open_workdir(tmp_path / "run", settings("tokenizer.path=a")).close()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("crpo_jax.store.workdir.fcntl.flock", no_locks)
    open_workdir(tmp_path / "run", settings("tokenizer.path=a")).close()
    assert (
        "this file system has no locks (Operation not supported): nothing keeps a second run out"
        in capsys.readouterr().err
    )


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--workdir .*/file/run: cannot write: Not a directory"):
        open_workdir(tmp_path / "file" / "run", settings())


def test_inputs_that_changed_between_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = {"training questions": "a", "held-out questions": "b", "tokenizer": "c", "start model": "d"}
    check_inputs(tmp_path, before)
    check_inputs(tmp_path, before)
    after = before | {"training questions": "x", "start model": "y"}
    with pytest.raises(
        InputError,
        match=r"the inputs that the run in it began with, got other training questions and other start model\. Choose",
    ):
        check_inputs(tmp_path, after)
    check_inputs(tmp_path, after, allow_changes=True)
    assert (
        "--allow-changes: other training questions and other start model than the run began with"
        in capsys.readouterr().err
    )
    check_inputs(tmp_path, after)


def test_programs_are_kept_apart_by_machine_and_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: Counter[str] = Counter()
    monkeypatch.setattr(jax.config, "update", lambda name, value: asked.update([f"{name}={value}"]))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    enable_compilation_cache(str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    enable_compilation_cache("")
    assert not asked
    enable_compilation_cache(str(tmp_path))
    assert any(re.fullmatch(rf"jax_compilation_cache_dir={tmp_path}/[0-9a-f]{{12}}", name) for name in asked)
