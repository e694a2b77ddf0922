"""The model's arithmetic against formulas in float64, and its independence of padding, recomputation and placement."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHAPE, leaves_by_name, mesh_of, placed, random_weights
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crpo_jax.config import Lora
from crpo_jax.model.architecture import ARCHITECTURES
from crpo_jax.model.decode import Shard, embed
from crpo_jax.model.lora import initial_adapters
from crpo_jax.model.placement import training_placement, weight_shardings
from crpo_jax.model.rotary import Rope, rope
from crpo_jax.model.transformer import Transformer, dot, model_shapes, random_model, rms_norm
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.parallel.mesh import MODEL

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

B, T = 5, 9
TOKENS = np.random.default_rng(0).integers(SHAPE.v, size=(B, T)).astype(np.int32)


def test_rms_norm():
    x, weight = np.random.default_rng(0).normal(size=(2, 3, 7)), np.random.default_rng(1).normal(size=7)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(rms_norm(jnp.float32(x), jnp.float32(weight), 1e-5), expected, rtol=1e-5)


def test_rms_norm_of_bfloat16_is_float32_inside():
    """Every value is the exact one rounded once; a mean or root in bf16 would change the last place of many."""
    x = jnp.bfloat16(np.random.default_rng(0).normal(size=(8, 512)))
    out = rms_norm(x, jnp.ones(512), 0.0)
    exact = np.float64(x) / np.sqrt(np.mean(np.float64(x) ** 2, axis=-1, keepdims=True))
    assert out.dtype == jnp.bfloat16
    assert np.mean(np.float32(out) == np.float32(jnp.bfloat16(np.float32(exact)))) > 0.999


def rotated(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Dims i and i + h/2 as the parts of a complex number, turned by position * theta^(-2i/h)."""
    h = x.shape[-1]
    turn = np.exp(1j * positions[..., None, None] * theta ** (-2 * np.arange(h // 2) / h))
    turned = (x[..., : h // 2] + 1j * x[..., h // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def frequencies(theta: float, h: int = 6) -> jax.Array:
    return Rope(theta).frequencies(h // 2)


def test_rope_turns_pairs_of_dims():
    x, positions = np.random.default_rng(0).normal(size=(2, 5, 3, 6)), np.array([[0, 1, 2, 100, 4000]] * 2)
    np.testing.assert_allclose(
        rope(jnp.float32(x), jnp.asarray(positions), frequencies(1e6)), rotated(x, positions, 1e6), rtol=1e-3, atol=1e-3
    )


def test_rope_angles_are_float32_for_bfloat16_inputs():
    """bf16 rounds position 257 to 256: in long rows several tokens would share one position."""
    x = jnp.broadcast_to(jnp.bfloat16([1, 0.5]), (1, 2, 1, 2))
    out = np.float32(rope(x, jnp.array([[256, 257]]), frequencies(1e4, 2)))
    np.testing.assert_allclose(out, rotated(np.float64(x), np.array([[256, 257]]), 1e4), atol=0.01)
    assert np.abs(out[0, 0] - out[0, 1]).max() > 0.1


def test_rope_depends_on_distances_only():
    rng = np.random.default_rng(0)
    q, k = jnp.float32(rng.normal(size=(2, 1, 1, 6)))

    def score(at: int, other: int) -> float:
        return float(
            jnp.sum(
                rope(q[None], jnp.array([[at]]), frequencies(1e4))
                * rope(k[None], jnp.array([[other]]), frequencies(1e4))
            )
        )

    assert score(13, 9) == pytest.approx(score(104, 100), rel=1e-3)
    assert score(13, 9) != pytest.approx(score(13, 8), rel=1e-3)


@pytest.mark.parametrize(
    ("x", "weight", "contracted", "formula"),
    [("btd", "dnh", 1, "btnh"), ("btnh", "nhd", 2, "btd"), ("bd", "dv", 1, "bv")],
)
def test_dot_is_the_einsum_its_dims_spell(x: str, weight: str, contracted: int, formula: str):
    sizes, rng = {"b": 5, "t": 9, **{letter: getattr(SHAPE, letter) for letter in "dnhv"}}, np.random.default_rng(0)
    left, right = (jnp.float32(rng.normal(size=[sizes[letter] for letter in dims])) for dims in (x, weight))
    expected = np.einsum(f"{x},{weight}->{formula}", np.float64(left), np.float64(right))
    np.testing.assert_allclose(dot(left, right, contracted), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_float32_sums_of_bfloat16_products():
    """256 products of 1.0039 (in bf16) add up to 257 within float32's rounding; a bf16 result would say 256 or 258."""
    shape = dataclasses.replace(SHAPE, d=256, v=4, tied=True)
    model = Transformer(shape, lambda weight: jnp.full(shape.dims(weight.stacked_dims), 1.0078125, jnp.bfloat16))
    hidden = jnp.ones((1, 256), jnp.bfloat16)
    assert model.logits(hidden).dtype == jnp.float32
    np.testing.assert_array_equal(model.logits(hidden), np.full((1, 4), 258.0))
    np.testing.assert_array_equal(model.logits(hidden.at[0, 0].set(0)), np.full((1, 4), 258.0 - 1.0078125))


# --- what must not change the answer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hidden(model: Transformer) -> np.ndarray:
    return np.asarray(jax.jit(lambda model: model(TOKENS))(model))


def test_later_tokens_change_nothing_before_them(model: Transformer, hidden: np.ndarray):
    """So right padding needs no mask, whatever its token id."""
    other = np.concatenate([TOKENS[:, :6], (TOKENS[:, 6:] + 1) % SHAPE.v], axis=1)
    changed = np.asarray(jax.jit(lambda model: model(other))(model))
    np.testing.assert_allclose(changed[:, :6], hidden[:, :6], rtol=1e-5, atol=1e-5)
    assert np.abs(changed[:, 6:] - hidden[:, 6:]).min(axis=(1, 2)).max() > 0
    assert not np.allclose(changed[:, 6:], hidden[:, 6:])


def test_rows_do_not_mix(model: Transformer, hidden: np.ndarray):
    alone = jax.jit(lambda model: model(TOKENS[3:4]))(model)
    np.testing.assert_allclose(alone, hidden[3:4], rtol=1e-5, atol=1e-5)


def test_every_weight_matters(model: Transformer):
    """A weight without a gradient is never read, or another is read in its place."""
    weights = np.random.default_rng(1).normal(size=(B, T, SHAPE.v))

    def total(model: Transformer) -> Any:
        return jnp.sum(model.logits(model(TOKENS)) * weights)

    gradients = jax.jit(jax.grad(total))(model)
    for weight in SHAPE.weights:
        per_layer = np.asarray(gradients[weight.name]).reshape(SHAPE.l if weight.stacked else 1, -1)
        # Softmax would cancel the keys' bias entirely, were keys not rotated after it.
        least = 1e-6 if weight.name == "k_bias_kh" else 1e-3
        assert np.all(np.abs(per_layer).max(axis=1) > least), weight.name


def test_recomputation_changes_no_gradient(model: Transformer):
    def total(model: Transformer, remat: bool) -> Any:
        return jnp.sum(model(TOKENS, remat=remat) ** 3)

    stored, recomputed = (jax.jit(jax.grad(total), static_argnums=1)(model, remat) for remat in (False, True))
    for expected, gradient in zip(jax.tree.leaves(stored), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["zero1", "fsdp"])  # whole over the data axis, and split
def test_the_forward_is_the_same_on_every_mesh(mesh: Mesh, layout: str, model: Transformer, hidden: np.ndarray):
    tokens = np.concatenate([TOKENS, TOKENS[:3]])  # 8 rows, for up to 8 data shards
    shardings = weight_shardings(SHAPE, LAYOUTS[layout].compute, mesh)
    forward = jax.jit(lambda model: model(tokens, placement=training_placement(SHAPE, mesh)))
    np.testing.assert_allclose(forward(placed(model, shardings))[:B], hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_an_embedding_split_over_the_vocabulary(shards: int, model: Transformer):
    tokens, table = jnp.arange(SHAPE.v), model["embed_vd"]
    split = jax.shard_map(
        lambda table: embed(table, tokens, Shard(MODEL)),
        mesh=mesh_of(1, shards),
        in_specs=P(MODEL),
        out_specs=P(),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(split)(table), table)
    np.testing.assert_array_equal(embed(table, tokens, Shard(None)), table)


# --- a model from scratch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_from_scratch(tied: bool):
    """Norms 1, biases 0, matrices of deviation d^-1/2, smaller by depth where they write the residual stream; an untied
    embedding has deviation 1."""
    shape = dataclasses.replace(SHAPE, tied=tied)
    model, matrix = random_model(shape, jax.random.key(0)), SHAPE.d**-0.5
    deviations = {
        "o_nhd": matrix / (2 * SHAPE.l) ** 0.5,
        "down_fd": matrix / (2 * SHAPE.l) ** 0.5,
        "embed_vd": matrix if tied else 1.0,
    }
    for name, leaf in leaves_by_name(model).items():
        assert leaf.dtype == jnp.float32
        if "norm" in name:
            np.testing.assert_array_equal(leaf, np.ones(leaf.shape))
        elif "bias" in name:
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
        else:
            assert np.std(leaf) == pytest.approx(deviations.get(name, matrix), rel=0.15), name


def test_a_model_from_scratch_follows_from_its_key():
    model, same, other = (random_model(SHAPE, jax.random.key(seed)) for seed in (0, 0, 1))
    for a, b, c in zip(*map(jax.tree.leaves, (model, same, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.array_equal(a, c) == (np.ptp(a) == 0)
    matrices = [leaf for leaf in jax.tree.leaves(model) if np.ptp(leaf)]
    assert len({leaf.reshape(-1)[0].item() for leaf in matrices}) == len(matrices)  # no two drawn with one key


def test_initial_weights_do_not_depend_on_the_order_of_declarations(monkeypatch: pytest.MonkeyPatch):
    """So a weight that is declared later, or elsewhere, changes no other weight of a run's seed."""
    qwen2 = ARCHITECTURES["qwen2"]
    reordered = dataclasses.replace(qwen2, weights=(*qwen2.weights[7:], *reversed(qwen2.weights[:7])))
    monkeypatch.setitem(ARCHITECTURES, "reordered", reordered)
    shape, key, lora = dataclasses.replace(SHAPE, model_type="reordered"), jax.random.key(0), Lora(rank=5)
    assert shape.weights != SHAPE.weights
    for make in (random_model, lambda shape, key: initial_adapters(shape, lora, key)):
        expected, weights = leaves_by_name(make(SHAPE, key)), leaves_by_name(make(shape, key))
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight, expected[name])


def test_tied_models_have_one_matrix_for_both_ends():
    tied = dataclasses.replace(SHAPE, tied=True)
    model = random_weights(tied)
    assert model.shape.tied
    assert not random_weights(SHAPE).shape.tied
    assert leaves_by_name(model_shapes(SHAPE)).keys() - leaves_by_name(model_shapes(tied)).keys() == {"unembed_dv"}
    x = jnp.float32(np.random.default_rng(0).normal(size=(3, SHAPE.d)))
    np.testing.assert_allclose(model.logits(x), x @ model["embed_vd"].T, rtol=1e-5, atol=1e-5)
