"""The model's arithmetic against formulas in float64, and what must not change its answer: padding, recomputation, splitting."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHAPE, mesh_of, placed, random_weights
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crpo_jax.model.decode import Shard, embed
from crpo_jax.model.placement import training_placement, weight_shardings
from crpo_jax.model.transformer import Qwen2, abstract, dot, hidden_states, initial, logits, rms_norm, rope
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
    """Each entry is the exact one rounded once; squares, mean or root in bf16 would move a good part of them by a place."""
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


def test_rope_turns_pairs_of_dims():
    x, positions = np.random.default_rng(0).normal(size=(2, 5, 3, 6)), np.array([[0, 1, 2, 100, 4000]] * 2)
    np.testing.assert_allclose(
        rope(jnp.float32(x), jnp.asarray(positions), 1e6), rotated(x, positions, 1e6), rtol=1e-3, atol=1e-3
    )


def test_rope_angles_are_float32_for_bfloat16_inputs():
    """bf16 rounds position 257 to 256: two tokens at one place, the older a prompt is the more of them."""
    x = jnp.broadcast_to(jnp.bfloat16([1, 0.5]), (1, 2, 1, 2))
    out = np.float32(rope(x, jnp.array([[256, 257]]), 1e4))
    np.testing.assert_allclose(out, rotated(np.float64(x), np.array([[256, 257]]), 1e4), atol=0.01)
    assert np.abs(out[0, 0] - out[0, 1]).max() > 0.1


def test_rope_depends_on_distances_only():
    draw = np.random.default_rng(0)
    q, k = jnp.float32(draw.normal(size=(2, 1, 1, 6)))

    def score(at: int, other: int) -> float:
        return float(jnp.sum(rope(q[None], jnp.array([[at]]), 1e4) * rope(k[None], jnp.array([[other]]), 1e4)))

    assert score(13, 9) == pytest.approx(score(104, 100), rel=1e-3)
    assert score(13, 9) != pytest.approx(score(13, 8), rel=1e-3)


@pytest.mark.parametrize(
    ("x", "weight", "contracted", "formula"),
    [("btd", "dnh", 1, "btnh"), ("btnh", "nhd", 2, "btd"), ("bd", "dv", 1, "bv")],
)
def test_dot_is_the_einsum_its_dims_spell(x: str, weight: str, contracted: int, formula: str):
    sizes, draw = {"b": 5, "t": 9, **{letter: getattr(SHAPE, letter) for letter in "dnhv"}}, np.random.default_rng(0)
    one, two = (jnp.float32(draw.normal(size=[sizes[letter] for letter in dims])) for dims in (x, weight))
    expected = np.einsum(f"{x},{weight}->{formula}", np.float64(one), np.float64(two))
    np.testing.assert_allclose(dot(one, two, contracted), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_float32_sums_of_bfloat16_products():
    """256 products of 1.0039 (in bf16) add up to 257 within float32's rounding; a bf16 result would say 256 or 258."""
    model = Qwen2(
        lambda name, dims: jnp.full(
            tuple({"v": 4, "d": 256}.get(letter, 1) for letter in dims), 1.0078125, jnp.bfloat16
        ),
        tied=True,
    )
    out = logits(model, jnp.full((1, 256), 1.0, jnp.bfloat16))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, np.full((1, 4), 258.0))
    np.testing.assert_array_equal(
        logits(model, jnp.ones((1, 256), jnp.bfloat16).at[0, 0].set(0)), np.full((1, 4), 258.0 - 1.0078125)
    )


# --- what must not change the answer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hidden(model: Qwen2) -> np.ndarray:
    return np.asarray(jax.jit(lambda model: hidden_states(model, TOKENS, SHAPE))(model))


def test_later_tokens_change_nothing_before_them(model: Qwen2, hidden: np.ndarray):
    """Right padding is what stands there, whatever its id: no mask by token id is needed, or made."""
    other = np.concatenate([TOKENS[:, :6], (TOKENS[:, 6:] + 1) % SHAPE.v], axis=1)
    changed = np.asarray(jax.jit(lambda model: hidden_states(model, other, SHAPE))(model))
    np.testing.assert_allclose(changed[:, :6], hidden[:, :6], rtol=1e-5, atol=1e-5)
    assert np.abs(changed[:, 6:] - hidden[:, 6:]).min(axis=(1, 2)).max() > 0
    assert not np.allclose(changed[:, 6:], hidden[:, 6:])


def test_rows_do_not_mix(model: Qwen2, hidden: np.ndarray):
    alone = jax.jit(lambda model: hidden_states(model, TOKENS[3:4], SHAPE))(model)
    np.testing.assert_allclose(alone, hidden[3:4], rtol=1e-5, atol=1e-5)


def test_every_weight_matters(model: Qwen2):
    """A weight without a gradient would be one that is read from the wrong place, or not at all."""
    weights = np.random.default_rng(1).normal(size=(B, T, SHAPE.v))

    def total(model: Qwen2) -> Any:
        return jnp.sum(logits(model, hidden_states(model, TOKENS, SHAPE)) * weights)

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(model)):
        per_layer = np.asarray(gradient).reshape(gradient.shape[0] if gradient.shape[0] == SHAPE.l else 1, -1)
        if "k_bias_kh" in jax.tree_util.keystr(
            path
        ):  # rotation makes it matter a little: without, softmax would not see it
            assert np.all(np.abs(per_layer).max(axis=1) > 1e-6), path
        else:
            assert np.all(np.abs(per_layer).max(axis=1) > 1e-3), path


def test_recomputation_changes_no_gradient(model: Qwen2):
    def total(model: Qwen2, remat: bool) -> Any:
        return jnp.sum(hidden_states(model, TOKENS, SHAPE, remat=remat) ** 3)

    kept, recomputed = (jax.jit(jax.grad(total), static_argnums=1)(model, remat) for remat in (False, True))
    for one, two in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["zero1", "fsdp"])  # whole over the data axis, and split
def test_the_forward_is_the_same_on_every_mesh(mesh: Mesh, layout: str, model: Qwen2, hidden: np.ndarray):
    tokens = np.concatenate([TOKENS, TOKENS[:3]])  # 8 rows, for up to 8 data shards
    shardings = weight_shardings(SHAPE, LAYOUTS[layout].compute, mesh)
    forward = jax.jit(lambda model: hidden_states(model, tokens, SHAPE, placement=training_placement(SHAPE, mesh)))
    np.testing.assert_allclose(forward(placed(model, shardings))[:B], hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_an_embedding_split_over_the_vocabulary(shards: int, model: Qwen2):
    tokens, table = jnp.arange(SHAPE.v), model.embed_vd[...]
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
    """Norms 1, biases 0, matrices of d^-1/2, smaller by depth where they write the residual stream; an embedding of its own 1."""
    shape = dataclasses.replace(SHAPE, tied=tied)
    model, matrix = initial(shape, jax.random.key(0)), SHAPE.d**-0.5
    special = {
        "o_nhd": matrix / (2 * SHAPE.l) ** 0.5,
        "down_fd": matrix / (2 * SHAPE.l) ** 0.5,
        "embed_vd": matrix if tied else 1.0,
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32
        if "norm" in name:
            np.testing.assert_array_equal(leaf, np.ones(leaf.shape))
        elif "bias" in name:
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
        else:
            deviation = next((special[key] for key in special if f".{key}." in f"{name}."), matrix)
            assert np.std(leaf) == pytest.approx(deviation, rel=0.15), name


def test_a_model_from_scratch_follows_from_its_key():
    one, same, other = (initial(SHAPE, jax.random.key(seed)) for seed in (0, 0, 1))
    for a, b, c in zip(*map(jax.tree.leaves, (one, same, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.array_equal(a, c) == (np.ptp(a) == 0)
    matrices = [leaf for leaf in jax.tree.leaves(one) if np.ptp(leaf)]
    assert len({leaf.reshape(-1)[0].item() for leaf in matrices}) == len(matrices)  # no two drawn with one key


def test_tied_models_have_one_matrix_for_both_ends():
    shape = dataclasses.replace(SHAPE, tied=True)
    model = random_weights(shape)
    assert model.tied
    assert not random_weights(SHAPE).tied
    assert len(jax.tree.leaves(abstract(shape))) == len(jax.tree.leaves(abstract(SHAPE))) - 1
    x = jnp.float32(np.random.default_rng(0).normal(size=(3, SHAPE.d)))
    np.testing.assert_allclose(logits(model, x), x @ model.embed_vd[...].T, rtol=1e-5, atol=1e-5)
