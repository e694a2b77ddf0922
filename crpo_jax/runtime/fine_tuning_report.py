"""What a person sees of a cold start: the opening, a line per step, previews, the closing table, the loss curve."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crpo_jax.rollout.engine import Response
from crpo_jax.runtime.inputs import Traces
from crpo_jax.runtime.report import model_and_devices
from crpo_jax.runtime.runtime import Runtime, Vocabulary
from crpo_jax.store.files import writing
from crpo_jax.store.metrics import read_metrics
from crpo_jax.update.batches import Row
from crpo_jax.update.trainer import Update

SHOWN_CHARACTERS = 600


def sft_opening(
    runtime: Runtime, done: int, total: int, epoch: int, traces: Traces, start: Path | None, workdir: Path
) -> str:
    """What is about to be fine-tuned, and on what; `epoch` is how many steps one takes."""
    sft = runtime.settings.sft
    begin = f"resuming after step {done}" if done else "from the start"
    dropped = f", {traces.dropped:,} longer than sft.max_tokens={sft.max_tokens} dropped" if traces.dropped else ""
    batch = min(sft.batch_size, len(traces.train))
    return "\n".join([
        f"cold start: {total:,} steps of {batch} traces ({total / epoch:.1f} epochs), {begin}",
        *model_and_devices(runtime, start, sft.lora),
        f"  traces     {len(traces.train):,} to train on, {len(traces.held_out):,} held out{dropped}",
        f"  workdir    {workdir}",
    ])  # fmt: skip


def sft_metrics(update: Update, rows: Sequence[Row], seconds: float) -> dict[str, float]:
    """The metrics of one optimizer step, from values on the host."""
    return {
        "loss/total": float(update.metrics["sum/nll"] / update.metrics["sum/tokens"]),
        "policy/gradient_norm": float(update.norm),
        "policy/skipped_updates": 1 - float(update.applied),
        "time/step": seconds,
        "time/tokens_per_second": sum(row.length for row in rows) / seconds,
    }


def sft_step_line(values: Mapping[str, float]) -> str:
    """One line of what was measured."""
    names = {
        "loss/total": "loss {:.3f}",
        "eval/loss": "held-out loss {:.3f}",
        "time/tokens_per_second": "{:,.0f} tok/s",
    }
    return "  ".join(
        [
            f"epoch {values['sft/epoch']:.1f}",
            *(form.format(values[name]) for name, form in names.items() if name in values),
        ]
    )


def preview_lines(prompt: Row, response: Response, vocabulary: Vocabulary) -> str:
    """The model's answer to one prompt, as far as it fits on a screen."""
    text = vocabulary.decode(response)
    hidden = len(text) - SHOWN_CHARACTERS
    cut = f"... ({hidden:,} characters more in samples.jsonl)" if hidden > 0 else ""
    ended = "stopped" if response.stopped else "cut at rollout.max_new_tokens"
    prompt_text = " ".join(str(vocabulary.tokenizer.decode(list(prompt.prompt), skip_special_tokens=True)).split())[
        -160:
    ]
    indented = "\n".join(f"    {line}" for line in (text[:SHOWN_CHARACTERS] + cut).splitlines())
    return f"  preview, {len(response.tokens)} tokens, {ended}, after: ...{prompt_text}\n{indented}"


def preview_rows(
    step: int, prompts: Sequence[Row], responses: Sequence[Response], vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """What samples.jsonl records of an evaluation."""
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        texts = {
            "prompt": vocabulary.tokenizer.decode(list(prompt.prompt)),
            "teacher": vocabulary.tokenizer.decode(list(prompt.response)),
        }
        rows.append(
            {
                "step": step,
                "tokens": len(response.tokens),
                "stopped": response.stopped,
                **texts,
                "response": vocabulary.decode(response),
            }
        )
    return rows


def best_step(losses: Mapping[int, float], among: Sequence[int]) -> int | None:
    """The step with the lowest held-out loss, the first of several; None where none of them was measured."""
    return min((step for step in losses if step in among), key=lambda step: (losses[step], step), default=None)


def sft_closing(workdir: Path, folder: Path) -> str:
    """Loss before, at its best and at the end, and where everything is."""
    metrics = read_metrics(workdir)
    losses, epochs = held_out_losses(workdir), {int(row["step"]): row["sft/epoch"] for row in metrics}
    best = best_step(losses, [step for step in losses if step])
    columns = {"before": 0, **({"best": best} if best is not None else {}), "last": max(epochs, default=0)}
    heads = [f"{name}: step {step}, epoch {epochs.get(step, 0):.1f}" for name, step in columns.items()]
    rows = [f"{'':<24}" + "".join(f"{head:>32}" for head in heads)]
    if losses:
        rows.append(
            f"{'held-out loss per token':<24}"
            + "".join(f"{losses[step]:>32.4f}" if step in losses else f"{'':>32}" for step in columns.values())
        )
    trained = [row["loss/total"] for row in metrics if row.get("loss/total") is not None]
    if trained:
        rows.append(f"{'training loss':<24}{f'first step {trained[0]:.4f}, last {trained[-1]:.4f}':>32}")
    files = [f"model     {folder}  (model.path={folder} starts from it)"]
    if (workdir / "adapter").is_dir():
        files.append(f"adapter   {workdir / 'adapter'}  (for PEFT, or as model.adapter)")
    files += [f"curve     {draw_loss_curve(workdir, metrics, losses, best)}", f"previews  {workdir / 'samples.jsonl'}"]
    return "\n".join(rows) + "\n\n" + "\n".join(files)


def held_out_losses(workdir: Path) -> dict[int, float]:
    """eval/loss by the step it was measured at."""
    return {int(row["step"]): row["eval/loss"] for row in read_metrics(workdir) if row.get("eval/loss") is not None}


def draw_loss_curve(
    workdir: Path, metrics: Sequence[Mapping[str, float]], losses: Mapping[int, float], best: int | None
) -> Path:
    """report/curve.png: the training loss by step, the held-out loss by evaluation, the best one marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    trained = [(row["step"], row["loss/total"]) for row in metrics if row.get("loss/total") is not None]
    if trained:
        axis.plot(*zip(*trained, strict=True), linewidth=1, label="training batches")
    if losses:
        axis.plot(list(losses), list(losses.values()), "o-", markersize=4, label="held-out traces")
    if best is not None:
        axis.plot([best], [losses[best]], "*", markersize=14, label=f"kept: step {best}, {losses[best]:.3f}")
    axis.set(xlabel="optimizer step", ylabel="nats per response token", title="cold start")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path = workdir / "report" / "curve.png"
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
