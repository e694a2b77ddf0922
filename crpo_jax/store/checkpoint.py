"""Checkpoints of a run in its workdir: written by orbax in the background, and verified before they are used."""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from crpo_jax.errors import Fault, InputError
from crpo_jax.store.logs import LOGS, held_out_rewards

State = TypeVar("State")

SEAL = "seal.json"


class ResumePoint(NamedTuple):
    """Where a run resumes: RL steps done, and the bytes that each of its logs had then."""

    step: int
    log_sizes: dict[str, int]


RUN_START = ResumePoint(0, dict.fromkeys(LOGS, 0))


class Seal(NamedTuple):
    """What a checkpoint consists of: its arrays, name to type and shape, and its files, name to size and SHA-256."""

    step: int
    logs: dict[str, int]
    arrays: dict[str, str]  # empty in a checkpoint of an older version
    files: dict[str, tuple[int, str]]


class Damaged(Exception):
    """What is wrong with a checkpoint."""


class Checkpoints:
    """Checkpoints by RL step in `folder`: the newest `keep`, and the `keep_best` of those with the highest scores.

    Batches, keys and schedules are functions of the step, so the train state and the step are all there is to save.
    A checkpoint takes its number as its name once everything in it is written, its seal last, and only then are older
    ones removed: a process killed at any moment leaves it whole or unnamed. `scores` reads from the workdir how good
    the evaluated checkpoints are, by step.

    Of several processes each saves its part of the arrays; the first does everything else.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_best: int = 0,
        scores: Callable[[Path], Mapping[int, float]] = held_out_rewards,
    ) -> None:
        self._folder, self._keep, self._keep_best, self._scores = folder.resolve(), keep, keep_best, scores
        self._saver = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._first_process = jax.process_index() == 0
        self._damaged: set[int] = set()
        self._last_step: int | None = None  # of the state last saved or restored
        self._thread: threading.Thread | None = None
        self._failure: Fault | None = None

    def steps(self) -> list[int]:
        """The steps of the checkpoints that exist and are not known to be damaged, in order."""
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted({int(name) for name in names if name.isdecimal()} - self._damaged)

    def find_resume_point(self) -> ResumePoint:
        """The newest whole checkpoint, RUN_START where the run has none; prints which damaged ones it passes over.

        InputError where all are damaged: to begin again would silently discard what the run wrote.
        """
        point, damages = None, []
        if self._first_process:
            for pattern in ("*.unfinished*", "*.old"):  # left by a process that was killed
                for leftover in self._folder.glob(pattern):
                    shutil.rmtree(leftover)
            for step in reversed(self.steps()):
                try:
                    point = self._verify(step, logs_too=True)
                    break
                except Damaged as damage:
                    print(f"checkpoint of step {step} is damaged and passed over: {damage}", file=sys.stderr)
                    self._damaged.add(step)
                    damages.append(str(damage))
            if point is None and not damages:
                point = RUN_START
        step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if point is None else point.step)))
        if step < 0:
            raise InputError(
                f"{self._folder}: expected a whole checkpoint, got only damaged ones: {''.join(damages[:1])}; "
                "without the folder the run begins again"
            )
        return point or ResumePoint(step, {})

    def select(self, steps_done: int | None) -> int:
        """The step of the newest checkpoint, or `steps_done`; InputError where it is missing or damaged."""
        steps = self.steps()
        if not steps or (steps_done is not None and steps_done not in steps):
            wanted = "a checkpoint" if steps_done is None else f"a checkpoint of step {steps_done}"
            raise InputError(f"{self._folder}: expected {wanted}, got {steps or 'none'}")
        step = steps[-1] if steps_done is None else steps_done
        try:
            return self._verify(step, logs_too=False).step
        except Damaged as damage:
            raise self._unusable(step, damage) from None

    def save(self, steps_done: int, state: Any) -> None:
        """Copies the state off the devices and writes it while the run goes on; Fault where the last save failed."""
        self.wait()
        if steps_done == self._last_step:  # not read from the folder: all processes must decide the same
            return
        logs = {name: synced_size(self._folder.parent / name) for name in LOGS} if self._first_process else {}
        unfinished, arrays = self._folder / f"{steps_done}.unfinished", named_arrays(state)
        types = {name: describe(array) for name, array in arrays.items()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._saver.save(unfinished, args=ocp.args.StandardSave(arrays), force=True)
        except (OSError, ValueError) as error:
            raise self._fault(steps_done, error) from None
        self._last_step = steps_done
        arguments = unfinished, ResumePoint(steps_done, logs), types
        self._thread = threading.Thread(target=self._finish, args=arguments, name="checkpoint")
        self._thread.start()

    def _finish(self, unfinished: Path, point: ResumePoint, types: dict[str, str]) -> None:
        try:
            self._saver.wait_until_finished()
            if self._first_process:
                write_seal(unfinished, point, types)
                final = self._folder / str(point.step)
                shutil.rmtree(final, ignore_errors=True)  # a damaged one, reported when the run began
                os.replace(unfinished, final)
                self._damaged.discard(point.step)
                self._remove_old()
        except Exception as error:  # noqa: BLE001 (raised again as a Fault in the thread that trains)
            self._failure = self._fault(point.step, error)

    def _remove_old(self) -> None:
        steps, scores = self.steps(), self._scores(self._folder.parent) if self._keep_best else {}
        ranked = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))
        for step in set(steps[: -self._keep]) - set(ranked[-self._keep_best :]):
            old = self._folder / f"{step}.old"  # a checkpoint that is half removed must not look like a damaged one
            os.replace(self._folder / str(step), old)
            shutil.rmtree(old)

    def raise_failure(self) -> None:
        """Raises the Fault that ended the last save, if one did."""
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Returns once the last save is on disk; raises its Fault if it failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def _fault(self, step: int, error: BaseException) -> Fault:
        text = " ".join(str(error).split())
        reasons = (reason for reason in ("No space left on device", "File too large") if reason in text)
        steps = self.steps()
        outlook = (
            f"the checkpoint of step {steps[-1]} is whole, and the same command resumes from it"
            if steps
            else "there is no checkpoint yet, and the same command begins again"
        )
        return Fault(
            f"{self._folder}: could not write the checkpoint of step {step}: {next(reasons, text[:300])}; {outlook}"
        )

    def _unusable(self, step: int, damage: Damaged) -> InputError:
        return InputError(f"{self._folder / str(step)}: expected a whole checkpoint, got a damaged one: {damage}")

    def _verify(self, step: int, *, logs_too: bool) -> ResumePoint:
        """What the seal says, once every file is as it says; Damaged where one is not."""
        folder = self._folder / str(step)
        seal = read_seal(folder)
        for name, (size, digest) in seal.files.items():
            path = folder / name
            if not path.is_file():
                raise Damaged(f"{name} is missing")
            if path.stat().st_size != size:
                raise Damaged(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
            if digest_file(path) != digest:
                raise Damaged(f"{name} does not have the bytes that were written")
        for name, size in seal.logs.items() if logs_too else ():
            actual = synced_size(self._folder.parent / name)
            if actual < size:
                raise Damaged(
                    f"{name} beside it has {actual:,} bytes instead of at least {size:,}: "
                    "lines of its steps are missing"
                )
        return ResumePoint(seal.step, seal.logs)

    def restore(self, steps_done: int, like: State) -> State:
        """The state after `steps_done` RL steps, placed like `like`, whose own values are not used.

        InputError names the first array that differs in name, type or shape.
        """
        folder, arrays = self._folder / str(steps_done), named_arrays(like)
        try:
            check_arrays(folder, read_seal(folder).arrays, {name: describe(array) for name, array in arrays.items()})
        except Damaged as damage:
            raise self._unusable(steps_done, damage) from None
        targets = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in arrays.items()
        }
        restored = self._saver.restore(folder, args=ocp.args.StandardRestore(targets))
        self._last_step = steps_done
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in arrays])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Fault:
            if kind is None:  # else one line was printed already
                raise
        finally:
            self._saver.close()


# ---- arrays by name --------------------------------------------------------------------------------------------------


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their key paths, such as master.blocks.q_dnh, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf  # .value: a flax variable's
        for path, leaf in leaves
    }
    assert len(arrays) == len(leaves), "two arrays of a tree have the same name"
    return arrays


def describe(array: Any) -> str:
    """Type and shape, as in float32[2,64]."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def check_arrays(folder: Path, saved: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """InputError where a checkpoint does not hold exactly the expected arrays, all of their types and shapes."""
    if not saved:
        raise InputError(
            f"{folder}: expected a checkpoint whose arrays have names, got one of an older version, which numbered "
            "them; finish or export that run with the version that wrote it, or choose another --workdir"
        )
    differing = [name for name in {**expected, **saved} if saved.get(name) != expected.get(name)]
    if differing:
        name, more = differing[0], f"; {len(differing) - 1} more arrays differ" if len(differing) > 1 else ""
        raise InputError(
            f"{folder}: {name}: expected {expected.get(name, 'no such array')}, got {saved.get(name, 'none')}{more}"
        )


# ---- the seal --------------------------------------------------------------------------------------------------------


def synced_size(path: Path) -> int:
    """Bytes of a file, all of them forced to the disk; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_seal(folder: Path, point: ResumePoint, arrays: Mapping[str, str]) -> None:
    """Two lines: the Seal of the files in the folder, and the digest of that line."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, digest_file(path)) for path in paths}
    line = json.dumps(Seal(point.step, point.log_sizes, dict(arrays), files)._asdict())
    with (folder / SEAL).open("w", encoding="utf-8") as file:
        file.write(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())


def read_seal(folder: Path) -> Seal:
    try:
        line, digest = (folder / SEAL).read_bytes().splitlines()
    except FileNotFoundError:
        raise Damaged(f"{SEAL} is missing") from None
    except ValueError:
        raise Damaged(f"{SEAL} does not have its two lines") from None
    if hashlib.sha256(line).hexdigest().encode() != digest:
        raise Damaged(f"{SEAL} does not have the bytes that were written")
    return Seal(**{"arrays": {}} | json.loads(line))
