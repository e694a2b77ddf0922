"""The processes of one run: how they find each other, what they tell each other, and how they end together.

Every process runs the same program and enters the same compiled calls in the same order. What one of them alone would
decide is decided together here, and whatever ends one of them ends all: a process that waits for a dead one in a
collective would wait for ever.
"""

import argparse
import contextlib
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the key-value store of jax.distributed has no public name
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from crpo_jax.errors import InputError

Item = TypeVar("Item")

JOIN_SECONDS = 300
"""How long the first process waits for the last one to start."""
HEARTBEAT_SECONDS = 60
"""Silence after which a process is taken for dead; most deaths are noticed at once, by a connection that closes."""
SELF_TEST_SECONDS = 120
"""For the first sum over all devices, which takes a few seconds where it works."""

FLAGS = {"coordinator": "JAX_COORDINATOR_ADDRESS", "processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
"""Who is who, where neither TPU nor Slurm says it: flags, each with the variable that stands for it."""
AGAIN = "the same command in every process goes on from the last checkpoint"
ENDED = "crpo_jax/ended"
LOST = re.compile(r"gloo|nccl|connection|socket|unavailable|heartbeat|peer", re.IGNORECASE)
"""What a collective's error says when the process at the other end is gone."""


# --- joining ----------------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that runs in several processes."""
    coordinator, processes, process = (os.environ.get(variable) for variable in FLAGS.values())
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        default=coordinator,
        help="where process 0 listens, the same in every process",
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        default=processes,
        help="how many run this command; TPU slices and Slurm say it",
    )
    parser.add_argument("--process", metavar="I", type=int, default=process, help="which of them this one is, from 0")


def cluster(args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` that the flags, Slurm or a TPU ask for; None for a process on its own."""
    given = {f"--{name}": value for name in FLAGS if (value := getattr(args, name)) is not None}
    if given:
        names = f"--coordinator, --processes and --process (or {', '.join(FLAGS.values())})"
        if len(given) < len(FLAGS):
            raise InputError(f"{names}: expected all three together, got only {' and '.join(given)}")
        if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", args.coordinator):
            raise InputError(f"--coordinator: expected HOST:PORT, got {args.coordinator!r}")
        if not 0 <= args.process < args.processes:
            raise InputError(
                f"--process: expected 0 to {args.processes - 1}, since there are {args.processes} processes, got {args.process}"
            )
        return {
            "coordinator_address": args.coordinator,
            "num_processes": args.processes,
            "process_id": args.process,
            "cluster_detection_method": "deactivate",
        }
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ:  # started by srun
        one_a_node = os.environ["SLURM_NTASKS"] == os.environ.get(
            "SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES")
        )
        devices = range(
            int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
        )  # else JAX gives each task the one device of its number
        return {
            "cluster_detection_method": "slurm",
            **({"local_device_ids": list(devices)} if one_a_node and devices else {}),
        }
    if "TPU_ML_PLATFORM" in os.environ and not os.environ.get("JAX_PLATFORMS", "").startswith(
        "cpu"
    ):  # JAX sets it where it finds TPU chips
        return {}
    return None


@contextlib.contextmanager
def joined(command: str, args: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, where there are any, while the body runs; must be entered before the first array.

    A process on its own only tests that its devices can add up. Among several, an exception that leaves the body ends
    this process with its one line, and the others with the same line and whose it was.
    """
    how = cluster(args)
    if how is None:
        self_test()
        yield
        return
    last_words, name = LastWords(), f"crpo_jax.{command}"
    try:
        last_words.be(
            f"{name}: ended before every process had joined, within {JOIN_SECONDS} seconds: does each of them run, and reach process 0?"
        )
        if connected(how):
            me = f"process {jax.process_index()} of {jax.process_count()}"
            last_words.be(
                f"{name}: {me} was killed, or ended by jax.distributed because it lost another one (then its lines stand above). "
                f"The log of the process that went first says why; {AGAIN}"
            )
            threading.Thread(target=end_with_the_others, args=(name, last_words), daemon=True).start()
        self_test(last_words=last_words)
        yield
        jax.distributed.shutdown()
        last_words.take_back()
    except BaseException as error:  # noqa: BLE001 (an interrupt ends the others too)
        code, line = fate(error)
        end(name, last_words, code, line.removeprefix(f"{name}: "))


def connected(how: dict[str, Any]) -> bool:
    """Whether this process is now one of several."""
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # it takes SIGTERM for itself; ours is noted by run/workdir.py
    try:
        jax.distributed.initialize(
            **how, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError as error:
        if how or "coordinator_address" not in str(error):
            raise
        return False  # a TPU that is no slice
    return jax.process_count() > 1


# --- ending together --------------------------------------------------------------------------------------------------


class LastWords:
    """A line that is printed if this process ends without taking it back, however it ends.

    jax.distributed aborts a process that lost the others from C++, where nothing of Python is asked any more. So a shell
    waits at the other end of a pipe, which the kernel closes.
    """

    SCRIPT = 'while read -r line; do words=$line; done; [ -z "$words" ] || printf "%s\\n" "$words" >&2'

    def __init__(self) -> None:
        self._shell = subprocess.Popen(["sh", "-c", self.SCRIPT], stdin=subprocess.PIPE, start_new_session=True)

    def be(self, words: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # someone ended the shell: the process ends without last words
            self._shell.stdin.write(f"{words}\n".encode())
            self._shell.stdin.flush()

    def take_back(self) -> None:
        self.be("")
        self._shell.communicate()


def fate(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line of what ended the body; the traceback of a defect is printed."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (1 if error.code else 0, str(error.code or ""))
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, JaxRuntimeError) and LOST.search(first):
        return 1, f"another process died or cannot be reached any more; its log says why, {AGAIN} ({first[:200]})"
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {first}"


def say(line: str) -> None:
    """A line of standard error in one piece, whatever other threads write."""
    sys.stderr.write(f"{line}\n")


def end(name: str, last_words: LastWords, code: int, line: str) -> NoReturn:
    """Ends this process, and through its listeners every other one."""
    client: Any = distributed.global_state.client
    if not alone():
        try:
            client.key_value_set(ENDED, f"{code} process {jax.process_index()}: {line.partition(chr(10))[0]}")
        except (
            JaxRuntimeError
        ):  # another one was first, which the listener says before it ends this process; or they are gone
            time.sleep(5)
        say(f"{name}: process {jax.process_index()} of {jax.process_count()}: {line}")
        time.sleep(1 if jax.process_index() == 0 else 0)  # the store ends with process 0: let the others read it
    else:
        say(f"{name}: {line}")
    leave(last_words, code)


def end_with_the_others(name: str, last_words: LastWords) -> None:
    """Waits until another process says that it ends."""
    client: Any = distributed.global_state.client
    while True:
        try:
            code, _, line = client.blocking_key_value_get(ENDED, 3_600_000).partition(" ")
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # this run is over, or the store is gone and jax.distributed ends the process
        if not line.startswith(f"process {jax.process_index()}:"):
            say(f"{name}: process {jax.process_index()} of {jax.process_count()} ends with {line}")
            leave(last_words, int(code))
        return


def leave(last_words: LastWords, code: int) -> NoReturn:
    """Ends the process without the orderly exit, which would wait for the other processes."""
    last_words.take_back()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- the self-test ----------------------------------------------------------------------------------------------------


def self_test(
    sum_over_devices: Callable[[], float] | None = None,
    seconds: float = SELF_TEST_SECONDS,
    last_words: LastWords | None = None,
) -> None:
    """One small sum over all devices; ends the process with what to try where it hangs or is wrong.

    GPUs whose peer-to-peer copies are broken (some boards behind an IOMMU) hang in their first collective, for ever and
    without a word, or add up wrongly.
    """
    count = jax.device_count()
    if count == 1:
        return
    hint = "does every process run, and can they reach each other?"
    if jax.default_backend() == "gpu":
        hosts = " (and between hosts NCCL_SOCKET_IFNAME=INTERFACE)" if jax.process_count() > 1 else ""
        hint = f"peer-to-peer copies between these GPUs may be broken: set NCCL_P2P_DISABLE=1{hosts}; NCCL_DEBUG=INFO says more"

    def hung() -> None:
        say(f"crpo_jax: a sum over all {count} devices did not end within {seconds:g} seconds; {hint}")
        leave(last_words, 1) if last_words else os._exit(1)

    timer = threading.Timer(seconds, hung)
    timer.daemon = True
    timer.start()
    got = (sum_over_devices or summed)()
    timer.cancel()
    if got != count * (count + 1) / 2:
        raise SystemExit(
            f"crpo_jax: a sum over all {count} devices gave {got:g} instead of {count * (count + 1) / 2:g}; {hint}"
        )


def summed() -> float:
    """1 + 2 + ... + n, a number from each of the n devices, as part of a message of a megabyte."""
    mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("device", None), ()))
    values = np.repeat(np.arange(1, jax.device_count() + 1, dtype=np.float32)[:, None], 2**18, axis=1)
    numbers = jax.make_array_from_callback(values.shape, split, lambda index: values[index])
    total = np.asarray(jax.jit(jnp.sum, static_argnames="axis", out_shardings=whole)(numbers, axis=0))
    return float(total[np.argmax(np.abs(total - total[0]))])


# --- telling each other -----------------------------------------------------------------------------------------------


def alone() -> bool:
    """Whether this process is the only one of its run; asks for no device where nothing was joined."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def share(count: int) -> range:
    """Which of `count` things of host work are this process's: contiguous, equal to within one."""
    index, processes = (0, 1) if alone() else (jax.process_index(), jax.process_count())
    return range(count * index // processes, count * (index + 1) // processes)


def wait_for_all(what: str) -> None:
    """Returns when every process is at this place."""
    if not alone():
        multihost_utils.sync_global_devices(what)


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if alone() else bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def gathered(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, in the order of the processes; each of them must call this."""
    if alone():
        return list(items)
    mine = np.frombuffer(pickle.dumps(list(items)), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(mine.size)))
    room = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # a power of two, so that few programs compile
    room[: mine.size] = mine
    rows = np.asarray(multihost_utils.process_allgather(room))
    return [item for row, size in zip(rows, sizes, strict=True) for item in pickle.loads(row[:size].tobytes())]  # noqa: S301 (our own)
