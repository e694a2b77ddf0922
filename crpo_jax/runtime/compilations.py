"""Compiled programs: cached on disk between runs, and counted within one."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from crpo_jax.disk import local_path


def enable_compilation_cache(folder: str) -> None:
    """Caches compiled programs in `folder`; does nothing if it is "" or JAX_COMPILATION_CACHE_DIR is set.

    Each kind of machine has its own subfolder: XLA compiles for the instructions of one CPU, and homes may be shared.
    """
    if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(f"{platform.machine()} {platform.processor()} {flags}".encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(local_path("run.compile_cache", folder) / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class CompilationCounter:
    """Counts programs that are compiled or loaded from the cache on disk: none, once every shape has occurred."""

    _total = 0

    @classmethod
    def _listen(cls, event: str, duration_secs: float, **_: Any) -> None:
        cls._total += event == "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self._counted = self._total

    def count_new(self) -> int:
        """Since the last call."""
        new, self._counted = self._total - self._counted, self._total
        return new


jax.monitoring.register_event_duration_secs_listener(CompilationCounter._listen)
