"""Micro-batches: rows sorted by length, padded to a few fixed shapes under a token budget. NumPy only.

Position j of a row predicts token j + 1; per-token arrays [b, t] are aligned on the predicting position, so that a
response of m tokens after a prompt of n occupies positions n - 1 to n + m - 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """A prompt and what follows it."""

    prompt: Sequence[int]
    response: Sequence[int]


class MicroBatch(NamedTuple):
    """Rows of one shape; `rows` says which of the caller's rows each is, -1 for filling."""

    rows: np.ndarray  # [b]
    tokens: np.ndarray  # [b, t] int32, right-padded
    prompt_lengths: np.ndarray  # [b] int32
    lengths: np.ndarray  # [b] int32, prompt and response together; 0 for filling


def micro_batches(rows: Sequence[Row], *, budget: int, multiple: int, shards: int) -> list[MicroBatch]:
    """All rows, each exactly once, in micro-batches of at most `budget` tokens per data shard, padding included.

    Rows are sorted by length, so that rows of one micro-batch waste little. Lengths are multiples of `multiple`; row counts
    follow from the length and the number of rows alone (a remainder is rounded up to a quarter of a full batch), so that
    few shapes compile. A row longer than the budget stands alone on its shard.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].response), reverse=True)
    out = []
    while order:
        longest = len(rows[order[0]].prompt) + len(rows[order[0]].response)
        t = -(-longest // multiple) * multiple
        full, wanted = max(1, budget // t), -(-len(order) // shards)
        if wanted < full and out:
            quarter = -(-full // 4)
            wanted = -(-wanted // quarter) * quarter
        b = shards * min(full, wanted)
        out.append(micro_batch(rows, order[:b], b, t))
        order = order[b:]
    return out


def micro_batch(rows: Sequence[Row], chosen: Sequence[int], b: int, t: int) -> MicroBatch:
    """The chosen rows as arrays of shape [b, t]."""
    tokens, index = np.zeros((b, t), np.int32), np.full(b, -1, np.int32)
    prompt_lengths, lengths = np.ones(b, np.int32), np.zeros(b, np.int32)
    for place, which in enumerate(chosen):
        row = [*rows[which].prompt, *rows[which].response]
        tokens[place, : len(row)] = row
        index[place], prompt_lengths[place], lengths[place] = which, len(rows[which].prompt), len(row)
    return MicroBatch(index, tokens, prompt_lengths, lengths)


def of_rows(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A per-row value for each row of a micro-batch, 0 for filling."""
    return np.where(rows >= 0, values[np.maximum(rows, 0)], 0).astype(values.dtype)


def aligned(values: Sequence[np.ndarray], micro: MicroBatch) -> np.ndarray:
    """Values per response token, one array per caller's row, on the positions that predict those tokens [b, t]."""
    out = np.zeros(micro.tokens.shape, np.float32)
    for place, which in enumerate(micro.rows):
        if which >= 0:
            first = micro.prompt_lengths[place] - 1
            out[place, first : first + len(values[which])] = values[which]
    return out
