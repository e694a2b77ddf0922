"""Attention of queries over keys and values, for training and for decoding.

n query heads share k KV heads in groups of r = n / k. Scores and softmax are float32, whatever the compute type.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float

from crpo_jax.errors import InputError
from crpo_jax.model.precision import precision_of

AttentionKind = Literal["xla", "cudnn", "splash"]

QUERY_BLOCK = 128  # XLA's attention computes a row in blocks of queries, each a multiple of this many
MAX_QUERY_BLOCKS = 8
REMAT_ABOVE = 1024  # longer rows recompute their scores in the backward pass instead of storing them
MASKED = -1e30  # added to the score of a key that a query must not see; finite, so that no row of scores is all -inf
SPLASH_TILES = (512, 256, 128)  # of queries and keys, the largest that divides the row; a TPU needs at least 128 lanes
INTERPRET = False  # runs Splash without a TPU, slowly: for tests


def choose_attention(setting: str, platform: str, dtype: Any, head_width: int) -> AttentionKind:
    """The kernel that `parallel.attention` selects on a platform.

    auto prefers cuDNN on GPUs (16-bit types, head widths that are a multiple of 8 up to 128) and Splash on TPUs (16-bit
    types: it multiplies float32 at the TPU's default precision, which is bf16's), and is XLA otherwise. Raises
    InputError for a kernel that this platform or model cannot run.
    """
    platform = {"cuda": "gpu"}.get(platform, platform)
    narrow = jnp.dtype(dtype).itemsize == 2
    cudnn_fits = narrow and head_width % 8 == 0 and head_width <= 128
    runs: dict[AttentionKind, bool] = {
        "cudnn": platform == "gpu" and cudnn_fits,
        "splash": platform == "tpu" and narrow,
        "xla": True,
    }
    for kind, available in runs.items():
        if available and setting in ("auto", kind):
            return kind
    expected = {"cudnn": "cudnn on gpu", "splash": "splash on tpu"}.get(setting, setting)
    got = f"{setting} on {platform}"
    if setting == "cudnn" and platform == "gpu":
        expected += " with model.dtype=bfloat16 and heads of a multiple of 8 up to 128"
        got += f" with {jnp.dtype(dtype)} and heads of {head_width}"
    if setting == "splash" and platform == "tpu":
        expected += " with model.dtype=bfloat16"
        got += f" with {jnp.dtype(dtype)}"
    raise InputError(f"parallel.attention: expected auto, xla, or {expected}, got {got}")


def causal_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    kind: AttentionKind,
    scale: float | None = None,
    window: int = 0,
) -> Float[Array, "b t n h"]:
    """Each token attends to itself and to earlier tokens, with a `window` to the last so many of them, itself included;
    rows are right-padded, so no real token ever sees padding. Scores are multiplied by `scale`, by default h^-1/2.

    Queries may come in float32 beside 16-bit keys: they are rounded here, by Splash once they are scaled.
    A padding token attends at least to itself, so no output is NaN. Splash needs a row length that is a multiple of
    128, and leaves other rows to XLA. On several devices the kernels need `shard_map`: the compiler cannot split them.
    """
    b, t, n, h = q.shape
    factor = h**-0.5 if scale is None else scale
    if kind == "splash" and t % SPLASH_TILES[-1] == 0:
        return splash_attention(q, k, v, factor, window)
    q = q.astype(k.dtype)
    if kind == "cudnn":
        left = (window - 1, 0) if window else None
        return jax.nn.dot_product_attention(
            q, k, v, scale=factor, is_causal=True, local_window_size=left, implementation="cudnn"
        )
    kv = k.shape[2]
    r, size = n // kv, query_block(t)
    product = functools.partial(jnp.einsum, precision=precision_of(q), preferred_element_type=jnp.float32)
    # Heads beside rows and the r queries of a KV head along its query axis: plain batched products, XLA's fastest form.
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    queries = q.reshape(b, t, kv, r, h).transpose(0, 2, 3, 1, 4)

    def attend_block(first: int, queries: Array, keys: Array, values: Array) -> Array:
        """Queries [b, k, r, block, h] from position `first` on, over the keys up to the last of them."""
        block, visible = queries.shape[3], keys.shape[2]
        flat = queries.reshape(b, kv, r * block, h)
        scores = product("bkqh,bksh->bkqs", flat, keys) * factor
        age = first + jnp.tile(jnp.arange(block), r)[:, None] - (first + block - visible + jnp.arange(visible))
        seen = (age >= 0) & (age < window) if window else age >= 0
        scores += jnp.where(seen, 0.0, MASKED)
        mass = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        mixed = product("bkqs,bksh->bkqh", mass.astype(v.dtype), values)
        return (mixed / jnp.sum(mass, axis=-1, keepdims=True)).astype(v.dtype).reshape(b, kv, r, block, h)

    attend = jax.checkpoint(attend_block, static_argnums=0) if t > REMAT_ABOVE else attend_block
    oldest = [max(0, first - window + 1) if window else 0 for first in range(0, t, size)]
    blocks = [
        attend(first, queries[:, :, :, first : first + size], *(x[:, :, start : first + size] for x in (keys, values)))
        for first, start in zip(range(0, t, size), oldest, strict=True)
    ]
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def query_block(t: int) -> int:
    """How many queries of a row of `t` tokens are computed together; a block skips the keys after its last query."""
    return QUERY_BLOCK * -(-t // (QUERY_BLOCK * MAX_QUERY_BLOCKS))


def splash_attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b t k h"], v: Float[Array, "b t k h"], scale: float, window: int
) -> Float[Array, "b t n h"]:
    """Causal attention by the TPU's own kernel, whose scores never leave the chip; `t` is a multiple of 128."""
    t, n, _ = q.shape[1:]
    tile = next(size for size in SPLASH_TILES if t % size == 0)
    mask: Any = splash_attention_mask.CausalMask((t, t))
    if window:
        mask = splash_attention_mask.LocalMask((t, t), window_size=(window - 1, 0), offset=0)
    kernel: Any = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * n),
        block_sizes=splash_attention_kernel.BlockSizes(tile, tile, tile, tile, tile, tile, tile, tile),
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET,
    )
    scaled = (q.astype(jnp.float32) * scale).astype(k.dtype)  # of float32 queries the only rounding
    heads_first = [x.transpose(0, 2, 1, 3) for x in (scaled, k, v)]
    return jax.vmap(kernel)(*heads_first).transpose(0, 2, 1, 3)


def decode_attention(
    q: Float[Array, "b n h"],
    prompt_k: Float[Array, "p k t h"],
    prompt_v: Float[Array, "p k t h"],
    prompt_seen: Bool[Array, "b t"],
    cache_k: Float[Array, "b k s h"],
    cache_v: Float[Array, "b k s h"],
    cache_seen: Bool[Array, "b s"],
    scale: float | None = None,
) -> Float[Array, "b n h"]:
    """One new token per row over the keys of its prompt and of its own response.

    The g rows of a group share their prompt's keys, which are read once per group.
    """
    b, n, h = q.shape
    q, factor = q.astype(prompt_k.dtype), h**-0.5 if scale is None else scale
    p, kv, t, _ = prompt_k.shape
    g, r = b // p, n // kv
    product = functools.partial(jnp.einsum, precision=precision_of(q))
    grouped = q.reshape(p, g, kv, r, h).transpose(0, 2, 1, 3, 4).reshape(p, kv, g * r, h)
    own = q.reshape(b, kv, r, h)
    prompt_scores = product("pkqh,pkth->pkqt", grouped, prompt_k, preferred_element_type=jnp.float32) * factor
    prompt_scores = prompt_scores.reshape(p, kv, g, r, t).transpose(0, 2, 1, 3, 4).reshape(b, kv, r, t)
    prompt_scores = jnp.where(prompt_seen[:, None, None], prompt_scores, -jnp.inf)
    own_scores = product("bkrh,bksh->bkrs", own, cache_k, preferred_element_type=jnp.float32) * factor
    own_scores = jnp.where(cache_seen[:, None, None], own_scores, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([prompt_scores, own_scores], axis=-1), axis=-1).astype(prompt_v.dtype)
    over_prompt = weights[..., :t].reshape(p, g, kv, r, t).transpose(0, 2, 1, 3, 4).reshape(p, kv, g * r, t)
    mixed = product("pkqt,pkth->pkqh", over_prompt, prompt_v).reshape(p, kv, g, r, h)
    mixed = mixed.transpose(0, 2, 1, 3, 4).reshape(b, kv, r, h)
    return (mixed + product("bkrs,bksh->bkrh", weights[..., t:], cache_v)).reshape(b, n, h)
