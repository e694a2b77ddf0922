"""Checkpoints of a run in its workdir, by orbax: in the background, whole or not at all, and checked before they are used."""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from crpo_jax.errors import Fault, InputError
from crpo_jax.store.logs import LOGS, evaluated
from crpo_jax.update.trainer import TrainState

SEAL = "seal.json"


class Saved(NamedTuple):
    """RL steps done at a checkpoint, and the bytes of each log of the run at that moment."""

    step: int
    logs: dict[str, int]


START = Saved(0, dict.fromkeys(LOGS, 0))


class Damaged(Exception):
    """What is wrong with a checkpoint."""


class Checkpoints:
    """Checkpoints by RL step in `folder`: the newest `keep`, and the `best` of those that were evaluated.

    Batches, keys and schedules are functions of the step, so the train state and the step are all there is to keep. A
    checkpoint takes its number as its name when everything in it is written, its seal last: digest and size of every
    file, and how long the run's logs beside `folder` were. A process killed at any moment leaves it whole or unnamed.
    `scores` of the workdir say how good the evaluated ones are, by step, higher being better.
    """

    def __init__(
        self, folder: Path, keep: int, best: int = 0, scores: Callable[[Path], Mapping[int, float]] = evaluated
    ) -> None:
        self._folder, self._keep, self._best, self._scores = folder.resolve(), keep, best, scores
        self._saver = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._writes = jax.process_index() == 0
        self._damaged: set[int] = set()
        self._there: int | None = None  # the step of the state last saved or restored
        self._writer: threading.Thread | None = None
        self._failed: BaseException | None = None

    def steps(self) -> list[int]:
        """The steps whose checkpoints are there and not known to be damaged, in order."""
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted({int(name) for name in names if name.isdecimal()} - self._damaged)

    def newest(self) -> Saved:
        """The newest whole checkpoint, START where the run has none; says which damaged ones it passed over.

        InputError where all are damaged: the run would begin again, and what it wrote would be lost without a word.
        """
        found, why = None, ""
        if self._writes:
            for left in (
                *self._folder.glob("*.unfinished*"),
                *self._folder.glob("*.old"),
            ):  # of a process that was killed
                shutil.rmtree(left)
            for step in reversed(self.steps()):
                try:
                    found = self._checked(step, with_logs=True)
                    break
                except Damaged as damage:
                    why = why or str(damage)
                    print(f"checkpoint of step {step} is damaged and passed over: {damage}", file=sys.stderr)
                    self._damaged.add(step)
        else:
            found = START
        found = START if found is None and not why else found
        step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found.step)))
        if step < 0:
            raise InputError(
                f"{self._folder}: expected a whole checkpoint, got only damaged ones: {why}; without the folder the run begins again"
            )
        return found if self._writes and found else Saved(step, {})

    def chosen(self, steps_done: int | None) -> int:
        """The checkpoint asked for, or the newest one; whole."""
        kept = self.steps()
        if not kept or (steps_done is not None and steps_done not in kept):
            raise InputError(
                f"{self._folder}: expected a checkpoint{'' if steps_done is None else f' of step {steps_done}'}, got {kept or 'none'}"
            )
        step = max(kept) if steps_done is None else steps_done
        try:
            return self._checked(step, with_logs=False).step
        except Damaged as damage:
            raise InputError(
                f"{self._folder / str(step)}: expected a whole checkpoint, got a damaged one: {damage}"
            ) from None

    def save(self, steps_done: int, state: TrainState) -> None:
        """Copies the state off the devices and writes it while the run goes on; Fault where the one before could not be written."""
        self.wait()
        if (
            steps_done == self._there
        ):  # not a look at the folder: every process must decide the same, and only one names what it wrote
            return
        logs = {name: length(self._folder.parent / name) for name in LOGS} if self._writes else {}
        written = self._folder / f"{steps_done}.unfinished"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._saver.save(written, args=ocp.args.StandardSave(as_tree(state)), force=True)
        except (OSError, ValueError) as error:
            raise self._fault(steps_done, error) from None
        self._there = steps_done
        self._writer = threading.Thread(target=self._finish, args=(written, Saved(steps_done, logs)), name="checkpoint")
        self._writer.start()

    def _finish(self, written: Path, saved: Saved) -> None:
        try:
            self._saver.wait_until_finished()
            if self._writes:
                write_seal(written, saved)
                final = self._folder / str(saved.step)
                shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step, reported when the run began
                os.replace(written, final)
                self._damaged.discard(saved.step)
                self._remove_old()
        except Exception as error:  # noqa: BLE001 (raised again as a Fault in the thread that trains)
            self._failed = self._fault(saved.step, error)

    def _remove_old(self) -> None:
        steps = self.steps()
        values = self._scores(self._folder.parent) if self._best else {}
        best = (
            sorted((step for step in steps if step in values), key=lambda step: (values[step], step))[-self._best :]
            if self._best
            else []
        )
        for step in set(steps[: -self._keep]) - set(best):
            gone = self._folder / f"{step}.old"  # a checkpoint that is half removed must not look like a damaged one
            os.replace(self._folder / str(step), gone)
            shutil.rmtree(gone)

    def check(self) -> None:
        """Raises the Fault that ended the writing of the last checkpoint, where there was one."""
        if self._failed:
            failed, self._failed = self._failed, None
            raise failed

    def wait(self) -> None:
        """Returns when the last save is on disk; raises its Fault where it is not."""
        if self._writer:
            self._writer.join()
            self._writer = None
        self.check()

    def _fault(self, step: int, error: BaseException) -> Fault:
        said = " ".join(str(error).split())
        reason = (
            "No space left on device"
            if "No space left" in said
            else "File too large"
            if "File too large" in said
            else said[:300]
        )
        there = self.steps()
        safe = f"the checkpoint of step {there[-1]} is whole" if there else "there is no checkpoint yet"
        return Fault(
            f"{self._folder}: could not write the checkpoint of step {step}: {reason}; {safe}, and the same command goes on from it"
        )

    def _checked(self, step: int, *, with_logs: bool) -> Saved:
        """The checkpoint's seal, once every file is what it says; Damaged where one is not."""
        folder = self._folder / str(step)
        saved, files = read_seal(folder)
        for name, (size, digest) in files.items():
            path = folder / name
            if not path.is_file():
                raise Damaged(f"{name} is missing")
            if path.stat().st_size != size:
                raise Damaged(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
            if digest_of(path) != digest:
                raise Damaged(f"{name} does not have the bytes that were written")
        for name, size in saved.logs.items() if with_logs else ():
            there = length(self._folder.parent / name)
            if there < size:
                raise Damaged(
                    f"{name} beside it has {there:,} bytes instead of at least {size:,}: lines of its steps are missing"
                )
        return saved

    def restore(self, steps_done: int, like: TrainState) -> TrainState:
        """The state after `steps_done` RL steps, placed like `like` (whose memory it does not need any more)."""
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), as_tree(like))
        restored = self._saver.restore(self._folder / str(steps_done), args=ocp.args.StandardRestore(wanted))
        self._there = steps_done
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in sorted(restored, key=int)])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, *_: object
    ) -> None:  # what is still being written is waited for
        try:
            self.wait()
        except Fault:
            if kind is None:  # else one line is said already
                raise
        finally:
            self._saver.close()


def as_tree(state: TrainState) -> dict[str, Any]:
    """The state's leaves by number: a form that does not depend on the classes that hold them."""
    return {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}


def length(path: Path) -> int:
    """Bytes of a file that are on the disk for good; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_seal(folder: Path, saved: Saved) -> None:
    """Two lines: what the checkpoint is made of, and the digest of that line."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, digest_of(path)) for path in paths}
    line = json.dumps({"step": saved.step, "logs": saved.logs, "files": files})
    with (folder / SEAL).open("w", encoding="utf-8") as file:
        file.write(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())


def read_seal(folder: Path) -> tuple[Saved, dict[str, tuple[int, str]]]:
    try:
        line, digest = (folder / SEAL).read_bytes().splitlines()
    except FileNotFoundError:
        raise Damaged(f"{SEAL} is missing") from None
    except ValueError:
        raise Damaged(f"{SEAL} does not have its two lines") from None
    if hashlib.sha256(line).hexdigest().encode() != digest:
        raise Damaged(f"{SEAL} does not have the bytes that were written")
    content = json.loads(line)
    return Saved(content["step"], content["logs"]), content["files"]
