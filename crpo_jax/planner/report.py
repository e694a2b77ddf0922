"""A plan for a reader: tables for a terminal, a verdict in one line, a picture."""

from collections.abc import Sequence
from pathlib import Path

from crpo_jax.errors import InputError
from crpo_jax.hardware import GIB
from crpo_jax.model.transformer import parameter_count
from crpo_jax.planner.cost import find_link
from crpo_jax.planner.memory import MEMORY_PARTS
from crpo_jax.planner.plan import Changes, Plan, Ranking, find_fix

PART_COLORS = ("#4e79a7", "#9c755f", "#bab0ac", "#f28e2b", "#76b7b2", "#59a14f", "#edc948", "#e15759")


def format_gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def format_seconds(value: float) -> str:
    return "-" if not value else f"{value:.1f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 else "<0.001"


def format_changes(changes: Changes) -> str:
    """The settings as a command line takes them."""

    def argument(name: str, value: object) -> str:
        text = str(value).lower() if isinstance(value, bool) else value
        return f"--mesh {text}" if name == "parallel.mesh" else f"{name}={text}"

    return " ".join(argument(name, value) for name, value in changes.items())


def align_columns(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [
            cell.ljust(width) if column < left else cell.rjust(width) for column, (cell, width) in enumerate(cells)
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def format_run(plan: Plan) -> str:
    run = plan.run
    crpo, chip, model = run.settings.crpo, run.target.chip, run.settings.model.path or "model.shape"
    text_part = "the text model alone: train refuses the hub's folder, which has a vision tower (model_type gemma3)"
    return "\n".join(
        [
            f"{model} ({parameter_count(run.shape):,} parameters) on {run.target.name}, "
            f"mesh {run.mesh_text} (data x model), layout {run.layout_name}",
            f"per step: {crpo.prompts_per_step} prompts x {crpo.group_size} responses, {run.optimizer_steps} optimizer "
            f"steps; per data shard: {run.wave_rows} rows decoded together, micro-batches of {run.packed_length:,}",
            f"per device: {chip.flops / 1e12:g} TFLOP/s in bf16, memory {chip.bandwidth / 1e9:,.0f} GB/s, "
            f"{chip.link} {chip.link_bandwidth / 1e9:g} GB/s ({chip.source})",
            *([text_part] if run.is_text_part else []),
        ]
    )


def format_memory(plan: Plan) -> str:
    target = plan.run.target
    rows = [["phase", *MEMORY_PARTS, "total", "free"]]
    for phase in plan.phases:
        sizes = [phase.memory.get(part, 0.0) for part in MEMORY_PARTS]
        parts = [format_gib(size) if size else "-" for size in sizes]
        rows.append([phase.name, *parts, format_gib(phase.total), format_gib(target.usable - phase.total)])
    source = "compiled" if plan.compiled else "estimated from shapes"
    usable = f"{format_gib(target.usable)} of {format_gib(target.chip.memory)}"
    return f"memory per device in GiB, {source}; usable {usable}\n{align_columns(rows)}"


def format_collectives(plan: Plan) -> str:
    rows = [["phase", "collective", "axis", "link", "GiB sent", "count"]]
    for phase in plan.phases:
        for kind, axis, sent, times in phase.collectives:
            if sent >= 0.5e-3 * GIB:
                size = f"{sent / GIB:.2f}" if sent >= 0.005 * GIB else f"{sent / GIB:.3f}"
                rows.append([phase.name, kind, axis, find_link(plan.run, axis)[0], size, f"{times:,.0f}"])
    head = "collectives per device in one run of each program (decode: one token)"
    return f"{head}\n{align_columns(rows, left=4)}" if len(rows) > 1 else f"{head}: none"


def format_times(plan: Plan) -> str:
    run = plan.run
    rows = [["phase", "runs", "compute", "memory", "links", "bound", *(["compile"] if plan.compiled else [])]]
    for phase in plan.phases:
        seconds = [*(phase.seconds[name] for name in ("compute", "memory", "links")), phase.bound]
        seconds += [phase.compile_seconds or 0] if plan.compiled else []
        rows.append([phase.name, f"{phase.executions:,.0f}", *map(format_seconds, seconds)])
    lengths = f"{run.mean_prompt:,.0f} prompt and {run.mean_response:,.0f} response tokens on average"
    return f"least seconds per step at the device's peaks, for {lengths}\n{align_columns(rows)}"


def format_fit(plan: Plan) -> str:
    """Whether the plan fits, by how much, and what to change if it does not."""
    peak, target = plan.peak, plan.run.target
    need = f"{peak.name} needs the most memory, {format_gib(peak.total)} of {format_gib(target.usable)} GiB per device"
    if plan.fits:
        return f"fits: {need}, {format_gib(plan.margin)} free; a step takes at least {format_seconds(plan.bound)} s"
    if changes := find_fix(plan):
        advice = f"it would fit with {format_changes(changes)}"
    else:
        advice = f"no mesh, layout, slots or micro-batch size fits {target.name}: use more or larger devices"
    return f"does not fit: {need}, {format_gib(-plan.margin)} too much; {advice}"


def format_plan(plan: Plan) -> str:
    parts = (format_run, format_memory, format_collectives, format_times, format_fit)
    return "\n\n".join(part(plan) for part in parts)


def format_ranking(ranking: Ranking) -> str:
    rows = [["mesh", "layout", "changes", "s per step", "peak GiB", "free", "peak phase"]]
    for plan in ranking.plans:
        bound = format_seconds(plan.bound) if plan.fits else "no fit"
        sizes = [format_gib(plan.peak.total), format_gib(plan.margin)]
        changes = format_changes(plan.changes)
        rows.append([plan.run.mesh_text, plan.run.layout_name, changes, bound, *sizes, plan.peak.name])
    usable = format_gib(ranking.plans[0].run.target.usable)
    head = f"meshes and layouts by least seconds per step, estimated from shapes; usable {usable} GiB per device"
    refused = [f"{mesh}: {reason}" for mesh, reason in ranking.refused.items()]
    return "\n".join([head, align_columns(rows, left=3), *refused])


def draw_plans(plans: Sequence[Plan], path: Path) -> None:
    """Stacked bars of memory by phase and part, one panel per plan, with a line at the usable memory."""
    import matplotlib.pyplot as plt

    run, target = plans[0].run, plans[0].run.target
    figure, panels = plt.subplots(1, len(plans), figsize=(4.2 * len(plans) + 1.2, 5), sharey=True, squeeze=False)
    for panel, plan in zip(panels[0], plans, strict=True):
        names, base = [phase.name for phase in plan.phases], [0.0] * len(plan.phases)
        for part, color in zip(MEMORY_PARTS, PART_COLORS, strict=True):
            sizes = [phase.memory.get(part, 0.0) / GIB for phase in plan.phases]
            panel.bar(names, sizes, bottom=base, color=color, label=part, width=0.7)
            base = [low + size for low, size in zip(base, sizes, strict=True)]
        panel.axhline(target.usable / GIB, color="black", linestyle="--", linewidth=1)
        source = "compiled" if plan.compiled else "estimated"
        panel.set_title(f"{plan.run.layout_name}, {plan.run.mesh_text} ({source})", fontsize=10)
        panel.tick_params(axis="x", rotation=60)
        for label in panel.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("GiB per device")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="center right", frameon=False)
    title = f"{run.settings.model.path or 'model.shape'} on {target.name}"
    figure.suptitle(f"{title}; dashed: {format_gib(target.usable)} GiB usable", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / figure.get_figwidth(), 1))
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)
