"""The cold start: supervised fine-tuning on teacher traces, the loss on the response alone (paper section 4.3)."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from crpo_jax.data.batches import Batches
from crpo_jax.model.huggingface import model_folder
from crpo_jax.model.peft import save_adapters
from crpo_jax.parallel.mesh import data_size
from crpo_jax.runtime import fine_tuning_report
from crpo_jax.runtime.fine_tuning_report import best_step, held_out_losses
from crpo_jax.runtime.inputs import Traces, model_digests, open_traces, trace_digest
from crpo_jax.runtime.run import TrainingRun, open_run, shared_workdir
from crpo_jax.runtime.runtime import Runtime
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.store.workdir import check_inputs, has_folder, read_inputs, write_traced
from crpo_jax.update.batches import Row, supervised_batches
from crpo_jax.update.trainer import Trainer, TrainState

TRACES = "teacher traces"
PREVIEW = 2**31 - 1
"""Stands for the step in the keys of previews: all of them draw the same random numbers."""


def cold_start_traces(runtime: Runtime, workdir: Path) -> Traces | None:
    """The traces of a CRPO run that has no start model yet: bad ones are refused before anything is written."""
    ready = runtime.settings.model.path or has_folder(workdir, "coldstart")
    return None if ready else open_traces(runtime)


def cold_start(runtime: Runtime, workdir: Path, traces: Traces | None, *, allow_changes: bool = False) -> Path | None:
    """The start model of a CRPO run: model.path, or WORKDIR/coldstart, which a run in WORKDIR/sft writes if it is not
    there yet. None where that run was asked to stop."""
    if runtime.settings.model.path:
        return model_folder(runtime.settings.model.path)
    folder = workdir / "coldstart"
    if traces is None or fine_tune(runtime, workdir / "sft", folder, traces, allow_changes=allow_changes):
        return folder
    return None


def fine_tune(runtime: Runtime, workdir: Path, folder: Path, traces: Traces, *, allow_changes: bool = False) -> bool:
    """Fine-tunes the start model on the traces, or resumes the run in `workdir`; True once the weights with the lowest
    held-out loss are in `folder`, in Hugging Face format and float32, and False where the run was asked to stop."""
    settings, sft, shards = runtime.settings, runtime.settings.sft, data_size(runtime.mesh)
    runtime.check_export()
    start = model_folder(settings.model.path) if settings.model.path else None
    batches = Batches(traces.train, min(sft.batch_size, len(traces.train)), settings.run.seed)
    steps, epoch = sft.steps or batches.steps(sft.epochs), batches.steps(1)
    with shared_workdir(runtime, workdir, allow_changes=allow_changes):
        digests = {TRACES: trace_digest(traces)} | model_digests(runtime, start)
        check_inputs(workdir, digests, writer=runtime.writes, allow_changes=allow_changes)
        if runtime.writes:
            write_traced(workdir, traces.questions)
        trainer = runtime.trainer("supervised", steps)
        checkpoints = Checkpoints(workdir / "checkpoints", settings.run.keep, 1, negated_losses)
        with open_run(runtime, workdir, trainer, runtime.start_state(trainer, start), steps, checkpoints) as run:
            losses = {step: loss for step, loss in held_out_losses(workdir).items() if step < run.done}
            run.progress.write(fine_tuning_report.sft_opening(runtime, run.done, steps, epoch, traces, start, workdir))
            for step in run.steps():
                # ---- evaluate: the model after `step` steps
                measures = {"sft/epoch": step / epoch}
                if step % epoch == 0 or step == steps:
                    measures |= evaluate_traces(run, traces, step)
                    if math.isfinite(measures.get("eval/loss", math.nan)):
                        losses[step] = measures["eval/loss"]
                    run.progress.write(f"step {step}/{steps}  {fine_tuning_report.sft_step_line(measures)}")
                    preview(run, traces, step)
                if step == steps or (step % epoch == 0 and patience_is_over(losses, sft.patience)):
                    run.finish(step, measures)
                    break

                # ---- update
                began, rows = time.perf_counter(), batches.batch(step)
                mini_batch = trainer.put_batches(supervised_batches(rows, settings.parallel, shards))
                run.state, update = trainer.update(run.state, mini_batch)
                update = jax.device_get(update)

                # ---- keep
                measures |= fine_tuning_report.sft_metrics(update, rows, time.perf_counter() - began)
                due = (step + 1) % epoch == 0 or (sft.save_every > 0 and (step + 1) % sft.save_every == 0)
                run.keep(step, measures, fine_tuning_report.sft_step_line(measures), [update], [mini_batch], save=due)
            if run.finished:
                write_best(run, losses, start, folder)
    run.conclude(lambda: fine_tuning_report.sft_closing(workdir, folder))
    return run.finished


def evaluate_traces(run: TrainingRun, traces: Traces, step: int) -> dict[str, float]:
    """The mean negative log-prob per token of the held-out responses; nothing where none are held out."""
    if not traces.held_out:
        return {}
    return {"eval/loss": mean_loss(run.trainer, run.state, traces.held_out, data_size(run.runtime.mesh))}


def mean_loss(trainer: Trainer, state: TrainState, rows: list[Row], shards: int) -> float:
    """Mean negative log-prob per response token."""
    weights, total, tokens = trainer.weights(state), 0.0, 0.0
    for batch in supervised_batches(rows, trainer.parallel, shards):
        (placed,) = trainer.put_batches([batch])
        metrics = trainer.measure(weights, placed)
        total, tokens = total + float(metrics["sum/nll"]), tokens + float(metrics["sum/tokens"])
    return total / tokens


def preview(run: TrainingRun, traces: Traces, step: int) -> None:
    """Answers the first sft.previews held-out prompts into samples.jsonl, and shows the first."""
    runtime = run.runtime
    rows = (traces.held_out or traces.train)[: runtime.settings.sft.previews]
    if not rows:
        return
    key, weights = jax.random.fold_in(runtime.key, PREVIEW), runtime.sampler_weights(run.state.policy)
    responses = [group[0] for group in runtime.sampler.generate(weights, [row.prompt for row in rows], key=key)]
    run.log.samples(fine_tuning_report.preview_rows(step, rows, responses, runtime.vocabulary))
    run.progress.write(fine_tuning_report.preview_lines(rows[0], responses[0], runtime.vocabulary))


def write_best(run: TrainingRun, losses: Mapping[int, float], start: Path | None, folder: Path) -> None:
    """The weights with the lowest held-out loss as a Hugging Face folder, and adapters alone as WORKDIR/adapter for
    PEFT."""
    run.save()
    run.checkpoints.wait()
    best = best_step(losses, [step for step in run.checkpoints.steps() if step])
    # The first process decides: only that one has surely seen the newest checkpoint take its name.
    best = int(multihost_utils.broadcast_one_to_all(np.int32(run.done if best is None else best)))
    if best != run.done:
        run.state = run.restored(best, run.state)
    settings, adapter = run.runtime.settings, run.workdir / "adapter"
    is_peft_base = settings.model.path and not settings.model.adapter and not adapter.exists()
    if run.state.policy.adapters is not None and is_peft_base:
        save_adapters(run.state.master, run.runtime.shape, adapter, base=settings.model.path)
    run.runtime.export(run.state.master, start, folder)  # last: this folder says that all is done


def negated_losses(workdir: Path) -> dict[int, float]:
    """For checkpoints, of which those with the highest score are kept."""
    return {step: -loss for step, loss in held_out_losses(workdir).items()}


def patience_is_over(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` evaluations were all no better than one before them; 0 waits for ever."""
    best = best_step(losses, list(losses)) or 0
    return patience > 0 and sum(step > best for step in losses) >= patience


def is_cold_start(workdir: Path) -> bool:
    """Whether the run in a workdir is one of fine-tuning, by what it recorded of its inputs."""
    return TRACES in read_inputs(workdir)
