"""What a run writes and reads back: checkpoints, bit by bit and onto another mesh, and logs that a resumed run goes on with."""

import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MESHES, SHAPE, mesh_of, placed
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.config import InputError
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.qwen2 import Qwen2
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.run.checkpoint import Checkpoints
from crpo_jax.run.metrics import Log, Progress, clock, read_metrics
from crpo_jax.update.step import Trainer, TrainState, trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def programs(mesh: Mesh, layout: str) -> Trainer:
    settings = config.load(None, [f"parallel.layout={layout}", "model.dtype=float32", "optimizer.learning_rate=0.01"], model=False)
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
    gradients = placed(jax.tree.map(lambda leaf: leaf**3, model), weight_shardings(SHAPE, LAYOUTS["zero1"].master, mesh))
    state, _, _ = run.apply(state, gradients)
    norm = state.master.final_norm_d[...]
    odd = jax.device_put(norm.at[0].set(jnp.nan).at[1].set(1e-45).at[2].set(-0.0), norm.sharding)
    state.master.final_norm_d[...] = odd
    return state


def bits(tree: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("sizes", "layout"), [((4, 2), "zero1"), ((4, 2), "replicated"), ((8, 1), "fsdp"), ((1, 8), "zero1"), ((1, 1), "zero1")])
def test_a_state_comes_back_bit_by_bit_on_any_mesh(sizes: tuple[int, int], layout: str, trained: TrainState, model: Qwen2, tmp_path: Path):
    """Saved on 4x2, restored where the next run stands, in the place that its own layout gives every tensor."""
    assert sizes in MESHES
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(7, trained)
    mesh = mesh_of(*sizes)
    other = begun(programs(mesh, layout), model, mesh, layout, scale=2.0)
    placed_like = [leaf.sharding for leaf in jax.tree.leaves(other)]
    assert bits(other) != bits(trained)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest() == 7
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
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            checkpoints.save(step, trained)
        checkpoints.save(3, trained)  # the last step and the end of the run may fall together
        assert checkpoints.latest() == 3
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["2", "3"]
    with Checkpoints(folder, keep=2) as checkpoints:
        assert (checkpoints.chosen(None), checkpoints.chosen(2)) == (3, 2)
        with pytest.raises(InputError, match=f"^{re.escape(f'{folder}: expected a checkpoint of step 1, got [2, 3]')}$"):
            checkpoints.chosen(1)


def test_no_checkpoint_at_all(tmp_path: Path):
    folder = tmp_path / "none"
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.raises(InputError, match=f"^{re.escape(f'{folder}: expected a checkpoint, got none')}$"):
            checkpoints.chosen(None)
        assert checkpoints.latest() is None


def test_a_checkpoint_that_was_cut_off_is_none(trained: TrainState, tmp_path: Path):
    """kill -9 while a checkpoint is written leaves a temporary folder, which must not be taken for the newest checkpoint."""
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, trained)
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 1


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


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: Path):
    """The checkpoint was of step 1, the log went on to 2: those lines come again, and would stand twice."""
    write_three_steps(tmp_path)
    with Log(tmp_path, 1) as log:
        log.samples([{"step": 1, "response": "again"}])
        log.step(1, {"reward/mean": 7.0})
    assert [(row["step"], row["reward/mean"]) for row in read_metrics(tmp_path)] == [(0, 0.0), (1, 7.0)]
    assert [row["response"] for row in lines(tmp_path / "samples.jsonl")] == ["0-0", "0-1", "again"]


@pytest.mark.parametrize("cut", ['{"step": 2, "rew', '{"step": 2}', "{"])
def test_a_last_line_cut_off_by_a_crash_is_dropped(cut: str, tmp_path: Path):
    """Even one that happens to be whole JSON: without its line break, the next line would be glued to it."""
    write_three_steps(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]) + cut)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    with Log(tmp_path, 3) as log:
        log.step(3, {"reward/mean": 3.0})
    assert [row["step"] for row in lines(path)] == [0, 1, 3]


def test_a_response_with_odd_line_breaks_is_one_line(tmp_path: Path):
    """JSON leaves U+2028 and U+0085 as they are, and Python's splitlines cuts there: a run with such a response could not resume."""
    odd = "a\u2028b\u2029c\x85d\x0ce\x1cf\ng"
    with Log(tmp_path, 0) as log:
        log.samples([{"step": 0, "response": odd}])
        log.step(0, {})
    with Log(tmp_path, 1) as log:
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
    [(0, "0:00"), (0.4, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (61, "1:01"), (3599.6, "1:00:00"), (3661, "1:01:01"), (90061, "25:01:01")],
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


def test_time_left_counts_from_where_a_resumed_run_began():
    """90 of 100 steps were done before: what is left is measured by the steps of this process alone."""
    screen = Terminal()
    progress = Progress(100, 90, stream=screen)
    progress._started -= 50.0  # 50 seconds ago
    progress.show(95, "")
    assert screen.getvalue().endswith("0:50 left")
    progress.show(90, "")
    assert screen.getvalue().endswith("90/100    ")
