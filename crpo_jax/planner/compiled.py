"""The programs of training and sampling, compiled ahead of time at full size for devices that are not attached."""

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
from crpo_jax.planner.cost import estimate_collectives
from crpo_jax.planner.hlo import Collective, read_collectives
from crpo_jax.planner.memory import (
    Memory,
    WeightCopy,
    count_activation_bytes,
    count_resident_memory,
    count_waiting_bytes,
    select_table,
)
from crpo_jax.planner.planned_run import PlannedRun
from crpo_jax.planner.targets import compiler_options, make_target_mesh
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import response_slots
from crpo_jax.rollout.sample import Rows, programs
from crpo_jax.update.trainer import PER_ROW, PER_TOKEN, trainer


class CompiledPhase(NamedTuple):
    """What the compiler reports of a phase's program, and the seconds that compiling took."""

    memory: Memory
    collectives: list[Collective]
    seconds: float


class PhaseProgram(NamedTuple):
    """A phase's jitted function and the arguments to compile it for."""

    phase: str
    function: Any
    arguments: tuple[Any, ...]
    slots: tuple[int, int] | None = None  # of the cache that prefill creates

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **({"slots": self.slots} if self.slots else {}))


PROGRAM_PARTS = {
    "sampling copy": ("master", "weights"),
    "prefill": ("weights", "KV cache"),
    "decode": ("weights", "KV cache"),
    "compute copy": ("master", "weights"),
    "reference log-probs": ("reference",),
    "old log-probs": ("weights",),
    "accumulate": ("weights", "gradients"),
    "optimizer step": ("master", "moments", "gradients"),
}
"""The memory parts that are arguments or results of each phase's program; the others are held beside it."""

BASE_PHASES = ("sampling copy", "old log-probs", "accumulate")
"""The phases whose programs also take the frozen base of adapters, which is the reference."""


def compile_phases(run: PlannedRun) -> Iterator[tuple[str, CompiledPhase]]:
    """Compiles every phase's program in turn."""
    mesh = make_target_mesh(run.target, run.data, run.model)
    for program in [*list_update_programs(run, mesh), *list_rollout_programs(run, mesh)]:
        began = time.perf_counter()
        try:
            executable = program.lower().compile(compiler_options=compiler_options(run.target))
        except jax.errors.JaxRuntimeError as error:
            # A TPU's compiler refuses a program that exceeds the device, but reports its size.
            size = re.search(r"Used ([\d.]+)([KMGT])i?B? of [\d.]+[KMGT]i?B? hbm", str(error))
            if not size:
                raise
            used = float(size[1]) * 1024 ** " KMGT".index(size[2])
            collectives = estimate_collectives(run)[program.phase]
        else:
            sizes = executable.memory_analysis()
            arrays = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
            used = arrays + sizes.temp_size_in_bytes
            collectives = read_collectives(executable.as_text(), run.data, run.model)
        memory = split_memory(run, program.phase, used)
        yield program.phase, CompiledPhase(memory, collectives, time.perf_counter() - began)


def split_memory(run: PlannedRun, phase: str, used: float) -> Memory:
    """Arrays and stored activations as counted; `temporaries` are the rest of the bytes that the phase's program uses.

    They include what arrays take beyond their shapes (a TPU pads them to tiles) and buffers of results.
    """
    parts, stored = count_resident_memory(run)[phase], count_activation_bytes(run) if phase == "accumulate" else 0.0
    base = ("reference",) if run.settings.lora.rank and phase in BASE_PHASES else ()
    arrays = sum(parts[part] for part in PROGRAM_PARTS[phase] + base if part in parts)
    arrays -= count_waiting_bytes(run) if phase == "decode" else 0  # beside the program, too
    temporaries = parts.get("temporaries", 0.0) + max(0.0, used - arrays - stored)
    return {**parts, "activations": stored, "temporaries": temporaries}


# --- arguments: shapes with shardings, without any memory behind them -------------------------------------------------


def attach_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def abstract_model(run: PlannedRun, mesh: Mesh, copy: WeightCopy, dtype: Any = jnp.float32) -> Any:
    return attach_shardings(abstract(run.shape, dtype), weight_shardings(run.shape, select_table(run, copy), mesh))


def shard_adapters(run: PlannedRun, mesh: Mesh, copy: WeightCopy, adapters: Any) -> Any:
    return attach_shardings(adapters, lora.shardings(run.shape, run.settings.lora, select_table(run, copy), mesh))


def abstract_batch(run: PlannedRun, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The largest micro-batch, with all that the loss of several optimizer steps per rollout takes."""
    rows, t = run.micro_batch
    b, integers = rows * run.data, ("tokens", "prompt_lengths", "lengths")

    def array(name: str, sizes: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        dtype = jnp.int32 if name in integers else jnp.float32
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    by_token = {name: array(name, (b, t), TOKENS_BT) for name in PER_TOKEN}
    return by_token | {name: array(name, (b,), ROWS_B) for name in PER_ROW}


# --- programs ---------------------------------------------------------------------------------------------------------


def list_update_programs(run: PlannedRun, mesh: Mesh) -> list[PhaseProgram]:
    settings, shape, adapted = run.settings, run.shape, bool(run.settings.lora.rank)
    update: Any = trainer(
        shape, mesh, settings, settings.optimizer, 1000, loss="crpo", adapters=settings.lora, attention=run.attention
    )
    batch = abstract_batch(run, mesh)
    unscored = {name: array for name, array in batch.items() if name not in ("old", "reference")}
    if run.optimizer_steps == 1:
        del batch["old"]
    gradients, metrics = jax.eval_shape(update.zero)
    gradients = attach_shardings(gradients, update.states.master)
    whole = NamedSharding(mesh, PartitionSpec())
    metrics = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), metrics)
    trained = lora.abstract(shape, settings.lora) if adapted else abstract(shape)
    state = attach_shardings(jax.eval_shape(update.begin, trained), update.states)
    base = abstract_model(run, mesh, "reference", settings.model.dtype)
    if adapted:
        cast = jax.eval_shape(update.compute_weights, lora.policy(state.master, base)).adapters
        weights: Any = lora.policy(shard_adapters(run, mesh, "compute", cast), base)
        copy = jax.jit(lambda master: update.compute_weights(Adapted(base, master)).adapters)
    else:
        weights, copy = abstract_model(run, mesh, "compute", settings.model.dtype), update.compute_weights
    old = [PhaseProgram("old log-probs", update.logprobs, (weights, unscored))] if run.optimizer_steps > 1 else []
    return [
        PhaseProgram("compute copy", copy, (state.master,)),
        PhaseProgram("reference log-probs", update.logprobs, (base, unscored)),
        *old,
        PhaseProgram("accumulate", update.accumulate, (gradients, metrics, weights, batch, state.kl_coef)),
        PhaseProgram("optimizer step", update.apply, (state, gradients, metrics)),
    ]


def list_rollout_programs(run: PlannedRun, mesh: Mesh) -> list[PhaseProgram]:
    settings, shape, rollout = run.settings, run.shape, run.settings.rollout
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, tuple(range(len(rollout.stop))))
    chunk, most = min(rollout.chunk, rollout.max_new_tokens), rollout.max_new_tokens
    sampler: Any = programs(shape, mesh, sampling, chunk, run.attention)
    gather = to_sampling(shape, mesh, settings.model.dtype)
    if settings.lora.rank:
        adapters = shard_adapters(run, mesh, "master", lora.abstract(shape, settings.lora))
        policy: Any = lora.policy(adapters, abstract_model(run, mesh, "reference", settings.model.dtype))
    else:
        policy = abstract_model(run, mesh, "master")
    weights = attach_shardings(jax.eval_shape(gather, policy), sampling_shardings(shape, mesh))

    def array(sizes: tuple[int, ...], spec: PartitionSpec, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    p, b, longest = run.wave_prompts * run.data, run.wave_rows * run.data, settings.data.max_prompt_tokens
    rows = Rows._make([array((b,), ROWS_B)] * len(Rows._fields))
    number, key = array((), PartitionSpec()), array((), PartitionSpec(), jax.eval_shape(jax.random.key, 0).dtype)
    begin = (weights, array((p, longest), TOKENS_BT), rows, key)
    full, _ = jax.eval_shape(lambda *inputs: sampler.start(*inputs, slots=(longest, most)), *begin)
    cache = jax.tree.map(lambda x: array(x.shape, CACHE_BKSH, x.dtype), full)
    return [
        PhaseProgram("sampling copy", gather, (policy,)),
        PhaseProgram("prefill", sampler.start, begin, (longest, response_slots(chunk, most))),
        PhaseProgram("decode", sampler.advance, (weights, cache, rows, key, number, number)),
    ]
