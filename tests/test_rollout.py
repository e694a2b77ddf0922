"""The sampler against the plainest loop there is: a whole forward pass per token, on one device, all rows to the end."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHAPE, mesh_of
from jax.sharding import Mesh

from crpo_jax.config import InputError
from crpo_jax.model.placement import to_sampling
from crpo_jax.model.qwen2 import Qwen2, Shard, hidden_states, logits
from crpo_jax.rollout.draw import Sampling, draw, row_keys
from crpo_jax.rollout.engine import Engine, Response
from crpo_jax.update.logprobs import token_logprobs

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

STOPS = (0, 7, 19)
"""Several, and among them the id that stands in padding, as in Qwen: no mask may come from token ids."""
HOW = Sampling(0.9, stop_ids=STOPS)
WIDTH, GROUP = 10, 3
LENGTHS = (3, 1, 35, 5, 2, 1, 8)  # 35 is past the multiple that prompts are padded to
PROMPTS = [np.random.default_rng(length * 10 + i).integers(SHAPE.v, size=length).tolist() for i, length in enumerate(LENGTHS)]
KEY = jax.random.key(4)


def plain(model: Qwen2, how: Sampling, prompts: Sequence[Sequence[int]] = PROMPTS, width: int = WIDTH) -> list[list[Response]]:
    """`GROUP` responses per prompt; a row that ended goes on unread."""
    rows = [(i, g, list(prompt)) for i, prompt in enumerate(prompts) for g in range(GROUP)]
    keys = row_keys(KEY, jnp.arange(len(prompts)), jnp.arange(GROUP))

    @jax.jit
    def step(model: Qwen2, tokens: jax.Array, lengths: jax.Array, position: jax.Array) -> Any:
        last = hidden_states(model, tokens, SHAPE)[jnp.arange(len(rows)), lengths - 1]
        return draw(logits(model, last), keys, position, how, Shard(None), SHAPE.v)

    logprobs: list[list[float]] = [[] for _ in rows]
    for position in range(width):
        tokens = np.zeros((len(rows), max(map(len, prompts)) + width), np.int32)
        for at, (_, _, row) in zip(tokens, rows, strict=True):
            at[: len(row)] = row
        found = step(model, tokens, jnp.array([len(row) for _, _, row in rows]), jnp.int32(position))
        for (_, _, row), kept, token, logprob in zip(rows, logprobs, *map(np.asarray, found), strict=True):
            row.append(int(token))
            kept.append(float(logprob))
    out: list[list[Response]] = [[] for _ in prompts]
    for (i, g, row), kept in zip(rows, logprobs, strict=True):
        response = row[len(prompts[i]) :]
        stop = next((place for place, token in enumerate(response) if token in how.stop_ids), None)
        length = width if stop is None else stop + 1
        out[i].append(Response(i, g, np.array(response[:length]), np.array(kept[:length]), stop is not None))
    return out


def tokens_of(groups: Sequence[Sequence[Response]]) -> list[list[tuple[list[int], bool]]]:
    return [[(response.tokens.tolist(), response.stopped) for response in group] for group in groups]


@pytest.fixture(scope="module")
def expected(model: Qwen2) -> list[list[Response]]:
    return plain(model, HOW)


@pytest.fixture(scope="module")
def weights(model: Qwen2, one_device: Mesh) -> Qwen2:
    return to_sampling(SHAPE, one_device, "float32")(model)


def test_the_expected_responses_hold_every_case(expected: list[list[Response]]):
    """Else the comparisons below would say less than they seem to."""
    responses = [response for group in expected for response in group]
    lengths = {len(response.tokens) for response in responses if response.stopped}
    assert 1 in lengths, "a first token that stops"
    assert len(lengths) >= 3, "rows of one wave that stop at different times"
    assert sum(not response.stopped for response in responses) >= 3, "rows that are cut"
    assert {int(response.tokens[-1]) for response in responses if response.stopped} == set(STOPS), "every stop token"
    assert any(len({str(response.tokens) for response in group}) == GROUP for group in expected), "a group of different responses"


# --- the same answer on every mesh ------------------------------------------------------------------------------------


def test_same_tokens_as_the_plain_loop_on_every_mesh(mesh: Mesh, model: Qwen2, expected: list[list[Response]]):
    """Contract 2. On 2x4 and 1x8 there are more model shards than KV heads. The cache grows once on the way."""
    made = Engine(SHAPE, mesh, HOW, WIDTH, slots=128, chunk=6).generate(to_sampling(SHAPE, mesh, "float32")(model), PROMPTS, key=KEY, group=GROUP)
    assert tokens_of(made) == tokens_of(expected)
    for found, wanted in zip([r for group in made for r in group], [r for group in expected for r in group], strict=True):
        assert (found.prompt, found.sample) == (wanted.prompt, wanted.sample)
        assert found.tokens.shape == found.logprobs.shape
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=1e-4)


def test_sampler_log_probs_are_the_trainers(model: Qwen2, weights: Qwen2, one_device: Mesh):
    """Contract 3, for every token of every response: at most 1e-4 in float32, the temperature in both."""
    made = Engine(SHAPE, one_device, HOW, WIDTH, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=GROUP)
    responses = [response for group in made for response in group]
    tokens = np.zeros((len(responses), 48), np.int32)
    for row, response in zip(tokens, responses, strict=True):
        whole = [*PROMPTS[response.prompt], *response.tokens]
        row[: len(whole)] = whole

    @jax.jit
    def trainer(model: Qwen2, tokens: jax.Array) -> Any:
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        return token_logprobs(model, hidden_states(model, tokens, SHAPE), targets, HOW.temperature, 48, with_entropy=False)[0]

    found = np.asarray(trainer(model, tokens))
    for row, response in zip(found, responses, strict=True):
        first = len(PROMPTS[response.prompt]) - 1
        np.testing.assert_allclose(row[first : first + len(response.tokens)], response.logprobs, rtol=0, atol=1e-4)


def test_greedy_is_the_plain_loop(model: Qwen2, weights: Qwen2, one_device: Mesh):
    how = Sampling(temperature=0, stop_ids=STOPS)
    made = Engine(SHAPE, one_device, how, WIDTH, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=GROUP)
    assert tokens_of(made) == tokens_of(plain(model, how))
    assert all(len({str(response.tokens) for response in group}) == 1 for group in made)


# --- the schedule decides when, never what ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "chunk"),
    [
        (128, WIDTH),  # one wave, the cache whole from the start
        (6, 6),  # two prompts a wave, the cache grown once
        (1, 64),  # fewer slots than a group has rows
    ],
)
def test_slots_and_chunks_do_not_change_a_token(slots: int, chunk: int, weights: Qwen2, one_device: Mesh, expected: list[list[Response]]):
    made = Engine(SHAPE, one_device, HOW, WIDTH, slots=slots, chunk=chunk).generate(weights, PROMPTS, key=KEY, group=GROUP)
    assert tokens_of(made) == tokens_of(expected)


def test_more_prompts_than_slots_on_data_shards(model: Qwen2, expected: list[list[Response]]):
    """4 shards of one prompt each: the second wave has 3 prompts and a row of filling, which must never run."""
    mesh = mesh_of(4, 2)
    made = Engine(SHAPE, mesh, HOW, WIDTH, slots=GROUP, chunk=WIDTH).generate(
        to_sampling(SHAPE, mesh, "float32")(model), PROMPTS, key=KEY, group=GROUP
    )
    assert tokens_of(made) == tokens_of(expected)


def test_the_order_of_prompts_does_not_change_a_token(weights: Qwen2, one_device: Mesh, expected: list[list[Response]]):
    """With their numbers beside them, prompts may come in any order and company; responses come back in the order asked."""
    how = Engine(SHAPE, one_device, HOW, WIDTH, slots=6, chunk=6)
    for order in ([6, 5, 4, 3, 2, 1, 0], [2, 0, 5]):
        made = how.generate(weights, [PROMPTS[i] for i in order], key=KEY, group=GROUP, ids=order)
        assert tokens_of(made) == [tokens_of(expected)[i] for i in order]
        assert [[(r.prompt, r.sample) for r in group] for group in made] == [[(place, g) for g in range(GROUP)] for place in range(len(order))]


def test_a_larger_group_begins_with_the_smaller(weights: Qwen2, one_device: Mesh, expected: list[list[Response]]):
    made = Engine(SHAPE, one_device, HOW, WIDTH, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=1)
    assert tokens_of(made) == [group[:1] for group in tokens_of(expected)]


def test_another_key_or_number_draws_other_tokens(weights: Qwen2, one_device: Mesh, expected: list[list[Response]]):
    how = Engine(SHAPE, one_device, HOW, WIDTH, chunk=WIDTH)
    assert tokens_of(how.generate(weights, PROMPTS, key=jax.random.key(5), group=GROUP)) != tokens_of(expected)
    moved = how.generate(weights, PROMPTS, key=KEY, group=GROUP, ids=range(1, len(PROMPTS) + 1))
    assert sum(a != b for a, b in zip(tokens_of(moved), tokens_of(expected), strict=True)) >= 5


# --- where a response ends --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited(weights: Qwen2, one_device: Mesh) -> tuple[list[int], list[list[Response]]]:
    limits = [1, 2, 10, 4, 3, 9, 5]
    return limits, Engine(SHAPE, one_device, HOW, WIDTH, chunk=6).generate(weights, PROMPTS, key=KEY, group=GROUP, limits=limits)


def test_limits_cut_and_change_nothing_else(limited: tuple[list[int], list[list[Response]]], expected: list[list[Response]]):
    limits, made = limited
    for limit, found, whole in zip(limits, made, expected, strict=True):
        for one, other in zip(found, whole, strict=True):
            assert one.tokens.tolist() == other.tokens[:limit].tolist()
            assert one.stopped == (other.stopped and len(other.tokens) <= limit)


def test_the_stop_token_belongs_to_the_response_and_nothing_after_it(limited: tuple[list[int], list[list[Response]]]):
    limits, made = limited
    for limit, group in zip(limits, made, strict=True):
        for response in group:
            inside = [token in STOPS for token in response.tokens.tolist()]
            assert inside.index(True) == len(inside) - 1 if response.stopped else (not any(inside) and len(inside) == limit)
            assert len(response.logprobs) == len(response.tokens)
            assert np.all(response.logprobs < 0)


def test_a_stop_token_drawn_last_is_a_stop(weights: Qwen2, one_device: Mesh, expected: list[list[Response]]):
    """At the very limit a response that says it is done is done, not truncated."""
    which = next((i, g) for i, group in enumerate(expected) for g, response in enumerate(group) if response.stopped and len(response.tokens) > 1)
    limit = len(expected[which[0]][which[1]].tokens)
    limits = [limit] * len(PROMPTS)
    made = Engine(SHAPE, one_device, HOW, WIDTH, chunk=6).generate(weights, PROMPTS, key=KEY, group=GROUP, limits=limits)
    assert made[which[0]][which[1]].stopped
    assert len(made[which[0]][which[1]].tokens) == limit


def test_no_stop_tokens_at_all(weights: Qwen2, one_device: Mesh):
    made = Engine(SHAPE, one_device, Sampling(0.9), WIDTH, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=GROUP)
    assert all(len(response.tokens) == WIDTH and not response.stopped for group in made for response in group)


def test_one_token_responses(weights: Qwen2, one_device: Mesh, expected: list[list[Response]]):
    """The first token comes from the prefill alone."""
    made = Engine(SHAPE, one_device, HOW, 1, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=GROUP)
    assert [[token[:1] for token, _ in group] for group in tokens_of(expected)] == [[token for token, _ in group] for group in tokens_of(made)]


# --- what a caller sees -----------------------------------------------------------------------------------------------


def test_finished_hands_over_every_wave(weights: Qwen2, one_device: Mesh):
    """Each response once, two prompts at a time, short prompts first: scoring goes on while later waves decode."""
    waves: list[list[Response]] = []
    made = Engine(SHAPE, one_device, HOW, WIDTH, slots=6, chunk=6).generate(weights, PROMPTS, key=KEY, group=GROUP, finished=waves.append)
    assert [len(wave) for wave in waves] == [6, 6, 6, 3]
    told = {(r.prompt, r.sample): r.tokens.tolist() for wave in waves for r in wave}
    assert told == {(r.prompt, r.sample): r.tokens.tolist() for group in made for r in group}
    assert [len(PROMPTS[wave[0].prompt]) for wave in waves] == sorted(len(PROMPTS[wave[0].prompt]) for wave in waves)


def test_no_prompts(weights: Qwen2, one_device: Mesh):
    assert Engine(SHAPE, one_device, HOW, WIDTH).generate(weights, [], key=KEY) == []


@pytest.mark.parametrize(
    ("prompts", "limits", "line"),
    [
        ([[1], []], None, "prompt 1: expected at least 1 token and a limit between 1 and 10, got 0 tokens, limit 10"),
        ([[1]], [0], "prompt 0: expected at least 1 token and a limit between 1 and 10, got 1 tokens, limit 0"),
        ([[1]], [11], "prompt 0: expected at least 1 token and a limit between 1 and 10, got 1 tokens, limit 11"),
    ],
)
def test_refused(prompts: list[list[int]], limits: list[int] | None, line: str, weights: Qwen2, one_device: Mesh):
    with pytest.raises(InputError) as error:
        Engine(SHAPE, one_device, HOW, WIDTH).generate(weights, prompts, key=KEY, limits=limits)
    assert str(error.value) == line


def test_nothing_is_compiled_twice(weights: Qwen2, one_device: Mesh, compiled: list[str]):
    """Other prompts, limits and keys of the same padded shapes enter the same programs."""
    how = Engine(SHAPE, one_device, Sampling(0.97, stop_ids=STOPS), WIDTH, slots=9, chunk=WIDTH)  # a temperature that no other test has
    keys = [jax.random.key(seed) for seed in range(3)]
    how.generate(weights, PROMPTS, key=KEY, group=GROUP)
    assert len(compiled) >= 2  # the listener hears
    compiled.clear()
    for seed, key in enumerate(keys):
        others = [np.random.default_rng(seed).integers(SHAPE.v, size=length).tolist() for length in reversed(LENGTHS)]
        how.generate(weights, others, key=key, group=GROUP, limits=[WIDTH - seed] * len(others))
    assert compiled == []
