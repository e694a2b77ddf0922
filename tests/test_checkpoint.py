"""What a run writes and reads back: checkpoints, bit by bit and onto another mesh, and logs that a resumed run goes on with."""

import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MESHES, SHAPE, mesh_of, placed
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.errors import Fault, InputError
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.transformer import Qwen2
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.rollout.engine import Tally
from crpo_jax.runtime import report
from crpo_jax.runtime.progress import Progress, clock
from crpo_jax.store.checkpoint import START, Checkpoints, Saved
from crpo_jax.store.logs import LOGS, Log, read_metrics
from crpo_jax.update.trainer import Trainer, TrainState, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def programs(mesh: Mesh, layout: str) -> Trainer:
    settings = config.load(
        None, [f"parallel.layout={layout}", "model.dtype=float32", "optimizer.learning_rate=0.01"], model=False
    )
    return trainer(SHAPE, mesh, settings, settings.optimizer, 10, loss="crpo")


def begun(run: Trainer, model: Qwen2, mesh: Mesh, layout: str, scale: float = 1.0) -> TrainState:
    scaled = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(scale), model)
    return run.begin(placed(scaled, weight_shardings(SHAPE, LAYOUTS[layout].master, mesh)))


@pytest.fixture(scope="module")
def trained(model: Qwen2) -> TrainState:
    """A state on 4x2 after one step: moments of every size, a step of 1, a NaN and the smallest float among the masters."""
    mesh = mesh_of(4, 2)
    run = programs(mesh, "zero1")
    state = begun(run, model, mesh, "zero1")
    gradients = placed(
        jax.tree.map(lambda leaf: leaf**3, model), weight_shardings(SHAPE, LAYOUTS["zero1"].master, mesh)
    )
    state, _, _ = run.apply(state, gradients)
    norm = state.master.final_norm_d[...]
    odd = jax.device_put(norm.at[0].set(jnp.nan).at[1].set(1e-45).at[2].set(-0.0), norm.sharding)
    state.master.final_norm_d[...] = odd
    return state


def bits(tree: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [((4, 2), "zero1"), ((4, 2), "replicated"), ((8, 1), "fsdp"), ((1, 8), "zero1"), ((1, 1), "zero1")],
)
def test_a_state_comes_back_bit_by_bit_on_any_mesh(
    sizes: tuple[int, int], layout: str, trained: TrainState, model: Qwen2, tmp_path: Path
):
    """Saved on 4x2, restored where the next run stands, in the place that its own layout gives every tensor."""
    assert sizes in MESHES
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(7, trained)
    mesh = mesh_of(*sizes)
    other = begun(programs(mesh, layout), model, mesh, layout, scale=2.0)
    placed_like = [leaf.sharding for leaf in jax.tree.leaves(other)]
    assert bits(other) != bits(trained)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.newest().step == 7
        restored = checkpoints.restore(7, other)
    assert bits(restored) == bits(trained)
    assert jax.tree.structure(restored) == jax.tree.structure(trained)
    for leaf, like, to in zip(*map(jax.tree.leaves, (restored, trained)), placed_like, strict=True):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim)
        assert leaf.dtype == like.dtype


def test_a_step_after_restoring_is_the_step_that_would_have_been(trained: TrainState, model: Qwen2, tmp_path: Path):
    """Contract 6 in small: moments and the count of steps come back too, or the second step would differ."""
    mesh = mesh_of(1, 1)
    run = programs(mesh, "zero1")
    gradients = [jax.tree.map(lambda leaf, power=power: leaf**power, model) for power in (3, 1)]
    state, _, _ = run.apply(begun(run, model, mesh, "zero1"), gradients[0])
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state)
    straight, _, _ = run.apply(state, gradients[1])
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        resumed, _, _ = run.apply(checkpoints.restore(1, begun(run, model, mesh, "zero1", scale=0.0)), gradients[1])
    assert bits(resumed) == bits(straight)
    fresh, _, _ = run.apply(begun(run, model, mesh, "zero1"), gradients[1])
    assert bits(fresh) != bits(straight)


def test_only_the_newest_are_kept(trained: TrainState, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.newest() == START
        for step in (1, 2, 3):
            checkpoints.save(step, trained)
        checkpoints.save(3, trained)  # the last step and the end of the run may fall together
        checkpoints.wait()
        assert checkpoints.newest().step == 3
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["2", "3"]
    with Checkpoints(folder, keep=2) as checkpoints:
        assert (checkpoints.chosen(None), checkpoints.chosen(2)) == (3, 2)
        with pytest.raises(
            InputError, match=f"^{re.escape(f'{folder}: expected a checkpoint of step 1, got [2, 3]')}$"
        ):
            checkpoints.chosen(1)


def test_no_checkpoint_at_all(tmp_path: Path):
    folder = tmp_path / "none"
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.raises(InputError, match=f"^{re.escape(f'{folder}: expected a checkpoint, got none')}$"):
            checkpoints.chosen(None)
        assert checkpoints.newest() == START
    assert not folder.exists()  # a reader leaves nothing


def test_the_best_that_were_evaluated_are_kept_beside_the_newest(trained: TrainState, tmp_path: Path):
    with Log(tmp_path) as log, Checkpoints(tmp_path / "checkpoints", keep=1, best=2) as checkpoints:
        for step, value in ((1, 3.0), (2, 9.0), (3, None), (4, 5.0), (5, 1.0), (6, math.nan)):
            log.step(step, {} if value is None else {"eval/mean": value})
            checkpoints.save(step, trained)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 6]


def test_what_a_killed_process_was_writing_or_removing_is_no_checkpoint(
    trained: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Neither used nor reported as damage: it never had its name, or not any more."""
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, trained)
    for name in ("2.unfinished", "2.unfinished.orbax-checkpoint-tmp", "0.old"):
        shutil.copytree(folder / "1", folder / name)
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.newest().step == 1
    assert [path.name for path in folder.iterdir()] == ["1"]
    assert capsys.readouterr().err == ""


def test_a_state_that_is_donated_right_after_is_saved_as_it_was(trained: TrainState, tmp_path: Path):
    """The next optimizer step writes into the memory that is being saved in the background."""
    state = jax.tree.map(lambda leaf: jax.device_put(np.array(leaf), leaf.sharding), trained)
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 + 7, state), donate_argnums=0)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state)
        state = jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        assert bits(checkpoints.restore(1, trained)) == bits(trained)


def damages(folder: Path) -> list[tuple[str, Callable[[Path], object]]]:
    """Every way of damaging each file of a checkpoint."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)

    how = {
        "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
        "flipped": flip,
        "removed": Path.unlink,
    }
    files = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.stat().st_size
    )
    return [
        (f"{name} {kind}", lambda checkpoint, name=name, act=act: act(checkpoint / name))
        for name in files
        for kind, act in how.items()
    ]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(
    trained: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Whichever of its files is cut short, changed by a bit or gone."""
    folder, spare = tmp_path / "checkpoints", tmp_path / "spare"
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, trained)
        checkpoints.save(2, trained)
    shutil.copytree(folder / "2", spare)
    tried = damages(spare)
    assert len(tried) > 30
    for name, damage in tried:
        shutil.rmtree(folder / "2")
        shutil.copytree(spare, folder / "2")
        damage(folder / "2")
        with Checkpoints(folder, keep=2) as checkpoints:
            assert checkpoints.newest().step == 1, name
            said = capsys.readouterr().err
            assert re.fullmatch(r"checkpoint of step 2 is damaged and passed over: [^\n]+\n", said), (name, said)
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.raises(InputError, match="expected a whole checkpoint, got a damaged one"):
            checkpoints.chosen(None)
        checkpoints.newest()
        checkpoints.save(2, trained)  # the run comes by again
        checkpoints.wait()
        assert checkpoints.newest().step == 2
        for step in (1, 2):
            os.truncate(folder / str(step) / "_METADATA", 1)
        with pytest.raises(
            InputError, match=r"expected a whole checkpoint, got only damaged ones: _METADATA has 1 bytes instead of "
        ):
            checkpoints.newest()


def test_a_checkpoint_whose_log_lines_are_lost_is_passed_over(
    trained: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """After a power failure the checkpoint may be there and the lines of its steps not: resuming would leave a hole."""
    with Log(tmp_path) as log, Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            log.step(step - 1, {"a": 1.0})
            checkpoints.save(step, trained)
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 1)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        saved = checkpoints.newest()
    assert saved == Saved(1, {"metrics.jsonl": 22, "samples.jsonl": 0})
    assert (
        "metrics.jsonl beside it has 43 bytes instead of at least 44: lines of its steps are missing"
        in capsys.readouterr().err
    )


def test_a_checkpoint_that_cannot_be_written_is_a_fault(
    trained: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "checkpoints"

    def full(folder: Path, saved: Saved) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, trained)
        checkpoints.wait()
        monkeypatch.setattr("crpo_jax.store.checkpoint.write_seal", full)
        checkpoints.save(2, trained)
        with pytest.raises(
            Fault,
            match=r"could not write the checkpoint of step 2: No space left on device; the checkpoint of step 1 is whole",
        ):
            checkpoints.wait()
        assert checkpoints.steps() == [1]


# --- logs -------------------------------------------------------------------------------------------------------------


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
    """A file that may not grow stands for a full disk: what was logged before stays, what was cut goes when the run resumes."""
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
    said = f"Fault: {tmp_path / 'metrics.jsonl'}: File too large; once that is mended, the same command goes on from the last checkpoint"
    assert done.stderr.splitlines()[-1].endswith(said)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]


def test_a_response_with_odd_line_breaks_is_one_line(tmp_path: Path):
    """JSON leaves U+2028 and U+0085 as they are, and Python's splitlines cuts there: a run with such a response could not resume."""
    odd = "a\u2028b\u2029c\x85d\x0ce\x1cf\ng"
    with Log(tmp_path) as log:
        log.samples([{"step": 0, "response": odd}])
        log.step(0, {})
    with Log(tmp_path, 1, sizes(tmp_path)) as log:
        log.step(1, {})
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert kept == [{"step": 0, "response": odd}]


def test_a_process_that_does_not_write_leaves_nothing(tmp_path: Path):
    with Log(tmp_path / "run", 0, writes=False) as log:
        log.samples([{"step": 0}])
        log.step(0, {"a": 1.0})
    assert not (tmp_path / "run").exists()
    assert read_metrics(tmp_path / "run") == []


# --- what a person sees -----------------------------------------------------------------------------------------------


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
    assert clock(seconds) == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_one_line_on_a_terminal():
    screen = Terminal()
    progress = Progress(10, 0, stream=screen)
    progress.show(1, "reward 1.00")
    progress.show(2, "reward 2.00")
    progress.keep("done")
    text = screen.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\r\x1b[2Kdone\n")
    assert re.search(r"\r\x1b\[2K2/10  reward 2\.00  \d+:\d\d left", text)


def test_progress_keeps_a_file_clean():
    """No escape codes and no passing states where nobody can see them pass."""
    file = io.StringIO()
    progress = Progress(10, 0, stream=file)
    progress.show(1, "reward 1.00")
    progress.keep("step 1/10")
    assert file.getvalue() == "step 1/10\n"


def test_a_rollout_says_how_far_it_is():
    """30 of 40 responses in 60 seconds, 2,400 tokens in all: 40 tokens a second, and 20 seconds for the 10 left."""
    screen = Terminal()
    show = report.sampling(Progress(10, 0, stream=screen), 3)
    show(Tally(prompts=5, responses=30, total=40, tokens=2400, done_tokens=1500, steps=90, cache_bytes=0, seconds=60.0))
    assert (
        "3/10  sampling: 5 prompts, 30 of 40 responses done  40 tok/s  mean length 50  about 0:20 to go"
        in screen.getvalue()
    )


def test_time_left_counts_from_where_a_resumed_run_began():
    """90 of 100 steps were done before: what is left is measured by the steps of this process alone."""
    screen = Terminal()
    progress = Progress(100, 90, stream=screen)
    progress._started -= 50.0  # 50 seconds ago
    progress.show(95, "")
    assert screen.getvalue().endswith("0:50 left")
    progress.show(90, "")
    assert screen.getvalue().endswith("90/100    ")
