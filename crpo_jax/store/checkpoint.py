"""Checkpoints of a run in its workdir: written by orbax in the background, and verified before they are used."""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from pydantic import TypeAdapter, ValidationError

from crpo_jax.disk import file_digest, make_folder, remove, replace_folder
from crpo_jax.errors import Fault, InputError
from crpo_jax.store.files import writing
from crpo_jax.store.logs import LOGS, sync_logs
from crpo_jax.store.metrics import held_out_rewards, read_metrics

State = TypeVar("State")

SEAL = "seal.json"


WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
"""What a disk answers, to be found in the long messages of the libraries that write."""


class ResumePoint(NamedTuple):
    """Where a run resumes: RL steps done, and the bytes that each of its logs had then."""

    step: int
    log_sizes: dict[str, int]


RUN_START = ResumePoint(0, dict.fromkeys(LOGS, 0))


class Seal(NamedTuple):
    """What a checkpoint consists of: its arrays, name to type and shape, and its files, name to size and SHA-256."""

    step: int
    logs: dict[str, int]
    files: dict[str, tuple[int, str]]
    arrays: dict[str, str] | None = None  # none in a checkpoint of an older version


class Damaged(Exception):
    """What is wrong with a checkpoint."""


def refuse_patterns(workdir: Path) -> None:
    """InputError where orbax would take the folder's path for a pattern: its checkpoints would hold no arrays."""
    if glob.has_magic(path := str(workdir.resolve())):
        raise InputError(
            f"--workdir {workdir}: expected a path without *, ? and [, for in such a folder orbax writes checkpoints "
            f"that cannot be read, got {path}"
        )


class Checkpoints:
    """Checkpoints by RL step in `folder`: the newest `keep`, and the `keep_best` of those with the highest scores.

    Batches, keys and schedules are functions of the step, so the train state and the step are all there is to save.
    A checkpoint takes its number as its name once everything in it is on the disk, and so are the logs up to its step.
    Only when the name is on the disk too are older ones removed: a kill or a power cut at any moment leaves each whole
    or unnamed. `scores` reads from the workdir how good the evaluated checkpoints are, by step.

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
        leave_failed_saves_to_us()
        # Orbax waits 300 seconds for a folder that it could not make in the background.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)
        self._first_process = jax.process_index() == 0
        self._passed_over: set[int] = set()  # damaged, or without the line of its last step
        self._last_step: int | None = None  # of the state last saved or restored
        self._thread: threading.Thread | None = None
        self._failure: Fault | None = None

    def steps(self) -> list[int]:
        """The steps of the checkpoints that exist and were not passed over, in order."""
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return sorted({int(name) for name in names if name.isdecimal()} - self._passed_over)

    def find_resume_point(self) -> ResumePoint:
        """The newest whole checkpoint, RUN_START where the run has none; prints which ones it passes over.

        One without the line of its last step in metrics.jsonl is passed over for an earlier one, from which the run
        writes that line again; where there is none, it is used. InputError where all are damaged: to begin again would
        silently discard what the run wrote.
        """
        point = self._find_resume_point() if self._first_process else None
        step = int(multihost_utils.broadcast_one_to_all(np.int32(0 if point is None else point.step)))
        return point or ResumePoint(step, {})

    def _find_resume_point(self) -> ResumePoint:
        with writing(self._folder, InputError, hint=""):
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                if re.fullmatch(r"\d+\.(unfinished.*|old)", path.name):  # left by a process that was killed
                    remove(path)
        steps, damages, unlogged = self.steps(), list[str](), list[ResumePoint]()
        logged = {row["step"] for row in read_metrics(self._folder.parent)} if steps else set()
        for step in reversed(steps):
            try:
                point = self._verify(step)
            except Damaged as damage:
                print(f"checkpoint of step {step} is damaged and passed over: {damage}", file=sys.stderr)
                self._passed_over.add(step)
                damages.append(str(damage))
                continue
            if step - 1 in logged or not point.log_sizes.get("metrics.jsonl"):
                for later in unlogged:
                    print(
                        f"checkpoint of step {later.step} is passed over: metrics.jsonl has no line of its last step; "
                        f"the run resumes from step {step} and writes it again",
                        file=sys.stderr,
                    )
                    self._passed_over.add(later.step)
                return point
            unlogged.append(point)
        if damages and not unlogged:
            raise InputError(
                f"{self._folder}: expected a whole checkpoint, got only damaged ones: {damages[0]}; "
                "without the folder the run begins again"
            )
        return unlogged[0] if unlogged else RUN_START

    def select(self, steps_done: int | None) -> int:
        """The step of the newest checkpoint, or `steps_done`; InputError where it is missing or damaged."""
        steps = self.steps()
        if not steps or (steps_done is not None and steps_done not in steps):
            wanted = "a checkpoint" if steps_done is None else f"a checkpoint of step {steps_done}"
            raise InputError(f"{self._folder}: expected {wanted}, got {steps or 'none'}")
        step = steps[-1] if steps_done is None else steps_done
        try:
            return self._verify(step).step
        except Damaged as damage:
            raise self._unusable(step, damage) from None

    def save(self, steps_done: int, state: Any) -> None:
        """Copies the state off the devices and writes it while the run goes on; Fault where the last save failed."""
        self.wait()
        if steps_done == self._last_step:  # not read from the folder: all processes must decide the same
            return
        logs = {name: size_of(self._folder.parent / name) for name in LOGS} if self._first_process else {}
        unfinished, arrays = self._folder / f"{steps_done}.unfinished", named_arrays(state)
        types = {name: describe(array) for name, array in arrays.items()}
        try:
            make_folder(self._folder)
            self._saver.save(unfinished, args=ocp.args.StandardSave(arrays), force=True)
        except (OSError, ValueError) as error:
            self._discard(steps_done)
            raise self._fault(steps_done, error) from None
        self._last_step = steps_done
        arguments = unfinished, ResumePoint(steps_done, logs), types
        self._thread = threading.Thread(target=self._finish, args=arguments, name="checkpoint")
        self._thread.start()

    def _finish(self, unfinished: Path, point: ResumePoint, types: dict[str, str]) -> None:
        try:
            self._saver.wait_until_finished()
            if self._first_process:
                sync_logs(self._folder.parent, point.log_sizes)
                write_seal(unfinished, point, types)
                final = self._folder / str(point.step)
                remove(final)  # one that was passed over, reported when the run began
                replace_folder(unfinished, final)
                self._passed_over.discard(point.step)
        except Exception as error:  # noqa: BLE001 (raised again as a Fault in the thread that trains)
            self._failure = self._fault(point.step, error)
            self._discard(point.step)
            return
        try:
            if self._first_process:
                self._remove_old()
        except (OSError, InputError) as error:
            whole = f"{self._folder}: the checkpoint of step {point.step} is whole, but older ones could not be removed"
            self._failure = Fault(f"{whole}: {error}")

    def _discard(self, step: int) -> None:
        """Removes what a failed save left, also the folders that it made anew where the workdir was moved away."""
        if not self._first_process:
            return
        with contextlib.suppress(OSError):
            for path in self._folder.glob(f"{step}.unfinished*"):
                remove(path)
            if not (self._folder.parent / ".lock").exists():
                for folder in (self._folder, self._folder.parent):
                    folder.rmdir()  # only an empty one

    def _remove_old(self) -> None:
        steps, scores = self.steps(), self._scores(self._folder.parent) if self._keep_best else {}
        ranked = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))
        for step in set(steps[: -self._keep]) - set(ranked[-self._keep_best :]):
            old = self._folder / f"{step}.old"  # a checkpoint that is half removed must not look like a damaged one
            os.replace(self._folder / str(step), old)
            remove(old)

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
        reasons = (os.strerror(number) for number in WRITE_ERRORS if os.strerror(number) in text)
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

    def _verify(self, step: int) -> ResumePoint:
        """What the seal says, once every file is as it says; Damaged where one is not."""
        folder = self._folder / str(step)
        seal = read_seal(folder)
        for name, (size, digest) in seal.files.items():
            path = folder / name
            if not path.is_file():
                raise Damaged(f"{name} is missing")
            if path.stat().st_size != size:
                raise Damaged(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
            with unreadable_is_damaged(name):
                if file_digest(path) != digest:
                    raise Damaged(f"{name} does not have the bytes that were written")
        return ResumePoint(seal.step, seal.logs)

    def restore(self, steps_done: int, like: State) -> State:
        """The state after `steps_done` RL steps, placed like `like`, whose own values are not used.

        InputError names the first array that differs in name, type or shape.
        """
        folder, arrays = self._folder / str(steps_done), named_arrays(like)
        try:
            types = {name: describe(array) for name, array in arrays.items()}
            check_arrays(folder, read_seal(folder).arrays or {}, types)
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
            with contextlib.suppress(OSError, ValueError):  # it raises what made the last save fail once more
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


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def write_seal(folder: Path, point: ResumePoint, arrays: Mapping[str, str]) -> None:
    """Two lines: the Seal of the files in the folder, and the digest of that line."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    files = {path.relative_to(folder).as_posix(): (path.stat().st_size, file_digest(path)) for path in paths}
    line = json.dumps(Seal(point.step, point.log_sizes, files, dict(arrays))._asdict())
    (folder / SEAL).write_text(f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n", encoding="utf-8")


def read_seal(folder: Path) -> Seal:
    with unreadable_is_damaged(SEAL):
        lines = (folder / SEAL).read_bytes().splitlines()
    if len(lines) != 2:
        raise Damaged(f"{SEAL} does not have its two lines")
    if hashlib.sha256(lines[0]).hexdigest().encode() != lines[1]:
        raise Damaged(f"{SEAL} does not have the bytes that were written")
    try:
        return TypeAdapter(Seal).validate_json(lines[0])
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{SEAL}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@contextlib.contextmanager
def unreadable_is_damaged(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from None


@functools.cache
def leave_failed_saves_to_us() -> None:
    """Keeps orbax's threads from printing tracebacks of a save that failed, beside the Fault that says it in a line."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    show = sys.unraisablehook

    def hook(error: Any) -> None:
        if str(error.exc_value) != "Event loop is closed":  # writes that end after the first of them failed
            show(error)

    sys.unraisablehook = hook
