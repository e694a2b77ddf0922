"""Attention against the formula in float64, for training (whole or by blocks of queries) and for decoding."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHAPE, mesh_of
from jax.sharding import NamedSharding
from jax.test_util import check_grads

from crpo_jax.errors import InputError
from crpo_jax.model import attention
from crpo_jax.model.attention import causal_attention, choose_attention, decode_attention
from crpo_jax.model.placement import training_placement
from crpo_jax.parallel.layout import KV_BTKH, Q_BTNH

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

B, T = 5, 12
N, K, H = SHAPE.n, SHAPE.k, SHAPE.h


def random_qkv(b: int = B, t: int = T, seed: int = 0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(np.float32(rng.normal(size=(b, t, heads, H)) * scale) for heads in (N, K, K))


def attend(*qkv: Any) -> jax.Array:
    return causal_attention(*map(jnp.asarray, qkv), "xla")


def decode(*arrays: Any) -> jax.Array:
    return decode_attention(*map(jnp.asarray, arrays))


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k / sqrt(h)) v over this token and those before it, one head and one token at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for row, token, head in np.ndindex(q.shape[:3]):
        kv = head // (q.shape[2] // k.shape[2])
        scores = k[row, : token + 1, kv] @ q[row, token, head] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[row, token, head] = weights / weights.sum() @ v[row, : token + 1, kv]
    return out


@pytest.fixture(
    params=[(128, 1024), (4, 1024), (5, 0), (1, 0)],
    ids=lambda sizes: f"blocks of {sizes[0]}, scores stored up to {sizes[1]}",
)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows, equal blocks, a shorter last block, and the greatest number of blocks."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", request.param[0])
    monkeypatch.setattr(attention, "REMAT_ABOVE", request.param[1])


def test_is_the_formula(blocks: None):
    q, k, v = random_qkv()
    np.testing.assert_allclose(attend(q, k, v), naive(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_any_number_of_kv_heads(heads: int):
    rng = np.random.default_rng(1)
    q, k, v = (np.float32(rng.normal(size=(2, 7, n, H))) for n in (8, heads, heads))
    np.testing.assert_allclose(attend(q, k, v), naive(q, k, v), rtol=1e-5, atol=1e-6)


def test_rows_are_cut_into_at_most_eight_blocks():
    assert [attention.query_block(t) for t in (1, 128, 1024, 1025, 5120)] == [128, 128, 128, 256, 640]


def gradients(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Any:
    """Gradients of a sum that weights every output differently."""
    weights = np.random.default_rng(9).normal(size=q.shape)
    return jax.grad(lambda *x: jnp.sum(attend(*x) * weights), argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("remat_above", [0, 1024])
def test_gradients_by_blocks_are_the_gradients(remat_above: int, monkeypatch: pytest.MonkeyPatch):
    whole = gradients(*random_qkv())
    monkeypatch.setattr(attention, "QUERY_BLOCK", 5)
    monkeypatch.setattr(attention, "REMAT_ABOVE", remat_above)
    for ours, expected in zip(gradients(*random_qkv()), whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences(blocks: None):
    check_grads(lambda *x: attend(*x), random_qkv(b=1, t=4), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_no_token_sees_a_later_one(blocks: None):
    """Neither values nor gradients: right padding needs no mask."""
    q, k, v = random_qkv()
    changed = [np.concatenate([x[:, :7], x[:, 7:] * -3 + 1], axis=1) for x in (q, k, v)]
    np.testing.assert_array_equal(attend(q, k, v)[:, :7], attend(*changed)[:, :7])
    grads = jax.grad(lambda *x: jnp.sum(attend(*x)[:, :7] ** 2), argnums=(0, 1, 2))(q, k, v)
    assert all(not np.any(grad[:, 7:]) and np.any(grad[:, :7]) for grad in grads)


def test_rows_and_heads_do_not_mix():
    q, k, v = random_qkv()
    alone = attend(q[2:3], k[2:3], v[2:3])
    np.testing.assert_allclose(attend(q, k, v)[2:3], alone, rtol=1e-6, atol=1e-6)
    v_other = v.copy()
    v_other[:, :, 1] += 1  # KV head 1 is read by query heads 4 to 7
    changed = np.asarray(attend(q, k, v_other) - attend(q, k, v))
    np.testing.assert_allclose(changed, np.broadcast_to((np.arange(N) >= N // K)[:, None], changed.shape), atol=1e-5)


@pytest.mark.parametrize("scale", [1e2, 1e8])
def test_extreme_scores_stay_finite(blocks: None, scale: float):
    """Scores up to 1e16: the softmax becomes a maximum, and values and gradients stay finite."""
    q, k, v = random_qkv(scale=scale)
    v = random_qkv()[2]
    out = attend(q, k, v)
    np.testing.assert_allclose(out, naive(q, k, v), rtol=1e-3, atol=1e-3)
    assert all(np.all(np.isfinite(grad)) for grad in gradients(q, k, v))


def test_scores_are_float32_for_bfloat16_inputs():
    """In bf16, scores of about 300 would be off by up to 1, and weights by a factor of e."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in random_qkv(scale=8))
    out = attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = naive(*(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=0.02, atol=0.1)


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_splash_on_each_devices_rows_and_heads(monkeypatch: pytest.MonkeyPatch):
    """The TPU kernel, interpreted on 4 devices that split rows and heads, has the values and gradients of XLA's."""
    monkeypatch.setattr(attention, "INTERPRET", True)
    mesh, (q, k, v) = mesh_of(2, 2), random_qkv(b=2, t=128)
    weights = np.random.default_rng(9).normal(size=q.shape)

    def run(kind: Any) -> Any:
        attend = training_placement(SHAPE, mesh, kind).attend
        qkv = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((q, Q_BTNH), (k, KV_BTKH), (v, KV_BTKH))]
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attend(*x, None, scale, 0) * weights), argnums=(0, 1, 2)))(
            *qkv
        )

    scale = q.shape[-1] ** -0.5
    (value, grads), (expected, expected_grads) = run("splash"), run("xla")
    assert float(value) == pytest.approx(float(expected), rel=1e-4)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("width", [64, 128])
def test_splash_in_bfloat16_is_as_exact_as_xla(width: int, monkeypatch: pytest.MonkeyPatch):
    """The scale of 128 wide heads is no power of two: as a bf16 factor on bf16 queries it cost a second rounding, and
    three times XLA's error where scores are large."""
    monkeypatch.setattr(attention, "INTERPRET", True)
    rng = np.random.default_rng(0)
    q = jnp.float32(rng.normal(size=(1, 128, 2, width)) * 3)
    k, v, weights = (
        jnp.asarray(rng.normal(size=(1, 128, heads, width)) * size, jnp.bfloat16)
        for heads, size in ((1, 3), (1, 1), (2, 1))
    )

    def run(kind: Any, dtype: Any) -> list[np.ndarray]:
        """The output and all gradients, from queries in float32."""
        out, pull = jax.vjp(lambda *qkv: causal_attention(*qkv, kind), q, k.astype(dtype), v.astype(dtype))
        return [np.float32(x) for x in (out, *pull(weights.astype(out.dtype)))]

    splash, xla, exact = run("splash", jnp.bfloat16), run("xla", jnp.bfloat16), run("xla", jnp.float32)
    for ours, theirs, expected in zip(splash, xla, exact, strict=True):
        assert np.linalg.norm(ours - expected) <= 1.2 * np.linalg.norm(theirs - expected)


def test_rows_without_whole_tiles_go_to_xla():
    """Without a TPU, Splash would fail."""
    q, k, v = random_qkv()
    np.testing.assert_array_equal(causal_attention(*map(jnp.asarray, (q, k, v)), "splash"), attend(q, k, v))


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "width", "expected"),
    [
        ("auto", "cpu", "bfloat16", 128, "xla"),
        ("auto", "gpu", "bfloat16", 128, "cudnn"),
        ("auto", "cuda", "bfloat16", 64, "cudnn"),  # the platform name of a compile-only GPU
        ("auto", "gpu", "float32", 128, "xla"),
        ("auto", "gpu", "bfloat16", 6, "xla"),
        ("auto", "tpu", "bfloat16", 64, "splash"),
        ("auto", "tpu", "float32", 64, "xla"),
        ("xla", "tpu", "bfloat16", 128, "xla"),
    ],
)
def test_auto_follows_the_devices(setting: str, platform: str, dtype: str, width: int, expected: str):
    assert choose_attention(setting, platform, dtype, width) == expected


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "line"),
    [
        ("splash", "cpu", "float32", "parallel.attention: expected auto, xla, or splash on tpu, got splash on cpu"),
        ("cudnn", "tpu", "bfloat16", "parallel.attention: expected auto, xla, or cudnn on gpu, got cudnn on tpu"),
        (
            "cudnn",
            "gpu",
            "float32",
            "parallel.attention: expected auto, xla, or cudnn on gpu with model.dtype=bfloat16 "
            "and heads of a multiple of 8 up to 128, got cudnn on gpu with float32 and heads of 128",
        ),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(setting: str, platform: str, dtype: str, line: str):
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        choose_attention(setting, platform, dtype, 128)


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_decoding_is_the_last_row_of_causal_attention():
    """Prompts of different lengths in groups of 3, responses of 4 tokens in a cache of 6 slots."""
    p, g, t, s, cursor = 2, 3, 7, 6, 3
    lengths = np.array([7, 4])
    rng = np.random.default_rng(2)

    def normal(*sizes: int) -> np.ndarray:
        return np.float32(rng.normal(size=sizes))

    prompt_k, prompt_v = normal(p, K, t, H), normal(p, K, t, H)
    cache_k, cache_v, q = normal(p * g, K, s, H), normal(p * g, K, s, H), normal(p * g, N, H)
    out = decode(
        q,
        prompt_k,
        prompt_v,
        jnp.arange(t) < np.repeat(lengths, g)[:, None],
        cache_k,
        cache_v,
        jnp.arange(s) <= np.full((p * g, 1), cursor),
    )
    for row in range(p * g):
        prompt = row // g
        keys, values = (
            np.concatenate([of_prompt[prompt, :, : lengths[prompt]], own[row, :, : cursor + 1]], axis=1).transpose(
                1, 0, 2
            )[None]
            for of_prompt, own in ((prompt_k, cache_k), (prompt_v, cache_v))
        )
        queries = np.concatenate([np.zeros((1, keys.shape[1] - 1, N, H), np.float32), q[row][None, None]], axis=1)
        whole = attend(queries, keys, values)
        np.testing.assert_allclose(out[row], whole[0, -1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out[row], naive(queries, keys, values)[0, -1], rtol=1e-5, atol=1e-6)


def test_decoding_reads_no_slot_that_is_not_seen():
    """The contents of padding and unused slots do not matter, however extreme."""
    p, g, t, s = 2, 2, 4, 3
    rng = np.random.default_rng(3)
    arrays = [
        np.float32(rng.normal(size=sizes))
        for sizes in ((p * g, N, H), (p, K, t, H), (p, K, t, H), (p * g, K, s, H), (p * g, K, s, H))
    ]
    q, prompt_k, prompt_v, cache_k, cache_v = arrays
    prompt_seen, cache_seen = jnp.arange(t) < np.array([[2], [2], [3], [3]]), jnp.arange(s) <= np.zeros((p * g, 1))
    clean = decode(q, prompt_k, prompt_v, prompt_seen, cache_k, cache_v, cache_seen)
    for keys, values in ((prompt_k, prompt_v), (cache_k, cache_v)):
        keys[:, :, -1:], values[:, :, -1:] = 1e30, 1e30
    np.testing.assert_array_equal(decode(q, prompt_k, prompt_v, prompt_seen, cache_k, cache_v, cache_seen), clean)


def test_decoding_with_extreme_scores():
    p, g, t, s = 1, 2, 3, 2
    rng = np.random.default_rng(4)
    q, prompt_k, cache_k = (
        np.float32(rng.normal(size=sizes) * 1e8) for sizes in ((p * g, N, H), (p, K, t, H), (p * g, K, s, H))
    )
    prompt_v, cache_v = np.ones((p, K, t, H), np.float32), np.ones((p * g, K, s, H), np.float32)
    out = decode(q, prompt_k, prompt_v, jnp.ones((p * g, t), bool), cache_k, cache_v, jnp.ones((p * g, s), bool))
    np.testing.assert_allclose(out, np.ones_like(q), rtol=1e-6)


# --- windows ----------------------------------------------------------------------------------------------------------


def windowed(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
    """Each query over the keys of the last `window` tokens only, one query at a time."""
    out = np.zeros(q.shape)
    for place in range(q.shape[1]):
        first = max(0, place - window + 1)
        part = (x[:, first : place + 1] for x in (q, k, v))
        out[:, place] = naive(*part)[:, -1]
    return out


@pytest.mark.parametrize("window", [1, 5, 130, 400])
def test_a_window_hides_older_tokens(window: int):
    """Shorter than a block of queries, longer than one, and longer than the row."""
    q, k, v = random_qkv(b=2, t=300)
    ours = causal_attention(*map(jnp.asarray, (q, k, v)), "xla", window=window)
    np.testing.assert_allclose(ours, windowed(q, k, v, window), rtol=1e-5, atol=2e-6)


def test_splash_with_a_window_is_xlas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "INTERPRET", True)
    q, k, v = map(jnp.asarray, random_qkv(b=1, t=256))
    for window in (3, 200):
        ours, xla = (causal_attention(q, k, v, kind, window=window) for kind in ("splash", "xla"))
        np.testing.assert_allclose(ours, xla, rtol=1e-4, atol=1e-5)


def test_scores_are_scaled_as_told():
    q, k, v = map(jnp.asarray, random_qkv(b=1, t=9))
    doubled = causal_attention(2 * q, k, v, "xla")
    np.testing.assert_allclose(causal_attention(q, k, v, "xla", scale=2 * q.shape[-1] ** -0.5), doubled, rtol=1e-5)
