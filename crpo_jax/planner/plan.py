"""A plan: memory, collectives and time bounds of every phase on a target, and what to change if it does not fit."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crpo_jax.config import Config, replaced
from crpo_jax.errors import InputError
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.planner.cost import count_work, estimate_collectives, estimate_seconds, find_link
from crpo_jax.planner.hlo import Collective
from crpo_jax.planner.memory import Memory, estimate_memory, list_phases
from crpo_jax.planner.planned_run import PlannedRun, resolve_shape
from crpo_jax.planner.targets import Target

Changes = Mapping[str, Any]
"""New values of settings by dotted key."""


@dataclass(frozen=True)
class Phase:
    """One phase of an RL step on one device. `seconds` are the times of all executions at each peak of the device."""

    name: str
    memory: Memory
    collectives: list[Collective]
    executions: float
    seconds: dict[str, float]
    compile_seconds: float | None = None

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def bound(self) -> float:
        """The least seconds that this phase takes in an RL step."""
        return max(self.seconds.values())


@dataclass(frozen=True)
class Plan:
    run: PlannedRun
    phases: list[Phase]
    compiled: bool  # or estimated from shapes
    changes: Changes = field(default_factory=dict)  # what a search changed so that the run fits

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def margin(self) -> float:
        """Bytes of a device that are free in the peak phase; negative if the run does not fit."""
        return self.run.target.usable - self.peak.total

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    @property
    def bound(self) -> float:
        return sum(phase.bound for phase in self.phases)


class Ranking(NamedTuple):
    """Plans that fit, the fastest first; plans that do not, the closest first; and why other meshes are impossible."""

    fitting: list[Plan]
    others: list[Plan]
    refused: dict[str, str]

    @property
    def plans(self) -> list[Plan]:
        return [*self.fitting, *self.others]


def estimate_plan(run: PlannedRun, changes: Changes | None = None) -> Plan:
    """The plan from shapes alone."""
    memory, sent, work = estimate_memory(run), estimate_collectives(run), count_work(run)
    phases = [
        Phase(name, memory[name], sent[name], work[name].executions, estimate_seconds(run, work[name], sent[name]))
        for name in list_phases(run)
    ]
    return Plan(run, phases, False, changes or {})


def compile_plan(run: PlannedRun, changes: Changes | None = None, log: Callable[[str], None] = print) -> Plan:
    """The plan of the programs that the target's compiler produces; `log` takes one line per compiled phase."""
    from crpo_jax.planner.compiled import compile_phases

    work, phases = count_work(run), {}
    for name, compiled in compile_phases(run):
        log(f"{name}: compiled in {compiled.seconds:.0f} s")
        seconds = estimate_seconds(run, work[name], compiled.collectives)
        executions = work[name].executions
        phases[name] = Phase(name, compiled.memory, compiled.collectives, executions, seconds, compiled.seconds)
    return Plan(run, [phases[name] for name in list_phases(run)], True, changes or {})


# --- what to change so that a run fits --------------------------------------------------------------------------------


def list_changes(run: PlannedRun) -> Iterator[Changes]:
    """Settings that lower memory, those that cost the least time first, then their combinations."""
    parallel, rollout, group = run.settings.parallel, run.settings.rollout, run.settings.crpo.group_size
    multiples = range(rollout.slots - rollout.slots % 8 or rollout.slots, group - 1, -8)
    slots = [size for size in multiples if size < rollout.slots] or [rollout.slots]
    halves = (parallel.micro_batch_tokens // 2**power for power in range(1, 8))
    budgets = [size for size in halves if 2 * size > run.longest_row] or [parallel.micro_batch_tokens]
    remat = {} if parallel.remat else {"parallel.remat": True}
    if remat:
        yield remat
    for size in slots:
        yield {**remat, "rollout.slots": size}
    for budget, size in itertools.product(budgets, [None, *slots]):
        smaller = {**remat, "parallel.micro_batch_tokens": budget}
        yield smaller if size is None else {**smaller, "rollout.slots": size}


def find_changes(run: PlannedRun, reserve: float = 0.0) -> Changes | None:
    """The first of `list_changes` whose estimate leaves `reserve` bytes free; None if none does."""
    for changes in list_changes(run):
        if estimate_plan(run.with_settings(changes)).margin >= reserve:
            return changes
    return None


def find_fix(plan: Plan) -> Changes | None:
    """The settings to change so that the plan fits: remat, slots and micro-batches, otherwise the best mesh and layout;
    None if nothing on the target fits."""
    underestimated = plan.peak.total - estimate_plan(plan.run).peak.total
    if changes := find_changes(plan.run, max(0.0, underestimated)):
        return changes
    if not (fitting := rank_meshes(plan.run.settings, plan.run.target).fitting):
        return None
    run = fitting[0].run
    return {"parallel.mesh": run.mesh_text, "parallel.layout": run.layout_name, **fitting[0].changes}


# --- all meshes and layouts of a target -------------------------------------------------------------------------------


def list_runs(settings: Config, target: Target) -> tuple[list[PlannedRun], dict[str, str]]:
    """A run for every mesh of the target's devices and every layout, and why the other meshes are impossible.

    Layouts differ only in what they split over the data axis: without one, only the config's own is listed.
    """
    shape, runs, refused = resolve_shape(settings), [], {}
    own = settings.parallel.layout if settings.parallel.layout != "auto" else "zero1"
    for model in (size for size in range(1, target.count + 1) if target.count % size == 0):
        for layout in LAYOUTS if model < target.count else [own]:
            data, with_layout = target.count // model, replaced(settings, {"parallel.layout": layout})
            try:
                runs.append(PlannedRun(with_layout, shape, target, data, model))
            except InputError as error:
                refused[f"{data}x{model} {layout}"] = str(error)
    if not runs:
        reason = next(iter(refused.values()))
        raise InputError(f"--target {target.name}: expected a model that some mesh can split, got {reason}")
    return runs, refused


def rank_meshes(settings: Config, target: Target) -> Ranking:
    """Estimates every mesh and layout, with smaller slots or micro-batches for those that only fit so."""
    runs, refused = list_runs(settings, target)
    plans = []
    for run in runs:
        plan = estimate_plan(run)
        if not plan.fits and (changes := find_changes(run)):
            plan = estimate_plan(run.with_settings(changes), changes)
        plans.append(plan)
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.bound)
    others = sorted((plan for plan in plans if not plan.fits), key=lambda plan: -plan.margin)
    return Ranking(fitting, others, refused)


def list_other_layouts(run: PlannedRun) -> list[PlannedRun]:
    """The run with every other layout on the same mesh."""
    runs, _ = list_runs(run.settings, run.target)
    return [other for other in runs if other.mesh_text == run.mesh_text and other.layout_name != run.layout_name]


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, counts."""
    run, chip = plan.run, plan.run.target.chip
    return {
        "target": run.target.name,
        "mesh": run.mesh_text,
        "layout": run.layout_name,
        "model": run.settings.model.path,
        "source": "compiled" if plan.compiled else "shapes",
        "changed": plan.changes,
        "fits": plan.fits,
        "usable_bytes": run.target.usable,
        "peak_bytes": plan.peak.total,
        "peak_phase": plan.peak.name,
        "margin_bytes": plan.margin,
        "bound_seconds": plan.bound,
        "micro_batch": {"responses": run.packed_responses, "tokens": run.packed_length},
        "decoded_together": run.wave_rows,
        "device": {name: getattr(chip, name) for name in ("flops", "bandwidth", "link", "link_bandwidth", "source")},
        "phases": [
            {
                "name": phase.name,
                "memory_bytes": phase.memory,
                "total_bytes": phase.total,
                "runs": phase.executions,
                "seconds": {**phase.seconds, "bound": phase.bound},
                "compile_seconds": phase.compile_seconds,
                "collectives": [{**sent._asdict(), "link": find_link(run, sent.axis)[0]} for sent in phase.collectives],
            }
            for phase in plan.phases
        ],
    }
