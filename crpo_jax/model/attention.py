"""Attention of queries over keys and values, for training and for decoding.

n query heads share k KV heads in groups of r = n / k. Scores and softmax are float32, whatever the compute type.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Implementation = Literal["xla", "cudnn"]

QUERY_CHUNK = 512  # queries whose scores stand in memory at once
UNSEEN = -1e30  # added to the score of a key that a query must not see; finite, so that no row of scores is all -inf


def causal_attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b t k h"], v: Float[Array, "b t k h"], implementation: Implementation
) -> Float[Array, "b t n h"]:
    """Each token attends to itself and those before it; rows are right-padded, so no real token ever sees padding."""
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    b, t, n, h = q.shape
    kv = k.shape[2]
    r, chunk = n // kv, t if t % QUERY_CHUNK else min(QUERY_CHUNK, t)
    # Heads beside rows and the r queries of a KV head along its query axis: plain batched products, as fast as XLA has them.
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    queries = q.reshape(b, t // chunk, chunk, kv, r, h).transpose(1, 0, 3, 4, 2, 5).reshape(t // chunk, b, kv, r * chunk, h)

    def one(start: Array, queries: Array) -> Array:
        scores = jnp.einsum("bkqh,bksh->bkqs", queries, keys, preferred_element_type=jnp.float32) * h**-0.5
        seen = start + jnp.tile(jnp.arange(chunk), r)[:, None] >= jnp.arange(t)
        scores += jnp.where(seen, 0.0, UNSEEN)
        mass = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        mixed = jnp.einsum("bkqs,bksh->bkqh", mass.astype(v.dtype), values, preferred_element_type=jnp.float32)
        return (mixed / jnp.sum(mass, axis=-1, keepdims=True)).astype(v.dtype)

    starts = jnp.arange(0, t, chunk)
    out = one(starts[0], queries[0])[None] if t == chunk else jax.lax.map(lambda x: jax.checkpoint(one)(*x), (starts, queries))
    return out.reshape(t // chunk, b, kv, r, chunk, h).transpose(1, 0, 4, 2, 3, 5).reshape(b, t, n, h)


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
    grouped = q.reshape(p, g, kv, r, h).transpose(0, 2, 1, 3, 4).reshape(p, kv, g * r, h)  # a group reads its prompt once
    own = q.reshape(b, kv, r, h)
    prompt_scores = jnp.einsum("pkqh,pkth->pkqt", grouped, prompt_k, preferred_element_type=jnp.float32) * h**-0.5
    prompt_scores = jnp.where(prompt_seen[:, None, None], prompt_scores, -jnp.inf)
    prompt_scores = prompt_scores.reshape(p, kv, g, r, t).transpose(0, 2, 1, 3, 4).reshape(b, kv, r, t)
    own_scores = jnp.einsum("bkrh,bksh->bkrs", own, cache_k, preferred_element_type=jnp.float32) * h**-0.5
    own_scores = jnp.where(cache_seen[:, None, None], own_scores, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([prompt_scores, own_scores], axis=-1), axis=-1).astype(prompt_v.dtype)
    over_prompt = weights[..., :t].reshape(p, g, kv, r, t).transpose(0, 2, 1, 3, 4).reshape(p, kv, g * r, t)
    out = jnp.einsum("pkqt,pkth->pkqh", over_prompt, prompt_v).reshape(p, kv, g, r, h).transpose(0, 2, 1, 3, 4).reshape(b, kv, r, h)
    return (out + jnp.einsum("bkrs,bksh->bkrh", weights[..., t:], cache_v)).reshape(b, n, h)
