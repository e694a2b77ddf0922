"""Mini-batches and micro-batches: responses in packed rows of a few fixed shapes under a token budget. NumPy only.

A prompt of n tokens takes n - 1 places, and a response of m takes m: the prompt's last token, which predicts the
response's first, stands before each of the responses, and a response's last token predicts nothing.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from crpo_jax.config import Config, Parallel
from crpo_jax.update.losses import Batch, row_weights
from crpo_jax.update.packing import Group, pack_groups, power_of_two


class Row(NamedTuple):
    """The token ids of a prompt and of the response that follows it."""

    prompt: Sequence[int]
    response: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


class MicroBatch(NamedTuple):
    """Responses and the packed rows that hold them; `rows` says which of the caller's rows each response is, -1 for
    one that only fills up the shape. The other fields are those of `Batch`."""

    rows: np.ndarray  # [b]
    tokens: np.ndarray  # [b, t] int32, right-padded
    lengths: np.ndarray  # [b] int32; 0 for filling
    starts: np.ndarray  # [b] int32
    packed_tokens: np.ndarray  # [c, t] int32, as all below
    targets: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    prompts: np.ndarray


def crpo_mini_batches(
    rows: Sequence[Row],
    logprobs: Sequence[np.ndarray],
    advantages: np.ndarray,
    counted: np.ndarray,
    settings: Config,
    shards: int,
) -> list[list[Batch]]:
    """A rollout's responses in mini-batches of crpo.mini_batch_prompts whole groups, each in micro-batches.

    `logprobs` are the sampler's, one array per response; a response that is not `counted` carries no gradient, and the
    denominators are those of its mini-batch.
    """
    size = settings.crpo.mini_batch_prompts * settings.crpo.group_size
    lengths = np.array([len(row.response) for row in rows])
    mini_batches = []
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        weights = row_weights(lengths[part], counted[part], settings.crpo.aggregation, settings.rollout.max_new_tokens)
        batches = []
        for micro in split_rows(rows[part], settings.parallel, shards, settings.rollout.max_new_tokens):
            batch = make_batch(micro, weights, advantages[part], align_to_tokens(logprobs[part], micro))
            responses = np.where(micro.rows >= 0, micro.rows + first, -1).astype(np.int32)
            batches.append(batch._replace(on_policy=np.full(len(micro.rows), first == 0), responses=responses))
        mini_batches.append(batches)
    return mini_batches


def supervised_batches(rows: Sequence[Row], parallel: Parallel, shards: int) -> list[Batch]:
    """All rows in micro-batches; together their loss is the mean over all response tokens."""
    lengths = np.array([len(row.response) for row in rows])
    weights = row_weights(lengths, np.ones(len(rows), bool), "token_mean")
    longest = power_of_two(int(lengths.max()))
    return [make_batch(micro, weights) for micro in split_rows(rows, parallel, shards, longest)]


def make_batch(
    micro: MicroBatch, weights: np.ndarray, advantages: np.ndarray | None = None, sampler: np.ndarray | None = None
) -> Batch:
    """A micro-batch with its rows' weights and advantages, given for all rows of the mini-batch."""
    arrays: dict[str, Any] = micro._asdict()
    rows = arrays.pop("rows")
    arrays["weights"] = select_rows(weights, rows)
    arrays["advantages"] = None if advantages is None else select_rows(advantages, rows)
    return Batch(**arrays, sampler=cast(Any, sampler))


def find_groups(rows: Sequence[Row]) -> list[Group]:
    """Rows that follow one another and have the same prompt share it."""
    groups = []
    for prompt, members in itertools.groupby(range(len(rows)), key=lambda number: rows[number].prompt):
        numbers = list(members)
        groups.append(Group(len(prompt) - 1, numbers, [len(rows[number].response) for number in numbers]))
    return groups


def count_places(rows: Sequence[Row]) -> int:
    """The places that rows need, each prompt once."""
    return sum(group.places for group in find_groups(rows))


def split_rows(rows: Sequence[Row], parallel: Parallel, shards: int, longest: int) -> list[MicroBatch]:
    budget, multiple = parallel.micro_batch_tokens, parallel.length_multiple
    return micro_batches(rows, budget=budget, multiple=multiple, shards=shards, longest=longest)


def micro_batches(rows: Sequence[Row], *, budget: int, multiple: int, shards: int, longest: int) -> list[MicroBatch]:
    """All rows, each exactly once, in micro-batches of one shape with a packed row of at most `budget` places for every
    data shard. Responses have at most `longest` tokens."""
    if not rows:
        return []
    packed = pack_groups(find_groups(rows), budget=budget, multiple=multiple, shards=shards)
    return [
        stack_rows(rows, packed.rows[first : first + shards], packed.length, packed.most, longest)
        for first in range(0, len(packed.rows), shards)
    ]


def stack_rows(
    rows: Sequence[Row], packed: Sequence[Sequence[Group]], length: int, most: int, longest: int
) -> MicroBatch:
    """The micro-batch of these packed rows, one for each data shard."""
    parts = [pack_row(rows, groups, length, most) for groups in packed]
    numbers, starts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "starts"))
    tokens, lengths = np.zeros((len(numbers), longest), np.int32), np.zeros(len(numbers), np.int32)
    for place in np.flatnonzero(numbers >= 0):
        response = rows[numbers[place]].response
        tokens[place, : len(response)], lengths[place] = response, len(response)
    return MicroBatch(
        numbers, tokens, lengths, starts, *map(np.stack, zip(*(part.places for part in parts), strict=True))
    )


class PackedRow(NamedTuple):
    """A packed row: its responses' numbers and starts [most], and what stands in its places [t]."""

    rows: np.ndarray
    starts: np.ndarray
    places: tuple[np.ndarray, ...]  # in the order of MicroBatch


def pack_row(rows: Sequence[Row], groups: Sequence[Group], length: int, most: int) -> PackedRow:
    """First the prompts and then the responses, which puts the places that predict side by side."""
    numbers = [number for group in groups for number in group.rows]
    shared = [rows[group.rows[0]].prompt[:-1] for group in groups]
    inputs = [[*rows[number].prompt[-1:], *rows[number].response][:-1] for number in numbers]
    sizes = np.array([len(tokens) for tokens in (*shared, *inputs)], int)
    prompt_of = np.repeat(np.arange(len(groups)), [len(group.rows) for group in groups])
    first_position = np.concatenate([np.zeros(len(groups), int), np.array([len(x) for x in shared], int)[prompt_of]])
    filled, count = int(sizes.sum()), len(sizes)
    ends = np.cumsum(sizes)
    out = np.zeros((5, length), np.int32)
    tokens, targets, positions, sequences, prompts = out
    tokens[:filled] = np.fromiter(itertools.chain(*shared, *inputs), np.int32, filled)
    targets[:] = -1
    predicting = slice(int(sizes[: len(groups)].sum()), filled)
    targets[predicting] = np.fromiter(itertools.chain(*(rows[number].response for number in numbers)), np.int32)
    positions[:filled] = np.arange(filled) + np.repeat(first_position - ends + sizes, sizes)
    sequences[:filled] = np.repeat(np.arange(count), sizes)
    sequences[filled:] = count + np.arange(length - filled)
    prompts[:filled] = np.repeat(np.concatenate([np.arange(len(groups)), prompt_of]), sizes)
    prompts[filled:] = max(len(groups) - 1, 0)  # filling sees next to nothing, and that nearby
    chosen, starts = np.full(most, -1), np.zeros(most, np.int32)
    chosen[: len(numbers)], starts[: len(numbers)] = numbers, (ends - sizes)[len(groups) :]
    return PackedRow(chosen, starts, tuple(out))


def select_rows(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A per-row value for each row of a micro-batch, 0 for filling."""
    return np.where(rows >= 0, values[np.maximum(rows, 0)], 0).astype(values.dtype)


def align_to_tokens(values: Sequence[np.ndarray], micro: MicroBatch) -> np.ndarray:
    """Values per response token, one array per caller's row, beside those tokens [b, t]."""
    out = np.zeros(micro.tokens.shape, np.float32)
    for place in np.flatnonzero(micro.rows >= 0):
        out[place, : micro.lengths[place]] = values[micro.rows[place]]
    return out
