"""The processes of one run: how they find each other, exchange values and end together.

Every process runs the same program and enters the same compiled calls in the same order. So decisions that depend on
local state are made jointly here, and when one process ends, all end: the others would wait forever in a collective.
"""

import argparse
import contextlib
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters  # what jax.distributed detects has no public name
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from crpo_jax.errors import Fault, InputError
from crpo_jax.parallel import agreement
from crpo_jax.parallel.rendezvous import Member, Peers, meet

GatheredItem = TypeVar("GatheredItem")

JOIN_SECONDS = 300  # until the last process has started
HEARTBEAT_SECONDS = 60  # of silence count as death; most deaths are noticed at once, when a connection closes
LOST_PEER_SECONDS = 2  # for the news of which process it is
SELF_TEST_SECONDS = 120  # for the first all-reduce, which normally takes a few seconds

PROCESS_FLAGS = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
"""The flags for clusters other than TPU slices and Slurm, each with the environment variable that may replace it."""
FLAGS_COMPARED_ELSEWHERE = (*PROCESS_FLAGS, "join_timeout", "config", "mesh", "overrides", "workdir")
HOW_TO_RESUME = "the same command in every process resumes from the last checkpoint"
LOST_PEER = re.compile(r"gloo|nccl|connection|socket|unavailable|heartbeat|peer", re.IGNORECASE)
"""Matches the error of a collective whose other end is gone."""


# --- joining ----------------------------------------------------------------------------------------------------------


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    address, count, number = (os.environ.get(variable) for variable in PROCESS_FLAGS.values())
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", default=address, help="address of process 0, the same in every process")
    add("--processes", metavar="N", type=int, default=count, help="number of processes; TPU slices and Slurm set it")
    add("--process", metavar="I", type=int, default=number, help="process id, from 0")
    add(
        "--join-timeout",
        metavar="SECONDS",
        type=int,
        default=JOIN_SECONDS,
        help="how long to wait at the start until all processes are there (default %(default)s)",
    )


def distributed_arguments(args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` from the flags, Slurm or a TPU; None for a single process."""
    if args.join_timeout < 1:
        raise InputError(f"--join-timeout: expected at least 1 second, got {args.join_timeout}")
    flags = [f"--{name}" for name in PROCESS_FLAGS if getattr(args, name) is not None]
    if flags:
        if len(flags) < len(PROCESS_FLAGS):
            names = f"--coordinator, --processes and --process (or {', '.join(PROCESS_FLAGS.values())})"
            raise InputError(f"{names}: expected all three together, got only {' and '.join(flags)}")
        if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", args.coordinator):
            raise InputError(f"--coordinator: expected HOST:PORT, got {args.coordinator!r}")
        if not 0 <= args.process < args.processes:
            expected = f"0 to {args.processes - 1}, since there are {args.processes} processes"
            raise InputError(f"--process: expected {expected}, got {args.process}")
        return {
            "coordinator_address": args.coordinator,
            "num_processes": args.processes,
            "process_id": args.process,
            "cluster_detection_method": "deactivate",
        }
    tasks, nodes = (os.environ.get(name) for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES"))
    if int(tasks or 1) > 1 and "SLURM_STEP_NODELIST" in os.environ:  # started by srun
        gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
        # With one task per node, it uses all GPUs of the node; by default JAX gives each task the GPU of its number.
        one_per_node = tasks == (nodes or os.environ.get("SLURM_NNODES"))
        local = {"local_device_ids": list(range(gpus))} if one_per_node and gpus else {}
        return {"cluster_detection_method": "slurm", **local}
    if "TPU_ML_PLATFORM" in os.environ and not os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return {}  # JAX sets the variable on TPU hosts
    return None


@contextlib.contextmanager
def join_processes(command: str, args: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes of the run, if any, for the duration of the body; enter it before creating any array.

    A single process only runs the self-test. Processes that differ in flags, code, versions or compiler flags are
    refused (`agreement`). An exception that leaves the body ends every process: this one with a one-line message, the
    others with the same line and the id of this process.
    """
    arguments = distributed_arguments(args)
    address = None if arguments is None else complete_address(arguments, args.join_timeout)
    if address is None or address["num_processes"] == 1:
        self_test()
        yield
        return
    facts = {"command": f"crpo_jax.{command}"} | flag_facts(args) | agreement.installation()
    own = Member(address["process_id"], address["num_processes"], socket.gethostname(), os.getpid(), facts)
    ending = Ending(f"crpo_jax.{command}: process {own.process} of {own.processes}")
    try:
        ending.peers = peers = meet(address["coordinator_address"], own, args.join_timeout, ending.say)
        threading.Thread(target=peers.watch, args=(ending.ended, ending.lost), daemon=True).start()
        jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which runtime/signals.py handles
        jax.distributed.initialize(**address, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        self_test(exit_message=ending.exit_message)
        yield
        peers.send(done=True)
        jax.distributed.shutdown()
        ending.exit_message.cancel()
    except BaseException as error:  # noqa: BLE001 (an interrupt ends the others too)
        if is_lost_peer(error):
            time.sleep(LOST_PEER_SECONDS)  # meanwhile `Ending` ends this process and names the one that died
        code, line = exit_code_and_line(error)
        ending.end_all(code, line.removeprefix(f"crpo_jax.{command}: "))


def complete_address(arguments: Mapping[str, Any], seconds: int) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` with those that JAX detects; None for a single TPU host."""
    if "coordinator_address" in arguments:
        return dict(arguments)
    local = arguments.get("local_device_ids")
    if local is None and (listed := os.environ.get("JAX_LOCAL_DEVICE_IDS")):
        local = [int(number) for number in listed.split(",")]
    method = arguments.get("cluster_detection_method")
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, count, process, local = detect(None, None, None, local, method, seconds)
    if address is None or count is None or process is None:
        if method:
            raise InputError(f"{method}: expected JAX to detect the processes, got none; use --coordinator")
        return None
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": process,
        "local_device_ids": local,
        "cluster_detection_method": "deactivate",
    }


def flag_facts(args: argparse.Namespace) -> dict[str, str]:
    """The command's own flags; settings are compared as they are resolved, and the workdir when it is opened."""
    compared = {name: value for name, value in vars(args).items() if name not in FLAGS_COMPARED_ELSEWHERE}
    return {f"--{name.replace('_', '-')}": repr(value) for name, value in compared.items()}


# --- ending together --------------------------------------------------------------------------------------------------


class ExitMessage:
    """A line printed when this process ends, in whatever way, unless it is cancelled first.

    jax.distributed aborts a process from C++ when others are lost, without running any Python. So the line is held by a
    shell at the other end of a pipe, which the kernel closes.
    """

    SCRIPT = 'while read -r line; do last=$line; done; [ -z "$last" ] || printf "%s\\n" "$last" >&2'

    def __init__(self) -> None:
        self._shell = subprocess.Popen(["sh", "-c", self.SCRIPT], stdin=subprocess.PIPE, start_new_session=True)

    def set(self, line: str) -> None:
        assert self._shell.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the shell was killed: the process ends without a message
            self._shell.stdin.write(f"{line}\n".encode())
            self._shell.stdin.flush()

    def cancel(self) -> None:
        self.set("")
        self._shell.communicate()


def exit_code_and_line(error: BaseException) -> tuple[int, str]:
    """The exit code and one-line message for an exception; prints the traceback of an unexpected one."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, SystemExit):
        return (error.code, "") if isinstance(error.code, int) else (1 if error.code else 0, str(error.code or ""))
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, Fault):
        return 1, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if is_lost_peer(error):
        return 1, f"another process died or is unreachable; its log says why; {HOW_TO_RESUME} ({first[:200]})"
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {first}"


def is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, JaxRuntimeError) and LOST_PEER.search(str(error).partition("\n")[0]) is not None


def write_stderr(line: str) -> None:
    """In a single write, so that lines of several threads do not mix."""
    sys.stderr.write(f"{line}\n")


class Ending:
    """How this process ends when the run cannot go on, and takes the others with it."""

    def __init__(self, name: str) -> None:
        self.name, self.exit_message = name, ExitMessage()
        self.peers: Peers | None = None
        self._first = threading.Lock()  # held by the thread that ends this process
        self.exit_message.set(
            f"{name} was killed, or aborted by jax.distributed because it lost another process (then its messages are "
            f"above). The log of the process that died first says why; {HOW_TO_RESUME}"
        )

    def say(self, line: str) -> None:
        write_stderr(f"{self.name}: {line}")

    def end_all(self, code: int, line: str) -> NoReturn:
        """Ends this process and every other one, each with this line."""
        self._first.acquire()
        if self.peers:
            self.peers.send(ended=line.partition("\n")[0], process=self.peers.own.process, code=code)
        self.say(line)
        if self.peers and self.peers.own.process == 0:
            time.sleep(1)  # process 0 hosts JAX's service, which takes the others with it: they read the message first
        exit_now(self.exit_message, code)

    def ended(self, process: int, code: int, line: str) -> NoReturn:
        """Ends this process because another one said that it ends."""
        self._first.acquire()
        write_stderr(f"{self.name} ends with process {process}: {line}")
        exit_now(self.exit_message, code)

    def lost(self, member: Member, reason: str) -> None:
        """Another process ended without a word, or, for a `reason`, cannot be reached: then JAX decides."""
        if reason:
            return self.say(
                f"{member} does not answer ({reason}); if it stays silent, jax.distributed ends this process after "
                f"{HEARTBEAT_SECONDS} seconds"
            )
        line = f"{member} was killed or has crashed; its log says why; {HOW_TO_RESUME}"
        if member.process:
            self.end_all(1, line)
        self._first.acquire()
        self.say(line)
        os._exit(1)  # at once, since JAX is about to abort: its service ran in process 0


def exit_now(exit_message: ExitMessage, code: int) -> NoReturn:
    """Skips Python's orderly exit, which would wait for the other processes."""
    exit_message.cancel()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# --- the self-test ----------------------------------------------------------------------------------------------------


def sum_over_devices() -> float:
    """1 + 2 + ... + n over n devices, each adding its number, in a message of one megabyte per device."""
    mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("device", None), ()))
    values = np.repeat(np.arange(1, jax.device_count() + 1, dtype=np.float32)[:, None], 2**18, axis=1)
    numbers = jax.make_array_from_callback(values.shape, split, lambda index: values[index])
    total = np.asarray(jax.jit(jnp.sum, static_argnames="axis", out_shardings=whole)(numbers, axis=0))
    return float(total[np.argmax(np.abs(total - total[0]))])


def self_test(
    total_of_devices: Callable[[], float] = sum_over_devices,
    seconds: float = SELF_TEST_SECONDS,
    exit_message: ExitMessage | None = None,
) -> None:
    """Runs a small all-reduce over all devices; ends the process with advice if it hangs or its result is wrong.

    GPUs whose peer-to-peer copies are broken (some boards behind an IOMMU) hang silently in their first collective, or
    add up wrongly.
    """
    count = jax.device_count()
    if count == 1:
        return
    advice = "check that every process is running and can reach the others"
    if jax.default_backend() == "gpu":
        hosts = " (and between hosts NCCL_SOCKET_IFNAME=INTERFACE)" if jax.process_count() > 1 else ""
        advice = (
            "peer-to-peer copies between these GPUs may be broken: "
            f"set NCCL_P2P_DISABLE=1{hosts}; NCCL_DEBUG=INFO says more"
        )

    def hung() -> None:
        write_stderr(f"crpo_jax: a sum over all {count} devices did not end within {seconds:g} seconds; {advice}")
        exit_now(exit_message, 1) if exit_message else os._exit(1)

    timer = threading.Timer(seconds, hung)
    timer.daemon = True
    timer.start()
    total, expected = total_of_devices(), count * (count + 1) / 2
    timer.cancel()
    if total != expected:
        raise SystemExit(f"crpo_jax: a sum over all {count} devices gave {total:g} instead of {expected:g}; {advice}")


# --- exchanging values ------------------------------------------------------------------------------------------------


def is_single_process() -> bool:
    """Whether the run has no other process; does not initialize devices unless processes were joined."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def process_share(count: int) -> range:
    """This process's part of `count` items of host work: contiguous, and equal for all processes to within one."""
    index, processes = (0, 1) if is_single_process() else (jax.process_index(), jax.process_count())
    return range(count * index // processes, count * (index + 1) // processes)


def barrier(name: str) -> None:
    """Returns once every process has reached it."""
    if not is_single_process():
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must call this."""
    return flag if is_single_process() else bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def gather_from_processes(items: Sequence[GatheredItem]) -> list[GatheredItem]:
    """The items of all processes, in order of process id; every process must call this."""
    if is_single_process():
        return list(items)
    own = np.frombuffer(pickle.dumps(list(items)), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(own.size)))
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # a power of two: few programs compile
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [item for row, size in zip(rows, sizes, strict=True) for item in pickle.loads(row[:size].tobytes())]  # noqa: S301 (our own)


def require_agreement(facts: Mapping[str, str]) -> None:
    """InputError in every process where their facts differ; every process must call this."""
    if not is_single_process() and (line := agreement.difference(gather_from_processes([facts]))):
        raise InputError(line)
