"""What a step costs in arithmetic, memory traffic and communication, and the time it cannot be shorter than.

Counted from shapes, at the mean lengths of `Job`: compilers count loop bodies once, or not at all. A bound is the largest of
three times at the device's published peaks: arithmetic, memory, links; a real step takes longer.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from crpo_jax.parallel.layout import TENSOR, WeightTable
from crpo_jax.planner.hlo import Collective, added, sent_by_ring
from crpo_jax.planner.job import Job
from crpo_jax.planner.memory import adapters, cache, of_table, reference, resident, sampling_weights
from crpo_jax.planner.targets import GPUS_PER_HOST


@dataclass(frozen=True)
class Work:
    """What a phase does on a device in one RL step: runs of its program (tokens drawn, for decode), floating-point operations and
    bytes read or written in all of them together."""

    runs: float
    flops: float
    moved: float


def matrix_parameters(job: Job) -> tuple[float, float]:
    """Weights that every token is multiplied with: in the blocks, and in the output projection."""
    s = job.shape
    return float(s.l * s.d * (2 * s.n * s.h + 2 * s.k * s.h + 3 * s.f)), float(s.d * s.v)


def attended(job: Job, context: float) -> float:
    """Operations of one token's attention over so many others."""
    return 4.0 * job.shape.l * job.shape.n * job.shape.h * context


def works(job: Job) -> dict[str, Work]:
    """The work of every phase in one RL step."""
    s, settings = job.shape, job.settings
    width = jnp.dtype(settings.model.dtype).itemsize
    blocks, output = matrix_parameters(job)
    prompt, response = job.prompt_tokens, job.response_tokens
    prompts, tokens = job.rows / settings.crpo.group_size, job.rows * (prompt + response)
    slot = cache(job, 1) - cache(job, 0)  # bytes of one more token in every row
    per_token = slot / job.wave_rows
    sampling = sampling_weights(job)
    forward = tokens * (2 * (blocks + output) + attended(job, (prompt + response) / 2)) / job.model
    again = tokens * (2 * blocks + attended(job, (prompt + response) / 2)) / job.model if settings.parallel.remat else 0
    again += tokens * 2 * output / job.model  # the log-probs are always made again in the backward pass
    backward = (2 if settings.lora.rank else 3) * forward  # both passes; a frozen weight has no gradient
    held = resident(job)
    compute, master = held["reference log-probs"]["weights"], held["accumulate"]["gradients"]
    streams = tokens * s.l * width * (12 * s.d + 6 * s.f / job.model)  # a block's activations, written and read
    micro = job.updates * job.micro_batches
    decode_context = prompt / settings.crpo.group_size + response / 2  # a group reads its prompt once
    whole = of_table(job, TENSOR, jnp.dtype(settings.model.dtype))
    return {
        "sampling copy": Work(1, 0, master + 2 * sampling),
        "prefill": Work(
            job.waves,
            prompts * prompt * (2 * blocks + attended(job, prompt / 2)) / job.model,
            job.waves * sampling + prompts * prompt * per_token,
        ),
        "decode": Work(
            job.decode_steps,
            job.rows * response * (2 * (blocks + output) + attended(job, prompt + response / 2)) / job.model,
            job.decode_steps * (sampling + slot * decode_context),
        ),
        "compute copy": Work(job.updates, 0, job.updates * (master + 2 * compute)),
        "reference log-probs": Work(micro, forward, micro * whole + streams / 2),
        "old log-probs": Work(micro, forward, micro * whole + streams / 2),
        "accumulate": Work(
            micro, backward + again, micro * (3 * whole + 2 * master) + (3 if settings.parallel.remat else 2) * streams
        ),
        "optimizer step": Work(
            job.updates,
            0,
            job.updates * (3 * master + 4 * held["optimizer step"]["master"] + 2 * held["optimizer step"]["moments"]),
        ),
    }


def estimated_collectives(job: Job) -> dict[str, list[Collective]]:
    """What one run of each phase sends, from the layout's tables: weights gathered over the data axis where they are stored split,
    gradients reduced over it, activations summed over the model axis twice a block and pass."""
    s, layout, dtype = job.shape, job.layout, jnp.dtype(job.settings.model.dtype)
    rows, t = job.micro_batch
    whole = of_table(job, TENSOR, dtype)

    def gathered(stored: WeightTable, into: WeightTable = TENSOR, times: int = 1) -> list[Collective]:
        if of_table(job, stored, dtype) >= of_table(job, into, dtype):
            return []
        return [Collective("all-gather", "data", times * sent_by_ring("all-gather", whole, job.data), times * s.l)]

    def summed(tokens: float, times: int) -> list[Collective]:
        one = sent_by_ring("all-reduce", tokens * s.d * dtype.itemsize, job.model)
        return [Collective("all-reduce", "model", times * one, times)] if job.model > 1 else []

    low = bool(
        job.settings.lora.rank
    )  # then the base lies as it computes, and only gradients of the adapters are reduced
    base = layout.compute if low else layout.master
    kind = "reduce-scatter" if gathered(layout.master) and job.target.chip.kind == "gpu" else "all-reduce"
    gradients = adapters(job, TENSOR, dtype) if low else whole
    reduced = [Collective(kind, "data", sent_by_ring(kind, gradients, job.data), s.l)] if job.data > 1 else []
    passes = 3 if job.settings.parallel.remat else 2
    found = {
        "sampling copy": gathered(base),
        "prefill": summed(job.wave_prompts * job.settings.data.max_prompt_tokens, 2 * s.l + 1),
        "decode": summed(job.wave_rows, 2 * s.l + 1),
        "compute copy": gathered(base, layout.compute),
        "reference log-probs": gathered(reference(job)) + summed(rows * t, 2 * s.l + 1),
        "old log-probs": gathered(layout.compute) + summed(rows * t, 2 * s.l + 1),
        "accumulate": gathered(layout.compute, times=passes - 1) + reduced + summed(rows * t, 2 * passes * s.l + 1),
        "optimizer step": [],
    }
    return {phase: added(sent) for phase, sent in found.items()}


def link_of(job: Job, axis: str) -> tuple[str, float]:
    """The link that the ring of a mesh axis crosses, and its bytes/s: the network as soon as the axis leaves a host."""
    chip = job.target.chip
    leaves = chip.kind == "gpu" and job.target.count > GPUS_PER_HOST and ("data" in axis or job.model > GPUS_PER_HOST)
    return ("network", chip.network_bandwidth) if leaves else (chip.link, chip.link_bandwidth)


def seconds(job: Job, work: Work, sent: list[Collective]) -> dict[str, float]:
    """Times of a phase in one RL step at the device's peaks, in seconds."""
    chip = job.target.chip
    links = sum(one.sent / link_of(job, one.axis)[1] for one in sent) * work.runs
    return {"compute": work.flops / chip.flops, "memory": work.moved / chip.bandwidth, "links": links}
