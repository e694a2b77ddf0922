"""The programs of training and sampling, compiled ahead of time at full size for devices that are not here."""

import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crpo_jax.model import lora
from crpo_jax.model.lora import Adapted
from crpo_jax.model.placement import sampling_shardings, to_sampling, weight_shardings
from crpo_jax.model.transformer import abstract
from crpo_jax.parallel.layout import CACHE_BKSH, ROWS_B, TOKENS_BT
from crpo_jax.planner.cost import estimated_collectives
from crpo_jax.planner.hlo import Collective, collectives
from crpo_jax.planner.job import Job
from crpo_jax.planner.memory import Memory, activations, reference, resident, set_aside
from crpo_jax.planner.targets import mesh_on, options
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import response_slots
from crpo_jax.rollout.sample import RowState, sampling_programs
from crpo_jax.update.trainer import PER_ROW, PER_TOKEN, trainer


class Compiled(NamedTuple):
    """What the compiler says of a phase's program: bytes of a device by part, what one run sends, and seconds spent compiling."""

    memory: Memory
    collectives: list[Collective]
    seconds: float


def placed(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings: arguments to compile for, without any memory behind them."""
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def compiled(job: Job) -> Iterator[tuple[str, Compiled]]:
    """Compiles every phase's program in turn."""
    mesh = mesh_on(job.target, job.data, job.model)
    for one in [*update_programs(job, mesh), *rollout_programs(job, mesh)]:
        began = time.perf_counter()
        try:
            program = one.lower().compile(compiler_options=options(job.target))
        except (
            jax.errors.JaxRuntimeError
        ) as error:  # a TPU's compiler refuses what is larger than the device, and says how large it is
            told = re.search(r"Used ([\d.]+)([KMGT])i?B? of [\d.]+[KMGT]i?B? hbm", str(error))
            if not told:
                raise
            taken, sent = float(told[1]) * 1024 ** " KMGT".index(told[2]), estimated_collectives(job)[one.phase]
        else:
            measured = program.memory_analysis()
            taken = (
                measured.argument_size_in_bytes
                + measured.output_size_in_bytes
                - measured.alias_size_in_bytes
                + measured.temp_size_in_bytes
            )
            sent = collectives(program.as_text(), job.data, job.model)
        yield one.phase, Compiled(memory_of(job, one.phase, taken), sent, time.perf_counter() - began)


def memory_of(job: Job, phase: str, taken: float) -> Memory:
    """The phase's memory: its arrays as placed, stored activations as counted, and the rest of what the program takes.

    Arguments on a device can be larger than their shapes say (a TPU pads to tiles), results may need room of their own: both
    are in `temporaries`.
    """
    parts = resident(job)[phase]
    taken_parts = TAKES[phase] + (("reference",) if job.settings.lora.rank and phase in ON_THE_BASE else ())
    used = sum(parts[part] for part in taken_parts if part in parts) - (set_aside(job) if phase == "decode" else 0)
    stored = activations(job) if phase == "accumulate" else 0.0
    return {
        **parts,
        "activations": stored,
        "temporaries": parts.get("temporaries", 0.0) + max(0.0, taken - used - stored),
    }


TAKES = {
    "sampling copy": ("master", "weights"),
    "prefill": ("weights", "KV cache"),
    "decode": ("weights", "KV cache"),
    "compute copy": ("master", "weights"),
    "reference log-probs": ("reference",),
    "old log-probs": ("weights",),
    "accumulate": ("weights", "gradients"),
    "optimizer step": ("master", "moments", "gradients"),
}
"""The parts that are arguments or results of a phase's program; the others lie beside it, as does the cache of rows set aside."""


ON_THE_BASE = ("sampling copy", "old log-probs", "accumulate")
"""The phases that adapters take their frozen base to, which is the reference."""


class Program(NamedTuple):
    """A phase's jitted function and the arguments to compile it for."""

    phase: str
    function: Any
    arguments: tuple[Any, ...]
    slots: tuple[int, int] | None = None  # of the cache, for the program that makes it

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **({"slots": self.slots} if self.slots else {}))


def update_programs(job: Job, mesh: Mesh) -> list[Program]:
    settings, shape, layout = job.settings, job.shape, job.layout
    run: Any = trainer(
        shape, mesh, settings, settings.optimizer, 1000, loss="crpo", adapters=settings.lora, attention=job.attention
    )
    rows, t = job.micro_batch
    b, kinds = rows * job.data, {"tokens": jnp.int32, "prompt_lengths": jnp.int32, "lengths": jnp.int32}
    whole, of_tokens, of_rows = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), TOKENS_BT, ROWS_B))
    batch = {name: jax.ShapeDtypeStruct((b, t), kinds.get(name, jnp.float32), sharding=of_tokens) for name in PER_TOKEN}
    batch |= {name: jax.ShapeDtypeStruct((b,), kinds.get(name, jnp.float32), sharding=of_rows) for name in PER_ROW}
    before = {name: value for name, value in batch.items() if name not in ("old", "reference")}
    if job.updates == 1:
        del batch["old"]
    gradients, metrics = jax.eval_shape(run.zero)
    gradients, metrics = (
        placed(gradients, run.states.master),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), metrics),
    )
    trained = lora.abstract(shape, settings.lora) if settings.lora.rank else abstract(shape)
    state = placed(jax.eval_shape(run.begin, trained), run.states)
    base = frozen(job, mesh)
    if settings.lora.rank:
        cast = jax.eval_shape(run.compute_weights, lora.policy(state.master, base)).adapters
        weights: Any = lora.policy(placed(cast, lora.shardings(shape, settings.lora, layout.compute, mesh)), base)
        copy = Program(
            "compute copy", jax.jit(lambda master: run.compute_weights(Adapted(base, master)).adapters), (state.master,)
        )
    else:
        weights = placed(abstract(shape, settings.model.dtype), weight_shardings(shape, layout.compute, mesh))
        copy = Program("compute copy", run.compute_weights, (state.master,))
    return [
        copy,
        Program("reference log-probs", run.logprobs, (base, before)),
        *([Program("old log-probs", run.logprobs, (weights, before))] if job.updates > 1 else []),
        Program("accumulate", run.accumulate, (gradients, metrics, weights, batch, state.kl_coef)),
        Program("optimizer step", run.apply, (state, gradients, metrics)),
    ]


def frozen(job: Job, mesh: Mesh) -> Any:
    """The model that is not trained: the reference, and what adapters are trained on."""
    return placed(abstract(job.shape, job.settings.model.dtype), weight_shardings(job.shape, reference(job), mesh))


def rollout_programs(job: Job, mesh: Mesh) -> list[Program]:
    settings, shape = job.settings, job.shape
    rollout = settings.rollout
    how = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, tuple(range(len(rollout.stop))))
    chunk = min(rollout.chunk, rollout.max_new_tokens)
    run: Any = sampling_programs(shape, mesh, how, chunk, job.attention)
    gather = to_sampling(shape, mesh, settings.model.dtype)
    low = settings.lora
    if low.rank:
        own = placed(lora.abstract(shape, low), lora.shardings(shape, low, job.layout.master, mesh))
        policy: Any = lora.policy(own, frozen(job, mesh))
    else:
        policy = placed(abstract(shape), weight_shardings(shape, job.layout.master, mesh))
    weights = placed(jax.eval_shape(gather, policy), sampling_shardings(shape, mesh))
    p, b, longest = job.wave_prompts * job.data, job.wave_rows * job.data, settings.data.max_prompt_tokens
    whole, of_tokens, of_rows, of_caches = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), TOKENS_BT, ROWS_B, CACHE_BKSH)
    )
    prompts = jax.ShapeDtypeStruct((p, longest), jnp.int32, sharding=of_tokens)
    rows = RowState._make([jax.ShapeDtypeStruct((b,), jnp.int32, sharding=of_rows)] * len(RowState._fields))
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), whole)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    begin = (weights, prompts, rows, key)
    full, _ = jax.eval_shape(
        lambda *given: run.prefill_and_draw(*given, slots=(longest, rollout.max_new_tokens)), *begin
    )
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_caches), full)
    return [
        Program("sampling copy", gather, (policy,)),
        Program("prefill", run.prefill_and_draw, begin, (longest, response_slots(chunk, rollout.max_new_tokens))),
        Program("decode", run.decode_chunk, (weights, cache, rows, key, number, number)),
    ]
