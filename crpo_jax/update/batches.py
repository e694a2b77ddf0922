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
    """Rows of one shape; `index` says which of the caller's rows each is, -1 for filling."""

    index: np.ndarray  # [b]
    tokens: np.ndarray  # [b, t] int32, right-padded
    prompt_lengths: np.ndarray  # [b] int32
    lengths: np.ndarray  # [b] int32, prompt and response together; 0 for filling


def micro_batches(rows: Sequence[Row], *, budget: int, multiple: int, devices: int) -> list[MicroBatch]:
    """All rows, each exactly once, in micro-batches of at most `budget` tokens per device, padding included.

    Rows are sorted by length, so that rows of one micro-batch waste little. Lengths are multiples of `multiple`; row counts
    follow from the length and the number of rows alone (a remainder is rounded up to a quarter of a full batch), so that
    few shapes compile. A row longer than the budget stands alone on its device.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].response), reverse=True)
    out = []
    while order:
        longest = len(rows[order[0]].prompt) + len(rows[order[0]].response)
        t = -(-longest // multiple) * multiple
        full, wanted = max(1, budget // t), -(-len(order) // devices)
        if wanted < full and out:
            quarter = -(-full // 4)
            wanted = -(-wanted // quarter) * quarter
        b = devices * min(full, wanted)
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


def of_rows(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """A per-row value for each row of a micro-batch, 0 for filling."""
    return np.where(index >= 0, values[np.maximum(index, 0)], 0).astype(values.dtype)
