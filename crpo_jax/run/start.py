"""The model a run starts from: the user's, or a cold start made once and kept in the workdir."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.config import InputError
from crpo_jax.model import hub
from crpo_jax.model.qwen2 import Qwen2
from crpo_jax.model.shape import Shape
from crpo_jax.parallel import processes
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.run import setup
from crpo_jax.run.coldstart import cold_start
from crpo_jax.run.progress import Progress


def wait_for_workdir(workdir: Path) -> None:
    """Returns when the process that writes has opened the workdir; InputError in one that does not see it."""
    processes.wait_for_all("the workdir is open")
    if not (workdir / "config.yaml").exists():
        raise InputError(f"--workdir {workdir}: expected a folder on a disk that all processes share, got one that only the first of them sees")


def start_folder(settings: config.Config, shape: Shape, mesh: Mesh, text: setup.Text, workdir: Path) -> Path:
    """model.path; where it is empty, `coldstart` in the workdir, made now if it is not there yet."""
    if settings.model.path:
        return hub.model_folder(settings.model.path)
    folder = workdir / "coldstart"
    if not folder.is_dir():
        fine_tuned(settings, shape, mesh, text, setup.fresh_model(settings, shape, mesh), folder)
    return folder


def fine_tuned(settings: config.Config, shape: Shape, mesh: Mesh, text: setup.Text, master: Qwen2, folder: Path) -> None:
    """Fine-tunes `master` on the teacher's traces and writes it to `folder` in Hugging Face format, float32."""
    traces = setup.teacher_traces(settings, text)
    dropped = f", {traces.dropped} longer than sft.max_tokens dropped" if traces.dropped else ""
    progress: Any = None

    def report(step: int, steps: int, metrics: dict[str, float]) -> None:
        nonlocal progress
        progress = progress or Progress(steps, speaks=jax.process_index() == 0)
        if step == 1:
            progress.keep(f"cold start: {len(traces.train)} teacher traces, {len(traces.held_out)} held out{dropped}; {steps} steps")
        told = f"cold start  loss {metrics['sft/loss']:.3f}"
        if "sft/held_out_loss" in metrics:
            progress.keep(f"step {step}/{steps}  {told}  held out {metrics['sft/held_out_loss']:.3f}")
        progress.show(step, told)

    master = cold_start(master, shape, mesh, settings, traces.train, traces.held_out, report)
    hub.save(master, shape, folder, dtype="float32", tokenizer_folder=str(text.folder), generation=None)


def load_masters(folder: Path, settings: config.Config, mesh: Mesh) -> Qwen2:
    """Float32 masters of a model folder in the layout's place."""
    return hub.load(str(folder), mesh, LAYOUTS[settings.parallel.layout].master)[1]
