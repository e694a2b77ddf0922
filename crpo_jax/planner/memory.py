"""Memory of a device in every phase of a step, from shapes alone.

What a run keeps (weights in their forms, moments, caches, stored activations) follows exactly from shapes and layout tables.
What a program needs besides, `temporaries`, is the compiler's choice: here a model of it, which a test holds to compiled figures.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from crpo_jax.model import lora
from crpo_jax.model.attention import piece
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Qwen2
from crpo_jax.parallel.layout import CACHE_BKSH, TENSOR, WeightTable, kv_copies, sharding, spec
from crpo_jax.planner.job import Job
from crpo_jax.rollout.engine import response_slots

PARTS = ("weights", "master", "moments", "gradients", "reference", "KV cache", "activations", "temporaries")
PHASES = (
    "sampling copy",
    "prefill",
    "decode",
    "compute copy",
    "reference log-probs",
    "old log-probs",
    "accumulate",
    "optimizer step",
)
"""The programs of a step in the order in which they run; with one optimizer step per rollout there are no old log-probs.
`weights` are the copy that a phase computes with: the sampler's, made at the start of a rollout and given back after it, or the
trainer's, made for every optimizer step."""

Memory = dict[str, float]
"""Bytes of a device by part."""


def held(shapes: Any, shardings: Any) -> float:
    """Bytes that one device holds of these arrays."""
    sizes = jax.tree.map(lambda x, to: math.prod(to.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return float(sum(jax.tree.leaves(sizes)))


@functools.cache
def table_bytes(shape: Shape, table: WeightTable, mesh: Any, size: int, matrices: bool = False) -> float:
    """Bytes of the model's weights that a device holds under a table, at `size` bytes a number; or only of the blocks' matrices."""
    found = []

    def add(name: str, dims: str) -> None:
        if not matrices or (dims[0] == "l" and "norm" not in name and "bias" not in name):
            here = sharding(mesh, spec(table, name, mesh, shape.k, stacked=dims[0] == "l"))
            found.append(size * math.prod(here.shard_shape(shape.dims(dims))))

    Qwen2(add, tied=shape.tied)
    return float(sum(found))


def of_table(job: Job, table: WeightTable, dtype: Any) -> float:
    return table_bytes(job.shape, table, job.mesh, jnp.dtype(dtype).itemsize)


def adapters(job: Job, table: WeightTable, dtype: Any) -> float:
    """Bytes that a device holds of the adapters under a table."""
    low = job.settings.lora
    numbers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), lora.abstract(job.shape, low))
    return held(numbers, lora.shardings(job.shape, low, table, job.mesh))


def trained(job: Job) -> float:
    """Bytes of the float32 masters, and as many of their gradients: of all weights, or of the adapters alone."""
    return (adapters if job.settings.lora.rank else of_table)(job, job.layout.master, jnp.float32)


def reference(job: Job) -> WeightTable:
    """Where the frozen model lies: with adapters it is what they are trained on, too."""
    return job.layout.compute if job.settings.lora.rank else job.layout.reference


def sampling_weights(job: Job) -> float:
    """The tensor-parallel table; past as many model shards as KV heads, every shard has a copy of one."""
    s, dtype = job.shape, jnp.dtype(job.settings.model.dtype)
    heads = s.k * kv_copies(job.mesh, s.k)
    return table_bytes(dataclasses.replace(s, k=heads), TENSOR, job.mesh, dtype.itemsize)


def cache(job: Job, slots: int) -> float:
    """Keys and values of a wave: its prompts', and `slots` tokens of every row."""

    def one(rows: int, tokens: int) -> float:
        sizes = (rows * job.data, job.kv_heads * job.model, tokens, job.shape.h)
        array = jax.ShapeDtypeStruct(sizes, jnp.dtype(job.settings.model.dtype))
        return 2 * job.shape.l * held(array, sharding(job.mesh, CACHE_BKSH))

    return one(job.wave_prompts, job.settings.data.max_prompt_tokens) + one(job.wave_rows, slots)


def set_aside(job: Job) -> float:
    """The most that the sampler keeps of earlier waves while another runs: half of what a whole wave of the longest length holds, its
    rows with their own copies of their prompts (`crpo_jax.rollout.engine.Scheduler.has_room_for_wave`). Nothing where all is one wave."""
    longest = job.settings.data.max_prompt_tokens + job.settings.rollout.max_new_tokens
    return (cache(job, longest) - cache(job, 0)) / 2 if job.waves > 1 else 0.0


def resident(job: Job) -> dict[str, Memory]:
    """What each phase finds or leaves on a device, by phase and part: everything but activations, and of the temporaries
    only the step's micro-batches."""
    dtype, layout = jnp.dtype(job.settings.model.dtype), job.layout
    master = trained(job)
    always = {"master": master, "moments": moments(job), "reference": of_table(job, reference(job), dtype)}
    copied = (adapters if job.settings.lora.rank else of_table)(job, layout.compute, dtype)
    sampling, compute = {"weights": sampling_weights(job)}, {"weights": copied}
    rollout, gradients, kept = job.settings.rollout, {"gradients": master}, {"temporaries": batches(job)}
    phases = {
        "sampling copy": sampling,
        "prefill": {**sampling, "KV cache": cache(job, response_slots(rollout.chunk, rollout.max_new_tokens))},
        "decode": {**sampling, "KV cache": cache(job, rollout.max_new_tokens) + set_aside(job)},
        "compute copy": {**compute, **kept},
        "reference log-probs": {**compute, **kept},
        "old log-probs": {**compute, **kept},
        "accumulate": {**compute, **gradients, **kept},
        "optimizer step": {**gradients, **kept},
    }
    return {phase: {**always, **phases[phase]} for phase in phases_of(job)}


def batches(job: Job) -> float:
    """A step's micro-batches, which stay on the devices from the log-probs to the last update: four arrays of 4 bytes a token."""
    return 16.0 * job.rows * (job.settings.data.max_prompt_tokens + job.settings.rollout.max_new_tokens)


def phases_of(job: Job) -> list[str]:
    return [phase for phase in PHASES if phase != "old log-probs" or job.updates > 1]


def moments(job: Job) -> float:
    """Bytes of the optimizer's moments: AdamW keeps two a weight, Muon one for the matrices of the blocks and two elsewhere."""
    muon = job.settings.optimizer.algorithm == "muon"
    if job.settings.lora.rank:
        return (1 if muon else 2) * trained(job)
    return 2 * trained(job) - (table_bytes(job.shape, job.layout.master, job.mesh, 4, matrices=True) if muon else 0)


def activations(job: Job) -> float:
    """What the backward pass finds of the forward one: each block's input under remat, else about all of its arrays."""
    rows, t = job.micro_batch
    shape, width = job.shape, jnp.dtype(job.settings.model.dtype).itemsize
    stored = shape.d if job.settings.parallel.remat else 8 * (shape.d + shape.f / job.model)
    return float(shape.l * rows * t * stored * width)


def temporaries(job: Job) -> Memory:
    """A model of what each phase's program needs besides its arrays, by phase; its factors are fitted to compiled figures."""
    shape, layout, dtype = job.shape, job.layout, jnp.dtype(job.settings.model.dtype)
    rows, t = job.micro_batch
    prompts, longest = job.wave_prompts, job.settings.data.max_prompt_tokens
    whole, tpu = of_table(job, TENSOR, dtype), job.target.chip.kind == "tpu"
    embedding = shape.v * shape.d / job.model * dtype.itemsize
    chunk = max(job.settings.parallel.logprob_chunk, rows) * shape.v / job.model * 4  # float32 logits
    drawn = job.wave_rows * shape.v / job.model * 4

    def split(name: str) -> bool:
        return of_table(job, getattr(layout, name), dtype) < whole

    def block(tokens: float, wide: float, narrow: float) -> float:
        """So many arrays as wide as the feed-forward layer, and as the residual stream."""
        return tokens * dtype.itemsize * (wide * shape.f / job.model + narrow * shape.d)

    def scores(rows: int, t: int) -> float:
        """Float32 attention scores of one piece of queries, where they are made at all."""
        return rows * shape.n / job.model * min(t, piece(t)) * t * 4 if job.attention == "xla" else 0.0

    forward = chunk + block(rows * t, 2, 4)
    copied = (whole if tpu else whole / 4) if split("master") else 0.0
    blocks = of_table(job, layout.master, dtype) - embedding / (
        job.data if split("master") else 1
    )  # the gradients of all blocks
    if job.settings.lora.rank:  # nor are there gradients of the base, and it is stored as it computes
        blocks, embedding = adapters(job, layout.master, dtype), 0.0
        copied = (whole if tpu else whole / 4) if split("compute") else 0.0
    backward = blocks + max(embedding, 1.5 * chunk) + block(rows * t, 4.5, 9) + 3 * scores(rows, t)
    return {
        "sampling copy": copied,
        "prefill": (0 if tpu else 3 * scores(prompts, longest)) + block(prompts * longest, 2, 8) + 4 * drawn,
        "decode": 4 * drawn,
        "compute copy": 0.0 if split("compute") else copied,
        "reference log-probs": forward + (embedding if of_table(job, reference(job), dtype) < whole else 0),
        "old log-probs": forward + (embedding if split("compute") else 0),
        "accumulate": backward + (embedding if split("compute") else 0) + (2.5 * embedding if tpu else 0),
        "optimizer step": 0.0,
    }


def estimated(job: Job) -> dict[str, Memory]:
    """The memory of every phase, by phase and part, without compiling anything."""
    beside, stored = temporaries(job), activations(job)
    return {
        phase: {
            **parts,
            "activations": stored if phase == "accumulate" else 0.0,
            "temporaries": parts.get("temporaries", 0.0) + beside[phase],
        }
        for phase, parts in resident(job).items()
    }
