"""The folder a run lives in: its config, its inputs, the lock that keeps a second run out, and the signals that end a run in good order."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from crpo_jax import config
from crpo_jax.config import Config
from crpo_jax.errors import InputError

ENDPOINT = ("base_url", "key_variable", "concurrency", "timeout", "retries", "max_reply_bytes")
MAY_CHANGE = (
    "crpo.steps",
    "crpo.epochs",
    "parallel.",
    "run.save_every",
    "run.eval_every",
    "run.keep",
    "run.limits.",
    "run.compile_cache",
    "rollout.slots",
    "rollout.chunk",
    "reward.workers",
    "reward.time_limit",
    "sft.save_every",
    *(f"distill.{name}:" for name in (*ENDPOINT, "attempts", "questions", "convert")),
    "judge.",
    "evaluate.answer:",
    "evaluate.subjects:",
    "evaluate.samples:",
)
"""Settings that a resumed run may change: they decide how long or how fast it runs, not what it computes up to a step.

How long it runs does decide that where a learning rate schedule ends at the last step.
"""

ANYWAY = "Take another --workdir, or say --allow-changes to go on with it"


def open_workdir(
    workdir: Path, settings: Config, *, writes: bool = True, changes: bool = False
) -> contextlib.ExitStack:
    """Makes the folder, or checks that the run in it has the same config; keeps the resolved config in config.yaml.

    No other run can take the folder until the result is closed or the process dies, however it dies. With `changes`,
    another config is taken over: each difference is said, and the old file stays as config.1.yaml and so on.

    Of several processes the one that writes does this for all (`start.wait_for_workdir`).
    """
    path = workdir / "config.yaml"
    if not writes:
        return contextlib.ExitStack()
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir}: expected a folder, got a file")
    if not path.exists() and workdir.exists() and any(path.name != ".lock" for path in workdir.iterdir()):
        raise InputError(
            f"--workdir {workdir}: expected a new folder or one with a run's config.yaml, got a folder with other files"
        )
    with contextlib.ExitStack() as held:
        held.enter_context(lock(workdir))
        changed = differences(path, settings) if path.exists() else []
        if changed and not changes:
            raise InputError(
                f"--workdir {workdir}: expected the config of the run it holds, got {'; '.join(changed)}. {ANYWAY}"
            )
        if changed:
            number = next(number for number in itertools.count(1) if not (workdir / f"config.{number}.yaml").exists())
            with writing(workdir):
                shutil.copyfile(path, workdir / f"config.{number}.yaml")
            print(
                f"--allow-changes: {'; '.join(changed)}; the config until now is config.{number}.yaml", file=sys.stderr
            )
        replace(path, config.dump_config(settings))
        return held.pop_all()
    raise AssertionError("an ExitStack lets every exception through")


def differences(path: Path, settings: Config) -> list[str]:
    """The settings that differ from those in the file and are not free to."""
    before = config.load_config(path, model=False)  # it was checked when it was written
    free = (
        MAY_CHANGE
        if before.optimizer.schedule == "constant"
        else tuple(key for key in MAY_CHANGE if not key.startswith("crpo."))
    )
    return [line for line in config.changed_settings(before, settings) if not line.startswith(free)]


def check_inputs(workdir: Path, digests: Mapping[str, str], *, writes: bool = True, changes: bool = False) -> None:
    """Refuses a run whose questions, tokenizer or start model are no longer what its first steps had; inputs.json keeps their digests."""
    path = workdir / "inputs.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else digests
    changed = [name for name, digest in digests.items() if before.get(name) != digest]
    if changed and not changes:
        raise InputError(
            f"--workdir {workdir}: expected the inputs the run in it began with, got other {' and other '.join(changed)}. {ANYWAY}"
        )
    if changed and writes:
        print(f"--allow-changes: other {' and other '.join(changed)} than the run began with", file=sys.stderr)
    if writes:
        replace(path, json.dumps(dict(digests), indent=2) + "\n")


def replace(path: Path, text: str) -> None:
    """The file with this text, whole or as it was."""
    fresh = path.with_name(f"{path.name}.new")
    with writing(path.parent):
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--workdir {workdir}: cannot write: {error.strerror}") from None


def lock(workdir: Path) -> BinaryIO:
    """Takes the workdir for this process, or says which one has it; the kernel lets go of it when the process ends, however."""
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.seek(0)
            other = file.read(200).decode(errors="replace").strip() or "another process"
            file.close()
            raise InputError(
                f"--workdir {workdir}: expected a folder that no other run is using, got one that {other} has open"
            ) from None
        print(
            f"--workdir {workdir}: no locks on this file system ({error.strerror}): nothing keeps a second run out of it",
            file=sys.stderr,
        )
        return file
    with writing(workdir):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
    return file
