"""Checkpoints: bit by bit, onto another mesh, by the names of their arrays, and damaged in every way."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import MESHES, SHAPE, mesh_of, placed
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.errors import Fault, InputError
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.store.checkpoint import RUN_START, SEAL, Checkpoints, ResumePoint, named_arrays, write_seal
from crpo_jax.store.logs import Log
from crpo_jax.update.trainer import Trainer, TrainState

pytestmark = pytest.mark.usefixtures("quick_compiles")


def programs(mesh: Mesh, layout: str) -> Trainer:
    settings = config.load_config(
        None, [f"parallel.layout={layout}", "model.dtype=float32", "optimizer.learning_rate=0.01"], model=False
    )
    return Trainer(SHAPE, mesh, settings, settings.optimizer, 10, loss="crpo")


def begun(run: Trainer, model: Transformer, mesh: Mesh, layout: str, scale: float = 1.0) -> TrainState:
    scaled = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(scale), model)
    """The state before the first step, as a checkpoint holds it: without the frozen reference."""
    return run.begin(placed(scaled, weight_shardings(SHAPE, LAYOUTS[layout].master, mesh)))._replace(frozen=None)


def applied(run: Trainer, state: TrainState, gradients: Any) -> TrainState:
    """The state after an optimizer step with these gradients."""
    return run.apply(state, gradients, run.zero()[1])[0]


@pytest.fixture(scope="module")
def trained(model: Transformer) -> TrainState:
    """A state on 4x2 after one step: moments of every size, and among the masters a NaN and the smallest float."""
    mesh = mesh_of(4, 2)
    run = programs(mesh, "zero1")
    state = begun(run, model, mesh, "zero1")
    gradients = placed(
        jax.tree.map(lambda leaf: leaf**3, model), weight_shardings(SHAPE, LAYOUTS["zero1"].master, mesh)
    )
    state = applied(run, state, gradients)
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
    sizes: tuple[int, int], layout: str, trained: TrainState, model: Transformer, tmp_path: Path
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
        assert checkpoints.find_resume_point().step == 7
        restored = checkpoints.restore(7, other)
    assert bits(restored) == bits(trained)
    assert jax.tree.structure(restored) == jax.tree.structure(trained)
    for leaf, like, to in zip(*map(jax.tree.leaves, (restored, trained)), placed_like, strict=True):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim)
        assert leaf.dtype == like.dtype


def test_a_step_after_restoring_is_the_step_that_would_have_been(
    trained: TrainState, model: Transformer, tmp_path: Path
):
    """Contract 6 in small: moments and the count of steps come back too, or the second step would differ."""
    mesh = mesh_of(1, 1)
    run = programs(mesh, "zero1")
    gradients = [jax.tree.map(lambda leaf, power=power: leaf**power, model) for power in (3, 1)]
    state = applied(run, begun(run, model, mesh, "zero1"), gradients[0])
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state)
    straight = applied(run, state, gradients[1])
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        resumed = applied(run, checkpoints.restore(1, begun(run, model, mesh, "zero1", scale=0.0)), gradients[1])
    assert bits(resumed) == bits(straight)
    fresh = applied(run, begun(run, model, mesh, "zero1"), gradients[1])
    assert bits(fresh) != bits(straight)


def test_only_the_newest_are_kept(trained: TrainState, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.find_resume_point() == RUN_START
        for step in (1, 2, 3):
            checkpoints.save(step, trained)
        checkpoints.save(3, trained)  # the last step and the end of the run may fall together
        checkpoints.wait()
        assert checkpoints.find_resume_point().step == 3
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["2", "3"]
    with Checkpoints(folder, keep=2) as checkpoints:
        assert (checkpoints.select(None), checkpoints.select(2)) == (3, 2)
        with pytest.raises(
            InputError, match=f"^{re.escape(f'{folder}: expected a checkpoint of step 1, got [2, 3]')}$"
        ):
            checkpoints.select(1)


def test_no_checkpoint_at_all(tmp_path: Path):
    folder = tmp_path / "none"
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.raises(InputError, match=f"^{re.escape(f'{folder}: expected a checkpoint, got none')}$"):
            checkpoints.select(None)
        assert checkpoints.find_resume_point() == RUN_START
    assert not folder.exists()  # a reader leaves nothing


def test_the_best_that_were_evaluated_are_kept_beside_the_newest(trained: TrainState, tmp_path: Path):
    with Log(tmp_path) as log, Checkpoints(tmp_path / "checkpoints", keep=1, keep_best=2) as checkpoints:
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
        assert checkpoints.find_resume_point().step == 1
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
            assert checkpoints.find_resume_point().step == 1, name
            said = capsys.readouterr().err
            assert re.fullmatch(r"checkpoint of step 2 is damaged and passed over: [^\n]+\n", said), (name, said)
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.raises(InputError, match="expected a whole checkpoint, got a damaged one"):
            checkpoints.select(None)
        checkpoints.find_resume_point()
        checkpoints.save(2, trained)  # the run comes by again
        checkpoints.wait()
        assert checkpoints.find_resume_point().step == 2
        for step in (1, 2):
            os.truncate(folder / str(step) / "_METADATA", 1)
        with pytest.raises(
            InputError, match=r"expected a whole checkpoint, got only damaged ones: _METADATA has 1 bytes instead of "
        ):
            checkpoints.find_resume_point()


def test_a_checkpoint_whose_log_lines_are_lost_is_passed_over(
    trained: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Resuming from it would leave a hole in the metrics; from an earlier one the run writes those lines again."""
    with Log(tmp_path) as log, Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            log.step(step - 1, {"a": 1.0})
            checkpoints.save(step, trained)
    os.truncate(tmp_path / "metrics.jsonl", (tmp_path / "metrics.jsonl").stat().st_size - 1)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        saved = checkpoints.find_resume_point()
    assert saved == ResumePoint(1, {"metrics.jsonl": 22, "samples.jsonl": 0})
    assert (
        "checkpoint of step 2 is passed over: metrics.jsonl has no line of its last step; the run resumes from step 1"
        in capsys.readouterr().err
    )


def test_a_checkpoint_that_cannot_be_written_is_a_fault(
    trained: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "checkpoints"

    def full(folder: Path, point: ResumePoint, arrays: dict[str, str]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, trained)
        checkpoints.wait()
        monkeypatch.setattr("crpo_jax.store.checkpoint.write_seal", full)
        checkpoints.save(2, trained)
        with pytest.raises(
            Fault,
            match=r"could not write the checkpoint of step 2: No space left on device; "
            r"the checkpoint of step 1 is whole, and the same command resumes from it$",
        ):
            checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_a_seal_of_another_shape_is_damage(trained: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Also where its digest is right: another program, or a person, wrote it."""
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, trained)
        checkpoints.save(2, trained)
    for line in (
        "[]",
        "7",
        "{}",
        '{"step": "x"}',
        '{"step": 2, "logs": {}, "files": {"_METADATA": 3}}',
        "[[[[",
        "\xff",
    ):
        data = line.encode("latin1")
        (folder / "2" / SEAL).write_bytes(data + b"\n" + hashlib.sha256(data).hexdigest().encode() + b"\n")
        with Checkpoints(folder, keep=2) as checkpoints:
            assert checkpoints.find_resume_point().step == 1, line
        said = capsys.readouterr().err
        assert re.fullmatch(r"checkpoint of step 2 is damaged and passed over: seal\.json: [^\n]+\n", said), said


def test_files_in_the_place_of_folders_are_damage_or_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What a killed process left is removed, whatever it is; what a person named is left alone."""
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, parts())
    for name in ("2", "3.unfinished", "4.old", "best.old", "notes.unfinished"):
        (folder / name).write_text("")
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.find_resume_point().step == 1
        assert "step 2 is damaged and passed over: seal.json cannot be read: Not a directory" in capsys.readouterr().err
        checkpoints.save(2, parts())
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "best.old", "notes.unfinished"]
    assert (folder / "2").is_dir()


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_logs_that_were_deleted_damage_no_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Log(tmp_path) as log, Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            log.samples([{"step": step - 1}])
            log.step(step - 1, {"a": 1.0})
            checkpoints.save(step, parts())
    (tmp_path / name).unlink()
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        point = checkpoints.find_resume_point()
    assert point.step == 2
    Log(tmp_path, *point).__exit__(None)
    assert f"{tmp_path / name}: 0 bytes instead of" in capsys.readouterr().err


def test_a_bad_line_of_the_metrics_is_named_before_anything_is_done(tmp_path: Path):
    """The scores of earlier checkpoints are read from them after every save: too late to say it then."""
    with Log(tmp_path) as log, Checkpoints(tmp_path / "checkpoints", keep=1, keep_best=1) as checkpoints:
        for step in (1, 2, 3):
            log.step(step - 1, {"eval/mean": 1.0})
            checkpoints.save(step, parts())
        checkpoints.wait()
        lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        for bad in (
            b'{"step": 0, "eval/mean": "\xff"}\n',
            b"[]\n",
            b'{"eval/mean": 1.0}\n',
            b'{"step": 0, "a": "b"}\n',
        ):
            (tmp_path / "metrics.jsonl").write_bytes(bad + b"".join(lines[1:]))
            with pytest.raises(InputError, match=r"metrics\.jsonl:1: expected .*; remove the line, or choose another"):
                checkpoints.find_resume_point()
        checkpoints.save(4, parts())
        with pytest.raises(
            Fault, match=r"checkpoint of step 4 is whole, but older ones could not be .*metrics\.jsonl:1"
        ):
            checkpoints.wait()
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[1:]))  # as the line said
        assert checkpoints.find_resume_point().step == 3


def fill(disk: Path, refusal: str) -> None:
    """Leaves a mounted file system in a state in which it refuses a checkpoint."""
    if refusal == "no space":
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    elif refusal == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    else:
        for number in range(os.statvfs(disk).f_ffree - (4 if refusal == "few inodes" else 0)):
            (disk / f"filler{number}").touch()


def save_and_wait(checkpoints: Checkpoints) -> None:
    checkpoints.save(2, parts())
    checkpoints.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: only root can mount a file system that refuses")
@pytest.mark.parametrize("refusal", ["no space", "no inodes", "few inodes", "read-only"])
def test_a_disk_that_refuses_is_one_line_at_once(refusal: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Without orbax's tracebacks beside it, its 300 seconds of waiting, or a leftover that takes room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with Checkpoints(disk / "checkpoints", keep=2) as checkpoints:
            checkpoints.save(1, parts())
            checkpoints.wait()
            fill(disk, refusal)
            began = time.monotonic()
            with pytest.raises(Fault) as caught:
                save_and_wait(checkpoints)
        assert time.monotonic() - began < 10
        reason = "Read-only file system" if refusal == "read-only" else "No space left on device"
        line = f"could not write the checkpoint of step 2: {reason}; the checkpoint of step 1 is whole, and"
        assert line in str(caught.value)
        assert capfd.readouterr().err == ""
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        for path in disk.glob("filler*"):
            path.unlink()
        with Checkpoints(disk / "checkpoints", keep=2) as checkpoints:
            assert checkpoints.find_resume_point().step == 1
            assert [path.name for path in (disk / "checkpoints").iterdir()] == ["1"]
            save_and_wait(checkpoints)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- arrays by name --------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """A state as trees of any kind make it up; None, as for frozen weights, is no array."""

    master: Any
    frozen: Any
    optimizer: Any
    step: Any


def parts(width: int = 3, dtype: Any = jnp.float32, **more: Any) -> Parts:
    master = {"b": jnp.arange(width, dtype=dtype), "a": jnp.ones((2, width), dtype)} | more
    optimizer = optax.partition(
        {"some": optax.adamw(0.1), "rest": optax.sgd(0.1)}, {name: "some" if name == "a" else "rest" for name in master}
    )
    return Parts(master, None, optimizer.init(master), jnp.int32(5))


def test_arrays_are_named_by_their_key_paths(trained: TrainState):
    names = list(named_arrays(trained))
    assert {"master.final_norm_d", "master.blocks.q_dnh", "optimizer.1.0.mu.blocks.q_dnh", "step"} <= set(names)
    assert len(names) == len(jax.tree.leaves(trained))
    assert list(named_arrays(parts())) == [
        "master.a",
        "master.b",
        "optimizer.inner_states.some.inner_state.0.count",
        "optimizer.inner_states.some.inner_state.0.mu.a",
        "optimizer.inner_states.some.inner_state.0.nu.a",
        "step",
    ]
    with pytest.raises(AssertionError, match="the same name"):
        named_arrays({"a": {"b": 1}, "a.b": 2})


def test_an_array_finds_its_place_by_its_name(tmp_path: Path):
    """In whatever order a library flattens the state by then, and with no array where there is none."""
    state = parts()
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore(1, jax.tree.map(jnp.zeros_like, state))
        assert restored.frozen is None
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, state)

        class Reordered(NamedTuple):
            step: Any
            master: Any
            optimizer: Any

        like = Reordered(*(jax.tree.map(jnp.zeros_like, x) for x in (state.step, state.master, state.optimizer)))
        other = checkpoints.restore(1, like)
        assert type(other) is Reordered
        assert other.step == 5
        jax.tree.map(np.testing.assert_array_equal, (other.master, other.optimizer), (state.master, state.optimizer))


@pytest.mark.parametrize(
    ("like", "line"),
    [
        (parts(width=4), "master.a: expected float32[2,4], got float32[2,3]; 3 more arrays differ"),
        (parts(dtype=jnp.bfloat16), "master.a: expected bfloat16[2,3], got float32[2,3]; 3 more arrays differ"),
        (parts(c=jnp.zeros(1)), "master.c: expected float32[1], got none"),
        (parts()._replace(step=None), "step: expected no such array, got int32[]"),
    ],
)
def test_a_state_of_other_arrays_is_refused_by_name(like: Parts, line: str, tmp_path: Path):
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, parts())
        checkpoints.wait()
        with pytest.raises(InputError) as caught:
            checkpoints.restore(1, like)
    assert str(caught.value) == f"{tmp_path / 'checkpoints' / '1'}: {line}"


def test_a_checkpoint_of_numbered_arrays_is_refused_and_left_alone(tmp_path: Path):
    """As versions wrote it that saved the leaves by number: whole, and not to be taken for a damaged one."""
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(3, {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(parts()))})
    content = json.loads((folder / "3" / SEAL).read_text().splitlines()[0])
    write_seal(folder / "3", ResumePoint(content["step"], content["logs"]), {})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.find_resume_point().step == 3
        with pytest.raises(
            InputError, match=r"3: expected .* names, got one of an older version, which numbered them; "
        ):
            checkpoints.restore(3, parts())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_checkpoint_damaged_since_it_was_verified_is_refused(tmp_path: Path):
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, parts())
        checkpoints.wait()
        (tmp_path / "checkpoints" / "1" / SEAL).unlink()
        with pytest.raises(InputError, match=r"expected a whole checkpoint, got a damaged one: seal\.json is missing"):
            checkpoints.restore(1, parts())
