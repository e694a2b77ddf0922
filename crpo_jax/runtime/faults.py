"""Reports in one line why a command had to end although its input was good: a full disk, a device out of memory."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from crpo_jax.errors import Fault

KNOBS = {
    "rollout": ("sampling", "rollout.slots smaller, or a mesh with more model shards"),
    "huggingface": ("loading the model", "parallel.layout=fsdp, or a mesh with more devices"),
    "checkpoint": ("restoring a checkpoint", "parallel.layout=fsdp, or a mesh with more devices"),
    "": (
        "the update",
        "parallel.micro_batch_tokens or parallel.logprob_chunk smaller, parallel.remat=true, parallel.layout=fsdp, "
        "or a mesh with more devices",
    ),
}


@contextlib.contextmanager
def faults_end_in_one_line(command: str) -> Iterator[None]:
    """A Fault, or a device's refusal of memory, ends the command with one line and exit code 1."""
    try:
        yield
    except Fault as fault:
        raise SystemExit(f"{command}: stopped: {fault}") from None
    except jax.errors.JaxRuntimeError as error:
        fault = out_of_memory(error)
        if not fault:
            raise
        raise SystemExit(f"{command}: stopped: {fault}") from None


def out_of_memory(error: BaseException) -> Fault | None:
    """A device's refusal of memory in words: what ran, how much it requested, which settings to change; None for other
    errors."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message and "Out of memory" not in message:
        return None
    files, trace = [], error.__traceback__
    while trace:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    places = {name for file in map(Path, files) if "crpo_jax" in file.parts for name in (file.parent.name, file.stem)}
    phase, knobs = next(words for place, words in KNOBS.items() if place in places or not place)
    requested = re.search(r"allocat\w* (?:of )?([\d.,]+ ?(?:bytes|[KMGT]i?B))", message)
    operators = re.findall(r"op_name=\"([^\"]+)\"", message)
    buffer = f", the largest buffer made by {operators[0]}" if operators else ""
    size = f" (requested {requested[1].rstrip('.')}{buffer})" if requested else buffer
    return Fault(f"out of device memory while {phase}{size}: try {knobs}")
