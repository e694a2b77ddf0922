"""Compiled programs: kept between runs, and counted within one."""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax


def keep_programs(folder: str) -> None:
    """Compiled programs stay in `folder`, so that the next start need not compile them; "" or a cache named by the environment: no change.

    Each kind of machine has a part of its own: XLA's programs for a CPU are made for its instructions, and a home may be shared.
    """
    if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        flags = next(
            (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))),
            "",
        )
    except OSError:
        flags = ""
    kind = hashlib.sha256(f"{platform.machine()} {platform.processor()} {flags}".encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser() / kind))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


class Compilations:
    """How many programs were compiled, or taken from the cache on disk, since it was last asked: none, once every shape was seen."""

    _seen = 0

    @classmethod
    def _note(cls, event: str, duration_secs: float, **_: Any) -> None:
        cls._seen += event == "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self._told = self._seen

    def new(self) -> int:
        since, self._told = self._seen - self._told, self._seen
        return since


jax.monitoring.register_event_duration_secs_listener(Compilations._note)
