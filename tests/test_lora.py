"""Adapters on frozen weights act as W + scale * A B: in the trainer, in the sampler and merged, on every layout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SHAPE, leaves_by_name, mesh_of, one_micro_batch, placed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from crpo_jax import config
from crpo_jax.errors import InputError
from crpo_jax.model.adapters import Adapters, matrix_names
from crpo_jax.model.decode import Shard, prefill, project
from crpo_jax.model.lora import (
    Policy,
    initial_adapters,
    linear_layers,
    merge_adapters,
    policy_of,
    trained_shapes,
    trained_shardings,
)
from crpo_jax.model.placement import sampler_specs, to_sampler, weight_shardings
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.parallel.mesh import MODEL
from crpo_jax.update.batches import Row, make_batch
from crpo_jax.update.losses import row_weights
from crpo_jax.update.trainer import Trainer, make_optimizer

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

LORA = config.Lora(rank=5, alpha=2.0)
SETTINGS = config.load_config(
    None, ["model.dtype=float32", "parallel.remat=false", "sft.optimizer.learning_rate=0.01"], model=False
)
ROWS = [Row([3, 1, 4], [1, 5, 9, 2]), Row([6], [5, 3, 5]), Row([8, 9], [7]), Row([9, 3, 2], [3, 8, 4, 6, 2])]


def random_adapters(lora: config.Lora = LORA, deviation: float = 0.3) -> Adapters:
    """Adapters of a size at which every one of them matters, B too."""
    rng = np.random.default_rng(5)
    shapes = trained_shapes(SHAPE, lora)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * deviation, jnp.float32), shapes)


@jax.jit
def written_out(model: Transformer, adapters: Adapters) -> Transformer:
    """W + scale * A B, layer by layer, each product spelled as an einsum."""
    merged = jax.tree.map(lambda x: x, model)
    for weight in adapters.weights:
        a, b = adapters.pair(weight.name)
        change = jnp.einsum(f"l{weight.inputs}r,lr{weight.outputs}->l{weight.dims}", a, b)
        parameter = getattr(merged.blocks, weight.name)
        parameter[...] = parameter[...] + LORA.alpha / LORA.rank * change
    return merged


@jax.jit
def forward(model: Transformer, tokens: Any, adapters: Adapters | None = None) -> jax.Array:
    return model.logits(model(tokens, adapters=adapters))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(SHAPE.v, size=(2, 8)).astype(np.int32)


def test_every_name_spells_its_dims():
    for name, leaf in leaves_by_name(trained_shapes(SHAPE, LORA)).items():
        sizes = (LORA.rank if dim == "r" else getattr(SHAPE, dim) for dim in name.rsplit("_", 1)[1])
        assert leaf.shape == (SHAPE.l, *sizes), name
    assert tuple(linear_layers(SHAPE)) == config.LINEAR_LAYERS
    assert [matrix_names(SHAPE.weight(name)) for name in ("q_dnh", "o_nhd", "down_fd")] == [
        ("q_a_dr", "q_b_rnh"),
        ("o_a_nhr", "o_b_rd"),
        ("down_a_fr", "down_b_rd"),
    ]


def test_fresh_adapters_change_nothing(model: Transformer, tokens: np.ndarray):
    fresh = initial_adapters(SHAPE, LORA, jax.random.key(0))
    np.testing.assert_array_equal(forward(model, tokens, fresh), forward(model, tokens))
    a, b = fresh.pair("o_nhd")
    assert not np.any(b)
    bound = (SHAPE.n * SHAPE.h) ** -0.5  # by all inputs of the layer
    assert np.abs(a).max() <= bound < np.abs(a).max() * 1.1


@pytest.mark.parametrize("targets", [config.LINEAR_LAYERS, ("v_proj", "down_proj")], ids=["all", "two"])
def test_trainer_sampler_and_merged_weights_agree(model: Transformer, tokens: np.ndarray, targets: tuple[str, ...]):
    """Contract 3 with adapters, in float32."""
    lora = dataclasses.replace(LORA, targets=targets)
    adapters = random_adapters(lora)
    expected = forward(written_out(model, adapters), tokens)
    assert np.abs(expected - forward(model, tokens)).max() > 1
    np.testing.assert_allclose(forward(model, tokens, adapters), expected, atol=1e-4)

    policy = Policy(model, adapters)
    weights = to_sampler(SHAPE, mesh_of(1, 1), "float32", policy.adapted)(policy)
    last, _ = jax.jit(lambda weights: prefill(weights, tokens, jnp.array([8, 8]), SHAPE, Shard(None), "xla"))(weights)
    np.testing.assert_allclose(last, expected[:, -1], atol=1e-4)

    mesh, axes = mesh_of(4, 2), LAYOUTS["zero1"].master
    base = placed(model, weight_shardings(SHAPE, axes, mesh))
    merged = merge_adapters(Policy(base, placed(adapters, trained_shardings(SHAPE, lora, axes, mesh))))
    for ours, exact in zip(jax.tree.leaves(merged), jax.tree.leaves(written_out(model, adapters)), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_small_changes_survive_beside_bf16_weights(model: Transformer, tokens: np.ndarray):
    """Why the trainer does not merge: a change of less than half a bf16 step vanishes in the merged weight."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    small = random_adapters(deviation=0.002)
    untouched = np.asarray(base["q_dnh"])
    adapted = forward(base, tokens, jax.tree.map(lambda x: x.astype(jnp.bfloat16), small))
    assert np.any(np.asarray(adapted) != np.asarray(forward(base, tokens)))
    assert np.mean(np.asarray(merge_adapters(Policy(base, small))["q_dnh"]) == untouched) > 0.9


@pytest.mark.parametrize("targets", [config.LINEAR_LAYERS, ("k_proj", "down_proj")], ids=["all", "two"])
@pytest.mark.parametrize("sizes", [(1, 2), (1, 4)])
def test_the_sampler_splits_adapters_as_their_weights(
    sizes: tuple[int, int], model: Transformer, tokens: np.ndarray, targets: tuple[str, ...]
):
    """4 model shards have copies of the 2 KV heads; a part of a fused buffer may have no adapter of its own."""
    mesh, adapters = mesh_of(*sizes), random_adapters(dataclasses.replace(LORA, targets=targets))
    policy = jax.device_put(Policy(model, adapters), NamedSharding(mesh, P()))
    weights = to_sampler(SHAPE, mesh, "float32", policy.adapted)(policy)
    specs = sampler_specs(SHAPE, mesh, policy.adapted)

    def logits(weights: Any) -> jax.Array:
        return prefill(weights, tokens, jnp.array([8, 8]), SHAPE, Shard(MODEL), "xla")[0]

    split = jax.shard_map(logits, mesh=mesh, in_specs=(specs,), out_specs=P(None, MODEL), check_vma=False)
    np.testing.assert_allclose(jax.jit(split)(weights), forward(model, tokens, adapters)[:, -1], atol=1e-4)


def test_the_sampler_rounds_adapters_as_the_trainer_does(model: Transformer):
    """It used to merge them into bf16 weights, on whose grid small changes are none: it drew from the start model."""
    base, small = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), x) for x in (model, random_adapters(deviation=0.01)))
    policy = Policy(base, small)
    layer = to_sampler(SHAPE, mesh_of(1, 1), "bfloat16", policy.adapted)(policy).layers[1]
    block, own = jax.tree.map(lambda x: x[1], (base.blocks, small))
    for buffer, names in {"qkv": ("q_dnh", "k_dkh", "v_dkh"), "o_nhd": ("o_nhd",), "down_fd": ("down_fd",)}.items():
        inputs = SHAPE.dims(SHAPE.weight(names[0]).inputs)
        x = jnp.bfloat16(np.random.default_rng(0).normal(size=(64, *inputs)))
        in_training = [block.linear(name, x, own).reshape(64, -1) for name in names]
        sampled = project(layer, buffer, x, SHAPE)
        np.testing.assert_array_equal(sampled, jnp.concatenate(in_training, axis=1))
        unchanged = [block.linear(name, x, None).reshape(64, -1) for name in names]
        assert np.mean(np.asarray(sampled != jnp.concatenate(unchanged, axis=1))) > 0.05, buffer


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(model: Transformer) -> tuple[float, Adapters, Adapters]:
    """Loss and gradients by way of merged weights, and the adapters after one AdamW step, on one device."""
    adapters, tokens = random_adapters(), np.zeros((len(ROWS), 8), np.int32)
    for i, row in enumerate(ROWS):
        tokens[i, : row.length] = [*row.prompt, *row.response]

    @jax.jit
    @jax.value_and_grad
    def loss(adapters: Adapters) -> jax.Array:
        logprobs = jax.nn.log_softmax(forward(written_out(model, adapters), tokens))
        of_responses = [
            logprobs[i, len(row.prompt) - 1 + position, token]
            for i, row in enumerate(ROWS)
            for position, token in enumerate(row.response)
        ]
        return -jnp.mean(jnp.stack(of_responses))

    value, gradients = loss(adapters)
    optimizer = make_optimizer(SETTINGS.sft.optimizer, 100)
    changes, _ = jax.jit(lambda: optimizer.update(gradients, optimizer.init(adapters), adapters))()
    return float(value), gradients, optax.apply_updates(adapters, changes)


@pytest.mark.parametrize(("sizes", "layout"), [((1, 1), "replicated"), ((4, 2), "zero1"), ((2, 4), "fsdp")])
def test_an_optimizer_step_on_every_layout(
    sizes: tuple[int, int], layout: str, model: Transformer, expected: tuple[float, Adapters, Adapters]
):
    """Contract 2 for adapters: loss, gradients and parameters; 4 model shards have copies of the 2 KV heads."""
    mesh, axes = mesh_of(*sizes), LAYOUTS[layout]
    settings = dataclasses.replace(SETTINGS, parallel=dataclasses.replace(SETTINGS.parallel, layout=layout))
    trainer = Trainer(SHAPE, mesh, settings, settings.sft.optimizer, 100, loss="supervised", lora=LORA)
    base = placed(model, weight_shardings(SHAPE, axes.compute, mesh))
    before = jax.tree.map(np.array, base)
    shardings = trained_shardings(SHAPE, LORA, axes.master, mesh)
    state = trainer.begin(placed(random_adapters(), shardings), base)
    weights = row_weights(np.array([len(row.response) for row in ROWS]), np.ones(len(ROWS), bool), "token_mean")
    batches = trainer.put_batches([make_batch(one_micro_batch(ROWS, mesh), weights)])
    gradients, _ = trainer.gradients(state, batches)
    state, update = trainer.update(state, batches)

    loss, expected_gradients, expected_master = expected
    assert float(update.metrics["sum/nll"] / update.metrics["sum/tokens"]) == pytest.approx(loss, rel=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    for ours, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5 * largest)
    for ours, exact in zip(jax.tree.leaves(state.master), jax.tree.leaves(expected_master), strict=True):
        np.testing.assert_allclose(ours, exact, atol=2e-5)
    assert float(update.norm) == pytest.approx(float(optax.tree.norm(expected_gradients)), rel=1e-4)

    places = jax.tree.leaves(shardings)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert len(moments) == 2 * len(places)  # of the adapters and of nothing else
    trained = [*jax.tree.leaves(state.master), *jax.tree.leaves(gradients), *moments]
    for leaf, sharding in zip(trained, places * 4, strict=True):
        assert leaf.dtype == jnp.float32
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert policy_of(state.master, state.frozen).model is base
    for new, old in zip(jax.tree.leaves(base), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(new, old)


def test_muon_treats_an_adapter_as_a_matrix_with_rank_r():
    """Without dimension numbers it would treat every adapter as a vector and leave it to AdamW."""
    settings = dataclasses.replace(SETTINGS.sft.optimizer, algorithm="muon")
    optimizer, adapters = make_optimizer(settings, 100), random_adapters()
    changes, _ = jax.jit(lambda: optimizer.update(adapters, optimizer.init(adapters), adapters))()
    change, a = (np.asarray(tree.pair("o_nhd")[0][0]).reshape(-1, LORA.rank) for tree in (changes, adapters))
    singular = np.linalg.svd(change + settings.learning_rate * settings.weight_decay * a)[1]
    assert singular.max() / singular.min() < 2  # orthogonal up to Newton-Schulz, which AdamW's change is not


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.targets=[q_proj, lm_head]", r"lora.targets: expected some of q_proj, .*, got \['q_proj', 'lm_head'\]"),
        ("sft.lora.targets=[]", r"sft.lora.targets: expected some of"),
        ("sft.lora.targets=[q_proj, q_proj]", r"sft.lora.targets: expected some of .* each once"),
        ("lora.rank=-1", "lora.rank: expected a whole number >= 0"),
    ],
)
def test_bad_settings_of_adapters_are_refused(override: str, message: str):
    with pytest.raises(InputError, match=message):
        config.load_config(None, [override], model=False)
