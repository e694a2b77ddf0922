"""Serves a whole batch of prompts: waves of rows around the jitted loop, one device-to-host crossing per wave.

The schedule decides only when a row is decoded, never what it says: keys belong to prompt and sample.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from crpo_jax.config import InputError
from crpo_jax.model.attention import Implementation
from crpo_jax.model.qwen2 import Qwen2
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import ROWS_B, TOKENS_BT
from crpo_jax.parallel.mesh import data_size, fetch, put
from crpo_jax.rollout.draw import Sampling, row_keys
from crpo_jax.rollout.sample import STOPPED, programs

PROMPT_MULTIPLE = 32  # prompts of a wave are padded to a multiple of this, so that few shapes compile


class Response(NamedTuple):
    """One sampled response. `tokens` hold the stop token where there is one; `logprobs` are the sampler's, one per token."""

    prompt: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool


@functools.cache
def jitted_keys(mesh: Mesh) -> Callable[..., jax.Array]:
    return jax.jit(row_keys, out_shardings=NamedSharding(mesh, ROWS_B))


@dataclass(frozen=True)
class Engine:
    """Samples responses with weights in their sampling form (`crpo_jax.model.placement.to_sampling`).

    `slots` rows are decoded together on each data shard; the cache grows by `chunk` slots while any row of a wave runs.
    """

    shape: Shape
    mesh: Mesh
    how: Sampling
    max_new_tokens: int
    slots: int = 128
    chunk: int = 128
    attention: Implementation = "xla"

    def generate(
        self,
        model: Qwen2,
        prompts: Sequence[Sequence[int]],
        *,
        key: jax.Array,
        group: int = 1,
        ids: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        finished: Callable[[list[Response]], None] | None = None,
    ) -> list[list[Response]]:
        """`group` responses per prompt, by prompt in the order given.

        `ids` number the prompts for their keys (default: their positions), `limits` bound the response tokens per prompt,
        and `finished` is handed every wave's responses as soon as they are on the host.
        """
        ids = list(range(len(prompts))) if ids is None else list(ids)
        limits = [self.max_new_tokens] * len(prompts) if limits is None else list(limits)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not len(prompt) or not 1 <= limit <= self.max_new_tokens:
                expected = f"at least 1 token and a limit between 1 and {self.max_new_tokens}"
                raise InputError(f"prompt {index}: expected {expected}, got {len(prompt)} tokens, limit {limit}")
        shards = data_size(self.mesh)
        wave_size = shards * max(1, min(self.slots // group, -(-len(prompts) // shards)))
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: list[list[Response]] = [[] for _ in prompts]
        for first in range(0, len(by_length), wave_size):
            chosen = by_length[first : first + wave_size]
            responses = self._wave(model, [(i, prompts[i], ids[i], limits[i]) for i in chosen], wave_size, key, group)
            for response in responses:
                out[response.prompt].append(response)
            if finished:
                finished(responses)
        return out

    def _wave(self, model: Qwen2, chosen: list[tuple[int, Sequence[int], int, int]], size: int, key: jax.Array, group: int) -> list[Response]:
        longest = max(len(prompt) for _, prompt, _, _ in chosen)
        tokens = np.zeros((size, -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE), np.int32)
        lengths, limits, numbers = np.ones(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.int32)
        for row, (_, prompt, number, limit) in enumerate(chosen):
            tokens[row, : len(prompt)], lengths[row], limits[row], numbers[row] = prompt, len(prompt), limit, number
        keys = jitted_keys(self.mesh)(key, numbers, np.arange(group))
        run = programs(self.shape, self.mesh, self.how, self.max_new_tokens, self.attention)
        slots = min(self.chunk, self.max_new_tokens)
        prompts, prompt_lengths = put(tokens, self.mesh, TOKENS_BT), put(lengths, self.mesh, ROWS_B)
        wave = run.start(model, prompts, prompt_lengths, keys, put(np.repeat(limits, group), self.mesh, ROWS_B), slots=slots)
        while True:
            wave = run.advance(model, wave)
            if slots >= self.max_new_tokens or bool(run.finished(wave.reason)):
                break
            slots = min(slots + self.chunk, self.max_new_tokens)
            layers = list(wave.cache)
            wave = wave._replace(cache=())
            for index, layer in enumerate(layers):  # one layer at a time: old and new never stand side by side whole
                layers[index] = run.grow(layer, slots=slots)
                del layer
            wave = wave._replace(cache=tuple(layers))
        drawn, logprobs, counts, reason = fetch((wave.tokens, wave.logprobs, wave.lengths, wave.reason))
        return [
            Response(index, g, drawn[row, : counts[row]], logprobs[row, : counts[row]], bool(reason[row] == STOPPED))
            for place, (index, _, _, _) in enumerate(chosen)
            for g, row in enumerate(range(place * group, (place + 1) * group))
        ]
