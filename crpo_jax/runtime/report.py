"""What a person sees of a run: a line per step, the opening, the closing table, the learning curve."""

import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from crpo_jax.answer.evaluation import Answered, response_means, reward_means, standard_error
from crpo_jax.answer.rollout import Drawn
from crpo_jax.config import Config, Lora
from crpo_jax.data.prompts import Fitting
from crpo_jax.model import lora
from crpo_jax.model.shape import Shape, forward_flops
from crpo_jax.model.transformer import parameter_count
from crpo_jax.parallel.layout import LAYOUTS, wasteful
from crpo_jax.parallel.mesh import DATA, MODEL
from crpo_jax.planner.targets import peak_flops
from crpo_jax.reward.rules import Score
from crpo_jax.reward.scorer import Scored
from crpo_jax.rollout.engine import Response, Tally
from crpo_jax.runtime.progress import Progress, clock
from crpo_jax.store.files import read_rows, writing
from crpo_jax.store.logs import read_metrics

SHOWN = {
    "mean": "reward",
    "accuracy": "accuracy",
    "format": "format",
    "cross_reference": "cites",
    "consistency": "on-language",
    "length": "tokens",
}


def line(values: Mapping[str, float]) -> str:
    """One line of the measures that matter."""
    parts = [f"reward {values['reward/mean']:.2f}"]
    parts += [
        f"{label} {values[f'reward/{name}']:.2f}"
        for name, label in SHOWN.items()
        if f"reward/{name}" in values and name != "mean"
    ]
    parts += [f"{values['response/length']:.0f} tokens"]
    if "kl/mean" in values:
        parts += [f"kl {values['kl/mean']:.3f}", f"{values['time/tokens_per_second']:,.0f} tok/s"]
    return "  ".join(parts)


def sampling(progress: Progress, step: int) -> Callable[[Tally], None]:
    """Shows how far a rollout is."""

    def show(tally: Tally) -> None:
        parts = [f"sampling: {tally.prompts:,} prompts, {tally.responses:,} of {tally.total:,} responses done"]
        parts += [
            f"{tally.tokens / tally.seconds:,.0f} tok/s",
            f"mean length {tally.mean_length:.0f}",
            f"about {clock(tally.seconds_left)} to go",
        ]
        progress.show(step, "  ".join(parts))

    return show


def opening(
    settings: Config,
    shape: Shape,
    mesh: Mesh,
    steps: tuple[int, int],
    questions: tuple[Fitting, Fitting],
    folder: Path,
    workdir: Path,
) -> str:
    """What is about to run, on what, from what, and where it is kept."""
    (done, total), (training, held_out), crpo = steps, questions, settings.crpo
    begun = f"resuming after step {done}" if done else "from the start"
    lines = [
        f"CRPO, reward design {settings.reward.design}: {total} steps of {crpo.prompts_per_step} questions x {crpo.group_size} responses, {begun}",
        *what_on_what(settings, shape, mesh, folder, settings.lora),
        f"  questions  {settings.data.source}: {len(training.questions):,} to train on, {len(held_out.questions):,} held out",
        f"  workdir    {workdir}",
    ]
    layout, sizes = LAYOUTS[settings.parallel.layout], {letter: getattr(shape, letter) for letter in "dnkfv"}
    for reason in wasteful(layout, mesh, sizes, crpo.prompts_per_step, crpo.mini_batch_prompts * crpo.group_size):
        lines.append(f"  wasteful   {reason}")
    for name, chosen in (("training", training), ("held-out", held_out)):
        if chosen.dropped:
            lines.append(
                f"  dropped    {len(chosen.dropped)} {name} questions longer than data.max_prompt_tokens={settings.data.max_prompt_tokens}"
            )
    return "\n".join(lines)


def what_on_what(settings: Config, shape: Shape, mesh: Mesh, folder: Path | None, adapters: Lora) -> list[str]:
    """The model, what of it is trained, and the devices."""
    count, low = (
        parameter_count(shape),
        sum(leaf.size for leaf in jax.tree.leaves(lora.abstract(shape, adapters))) if adapters.rank else 0,
    )
    trained = f", {low:,} in adapters of rank {adapters.rank} trained ({low / count:.2%})" if low else ", all trained"
    merged = f" with {settings.model.adapter} merged in" if settings.model.adapter else ""
    devices = f"{mesh.devices.size} {mesh.devices.flat[0].device_kind} device{'s' if mesh.devices.size > 1 else ''}"
    return [
        f"  model      {folder or 'from scratch'}{merged}: {count:,} parameters{trained}, computing in {settings.model.dtype}",
        f"  devices    {devices}, mesh {mesh.shape[DATA]}x{mesh.shape[MODEL]} (data x model), layout {settings.parallel.layout}",
    ]


def stopped(done: int, steps: int) -> str:
    """What a run that was asked to stop says when everything is on the disk."""
    return f"stopped after step {done} of {steps}; the same command goes on from there"


def timings(seconds: Mapping[str, float], tokens: int, useful: int, places: int) -> dict[str, float]:
    """Seconds of a step's phases (rollout, score, update) and what they come to; names under time/ are what two equal runs may differ in.

    `tokens` were sampled; the update's micro-batches have `places`, of which `useful` hold a token of a prompt or response.
    """
    rates = {
        "time/tokens_per_second": tokens / sum(seconds.values()),
        "time/rollout_tokens_per_second": tokens / seconds["rollout"],
        "time/update_tokens_per_second": useful / seconds["update"],
        "time/padding": 1 - useful / places,
    }
    return {f"time/{phase}": spent for phase, spent in seconds.items()} | rates


def utilization(shape: Shape, mesh: Mesh, lengths: Sequence[int], passes: int, seconds: float) -> dict[str, float]:
    """Model FLOPs of an update over what the devices could do in that time in bf16, where their peak is known.

    `lengths` are the rows' without padding; `passes` count forward passes, a backward one as two and recomputation as none.
    """
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    flops = passes * sum(forward_flops(shape, length) for length in lengths)
    return {} if peak is None else {"time/mfu": flops / (seconds * peak * mesh.size)}


def memory(mesh: Mesh) -> dict[str, float]:
    """GiB that this process has held at most so far: on the host, and on its fullest device where the runtime counts it (not on CPUs)."""
    unit = 1 if sys.platform == "darwin" else 1024
    held = {"time/host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    on_devices = [
        stats["peak_bytes_in_use"]
        for device in mesh.local_devices
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    return held | ({"time/device_memory": max(on_devices) / 2**30} if on_devices else {})


def step_metrics(
    scored: Sequence[Scored],
    responses: Sequence[Response],
    rewards: np.ndarray,
    updates: Sequence[tuple[dict[str, Any], Any, Any]],
) -> dict[str, float]:
    """The metrics of one RL step; `updates` are the accumulated metrics, gradient norm and applied flag of each optimizer step."""
    totals, norms, applied = zip(*updates, strict=True)

    def summed(name: str) -> float:
        return float(sum(float(total[f"sum/{name}"]) for total in totals))

    tokens = max(summed("tokens"), 1.0)
    good = [one for one in scored if isinstance(one, Score)]
    cited = [why for why in (one.why.get("cross_reference") for one in good) if why and "cited" in why]
    return {
        **reward_means(scored),
        "reward/std": float(np.std(rewards)),
        "reward/zero_variance_groups": float(np.mean(np.ptp(rewards, axis=1) == 0)),
        "reward/cited_terms": float(np.mean([len(why["cited"]) for why in cited])) if cited else 0.0,
        "reward/repeated_terms": float(np.mean([why["repeats"] for why in cited])) if cited else 0.0,
        **response_means(responses),
        "loss/total": float(np.mean([total["sum/loss"] for total in totals])),
        "loss/policy": float(np.mean([total["sum/policy"] for total in totals])),
        "kl/mean": summed("kl") / tokens,
        "kl/max": float(max(total["max/kl"] for total in totals)),
        "policy/entropy": summed("entropy") / tokens,
        "policy/clipped_low": summed("clipped_low") / tokens,
        "policy/clipped_high": summed("clipped_high") / tokens,
        "policy/ratio_max": float(np.exp(max(total["max/log_ratio"] for total in totals))),
        "policy/ratio_min": float(np.exp(min(total["min/log_ratio"] for total in totals))),
        "policy/sampler_difference_mean": summed("sampler_difference") / tokens,
        "policy/sampler_difference_max": float(max(total["max/sampler_difference"] for total in totals)),
        "policy/gradient_norm": float(np.mean(norms)),
        "policy/skipped_updates": float(len(applied) - sum(float(one) for one in applied)),
    }


def sample_rows(step: int, drawn: Drawn, advantages: np.ndarray) -> list[dict[str, Any]]:
    """What samples.jsonl keeps of a step: every response with its reward, or with the error that left it out.

    `trained` says whether it was in a mini-batch: all are, unless dynamic sampling replaced their group.
    """
    trained, rows = set(drawn.trained.tolist()), []
    for place, (question, response, text, score) in enumerate(zip(*drawn[:4], strict=True)):
        row = {
            "step": step,
            "id": question.id,
            "sample": response.sample,
            "tokens": len(response.tokens),
            "stopped": response.stopped,
        }
        row |= {
            "advantage": round(float(advantages[place]), 5),
            "trained": place in trained,
            "answer": question.answer,
            "response": text,
        }
        rows.append(row | score_fields(score))
    return rows


def score_fields(score: Scored) -> dict[str, Any]:
    if isinstance(score, Score):
        names = (
            "total",
            "accuracy",
            "format",
            "cross_reference",
            "clinical_reasoning",
            "consistency",
            "answer_found",
            "why",
        )
        return {name: getattr(score, name) for name in names}
    return {"error": score.error, "traceback": score.traceback}


def keep_answers(workdir: Path, step: int, answered: Sequence[Answered]) -> None:
    """The held-out responses after `step` steps, in report/held_out_<step>.jsonl."""
    path = workdir / "report" / f"held_out_{step:06d}.jsonl"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for question, response, score in answered:
                asked = {
                    "id": question.id,
                    "question": question.question,
                    "options": dict(question.options),
                    "answer": question.answer,
                }
                file.write(json.dumps(asked | {"response": response} | score_fields(score), ensure_ascii=False) + "\n")


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
        before, after = float(first[f"eval/{name}"]), float(last[f"eval/{name}"])
        shares = name in ("accuracy", "format", "cross_reference", "truncated")
        shown = [f"{v:.3f} ± {standard_error(v, count):.3f}" if shares else f"{v:.2f}" for v in (before, after)]
        rows.append(f"{label:<24}{shown[0]:>16}{shown[1]:>16}{after - before:>+10.2f}")
    example = before_and_after(workdir, int(first["step"]), int(last["step"]))
    curve = draw_curve(workdir, metrics)
    kept = f"curve     {curve}\nresponses {workdir / 'samples.jsonl'}, {workdir / 'report'}\nmetrics   {workdir / 'metrics.jsonl'}, {workdir / 'tb'}"
    return "\n\n".join(part for part in (example, "\n".join(rows), kept) if part)


def before_and_after(workdir: Path, first: int, last: int) -> str:
    """The held-out question whose reward rose most, with both responses."""
    rows = [list(read_rows(workdir / "report" / f"held_out_{step:06d}.jsonl")) for step in (first, last)]
    pairs = [(old, new) for old, new in zip(*rows, strict=True) if "total" in old and "total" in new]
    if not pairs:
        return ""
    old, new = max(pairs, key=lambda pair: pair[1]["total"] - pair[0]["total"])
    options = "\n".join(f"{letter}) {text}" for letter, text in new["options"].items())
    return (
        f"{new['question']}\n{options}\n(answer {new['answer']})\n\n"
        f"-- before, reward {old['total']:.2f}:\n{old['response']}\n\n-- after, reward {new['total']:.2f}:\n{new['response']}"
    )


def draw_curve(workdir: Path, metrics: Sequence[Mapping[str, float]]) -> Path:
    """report/curve.png: reward, its parts, KL and response length against the step; dots are held-out evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained, measured = [row for row in metrics if "reward/mean" in row], evaluations(metrics)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")

    def panel(axis: Any, title: str, names: Mapping[str, str], held_out: Mapping[str, str], y: str) -> None:
        for name, label in names.items():
            (drawn,) = axis.plot(
                [row["step"] for row in trained], [row[name] for row in trained], label=label, linewidth=1.2
            )
            if name in held_out:
                points = [(row["step"], row[held_out[name]]) for row in measured]
                axis.plot(*zip(*points, strict=True), "o", color=drawn.get_color(), markersize=5)
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
    panel(axes[1, 0], "distance from the start", {"kl/mean": "k3 KL"}, {}, "nats per token")
    panel(axes[1, 1], "response length", {"response/length": "tokens"}, {"response/length": "eval/length"}, "tokens")
    figure.suptitle("Lines: training batches. Dots: held-out questions.", fontsize=9)
    path = workdir / "report" / "curve.png"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
