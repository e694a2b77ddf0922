"""The engine against the simplest loop: a whole forward pass per token, on one device, every row to the full length."""

import doctest
import gc
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHAPE, mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import crpo_jax.rollout
from crpo_jax.errors import InputError
from crpo_jax.model.decode import SamplerWeights, Shard
from crpo_jax.model.huggingface import save_model
from crpo_jax.model.lora import Policy
from crpo_jax.model.placement import to_sampler
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.mesh import DATA, MODEL
from crpo_jax.rollout.draw import Sampling, draw_tokens, row_keys
from crpo_jax.rollout.engine import DecodeBatch, Engine, Response, RolloutProgress, Scheduler
from crpo_jax.rollout.sample import DecodedChunk, SamplingPrograms, sampling_programs, sharded_call
from crpo_jax.update.logprobs import token_logprobs

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

STOPS = (0, 7, 19)
"""Several, and among them the id that stands in padding, as in Qwen: no mask may come from token ids."""
SAMPLING = Sampling(0.9, stop_ids=STOPS)
WIDTH, GROUP = 10, 3
LENGTHS = (3, 1, 35, 5, 2, 1, 8)  # 35 is past the multiple that prompts are padded to
PROMPTS = [
    np.random.default_rng(length * 10 + i).integers(SHAPE.v, size=length).tolist() for i, length in enumerate(LENGTHS)
]
KEY = jax.random.key(4)


def simple_loop(
    model: Transformer, sampling: Sampling, prompts: Sequence[Sequence[int]] = PROMPTS, width: int = WIDTH
) -> list[list[Response]]:
    """`GROUP` responses per prompt; each row is decoded to the full length and then cut."""
    rows = [(i, g, list(prompt)) for i, prompt in enumerate(prompts) for g in range(GROUP)]
    keys = row_keys(KEY, *(jnp.array(numbers) for numbers in zip(*((i, g) for i, g, _ in rows), strict=True)))

    @jax.jit
    def step(model: Transformer, tokens: jax.Array, lengths: jax.Array, position: jax.Array) -> Any:
        last = model(tokens)[jnp.arange(len(rows)), lengths - 1]
        return draw_tokens(model.logits(last), keys, jnp.full(len(rows), position), sampling, Shard(None), SHAPE.v)

    logprobs: list[list[float]] = [[] for _ in rows]
    for position in range(width):
        tokens = np.zeros((len(rows), max(map(len, prompts)) + width), np.int32)
        for at, (_, _, row) in zip(tokens, rows, strict=True):
            at[: len(row)] = row
        drawn = step(model, tokens, jnp.array([len(row) for _, _, row in rows]), jnp.int32(position))
        for (_, _, row), row_logprobs, token, logprob in zip(rows, logprobs, *map(np.asarray, drawn), strict=True):
            row.append(int(token))
            row_logprobs.append(float(logprob))
    groups: list[list[Response]] = [[] for _ in prompts]
    for (i, g, row), row_logprobs in zip(rows, logprobs, strict=True):
        response = row[len(prompts[i]) :]
        stop = next((place for place, token in enumerate(response) if token in sampling.stop_ids), None)
        length = width if stop is None else stop + 1
        arrays = np.array(response[:length]), np.array(row_logprobs[:length])
        groups[i].append(Response(i, g, *arrays, stop is not None))
    return groups


def tokens_of(groups: Sequence[Sequence[Response]]) -> list[list[tuple[list[int], bool]]]:
    return [[(response.tokens.tolist(), response.stopped) for response in group] for group in groups]


@pytest.fixture(scope="module")
def expected(model: Transformer) -> list[list[Response]]:
    return simple_loop(model, SAMPLING)


@pytest.fixture(scope="module")
def weights(model: Transformer, one_device: Mesh) -> SamplerWeights:
    return to_sampler(SHAPE, one_device, "float32")(Policy(model))


def test_the_expected_responses_cover_every_case(expected: list[list[Response]]):
    """Otherwise the comparisons below would prove less than they seem to."""
    responses = [response for group in expected for response in group]
    lengths = {len(response.tokens) for response in responses if response.stopped}
    assert 1 in lengths, "a first token that stops"
    assert len(lengths) >= 3, "rows of one wave that stop at different times"
    assert sum(not response.stopped for response in responses) >= 3, "rows that are cut"
    assert {int(response.tokens[-1]) for response in responses if response.stopped} == set(STOPS), "every stop token"
    assert any(len({str(response.tokens) for response in group}) == GROUP for group in expected), (
        "a group of different responses"
    )


# --- the same tokens on every mesh ------------------------------------------------------------------------------------


def test_same_tokens_as_the_simple_loop_on_every_mesh(mesh: Mesh, model: Transformer, expected: list[list[Response]]):
    """Contract 2. On 2x4 and 1x8 there are more model shards than KV heads. The cache grows once on the way."""
    groups = Engine(SHAPE, mesh, SAMPLING, WIDTH, slots=128, chunk=6).generate(
        to_sampler(SHAPE, mesh, "float32")(Policy(model)), PROMPTS, key=KEY, group=GROUP
    )
    assert tokens_of(groups) == tokens_of(expected)
    for response, reference in zip(itertools.chain(*groups), itertools.chain(*expected), strict=True):
        assert (response.prompt, response.sample) == (reference.prompt, reference.sample)
        assert response.tokens.shape == response.logprobs.shape
        np.testing.assert_allclose(response.logprobs, reference.logprobs, rtol=0, atol=1e-4)


def test_sampler_log_probs_are_the_trainers(model: Transformer, weights: SamplerWeights, one_device: Mesh):
    """Contract 3, for every token of every response: at most 1e-4 in float32, the temperature in both."""
    groups = Engine(SHAPE, one_device, SAMPLING, WIDTH, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=GROUP)
    responses = [response for group in groups for response in group]
    tokens = np.zeros((len(responses), 48), np.int32)
    for row, response in zip(tokens, responses, strict=True):
        whole = [*PROMPTS[response.prompt], *response.tokens]
        row[: len(whole)] = whole

    @jax.jit
    def trainer(model: Transformer, tokens: jax.Array) -> Any:
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        return token_logprobs(model, model(tokens), targets, SAMPLING.temperature, 48, with_entropy=False)[0]

    for row, response in zip(np.asarray(trainer(model, tokens)), responses, strict=True):
        first = len(PROMPTS[response.prompt]) - 1
        np.testing.assert_allclose(row[first : first + len(response.tokens)], response.logprobs, rtol=0, atol=1e-4)


def test_greedy_is_the_simple_loop(model: Transformer, weights: SamplerWeights, one_device: Mesh):
    sampling = Sampling(temperature=0, stop_ids=STOPS)
    groups = Engine(SHAPE, one_device, sampling, WIDTH, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=GROUP)
    assert tokens_of(groups) == tokens_of(simple_loop(model, sampling))
    assert all(len({str(response.tokens) for response in group}) == 1 for group in groups)


# --- the schedule decides when, never what ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "chunk", "response_slots"),
    [
        (128, WIDTH, 128),  # one wave, one chunk
        (128, 2, 4),  # the cache grows, then rows are gathered as others finish
        (6, 2, 4),  # two prompts per wave: the rest of each wave is set aside and merged
        (1, 3, 128),  # fewer slots than a group has rows
    ],
)
def test_slots_and_chunks_do_not_change_a_token(
    slots: int,
    chunk: int,
    response_slots: int,
    weights: SamplerWeights,
    one_device: Mesh,
    expected: list[list[Response]],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("crpo_jax.rollout.engine.RESPONSE_SLOTS", response_slots)
    groups = Engine(SHAPE, one_device, SAMPLING, WIDTH, slots=slots, chunk=chunk).generate(
        weights, PROMPTS, key=KEY, group=GROUP
    )
    assert tokens_of(groups) == tokens_of(expected)


@settings(max_examples=6)
@given(
    order=st.permutations(range(len(PROMPTS))),
    count=st.integers(1, len(PROMPTS)),
    limits=st.lists(st.integers(1, WIDTH), min_size=len(PROMPTS), max_size=len(PROMPTS)),
    halvings=st.sampled_from([1, 3]),
)
def test_any_schedule_gives_the_tokens_of_the_simple_loop(
    order: list[int], count: int, limits: list[int], halvings: int, model: Transformer, expected: list[list[Response]]
):
    """Tokens and log-probs, for any order, number of prompts and limits: two data shards decode one prompt each at a
    time, and caches grow with every chunk."""
    mesh, chosen = mesh_of(2, 1), order[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crpo_jax.rollout.engine.RESPONSE_SLOTS", 4)
        patch.setattr("crpo_jax.rollout.engine.HALVINGS", halvings)
        groups = Engine(SHAPE, mesh, SAMPLING, WIDTH, slots=GROUP, chunk=2).generate(
            to_sampler(SHAPE, mesh, "float32")(Policy(model)),
            [PROMPTS[i] for i in chosen],
            key=KEY,
            group=GROUP,
            ids=chosen,
            limits=[limits[i] for i in chosen],
        )
    for i, group in zip(chosen, groups, strict=True):
        for response, reference in zip(group, expected[i], strict=True):
            np.testing.assert_array_equal(response.tokens, reference.tokens[: limits[i]])
            np.testing.assert_allclose(response.logprobs, reference.logprobs[: limits[i]], rtol=0, atol=1e-4)


def test_more_prompts_than_slots_on_data_shards(model: Transformer, expected: list[list[Response]]):
    """4 shards of one prompt each: the second wave has 3 prompts, and rows of padding that must never run."""
    mesh = mesh_of(4, 2)
    groups = Engine(SHAPE, mesh, SAMPLING, WIDTH, slots=GROUP, chunk=2).generate(
        to_sampler(SHAPE, mesh, "float32")(Policy(model)), PROMPTS, key=KEY, group=GROUP
    )
    assert tokens_of(groups) == tokens_of(expected)


def test_a_long_response_delays_no_other(weights: SamplerWeights, one_device: Mesh, monkeypatch: pytest.MonkeyPatch):
    """8 prompts in waves of 2, one response eight times as long as the others, which ends in a batch of its own: 11
    chunks, where waiting for such a response in every wave would cost 4 * 8. Without stop tokens limits are lengths."""
    calls: list[tuple[int, int]] = []
    short, long = 2, 16
    engine = Engine(SHAPE, one_device, Sampling(0.9), long, slots=2, chunk=2)
    limits = [long, *[short] * 7]
    decode = Scheduler.decode

    def counted(self: Scheduler, batch: DecodeBatch) -> DecodedChunk:
        calls.append((len(batch.rows), len(batch.running)))
        return decode(self, batch)

    monkeypatch.setattr(Scheduler, "decode", counted)
    groups = engine.generate(weights, [[1 + i] for i in range(8)], key=KEY, limits=limits)
    assert [len(response.tokens) for (response,) in groups] == limits
    assert sorted(calls) == sorted([(2, 2)] * 4 + [(1, 1)] * 7)


def test_the_rest_of_several_waves_is_merged(
    weights: SamplerWeights, one_device: Mesh, monkeypatch: pytest.MonkeyPatch
):
    """Four waves of four rows leave one long row each: they continue together, in one batch of four."""
    calls: list[tuple[int, int]] = []
    decode = Scheduler.decode

    def counted(self: Scheduler, batch: DecodeBatch) -> DecodedChunk:
        calls.append((len(batch.rows), len(batch.running)))
        return decode(self, batch)

    monkeypatch.setattr(Scheduler, "decode", counted)
    limits = [8, 1, 1, 1] * 4
    groups = Engine(SHAPE, one_device, Sampling(0.9), 8, slots=4, chunk=4).generate(
        weights, [[1 + i] for i in range(16)], key=KEY, limits=limits
    )
    assert [len(response.tokens) for (response,) in groups] == limits
    assert (4, 4) in calls or (4, 3) in calls
    assert sum(running for _, running in calls) == 8


def test_the_order_of_prompts_does_not_change_a_token(
    weights: SamplerWeights, one_device: Mesh, expected: list[list[Response]]
):
    """With their `ids`, prompts may come in any order and selection; responses keep the order of the prompts."""
    engine = Engine(SHAPE, one_device, SAMPLING, WIDTH, slots=6, chunk=6)
    for order in ([6, 5, 4, 3, 2, 1, 0], [2, 0, 5]):
        groups = engine.generate(weights, [PROMPTS[i] for i in order], key=KEY, group=GROUP, ids=order)
        assert tokens_of(groups) == [tokens_of(expected)[i] for i in order]
        assert [[(r.prompt, r.sample) for r in group] for group in groups] == [
            [(place, g) for g in range(GROUP)] for place in range(len(order))
        ]


def test_a_larger_group_begins_with_the_smaller(
    weights: SamplerWeights, one_device: Mesh, expected: list[list[Response]]
):
    groups = Engine(SHAPE, one_device, SAMPLING, WIDTH, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=1)
    assert tokens_of(groups) == [group[:1] for group in tokens_of(expected)]


def test_another_key_or_number_draws_other_tokens(
    weights: SamplerWeights, one_device: Mesh, expected: list[list[Response]]
):
    engine = Engine(SHAPE, one_device, SAMPLING, WIDTH, chunk=WIDTH)
    assert tokens_of(engine.generate(weights, PROMPTS, key=jax.random.key(5), group=GROUP)) != tokens_of(expected)
    moved = engine.generate(weights, PROMPTS, key=KEY, group=GROUP, ids=range(1, len(PROMPTS) + 1))
    assert sum(a != b for a, b in zip(tokens_of(moved), tokens_of(expected), strict=True)) >= 5


# --- where a response ends --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited(weights: SamplerWeights, one_device: Mesh) -> tuple[list[int], list[list[Response]]]:
    limits = [1, 2, 10, 4, 3, 9, 5]
    return limits, Engine(SHAPE, one_device, SAMPLING, WIDTH, chunk=6).generate(
        weights, PROMPTS, key=KEY, group=GROUP, limits=limits
    )


def test_limits_cut_and_change_nothing_else(
    limited: tuple[list[int], list[list[Response]]], expected: list[list[Response]]
):
    limits, groups = limited
    for limit, group, references in zip(limits, groups, expected, strict=True):
        for response, reference in zip(group, references, strict=True):
            assert response.tokens.tolist() == reference.tokens[:limit].tolist()
            assert response.stopped == (reference.stopped and len(reference.tokens) <= limit)


def test_the_stop_token_belongs_to_the_response_and_nothing_after_it(limited: tuple[list[int], list[list[Response]]]):
    limits, groups = limited
    for limit, group in zip(limits, groups, strict=True):
        for response in group:
            inside = [token in STOPS for token in response.tokens.tolist()]
            assert (
                inside.index(True) == len(inside) - 1
                if response.stopped
                else (not any(inside) and len(inside) == limit)
            )
            assert len(response.logprobs) == len(response.tokens)
            assert np.all(response.logprobs < 0)


def test_a_stop_token_drawn_last_is_a_stop(weights: SamplerWeights, one_device: Mesh, expected: list[list[Response]]):
    """A response that stops exactly at its limit is stopped, not truncated."""
    which = next(
        (i, g)
        for i, group in enumerate(expected)
        for g, response in enumerate(group)
        if response.stopped and len(response.tokens) > 1
    )
    limit = len(expected[which[0]][which[1]].tokens)
    limits = [limit] * len(PROMPTS)
    groups = Engine(SHAPE, one_device, SAMPLING, WIDTH, chunk=6).generate(
        weights, PROMPTS, key=KEY, group=GROUP, limits=limits
    )
    assert groups[which[0]][which[1]].stopped
    assert len(groups[which[0]][which[1]].tokens) == limit


def test_no_stop_tokens_at_all(weights: SamplerWeights, one_device: Mesh):
    groups = Engine(SHAPE, one_device, Sampling(0.9), WIDTH, chunk=WIDTH).generate(
        weights, PROMPTS, key=KEY, group=GROUP
    )
    assert all(len(response.tokens) == WIDTH and not response.stopped for group in groups for response in group)


def test_one_token_responses(weights: SamplerWeights, one_device: Mesh, expected: list[list[Response]]):
    """The first token comes from the prefill alone."""
    groups = Engine(SHAPE, one_device, SAMPLING, 1, chunk=WIDTH).generate(weights, PROMPTS, key=KEY, group=GROUP)
    assert [[token[:1] for token, _ in group] for group in tokens_of(expected)] == [
        [token for token, _ in group] for group in tokens_of(groups)
    ]


# --- what a caller sees -----------------------------------------------------------------------------------------------


def test_responses_are_handed_over_as_they_finish(weights: SamplerWeights, one_device: Mesh):
    """Each once, and long before the last, so that scoring overlaps with decoding; the progress counts them."""
    finished: list[list[Response]] = []
    states: list[RolloutProgress] = []
    engine = Engine(SHAPE, one_device, SAMPLING, WIDTH, slots=6, chunk=2)
    groups = engine.generate(
        weights, PROMPTS, key=KEY, group=GROUP, on_finished=finished.append, on_progress=states.append
    )
    responses = [response for group in groups for response in group]
    assert len(finished) > 4
    assert {(r.prompt, r.sample): r.tokens.tolist() for some in finished for r in some} == {
        (r.prompt, r.sample): r.tokens.tolist() for r in responses
    }
    assert sum(map(len, finished)) == len(responses)
    tokens = sum(len(response.tokens) for response in responses)
    assert states[-1][:5] == (len(PROMPTS), len(responses), len(responses), tokens, tokens)
    assert states[-1].seconds_left == 0
    assert states[-1].mean_length == tokens / len(responses)
    assert all(
        old.tokens <= new.tokens and old.responses <= new.responses and old.prompts <= new.prompts
        for old, new in itertools.pairwise(states)
    )


def test_nothing_stays_on_the_devices(model: Transformer, one_device: Mesh):
    """Weights in their sampling form, caches and rows are freed: the update needs the memory."""
    engine, gather = Engine(SHAPE, one_device, SAMPLING, WIDTH, chunk=2), to_sampler(SHAPE, one_device, "float32")
    engine.generate(gather(Policy(model)), PROMPTS, key=KEY, group=GROUP)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    engine.generate(gather(Policy(model)), PROMPTS, key=KEY, group=GROUP)
    assert sum(array.nbytes for array in jax.live_arrays()) == before


def test_no_prompts(weights: SamplerWeights, one_device: Mesh):
    assert Engine(SHAPE, one_device, SAMPLING, WIDTH).generate(weights, [], key=KEY) == []


@pytest.mark.parametrize(
    ("prompts", "limits", "line"),
    [
        ([[1], []], None, "prompt 1: expected at least 1 token and a limit between 1 and 10, got 0 tokens, limit 10"),
        ([[1]], [0], "prompt 0: expected at least 1 token and a limit between 1 and 10, got 1 tokens, limit 0"),
        ([[1]], [11], "prompt 0: expected at least 1 token and a limit between 1 and 10, got 1 tokens, limit 11"),
    ],
)
def test_refused(
    prompts: list[list[int]], limits: list[int] | None, line: str, weights: SamplerWeights, one_device: Mesh
):
    with pytest.raises(InputError) as error:
        Engine(SHAPE, one_device, SAMPLING, WIDTH).generate(weights, prompts, key=KEY, limits=limits)
    assert str(error.value) == line


@pytest.mark.parametrize("scalars", ["on the devices", "on the host"])
def test_compiled_calls_transfer_nothing(
    scalars: str, model: Transformer, expected: list[list[Response]], monkeypatch: pytest.MonkeyPatch
):
    """All arguments are on their devices before a call, key and scalars included; host scalars trip the guard."""
    calls: Counter[str] = Counter()

    def guarded_programs(*args: Any) -> SamplingPrograms:
        def guard(name: str, program: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls[name] += 1
                with jax.transfer_guard("disallow"):
                    return program(*args, **kwargs)

            return call

        programs = sampling_programs(*args)
        return SamplingPrograms(**{name: guard(name, program) for name, program in programs._asdict().items()})

    mesh = mesh_of(2, 2)
    engine, weights = (
        Engine(SHAPE, mesh, SAMPLING, WIDTH, slots=3, chunk=2),
        to_sampler(SHAPE, mesh, "float32")(Policy(model)),
    )
    monkeypatch.setattr("crpo_jax.rollout.engine.RESPONSE_SLOTS", 4)
    monkeypatch.setattr("crpo_jax.rollout.engine.sampling_programs", guarded_programs)
    if scalars == "on the host":
        monkeypatch.setattr(Scheduler, "put_scalar", lambda self, value: np.int32(value))
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            engine.generate(weights, PROMPTS, key=KEY, group=GROUP)
    else:
        groups = engine.generate(weights, PROMPTS, key=KEY, group=GROUP)
        assert tokens_of(groups) == tokens_of(expected)
        assert all(calls[name] for name in SamplingPrograms._fields), calls


def test_no_empty_array_enters_a_program_over_several_devices():
    """Compiling one ended the process with jaxlib 0.11.2: rows that were gathered have empty caches of prompts."""
    specs = (P(DATA), P(None, MODEL))
    program = jax.jit(sharded_call(lambda x, y: jnp.concatenate([x, y[:2]], 1), mesh_of(4, 2), specs, P(DATA, MODEL)))
    empty, full = jnp.zeros((8, 0)), jnp.arange(12.0).reshape(2, 6)
    (call,) = re.findall(r"sdy.manual_computation\(.*?\)", program.lower(empty, full).as_text())
    assert call.count("%") == 1
    np.testing.assert_array_equal(program(empty, full), np.tile(full, (4, 1)))


def test_nothing_is_compiled_twice(weights: SamplerWeights, one_device: Mesh, compiled: list[str]):
    """Other prompts, limits and keys enter the same programs where rows end at about the same time (no stop tokens)."""
    engine = Engine(
        SHAPE, one_device, Sampling(0.97), WIDTH, slots=9, chunk=WIDTH
    )  # a temperature that no other test has
    keys = [jax.random.key(seed) for seed in range(3)]
    engine.generate(weights, PROMPTS, key=KEY, group=GROUP)
    assert len(compiled) >= 2  # the listener hears
    compiled.clear()
    for seed, key in enumerate(keys):
        others = [np.random.default_rng(seed).integers(SHAPE.v, size=length).tolist() for length in reversed(LENGTHS)]
        engine.generate(weights, others, key=key, group=GROUP, limits=[WIDTH - seed] * len(others))
    assert compiled == []


# --- on its own -------------------------------------------------------------------------------------------------------


def test_the_example_in_the_docstring(model: Transformer, tmp_path: Path):
    save_model(model, tmp_path / "model", dtype="float32")
    (test,) = doctest.DocTestFinder(recurse=False).find(
        crpo_jax.rollout, "crpo_jax.rollout", globs={"folder": str(tmp_path / "model")}
    )
    assert len(test.examples) > 5
    assert doctest.DocTestRunner().run(test).failed == 0
