"""Gradients with a prompt computed once for its group, against one row per response, and attention in packed rows.

CRPO_JAX_ALL_GRADIENTS=1 compares every mesh and layout, remat or not, adapters or not, of every architecture.
"""

import dataclasses
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHAPE, mesh_of, placed, random_weights

from crpo_jax import config
from crpo_jax.model import attention, packed_attention
from crpo_jax.model.attention import AttentionKind
from crpo_jax.model.lora import Policy, initial_adapters, policy_of
from crpo_jax.model.packed_attention import Packing, find_tiles, visible
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.update.batches import Row, micro_batches, supervised_batches
from crpo_jax.update.trainer import Trainer

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

GROUPS = [(5, [3, 7, 4]), (1, [6, 1, 2, 5, 3, 1, 9, 4]), (9, [2]), (3, [4, 8, 1, 1, 2]), (12, [11, 6])]
"""Prompts of 1 to 12 tokens with 1 to 8 responses."""

LORA = config.Lora(rank=2, alpha=4.0, targets=("q_proj", "v_proj", "down_proj"))
WINDOWED: dict[str, Any] = {"window": 5, "layers_windowed": (True, False, True)}
SHAPES = {
    "qwen2": SHAPE,
    "qwen3": dataclasses.replace(SHAPE, model_type="qwen3"),
    "llama": dataclasses.replace(SHAPE, model_type="llama"),
    "mistral": dataclasses.replace(SHAPE, model_type="mistral", window=5, layers_windowed=(True,) * 3),
    "gemma3_text": dataclasses.replace(SHAPE, model_type="gemma3_text", tied=True, **WINDOWED),
}
FEW = [
    ("qwen2", (1, 1), "replicated", False, 0),
    ("gemma3_text", (2, 4), "zero1", True, 0),
    ("mistral", (8, 1), "fsdp", False, 2),
]
ALL = itertools.product(SHAPES, [(1, 1), (8, 1), (4, 2), (2, 4)], LAYOUTS, [False, True], [0, 2])
CASES = list(ALL) if os.environ.get("CRPO_JAX_ALL_GRADIENTS") else FEW


def rows_of(vocabulary: int) -> list[Row]:
    rng, rows = np.random.default_rng(0), list[Row]()
    for prompt, responses in GROUPS:
        shared = rng.integers(vocabulary, size=prompt).tolist()
        rows += [Row(shared, rng.integers(vocabulary, size=response).tolist()) for response in responses]
    return rows


def policy_to_train(shape: Shape, rank: int) -> Policy:
    """Random weights; where `rank` is not 0 with adapters that change them."""
    model = random_weights(shape)
    if not rank:
        return Policy(model)
    adapters = jax.tree.map(lambda x: x + 0.1, initial_adapters(shape, LORA, jax.random.key(1)))
    return policy_of(adapters, model)


EXPECTED: dict[tuple[str, int], tuple[float, Any]] = {}


def expected_gradients(family: str, rank: int) -> tuple[float, Any]:
    """The mean negative log-prob of all response tokens and its gradient, from plain rows of one response each."""
    if (family, rank) in EXPECTED:
        return EXPECTED[family, rank]
    model, adapters = policy_to_train(SHAPES[family], rank)
    rows = rows_of(SHAPE.v)
    tokens = np.zeros((len(rows), 24), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for place, row in enumerate(rows):
        tokens[place, : row.length] = [*row.prompt, *row.response]
        mask[place, len(row.prompt) - 1 : row.length - 1] = True

    def loss(trained: Any) -> jax.Array:
        policy = policy_of(trained, model)
        logprobs = jax.nn.log_softmax(policy.model.logits(policy.model(tokens, adapters=policy.adapters)))
        chosen = jnp.take_along_axis(logprobs, np.roll(tokens, -1, axis=1)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(mask, chosen, 0)) / mask.sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(model if adapters is None else adapters)
    EXPECTED[family, rank] = float(value), jax.tree.map(np.asarray, gradients)
    return EXPECTED[family, rank]


@pytest.mark.parametrize(("family", "sizes", "layout", "remat", "rank"), CASES)
def test_gradients_are_those_of_one_row_per_response(
    family: str, sizes: tuple[int, int], layout: str, remat: bool, rank: int
):
    """Ragged groups, some of them cut, whose responses lie in several micro-batches."""
    value, expected = expected_gradients(family, rank)
    overrides = ["model.dtype=float32", "parallel.micro_batch_tokens=48", "parallel.length_multiple=8"]
    overrides += [f"parallel.layout={layout}", f"parallel.remat={remat}", "parallel.logprob_chunk=8"]
    settings = config.load_config(None, overrides, model=False)
    mesh, shape = mesh_of(*sizes), SHAPES[family]
    lora = LORA if rank else config.Lora(rank=0)
    trainer = Trainer(shape, mesh, settings, settings.optimizer, 10, loss="supervised", lora=lora)
    model, adapters = policy_to_train(shape, rank)
    if adapters is None:
        state = trainer.begin(placed(model, trainer.shardings.master))
    else:
        base = trainer.reference_copy(model)
        state = trainer.begin(placed(adapters, trainer.shardings.master), base)
    batches = supervised_batches(rows_of(SHAPE.v), settings.parallel, sizes[0])
    assert (len(batches) > 1) == (sizes[0] < 4)
    gradients, metrics = trainer.gradients(state, trainer.put_batches(batches))
    assert float(metrics["sum/nll"] / metrics["sum/tokens"]) == pytest.approx(value, rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for ours, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=2e-4, atol=2e-6 * largest)


# --- attention --------------------------------------------------------------------------------------------------------


def packing_of(length: int, scale: int = 1) -> Packing:
    """One packed row of all groups, `scale` times as long."""
    rows = [Row([0] * (n * scale) + [i], [0] * (m * scale)) for i, (n, part) in enumerate(GROUPS) for m in part]
    (micro,) = micro_batches(rows, budget=length, multiple=length, shards=1, longest=length)
    return Packing(*(jnp.asarray(x) for x in (micro.positions, micro.sequences, micro.prompts)))


def random_arrays(length: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values, and a weight for every output."""
    rng = np.random.default_rng(0)
    return tuple(jnp.float32(rng.normal(size=(1, length, heads, SHAPE.h))) for heads in (8, 2, 2, 8))


def dense(q: jax.Array, k: jax.Array, v: jax.Array, packing: Packing, scale: float, window: int) -> jax.Array:
    """All scores at once."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    hidden = jnp.where(visible(packing, packing, window)[:, None], 0.0, -1e30)
    weights = jax.nn.softmax(jnp.einsum("ctnh,csnh->cnts", q, k) * scale + hidden)
    return jnp.einsum("cnts,csnh->ctnh", weights, v)


@pytest.mark.parametrize(
    ("kind", "tile", "scale", "window"), [("xla", 16, 1, 0), ("xla", 40, 1, 5), ("splash", 128, 2, 9)]
)
def test_packed_attention_is_a_softmax_over_what_is_visible(
    kind: AttentionKind, tile: int, scale: int, window: int, monkeypatch: pytest.MonkeyPatch
):
    """Values and gradients, tiles smaller than the row."""
    monkeypatch.setattr(packed_attention, "TILE", tile)
    monkeypatch.setattr(attention, "INTERPRET", True)
    length = 128 if scale == 1 else 256
    packing, (*qkv, weights) = packing_of(length, scale), random_arrays(length)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(packed_attention.packed_attention(q, k, v, packing, kind, 0.4, window) * weights)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(dense(q, k, v, packing, 0.4, window) * weights)

    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*qkv)
    expected, expected_gradients = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(*qkv)
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 9])
def test_no_tile_in_which_something_is_seen_is_left_out(window: int):
    """And not many more are computed."""
    packing = Packing(*(x[0] for x in packing_of(256, 2)))
    tiles = find_tiles(packing, 16, window)
    pairs = int(tiles.pairs)
    computed = set(zip(tiles.queries[:pairs].tolist(), tiles.keys[:pairs].tolist(), strict=True))
    seen = np.asarray(visible(packing, packing, window)).reshape(16, 16, 16, 16).any(axis=(1, 3))
    needed = set(map(tuple, np.argwhere(seen).tolist()))
    assert needed <= computed
    assert len(computed) <= 1.5 * len(needed)
