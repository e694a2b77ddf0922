"""Mini-batches and micro-batches: rows sorted by length, padded to a few fixed shapes under a token budget. NumPy
only."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from crpo_jax.config import Config, Parallel
from crpo_jax.update.losses import Batch, row_weights


class Row(NamedTuple):
    """The token ids of a prompt and of the response that follows it."""

    prompt: Sequence[int]
    response: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


class MicroBatch(NamedTuple):
    """Rows of one shape; `rows` says which of the caller's rows each is, -1 for a row that only fills up the shape."""

    rows: np.ndarray  # [b]
    tokens: np.ndarray  # [b, t] int32, right-padded
    prompt_lengths: np.ndarray  # [b] int32
    lengths: np.ndarray  # [b] int32, prompt and response together; 0 for filling


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
        for micro in split_rows(rows[part], settings.parallel, shards):
            batch = make_batch(micro, weights, advantages[part], align_to_tokens(logprobs[part], micro))
            responses = np.where(micro.rows >= 0, micro.rows + first, -1).astype(np.int32)
            batches.append(batch._replace(on_policy=np.full(len(micro.rows), first == 0), responses=responses))
        mini_batches.append(batches)
    return mini_batches


def supervised_batches(rows: Sequence[Row], parallel: Parallel, shards: int) -> list[Batch]:
    """All rows in micro-batches; together their loss is the mean over all response tokens."""
    weights = row_weights(np.array([len(row.response) for row in rows]), np.ones(len(rows), bool), "token_mean")
    return [make_batch(micro, weights) for micro in split_rows(rows, parallel, shards)]


def split_rows(rows: Sequence[Row], parallel: Parallel, shards: int) -> list[MicroBatch]:
    return micro_batches(rows, budget=parallel.micro_batch_tokens, multiple=parallel.length_multiple, shards=shards)


def make_batch(
    micro: MicroBatch, weights: np.ndarray, advantages: np.ndarray | None = None, sampler: np.ndarray | None = None
) -> Batch:
    """A micro-batch with its rows' weights and advantages, given for all rows of the mini-batch."""
    of_rows = [None if values is None else select_rows(values, micro.rows) for values in (weights, advantages)]
    arrays: Any = (micro.tokens, micro.prompt_lengths, micro.lengths, *of_rows, sampler)
    return Batch(*arrays)


def micro_batches(rows: Sequence[Row], *, budget: int, multiple: int, shards: int) -> list[MicroBatch]:
    """All rows, each exactly once, in micro-batches of at most `budget` tokens per data shard, padding included.

    Rows are sorted by length, so that rows of one micro-batch waste little. Lengths are multiples of `multiple`; row
    counts follow from the length and the number of rows alone (a remainder is rounded up to a quarter of a full batch),
    so that few shapes compile. A row longer than the budget stands alone on its shard.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].length, reverse=True)
    batches = []
    while order:
        t = -(-rows[order[0]].length // multiple) * multiple
        full, wanted = max(1, budget // t), -(-len(order) // shards)
        if wanted < full and batches:
            quarter = -(-full // 4)
            wanted = -(-wanted // quarter) * quarter
        b = shards * min(full, wanted)
        batches.append(pad_rows(rows, order[:b], b, t))
        order = order[b:]
    return batches


def pad_rows(rows: Sequence[Row], chosen: Sequence[int], b: int, t: int) -> MicroBatch:
    """The chosen rows as arrays of shape [b, t]."""
    tokens, index = np.zeros((b, t), np.int32), np.full(b, -1, np.int32)
    prompt_lengths, lengths = np.ones(b, np.int32), np.zeros(b, np.int32)
    for place, which in enumerate(chosen):
        row = rows[which]
        tokens[place, : row.length] = [*row.prompt, *row.response]
        index[place], prompt_lengths[place], lengths[place] = which, len(row.prompt), row.length
    return MicroBatch(index, tokens, prompt_lengths, lengths)


def select_rows(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A per-row value for each row of a micro-batch, 0 for filling."""
    return np.where(rows >= 0, values[np.maximum(rows, 0)], 0).astype(values.dtype)


def align_to_tokens(values: Sequence[np.ndarray], micro: MicroBatch) -> np.ndarray:
    """Values per response token, one array per caller's row, on the positions that predict those tokens [b, t]."""
    out = np.zeros(micro.tokens.shape, np.float32)
    for place, which in enumerate(micro.rows):
        if which >= 0:
            first = micro.prompt_lengths[place] - 1
            out[place, first : first + len(values[which])] = values[which]
    return out
