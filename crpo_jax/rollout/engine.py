"""Serves a whole batch of prompts: which rows are decoded together, and when.

Rows start in waves, the responses of a group beside each other over one copy of their prompt's keys and values. Where half
of a wave ended, the rest is collected into fewer rows and set aside, and the next wave starts; what was set aside is joined
with others of its length and goes on when it fills a loop again, or when no prompt waits. So the device is busy with running
rows, caches are as long as what they hold, and one long response holds up nobody.

The schedule follows from lengths alone and decides only when a row is decoded, never what it says: keys belong to prompt and
sample.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from crpo_jax.errors import InputError
from crpo_jax.model import huggingface
from crpo_jax.model.attention import AttentionKind
from crpo_jax.model.decode import Cache, SamplerWeights
from crpo_jax.model.lora import Policy
from crpo_jax.model.placement import to_sampler
from crpo_jax.model.shape import Shape, read_shape
from crpo_jax.parallel.layout import LAYOUTS, ROWS_B, TENSOR, TOKENS_BT, check_layout
from crpo_jax.parallel.mesh import data_size, fetch, make_mesh, put
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.sample import RUNNING, STOPPED, Drawn, Rows, programs

# Few sizes, so that few programs compile.
PROMPT_SLOTS = 32  # prompts are padded to this times a power of two, or one and a half times that
RESPONSE_SLOTS = 128  # a cache has this times a power of two
HALVINGS = 2  # a loop has as many rows as a wave, or half, or a quarter of them


class Response(NamedTuple):
    """One sampled response. `tokens` hold the stop token where there is one; `logprobs` are the sampler's, one per token."""

    prompt: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool


class Tally(NamedTuple):
    """How far a call is: prompts and responses that are done, tokens drawn in all and for those, decode steps, the bytes of cache
    that the last steps read on each device, and seconds since it began."""

    prompts: int
    responses: int
    total: int
    tokens: int
    done_tokens: int
    steps: int
    cache_bytes: int
    seconds: float

    @property
    def mean_length(self) -> float:
        """Of the responses that are done: too short a guess for the rest, since short ones are done first."""
        return self.done_tokens / max(self.responses, 1)

    @property
    def seconds_left(self) -> float:
        """As if every response to come took as long as those that are done."""
        return self.seconds / max(self.responses, 1) * (self.total - self.responses)


@dataclass
class Row:
    """A response in the making."""

    prompt: int
    sample: int
    number: int
    prompt_length: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def cached(self) -> int:
        """Tokens in the cache: all but the last."""
        return self.prompt_length + len(self.tokens) - 1


def filler() -> Row:
    """What stands where no row is."""
    return Row(0, 0, 0, 1, 0, ended=True)


@dataclass(eq=False)
class Deck:
    """Rows decoded together, those of one data shard after the other, and their cache; `cursor` is the next slot to write."""

    rows: list[Row]
    cache: list[Cache]
    cursor: int

    @property
    def running(self) -> list[Row]:
        return [row for row in self.rows if not row.ended]

    @property
    def slots(self) -> int:
        return self.cache[0].k_bksh.shape[2]

    @property
    def reach(self) -> int:
        """Tokens of its longest running row."""
        return max(row.cached for row in self.running)


def doubled(first: int, wanted: int) -> int:
    """The smallest first * 2^i that is at least `wanted`."""
    return first * 2 ** max(0, math.ceil(math.log2(wanted / first)))


def response_slots(wanted: int, most: int) -> int:
    """Of a cache for `wanted` tokens of responses that have `most` at most."""
    return min(doubled(RESPONSE_SLOTS, wanted), most)


def prompt_slots(length: int) -> int:
    """Of a wave whose longest prompt has this length."""
    return min(doubled(PROMPT_SLOTS, length), doubled(PROMPT_SLOTS * 3 // 2, length))


@dataclass(frozen=True)
class Engine:
    """Samples responses with weights in their sampling form (`crpo_jax.model.placement.to_sampler`).

    At most `slots` rows are decoded together on each data shard (or one group, where that has more), and the host looks at
    them every `chunk` steps.
    """

    shape: Shape
    mesh: Mesh
    how: Sampling
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
        finished: Callable[[list[Response]], None] | None = None,
        progress: Callable[[Tally], None] | None = None,
    ) -> list[list[Response]]:
        """`group` responses per prompt, by prompt in the order given.

        `ids` number the prompts for their keys (default: their positions), `limits` bound the response tokens per prompt.
        After every look at the rows, `finished` is handed the responses that ended since the last, and `progress` the tally.
        """
        ids = list(range(len(prompts))) if ids is None else list(ids)
        limits = [self.max_new_tokens] * len(prompts) if limits is None else list(limits)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not len(prompt) or not 1 <= limit <= self.max_new_tokens:
                expected = f"at least 1 token and a limit between 1 and {self.max_new_tokens}"
                raise InputError(f"prompt {index}: expected {expected}, got {len(prompt)} tokens, limit {limit}")
        out: list[list[Response]] = [[] for _ in prompts]
        if not prompts:
            return out
        schedule = Schedule(self, weights, prompts, ids, limits, key, group)
        while schedule.work():
            responses = schedule.look()
            for response in responses:
                out[response.prompt].append(response)
            if finished and responses:
                finished(responses)
            if progress:
                progress(schedule.tally(out))
        return [sorted(responses, key=lambda response: response.sample) for responses in out]


class Schedule:
    """One call's waiting prompts and decks of rows."""

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
        self.weights, self.prompts, self.ids, self.limits, self.key, self.group = (
            weights,
            prompts,
            ids,
            limits,
            key,
            group,
        )
        self.mesh, self.chunk, self.shards = (
            engine.mesh,
            min(engine.chunk, engine.max_new_tokens),
            data_size(engine.mesh),
        )
        self.run = programs(engine.shape, engine.mesh, engine.how, self.chunk, engine.attention)
        self.waiting = sorted(
            range(len(prompts)), key=lambda i: len(prompts[i])
        )  # a wave is padded to its longest prompt
        self.entries = max(
            1, min(engine.slots // group, -(-len(prompts) // self.shards))
        )  # prompts of a wave on each data shard
        self.width = self.entries * group
        self.prompt_slots, self.most = prompt_slots(max(map(len, prompts))), engine.max_new_tokens
        self.decks: list[Deck] = []
        self.drawn: tuple[Deck, Drawn] | None = None
        self.began, self.tokens, self.steps, self.cache_bytes = time.perf_counter(), 0, 0, 0

    # --- which deck is next -------------------------------------------------------------------------------------------

    def work(self) -> bool:
        """Starts a wave or lets a deck go on; False where nothing is left to do."""
        full = [deck for deck in self.decks if self.full(deck)]
        if full:
            self.advance(max(full, key=lambda deck: deck.reach))
        elif self.waiting and self.room_for_a_wave():
            self.begin()
        elif self.decks:
            # With prompts waiting the longest rows make room; with none the shortest catch up with those they can be joined to.
            self.advance((max if self.waiting else min)(self.decks, key=lambda deck: deck.reach))
        else:
            return False
        return True

    def full(self, deck: Deck) -> bool:
        """More than half of a wave's rows run: worth a loop of its own."""
        return 2 * self.busiest(deck.rows) > self.width

    def room_for_a_wave(self) -> bool:
        """What is set aside takes less than half of the memory that one wave of the longest length would."""
        aside = sum(deck.slots * len(deck.rows) // self.shards for deck in self.decks)
        return 2 * aside <= self.width * (self.prompt_slots + self.most)

    def busiest(self, rows: Sequence[Row]) -> int:
        """Running rows of the data shard that has most."""
        each = len(rows) // self.shards
        return max(sum(not row.ended for row in rows[first : first + each]) for first in range(0, len(rows), each))

    # --- what a deck does ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prefills a wave, its prompts dealt to the data shards in turn, and draws every row's first token."""
        size = self.entries * self.shards
        chosen, self.waiting = self.waiting[:size], self.waiting[size:]
        tokens = np.zeros((size, prompt_slots(max(len(self.prompts[index]) for index in chosen))), np.int32)
        rows = [filler() for _ in range(size * self.group)]
        for turn, index in enumerate(chosen):
            place = turn % self.shards * self.entries + turn // self.shards
            prompt = self.prompts[index]
            tokens[place, : len(prompt)] = prompt
            for sample in range(self.group):
                rows[place * self.group + sample] = Row(index, sample, self.ids[index], len(prompt), self.limits[index])
        slots = (self.prompt_slots, response_slots(self.chunk, self.most))
        cache, drawn = self.run.start(
            self.weights, put(tokens, self.mesh, TOKENS_BT), self.told(rows), self.key, slots=slots
        )
        self.decks.append(Deck(rows, list(cache), 0))
        self.drawn = self.decks[-1], drawn

    def advance(self, deck: Deck) -> None:
        """A chunk of steps, fewer where no row needs as many."""
        steps = self.steps_of(deck.running)
        cache, deck.cache = tuple(deck.cache), []
        self.cache_bytes = sum(part.nbytes for layer in cache for part in layer) // self.mesh.devices.size
        cache, drawn = self.run.advance(
            self.weights, cache, self.told(deck.rows), self.key, np.int32(deck.cursor), np.int32(steps)
        )
        deck.cache, deck.cursor, self.steps = list(cache), deck.cursor + steps, self.steps + steps
        self.drawn = deck, drawn

    def steps_of(self, running: Sequence[Row]) -> int:
        return min(self.chunk, max(row.limit - len(row.tokens) for row in running))

    def told(self, rows: Sequence[Row]) -> Rows:
        columns = zip(
            *(
                (
                    row.tokens[-1] if row.tokens else 0,
                    len(row.tokens),
                    0 if row.ended else row.limit,
                    row.prompt_length,
                    row.number,
                    row.sample,
                )
                for row in rows
            ),
            strict=True,
        )
        return Rows(*(put(np.array(column, np.int32), self.mesh, ROWS_B) for column in columns))

    # --- what the host sees after it ----------------------------------------------------------------------------------

    def look(self) -> list[Response]:
        """The responses that ended in the last call; the rows that go on are made ready for the next."""
        assert self.drawn is not None
        deck, drawn = self.drawn
        tokens, logprobs, counts, reasons = fetch(drawn)
        ended = []
        for place, row in enumerate(deck.rows):
            if row.ended:
                continue
            new = slice(counts[place])
            row.tokens += tokens[place, new].tolist()
            row.logprobs += logprobs[place, new].tolist()
            self.tokens += int(counts[place])
            row.ended = bool(reasons[place] != RUNNING)
            if row.ended:
                arrays = np.array(row.tokens, np.int32), np.array(row.logprobs, np.float32)
                ended.append(Response(row.prompt, row.sample, *arrays, bool(reasons[place] == STOPPED)))
        self.drawn = None
        self.settle(deck)
        return ended

    def settle(self, deck: Deck) -> None:
        """Room for the next chunk, in as few rows as hold those that run, with others of this length where neither fills a loop."""
        if not deck.running:
            self.decks.remove(deck)
            return
        slots, few = self.collected_slots([deck]), self.rows_for(self.busiest(deck.rows))
        aside = [
            other
            for other in self.decks
            if other is not deck and not self.full(other) and self.collected_slots([other]) == slots
        ]
        if aside and not self.full(deck):
            self.collect([deck, *aside[:1]])
        elif few * self.shards < len(deck.rows):
            self.collect([deck])
        elif deck.cursor + self.steps_of(deck.running) > deck.slots:
            if deck.cache[0].prompt_k_pkth.shape[2]:
                self.widen(deck)
            else:
                self.collect([deck])

    def collected_slots(self, decks: Sequence[Deck]) -> int:
        """Of a cache with whole rows and room for the next chunk."""
        wanted = max(deck.reach + self.steps_of(deck.running) for deck in decks)
        return response_slots(wanted, self.prompt_slots + self.most)

    def rows_for(self, busiest: int) -> int:
        """Rows on each data shard that hold so many: a wave's, or a few halvings of that."""
        return min(
            size for size in (-(-self.width // 2**halving) for halving in range(HALVINGS + 1)) if size >= busiest
        )

    def widen(self, deck: Deck) -> None:
        slots = response_slots(deck.cursor + self.steps_of(deck.running), self.most)
        for index in range(len(deck.cache)):  # a layer at a time: old and new never stand side by side whole
            deck.cache[index] = self.run.widen(deck.cache[index], slots=slots)

    def collect(self, decks: Sequence[Deck]) -> None:
        """Puts the running rows of these decks into a new one, each with its own copy of its prompt, all ended at one cursor."""
        dtype, slots = self.weights.dtype, self.collected_slots(decks)
        cursor = max(deck.reach for deck in decks)
        shards: list[list[tuple[int, int, Row]]] = [[] for _ in range(self.shards)]  # (deck, place on its shard, row)
        for number, deck in enumerate(decks):
            each = len(deck.rows) // self.shards
            for place, row in enumerate(deck.rows):
                if not row.ended:
                    shards[place // each].append((number, place % each, row))
        size = self.rows_for(max(map(len, shards)))
        rows, sources = (
            [filler() for _ in range(size * self.shards)],
            np.full((len(decks), size * self.shards), -1, np.int32),
        )
        for shard, found in enumerate(shards):
            for place, (number, source, row) in enumerate(found, shard * size):
                rows[place], sources[number, place] = row, source
        chosen = [put(source, self.mesh, ROWS_B) for source in sources]
        cache: list[Cache] = []
        while decks[0].cache:  # a layer at a time: the old one is given back before the next is made
            layer = self.run.empty(b=len(rows), slots=slots, dtype=dtype)
            for deck, source in zip(decks, chosen, strict=True):
                layer = self.run.collect(deck.cache.pop(0), layer, source, np.int32(deck.cursor), np.int32(cursor))
            cache.append(layer)
        self.decks = [deck for deck in self.decks if deck not in decks] + [Deck(rows, cache, cursor)]

    def tally(self, out: Sequence[Sequence[Response]]) -> Tally:
        prompts, done = (
            sum(len(responses) == self.group for responses in out),
            [response for responses in out for response in responses],
        )
        lengths, total = sum(len(response.tokens) for response in done), len(out) * self.group
        return Tally(
            prompts,
            len(done),
            total,
            self.tokens,
            lengths,
            self.steps,
            self.cache_bytes,
            time.perf_counter() - self.began,
        )


def load(
    path: str,
    how: Sampling,
    max_new_tokens: int,
    *,
    mesh: str = "",
    dtype: str = "bfloat16",
    slots: int = 128,
    chunk: int = 16,
) -> tuple[Engine, SamplerWeights]:
    """An engine and the weights of a Hugging Face folder or hub id in their sampling form; `mesh` is DxM, by default all devices on
    the data axis."""
    devices, shape = make_mesh(mesh), read_shape(huggingface.model_folder(path))
    check_layout(LAYOUTS["replicated"], devices, {dim: getattr(shape, dim) for dim in "dnkhfv"})
    model = huggingface.load_model(path, devices, TENSOR, jnp.dtype(dtype))
    weights = to_sampler(shape, devices, dtype)(Policy(model))
    return Engine(shape, devices, how, max_new_tokens, slots, chunk), weights
