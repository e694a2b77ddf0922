"""The collectives of a compiled program, read from its text, loops counted."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


class Collective(NamedTuple):
    """All collectives of one kind over one mesh axis in one run of a program: `sent` is the bytes that a device sends to its
    neighbour when they run as rings, `times` how many there are."""

    kind: str
    axis: str
    sent: float
    times: float


def sent_by_ring(kind: str, size: float, devices: int) -> float:
    """Bytes each of so many devices sends for a collective whose whole array has `size` bytes: the gathered, the reduced or the
    scattered one."""
    share = (devices - 1) / devices
    return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * size


def added(collectives: Iterable[Collective]) -> list[Collective]:
    """One entry per kind and axis, the largest first; those over a single device send nothing and are left out."""
    total: dict[tuple[str, str], tuple[float, float]] = {}
    for kind, axis, sent, times in collectives:
        before = total.get((kind, axis), (0.0, 0.0))
        total[kind, axis] = (before[0] + sent, before[1] + times)
    return sorted((Collective(*key, *value) for key, value in total.items() if value[0]), key=lambda one: -one.sent)


def collectives(text: str, data: int, model: int) -> list[Collective]:
    """What a program's compiled text sends, on a mesh of data x model devices numbered along the model axis first.

    A loop of known length counts that often; the body of one that ends on data, such as the token loop, counts once. A TPU
    spreads one collective over the steps of the computation beside it: its channel is counted once.
    """
    lines_of, entry = computations(text)
    found: list[Collective] = []
    channels: set[str] = set()

    def walk(name: str, times: float) -> None:
        for line in lines_of.get(name, ()):
            channel = re.search(r"channel_id=(\d+)", line)
            if (found_here := collective(line, data, model)) and not (channel and channel[1] in channels):
                channels.update(channel.groups() if channel else ())
                found.append(found_here._replace(sent=found_here.sent * times, times=times))
            if " while(" in line:
                body, condition = (
                    re.findall(r"(?:body|condition)=%?([\w.\-]+)", line),
                    re.search(r"condition=%?([\w.\-]+)", line),
                )
                assert condition is not None
                trips = trip_count(line, lines_of.get(condition[1], []))
                for called in body:
                    walk(called, times * (trips if called != condition[1] else 0))
            else:
                for called in re.findall(r"(?:calls|true_computation|false_computation)=%?([\w.\-]+)", line):
                    walk(called, times)
                for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                    for called in group.replace("%", "").split(","):
                        walk(called.strip(), times)

    walk(entry, 1)
    return added(found)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the one where the program starts."""
    lines_of: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            name = head[2]
            lines_of[name] = []
            entry = name if head[1] else entry
        elif name:
            lines_of[name].append(line)
    return lines_of, entry


def trip_count(line: str, condition: list[str]) -> int:
    """How often a while loop runs: what the compiler noted, or the constant that its counter is compared with; 1 if neither."""
    noted = re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', line)
    if noted:
        return int(noted[1])
    root = next((part for part in condition if "ROOT" in part), "")
    if " compare(" not in root or "direction=LT" not in root:
        return 1
    for part in condition:
        constant = re.match(r"\s*%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", part)
        if constant and re.search(rf"[%( ]{re.escape(constant[1])}[,)]", root):
            return int(constant[2])
    return 1


def collective(line: str, data: int, model: int) -> Collective | None:
    """The collective that this instruction starts, or None. Gathers and reductions are measured by their larger side."""
    match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if not match:
        return None
    result, kind = match[1], match[2]
    arrays = [
        BYTES.get(name, 4) * math.prod(int(side) for side in sides.split(",") if side)
        for name, sides in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
    devices, axis = group(line, data, model)
    if kind == "reduce-scatter" and not match[3]:
        size = sum(arrays) * devices  # the result is one device's part
    elif match[3] and kind in ("all-gather", "reduce-scatter", "collective-permute"):  # (what goes in, what comes out)
        size = sum(arrays) * (0.5 if kind == "collective-permute" else devices / (devices + 1))
    else:
        size = sum(arrays)
    return Collective(kind, axis, sent_by_ring(kind, size, devices), 1)


def group(line: str, data: int, model: int) -> tuple[int, str]:
    """How many devices talk to each other, and along which mesh axis: "data", "model" or "data, model"."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        first = [int(pairs[1]), int(pairs[2])]
    elif named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        first, stride = [0], 1
        used = {
            name: int(part) if part else sizes[name]
            for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        }
        for name in reversed(sizes):
            if name in used:
                first = [member + step * stride for step in range(used[name]) for member in first]
            stride *= sizes[name]
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sides = [int(side) for side in iota[3].split(",")]
        order = [int(place) for place in iota[4].split(",")] if iota[4] else list(range(len(sides)))
        strides = [math.prod(sides[place + 1 :]) for place in range(len(sides))]
        first, wanted = [0], int(iota[2])
        for place in reversed(order):
            first = [step * strides[place] + member for step in range(sides[place]) for member in first]
        first = first[:wanted]
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        first = [int(member) for member in listed[1].split(",")]
    else:
        first = list(range(data * model))
    across_data, across_model = (
        len({member // model for member in first}) > 1,
        len({member % model for member in first}) > 1,
    )
    axes = [name for name, crosses in (("data", across_data), ("model", across_model)) if crosses]
    return len(first), ", ".join(axes) or "none"
