"""The arithmetic, memory traffic and communication of an RL step, and a lower bound of its time.

Counted from shapes at the mean lengths of `PlannedRun`, since compilers count loop bodies once or not at all. The bound
of a phase is the largest of three times at the device's published peaks: arithmetic, memory, links.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from crpo_jax.hardware import GPUS_PER_HOST
from crpo_jax.model.packed_attention import tile_length
from crpo_jax.model.shape import block_weights
from crpo_jax.planner.hlo import Collective, count_ring_bytes, merge_collectives
from crpo_jax.planner.memory import (
    WeightCopy,
    count_cache_bytes,
    count_model_bytes,
    count_resident_memory,
    count_sampling_bytes,
    count_trained_bytes,
)
from crpo_jax.planner.planned_run import PlannedRun


@dataclass(frozen=True)
class PhaseWork:
    """What a device does for a phase in one RL step: executions of its program (for decode, tokens drawn), and in all
    of them together the floating-point operations and bytes read or written."""

    executions: float
    flops: float
    traffic: float


def count_work(run: PlannedRun) -> dict[str, PhaseWork]:
    """The work of every phase in one RL step."""
    shape, settings, steps = run.shape, run.settings, run.optimizer_steps
    width, group, remat = jnp.dtype(settings.model.dtype).itemsize, settings.crpo.group_size, settings.parallel.remat
    blocks, output = float(block_weights(shape)), float(shape.d * shape.v)
    prompt, response = run.mean_prompt, run.mean_response
    prompt_tokens, response_tokens = run.prompt_tokens, run.response_tokens
    tokens = prompt_tokens + response_tokens

    def count_attention_flops(tokens: float, context: float) -> float:
        attended = sum(shape.cache_slots(context, windowed) for windowed in shape.windowed)
        return tokens * 4.0 * shape.n * shape.h * attended / run.model

    def count_flops(tokens: float, weights: float, context: float) -> float:
        """Of a forward pass through so many weights, with attention to `context` tokens."""
        return tokens * 2 * weights / run.model + count_attention_flops(tokens, context)

    # Kernels and XLA compute whole tiles: about half of one too much where a prompt ends, and where the query stands.
    tile = tile_length(run.packed_length)
    attention = count_attention_flops(prompt_tokens, prompt / 2 + tile / 2)
    attention += count_attention_flops(response_tokens, prompt + response / 2 + tile)
    if run.attention == "cudnn":  # computes whatever a causal mask leaves
        attention = tokens * 4.0 * shape.n * shape.h * shape.l * run.packed_length / 2 / run.model
    through_blocks = tokens * 2 * blocks / run.model + attention
    logits = response_tokens * 2 * output / run.model
    forward = through_blocks + logits
    recomputed = (through_blocks if remat else 0) + logits  # the backward pass always computes the logits again
    both_passes = 3 * forward + attention / 2  # the backward pass of attention computes the scores again
    if settings.lora.rank:  # a frozen weight has no gradient
        both_passes -= forward - attention
    resident = count_resident_memory(run)
    state, compute = resident["optimizer step"], resident["compute copy"]["weights"]
    master, gradients, sampling = state["master"], state["gradients"], count_sampling_bytes(run)
    whole = count_model_bytes(run, "gathered", settings.model.dtype)
    prompts = count_cache_bytes(run, 0)
    slot = count_cache_bytes(run, 1) - prompts  # one more token in every row
    decode_slots = prompt / group + response / 2  # a group reads its prompt once
    # The activations of all blocks, written and read.
    streams = tokens * shape.l * width * (12 * shape.d + 6 * shape.f / run.model)
    micro_batches = steps * run.micro_batches
    logprobs = PhaseWork(micro_batches, forward, micro_batches * whole + streams / 2)
    later = (steps - 1) / steps  # the first mini-batch is on-policy
    old = PhaseWork(later * logprobs.executions, later * logprobs.flops, later * logprobs.traffic)
    return {
        "sampling copy": PhaseWork(1, 0, master + 2 * sampling),
        "prefill": PhaseWork(
            run.waves,
            count_flops(prompt_tokens, blocks, prompt / 2),
            run.waves * sampling + prompt_tokens * (slot / run.wave_rows),
        ),
        "decode": PhaseWork(
            run.decode_steps,
            count_flops(response_tokens, blocks + output, prompt + response / 2),
            run.decode_steps * (sampling + count_cache_bytes(run, decode_slots) - prompts),
        ),
        "compute copy": PhaseWork(steps, 0, steps * (master + 2 * compute)),
        "reference log-probs": logprobs,
        "old log-probs": old,
        "accumulate": PhaseWork(
            micro_batches,
            both_passes + recomputed,
            micro_batches * (3 * whole + 2 * gradients) + (3 if remat else 2) * streams,
        ),
        "optimizer step": PhaseWork(steps, 0, steps * (3 * gradients + 4 * master + 2 * state["moments"])),
    }


def estimate_collectives(run: PlannedRun) -> dict[str, list[Collective]]:
    """What one execution of each phase sends, from the layout's tables.

    Weights are gathered over the data axis if they are stored split, gradients are reduced over it, and activations are
    summed over the model axis twice per block and pass.
    """
    shape, dtype, adapted = run.shape, jnp.dtype(run.settings.model.dtype), bool(run.settings.lora.rank)
    whole = count_model_bytes(run, "gathered", dtype)

    def gather(stored: WeightCopy, into: WeightCopy = "gathered", passes: int = 1) -> list[Collective]:
        if count_model_bytes(run, stored, dtype) >= count_model_bytes(run, into, dtype):
            return []
        sent = passes * count_ring_bytes("all-gather", whole, run.data)
        return [Collective("all-gather", "data", sent, passes * shape.l)]

    def sum_activations(tokens: float, passes: int = 1) -> list[Collective]:
        times = 2 * passes * shape.l + 1
        sent = count_ring_bytes("all-reduce", tokens * shape.d * dtype.itemsize, run.model)
        return [Collective("all-reduce", "model", times * sent, times)] if run.model > 1 else []

    # The base of adapters is stored as it computes, and only gradients of the adapters are reduced.
    base: WeightCopy = "compute" if adapted else "master"
    gradients = count_trained_bytes(run, "gathered", dtype) if adapted else whole
    kind = "reduce-scatter" if gather("master") and run.target.chip.kind == "gpu" else "all-reduce"
    reduced = [Collective(kind, "data", count_ring_bytes(kind, gradients, run.data), shape.l)] if run.data > 1 else []
    passes = 3 if run.settings.parallel.remat else 2
    collectives = {
        "sampling copy": gather(base),
        "prefill": sum_activations(run.wave_prompts * run.settings.data.max_prompt_tokens),
        "decode": sum_activations(run.wave_rows),
        "compute copy": gather(base, "compute"),
        "reference log-probs": gather("reference") + sum_activations(run.packed_length),
        "old log-probs": gather("compute") + sum_activations(run.packed_length),
        "accumulate": gather("compute", passes=passes - 1) + reduced + sum_activations(run.packed_length, passes),
        "optimizer step": [],
    }
    return {phase: merge_collectives(sent) for phase, sent in collectives.items()}


def find_link(run: PlannedRun, axis: str) -> tuple[str, float]:
    """The slowest link on the ring of a mesh axis, and its bytes/s: the network if the axis spans hosts."""
    chip, many_hosts = run.target.chip, run.target.chip.kind == "gpu" and run.target.count > GPUS_PER_HOST
    if many_hosts and ("data" in axis or run.model > GPUS_PER_HOST):
        return "network", chip.network_bandwidth
    return chip.link, chip.link_bandwidth


def estimate_seconds(run: PlannedRun, work: PhaseWork, collectives: list[Collective]) -> dict[str, float]:
    """Seconds of a phase in one RL step at the device's peaks."""
    chip = run.target.chip
    links = sum(each.sent / find_link(run, each.axis)[1] for each in collectives) * work.executions
    return {"compute": work.flops / chip.flops, "memory": work.traffic / chip.bandwidth, "links": links}
