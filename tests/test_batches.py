"""Micro-batches: every row once, within the budget, in few shapes; values on positions that predict their tokens."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.config import Config, replaced
from crpo_jax.update.batches import (
    MicroBatch,
    Row,
    align_to_tokens,
    crpo_mini_batches,
    micro_batches,
    pad_rows,
    select_rows,
    supervised_batches,
)

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=60)
LIMITS = {"budget": st.integers(1, 400), "multiple": st.sampled_from([1, 4, 32]), "shards": st.sampled_from([1, 2, 8])}


def rows_of(lengths: list[tuple[int, int]]) -> list[Row]:
    """Rows in which no two tokens are equal, so that a misplaced token shows."""
    count = iter(range(1, 10**6))
    return [
        Row([next(count) for _ in range(prompt)], [next(count) for _ in range(response)])
        for prompt, response in lengths
    ]


@given(lengths=LENGTHS, **LIMITS)
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


@given(lengths=LENGTHS, **LIMITS)
@settings(max_examples=100, deadline=None)
def test_shapes(lengths: list[tuple[int, int]], budget: int, multiple: int, shards: int):
    """Within the budget on every shard, or one row alone; lengths a multiple, not longer than the longest row needs."""
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
    """Rows of 10 to 500 tokens: padding is less than a tenth; in arrival order it would be a half."""
    draw = np.random.default_rng(0)
    rows = rows_of([(8, int(length)) for length in draw.integers(2, 492, 400)])
    micros = micro_batches(rows, budget=4096, multiple=32, shards=1)
    tokens, computed = sum(int(micro.lengths.sum()) for micro in micros), sum(micro.tokens.size for micro in micros)
    assert tokens / computed > 0.9


def test_one_mini_batch_compiles_few_shapes():
    """Other rows of the same lengths give the same shapes: they follow from lengths and their number alone."""
    lengths = [(5, int(n)) for n in np.random.default_rng(1).integers(1, 90, 64)]
    shapes = [
        {micro.tokens.shape for micro in micro_batches(rows_of(each), budget=512, multiple=32, shards=2)}
        for each in (lengths, lengths[::-1])
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) <= 6


def test_equal_lengths_keep_their_order():
    """The order of rows decides how sums are rounded; it follows from the rows, so a resumed run repeats it."""
    (micro,) = micro_batches(rows_of([(2, 3)] * 5), budget=100, multiple=1, shards=1)
    assert micro.rows.tolist() == [0, 1, 2, 3, 4]


def test_no_rows_no_batches():
    assert micro_batches([], budget=10, multiple=1, shards=2) == []


def test_a_row_longer_than_the_budget_stands_alone():
    micros = micro_batches(rows_of([(1, 99), (1, 1), (1, 1)]), budget=10, multiple=1, shards=1)
    assert [micro.tokens.shape for micro in micros] == [(1, 100), (2, 2)]


def test_mini_batches_are_whole_groups_with_denominators_of_their_own():
    """4 groups of 2 in mini-batches of 2 groups; in the second one response does not count."""
    changed = {"crpo.mini_batch_prompts": 2, "crpo.group_size": 2, "parallel.micro_batch_tokens": 8}
    run = replaced(Config(), changed | {"parallel.length_multiple": 1})
    rows = rows_of([(1, 1), (1, 2), (2, 3), (1, 4), (2, 1), (1, 3), (1, 5), (3, 2)])
    counted = np.array([True] * 7 + [False])
    logprobs, advantages = [np.float32(row.response) for row in rows], np.arange(8, dtype=np.float32)
    mini_batches = crpo_mini_batches(rows, logprobs, advantages, counted, run, 1)
    assert [sum(int((batch.lengths > 0).sum()) for batch in batches) for batches in mini_batches] == [4, 4]
    for first, tokens, batches in ((0, 10, mini_batches[0]), (4, 9, mini_batches[1])):
        assert len(batches) > 1
        for batch in batches:
            for place in np.flatnonzero(batch.lengths):
                which = int(batch.advantages[place])
                row, end = rows[which], batch.lengths[place]
                assert first <= which < first + 4
                assert batch.tokens[place, :end].tolist() == [*row.prompt, *row.response]
                assert batch.sampler[place, len(row.prompt) - 1 : end - 1].tolist() == row.response
                assert batch.weights[place] == pytest.approx(1 / tokens if counted[which] else 0)


def test_supervised_batches_share_one_denominator():
    rows = rows_of([(1, 1), (2, 4), (1, 3)])
    parallel = replaced(Config(), {"parallel.micro_batch_tokens": 8, "parallel.length_multiple": 1}).parallel
    batches = supervised_batches(rows, parallel, 1)
    weights = np.concatenate([batch.weights[batch.lengths > 0] for batch in batches])
    assert len(batches) > 1
    assert weights == pytest.approx([1 / 8] * 3)


# --- per-row and per-token values -------------------------------------------------------------------------------------


def two_rows() -> MicroBatch:
    """Row 1 (prompt 3, response 2), row 0 (prompt 1, response 4), filling."""
    rows = rows_of([(1, 4), (3, 2)])
    return pad_rows(rows, [1, 0], 3, 6)


def test_select_rows():
    micro = two_rows()
    values = np.float32([10, 20])
    assert select_rows(values, micro.rows).tolist() == [20, 10, 0]
    assert select_rows(values, micro.rows).dtype == np.float32


def test_align_to_tokens_by_hand():
    """Position j predicts token j + 1: a response after a prompt of 3 begins on position 2."""
    aligned = align_to_tokens([np.float32([1, 2, 3, 4]), np.float32([5, 6])], two_rows())
    assert aligned.tolist() == [[0, 0, 5, 6, 0, 0], [1, 2, 3, 4, 0, 0], [0, 0, 0, 0, 0, 0]]


@given(lengths=LENGTHS, **LIMITS)
@settings(max_examples=50, deadline=None)
def test_values_are_aligned_with_the_predictions_of_their_tokens(
    lengths: list[tuple[int, int]], budget: int, multiple: int, shards: int
):
    """With each token's id as its value, position j holds token j + 1 if that belongs to the response, else 0."""
    rows = rows_of(lengths)
    values: list[Any] = [np.array(row.response, np.float32) for row in rows]
    for micro in micro_batches(rows, budget=budget, multiple=multiple, shards=shards):
        aligned, next_token = align_to_tokens(values, micro), np.pad(micro.tokens[:, 1:], ((0, 0), (0, 1)))
        position = np.arange(micro.tokens.shape[1])
        response = (position >= micro.prompt_lengths[:, None] - 1) & (position < micro.lengths[:, None] - 1)
        np.testing.assert_array_equal(aligned, np.where(response, next_token, 0))


def test_values_that_do_not_fit_are_not_cut():
    """A response longer than the rest of its row is an error, not a shorter response."""
    with pytest.raises(ValueError, match="broadcast"):
        align_to_tokens([np.zeros(4, np.float32), np.zeros(9, np.float32)], two_rows())
