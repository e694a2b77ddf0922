"""A kept mini-batch looked at again: `python -m crpo_jax.train --workdir DIR --replay STEP` trains nothing and writes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import optax

from crpo_jax.config import Config
from crpo_jax.errors import InputError
from crpo_jax.model import huggingface, lora
from crpo_jax.parallel.layout import ROWS_B, TOKENS_BT
from crpo_jax.parallel.mesh import fetch, make_mesh, put
from crpo_jax.runtime import limits, setup, start
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.update.trainer import trainer


def replay(settings: Config, workdir: Path, step: int) -> str:
    """What the mini-batches kept of a step give with the checkpoint nearest before it: loss, gradient norm, which tensors and rows are at fault."""
    paths = limits.kept_at(workdir, step)
    if not paths:
        there = sorted({int(path.stem.split("_")[1]) for path in (workdir / "skipped").glob("step_*.npz")})
        raise InputError(
            f"--replay {step}: expected a step whose batch was kept in {workdir / 'skipped'}, got {there or 'none there'}"
        )
    minis = [limits.load(path) for path in paths]
    mesh = make_mesh(settings.parallel.mesh)
    settings, shape = setup.shape_for(settings, mesh)
    text = setup.text_for(settings, shape)
    run = trainer(shape, mesh, settings, settings.optimizer, 1, loss="crpo", adapters=settings.lora)
    folder = huggingface.model_folder(settings.model.path) if settings.model.path else workdir / "coldstart"
    masters, frozen = start.trainee(folder, settings, shape, mesh, settings.lora)
    state = run.begin(masters)
    with Checkpoints(workdir / "checkpoints", settings.run.keep) as checkpoints:
        before = [saved for saved in checkpoints.steps() if saved <= step]
        if before:
            state = checkpoints.restore(checkpoints.select(before[-1]), state)
    lines = [f"step {step} with the policy after step {before[-1] if before else 0}"]
    weights = run.compute_weights(lora.policy(state.master, frozen))
    for path, mini in zip(paths, minis, strict=True):
        batches = [
            {name: put(value, mesh, TOKENS_BT if value.ndim == 2 else ROWS_B) for name, value in micro.items()}
            for micro in mini
        ]
        gradients, totals = limits.repeated(run, state, frozen, batches)
        norm, tensors = float(optax.tree.norm(gradients)), limits.not_finite(gradients, totals)
        lines.append(
            f"{path.name}: loss {float(totals['sum/loss']):.6g}, gradient norm {norm:.6g}, not finite: {', '.join(tensors) or 'nothing'}"
        )
        for micro, batch in zip(mini, batches, strict=True):
            lines += odd_rows(micro, fetch(run.logprobs(weights, batch)), text)
    return "\n".join(lines)


def odd_rows(micro: dict[str, np.ndarray], now: np.ndarray, text: setup.Text) -> list[str]:
    """A line for each row that has a value in its response that is not finite: log-probs now and then, or the advantage."""
    found = []
    for row, (first, end) in enumerate(zip(micro["prompt_lengths"], micro["lengths"], strict=True)):
        values: dict[str, Any] = {
            name: micro[name][row, first - 1 : end - 1] for name in ("sampler", "reference", "old") if name in micro
        }
        values |= {
            "policy": now[row, first - 1 : end - 1],
            "advantage": micro["advantages"][row],
            "weight": micro["weights"][row],
        }
        odd = [name for name, value in values.items() if not np.isfinite(value).all()]
        if odd:
            response = str(text.tokenizer.decode(micro["tokens"][row, first:end].tolist()))
            found.append(f"  row of {end - first} tokens, {' and '.join(odd)} not finite: {response[:100]!r}")
    return found
