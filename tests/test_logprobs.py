"""Log-probs and entropies: chunk by chunk they are log_softmax(logits / temperature), and so are their gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHAPE, random_weights
from jax.test_util import check_grads

from crpo_jax.model.transformer import Transformer
from crpo_jax.update.logprobs import chunk_length, token_logprobs

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

B, T = 5, 12
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def hidden() -> jax.Array:
    return jnp.float32(np.random.default_rng(0).normal(size=(B, T, SHAPE.d)))


@pytest.fixture(scope="module")
def targets() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(SHAPE.v, size=(B, T)), jnp.int32)


def plain(model: Transformer, hidden: jax.Array, targets: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64."""
    scores = np.asarray(hidden, np.float64) @ np.asarray(model["unembed_dv"], np.float64) / TEMPERATURE
    scores -= scores.max(axis=-1, keepdims=True)
    all_logprobs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    entropy = -(np.exp(all_logprobs) * all_logprobs).sum(axis=-1)
    return np.take_along_axis(all_logprobs, np.asarray(targets)[..., None], axis=-1)[..., 0], entropy


def by_chunks(chunk: int, with_entropy: bool = True) -> Any:
    return jax.jit(
        lambda model, hidden, targets: token_logprobs(
            model, hidden, targets, TEMPERATURE, chunk, with_entropy=with_entropy
        )
    )


@pytest.mark.parametrize("chunk", [1, 3, 4, 12])
def test_every_chunk_is_the_formula(chunk: int, model: Transformer, hidden: jax.Array, targets: jax.Array):
    logprobs, entropy = by_chunks(chunk)(model, hidden, targets)
    expected_logprobs, expected_entropy = plain(model, hidden, targets)
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=1e-5, atol=1e-5)


def test_is_jax_log_softmax(model: Transformer, hidden: jax.Array, targets: jax.Array):
    distributions = jax.nn.log_softmax(model.logits(hidden) / TEMPERATURE)
    expected = jnp.take_along_axis(distributions, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(by_chunks(4)(model, hidden, targets)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 12])
def test_entropy_only_on_request(chunk: int, model: Transformer, hidden: jax.Array, targets: jax.Array):
    without = by_chunks(chunk, with_entropy=False)(model, hidden, targets)
    np.testing.assert_array_equal(without[1], np.zeros((B, T)))
    np.testing.assert_allclose(without[0], by_chunks(chunk)(model, hidden, targets)[0], rtol=1e-6)


def test_gradients_of_every_chunk_are_those_of_the_plain_formula(
    model: Transformer, hidden: jax.Array, targets: jax.Array
):
    """For hidden states and weights, with a random factor on each log-prob and entropy."""
    weights = np.random.default_rng(2).normal(size=(2, B, T)).astype(np.float32)

    def ours(model: Transformer, hidden: jax.Array, chunk: int) -> Any:
        logprobs, entropy = token_logprobs(model, hidden, targets, TEMPERATURE, chunk, with_entropy=True)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy)

    def written_out(model: Transformer, hidden: jax.Array) -> Any:
        distributions = jax.nn.log_softmax(hidden @ model["unembed_dv"] / TEMPERATURE)
        logprobs = jnp.take_along_axis(distributions, targets[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(distributions) * distributions, axis=-1)
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy)

    expected = jax.jit(jax.grad(written_out, argnums=(0, 1)))(model, hidden)
    for chunk in (3, 12):
        gradients = jax.jit(jax.grad(ours, argnums=(0, 1)), static_argnums=2)(model, hidden, chunk)
        np.testing.assert_allclose(gradients[0]["unembed_dv"], expected[0]["unembed_dv"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradients[1], expected[1], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences(model: Transformer, hidden: jax.Array, targets: jax.Array):
    def both(part: Any) -> Any:
        return token_logprobs(model, jnp.asarray(part), targets[:1, :4], TEMPERATURE, 2, with_entropy=True)

    check_grads(both, (hidden[:1, :4],), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_extreme_logits_stay_finite(model: Transformer, hidden: jax.Array, targets: jax.Array):
    """Logits of 1e6: probabilities underflow, log-probs and gradients do not become NaN."""
    huge = hidden * 1e6
    assert all(np.all(np.isfinite(values)) for values in by_chunks(4)(model, huge, targets))
    gradient = jax.grad(lambda hidden: sum(jnp.sum(values) for values in by_chunks(4)(model, hidden, targets)))(huge)
    assert np.all(np.isfinite(gradient))


def test_bfloat16_weights_give_float32_logprobs(hidden: jax.Array, targets: jax.Array):
    """The same numbers as float32 arithmetic on the rounded weights, not log-probs rounded to 8 bits."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_weights(SHAPE))
    logprobs, _ = by_chunks(4)(narrow, hidden.astype(jnp.bfloat16), targets)
    assert logprobs.dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    expected, _ = plain(wide, hidden.astype(jnp.bfloat16).astype(jnp.float32), targets)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("t", "rows", "chunk", "expected"),
    [(12, 2, 8, 4), (12, 2, 100, 12), (12, 2, 1, 1), (7, 1, 6, 1), (5120, 4, 512, 128), (96, 0, 50, 48)],
)
def test_chunk_length(t: int, rows: int, chunk: int, expected: int):
    """The longest divisor of the row's length whose rows stay within the budget; never 0, whatever the budget."""
    assert chunk_length(t, rows, chunk) == expected


def test_chunk_length_always_divides():
    for t in range(1, 40):
        for chunk in (1, 5, 17, 1000):
            length = chunk_length(t, 3, chunk)
            assert t % length == 0
            assert length * 3 <= chunk or length == 1
