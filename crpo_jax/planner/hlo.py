"""The collectives of a compiled program, read from its HLO text with loops counted."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

COLLECTIVE_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """All collectives of one kind over one mesh axis in one execution of a program: `sent` are the bytes that a device
    sends to its neighbour if they run as rings, `times` is their number."""

    kind: str
    axis: str
    sent: float
    times: float


def count_ring_bytes(kind: str, size: float, devices: int) -> float:
    """Bytes that each device sends in a collective whose gathered, reduced or scattered array has `size` bytes."""
    share = (devices - 1) / devices
    return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * size


def merge_collectives(collectives: Iterable[Collective]) -> list[Collective]:
    """One entry per kind and axis, the largest first. Those over a single device send nothing and are dropped."""
    total: dict[tuple[str, str], tuple[float, float]] = {}
    for kind, axis, sent, times in collectives:
        before = total.get((kind, axis), (0.0, 0.0))
        total[kind, axis] = (before[0] + sent, before[1] + times)
    merged = [Collective(*key, *value) for key, value in total.items() if value[0]]
    return sorted(merged, key=lambda collective: -collective.sent)


def read_collectives(text: str, data: int, model: int) -> list[Collective]:
    """The collectives of a program's HLO text on a mesh of data x model devices, numbered along the model axis first.

    The body of a loop of known length counts that often; of one that ends on data, such as the token loop, once. A TPU
    spreads one collective over the steps of the computation beside it, so each channel counts once.
    """
    computations, entry = split_computations(text)
    collectives: list[Collective] = []
    channels: set[str] = set()

    def walk(name: str, times: float) -> None:
        for line in computations.get(name, ()):
            channel = re.search(r"channel_id=(\d+)", line)
            collective = read_instruction(line, data, model)
            if collective and not (channel and channel[1] in channels):
                channels.update(channel.groups() if channel else ())
                collectives.append(collective._replace(sent=collective.sent * times, times=times))
            if " while(" in line:
                called = dict(re.findall(r"(body|condition)=%?([\w.\-]+)", line))
                walk(called["body"], times * read_trip_count(line, computations.get(called["condition"], [])))
            else:
                for called in re.findall(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                    walk(called, times)
                for names in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                    for called in names.replace("%", "").split(","):
                        walk(called.strip(), times)

    walk(entry, 1)
    return merge_collectives(collectives)


def split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def read_trip_count(line: str, condition: list[str]) -> int:
    """How often a while loop runs: as annotated, or the constant that its counter is compared with; 1 if neither."""
    if annotated := re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', line):
        return int(annotated[1])
    root = next((part for part in condition if "ROOT" in part), "")
    if " compare(" not in root or "direction=LT" not in root:
        return 1
    for part in condition:
        constant = re.match(r"\s*%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", part)
        if constant and re.search(rf"[%( ]{re.escape(constant[1])}[,)]", root):
            return int(constant[2])
    return 1


def read_instruction(line: str, data: int, model: int) -> Collective | None:
    """The collective that this instruction starts, or None. Gathers and scatters are measured by their larger side."""
    match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVE_KINDS)})(-start)?\(", line)
    if not match:
        return None
    result, kind, asynchronous = match.groups()
    size = 0.0
    for bits, sides in re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", result):  # f32[8,4], pred[3]
        size += max(int(bits or 8) // 8, 1) * math.prod(int(side) for side in sides.split(",") if side)
    members = read_first_group(line, data * model)
    devices = len(members)
    if kind == "reduce-scatter" and not asynchronous:
        size *= devices  # the result is one device's part
    elif asynchronous and kind == "collective-permute":  # the result holds the input and the output
        size *= 0.5
    elif asynchronous and kind in ("all-gather", "reduce-scatter"):
        size *= devices / (devices + 1)
    crossed = {"data": {member // model for member in members}, "model": {member % model for member in members}}
    axis = ", ".join(name for name, places in crossed.items() if len(places) > 1) or "none"
    return Collective(kind, axis, count_ring_bytes(kind, size, devices), 1)


def read_first_group(line: str, devices: int) -> list[int]:
    """The first group of devices that communicate, in any of HLO's notations; all devices if it lists none."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return [int(pairs[1]), int(pairs[2])]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        used = {name: int(part) if part else sizes[name] for name, part in axes}
        members, stride = [0], 1
        for name in reversed(sizes):
            if name in used:
                members = [member + step * stride for step in range(used[name]) for member in members]
            stride *= sizes[name]
        return members
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sides = [int(side) for side in iota[2].split(",")]
        order = [int(place) for place in iota[3].split(",")] if iota[3] else list(range(len(sides)))
        members = [0]
        for place in reversed(order):
            stride = math.prod(sides[place + 1 :])
            members = [step * stride + member for step in range(sides[place]) for member in members]
        return members[: int(iota[1])]
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(member) for member in explicit[1].split(",")]
    return list(range(devices))
