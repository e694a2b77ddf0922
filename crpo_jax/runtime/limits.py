"""What may go wrong in a run's numbers and on its devices, in words: what it means, and what to try."""

import contextlib
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crpo_jax.config import Config
from crpo_jax.errors import Fault, InputError
from crpo_jax.model import lora
from crpo_jax.parallel.mesh import fetch
from crpo_jax.store.files import writing
from crpo_jax.update.trainer import Batch, Trainer, TrainState

Update = tuple[dict[str, Any], Any, Any]
"""Accumulated metrics, gradient norm and applied flag of one optimizer step, on the host."""


class Guard:
    """Watches a run's measures: a warning where one leaves its limits (`run.limits`), or the run's end, by settings."""

    def __init__(self, settings: Config, workdir: Path, tell: Callable[[str], None]) -> None:
        self._settings, self._workdir, self._tell = settings, workdir, tell
        self._beyond: Counter[str] = Counter()
        self._skipped = 0

    def updates(
        self,
        step: int,
        updates: Sequence[Update],
        minis: Sequence[Sequence[Batch]],
        run: Trainer,
        state: TrainState,
        frozen: Any,
    ) -> None:
        """Keeps the mini-batches of a step whose loss or gradient was not finite (the update was not applied) and says which tensors.

        Fault after run.limits.skipped of them in a row.
        """
        limit = self._settings.run.limits.skipped
        for number, (_, _, applied) in enumerate(updates):
            self._skipped = 0 if applied else self._skipped + 1
            if applied:
                continue
            kept = keep(self._workdir, step, number, minis[number])
            tensors = not_finite(*repeated(run, state, frozen, minis[number]))
            what = f"step {step}, mini-batch {number}: loss or gradient not finite, update not applied ({', '.join(tensors) or 'finite when repeated'})"
            self._tell(f"{what}; kept in {kept}, to be looked at with --replay {step}")
            if self._skipped == limit:
                raise Fault(
                    f"{what}. It was the last of {limit} in a row (run.limits.skipped). Try a smaller optimizer.learning_rate or "
                    f"optimizer.clip_norm, or model.dtype=float32, with --allow-changes; --replay {step} shows the batch"
                )

    def measures(self, step: int, measured: Mapping[str, float]) -> None:
        """Warns at the first step beyond a limit and then ever more rarely; Fault after run.limits.patience steps in a row, if so set."""
        limits = self._settings.run.limits
        for name, (value, wrong, advice) in self._limits(measured).items():
            self._beyond[name] = self._beyond[name] + 1 if wrong else 0
            if not wrong:
                continue
            count = self._beyond[name]
            line = f"step {step}: {name} is {value:.3g}{f', for {count} steps in a row' if count > 1 else ''}: {advice}"
            if limits.action == "stop" and count >= limits.patience:
                raise Fault(f"{line} (run.limits.action=stop)")
            if re.fullmatch("10*", str(count)):
                self._tell(f"warning: {line}")

    def _limits(self, measured: Mapping[str, float]) -> dict[str, tuple[float, bool, str]]:
        """Each watched measure: its value, whether it is beyond its limit, and what that means."""
        s, limits = self._settings, self._settings.run.limits
        kl, entropy = measured["kl/mean"], measured["policy/entropy"]
        equal, cut = measured["reward/zero_variance_groups"], measured["response/truncated"]
        return {
            "kl/mean": (
                kl,
                0 < limits.kl < kl,
                f"nats a token from the start model, over run.limits.kl={limits.kl:g}. The policy is running away from what it began as, and "
                "reward gained there is often gamed. Look at samples.jsonl; try a smaller optimizer.learning_rate or a larger "
                f"crpo.kl_coef than {s.crpo.kl_coef:g}",
            ),
            "policy/entropy": (
                entropy,
                entropy < limits.entropy,
                f"nats a token, under run.limits.entropy={limits.entropy:g}. The policy says nearly the same in every draw, so the responses of "
                "a group no longer differ and nothing is learnt from them. Try crpo.entropy_coef above "
                f"{s.crpo.entropy_coef:g}, crpo.clip_high above {s.crpo.clip_high:g}, or an earlier checkpoint",
            ),
            "reward/zero_variance_groups": (
                equal,
                0 < limits.zero_variance <= equal,
                "of the groups have responses that all earn the same reward: no advantage, no policy gradient, only KL. The questions are too "
                "easy or too hard for the model, or the reward never tells responses apart. Look at why in samples.jsonl; try other questions, "
                f"crpo.group_size above {s.crpo.group_size}, or a cold start",
            ),
            "response/truncated": (
                cut,
                0 < limits.truncated <= cut,
                f"of the responses were cut at rollout.max_new_tokens={s.rollout.max_new_tokens} before they ended, and what has no end has no "
                f"answer. Try more tokens; see whether rollout.stop={list(s.rollout.stop)} is what the model ends with; teach it by a cold start",
            ),
        }


def repeated(run: Trainer, state: TrainState, frozen: Any, mini: Sequence[Batch]) -> tuple[Any, dict[str, Any]]:
    """The gradients and summed metrics of a mini-batch at this state."""
    weights, (gradients, totals) = run.compute_weights(lora.policy(state.master, frozen)), run.zero()
    for batch in mini:
        gradients, totals = run.accumulate(gradients, totals, weights, batch, state.kl_coef)
    return gradients, totals


def not_finite(gradients: Any, totals: Mapping[str, Any]) -> list[str]:
    """The tensors whose gradients are not finite, and `loss` where it is not."""
    finite = jax.device_get(jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), gradients))
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, one in jax.tree_util.tree_leaves_with_path(finite)
        if not one
    ]
    return ([] if np.isfinite(totals["sum/loss"]) else ["loss"]) + [name.removesuffix(".value") for name in names]


# ---- batches kept, and looked at again -------------------------------------------------------------------------------


def kept_at(workdir: Path, step: int) -> list[Path]:
    """The kept mini-batches of a step, in order."""
    return sorted((workdir / "skipped").glob(f"step_{step:06d}_mini_*.npz"))


def keep(workdir: Path, step: int, number: int, mini: Sequence[Batch]) -> Path:
    """A mini-batch on the disk: every array of its micro-batches, named `micro/array`."""
    path = workdir / "skipped" / f"step_{step:06d}_mini_{number:03d}.npz"
    arrays = {
        f"{micro}/{name}": value for micro, batch in enumerate(fetch(list(mini))) for name, value in batch.items()
    }
    if jax.process_index() == 0:
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            with unfinished.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            unfinished.replace(path)
    return path


def load(path: Path) -> list[dict[str, np.ndarray]]:
    """The micro-batches that `keep` wrote; never a pickle."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            micros: dict[int, dict[str, np.ndarray]] = {}
            for name in arrays.files:
                micro, array = name.split("/")
                micros.setdefault(int(micro), {})[array] = arrays[name]
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path}: expected a mini-batch kept by a run, got: {' '.join(str(error).split())[:200]}"
        ) from None
    return [micros[number] for number in sorted(micros)]


# ---- memory ----------------------------------------------------------------------------------------------------------

KNOBS = {
    "rollout": ("sampling", "rollout.slots smaller, or a mesh with more model shards"),
    "huggingface": ("loading the model", "parallel.layout=fsdp, or a mesh with more devices"),
    "checkpoint": ("restoring a checkpoint", "parallel.layout=fsdp, or a mesh with more devices"),
    "": (
        "the update",
        "parallel.micro_batch_tokens or parallel.logprob_chunk smaller, parallel.remat=true, parallel.layout=fsdp, or a mesh with more devices",
    ),
}


@contextlib.contextmanager
def one_line(command: str) -> Iterator[None]:
    """What ends a command through no fault of its input, and a device's refusal of memory, as one line and exit code 1."""
    try:
        yield
    except Fault as fault:
        raise SystemExit(f"{command}: stopped: {fault}") from None
    except jax.errors.JaxRuntimeError as error:
        fault = out_of_memory(error)
        if not fault:
            raise
        raise SystemExit(f"{command}: stopped: {fault}") from None


def out_of_memory(error: BaseException) -> Fault | None:
    """A device's refusal of memory in words: which part of the run, how much it asked for, which settings to turn; None for other errors."""
    said = str(error)
    if "RESOURCE_EXHAUSTED" not in said and "Out of memory" not in said:
        return None
    files, trace = [], error.__traceback__
    while trace:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    places = {name for file in map(Path, files) if "crpo_jax" in file.parts for name in (file.parent.name, file.stem)}
    phase, knobs = next(words for place, words in KNOBS.items() if place in places or not place)
    asked = re.search(r"allocat\w* (?:of )?([\d.,]+ ?(?:bytes|[KMGT]i?B))", said)
    operators = re.findall(r"op_name=\"([^\"]+)\"", said)
    buffer = f", the largest buffer made by {operators[0]}" if operators else ""
    how_much = f" (asked for {asked[1].rstrip('.')}{buffer})" if asked else buffer
    return Fault(f"out of device memory while {phase}{how_much}: try {knobs}")
