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
    hidden: Float[Array, "c t d"],
    targets: Int[Array, "c t"],
    temperature: float,
    chunk: int,
    *,
    with_entropy: bool,
    entropy_gradient: bool = True,
    constrain: Callable[[Array], Array] = lambda x: x,
    constrain_gradient: Callable[[Array], Array] = lambda x: x,
) -> tuple[Float[Array, "c t"], Float[Array, "c t"]]:
    """log softmax(logits / temperature) of each target, and the distribution's entropy (0 where not asked for).

    A target below 0 is none: the chunks before the first target and after the last are not computed. Without
    `entropy_gradient` the entropy is a constant, which the backward pass does not make again. `chunk` tokens of a row
    each are computed at a time and again in the backward pass; `constrain` places the logits, `constrain_gradient` the
    gradient of the output projection.
    """
    c, t, d = hidden.shape

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

    hidden = hidden.reshape(c, t // chunk, chunk, d).swapaxes(0, 1)
    targets = targets.reshape(c, t // chunk, chunk).swapaxes(0, 1)
    measured: Any = map_chunks(of_chunk, constrain_gradient, model.output, hidden, targets)
    return measured[0].swapaxes(0, 1).reshape(c, t), measured[1].swapaxes(0, 1).reshape(c, t)


OfChunk = Callable[[Array, Any], tuple[Array, Array]]


def span_of(targets: Int[Array, "chunks c t"]) -> tuple[Array, Array]:
    """The first chunk with a target, and the one after the last; the same on every device."""
    wanted = jnp.any(targets >= 0, axis=(1, 2))
    numbers = jnp.arange(1, len(wanted) + 1)
    return jnp.argmax(wanted), jnp.max(jnp.where(wanted, numbers, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def map_chunks(
    of_chunk: OfChunk, constrain: Callable[[Array], Array], weight: Array, hidden: Array, targets: Array
) -> tuple[Array, Array]:
    """`of_chunk(weight, (hidden, targets))` of each chunk that has a target, computed again in the backward pass; 0 of
    the others.

    The weight's gradients are summed over the chunks in float32, and not, as by `lax.map`, in the weight's type.
    `constrain` places the sum.
    """

    def write_chunk(place: Array, written: tuple[Array, Array]) -> tuple[Array, Array]:
        measured = of_chunk(weight, (hidden[place], targets[place]))
        return written[0].at[place].set(measured[0]), written[1].at[place].set(measured[1])

    empty = jnp.zeros(targets.shape, jnp.float32)
    return jax.lax.fori_loop(*span_of(targets), write_chunk, (empty, empty))


def map_chunks_backward(
    of_chunk: OfChunk, constrain: Callable[[Array], Array], saved: tuple[Array, Array, Array], gradients: Any
) -> tuple[Array, Array, None]:
    weight, hidden, targets = saved

    def add_chunk(place: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, of_hidden = carry
        wide = weight.astype(jnp.float32)  # not computed: `unembed` narrows it again, and its gradient is float32
        pull = jax.vjp(lambda weight, hidden: of_chunk(weight, (hidden, targets[place])), wide, hidden[place])[1]
        of_weight, of_chunk_hidden = pull((gradients[0][place], gradients[1][place]))
        return total + of_weight, of_hidden.at[place].set(of_chunk_hidden)

    start = jnp.zeros(weight.shape, jnp.float32), jnp.zeros_like(hidden)
    total, of_hidden = jax.lax.fori_loop(*span_of(targets), add_chunk, start)
    # The sum over devices comes first, or the layers' backward pass would run beside the whole float32 sum.
    total, of_hidden = jax.lax.optimization_barrier((constrain(total), of_hidden))
    return total.astype(weight.dtype), of_hidden, None


map_chunks.defvjp(lambda of_chunk, constrain, *of: (map_chunks(of_chunk, constrain, *of), of), map_chunks_backward)


def unpack_responses(values: Float[Array, "c s"], starts: Int[Array, " b"], t: int) -> Float[Array, "b t"]:
    """Of each response the values from its start on, `t` of them: those of what follows in the row where it is shorter.

    Every packed row has b / c responses.
    """
    rows, length = values.shape
    places = jnp.minimum(starts[:, None] + jnp.arange(t), length - 1).reshape(rows, -1)
    return jax.vmap(lambda row, places: row[places])(values, places).reshape(-1, t)
