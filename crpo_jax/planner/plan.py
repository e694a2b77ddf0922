"""A plan: every phase's memory, collectives and time bounds on a target, a verdict, and the setting to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from crpo_jax.config import Config, replaced
from crpo_jax.errors import InputError
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.planner.cost import estimated_collectives, link_of, seconds, works
from crpo_jax.planner.hlo import Collective
from crpo_jax.planner.job import Job, planned_shape
from crpo_jax.planner.memory import Memory, estimated, phases_of
from crpo_jax.planner.targets import GIB, Target


@dataclass(frozen=True)
class Phase:
    """One phase of a step on one device. `seconds` are the three times at the device's peaks, `runs` of the program together."""

    name: str
    memory: Memory
    collectives: list[Collective]
    runs: float
    seconds: dict[str, float]
    compile_seconds: float | None = None

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def bound(self) -> float:
        """Seconds that this phase takes at least in an RL step."""
        return max(self.seconds.values())


@dataclass(frozen=True)
class Plan:
    job: Job
    phases: list[Phase]
    source: str  # "compiled", or "shapes"
    changed: dict[str, Any] = field(default_factory=dict)  # settings that a search changed so that it fits

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def margin(self) -> float:
        """Bytes to spare on a device in the phase that needs the most; negative where it does not fit."""
        return self.job.target.usable - self.peak.total

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    @property
    def bound(self) -> float:
        return sum(phase.bound for phase in self.phases)


def from_shapes(job: Job, changed: dict[str, Any] | None = None) -> Plan:
    """The plan without compiling anything."""
    memory, sent, work = estimated(job), estimated_collectives(job), works(job)
    phases = [
        Phase(name, memory[name], sent[name], work[name].runs, seconds(job, work[name], sent[name]))
        for name in phases_of(job)
    ]
    return Plan(job, phases, "shapes", changed or {})


def by_compiling(job: Job, tell: Any = lambda line: None) -> Plan:
    """The plan of the programs that the target's own compiler makes; `tell` is called with each phase as it is done."""
    from crpo_jax.planner.compiled import compiled

    work, found = works(job), {}
    for name, result in compiled(job):
        tell(f"{name}: compiled in {result.seconds:.0f} s")
        found[name] = Phase(
            name,
            result.memory,
            result.collectives,
            work[name].runs,
            seconds(job, work[name], result.collectives),
            result.seconds,
        )
    return Plan(job, [found[name] for name in phases_of(job)], "compiled")


def remedies(job: Job) -> Iterator[dict[str, Any]]:
    """Settings that lower memory, those that cost the least time first; later ones are tried on top of all earlier kinds."""
    parallel, rollout, group = job.settings.parallel, job.settings.rollout, job.settings.crpo.group_size
    longest = job.settings.data.max_prompt_tokens + job.settings.rollout.max_new_tokens
    slots = [
        size
        for size in range(rollout.slots - rollout.slots % 8 or rollout.slots, group - 1, -8)
        if size < rollout.slots
    ] or [rollout.slots]
    budgets = [
        size for size in (parallel.micro_batch_tokens // 2**power for power in range(1, 8)) if 2 * size > longest
    ] or [parallel.micro_batch_tokens]
    remat = {} if parallel.remat else {"parallel.remat": True}
    if remat:
        yield remat
    for size in slots:
        yield {**remat, "rollout.slots": size}
    for size in budgets:
        yield {**remat, "parallel.micro_batch_tokens": size}
        for some in slots:
            yield {**remat, "parallel.micro_batch_tokens": size, "rollout.slots": some}


def remedy(job: Job, over: float = 0.0) -> dict[str, Any] | None:
    """The settings to change so that the job fits, by the estimate from shapes plus `over` bytes; None where these do not help."""
    for changed in remedies(job):
        if from_shapes(job.having(changed)).margin >= over:
            return changed
    return None


def all_jobs(settings: Config, target: Target) -> tuple[list[Job], dict[str, str]]:
    """A job for every mesh of the target's devices and every layout, and why meshes are impossible. Layouts differ only in what
    they split over the data axis: without one, the config's own stands for all."""
    shape, possible, refused = planned_shape(settings), [], {}
    for model in (size for size in range(1, target.count + 1) if target.count % size == 0):
        for name in (
            LAYOUTS
            if model < target.count
            else [settings.parallel.layout]
            if settings.parallel.layout in LAYOUTS
            else ["zero1"]
        ):
            chosen = replaced(settings, {"parallel.layout": name})
            try:
                possible.append(Job(chosen, shape, target, target.count // model, model))
            except InputError as error:
                refused[f"{target.count // model}x{model} {name}"] = str(error)
    if not possible:
        raise InputError(
            f"--target {target.name}: expected a model that some mesh can split, got {next(iter(refused.values()))}"
        )
    return possible, refused


def search(settings: Config, target: Target) -> tuple[list[Plan], list[Plan], dict[str, str]]:
    """(plans that fit, the fastest bound first; those that do not, the closest first; refused meshes with their reasons).

    Where a mesh and layout fits only with smaller slots or micro-batches, it is planned with those.
    """
    jobs, refused = all_jobs(settings, target)
    plans = []
    for job in jobs:
        plan = from_shapes(job)
        if not plan.fits and (changed := remedy(job)):
            plan = from_shapes(job.having(changed), changed)
        plans.append(plan)
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.bound)
    return fitting, sorted((plan for plan in plans if not plan.fits), key=lambda plan: -plan.margin), refused


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, counts."""
    job, chip = plan.job, plan.job.target.chip
    rows, t = job.micro_batch
    return {
        "target": job.target.name,
        "mesh": job.mesh_text,
        "layout": job.layout_name,
        "model": job.settings.model.path,
        "source": plan.source,
        "changed": plan.changed,
        "fits": plan.fits,
        "usable_bytes": job.target.usable,
        "peak_bytes": plan.peak.total,
        "peak_phase": plan.peak.name,
        "margin_bytes": plan.margin,
        "bound_seconds": plan.bound,
        "micro_batch": {"rows": rows, "tokens": t},
        "decoded_together": job.wave_rows,
        "device": {
            "flops": chip.flops,
            "bandwidth": chip.bandwidth,
            "link": chip.link,
            "link_bandwidth": chip.link_bandwidth,
            "source": chip.source,
        },
        "phases": [
            {
                "name": phase.name,
                "memory_bytes": phase.memory,
                "total_bytes": phase.total,
                "runs": phase.runs,
                "seconds": {**phase.seconds, "bound": phase.bound},
                "compile_seconds": phase.compile_seconds,
                "collectives": [{**one._asdict(), "link": link_of(job, one.axis)[0]} for one in phase.collectives],
            }
            for phase in plan.phases
        ],
    }


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
