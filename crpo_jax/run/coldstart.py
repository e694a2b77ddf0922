"""The cold start: supervised fine-tuning on teacher traces, the loss on the response alone (paper section 4.3)."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.data.loader import Batches
from crpo_jax.model.qwen2 import Qwen2
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.mesh import data_size
from crpo_jax.update.batches import Row, micro_batches, of_rows
from crpo_jax.update.losses import row_weights
from crpo_jax.update.step import Trainer, on_devices, trainer


def cold_start(
    master: Qwen2,
    shape: Shape,
    mesh: Mesh,
    settings: config.Config,
    traces: Sequence[Row],
    held_out: Sequence[Row],
    report: Callable[[int, int, dict[str, float]], None],
) -> Qwen2:
    """The float32 masters after sft.steps (or sft.epochs) of fine-tuning; `master` is used up.

    `report(step, steps, metrics)` is called after every optimizer step with `sft/loss`, the mean per token, and where an
    epoch ends with `sft/held_out_loss`.
    """
    sft = settings.sft
    batches = Batches(traces, min(sft.batch_size, len(traces)), settings.run.seed)
    steps = sft.steps or batches.steps(sft.epochs)
    epoch = max(1, math.ceil(len(traces) / batches.prompts_per_step))
    run = trainer(shape, mesh, settings, sft.optimizer, steps, loss="supervised")
    state = run.begin(master)
    for step in range(steps):
        rows = [row for _, row in batches.batch(step)]
        gradients, totals = run.zero()
        weights = run.compute_weights(state.master)
        for batch in _batches(rows, settings, mesh):
            gradients, totals = run.accumulate(gradients, totals, weights, batch)
        del weights  # old and new ones never stand side by side
        state, norm, _ = run.apply(state, gradients)
        del gradients
        metrics = {"sft/loss": float(totals["sum/nll"] / totals["sum/tokens"]), "sft/gradient_norm": float(norm)}
        if held_out and ((step + 1) % epoch == 0 or step + 1 == steps):
            metrics["sft/held_out_loss"] = mean_loss(run, run.compute_weights(state.master), held_out, settings, mesh)
        report(step + 1, steps, metrics)
    return state.master


def mean_loss(run: Trainer, weights: Qwen2, rows: Sequence[Row], settings: config.Config, mesh: Mesh) -> float:
    """Mean negative log-prob per response token."""
    total = tokens = 0.0
    for batch in _batches(rows, settings, mesh):
        measured = run.evaluate(weights, batch)
        total, tokens = total + float(measured["sum/nll"]), tokens + float(measured["sum/tokens"])
    return total / tokens


def _batches(rows: Sequence[Row], settings: config.Config, mesh: Mesh):
    lengths = np.array([len(row.response) for row in rows])
    budget = settings.parallel.micro_batch_tokens
    weights = row_weights(lengths, np.ones(len(rows), bool), "token_mean")
    for micro in micro_batches(rows, budget=budget, multiple=settings.parallel.length_multiple, shards=data_size(mesh)):
        yield on_devices(micro, mesh, weights=of_rows(weights, micro.rows))
