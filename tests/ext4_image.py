"""Ext4 file systems in files: made, mounted over a loop device, copied as they are at one moment."""

import contextlib
import filecmp
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

MEGABYTES = 96
TOOLS = ("mkfs.ext4", "fsck.ext4", "mount", "umount", "cp")


def missing_means() -> str:
    """What this machine lacks to mount images, "" where nothing."""
    if os.geteuid():
        return "not root"
    if not os.path.exists("/dev/loop-control"):
        return "no loop devices"
    return ", ".join(f"no {tool}" for tool in TOOLS if not shutil.which(tool))


def command(*words: str | Path, codes: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in codes, f"{words}: {done.stdout}{done.stderr}"


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    command("mount", "-o", "loop,commit=1,noauto_da_alloc", image, folder)
    try:
        yield folder
    finally:
        command("umount", folder)


def make_image(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MEGABYTES << 20)
    command("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", path)


def copy_image(image: Path, copy: Path, process: int) -> None:
    """Copies an image as it was at one moment: the process that writes to it is halted, not the kernel, so the copy is
    taken again until two in a row are equal."""
    os.kill(process, signal.SIGSTOP)
    again = copy.with_suffix(".again")
    command("cp", "--sparse=always", image, copy)
    while True:
        command("cp", "--sparse=always", image, again)
        if filecmp.cmp(copy, again, shallow=False):
            break
        again.replace(copy)
    again.unlink()
    os.kill(process, signal.SIGCONT)
