"""Memory of a device in every phase of an RL step, from shapes alone.

What a run holds (copies of the weights, moments, caches, stored activations) follows exactly from shapes and layouts.
What a program needs besides, `temporaries`, is the compiler's choice; a test compares estimates with compiled figures.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from crpo_jax.model.attention import query_block
from crpo_jax.model.lora import trained_shapes, trained_shardings
from crpo_jax.model.packed_attention import tile_length
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import CACHE_BKSH, TENSOR, Axes, find_layout, kv_copies, weight_spec
from crpo_jax.planner.planned_run import PlannedRun
from crpo_jax.rollout.engine import response_slots

MEMORY_PARTS = ("weights", "master", "moments", "gradients", "reference", "KV cache", "activations", "temporaries")
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
"""The programs of an RL step in their order; `list_phases` leaves out log-probs that a run does not need."""

Memory = dict[str, float]
"""Bytes on one device, by part."""

WeightCopy = Literal["master", "compute", "reference", "gathered"]
"""The copies of a layout, and `gathered`: whole on every data shard, as a block and the sampler compute with it."""


# --- weights: what depends on how the model declares and splits them --------------------------------------------------


def select_axes(run: PlannedRun, copy: WeightCopy) -> Axes:
    """How a copy is split. The reference of adapters is also their base, and is placed like the compute weights."""
    if copy == "gathered":
        return TENSOR
    if copy == "reference" and run.settings.lora.rank:
        copy = "compute"
    return getattr(find_layout(run.layout_name), copy)


@functools.cache
def count_weight_bytes(shape: Shape, axes: Axes, mesh: Any, width: int, matrices_alone: bool = False) -> float:
    """Bytes of the weights, or of the matrices that Muon trains, on a device at `width` bytes per number."""
    total = 0
    for weight in shape.weights:
        if weight.inputs or not matrices_alone:
            sharding = NamedSharding(mesh, weight_spec(axes, weight.stacked_dims, mesh, shape.k))
            total += width * math.prod(sharding.shard_shape(shape.dims(weight.stacked_dims)))
    return float(total)


def count_array_bytes(shapes: Any, shardings: Any) -> float:
    """Bytes of a tree of arrays on one device."""
    sizes = jax.tree.map(lambda x, to: math.prod(to.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return float(sum(jax.tree.leaves(sizes)))


def count_model_bytes(run: PlannedRun, copy: WeightCopy, dtype: Any) -> float:
    return count_weight_bytes(run.shape, select_axes(run, copy), run.mesh, jnp.dtype(dtype).itemsize)


def count_trained_bytes(run: PlannedRun, copy: WeightCopy, dtype: Any) -> float:
    """Bytes of what is trained: all weights, or the adapters alone."""
    shapes = trained_shapes(run.shape, run.settings.lora)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return count_array_bytes(arrays, trained_shardings(run.shape, run.settings.lora, select_axes(run, copy), run.mesh))


def count_sampling_bytes(run: PlannedRun) -> float:
    """Bytes of the sampler's copy: gathered, with KV heads repeated until every model shard has one, and adapters."""
    shape, dtype = run.shape, jnp.dtype(run.settings.model.dtype)
    repeated = dataclasses.replace(shape, k=shape.k * kv_copies(run.mesh, shape.k))
    adapters = count_trained_bytes(run, "gathered", dtype) if run.settings.lora.rank else 0.0
    return count_weight_bytes(repeated, TENSOR, run.mesh, dtype.itemsize) + adapters


def count_moment_bytes(run: PlannedRun) -> float:
    """Bytes of the moments: two per weight for AdamW; for Muon one in the matrices of blocks and two elsewhere."""
    master, muon = count_trained_bytes(run, "master", jnp.float32), run.settings.optimizer.algorithm == "muon"
    if run.settings.lora.rank:
        return (1 if muon else 2) * master
    axes = select_axes(run, "master")
    return 2 * master - (count_weight_bytes(run.shape, axes, run.mesh, 4, matrices_alone=True) if muon else 0)


# --- caches, batches, activations -------------------------------------------------------------------------------------


def count_cache_bytes(run: PlannedRun, slots: float) -> float:
    """Bytes of a wave's keys and values: those of its prompts, and `slots` tokens of every row; in a layer with a
    window, no more than that."""
    shape, dtype = run.shape, jnp.dtype(run.settings.model.dtype)
    heads = shape.k * kv_copies(run.mesh, shape.k)

    def count(rows: int, tokens: float) -> float:
        keys = jax.ShapeDtypeStruct((rows * run.data, heads, 1, shape.h), dtype)
        layers = sum(shape.cache_slots(tokens, windowed) for windowed in shape.windowed)
        return 2 * layers * count_array_bytes(keys, NamedSharding(run.mesh, CACHE_BKSH))

    return count(run.wave_prompts, run.settings.data.max_prompt_tokens) + count(run.wave_rows, slots)


def count_waiting_bytes(run: PlannedRun) -> float:
    """The most cache that rows of earlier waves occupy while another wave is decoded.

    The engine starts a wave only while they take less than half of a wave of the longest length, with a copy of the
    prompt in every row. 0 if all prompts fit in one wave.
    """
    return (count_cache_bytes(run, run.longest_row) - count_cache_bytes(run, 0)) / 2 if run.waves > 1 else 0.0


def count_batch_bytes(run: PlannedRun) -> float:
    """Bytes of a step's micro-batches, which stay on the devices until the last update: five numbers per place, and
    four per token that a response may have."""
    of_responses = run.packed_responses * run.settings.rollout.max_new_tokens
    return 4.0 * run.optimizer_steps * run.micro_batches * (5 * run.packed_length + 4 * of_responses)


def count_activation_bytes(run: PlannedRun) -> float:
    """Bytes stored for the backward pass: each block's input with remat, otherwise about all arrays of the block."""
    shape, width = run.shape, jnp.dtype(run.settings.model.dtype).itemsize
    stored = shape.d if run.settings.parallel.remat else 8 * (shape.d + shape.f / run.model)
    return float(shape.l * run.packed_length * stored * width)


# --- phases -----------------------------------------------------------------------------------------------------------


def list_phases(run: PlannedRun) -> list[str]:
    crpo = run.settings.crpo
    old = run.optimizer_steps > 1 and crpo.old_logprobs == "trainer"
    needed = {"reference log-probs": crpo.has_reference, "old log-probs": old}
    return [phase for phase in PHASES if needed.get(phase, True)]


def count_resident_memory(run: PlannedRun) -> dict[str, Memory]:
    """What is on a device before or after each phase, by phase and part: everything but activations, and of the
    temporaries only the step's micro-batches."""
    dtype, rollout = jnp.dtype(run.settings.model.dtype), run.settings.rollout
    master = count_trained_bytes(run, "master", jnp.float32)
    always = {"master": master, "moments": count_moment_bytes(run)}
    if run.settings.crpo.has_reference or run.settings.lora.rank:
        always["reference"] = count_model_bytes(run, "reference", dtype)
    sampling = {"weights": count_sampling_bytes(run)}
    compute = {"weights": count_trained_bytes(run, "compute", dtype)}
    gradients, batches = {"gradients": master}, {"temporaries": count_batch_bytes(run)}
    prefilled = count_cache_bytes(run, response_slots(rollout.chunk, rollout.max_new_tokens))
    decoded = count_cache_bytes(run, rollout.max_new_tokens) + count_waiting_bytes(run)
    phases = {
        "sampling copy": sampling,
        "prefill": {**sampling, "KV cache": prefilled},
        "decode": {**sampling, "KV cache": decoded},
        "compute copy": {**compute, **batches},
        "reference log-probs": {**compute, **batches},
        "old log-probs": {**compute, **batches},
        "accumulate": {**compute, **gradients, **batches},
        "optimizer step": {**gradients, **batches},
    }
    return {phase: {**always, **phases[phase]} for phase in list_phases(run)}


def estimate_temporaries(run: PlannedRun) -> Memory:
    """What each phase's program needs besides its arrays, by phase; the factors are fitted to compiled figures."""
    shape, dtype = run.shape, jnp.dtype(run.settings.model.dtype)
    t = run.packed_length
    prompts, longest = run.wave_prompts, run.settings.data.max_prompt_tokens
    whole, tpu = count_model_bytes(run, "gathered", dtype), run.target.chip.kind == "tpu"
    chunk = run.settings.parallel.logprob_chunk * shape.v / run.model * 4  # float32 logits
    drawn = run.wave_rows * shape.v / run.model * 4

    def is_split(copy: WeightCopy) -> bool:
        return count_model_bytes(run, copy, dtype) < whole

    def count_block(tokens: float, wide: float, narrow: float) -> float:
        """`wide` arrays of the feed-forward width and `narrow` ones of the residual stream."""
        return tokens * dtype.itemsize * (wide * shape.f / run.model + narrow * shape.d)

    def count_scores(rows: int, t: int) -> float:
        """Float32 attention scores of one block of queries, which attention kernels never store."""
        return rows * shape.n / run.model * min(t, query_block(t)) * t * 4 if run.attention == "xla" else 0.0

    if run.settings.lora.rank:  # the base has no gradients and is stored as it computes
        gathers, embedding = is_split("compute"), 0.0
        gradients = count_trained_bytes(run, "master", dtype)
    else:
        gathers, embedding = is_split("master"), shape.v * shape.d / run.model * dtype.itemsize
        gradients = count_model_bytes(run, "master", dtype) - embedding / (run.data if gathers else 1)
    copied = (whole if tpu else whole / 4) if gathers else 0.0
    # XLA's attention keeps a pair of tiles; the kernels read a mask.
    tile, mask = shape.n / run.model * tile_length(t) ** 2 * 4, t * t * (dtype.itemsize if not tpu else 1)
    forward = chunk + count_block(t, 2, 4)
    backward = gradients + max(embedding, 1.5 * chunk) + count_block(t, 4.5, 9)
    backward += 3 * (tile if run.attention == "xla" else mask)
    prefill_scores = 0 if tpu else 3 * count_scores(prompts, longest)
    return {
        "sampling copy": copied,
        "prefill": prefill_scores + count_block(prompts * longest, 2, 8) + 4 * drawn,
        "decode": 4 * drawn,
        "compute copy": 0.0 if is_split("compute") else copied,
        "reference log-probs": forward + (embedding if is_split("reference") else 0),
        "old log-probs": forward + (embedding if is_split("compute") else 0),
        "accumulate": backward + (embedding if is_split("compute") else 0) + (2.5 * embedding if tpu else 0),
        "optimizer step": 0.0,
    }


def estimate_memory(run: PlannedRun) -> dict[str, Memory]:
    """The memory of every phase, by phase and part, without compiling anything."""
    temporaries, stored = estimate_temporaries(run), count_activation_bytes(run)
    return {
        phase: {
            **parts,
            "activations": stored if phase == "accumulate" else 0.0,
            "temporaries": parts.get("temporaries", 0.0) + temporaries[phase],
        }
        for phase, parts in count_resident_memory(run).items()
    }
