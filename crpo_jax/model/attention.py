"""Attention of queries over keys and values, for training and for decoding.

n query heads share k KV heads in groups of r = n / k. Scores and softmax are float32, whatever the compute type.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float

from crpo_jax.errors import InputError

Implementation = Literal["xla", "cudnn", "splash"]

PIECE = 128  # queries that are taken together are a multiple of this,
PIECES = 8  # and as many as make no more than so many pieces of a row
KEPT = 1024  # longer rows make their scores again in the backward pass instead of keeping them
UNSEEN = -1e30  # added to the score of a key that a query must not see; finite, so that no row of scores is all -inf
SPLASH_BLOCKS = (
    512,
    256,
    128,
)  # tile sizes of queries and keys, the largest that divides the row; 128 lanes are a TPU's least
INTERPRET = False  # Splash without a TPU, slowly: tests set it


def implementation(wanted: str, platform: str, dtype: Any, head_width: int) -> Implementation:
    """What `parallel.attention` means on a platform: auto is cuDNN on GPUs where it can (16 bits, heads of a multiple of 8 up to
    128), Splash on TPUs, and XLA elsewhere. A kernel that this platform or model cannot run is refused."""
    platform = {"cuda": "gpu"}.get(platform, platform)
    cudnn = jnp.dtype(dtype).itemsize == 2 and head_width % 8 == 0 and head_width <= 128
    possible: dict[str, bool] = {"xla": True, "cudnn": platform == "gpu" and cudnn, "splash": platform == "tpu"}
    if wanted == "auto":
        return "cudnn" if possible["cudnn"] else "splash" if possible["splash"] else "xla"
    for name in ("xla", "cudnn", "splash"):
        if name == wanted and possible[name]:
            return name
    reason = (
        " with model.dtype=bfloat16 and heads of a multiple of 8 up to 128"
        if wanted == "cudnn" and platform == "gpu"
        else ""
    )
    here = f"{wanted} on {platform}" + (f" with {jnp.dtype(dtype)} and heads of {head_width}" if reason else "")
    names = {"cudnn": "cudnn on gpu", "splash": "splash on tpu"}
    raise InputError(f"parallel.attention: expected auto, xla, or {names.get(wanted, wanted)}{reason}, got {here}")


def causal_attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b t k h"], v: Float[Array, "b t k h"], implementation: Implementation
) -> Float[Array, "b t n h"]:
    """Each token attends to itself and those before it; rows are right-padded, so no real token ever sees padding.

    A padding token attends to itself at least, so nothing here is NaN. Splash takes rows of whole tiles; others go to XLA. On
    more than one device the kernels need `shard_map` around them: the compiler cannot split them.
    """
    b, t, n, h = q.shape
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    if implementation == "splash" and t % SPLASH_BLOCKS[-1] == 0:
        return splash(q, k, v)
    kv = k.shape[2]
    r, size = n // kv, piece(t)
    # Heads beside rows and the r queries of a KV head along its query axis: plain batched products, as fast as XLA has them.
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    queries = q.reshape(b, t, kv, r, h).transpose(0, 2, 3, 1, 4)

    def one(first: int, queries: Array, keys: Array, values: Array) -> Array:
        here, there = queries.shape[3], keys.shape[2]
        scores = (
            jnp.einsum("bkqh,bksh->bkqs", queries.reshape(b, kv, r * here, h), keys, preferred_element_type=jnp.float32)
            * h**-0.5
        )
        seen = first + jnp.tile(jnp.arange(here), r)[:, None] >= jnp.arange(there)
        scores += jnp.where(seen, 0.0, UNSEEN)
        mass = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        mixed = jnp.einsum("bkqs,bksh->bkqh", mass.astype(v.dtype), values, preferred_element_type=jnp.float32)
        return (mixed / jnp.sum(mass, axis=-1, keepdims=True)).astype(v.dtype).reshape(b, kv, r, here, h)

    one = jax.checkpoint(one, static_argnums=0) if t > KEPT else one
    out = [
        one(first, queries[:, :, :, first : first + size], *(x[:, :, : first + size] for x in (keys, values)))
        for first in range(0, t, size)
    ]
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def piece(t: int) -> int:
    """How many queries of rows of `t` tokens are taken together: they skip the keys after the last of them."""
    return PIECE * -(-t // (PIECE * PIECES))


def splash(
    q: Float[Array, "b t n h"], k: Float[Array, "b t k h"], v: Float[Array, "b t k h"]
) -> Float[Array, "b t n h"]:
    """Causal attention by the TPU's own kernel; scores never leave the chip. `t` is a multiple of 128."""
    t, n, h = q.shape[1:]
    b = next(size for size in SPLASH_BLOCKS if t % size == 0)
    kernel: Any = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((t, t))] * n),
        block_sizes=splash_attention_kernel.BlockSizes(b, b, b, b, b, b, b, b),
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET,
    )
    heads_first = [x.transpose(0, 2, 1, 3) for x in (q * jnp.asarray(h**-0.5, q.dtype), k, v)]
    return jax.vmap(kernel)(*heads_first).transpose(0, 2, 1, 3)


def decode_attention(
    q: Float[Array, "b n h"],
    prompt_k: Float[Array, "p k t h"],
    prompt_v: Float[Array, "p k t h"],
    prompt_seen: Bool[Array, "p t"],
    cache_k: Float[Array, "b k s h"],
    cache_v: Float[Array, "b k s h"],
    cache_seen: Bool[Array, "b s"],
) -> Float[Array, "b n h"]:
    """One new token per row over its prompt's keys, which the g rows of a group share unrepeated, and its own response's."""
    b, n, h = q.shape
    p, kv, t, _ = prompt_k.shape
    g, r = b // p, n // kv
    grouped = (
        q.reshape(p, g, kv, r, h).transpose(0, 2, 1, 3, 4).reshape(p, kv, g * r, h)
    )  # a group reads its prompt once
    own = q.reshape(b, kv, r, h)
    prompt_scores = jnp.einsum("pkqh,pkth->pkqt", grouped, prompt_k, preferred_element_type=jnp.float32) * h**-0.5
    prompt_scores = jnp.where(prompt_seen[:, None, None], prompt_scores, -jnp.inf)
    prompt_scores = prompt_scores.reshape(p, kv, g, r, t).transpose(0, 2, 1, 3, 4).reshape(b, kv, r, t)
    own_scores = jnp.einsum("bkrh,bksh->bkrs", own, cache_k, preferred_element_type=jnp.float32) * h**-0.5
    own_scores = jnp.where(cache_seen[:, None, None], own_scores, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([prompt_scores, own_scores], axis=-1), axis=-1).astype(prompt_v.dtype)
    over_prompt = weights[..., :t].reshape(p, g, kv, r, t).transpose(0, 2, 1, 3, 4).reshape(p, kv, g * r, t)
    out = (
        jnp.einsum("pkqt,pkth->pkqh", over_prompt, prompt_v)
        .reshape(p, kv, g, r, h)
        .transpose(0, 2, 1, 3, 4)
        .reshape(b, kv, r, h)
    )
    return (out + jnp.einsum("bkrs,bksh->bkrh", weights[..., t:], cache_v)).reshape(b, n, h)
