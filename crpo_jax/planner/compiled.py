"""The programs of training and sampling, compiled ahead of time at full size for devices that are not attached."""

import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crpo_jax.model.lora import Policy, policy_of, trained_shapes, trained_shardings
from crpo_jax.model.placement import sampler_specs, to_sampler, weight_shardings
from crpo_jax.model.transformer import model_shapes
from crpo_jax.parallel.layout import CACHE_BKSH, ROWS_B, TOKENS_BT
from crpo_jax.planner.cost import estimate_collectives
from crpo_jax.planner.hlo import Collective, read_collectives
from crpo_jax.planner.memory import (
    Memory,
    WeightCopy,
    count_activation_bytes,
    count_resident_memory,
    count_waiting_bytes,
    list_phases,
    select_axes,
)
from crpo_jax.planner.planned_run import PlannedRun
from crpo_jax.planner.targets import compiler_options, make_target_mesh
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import response_slots
from crpo_jax.rollout.sample import RowState, sampling_programs
from crpo_jax.update.losses import Batch
from crpo_jax.update.trainer import Trainer


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

STOP_TOKENS = 2
"""As many as most models have, where rollout.stop names none."""

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


def abstract_trained(run: PlannedRun, mesh: Mesh, copy: WeightCopy, dtype: Any = jnp.float32) -> Any:
    """What is trained: every weight, or adapters."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), trained_shapes(run.shape, run.settings.lora))
    return attach_shardings(shapes, trained_shardings(run.shape, run.settings.lora, select_axes(run, copy), mesh))


def abstract_frozen(run: PlannedRun, mesh: Mesh) -> Any:
    """The frozen start: the reference, and the base of adapters."""
    shapes = model_shapes(run.shape, run.settings.model.dtype)
    return attach_shardings(shapes, weight_shardings(run.shape, select_axes(run, "reference"), mesh))


def abstract_batch(run: PlannedRun, mesh: Mesh) -> Batch:
    """The largest micro-batch before its log-probs are known."""
    b, packed = run.packed_responses * run.data, (run.data, run.packed_length)
    of_response = (b, run.settings.rollout.max_new_tokens)

    def array(dims: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
        spec = TOKENS_BT if len(dims) == 2 else ROWS_B
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    return Batch(
        tokens=array(of_response),
        lengths=array((b,)),
        weights=array((b,), jnp.float32),
        advantages=array((b,), jnp.float32),
        sampler=array(of_response, jnp.float32),
        on_policy=array((b,), jnp.bool_),
        responses=array((b,)),
        starts=array((b,)),
        packed_tokens=array(packed),
        targets=array(packed),
        positions=array(packed),
        sequences=array(packed),
        prompts=array(packed),
    )


# --- programs ---------------------------------------------------------------------------------------------------------


def list_update_programs(run: PlannedRun, mesh: Mesh) -> list[PhaseProgram]:
    settings, phases = run.settings, list_phases(run)
    trainer = Trainer(
        run.shape,
        mesh,
        settings,
        settings.optimizer,
        1000,
        loss="crpo",
        lora=settings.lora,
        attention=run.attention,
    )
    unscored = abstract_batch(run, mesh)
    reference = unscored.sampler if "reference log-probs" in phases else None
    batch = unscored._replace(reference=reference, old=unscored.sampler if "old log-probs" in phases else None)
    gradients, metrics = jax.eval_shape(trainer.zero)
    gradients = attach_shardings(gradients, trainer.shardings.master)
    whole = NamedSharding(mesh, PartitionSpec())
    metrics = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), metrics)
    state, frozen = trainer.abstract_state(), abstract_frozen(run, mesh)
    policy = policy_of(abstract_trained(run, mesh, "compute", settings.model.dtype), frozen)
    programs = [
        PhaseProgram("compute copy", trainer.compute_copy, (state.master,)),
        PhaseProgram("reference log-probs", trainer.logprobs, (Policy(frozen), unscored)),
        PhaseProgram("old log-probs", trainer.logprobs, (policy, unscored)),
        PhaseProgram("accumulate", trainer.accumulate, (gradients, metrics, policy, batch, state.kl_coef)),
        PhaseProgram("optimizer step", trainer.apply, (state, gradients, metrics)),
    ]
    return [program for program in programs if program.phase in phases]


def list_rollout_programs(run: PlannedRun, mesh: Mesh) -> list[PhaseProgram]:
    settings, shape, rollout = run.settings, run.shape, run.settings.rollout
    stops = tuple(range(len(rollout.stop) or STOP_TOKENS))
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, stops)
    chunk, most = min(rollout.chunk, rollout.max_new_tokens), rollout.max_new_tokens
    sampler: Any = sampling_programs(shape, mesh, sampling, chunk, run.attention)
    policy = policy_of(abstract_trained(run, mesh, "master"), abstract_frozen(run, mesh))
    gather = to_sampler(shape, mesh, settings.model.dtype, policy.adapted)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), sampler_specs(shape, mesh, policy.adapted))
    weights = attach_shardings(jax.eval_shape(gather, policy), placed)

    def array(sizes: tuple[int, ...], spec: PartitionSpec, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    p, b, longest = run.wave_prompts * run.data, run.wave_rows * run.data, settings.data.max_prompt_tokens
    rows = RowState._make([array((b,), ROWS_B)] * len(RowState._fields))
    number, key = array((), PartitionSpec()), array((), PartitionSpec(), jax.eval_shape(jax.random.key, 0).dtype)
    begin = (weights, array((p, longest), TOKENS_BT), rows, key)
    full, _ = jax.eval_shape(lambda *inputs: sampler.prefill_and_draw(*inputs, slots=(longest, most)), *begin)
    cache = jax.tree.map(lambda x: array(x.shape, CACHE_BKSH, x.dtype), full)
    return [
        PhaseProgram("sampling copy", gather, (policy,)),
        PhaseProgram("prefill", sampler.prefill_and_draw, begin, (longest, response_slots(chunk, most))),
        PhaseProgram("decode", sampler.decode_chunk, (weights, cache, rows, key, number, number)),
    ]
