"""Which responses share a packed row: groups dealt to rows of one length under a token budget. NumPy only.

A group is a prompt and its responses. They stand in one row, where the prompt is computed once, unless the group is cut
to fill the rows: the prompt then stands in each of them.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LENGTHS = 32  # rows have at most so many lengths within the budget, so that few shapes compile
SPARE_RESPONSES = 2  # a row has room for so many times as many responses as the rows have on average
CUT_AMONG = 16  # groups left over, the largest, of which one is cut to fill a row
CHOSEN_AMONG = 10  # of a group's responses, all subsets of so many are tried


class Group(NamedTuple):
    """The places that a prompt takes, the caller's numbers of its responses, and the places of each of them."""

    prompt: int
    rows: list[int]
    responses: list[int]

    @property
    def places(self) -> int:
        return self.prompt + sum(self.responses)

    def select(self, chosen: Sequence[int]) -> "Group":
        """The group with some of its responses."""
        return Group(self.prompt, [self.rows[i] for i in chosen], [self.responses[i] for i in chosen])


class PackedGroups(NamedTuple):
    """Rows of `length` places with room for `most` responses each, as many for every data shard."""

    rows: list[list[Group]]
    length: int
    most: int


def pack_groups(groups: Sequence[Group], *, budget: int, multiple: int, shards: int) -> PackedGroups:
    """Every response once, in as few rows per data shard as the budget allows, and rows as short as these allow.

    Lengths are multiples of `multiple`, and of about 1 / LENGTHS of the budget. A response that exceeds the budget with
    its prompt makes all rows longer.
    """
    responses, tokens = sum(len(group.rows) for group in groups), max(1, sum(group.places for group in groups))
    longest = max(1, *(group.prompt + max(group.responses) for group in groups))
    budget, step = row_lengths(budget, multiple, longest)
    per_shard = -(-tokens // (shards * budget))
    while True:
        count = shards * per_shard
        most = most_responses(responses / count)
        least = max(longest, -(-tokens // count))
        for length in range(-(-least // step) * step, budget + 1, step):
            rows = fill_rows(groups, count, length, most)
            if rows is not None:
                return PackedGroups(rows, length, most)
        per_shard += 1


def row_lengths(budget: int, multiple: int, longest: int) -> tuple[int, int]:
    """The longest row, and the step between lengths, of which both are multiples."""
    step = multiple * max(1, budget // (LENGTHS * multiple))
    return max(budget // step, -(-longest // step)) * step, step


def most_responses(mean: float) -> int:
    """Responses that a row has room for where rows have so many on average: a power of two."""
    return power_of_two(math.ceil(SPARE_RESPONSES * mean))


def fill_rows(groups: Sequence[Group], count: int, length: int, most: int) -> list[list[Group]] | None:
    """One row after the other: whole groups, the largest that fits first, and then the part of a group that fills it
    best. None where `count` rows do not hold all groups."""
    rows, left = list[list[Group]](), sorted(groups, key=lambda group: -group.places)
    for _ in range(count):
        row, room, slots = list[Group](), length, most
        while whole := [i for i, group in enumerate(left) if group.places <= room and len(group.rows) <= slots]:
            group = left.pop(whole[0])
            row, room, slots = [*row, group], room - group.places, slots - len(group.rows)
        parts = [choose_part(group, room, slots) for group in left[:CUT_AMONG]]
        if any(parts):
            cut = int(np.argmax([left[i].select(part).places if part else -1 for i, part in enumerate(parts)]))
            group, part = left.pop(cut), parts[cut]
            row.append(group.select(part))
            left.append(group.select([i for i in range(len(group.rows)) if i not in part]))
            left.sort(key=lambda group: -group.places)
        rows.append(row)
    return None if left else rows


def choose_part(group: Group, room: int, slots: int) -> list[int]:
    """The responses of a group that fill `room` places best beside their prompt, at most `slots` of them."""
    among = min(len(group.rows), CHOSEN_AMONG)
    if not slots or group.prompt + min(group.responses[:among]) > room:
        return []
    subsets, sizes = subsets_of(among)
    places = subsets @ np.array(group.responses[:among]) + group.prompt
    fits = (places <= room) & (sizes <= slots)
    return np.flatnonzero(subsets[np.argmax(np.where(fits, places, -1))]).tolist() if fits.any() else []


@functools.cache
def subsets_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    """All subsets of so many but the empty one, as rows of 0 and 1, and their sizes."""
    subsets = np.arange(1, 1 << count)[:, None] >> np.arange(count) & 1
    return subsets, subsets.sum(axis=1)


def power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()
