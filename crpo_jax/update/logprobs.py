"""Log-probs and entropies of tokens, in float32 and in chunks, so that [b, t, v] logits never stand in memory at
once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crpo_jax.model.transformer import Transformer


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
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """log softmax(logits / temperature) of each target, and the distribution's entropy (0 where not asked for).

    Without `entropy_gradient` the entropy is a constant, which the backward pass does not make again. `chunk` tokens of
    a row each are computed at a time and again in the backward pass; `constrain` places the logits.
    """
    b, t, d = hidden.shape

    @jax.checkpoint
    def of_chunk(part: tuple[Array, Array]) -> tuple[Array, Array]:
        scores = constrain(model.logits(part[0])) / temperature
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
        return of_chunk((hidden, targets))
    hidden = hidden.reshape(b, t // chunk, chunk, d).swapaxes(0, 1)
    targets = targets.reshape(b, t // chunk, chunk).swapaxes(0, 1)
    logprobs, entropy = jax.lax.map(of_chunk, (hidden, targets))
    return logprobs.swapaxes(0, 1).reshape(b, t), entropy.swapaxes(0, 1).reshape(b, t)
