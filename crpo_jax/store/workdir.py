"""The folder of a run: its config, the digests of its inputs, and the lock that keeps a second run out."""

import contextlib
import fcntl
import fnmatch
import itertools
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from crpo_jax import config
from crpo_jax.config import Config
from crpo_jax.disk import local_path, make_folder, replace_file
from crpo_jax.errors import InputError
from crpo_jax.store.files import read_object, writing

RUN_LENGTH = ("crpo.steps", "crpo.epochs")
MAY_CHANGE = (
    # how it is computed
    "parallel.*",
    "rollout.slots",
    "rollout.chunk",
    "reward.workers",
    "reward.time_limit",
    "run.compile_cache",
    # which questions it takes, of which inputs.json has a digest
    "data.part",
    "data.max_dropped_share",
    # when it saves, evaluates and warns
    "*.save_every",
    "run.eval_every",
    "run.keep",
    "run.keep_best",
    "run.limits.*",
    # which replies are requested, from where, and what is done with them
    *(f"distill.{name}" for name in ("base_url", "key_variable", "concurrency", "timeout", "retries")),
    *(f"distill.{name}" for name in ("max_reply_bytes", "attempts", "questions", "convert")),
    "judge.*",
    *(f"reward.judge.{name}" for name in ("base_url", "key_variable", "concurrency", "timeout", "time_limit")),
    *(f"reward.judge.{name}" for name in ("retries", "max_reply_bytes")),
    # how much is evaluated
    "evaluate.answer",
    "evaluate.k",
    "evaluate.measures",
    "evaluate.subjects",
    "evaluate.samples",
)
"""Patterns of the settings that a resumed run may change, for they do not affect what it computes up to a step.

So may RUN_LENGTH, unless the learning rate depends on the number of steps.
"""

WAYS_OUT = "Choose another --workdir, or continue in this one with --allow-changes"

FOLDERS = ("checkpoints", "coldstart", "judge", "questions", "report", "responses", "sft", "skipped", "tb")
FILES = (".lock", "config.yaml", "inputs.json", "metrics.jsonl", "samples.jsonl", "summary.json", "traced.json")
"""What commands write into a workdir: one of the other kind under such a name is refused before any work is done."""

FRESH = {".lock", "config.yaml.new"}
"""What is in a folder whose first run was killed before it had written its config."""


def open_workdir(
    workdir: Path, settings: Config, *, writer: bool = True, allow_changes: bool = False
) -> contextlib.ExitStack:
    """Creates the folder, or checks that the run in it has the same config; config.yaml holds the resolved config.

    No other run can open the folder until the result is closed or the process ends, however it ends. `allow_changes`
    accepts another config: each difference is printed, and the old file becomes config.1.yaml, config.2.yaml and so on.

    Of several processes only the `writer` does any of this (`runtime.run.shared_workdir`).
    """
    lock = contextlib.ExitStack()
    if not writer:
        return lock
    local_path("--workdir", workdir)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir}: expected a folder, got a file")
    with writing(f"--workdir {workdir}", InputError, hint=""):
        names = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
        if names - FRESH and "config.yaml" not in names:
            raise InputError(
                f"--workdir {workdir}: expected a new folder or one with a run's config.yaml, "
                "got a folder with other files"
            )
        check_kinds(workdir)
        lock.enter_context(lock_workdir(workdir))
        try:
            write_config(workdir, settings, allow_changes=allow_changes)
        except BaseException:
            lock.close()
            raise
    return lock


def check_kinds(workdir: Path) -> None:
    """InputError where a file stands in the place of a folder, or the reverse."""
    for name in (*FOLDERS, *FILES):
        path, kind, other = workdir / name, *(("folder", "file") if name in FOLDERS else ("file", "folder"))
        if path.exists() and path.is_dir() != (kind == "folder"):
            raise InputError(f"{path}: expected a {kind}, got a {other}; move it away, or choose another --workdir")


def has_folder(workdir: Path, name: str) -> bool:
    """Whether a run has left this folder; InputError where something else stands in its place."""
    check_kinds(workdir)
    return (workdir / name).is_dir()


def write_config(workdir: Path, settings: Config, *, allow_changes: bool) -> None:
    """Writes config.yaml; where one differs in what may not change, keeps a copy of it, or refuses."""
    path = workdir / "config.yaml"
    if os.path.lexists(path) and (changed := refused_changes(path, settings)):
        if not allow_changes:
            raise InputError(f"--workdir {workdir}: expected the config of the run it holds, got {changed}. {WAYS_OUT}")
        copies = (workdir / f"config.{number}.yaml" for number in itertools.count(1))
        copy = next(copy for copy in copies if not copy.exists())
        replace_file(copy, path.read_bytes() if path.exists() else b"")
        print(f"--allow-changes: {changed}; the previous config is in {copy.name}", file=sys.stderr)
    replace_file(path, config.dump_config(settings))


def last_key(text: bytes) -> bytes:
    """The key in the last whole line of a YAML mapping."""
    return text.rpartition(b"\n")[0].rpartition(b"\n")[2].partition(b":")[0]


def refused_changes(path: Path, settings: Config) -> str:
    """`key: old -> new` of the settings that differ from those in the file and may not, or what is wrong with it."""
    try:
        text = path.read_bytes()
        if not text.strip():
            return f"an empty {path.name}"
        before = config.load_config(path, model=False)  # it was checked when it was written
        if last_key(text) != last_key(config.dump_config(before).encode()):
            return f"a damaged {path.name}: it is cut off"
    except (InputError, OSError) as damage:
        return f"a damaged {path.name}: {str(damage).removeprefix('--config ')}"
    rate = before.optimizer
    any_length = rate.schedule == "constant" and (rate.warmup_steps or not rate.warmup_ratio)
    patterns = (*MAY_CHANGE, *RUN_LENGTH) if any_length else MAY_CHANGE
    return "; ".join(
        change
        for change in config.changed_settings(before, settings)
        if not any(fnmatch.fnmatchcase(change.partition(":")[0], pattern) for pattern in patterns)
    )


def check_inputs(
    workdir: Path, digests: Mapping[str, str], *, writer: bool = True, allow_changes: bool = False
) -> None:
    """Refuses a run whose questions, tokenizer or start model differ from those it began with.

    inputs.json holds their digests.
    """
    path = workdir / "inputs.json"
    try:
        before = read_inputs(workdir) or digests
    except InputError as damage:
        if not allow_changes:
            raise
        print(f"--allow-changes: {damage}", file=sys.stderr)
        before = digests
    changed = " and ".join(f"other {name}" for name, digest in digests.items() if before.get(name) != digest)
    if changed and not allow_changes:
        raise InputError(
            f"--workdir {workdir}: expected the inputs that the run in it began with, got {changed}. {WAYS_OUT}"
        )
    if changed and writer:
        print(f"--allow-changes: {changed} than the run began with", file=sys.stderr)
    if writer:
        with writing(f"--workdir {workdir}", InputError, hint=""):
            replace_file(path, json.dumps(dict(digests), indent=2) + "\n")


def read_inputs(workdir: Path) -> Mapping[str, str]:
    """The digests of the inputs that the run in a workdir began with; empty where it has none yet."""
    path = workdir / "inputs.json"
    way_out = "continue with --allow-changes where the inputs are the same, or choose another --workdir"
    return read_object(path, "the digests of the run's inputs", way_out) if path.exists() else {}


def write_traced(workdir: Path, questions: Sequence[str]) -> None:
    """Records the ids of the questions whose traces a cold start takes, for runs that begin with its model."""
    with writing(f"--workdir {workdir}", InputError, hint=""):
        replace_file(workdir / "traced.json", json.dumps({"questions": list(questions)}) + "\n")


def read_traced(workdir: Path) -> frozenset[str] | None:
    """The ids that `write_traced` recorded; None where no cold start has."""
    path = workdir / "traced.json"
    if not path.exists():
        return None
    way_out = "say data.part=first_half, second_half or all"
    ids = read_object(path, "the ids of a cold start's questions", way_out).get("questions")
    if not isinstance(ids, list):
        raise InputError(f"{path}: questions: expected a list of ids, got {ids!r}; {way_out}")
    return frozenset(map(str, ids))


def lock_workdir(workdir: Path) -> BinaryIO:
    """Takes the folder for this process until the file is closed; InputError names the process that has it."""
    make_folder(workdir, parents=True)
    file = (workdir / ".lock").open("a+b")
    try:
        fcntl.flock(
            file, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # the kernel releases it when the process ends, however it ends
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        raise InputError(
            f"--workdir {workdir}: expected a folder that no other run is using, got one that {owner} has open"
        ) from None
    except OSError as error:
        print(
            f"--workdir {workdir}: this file system has no locks ({error.strerror}): nothing keeps a second run out",
            file=sys.stderr,
        )
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file
