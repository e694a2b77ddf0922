"""Files and folders that are on the disk before they count: after a power cut each is whole, or as it was before.

A rename alone does not do that: the file system may write the new name before the content, or neither. So the content
is synced before the rename, and the folder that holds the name after it.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from crpo_jax.errors import InputError


def local_path(flag: str, path: str | Path) -> Path:
    """The path with ~ expanded; InputError where it is a URL, which would become a local folder named after it."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise InputError(
            f"{flag} {path}: expected a folder or file on a mounted disk, got a URL; buckets are not supported: "
            "mount the bucket, or copy to it afterwards"
        )
    return Path(os.path.expanduser(path))


def file_digest(path: Path) -> str:
    """The SHA-256 of what the file holds now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- syncing ---------------------------------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Forces the file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Forces the names in the folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that write names at once
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Forces every file and folder below to the disk, and the folder itself."""
    walked = list(os.walk(folder))
    files = [Path(parent, name) for parent, _, names in walked for name in names]
    with ThreadPoolExecutor(16) as threads:  # the file system then writes its journal once for several of them
        list(threads.map(sync_file, files))
        list(threads.map(sync_folder, [Path(parent) for parent, _, _ in walked]))


# ---- making and replacing --------------------------------------------------------------------------------------------


def make_folder(folder: Path, *, parents: bool = False) -> None:
    """Makes a folder that is not there, on demand with its parents, and forces each name to the disk.

    Without parents nothing is made where the folder around it was moved away.
    """
    if not folder.is_dir():
        if parents and not folder.parent.exists():
            make_folder(folder.parent, parents=True)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a whole file at once: readers see the old content or the new one, and an OSError leaves the old one."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("wb") as file, removed_on_error(temporary):
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
    sync_folder(path.parent)


def replace_folder(finished: Path, folder: Path) -> None:
    """Gives a finished folder its name, once everything in it is on the disk (free, or that of an empty folder)."""
    sync_tree(finished)
    os.replace(finished, folder)
    sync_folder(folder.parent)


@contextlib.contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name at the end, or is removed if writing fails."""
    temporary = folder.with_name(f".{folder.name}.unfinished")
    try:
        remove(temporary)  # left by a process that was killed
        make_folder(temporary, parents=True)
        with removed_on_error(temporary):
            yield temporary
            replace_folder(temporary, folder)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Removes an unfinished file or folder where the body raises."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the body's error says what is wrong
            remove(path)
        raise


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
