"""A skipped mini-batch examined: `python -m crpo_jax.train --workdir DIR --replay STEP` trains nothing and writes
nothing."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import optax

from crpo_jax.config import Config
from crpo_jax.errors import InputError
from crpo_jax.model.huggingface import model_folder
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.mesh import fetch
from crpo_jax.runtime.fine_tuning import is_cold_start
from crpo_jax.runtime.limits import not_finite
from crpo_jax.runtime.runtime import Vocabulary, open_runtime
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.store.skipped import load_batches, skipped_paths, skipped_steps
from crpo_jax.update.losses import Batch


def replay(settings: Config, workdir: Path, step: int) -> str:
    """What a step's skipped mini-batches give with the nearest checkpoint before it: loss, gradient norm, and which
    tensors and rows are not finite."""
    paths = skipped_paths(workdir, step)
    if not paths:
        steps = skipped_steps(workdir) or "none there"
        raise InputError(f"--replay {step}: expected a step whose batch is in {workdir / 'skipped'}, got {steps}")
    mini_batches: list[list[Any]] = [[Batch(**cast(Any, arrays)) for arrays in load_batches(path)] for path in paths]
    if is_cold_start(workdir) or any(batch.advantages is None for batches in mini_batches for batch in batches):
        raise InputError(f"--replay {step}: expected a batch of a CRPO run in {workdir}, got one of fine-tuning")
    runtime = open_runtime(settings)
    trainer = runtime.trainer("crpo", 1)
    start = model_folder(settings.model.path) if settings.model.path else workdir / "coldstart"
    state = runtime.start_state(trainer, start)
    if isinstance(state.master, Transformer):
        state = state._replace(frozen=None)  # the batches hold the reference's log-probs
    with Checkpoints(workdir / "checkpoints", settings.run.keep) as checkpoints:
        before = [saved for saved in checkpoints.steps() if saved <= step]
        if before:
            saved = checkpoints.restore(checkpoints.select(before[-1]), state._replace(frozen=None))
            state = saved._replace(frozen=state.frozen)
    lines = [f"step {step} with the policy after step {before[-1] if before else 0}"]
    weights = trainer.weights(state)
    for path, host_batches in zip(paths, mini_batches, strict=True):
        batches = trainer.put_batches(host_batches)
        gradients, metrics = trainer.gradients(state, batches)
        norm, tensors = float(optax.tree.norm(gradients)), ", ".join(not_finite(gradients, metrics)) or "nothing"
        loss = float(metrics["sum/loss"])
        lines.append(f"{path.name}: loss {loss:.6g}, gradient norm {norm:.6g}, not finite: {tensors}")
        for host, batch in zip(host_batches, batches, strict=True):
            lines += describe_rows(host, fetch(trainer.logprobs(weights, batch)), runtime.vocabulary)
    return "\n".join(lines)


def describe_rows(batch: Any, policy: np.ndarray, vocabulary: Vocabulary) -> list[str]:
    """A line for each row whose response has a value that is not finite: log-probs, or the advantage."""
    lines = []
    for row, length in enumerate(batch.lengths):
        logprobs = {"sampler": batch.sampler, "reference": batch.reference, "old": batch.old, "policy": policy}
        values = {name: x[row, :length] for name, x in logprobs.items() if x is not None}
        values |= {"advantage": batch.advantages[row], "weight": batch.weights[row]}
        odd = [name for name, value in values.items() if not np.isfinite(value).all()]
        if odd:
            response = str(vocabulary.tokenizer.decode(batch.tokens[row, :length].tolist()))
            lines.append(f"  row of {length} tokens, {' and '.join(odd)} not finite: {response[:100]!r}")
    return lines
