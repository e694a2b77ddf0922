"""Mini-batches whose update was skipped, since it was not finite: in `skipped/` of the workdir, for `--replay`."""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crpo_jax.disk import make_folder, replace_file
from crpo_jax.errors import InputError
from crpo_jax.store.files import writing


def skipped_path(workdir: Path, step: int, mini: int) -> Path:
    """The file of mini-batch `mini` of RL step `step`."""
    return workdir / "skipped" / f"step_{step:06d}_mini_{mini:03d}.npz"


def skipped_paths(workdir: Path, step: int) -> list[Path]:
    """The files of a step that exist, in the order of their mini-batches."""
    return sorted((workdir / "skipped").glob(f"step_{step:06d}_mini_*.npz"))


def skipped_steps(workdir: Path) -> list[int]:
    """The steps of which there are files, in order."""
    return sorted({int(path.stem.split("_")[1]) for path in (workdir / "skipped").glob("step_*_mini_*.npz")})


def save_batches(path: Path, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Writes the micro-batches of a mini-batch, every array under the name `micro/array`."""
    arrays: dict[str, Any] = {
        f"{micro}/{name}": array for micro, batch in enumerate(batches) for name, array in batch.items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with writing(path):
        make_folder(path.parent)
        replace_file(path, buffer.getvalue())


def load_batches(path: Path) -> list[dict[str, np.ndarray]]:
    """The micro-batches that `save_batches` wrote; a pickle is refused."""
    batches: dict[int, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                micro, name = key.split("/")
                batches.setdefault(int(micro), {})[name] = arrays[key]
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: expected a mini-batch that a run saved, got: {reason}") from None
    return [batches[micro] for micro in sorted(batches)]
