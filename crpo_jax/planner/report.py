"""A plan as a person reads it: tables for a terminal, one line of verdict, a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crpo_jax.errors import InputError
from crpo_jax.model.shape import Shape
from crpo_jax.planner.cost import link_of
from crpo_jax.planner.memory import PARTS
from crpo_jax.planner.plan import Plan, from_shapes, gib, remedy, search
from crpo_jax.planner.targets import GIB


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns aligned by their widest entry; the first `left` to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def shown(size: float) -> str:
    """GiB; a dash for nothing at all."""
    return gib(size) if size else "-"


def seconds(value: float) -> str:
    return "-" if not value else f"{value:.1f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 else "<0.001"


def parameters(s: Shape) -> int:
    block = 2 * s.d + s.d * s.h * (2 * s.n + 2 * s.k) + s.h * (s.n + 2 * s.k) + 3 * s.d * s.f
    return s.l * block + s.d + s.v * s.d * (1 if s.tied else 2)


def opening(plan: Plan) -> str:
    job, (rows, t) = plan.job, plan.job.micro_batch
    crpo, chip = job.settings.crpo, job.target.chip
    model = job.settings.model.path or "model.shape"
    return "\n".join(
        [
            f"{model}, {parameters(job.shape):,} parameters, on {job.target.name} as {job.mesh_text} (data x model), layout {job.layout_name}",
            f"a step: {crpo.prompts_per_step} prompts x {crpo.group_size} responses, {job.updates} optimizer steps; "
            f"on a data shard {job.wave_rows} rows decoded together, micro-batches of {rows} x {t:,} tokens",
            f"a device: {chip.flops / 1e12:g} TFLOP/s in bf16, memory {chip.bandwidth / 1e9:,.0f} GB/s, "
            f"{chip.link} {chip.link_bandwidth / 1e9:g} GB/s ({chip.source})",
        ]
    )


def memory(plan: Plan) -> str:
    target = plan.job.target
    rows = [["phase", *PARTS, "total", "left"]]
    for phase in plan.phases:
        parts = [shown(phase.memory.get(part, 0.0)) for part in PARTS]
        rows.append([phase.name, *parts, gib(phase.total), gib(target.usable - phase.total)])
    how = "compiled" if plan.source == "compiled" else "estimated from shapes"
    head = f"memory of a device in GiB, {how}; usable {gib(target.usable)} of {gib(target.chip.memory)}"
    return f"{head}\n{table(rows)}"


def communication(plan: Plan) -> str:
    rows = [["phase", "collective", "over axis", "across", "GiB sent", "times"]]
    for phase in plan.phases:
        for one in phase.collectives:
            if one.sent >= 0.5e-3 * GIB:
                size = f"{one.sent / GIB:.2f}" if one.sent >= 0.005 * GIB else f"{one.sent / GIB:.3f}"
                rows.append([phase.name, one.kind, one.axis, link_of(plan.job, one.axis)[0], size, f"{one.times:,.0f}"])
    what = "of one run (of one token, for decode)"
    return f"collectives {what}, by a device" + (f"\n{table(rows, left=4)}" if len(rows) > 1 else ": none")


def times(plan: Plan) -> str:
    compiled = plan.source == "compiled"
    rows = [["phase", "runs", "compute", "memory", "links", "bound", *(["compile"] if compiled else [])]]
    for phase in plan.phases:
        taken = [seconds(phase.seconds[name]) for name in ("compute", "memory", "links")]
        rows.append(
            [
                phase.name,
                f"{phase.runs:,.0f}",
                *taken,
                seconds(phase.bound),
                *([seconds(phase.compile_seconds or 0)] if compiled else []),
            ]
        )
    job = plan.job
    head = f"seconds of a step at the device's peaks, at {job.prompt_tokens:,.0f} tokens a prompt and {job.response_tokens:,.0f} a response"
    return f"{head}\n{table(rows)}"


def settings_of(changed: dict[str, Any]) -> str:
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in changed.items()
    )


def verdict(plan: Plan) -> str:
    """The last line: fits or not, by how much, and what to change."""
    peak, usable = plan.peak, gib(plan.job.target.usable)
    need = f"{peak.name} needs the most, {gib(peak.total)} of {usable} GiB a device"
    if plan.fits:
        return f"fits: {need}, {gib(plan.margin)} to spare; a step takes at least {seconds(plan.bound)} s"
    over = peak.total - max(phase.total for phase in from_shapes(plan.job).phases)
    changed = remedy(plan.job, max(0.0, over))
    if changed:
        return f"does not fit: {need}, {gib(-plan.margin)} too much; it would fit with {settings_of(changed)}"
    fitting = search(plan.job.settings, plan.job.target)[0]
    if not fitting:
        return f"does not fit: {need}, {gib(-plan.margin)} too much; no mesh, layout, slots or micro-batch of {plan.job.target.name} does: more devices"
    best = fitting[0]
    settings = settings_of({"parallel.layout": best.job.layout_name, **best.changed})
    return (
        f"does not fit: {need}, {gib(-plan.margin)} too much; it would fit with --mesh {best.job.mesh_text} {settings}"
    )


def text(plan: Plan) -> str:
    return "\n\n".join([opening(plan), memory(plan), communication(plan), times(plan), verdict(plan)])


def ranking(fitting: Sequence[Plan], others: Sequence[Plan], refused: dict[str, str]) -> str:
    """All meshes and layouts, the fastest that fits first."""
    rows = [["mesh", "layout", "with", "s a step", "GiB", "left", "tightest phase"]]
    for plan in [*fitting, *others]:
        bound = seconds(plan.bound) if plan.fits else "no fit"
        job = plan.job
        rows.append(
            [
                job.mesh_text,
                job.layout_name,
                settings_of(plan.changed),
                bound,
                gib(plan.peak.total),
                gib(plan.margin),
                plan.peak.name,
            ]
        )
    usable = gib(fitting[0].job.target.usable) if fitting else gib(others[0].job.target.usable) if others else "0"
    lines = [
        f"meshes and layouts by the least time of a step, estimated from shapes; usable {usable} GiB a device",
        table(rows, left=3),
    ]
    return "\n".join(lines + [f"{mesh}: {reason}" for mesh, reason in refused.items()])


COLORS = ("#4e79a7", "#9c755f", "#bab0ac", "#f28e2b", "#76b7b2", "#59a14f", "#edc948", "#e15759")


def picture(plans: Sequence[Plan], path: Path) -> None:
    """Stacked bars of every phase's memory, one panel per layout, under the line of what a device has."""
    import matplotlib.pyplot as plt

    target = plans[0].job.target
    figure, panels = plt.subplots(1, len(plans), figsize=(4.2 * len(plans) + 1.2, 5), sharey=True, squeeze=False)
    for panel, plan in zip(panels[0], plans, strict=True):
        names, base = [phase.name for phase in plan.phases], [0.0] * len(plan.phases)
        for part, color in zip(PARTS, COLORS, strict=True):
            sizes = [phase.memory.get(part, 0.0) / GIB for phase in plan.phases]
            panel.bar(names, sizes, bottom=base, color=color, label=part, width=0.7)
            base = [low + size for low, size in zip(base, sizes, strict=True)]
        panel.axhline(target.usable / GIB, color="black", linestyle="--", linewidth=1)
        panel.set_title(
            f"{plan.job.layout_name}, {plan.job.mesh_text} ({'compiled' if plan.source == 'compiled' else 'from shapes'})",
            fontsize=10,
        )
        panel.tick_params(axis="x", rotation=60)
        for label in panel.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("GiB a device")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="center right", frameon=False)
    figure.suptitle(
        f"{plans[0].job.settings.model.path or 'model.shape'} on {target.name}; dashed: {target.usable / GIB:.2f} GiB usable",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / figure.get_figwidth(), 1))
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)
