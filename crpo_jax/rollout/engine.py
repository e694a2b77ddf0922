"""Generates responses to many prompts: which rows are decoded together, and when.

Prompts start in waves; the responses of a group are neighbouring rows that share one copy of their prompt's keys and
values. Once half of a wave has finished, its running rows are gathered into a smaller batch and set aside, and the next
wave starts. A batch set aside is merged with others of its length, and continues when it is full again or no prompt
waits. So few finished rows are decoded, caches are little longer than their rows, and a long response delays no other.

The schedule depends on lengths alone and never changes a token: random keys belong to (prompt, sample).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crpo_jax.errors import InputError
from crpo_jax.model import huggingface
from crpo_jax.model.attention import AttentionKind
from crpo_jax.model.config_json import read_shape
from crpo_jax.model.decode import Cache, SamplerWeights
from crpo_jax.model.lora import Policy
from crpo_jax.model.placement import to_sampler
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import LAYOUTS, ROWS_B, TENSOR, TOKENS_BT, check_layout
from crpo_jax.parallel.mesh import data_size, fetch, make_mesh, put
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.sample import RUNNING, STOPPED, DecodedChunk, RowState, sampling_programs

# Few sizes, so that few programs compile.
PROMPT_SLOTS = 32  # prompts are padded to a power of two times this, or to one and a half times that
RESPONSE_SLOTS = 128  # a cache has a power of two times this
HALVINGS = 2  # a batch has as many rows as a wave, or half or a quarter of them


class Response(NamedTuple):
    """A sampled response to prompt number `prompt` of the call; `tokens` include the stop token, if one was drawn."""

    prompt: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray  # the sampler's, one per token
    stopped: bool


class RolloutProgress(NamedTuple):
    """The state of a `generate` call after a chunk."""

    prompts: int  # whose responses are all finished
    responses: int  # finished
    total: int  # responses to generate
    tokens: int  # drawn, also in unfinished responses
    done_tokens: int  # drawn in finished responses
    steps: int
    cache_bytes: int  # that each of the last steps read on every device
    seconds: float

    @property
    def mean_length(self) -> float:
        """Of the finished responses; an underestimate for the others, since short responses finish first."""
        return self.done_tokens / max(self.responses, 1)

    @property
    def seconds_left(self) -> float:
        """If responses keep finishing at the rate so far."""
        return self.seconds / max(self.responses, 1) * (self.total - self.responses)


@dataclass
class DecodeRow:
    """A response being decoded; the defaults are those of a row that only pads a batch."""

    prompt: int = 0
    sample: int = 0
    prompt_id: int = 0
    prompt_length: int = 1
    limit: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    running: bool = False

    @property
    def cached_tokens(self) -> int:
        """All but the last, which the next step adds to the cache."""
        return self.prompt_length + len(self.tokens) - 1


@dataclass(eq=False)
class DecodeBatch:
    """Rows decoded together, ordered by data shard, and their cache; `cursor` is the next slot to write."""

    rows: list[DecodeRow]
    cache: list[Cache]
    cursor: int
    slots: int  # of a layer without a window

    @property
    def running(self) -> list[DecodeRow]:
        return [row for row in self.rows if row.running]

    @property
    def longest(self) -> int:
        """Cached tokens of the longest running row."""
        return max(row.cached_tokens for row in self.running)


def double_until(start: int, minimum: int) -> int:
    """The smallest start * 2^i that is at least `minimum`."""
    return start * 2 ** max(0, math.ceil(math.log2(minimum / start)))


def response_slots(tokens: int, max_tokens: int) -> int:
    """Cache slots for this many response tokens, where responses have at most `max_tokens`."""
    return min(double_until(RESPONSE_SLOTS, tokens), max_tokens)


def prompt_slots(length: int) -> int:
    """Cache slots per prompt of a wave whose longest prompt has this length."""
    return min(double_until(PROMPT_SLOTS, length), double_until(PROMPT_SLOTS * 3 // 2, length))


@dataclass(frozen=True)
class Engine:
    """Generates responses with weights in their sampling form (`crpo_jax.model.placement.to_sampler`).

    Each data shard decodes at most `slots` rows together (or one group, if that is larger); the host reads new tokens
    every `chunk` steps.
    """

    shape: Shape
    mesh: Mesh
    sampling: Sampling
    max_new_tokens: int
    slots: int = 128
    chunk: int = 16
    attention: AttentionKind = "xla"

    def generate(
        self,
        weights: SamplerWeights,
        prompts: Sequence[Sequence[int]],
        *,
        key: jax.Array,
        group: int = 1,
        ids: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        on_finished: Callable[[list[Response]], None] | None = None,
        on_progress: Callable[[RolloutProgress], None] | None = None,
    ) -> list[list[Response]]:
        """`group` responses to each prompt, in the order of the prompts.

        A prompt's random numbers follow from its number in `ids` (default: its position); `limits` bound the response
        tokens of each prompt. After every chunk `on_finished` receives the responses that finished in it, if any.
        """
        ids = list(range(len(prompts))) if ids is None else list(ids)
        limits = [self.max_new_tokens] * len(prompts) if limits is None else list(limits)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not len(prompt) or not 1 <= limit <= self.max_new_tokens:
                expected = f"at least 1 token and a limit between 1 and {self.max_new_tokens}"
                raise InputError(f"prompt {index}: expected {expected}, got {len(prompt)} tokens, limit {limit}")
        groups: list[list[Response]] = [[] for _ in prompts]
        if not prompts:
            return groups
        scheduler = Scheduler(self, weights, prompts, ids, limits, key, group)
        while scheduler.unfinished:
            responses = scheduler.step()
            for response in responses:
                groups[response.prompt].append(response)
            if on_finished and responses:
                on_finished(responses)
            if on_progress:
                on_progress(scheduler.progress(groups))
        return [sorted(responses, key=lambda response: response.sample) for responses in groups]


class Scheduler:
    """The waiting prompts and the batches of one `generate` call."""

    def __init__(
        self,
        engine: Engine,
        weights: SamplerWeights,
        prompts: Sequence[Sequence[int]],
        ids: Sequence[int],
        limits: Sequence[int],
        key: jax.Array,
        group: int,
    ) -> None:
        self.weights, self.prompts, self.ids, self.limits, self.group = weights, prompts, ids, limits, group
        self.shape, self.mesh, self.shards = engine.shape, engine.mesh, data_size(engine.mesh)
        self.key = jax.make_array_from_callback((), NamedSharding(engine.mesh, P()), lambda _: key)
        self.max_new_tokens, self.chunk = engine.max_new_tokens, min(engine.chunk, engine.max_new_tokens)
        self.programs = sampling_programs(engine.shape, engine.mesh, engine.sampling, self.chunk, engine.attention)
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # waves pad to their longest prompt
        self.wave_prompts = max(1, min(engine.slots // group, -(-len(prompts) // self.shards)))  # on each data shard
        self.wave_rows = self.wave_prompts * group  # on each data shard
        self.prompt_slots = prompt_slots(max(map(len, prompts)))
        self.batches: list[DecodeBatch] = []
        self.started, self.tokens, self.steps, self.cache_bytes = time.perf_counter(), 0, 0, 0

    # --- which batch is next ------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.batches)

    def step(self) -> list[Response]:
        """Starts a wave or decodes a chunk of one batch; returns the responses that finished."""
        full = [batch for batch in self.batches if self.is_full(batch)]
        if not full and self.waiting and self.has_room_for_wave():
            batch, chunk = self.prefill_wave()
        else:
            # While prompts wait, the longest rows go first, to make room; then the shortest, to catch up and merge.
            choose = max if full or self.waiting else min
            batch = choose(full or self.batches, key=lambda batch: batch.longest)
            chunk = self.decode(batch)
        responses = self.read_chunk(batch, chunk)
        self.make_room(batch)
        return responses

    def is_full(self, batch: DecodeBatch) -> bool:
        """Whether more than half of a wave's rows are running: worth decoding without merging."""
        return 2 * self.most_running(batch.rows) > self.wave_rows

    def has_room_for_wave(self) -> bool:
        """Whether the batches set aside take at most half of the memory of one wave of the greatest length."""
        aside = sum(batch.slots * len(batch.rows) // self.shards for batch in self.batches)
        return 2 * aside <= self.wave_rows * (self.prompt_slots + self.max_new_tokens)

    def most_running(self, rows: Sequence[DecodeRow]) -> int:
        """Running rows of the data shard that has most."""
        size = len(rows) // self.shards
        return max(sum(row.running for row in rows[first : first + size]) for first in range(0, len(rows), size))

    # --- compiled calls -----------------------------------------------------------------------------------------------

    def prefill_wave(self) -> tuple[DecodeBatch, DecodedChunk]:
        """Prefills a wave, its prompts dealt to the data shards in turn, and draws the first token of every row."""
        size = self.wave_prompts * self.shards
        wave, self.waiting = self.waiting[:size], self.waiting[size:]
        tokens = np.zeros((size, prompt_slots(max(len(self.prompts[index]) for index in wave))), np.int32)
        rows = [DecodeRow() for _ in range(size * self.group)]
        for turn, index in enumerate(wave):
            place = turn % self.shards * self.wave_prompts + turn // self.shards
            prompt, limit = self.prompts[index], self.limits[index]
            tokens[place, : len(prompt)] = prompt
            for sample in range(self.group):
                row = DecodeRow(index, sample, self.ids[index], len(prompt), limit, running=True)
                rows[place * self.group + sample] = row
        slots = (self.prompt_slots, response_slots(self.chunk, self.max_new_tokens))
        cache, chunk = self.programs.prefill_and_draw(
            self.weights, put(tokens, self.mesh, TOKENS_BT), self.row_state(rows), self.key, slots=slots
        )
        self.batches.append(DecodeBatch(rows, list(cache), 0, slots[1]))
        return self.batches[-1], chunk

    def decode(self, batch: DecodeBatch) -> DecodedChunk:
        """Decodes a chunk of steps, or fewer if no row needs as many."""
        steps = self.next_steps(batch)
        cache, batch.cache = tuple(batch.cache), []
        self.cache_bytes = sum(part.nbytes for layer in cache for part in layer) // self.mesh.devices.size
        cursor, limit = self.put_scalar(batch.cursor), self.put_scalar(steps)
        cache, chunk = self.programs.decode_chunk(
            self.weights, cache, self.row_state(batch.rows), self.key, cursor, limit
        )
        batch.cache, batch.cursor, self.steps = list(cache), batch.cursor + steps, self.steps + steps
        return chunk

    def next_steps(self, batch: DecodeBatch) -> int:
        return min(self.chunk, max(row.limit - len(row.tokens) for row in batch.running))

    def row_state(self, rows: Sequence[DecodeRow]) -> RowState:
        columns = (
            [row.tokens[-1] if row.tokens else 0 for row in rows],
            [len(row.tokens) for row in rows],
            [row.limit if row.running else 0 for row in rows],
            [row.prompt_length for row in rows],
            [row.prompt_id for row in rows],
            [row.sample for row in rows],
        )
        return RowState(*(put(np.array(column, np.int32), self.mesh, ROWS_B) for column in columns))

    def put_scalar(self, value: int) -> jax.Array:
        """On all devices: a Python or NumPy scalar would be transferred inside the call of the compiled program."""
        return put(np.array(value, np.int32), self.mesh, P())

    # --- between compiled calls ---------------------------------------------------------------------------------------

    def read_chunk(self, batch: DecodeBatch, chunk: DecodedChunk) -> list[Response]:
        """Appends the new tokens to their rows; returns the responses that finished."""
        tokens, logprobs, counts, reasons = fetch(chunk)
        responses = []
        for place, row in enumerate(batch.rows):
            if not row.running:
                continue
            new = slice(counts[place])
            row.tokens += tokens[place, new].tolist()
            row.logprobs += logprobs[place, new].tolist()
            self.tokens += int(counts[place])
            row.running = bool(reasons[place] == RUNNING)
            if not row.running:
                arrays = np.array(row.tokens, np.int32), np.array(row.logprobs, np.float32)
                responses.append(Response(row.prompt, row.sample, *arrays, bool(reasons[place] == STOPPED)))
        return responses

    def make_room(self, batch: DecodeBatch) -> None:
        """Readies a batch for its next chunk: drops it, merges it with another, shrinks it or lengthens its cache."""
        if not batch.running:
            self.batches.remove(batch)
            return
        slots = self.gathered_slots([batch])
        mergeable = [
            other
            for other in self.batches
            if other is not batch and not self.is_full(other) and self.gathered_slots([other]) == slots
        ]
        if mergeable and not self.is_full(batch):
            self.gather([batch, mergeable[0]])
        elif self.row_count(self.most_running(batch.rows)) * self.shards < len(batch.rows):
            self.gather([batch])
        elif batch.cursor + self.next_steps(batch) > batch.slots:
            if batch.cache[0].prompt_k_pkth.shape[2]:
                self.grow(batch)
            else:
                self.gather([batch])

    def gathered_slots(self, batches: Sequence[DecodeBatch]) -> int:
        """Cache slots for whole rows, prompts included, and their next chunk."""
        tokens = max(batch.longest + self.next_steps(batch) for batch in batches)
        return response_slots(tokens, self.prompt_slots + self.max_new_tokens)

    def row_count(self, minimum: int) -> int:
        """Rows on each data shard of a batch that holds so many: a wave's, or a few halvings of that."""
        sizes = (-(-self.wave_rows // 2**halving) for halving in range(HALVINGS + 1))
        return min(size for size in sizes if size >= minimum)

    def grow(self, batch: DecodeBatch) -> None:
        """Lengthens a cache layer by layer, so that the old and the new one are never both whole in memory."""
        batch.slots = response_slots(batch.cursor + self.next_steps(batch), self.max_new_tokens)
        for index, windowed in enumerate(self.shape.windowed):
            slots = self.shape.cache_slots(batch.slots, windowed)
            if slots > batch.cache[index].k_bksh.shape[2]:
                batch.cache[index] = self.programs.grow_cache(batch.cache[index], slots=slots)

    def gather(self, batches: Sequence[DecodeBatch]) -> None:
        """Replaces these batches by one of their running rows, each with its own copy of its prompt, at one cursor."""
        dtype, slots = self.weights.dtype, self.gathered_slots(batches)
        by_shard: list[list[tuple[int, int, DecodeRow]]] = [[] for _ in range(self.shards)]  # (batch, place, row)
        for number, batch in enumerate(batches):
            size = len(batch.rows) // self.shards
            for place, row in enumerate(batch.rows):
                if row.running:
                    by_shard[place // size].append((number, place % size, row))
        size = self.row_count(max(map(len, by_shard)))
        rows = [DecodeRow() for _ in range(size * self.shards)]
        sources = np.full((len(batches), len(rows)), -1, np.int32)
        for shard, entries in enumerate(by_shard):
            for target, (number, place, row) in enumerate(entries, shard * size):
                rows[target], sources[number, target] = row, place
        on_devices = [put(row, self.mesh, ROWS_B) for row in sources]
        cursors = [self.put_scalar(batch.cursor) for batch in batches]
        cursor = max(batch.longest for batch in batches)
        new_cursor = self.put_scalar(cursor)
        cache: list[Cache] = []
        for windowed in self.shape.windowed:  # layer by layer: each old one is freed before the next is allocated
            layer = self.programs.empty_cache(b=len(rows), slots=self.shape.cache_slots(slots, windowed), dtype=dtype)
            for batch, source, old_cursor in zip(batches, on_devices, cursors, strict=True):
                layer = self.programs.gather_rows(
                    batch.cache.pop(0), layer, source, old_cursor, new_cursor, windowed=windowed
                )
            cache.append(layer)
        self.batches = [batch for batch in self.batches if batch not in batches] + [
            DecodeBatch(rows, cache, cursor, slots)
        ]

    def progress(self, groups: Sequence[Sequence[Response]]) -> RolloutProgress:
        return RolloutProgress(
            prompts=sum(len(responses) == self.group for responses in groups),
            responses=sum(map(len, groups)),
            total=len(groups) * self.group,
            tokens=self.tokens,
            done_tokens=sum(len(response.tokens) for responses in groups for response in responses),
            steps=self.steps,
            cache_bytes=self.cache_bytes,
            seconds=time.perf_counter() - self.started,
        )


def load_engine(
    path: str,
    sampling: Sampling,
    max_new_tokens: int,
    *,
    mesh: str = "",
    dtype: str = "bfloat16",
    slots: int = 128,
    chunk: int = 16,
) -> tuple[Engine, SamplerWeights]:
    """An engine and the weights, in their sampling form, of a Hugging Face folder or hub id.

    `mesh` is DxM; by default all devices are on the data axis.
    """
    devices, shape = make_mesh(mesh), read_shape(huggingface.model_folder(path))
    check_layout(LAYOUTS["replicated"], devices, {dim: getattr(shape, dim) for dim in "dnkhfv"})
    model = huggingface.load_model(path, devices, TENSOR, jnp.dtype(dtype))
    weights = to_sampler(shape, devices, dtype)(Policy(model))
    return Engine(shape, devices, sampling, max_new_tokens, slots, chunk), weights
