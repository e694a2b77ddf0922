"""A run's numbers held to limits, in words: what a measure beyond its limit means, and what to try."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crpo_jax.config import Config
from crpo_jax.errors import Fault
from crpo_jax.parallel.mesh import fetch
from crpo_jax.store.skipped import save_batches, skipped_path
from crpo_jax.update.losses import Batch
from crpo_jax.update.trainer import Trainer, TrainState, Update


class LimitWatch:
    """Watches a run's measures against `run.limits`: warns where one is beyond its limit, or ends the run, by
    settings."""

    def __init__(self, settings: Config, workdir: Path, say: Callable[[str], None], section: str) -> None:
        self._settings, self._workdir, self._say, self._section = settings, workdir, say, section
        self._beyond: Counter[str] = Counter()
        self._skipped = 0

    def check_updates(
        self,
        step: int,
        updates: Sequence[Update],
        mini_batches: Sequence[Sequence[Batch]],
        trainer: Trainer,
        state: TrainState,
    ) -> None:
        """Saves the mini-batches whose loss or gradient was not finite (the update was not applied) and names the
        tensors.

        Fault after run.limits.skipped of them in a row.
        """
        limit = self._settings.run.limits.skipped
        for number, update in enumerate(updates):
            self._skipped = 0 if update.applied else self._skipped + 1
            if update.applied:
                continue
            path = skipped_path(self._workdir, step, number)
            batches = [batch._asdict() for batch in fetch(list(mini_batches[number]))]
            arrays = [{name: values for name, values in batch.items() if values is not None} for batch in batches]
            if jax.process_index() == 0:
                save_batches(path, arrays)
            tensors = ", ".join(not_finite(*trainer.gradients(state, mini_batches[number]))) or "finite when repeated"
            problem = f"step {step}, mini-batch {number}: loss or gradient not finite, update not applied ({tensors})"
            replay = f"; --replay {step} shows the batch" if self._section == "crpo" else ""
            self._say(f"{problem}; the batch is kept in {path}{replay}")
            if self._skipped == limit:
                optimizer = "optimizer" if self._section == "crpo" else "sft.optimizer"
                raise Fault(
                    f"{problem}. It was the last of {limit} in a row (run.limits.skipped). Try a smaller "
                    f"{optimizer}.learning_rate or {optimizer}.clip_norm, or model.dtype=float32, with "
                    f"--allow-changes{replay}"
                )

    def check_measures(self, step: int, measures: Mapping[str, float]) -> None:
        """Warns at the 1st, 10th, 100th ... step in a row beyond a limit; Fault after run.limits.patience steps in a
        row where run.limits.action is stop."""
        settings = self._settings.run.limits
        for name, (is_beyond, advice) in self._advice().items():
            if name not in measures:
                continue
            value = measures[name]
            self._beyond[name] = self._beyond[name] + 1 if is_beyond(value) else 0
            count = self._beyond[name]
            if not count:
                continue
            line = f"step {step}: {name} is {value:.3g}{f', for {count} steps in a row' if count > 1 else ''}: {advice}"
            if settings.action == "stop" and count >= settings.patience:
                raise Fault(f"{line} (run.limits.action=stop)")
            if re.fullmatch("10*", str(count)):
                self._say(f"warning: {line}")

    def _advice(self) -> dict[str, tuple[Callable[[float], bool], str]]:
        """By measure: what is beyond its limit, what that means and what to try."""
        s, limits = self._settings, self._settings.run.limits
        return {
            "kl/mean": (
                lambda kl: 0 < limits.kl < kl,
                f"nats a token from the start model, over run.limits.kl={limits.kl:g}. The policy is drifting away "
                "from its start, and reward gained there is often gamed. Look at samples.jsonl; try a smaller "
                f"optimizer.learning_rate or a larger crpo.kl_coef than {s.crpo.kl_coef:g}",
            ),
            "policy/entropy": (
                lambda entropy: entropy < limits.entropy,
                f"nats a token, under run.limits.entropy={limits.entropy:g}. The policy says nearly the same in every "
                "draw, so a group's responses no longer differ and nothing is learned from them. Try "
                f"crpo.entropy_coef above {s.crpo.entropy_coef:g}, crpo.clip_high above {s.crpo.clip_high:g}, "
                "or an earlier checkpoint",
            ),
            "reward/zero_variance_groups": (
                lambda share: 0 < limits.zero_variance <= share,
                "of the groups have responses that all earn the same reward: no advantage, no policy gradient, only "
                "KL. The questions are too easy or too hard for the model, or the reward does not tell responses "
                "apart. Look at why in samples.jsonl; try other questions, "
                f"crpo.group_size above {s.crpo.group_size}, or a cold start",
            ),
            "response/truncated": (
                lambda share: 0 < limits.truncated <= share,
                f"of the responses were cut at rollout.max_new_tokens={s.rollout.max_new_tokens}, and a response "
                "without an end has no answer. Try more tokens; check that rollout.stop is what the model ends with; "
                "teach it to end by a cold start",
            ),
        }


def not_finite(gradients: Any, totals: Mapping[str, Any]) -> list[str]:
    """The tensors whose gradients are not finite, and `loss` where it is not."""
    finite = jax.device_get(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), gradients))
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, is_finite in jax.tree_util.tree_leaves_with_path(finite)
        if not is_finite
    ]
    return ([] if np.isfinite(totals["sum/loss"]) else ["loss"]) + [name.removesuffix(".value") for name in names]
