"""A scoring process as the run sees it: started, spoken to under a deadline, and ended with everything it started."""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crpo_jax.reward.functions import Failure
from crpo_jax.reward.worker import HEADER, SOCKET_CLOSED, ScoringJob, Value, WorkerSetup

START_LIMIT = 300.0  # seconds for a worker to import a user's module, which may be a large library
MARK = "CRPO_JAX_SCORING_PROCESS"
"""The environment variable by which whatever a worker started is recognized: not every child stays in its group."""


class Overrun(Exception):
    """A worker did not answer in time; the text is its stack."""


class WorkerProcess:
    """A worker process, the socket to it, and the pipe that closes when this process dies, which ends the worker."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.socket, theirs = socket.socketpair()
        alive, self.lifeline = os.pipe()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `end`)
        self.mark = uuid.uuid4().hex
        fds = (theirs.fileno(), alive, self.stacks.fileno())
        root = str(Path(__file__).parents[2])
        code = "import sys; from crpo_jax.reward.worker import main; main(*map(int, sys.argv[1:]))"
        environment = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            MARK: self.mark,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a user's function prints must not mix with a command's output
            process_group=0,  # killed with all processes it started; Ctrl-C reaches only the parent, which handles it
            env=environment,
        )
        theirs.close()
        os.close(alive)
        self.ready, self.ended, self.ending = False, False, threading.Lock()
        self.setup = setup

    def wait_until_ready(self) -> dict[str, str]:
        """The functions that could not be loaded, with what is wrong with each.

        Starting and importing count against START_LIMIT, not against any response's time. Overrun, EOFError and OSError
        as for `score`.
        """
        if self.ready:
            return {}
        deadline = time.monotonic() + START_LIMIT
        self.send(self.setup, deadline)
        problems = self.receive(deadline)
        self.ready = True
        return problems

    def score(self, job: ScoringJob, limit: float) -> Sequence[Value | Failure] | Failure:
        """The values of a job; Overrun after `limit` seconds, EOFError or OSError where the process died."""
        deadline = time.monotonic() + limit
        self.send(job, deadline)
        return self.receive(deadline)

    def send(self, message: Any, deadline: float) -> None:
        self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            self.socket.sendall(pickle.dumps(message))
        except TimeoutError:  # the process reads nothing, as one that was stopped
            raise Overrun(self.stack()) from None

    def receive(self, deadline: float) -> Any:
        """The next message. That the process died is seen even where a child of its own holds the socket open."""
        message, size = bytearray(), HEADER.size
        while len(message) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Overrun(self.stack())
            self.socket.settimeout(min(left, 0.1))
            try:
                data = self.socket.recv(min(size - len(message), 2**20))
            except TimeoutError:
                if self.process.poll() is None:
                    continue
                data = b""
            if not data:
                raise EOFError
            message += data
            if len(message) == HEADER.size == size:
                size += HEADER.unpack(message)[0]
        return pickle.loads(message[HEADER.size :])  # noqa: S301 (a process of our own)

    def stack(self) -> str:
        """The process's stack, which it writes on a signal even where its code never releases the interpreter."""
        self.process.send_signal(signal.SIGUSR1)
        for _ in range(50):
            time.sleep(0.01)
            self.stacks.seek(0)
            if text := self.stacks.read().decode(errors="replace"):
                return text
        return ""

    def end(self) -> None:
        """Kill the process and all it started, and wait for its end; may be called more than once."""
        with self.ending:
            if self.ended:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            kill_marked(self.mark)
            self.socket.close()
            self.stacks.close()
            os.close(self.lifeline)
            self.ended = True

    def fate(self) -> str:
        """How a process that no longer answers has ended."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            code = SOCKET_CLOSED
        if code == SOCKET_CLOSED:
            return "it closed its connection to the run"
        return f"exit code {code}" if code >= 0 else f"killed by signal {-code} ({signal.Signals(-code).name})"


def kill_marked(mark: str) -> None:
    """Kill every process whose environment has the mark, those that they start meanwhile too; on Linux alone."""
    entry = f"{MARK}={mark}".encode()
    for _ in range(10):
        marked = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if holds(path, entry)]
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not marked:
            return


def holds(path: Path, entry: bytes) -> bool:
    try:
        return entry in path.read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return False
