"""Micro-batches: every row once, within the budget, in few shapes, with per-token values on the positions that predict them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.update.batches import MicroBatch, Row, aligned, micro_batch, micro_batches, of_rows

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=60)
HOW = {"budget": st.integers(1, 400), "multiple": st.sampled_from([1, 4, 32]), "shards": st.sampled_from([1, 2, 8])}


def rows_of(lengths: list[tuple[int, int]]) -> list[Row]:
    """Rows in which no two tokens are equal, so that a token out of place shows."""
    count = iter(range(1, 10**6))
    return [
        Row([next(count) for _ in range(prompt)], [next(count) for _ in range(response)])
        for prompt, response in lengths
    ]


@given(lengths=LENGTHS, **HOW)
@settings(max_examples=100, deadline=None)
def test_every_row_exactly_once(lengths: list[tuple[int, int]], budget: int, multiple: int, shards: int):
    rows = rows_of(lengths)
    micros = micro_batches(rows, budget=budget, multiple=multiple, shards=shards)
    assert sorted(which for micro in micros for which in micro.rows.tolist() if which >= 0) == list(range(len(rows)))
    for micro in micros:
        for place, which in enumerate(micro.rows):
            row = [*rows[which].prompt, *rows[which].response] if which >= 0 else []
            assert micro.lengths[place] == len(row)
            assert micro.prompt_lengths[place] == (len(rows[which].prompt) if which >= 0 else 1)
            assert micro.tokens[place].tolist() == row + [0] * (micro.tokens.shape[1] - len(row))
        assert {micro.tokens.dtype, micro.lengths.dtype, micro.prompt_lengths.dtype} == {np.dtype(np.int32)}


@given(lengths=LENGTHS, **HOW)
@settings(max_examples=100, deadline=None)
def test_shapes(lengths: list[tuple[int, int]], budget: int, multiple: int, shards: int):
    """Within the budget on every shard, or one row alone; lengths a multiple, and no longer than the longest row needs."""
    micros = micro_batches(rows_of(lengths), budget=budget, multiple=multiple, shards=shards)
    for number, micro in enumerate(micros):
        b, t = micro.tokens.shape
        assert b % shards == 0
        assert t % multiple == 0
        assert b // shards * t <= budget or b == shards
        assert t - multiple < micro.lengths.max() <= t
        full, quarter = max(1, budget // t), -(-max(1, budget // t) // 4)
        if number:  # a remainder has one of at most 5 row counts per length, so that few shapes compile
            assert b // shards == full or (b // shards) % quarter == 0
        assert np.all(micro.rows[: (micro.rows >= 0).sum()] >= 0)  # filling comes last
    longest = [int(micro.lengths.max()) for micro in micros]
    assert longest == sorted(longest, reverse=True)
    assert len({micro.tokens.shape for micro in micros}) <= 5 * len({micro.tokens.shape[1] for micro in micros})


def test_sorting_by_length_wastes_little():
    """Rows of 10 to 500 tokens: under a tenth of all places is padding, where rows as they come would waste a half."""
    draw = np.random.default_rng(0)
    rows = rows_of([(8, int(length)) for length in draw.integers(2, 492, 400)])
    micros = micro_batches(rows, budget=4096, multiple=32, shards=1)
    places, tokens = sum(micro.tokens.size for micro in micros), sum(int(micro.lengths.sum()) for micro in micros)
    assert tokens / places > 0.9


def test_one_mini_batch_compiles_few_shapes():
    """Other rows of the same lengths give the same shapes: what compiles follows from lengths and their number alone."""
    lengths = [(5, int(n)) for n in np.random.default_rng(1).integers(1, 90, 64)]
    shapes = [
        {micro.tokens.shape for micro in micro_batches(rows_of(each), budget=512, multiple=32, shards=2)}
        for each in (lengths, lengths[::-1])
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) <= 6


def test_equal_lengths_keep_their_order():
    """The order of rows, and with it every sum's rounding, follows from the rows: a resumed run makes the same batches."""
    (micro,) = micro_batches(rows_of([(2, 3)] * 5), budget=100, multiple=1, shards=1)
    assert micro.rows.tolist() == [0, 1, 2, 3, 4]


def test_no_rows_no_batches():
    assert micro_batches([], budget=10, multiple=1, shards=2) == []


def test_a_row_longer_than_the_budget_stands_alone():
    micros = micro_batches(rows_of([(1, 99), (1, 1), (1, 1)]), budget=10, multiple=1, shards=1)
    assert [micro.tokens.shape for micro in micros] == [(1, 100), (2, 2)]


# --- per-row and per-token values -------------------------------------------------------------------------------------


def two_rows() -> MicroBatch:
    """Row 1 (prompt 3, response 2), filling, row 0 (prompt 1, response 4)."""
    rows = rows_of([(1, 4), (3, 2)])
    return micro_batch(rows, [1, 0], 3, 6)


def test_of_rows():
    micro = two_rows()
    values = np.float32([10, 20])
    assert of_rows(values, micro.rows).tolist() == [20, 10, 0]
    assert of_rows(values, micro.rows).dtype == np.float32


def test_aligned_by_hand():
    """Position j predicts token j + 1: a response after a prompt of 3 begins on position 2."""
    found = aligned([np.float32([1, 2, 3, 4]), np.float32([5, 6])], two_rows())
    assert found.tolist() == [[0, 0, 5, 6, 0, 0], [1, 2, 3, 4, 0, 0], [0, 0, 0, 0, 0, 0]]


@given(lengths=LENGTHS, **HOW)
@settings(max_examples=50, deadline=None)
def test_aligned_values_stand_where_their_token_is_predicted(
    lengths: list[tuple[int, int]], budget: int, multiple: int, shards: int
):
    """Each token's own id as its value: on position j stands token j + 1 where that belongs to the response, else 0."""
    rows = rows_of(lengths)
    values: list[Any] = [np.array(row.response, np.float32) for row in rows]
    for micro in micro_batches(rows, budget=budget, multiple=multiple, shards=shards):
        found, next_token = aligned(values, micro), np.pad(micro.tokens[:, 1:], ((0, 0), (0, 1)))
        position = np.arange(micro.tokens.shape[1])
        response = (position >= micro.prompt_lengths[:, None] - 1) & (position < micro.lengths[:, None] - 1)
        np.testing.assert_array_equal(found, np.where(response, next_token, 0))


def test_values_that_do_not_fit_are_not_cut():
    """A response longer than its row has places left is an error, not a shorter response."""
    with pytest.raises(ValueError, match="broadcast"):
        aligned([np.zeros(4, np.float32), np.zeros(9, np.float32)], two_rows())
