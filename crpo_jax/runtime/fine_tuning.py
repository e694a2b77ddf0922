"""The cold start: supervised fine-tuning on teacher traces, the loss on the response alone (paper section 4.3)."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from crpo_jax.config import Config
from crpo_jax.data.batches import Batches
from crpo_jax.errors import Fault
from crpo_jax.model import huggingface, lora, peft
from crpo_jax.model.lora import Adapted
from crpo_jax.model.placement import to_sampling
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Qwen2
from crpo_jax.parallel.mesh import data_size
from crpo_jax.runtime import fine_tuning_report, report, setup, start
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.signals import Stop
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.store.logs import Log
from crpo_jax.store.workdir import check_inputs, open_workdir
from crpo_jax.update.batches import Row, micro_batches, of_rows
from crpo_jax.update.losses import row_weights
from crpo_jax.update.trainer import Batch, Trainer, on_devices, trainer

TRACES = "teacher traces"
PREVIEW = 2**31 - 1
"""Stands for the step in the keys of previews: all of them draw the same random numbers."""


def start_folder(
    settings: Config, shape: Shape, mesh: Mesh, text: setup.Text, workdir: Path, *, changes: bool = False
) -> Path | None:
    """model.path; where it is empty, `coldstart` in the workdir, made now if it is not there yet by a run that lives in `sft`
    beside it. None where that run was asked to stop."""
    if settings.model.path:
        return huggingface.model_folder(settings.model.path)
    folder = workdir / "coldstart"
    return (
        folder
        if folder.is_dir() or fine_tune(settings, shape, mesh, text, workdir / "sft", folder, changes=changes)
        else None
    )


def fine_tune(
    settings: Config, shape: Shape, mesh: Mesh, text: setup.Text, workdir: Path, folder: Path, *, changes: bool = False
) -> bool:
    """Fine-tunes the start model on the teacher's traces, or resumes the run in `workdir`; True once the weights with the
    lowest held-out loss stand in `folder`, in Hugging Face format and float32, and False where it was asked to stop."""
    sft, seed, writer = settings.sft, jax.random.key(settings.run.seed), jax.process_index() == 0

    # ---- what the run starts from ----------------------------------------------------------------------------------
    traces = setup.teacher_traces(settings, text)
    origin = huggingface.model_folder(settings.model.path) if settings.model.path else None
    batches = Batches(traces.train, min(sft.batch_size, len(traces.train)), settings.run.seed)
    steps, epoch = sft.steps or batches.steps(sft.epochs), batches.steps(1)
    previewed = (traces.held_out or traces.train)[: sft.previews]
    held = open_workdir(workdir, settings, writer=writer, allow_changes=changes)
    start.wait_for_workdir(workdir)
    digests = {TRACES: digest(traces)} | setup.model_digests(settings, text, origin)
    check_inputs(workdir, digests, writer=writer, allow_changes=changes)

    # ---- programs and state ----------------------------------------------------------------------------------------
    run = trainer(shape, mesh, settings, sft.optimizer, steps, loss="supervised", adapters=sft.lora)
    engine, gather = setup.sampler(settings, shape, mesh, text), to_sampling(shape, mesh, settings.model.dtype)
    trained, frozen = start.trainee(origin, settings, shape, mesh, sft.lora)
    state = run.begin(trained)
    checkpoints = Checkpoints(workdir / "checkpoints", settings.run.keep, 1, lower_is_better)
    done, logged = checkpoints.find_resume_point()
    if done:
        state = checkpoints.restore(done, state)
    log, progress, stop = Log(workdir, done, logged, writer=writer), Progress(steps, done, speaks=writer), Stop()
    losses = {step: loss for step, loss in fine_tuning_report.held_out_losses(workdir).items() if step < done}
    progress.keep(fine_tuning_report.opening(settings, shape, mesh, (done, steps, epoch), traces, origin, workdir))

    finished, skipped = False, 0
    with stop, held, log, checkpoints:
        for step in range(done, steps + 1):
            if stop.requested:
                break
            # ---- evaluate: the model after `step` steps ------------------------------------------------------------
            measured: dict[str, float] = {"sft/epoch": step / epoch}
            if step % epoch == 0 or step == steps:
                policy = lora.policy(state.master, frozen)
                if traces.held_out:
                    measured["eval/loss"] = mean_loss(run, run.compute_weights(policy), traces.held_out, settings, mesh)
                    losses |= {step: measured["eval/loss"]} if math.isfinite(measured["eval/loss"]) else {}
                progress.keep(f"step {step}/{steps}  {fine_tuning_report.line(measured)}")
                if previewed:
                    prompts, key = [row.prompt for row in previewed], jax.random.fold_in(seed, PREVIEW)
                    responses = [one for (one,) in engine.generate(gather(policy), prompts, key=key)]
                    log.samples(fine_tuning_report.preview_rows(step, previewed, responses, text))
                    progress.keep(fine_tuning_report.preview(previewed[0], responses[0], text))
                finished = step == steps or patience_is_over(losses, sft.patience)
            if finished:
                log.step(step, measured)
                break

            # ---- one optimizer step --------------------------------------------------------------------------------
            began = time.perf_counter()
            rows = batches.batch(step)
            gradients, totals = run.zero()
            weights = run.compute_weights(lora.policy(state.master, frozen))
            for batch in on_mesh(rows, settings, mesh):
                gradients, totals = run.accumulate(gradients, totals, weights, batch)
            del weights  # old and new ones never stand side by side
            state, norm, applied = run.apply(state, gradients)
            del gradients
            measured |= {
                "loss/total": float(totals["sum/nll"] / totals["sum/tokens"]),
                "policy/gradient_norm": float(norm),
            }
            measured |= {"policy/skipped_updates": 1 - float(applied), "time/step": time.perf_counter() - began}
            measured["time/tokens_per_second"] = (
                sum(len(row.prompt) + len(row.response) for row in rows) / measured["time/step"]
            )

            # ---- keep ----------------------------------------------------------------------------------------------
            log.step(step, measured)
            progress.show(step + 1, fine_tuning_report.line(measured))
            skipped = 0 if applied else skipped + 1
            if skipped and skipped == settings.run.limits.skipped:
                raise Fault(
                    f"step {step}: loss or gradient not finite, the last of {skipped} updates in a row that were not applied "
                    "(run.limits.skipped). Try a smaller sft.optimizer.learning_rate, or model.dtype=float32"
                )
            done = step + 1
            if done == steps or done % epoch == 0 or (sft.save_every and done % sft.save_every == 0):
                checkpoints.save(done, state)
            checkpoints.raise_failure()
        checkpoints.save(done, state)

        # ---- the best of the evaluated weights, for everybody ----------------------------------------------------------
        if finished:
            checkpoints.wait()
            best = fine_tuning_report.best_of(losses, [step for step in checkpoints.steps() if step])
            # The first process decides: only that one has surely seen the newest checkpoint take its name.
            best = int(multihost_utils.broadcast_one_to_all(np.int32(done if best is None else best)))
            state = checkpoints.restore(best, state) if best != done else state
            alone = workdir / "adapter"
            if start.adapter_fits_a_folder(settings, sft.lora) and not alone.exists():
                peft.save(state.master, shape, alone, base=settings.model.path)
            start.write(
                state.master, origin, settings, shape, mesh, folder, text.folder
            )  # last: this folder says that all is done
    if writer:
        progress.keep(fine_tuning_report.closing(workdir, folder) if finished else report.stopped(done, steps))
    return finished


def mean_loss(run: Trainer, weights: Qwen2 | Adapted, rows: Sequence[Row], settings: Config, mesh: Mesh) -> float:
    """Mean negative log-prob per response token."""
    total = tokens = 0.0
    for batch in on_mesh(rows, settings, mesh):
        measured = run.evaluate(weights, batch)
        total, tokens = total + float(measured["sum/nll"]), tokens + float(measured["sum/tokens"])
    return total / tokens


def on_mesh(rows: Sequence[Row], settings: Config, mesh: Mesh) -> Iterator[Batch]:
    """All rows in micro-batches of near lengths; together their loss is the mean over all response tokens."""
    lengths = np.array([len(row.response) for row in rows])
    budget = settings.parallel.micro_batch_tokens
    weights = row_weights(lengths, np.ones(len(rows), bool), "token_mean")
    for micro in micro_batches(rows, budget=budget, multiple=settings.parallel.length_multiple, shards=data_size(mesh)):
        yield on_devices(micro, mesh, weights=of_rows(weights, micro.rows))


def lower_is_better(workdir: Path) -> dict[int, float]:
    return {step: -loss for step, loss in fine_tuning_report.held_out_losses(workdir).items()}


def patience_is_over(losses: Mapping[int, float], patience: int) -> bool:
    """Whether the last `patience` evaluations were all no better than one before them; 0 waits for ever."""
    best = fine_tuning_report.best_of(losses, list(losses)) or 0
    return patience > 0 and sum(step > best for step in losses) >= patience


def is_cold_start(workdir: Path) -> bool:
    """Whether the run in a workdir is one of fine-tuning, by what it says of its inputs."""
    path = workdir / "inputs.json"
    return path.is_file() and TRACES in json.loads(path.read_text(encoding="utf-8"))


def digest(traces: setup.Traces) -> str:
    """SHA-256 of the token rows, those held out apart."""
    return hashlib.sha256(json.dumps([traces.train, traces.held_out]).encode()).hexdigest()
