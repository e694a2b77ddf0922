"""What the processes of one run must have in common, as facts: a text for each key. A process that differs computes
other numbers, or waits in another collective, and nothing else says so."""

import functools
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import jax

from crpo_jax.disk import file_digest

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "datasets", "grain", "numpy"),
    *("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)
JAX_OPTIONS = (
    *("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision"),
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
)
COMPILER_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
LOCAL_FLAGS = ("--xla_dump_", "--xla_gpu_dump_")
"""Prefixes of the compiler's flags that may differ: where each process writes for its own debugging."""


def difference(facts: Sequence[Mapping[str, str]]) -> str | None:
    """One line on what differs between the processes, whose facts are given in order of process id; None if nothing
    does."""
    keys = dict.fromkeys(key for of_process in facts for key in of_process)
    differing = [key for key in keys if len({of_process.get(key) for of_process in facts}) > 1]
    if not differing:
        return None
    processes: dict[str, list[int]] = {}
    for process, of_process in enumerate(facts):
        processes.setdefault(of_process.get(differing[0], "nothing"), []).append(process)
    got = " and ".join(f"{value} in {process_names(numbers)}" for value, numbers in processes.items())
    others = f"; also different: {', '.join(differing[1:4])}" if len(differing) > 1 else ""
    others += f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    return f"{differing[0]}: expected the same in every process, got {got}{others}"


def process_names(numbers: Sequence[int]) -> str:
    """ "process 3", or "processes 1, 2 and 5"; of many the first few."""
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    shown = [*map(str, numbers[:8]), *([f"{len(numbers) - 8} more"] if len(numbers) > 8 else [])]
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"


def installation() -> dict[str, str]:
    """Versions, this package's code file by file, and what changes compiled programs from outside."""
    facts = {"Python": platform.python_version()}
    facts |= {f"version of {package}": installed_version(package) for package in PACKAGES}
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        facts[path.relative_to(package.parent).as_posix()] = short_digest(path)
    facts |= {option: repr(getattr(jax.config, option)) for option in JAX_OPTIONS}
    for variable in COMPILER_FLAGS:
        for flag in os.environ.get(variable, "").split():
            if not flag.startswith(LOCAL_FLAGS):
                name, _, value = flag.partition("=")
                facts[f"{variable} {name}"] = repr(value)
    return facts


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cached_digest(path: Path) -> str:
    """The SHA-256 of a file, read once however often it is asked for while the file stays the same."""
    state = path.stat()
    return digest_of_state(path, state.st_size, state.st_mtime_ns)


@functools.cache
def digest_of_state(path: Path, size: int, modified: int) -> str:
    return file_digest(path)


def short_digest(path: Path) -> str:
    return f"SHA-256 {cached_digest(path)[:12]}"
