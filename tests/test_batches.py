"""Micro-batches: every response once, within the budget, in few shapes; values beside the tokens they belong to."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.config import Config, replaced
from crpo_jax.model.packed_attention import Packing, visible
from crpo_jax.update.batches import (
    MicroBatch,
    Row,
    align_to_tokens,
    count_places,
    crpo_mini_batches,
    find_groups,
    micro_batches,
    select_rows,
    supervised_batches,
)
from crpo_jax.update.packing import Group, pack_groups

GROUPS = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(0, 60), min_size=1, max_size=8)), min_size=1, max_size=16
)
LIMITS = {"budget": st.integers(1, 400), "multiple": st.sampled_from([1, 4, 32]), "shards": st.sampled_from([1, 2, 8])}


def rows_of(groups: list[tuple[int, list[int]]]) -> list[Row]:
    """Rows in which no two tokens are equal but those of a group's prompt, so that a misplaced token shows."""
    count, rows = iter(range(1, 10**6)), list[Row]()
    for prompt, responses in groups:
        shared = [next(count) for _ in range(prompt)]
        rows += [Row(shared, [next(count) for _ in range(response)]) for response in responses]
    return rows


def packed(rows: list[Row], **limits: int) -> list[MicroBatch]:
    return micro_batches(rows, **{"budget": 100, "multiple": 1, "shards": 1, "longest": 64} | limits)


@given(groups=GROUPS, **LIMITS)
@settings(max_examples=60, deadline=None)
def test_every_response_exactly_once(groups: list[tuple[int, list[int]]], budget: int, multiple: int, shards: int):
    rows = rows_of(groups)
    micros = packed(rows, budget=budget, multiple=multiple, shards=shards)
    assert sorted(which for micro in micros for which in micro.rows.tolist() if which >= 0) == list(range(len(rows)))
    for micro in micros:
        for place, which in enumerate(micro.rows):
            response = rows[which].response if which >= 0 else []
            assert micro.lengths[place] == len(response)
            assert micro.tokens[place].tolist() == response + [0] * (micro.tokens.shape[1] - len(response))
        assert all(array.dtype == np.int32 for name, array in micro._asdict().items() if name != "rows")


@given(groups=GROUPS, **LIMITS)
@settings(max_examples=60, deadline=None)
def test_a_response_sees_its_prompt_and_itself(
    groups: list[tuple[int, list[int]]], budget: int, multiple: int, shards: int
):
    """What each place that predicts sees, in the order of positions, is the prompt and the response so far; its target
    is the next token."""
    rows = rows_of(groups)
    for micro in packed(rows, budget=budget, multiple=multiple, shards=shards):
        share = len(micro.rows) // shards
        assert (micro.targets >= 0).sum() == micro.lengths.sum()
        for place, which in enumerate(micro.rows):
            if which < 0:
                continue
            shard, whole = place // share, [*rows[which].prompt, *rows[which].response]
            packing = Packing(*(x[shard] for x in (micro.positions, micro.sequences, micro.prompts)))
            for j in range(0, int(micro.lengths[place]), 7):
                at = micro.starts[place] + j
                query = Packing(*(x[at : at + 1] for x in packing))
                seen = np.flatnonzero(visible(query, packing, 0)[0])
                order = seen[np.argsort(packing.positions[seen])]
                n = len(rows[which].prompt) + j
                assert packing.positions[order].tolist() == list(range(n))
                assert micro.packed_tokens[shard, order].tolist() == whole[:n]
                assert micro.targets[shard, at] == whole[n]
                assert seen.max() == at  # nothing that stands later in the row


@given(groups=GROUPS, **LIMITS)
@settings(max_examples=60, deadline=None)
def test_shapes(groups: list[tuple[int, list[int]]], budget: int, multiple: int, shards: int):
    """One shape for all, a row for each shard within the budget or one response alone; lengths a multiple."""
    rows = rows_of(groups)
    micros = packed(rows, budget=budget, multiple=multiple, shards=shards)
    shapes = {(micro.packed_tokens.shape, micro.tokens.shape) for micro in micros}
    (((c, t), (b, _)),) = shapes
    assert c == shards
    assert b % shards == 0
    assert t % multiple == 0
    longest = max(row.length - 1 for row in rows)
    assert t <= max(budget, -(-longest // multiple) * multiple) or t == multiple
    places = [size for micro in micros for size in (micro.sequences >= 0).sum(axis=1)]
    assert sum(places) >= count_places(rows)


def simulated_groups(rng: np.random.Generator, count: int) -> list[Group]:
    """Lengths as on MedQA: prompts of about 390 tokens, five lognormal responses of mean 684, cut at 4,096."""
    groups = []
    for number in range(count):
        lengths = np.clip(rng.lognormal(np.log(684) - 0.18, 0.6, 5), 1, 4096).astype(int).tolist()
        prompt = int(np.clip(rng.normal(390, 100), 120, 1024))
        groups.append(Group(prompt - 1, list(range(5 * number, 5 * number + 5)), lengths))
    return groups


@pytest.mark.parametrize(("prompts", "shards"), [(16, 1), (16, 8), (64, 8)])
def test_fifty_steps_waste_little_in_few_shapes(prompts: int, shards: int):
    """Less than 5% of places are filling, and few hold a prompt's second copy; packing takes no time that shows."""
    rng, shapes, filling, copies, places, spent = np.random.default_rng(0), set(), 0, 0, 0, 0.0
    for _ in range(50 if prompts < 64 else 10):
        groups = simulated_groups(rng, prompts)
        began = time.process_time()
        result = pack_groups(groups, budget=8192, multiple=256, shards=shards)
        spent += time.process_time() - began
        shapes.add((result.length, result.most))
        held = sum(group.places for row in result.rows for group in row)
        places += result.length * len(result.rows)
        filling += result.length * len(result.rows) - held
        copies += held - sum(group.places for group in groups)
    assert filling / places < 0.05
    assert copies / places < 0.03
    assert len(shapes) <= 12
    assert spent / 50 < 0.5


def test_a_group_shares_its_prompt_once():
    rows = rows_of([(10, [3, 4, 5]), (10, [2])])
    (micro,) = packed(rows, budget=32)
    assert (micro.packed_tokens.shape, count_places(rows)) == ((1, 9 + 12 + 9 + 2), 32)


def test_only_neighbours_with_equal_prompts_are_a_group():
    rows = [Row([1, 2], [3]), Row([1, 2], [4]), Row([5], [6]), Row([1, 2], [7])]
    assert [group.rows for group in find_groups(rows)] == [[0, 1], [2], [3]]


def test_a_group_may_be_cut():
    """A prompt of 10 with responses of 20, 20 and 20 in rows of at most 50: the prompt stands in both."""
    micros = packed(rows_of([(11, [20, 20, 20])]), budget=50)
    assert sorted((micro.lengths > 0).sum() for micro in micros) == [1, 2]
    assert all(micro.packed_tokens.shape == (1, 50) for micro in micros)


def test_the_order_follows_from_the_rows():
    """The order of rows decides how sums are rounded; a resumed run repeats it."""
    rows = rows_of([(3, [3] * 4)] * 5)
    first, second = (packed(rows, budget=30, shards=2) for _ in range(2))
    assert [micro.rows.tolist() for micro in first] == [micro.rows.tolist() for micro in second]


def test_no_rows_no_batches():
    assert packed([]) == []


def test_a_row_longer_than_the_budget_sets_the_length():
    micros = packed(rows_of([(1, [60]), (1, [1]), (1, [1])]), budget=10)
    assert {micro.packed_tokens.shape for micro in micros} == {(1, 60)}


def test_mini_batches_are_whole_groups_with_denominators_of_their_own():
    """4 groups of 2 in mini-batches of 2 groups; in the second one response does not count."""
    changed = {"crpo.mini_batch_prompts": 2, "crpo.group_size": 2, "parallel.micro_batch_tokens": 8}
    run = replaced(Config(), changed | {"parallel.length_multiple": 1})
    rows = rows_of([(1, [1]), (1, [2]), (2, [3]), (1, [4]), (2, [1]), (1, [3]), (1, [5]), (3, [2])])
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
                assert batch.tokens[place, :end].tolist() == row.response
                assert batch.sampler[place, :end].tolist() == row.response
                assert batch.weights[place] == pytest.approx(1 / tokens if counted[which] else 0)


def test_supervised_batches_share_one_denominator():
    rows = rows_of([(1, [1]), (2, [4]), (1, [3])])
    parallel = replaced(Config(), {"parallel.micro_batch_tokens": 6, "parallel.length_multiple": 1}).parallel
    batches = supervised_batches(rows, parallel, 1)
    weights = np.concatenate([batch.weights[batch.lengths > 0] for batch in batches])
    assert len(batches) > 1
    assert weights == pytest.approx([1 / 8] * 3)


# --- per-row and per-token values -------------------------------------------------------------------------------------


def two_rows() -> MicroBatch:
    """Row 0 (response of 4), row 1 (response of 2), filling."""
    (micro,) = packed(rows_of([(1, [4]), (3, [2])]), longest=6)
    return micro


def test_select_rows():
    values = np.float32([10, 20])
    assert select_rows(values, two_rows().rows).tolist() == [10, 20, 0, 0]
    assert select_rows(values, two_rows().rows).dtype == np.float32


def test_align_to_tokens_by_hand():
    aligned = align_to_tokens([np.float32([1, 2, 3, 4]), np.float32([5, 6])], two_rows())
    assert aligned.tolist() == [[1, 2, 3, 4, 0, 0], [5, 6, 0, 0, 0, 0], [0] * 6, [0] * 6]


@given(groups=GROUPS, **LIMITS)
@settings(max_examples=30, deadline=None)
def test_values_are_aligned_with_their_tokens(
    groups: list[tuple[int, list[int]]], budget: int, multiple: int, shards: int
):
    """With each token's id as its value."""
    rows = rows_of(groups)
    values: list[Any] = [np.array(row.response, np.float32) for row in rows]
    for micro in packed(rows, budget=budget, multiple=multiple, shards=shards):
        np.testing.assert_array_equal(align_to_tokens(values, micro), micro.tokens)


def test_values_that_do_not_fit_are_not_cut():
    """More values than the response has tokens are an error, not a shorter response."""
    with pytest.raises(ValueError, match="broadcast"):
        align_to_tokens([np.zeros(4, np.float32), np.zeros(9, np.float32)], two_rows())
