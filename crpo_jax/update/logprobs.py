"""Log-probs and entropies of tokens, in float32 and in chunks, so that [b, t, v] logits never stand in memory at
once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crpo_jax.model.transformer import Transformer, unembed


def chunk_length(t: int, rows: int, chunk: int) -> int:
    """The longest divisor of t whose rows * length tokens stay within `chunk`, at least 1."""
    wanted = max(1, chunk // max(rows, 1))
    return max(length for length in range(1, t + 1) if t % length == 0 and (length <= wanted or length == 1))


def token_logprobs(
    model: Transformer,
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    temperature: float,
    chunk: int,
    *,
    with_entropy: bool,
    entropy_gradient: bool = True,
    constrain: Callable[[Array], Array] = lambda x: x,
    constrain_gradient: Callable[[Array], Array] = lambda x: x,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """log softmax(logits / temperature) of each target, and the distribution's entropy (0 where not asked for).

    Without `entropy_gradient` the entropy is a constant, which the backward pass does not make again. `chunk` tokens of
    a row each are computed at a time and again in the backward pass; `constrain` places the logits,
    `constrain_gradient` the gradient of the output projection.
    """
    b, t, d = hidden.shape

    def of_chunk(output: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        scores = constrain(unembed(part[0], output, model.shape.tied)) / temperature
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        shifted = scores - top
        mass = jnp.exp(shifted)
        total = jnp.sum(mass, axis=-1)
        # A masked sum instead of a gather: it stays local where the vocabulary is split over devices.
        at_target = jnp.sum(jnp.where(jnp.arange(scores.shape[-1]) == part[1][..., None], shifted, 0), axis=-1)
        log_total = jnp.log(total)
        entropy = log_total - jnp.sum(mass * shifted, axis=-1) / total if with_entropy else jnp.zeros_like(total)
        return at_target - log_total, entropy if entropy_gradient else jax.lax.stop_gradient(entropy)

    if t == chunk:
        return jax.checkpoint(of_chunk)(model.output, (hidden, targets))
    hidden = hidden.reshape(b, t // chunk, chunk, d).swapaxes(0, 1)
    targets = targets.reshape(b, t // chunk, chunk).swapaxes(0, 1)
    measured: Any = map_chunks(of_chunk, constrain_gradient, model.output, (hidden, targets))
    return measured[0].swapaxes(0, 1).reshape(b, t), measured[1].swapaxes(0, 1).reshape(b, t)


OfChunk = Callable[[Array, Any], tuple[Array, Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def map_chunks(
    of_chunk: OfChunk, constrain: Callable[[Array], Array], weight: Array, chunks: Any
) -> tuple[Array, Array]:
    """`of_chunk(weight, chunk)` of each chunk in turn, computed again in the backward pass.

    The weight's gradients are summed over the chunks in float32, and not, as by `lax.map`, in the weight's type.
    `constrain` places the sum.
    """
    return jax.lax.map(lambda chunk: of_chunk(weight, chunk), chunks)


def map_chunks_backward(
    of_chunk: OfChunk, constrain: Callable[[Array], Array], saved: tuple[Array, Any], gradients: Any
) -> tuple[Array, Any]:
    weight, chunks = saved

    def add_chunk(total: Array, part: tuple[Any, Any]) -> tuple[Array, Any]:
        chunk, gradient = part
        wide = weight.astype(jnp.float32)  # not computed: `unembed` narrows it again, and its gradient is float32
        of_weight, of_hidden = jax.vjp(of_chunk, wide, chunk)[1](gradient)
        return total + of_weight, of_hidden

    start = jnp.zeros(weight.shape, jnp.float32)
    total, of_chunks = jax.lax.scan(add_chunk, start, (chunks, gradients), reverse=True)
    # The sum over devices comes first, or the layers' backward pass would run beside the whole float32 sum.
    total, of_chunks = jax.lax.optimization_barrier((constrain(total), of_chunks))
    return total.astype(weight.dtype), of_chunks


map_chunks.defvjp(lambda of_chunk, constrain, *of: (map_chunks(of_chunk, constrain, *of), of), map_chunks_backward)
