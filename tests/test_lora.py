"""Adapters beside frozen weights act as W + scale * A B: in the trainer, in the sampler and once merged, on every mesh and layout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SHAPE, mesh_of, placed
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.errors import InputError
from crpo_jax.model import lora
from crpo_jax.model.decode import Shard, prefill
from crpo_jax.model.lora import Adapted, Adapters
from crpo_jax.model.placement import to_sampling, weight_shardings
from crpo_jax.model.transformer import Qwen2, dims_of, hidden_states, logits
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.update.batches import Row, micro_batch, of_rows
from crpo_jax.update.losses import row_weights
from crpo_jax.update.trainer import on_devices, optimizer, trainer

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

LORA = config.Lora(rank=5, alpha=2.0)
SETTINGS = config.load_config(
    None, ["model.dtype=float32", "parallel.remat=false", "sft.optimizer.learning_rate=0.01"], model=False
)
ROWS = [Row([3, 1, 4], [1, 5, 9, 2]), Row([6], [5, 3, 5]), Row([8, 9], [7]), Row([9, 3, 2], [3, 8, 4, 6, 2])]


def drawn(described: config.Lora = LORA, deviation: float = 0.3) -> Adapters:
    """Adapters of a size at which every one of them matters, B too."""
    draw = np.random.default_rng(5)
    like = lora.abstract(SHAPE, described)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape) * deviation, jnp.float32), like)


@jax.jit
def written_out(model: Qwen2, adapters: Adapters) -> Qwen2:
    """W + scale * A B, layer by layer, each product spelt as an einsum."""
    new = jax.tree.map(lambda x: x, model)
    for weight in adapters.weights:
        (a, b), dims = lora.halves(weight), dims_of(weight)
        change = jnp.einsum(
            f"l{dims_of(a)},l{dims_of(b)}->l{dims}", getattr(adapters, a)[...], getattr(adapters, b)[...]
        )
        parameter = getattr(new.blocks, weight)
        parameter[...] = parameter[...] + LORA.alpha / LORA.rank * change
    return new


@jax.jit
def forward(model: Qwen2, tokens: Any, adapters: Adapters | None = None) -> jax.Array:
    return logits(model, hidden_states(model, tokens, SHAPE, adapters=adapters))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(SHAPE.v, size=(2, 8)).astype(np.int32)


def test_every_name_spells_its_dims():
    for path, leaf in jax.tree_util.tree_leaves_with_path(lora.abstract(SHAPE, LORA)):
        name = next(
            name for name in (str(getattr(part, "key", getattr(part, "name", ""))) for part in path) if "_" in name
        )
        assert leaf.shape == (
            SHAPE.l,
            *(LORA.rank if letter == "r" else getattr(SHAPE, letter) for letter in dims_of(name)),
        )
    assert tuple(lora.TARGETS) == config.LINEAR_LAYERS
    assert [lora.halves(weight) for weight in ("q_dnh", "o_nhd", "down_fd")] == [
        ("q_a_dr", "q_b_rnh"),
        ("o_a_nhr", "o_b_rd"),
        ("down_a_fr", "down_b_rd"),
    ]


def test_fresh_adapters_change_nothing(model: Qwen2, tokens: np.ndarray):
    fresh = lora.initial(SHAPE, LORA, jax.random.key(0))
    np.testing.assert_array_equal(forward(model, tokens, fresh), forward(model, tokens))
    a, b = fresh.pair("o_nhd")
    assert not np.any(b)
    assert (
        np.abs(a).max() <= (SHAPE.n * SHAPE.h) ** -0.5 < np.abs(a).max() * 1.1
    )  # the bound follows from all inputs of a layer


@pytest.mark.parametrize("targets", [config.LINEAR_LAYERS, ("v_proj", "down_proj")], ids=["all", "two"])
def test_trainer_sampler_and_merged_weights_agree(model: Qwen2, tokens: np.ndarray, targets: tuple[str, ...]):
    """Contract 3 with adapters, float32; the sampler's copies of KV heads included."""
    adapters = drawn(dataclasses.replace(LORA, targets=targets))
    wanted = forward(written_out(model, adapters), tokens)
    assert np.abs(wanted - forward(model, tokens)).max() > 1
    np.testing.assert_allclose(forward(model, tokens, adapters), wanted, atol=1e-4)

    mesh = mesh_of(1, 1)
    sampling = to_sampling(SHAPE, mesh, "float32")(Adapted(model, adapters))
    last, _ = jax.jit(lambda model: prefill(model, tokens, jnp.array([8, 8]), SHAPE, Shard(None), "xla"))(sampling)
    np.testing.assert_allclose(last, wanted[:, -1], atol=1e-4)

    table = LAYOUTS["zero1"]
    mesh = mesh_of(4, 2)
    base = placed(model, weight_shardings(SHAPE, table.master, mesh))
    merged = lora.merge(
        Adapted(
            base,
            placed(adapters, lora.shardings(SHAPE, dataclasses.replace(LORA, targets=targets), table.master, mesh)),
        )
    )
    for got, want in zip(jax.tree.leaves(merged), jax.tree.leaves(written_out(model, adapters)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_small_changes_survive_beside_bf16_weights(model: Qwen2, tokens: np.ndarray):
    """Why the trainer does not merge: a change below half a step of bf16 is lost in the sum, not beside it."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    small = drawn(deviation=0.002)
    untouched = np.asarray(base.blocks.q_dnh[...])
    beside = forward(base, tokens, jax.tree.map(lambda x: x.astype(jnp.bfloat16), small))
    assert np.any(np.asarray(beside) != np.asarray(forward(base, tokens)))
    same = np.asarray(lora.merge(Adapted(base, small)).blocks.q_dnh[...]) == untouched
    assert np.mean(same) > 0.9


# --- training ---------------------------------------------------------------------------------------------------------


def batch_on(mesh: Mesh) -> dict[str, jax.Array]:
    micro = micro_batch(ROWS, range(len(ROWS)), 8, 8)
    weights = row_weights(np.array([len(row.response) for row in ROWS]), np.ones(len(ROWS), bool), "token_mean")
    return on_devices(micro, mesh, weights=of_rows(weights, micro.rows))


@pytest.fixture(scope="module")
def expected(model: Qwen2) -> tuple[float, Adapters, Adapters]:
    """Loss and gradients by way of merged weights, and the adapters after one AdamW step, on one device."""
    adapters, tokens = drawn(), np.zeros((len(ROWS), 8), np.int32)
    for into, row in zip(tokens, ROWS, strict=True):
        into[: len(row.prompt) + len(row.response)] = [*row.prompt, *row.response]

    @jax.jit
    @jax.value_and_grad
    def loss(adapters: Adapters) -> jax.Array:
        every = jax.nn.log_softmax(forward(written_out(model, adapters), tokens))
        said = [
            every[i, len(row.prompt) - 1 + at, token]
            for i, row in enumerate(ROWS)
            for at, token in enumerate(row.response)
        ]
        return -jnp.mean(jnp.stack(said))

    value, gradients = loss(adapters)
    update = optimizer(SETTINGS.sft.optimizer, 100)
    changes, _ = jax.jit(lambda: update.update(gradients, update.init(adapters), adapters))()
    return float(value), gradients, optax.apply_updates(adapters, changes)


@pytest.mark.parametrize(("sizes", "layout"), [((1, 1), "replicated"), ((4, 2), "zero1"), ((2, 4), "fsdp")])
def test_an_optimizer_step_on_every_layout(
    sizes: tuple[int, int], layout: str, model: Qwen2, expected: tuple[float, Adapters, Adapters]
):
    """Contract 2 for adapters: loss, gradients and parameters; 4 model shards hold copies of the 2 KV heads."""
    mesh, table = mesh_of(*sizes), LAYOUTS[layout]
    settings = dataclasses.replace(SETTINGS, parallel=dataclasses.replace(SETTINGS.parallel, layout=layout))
    run = trainer(SHAPE, mesh, settings, settings.sft.optimizer, 100, loss="supervised", adapters=LORA)
    base = placed(model, weight_shardings(SHAPE, table.compute, mesh))
    before = jax.tree.map(np.array, base)
    state = run.begin(placed(drawn(), lora.shardings(SHAPE, LORA, table.master, mesh)))
    weights = run.compute_weights(lora.policy(state.master, base))
    gradients, metrics = run.accumulate(*run.zero(), weights, batch_on(mesh))
    state, norm, _ = run.apply(state, gradients)

    loss, wanted, after = expected
    assert float(metrics["sum/nll"] / metrics["sum/tokens"]) == pytest.approx(loss, rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * largest)
    for got, want in zip(jax.tree.leaves(state.master), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert float(norm) == pytest.approx(float(optax.tree.norm(wanted)), rel=1e-4)

    places = jax.tree.leaves(lora.shardings(SHAPE, LORA, table.master, mesh))
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert len(moments) == 2 * len(places)  # of the adapters and of nothing else
    for leaf, to in zip(
        [*jax.tree.leaves(state.master), *jax.tree.leaves(gradients), *moments], places * 4, strict=True
    ):
        assert leaf.dtype == jnp.float32
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim)
    for got, want in zip(jax.tree.leaves(base), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(got, want)


def test_muon_takes_an_adapter_for_a_matrix_of_its_r(one_device: Mesh):
    """Without its own dimension numbers it would take every adapter for a vector and leave it to AdamW."""
    settings = dataclasses.replace(SETTINGS.sft.optimizer, algorithm="muon")
    update = optimizer(settings, 100)
    adapters = drawn()
    changes, _ = jax.jit(lambda: update.update(adapters, update.init(adapters), adapters))()
    change = np.asarray(changes.pair("o_nhd")[0][0]).reshape(-1, LORA.rank)
    spread = np.linalg.svd(
        change
        + settings.learning_rate * settings.weight_decay * np.asarray(adapters.pair("o_nhd")[0][0]).reshape(-1, 5)
    )[1]
    assert spread.max() / spread.min() < 2  # orthogonal up to Newton-Schulz, which a gradient of AdamW's is not


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.targets=[q_proj, lm_head]", r"lora.targets: expected some of q_proj, .*, got \['q_proj', 'lm_head'\]"),
        ("sft.lora.targets=[]", r"sft.lora.targets: expected some of"),
        ("sft.lora.targets=[q_proj, q_proj]", r"sft.lora.targets: expected some of .* each once"),
        ("lora.rank=-1", "lora.rank: expected a whole number >= 0"),
    ],
)
def test_settings_that_name_no_layers(override: str, said: str):
    with pytest.raises(InputError, match=said):
        config.load_config(None, [override], model=False)
