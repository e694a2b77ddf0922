"""Two processes of one run on this machine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Pair:
    """Two processes of four devices each, over loopback."""

    def __init__(self, *command: str, **environment: str) -> None:
        flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
        shared = os.environ | devices | environment | {"PYTHONPATH": path}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command, *flags, str(i)],
                env=shared,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for i in range(2)
        ]

    def wait_until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not ready() and all(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.02)

    def ended(self) -> list[tuple[int, str]]:
        """Waits for both; the exit code and standard error of each."""
        try:
            errors = [process.communicate(timeout=600)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, text) for process, text in zip(self.processes, errors, strict=True)]
