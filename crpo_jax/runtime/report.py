"""What a person sees of a CRPO run: the opening, a line per step, the closing table, the learning curve."""

import math
import resource
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crpo_jax.config import Config, Lora
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.hardware import peak_flops
from crpo_jax.model.lora import trained_shapes
from crpo_jax.model.shape import Shape, attention_flops, backward_flops, block_weights, forward_flops
from crpo_jax.model.transformer import parameter_count
from crpo_jax.parallel.layout import layout_warnings
from crpo_jax.parallel.mesh import DATA, MODEL
from crpo_jax.rollout.engine import Response, RolloutProgress
from crpo_jax.runtime.inputs import TrainingQuestions
from crpo_jax.runtime.progress import format_duration
from crpo_jax.runtime.runtime import Runtime
from crpo_jax.store.files import read_rows, writing
from crpo_jax.store.metrics import read_metrics
from crpo_jax.update.batches import Row, count_places, find_groups
from crpo_jax.update.losses import Batch
from crpo_jax.update.trainer import Update

SHOWN = {
    "mean": "reward",
    "accuracy": "accuracy",
    "format": "format",
    "cross_reference": "cites",
    "consistency": "on-language",
    "length": "tokens",
}


def step_line(values: Mapping[str, float]) -> str:
    """One line of the measures that matter, without those that the questions or the design do not have."""
    parts = [f"reward {values['reward/mean']:.2f}"]
    parts += [
        f"{label} {values[f'reward/{name}']:.2f}"
        for name, label in SHOWN.items()
        if f"reward/{name}" in values and name != "mean" and not math.isnan(values[f"reward/{name}"])
    ]
    parts += [f"{values['response/length']:.0f} tokens"]
    parts += [f"kl {values['kl/mean']:.3f}"] if not math.isnan(values.get("kl/mean", math.nan)) else []
    parts += [f"{values['time/tokens_per_second']:,.0f} tok/s"] if "time/tokens_per_second" in values else []
    return "  ".join(parts)


def rollout_line(tally: RolloutProgress) -> str:
    """How far a rollout is."""
    parts = [f"sampling: {tally.prompts:,} prompts, {tally.responses:,} of {tally.total:,} responses done"]
    parts += [f"{tally.tokens / tally.seconds:,.0f} tok/s", f"mean length {tally.mean_length:.0f}"]
    return "  ".join([*parts, f"about {format_duration(tally.seconds_left)} left"])


def opening(runtime: Runtime, done: int, total: int, questions: TrainingQuestions, start: Path, workdir: Path) -> str:
    """What is about to run, on which devices, from which start, and where its files are."""
    settings, crpo = runtime.settings, runtime.settings.crpo
    training, held_out = questions.training, questions.held_out
    begin = f"resuming after step {done}" if done else "from the start"
    lines = [
        f"CRPO, reward design {settings.reward.design}: {total} steps of {crpo.prompts_per_step} questions x "
        f"{crpo.group_size} responses, {begin}",
        *model_and_devices(runtime, start, settings.lora),
        f"  questions  {settings.data.source}: {len(training.questions):,} to train on, "
        f"{len(held_out.questions):,} held out",
        *answers_line(settings, training.questions),
        *([set_aside_line(settings, questions.set_aside)] if questions.set_aside else []),
        f"  workdir    {workdir}",
    ]
    rows = crpo.mini_batch_prompts * crpo.group_size
    for warning in layout_warnings(runtime.layout, runtime.mesh, runtime.shape.k, crpo.prompts_per_step, rows):
        lines.append(f"  wasteful   {warning}")
    for name, chosen in (("training", training), ("held-out", held_out)):
        if chosen.dropped:
            limit = f"data.max_prompt_tokens={settings.data.max_prompt_tokens}"
            lines.append(f"  dropped    {len(chosen.dropped)} {name} questions longer than {limit}")
    return "\n".join(lines)


def answers_line(settings: Config, questions: Sequence[Question]) -> list[str]:
    """The kinds of right answers, where some are no options."""
    kinds = Counter(question.kind for question in questions)
    if kinds.keys() <= {"choice"}:
        return []
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    where = "" if kinds.keys() <= {"none"} else f"; in a response: {settings.reward.answer_in}"
    return [f"  answers    {counts}{where}"]


def set_aside_line(settings: Config, count: int) -> str:
    """How many questions are not trained on, and why."""
    reason = (
        "those of the half that the cold start was fine-tuned on" if settings.data.part == "auto" else "the other half"
    )
    return f"  set aside  {count:,} questions, {reason} (data.part={settings.data.part}; all: none)"


def model_and_devices(runtime: Runtime, start: Path | None, lora: Lora) -> list[str]:
    """The model, what of it is trained, and the devices."""
    settings, mesh, count = runtime.settings, runtime.mesh, parameter_count(runtime.shape)
    trained = sum(leaf.size for leaf in jax.tree.leaves(trained_shapes(runtime.shape, lora)))
    part = (
        f"{trained:,} in adapters of rank {lora.rank} trained ({trained / count:.2%})" if lora.rank else "all trained"
    )
    merged = f" with {settings.model.adapter} merged in" if settings.model.adapter else ""
    devices = f"{mesh.devices.size} {mesh.devices.flat[0].device_kind} device{'s' if mesh.devices.size > 1 else ''}"
    return [
        f"  model      {start or 'from scratch'}{merged}: {count:,} parameters, {part}, "
        f"computing in {settings.model.dtype}",
        f"  devices    {devices}, mesh {mesh.shape[DATA]}x{mesh.shape[MODEL]} (data x model), "
        f"layout {settings.parallel.layout}",
    ]


def update_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """The metrics of the optimizer steps of one RL step, from values on the host; of the KL only where there is
    one. A mean over no tokens, where no response carries gradient, is nan."""
    metrics = [update.metrics for update in updates]

    def total(name: str) -> float:
        return float(sum(float(each[f"sum/{name}"]) for each in metrics))

    def largest(name: str) -> float:
        return float(max(each[f"max/{name}"] for each in metrics))

    tokens = total("tokens") or math.nan
    kl = {"kl/mean": total("kl") / tokens, "kl/max": largest("kl")} if "sum/kl" in metrics[0] else {}
    return kl | {
        "loss/total": float(np.mean([each["sum/loss"] for each in metrics])),
        "loss/policy": float(np.mean([each["sum/policy"] for each in metrics])),
        "policy/entropy": total("entropy") / tokens,
        "policy/clipped_low": total("clipped_low") / tokens,
        "policy/clipped_high": total("clipped_high") / tokens,
        "policy/ratio_max": float(np.exp(largest("log_ratio"))),
        "policy/ratio_min": float(np.exp(min(each["min/log_ratio"] for each in metrics))),
        "policy/sampler_difference_mean": total("sampler_difference") / (total("sampler_tokens") or math.nan),
        "policy/sampler_difference_max": largest("sampler_difference"),
        **importance_metrics(total),
        "policy/gradient_norm": float(np.mean([update.norm for update in updates])),
        "policy/skipped_updates": float(len(updates) - sum(float(update.applied) for update in updates)),
    }


def importance_metrics(total: Callable[[str], float]) -> dict[str, float]:
    """Of the importance weights w of n tokens or responses: their mean, the effective sample size (sum w)^2 / sum w^2
    as a share of n, and the shares that were truncated and masked."""
    units, squares = total("importance_units") or math.nan, total("importance_squared")
    return {
        "importance/mean": total("importance") / units,
        "importance/effective_sample_size": total("importance") ** 2 / (squares or 1.0) / units,
        "importance/truncated": total("importance_capped") / units,
        "importance/masked": total("importance_masked") / units,
    }


def time_metrics(
    runtime: Runtime,
    responses: Sequence[Response],
    rows: Sequence[Row],
    mini_batches: Sequence[Sequence[Batch]],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """Seconds of a step's phases (rollout, score, update), rates, padding, MFU and memory: the only
    metrics that may differ between two identical runs.

    MFU (where the device's peak is published) counts the arithmetic of `update_flops` that is needed. Memory is
    the most so far, in GiB.
    """
    tokens, lengths = sum(len(response.tokens) for response in responses), [row.length for row in rows]
    places = sum(batch.targets.size for batches in mini_batches for batch in batches if batch.targets is not None)
    metrics = {
        **{f"time/{phase}": spent for phase, spent in seconds.items()},
        "time/tokens_per_second": tokens / sum(seconds.values()),
        "time/rollout_tokens_per_second": tokens / seconds["rollout"],
        "time/update_tokens_per_second": sum(lengths) / seconds["update"],
        "time/padding": 1 - count_places(rows) / places,
    }
    peak = peak_flops(runtime.mesh.devices.flat[0].device_kind)
    if peak is not None:
        flops = update_flops(runtime.shape, runtime.settings, lengths, -(-len(lengths) // len(mini_batches)))
        metrics["time/mfu"] = flops * needed_share(runtime.shape, rows) / (seconds["update"] * peak * runtime.mesh.size)
    unit = 1 if sys.platform == "darwin" else 1024
    metrics["time/host_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    statistics = [device.memory_stats() or {} for device in runtime.mesh.local_devices]  # None on a CPU
    peaks = [device["peak_bytes_in_use"] for device in statistics if "peak_bytes_in_use" in device]
    return metrics | ({"time/device_memory": max(peaks) / 2**30} if peaks else {})


def update_flops(shape: Shape, settings: Config, lengths: Sequence[int], mini_batch: int) -> float:
    """Model FLOPs of a step's update on rows of these lengths, `mini_batch` of them at a time: the forward of the
    reference, where there is one, that of the old policy for every mini-batch but the first, unless the sampler's
    log-probs serve, and forward and backward of the policy. Recomputation counts nothing; a weight frozen under
    adapters has no gradient."""
    lora, later = settings.lora, lengths[mini_batch:] if settings.crpo.old_logprobs == "trainer" else []
    adapters = sum(leaf.size for leaf in jax.tree.leaves(trained_shapes(shape, lora))) if lora.rank else 0

    def policy_forward(lengths: Sequence[int]) -> float:
        return sum(forward_flops(shape, length, adapters) for length in lengths)

    reference = sum(forward_flops(shape, length) for length in lengths) if settings.crpo.has_reference else 0.0
    backward = sum(backward_flops(shape, length, adapters) for length in lengths)
    return reference + policy_forward(later) + policy_forward(lengths) + backward


def needed_share(shape: Shape, rows: Sequence[Row]) -> float:
    """The share of the arithmetic of rows one by one that is needed: each group's prompt once, logits of responses
    alone."""
    apart = sum(forward_flops(shape, row.length) for row in rows)
    needed = 2.0 * block_weights(shape) * count_places(rows)
    needed += 2.0 * shape.d * shape.v * sum(len(row.response) for row in rows)
    needed += sum(attention_flops(shape, row.length) for row in rows)
    needed -= sum((len(group.rows) - 1) * attention_flops(shape, group.prompt) for group in find_groups(rows))
    return needed / apart


def evaluations(metrics: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    return [row for row in metrics if "eval/accuracy" in row]


def closing(workdir: Path, count: int) -> str:
    """Before and after on the held-out questions, one of them answered before and after, and where to look next."""
    metrics = read_metrics(workdir)
    measured = evaluations(metrics)
    if len(measured) < 2:
        return f"nothing to compare: {workdir / 'metrics.jsonl'} holds {len(measured)} evaluations"
    first, last = measured[0], measured[-1]
    heads = ["step " + str(int(row["step"])) for row in (first, last)]
    rows = [f"{f'{count} held-out questions':<24}{heads[0]:>16}{heads[1]:>16}{'change':>10}"]
    for name, label in {**SHOWN, "truncated": "truncated"}.items():
        before, after = first[f"eval/{name}"], last[f"eval/{name}"]
        if before is None or after is None:  # not measured by the design, or not of these questions
            continue
        shares = name in ("accuracy", "format", "cross_reference", "truncated")
        values = [f"{v:.3f} ± {standard_error(v, count):.3f}" if shares else f"{v:.2f}" for v in (before, after)]
        rows.append(f"{label:<24}{values[0]:>16}{values[1]:>16}{after - before:>+10.2f}")
    example = before_and_after(workdir, int(first["step"]), int(last["step"]))
    files = [
        f"curve     {draw_curve(workdir, metrics)}",
        f"responses {workdir / 'report' / 'index.html'}, {workdir / 'samples.jsonl'}",
        f"metrics   {workdir / 'metrics.jsonl'}, {workdir / 'tb'}",
    ]
    return "\n\n".join(part for part in (example, "\n".join(rows), "\n".join(files)) if part)


def before_and_after(workdir: Path, first: int, last: int) -> str:
    """The held-out question whose reward rose most, with both responses."""
    try:
        scored = [
            {row["id"]: row for row in read_rows(workdir / "report" / f"held_out_{step:06d}.jsonl") if "total" in row}
            for step in (first, last)
        ]
        pairs = [(old, scored[1][name]) for name, old in scored[0].items() if name in scored[1]]
        if not pairs:
            raise InputError("none is scored in both files")
        old, new = max(pairs, key=lambda pair: pair[1]["total"] - pair[0]["total"])
        options = "".join(f"{letter}) {text}\n" for letter, text in new.get("options", {}).items())
        right = f"(answer {new['answer']})\n" if new["answer"] else ""
        return (
            f"{new['question']}\n{options}{right}\n"
            f"-- before, reward {old['total']:.2f}:\n{old['response']}\n\n"
            f"-- after, reward {new['total']:.2f}:\n{new['response']}"
        )
    except (InputError, KeyError, TypeError, ValueError, AttributeError) as damage:  # of files that are only shown
        return f"no held-out question can be shown before and after from {workdir / 'report'}: {damage}"


def draw_curve(workdir: Path, metrics: Sequence[Mapping[str, float]]) -> Path:
    """report/curve.png: reward, its parts, KL and response length against the step; dots are held-out evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained, measured = [row for row in metrics if "reward/mean" in row], evaluations(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")

    def panel(axis: Any, title: str, names: Mapping[str, str], held_out: Mapping[str, str], y: str) -> None:
        for name, label in names.items():
            rows = [row for row in trained if name in row]  # without a KL to the start there is none to draw
            (line,) = axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, linewidth=1.2)
            if name in held_out:
                points = [(row["step"], row[held_out[name]]) for row in measured]
                axis.plot(*zip(*points, strict=True), "o", color=line.get_color(), markersize=5)
        axis.set(title=title, xlabel="RL step", ylabel=y)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)

    parts = {
        f"reward/{name}": label
        for name, label in SHOWN.items()
        if name in ("accuracy", "format", "cross_reference", "consistency")
    }
    panel(axes[0, 0], "reward", {"reward/mean": "reward"}, {"reward/mean": "eval/mean"}, "reward")
    panel(axes[0, 1], "its parts", parts, {name: name.replace("reward/", "eval/") for name in parts}, "share")
    panel(axes[1, 0], "distance from the start", {"kl/mean": "KL"}, {}, "nats per token")
    panel(axes[1, 1], "response length", {"response/length": "tokens"}, {"response/length": "eval/length"}, "tokens")
    figure.suptitle("Lines: training batches. Dots: held-out questions.", fontsize=9)
    path = workdir / "report" / "curve.png"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def standard_error(share: float, count: int) -> float:
    """Of a share measured on `count` independent responses."""
    return math.sqrt(max(share * (1 - share), 0) / max(count, 1))
