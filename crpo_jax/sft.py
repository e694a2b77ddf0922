"""Cold start: fine-tuning on teacher traces, the loss on the response. `python -m crpo_jax.sft --help` lists every setting."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from crpo_jax import config
from crpo_jax.config import InputError
from crpo_jax.model import hub
from crpo_jax.parallel import processes
from crpo_jax.parallel.mesh import make_mesh
from crpo_jax.run import setup, start
from crpo_jax.run.workdir import open_workdir


def main(arguments: Sequence[str] | None = None) -> None:
    parser = config.parser("sft", __doc__ or "")
    processes.add_flags(parser)
    args = parser.parse_args(arguments)
    with processes.joined("sft", args):
        fine_tune(args)


def fine_tune(args: argparse.Namespace) -> None:
    settings, name = config.for_platform(args, jax.default_backend())
    workdir = Path(args.workdir or f"runs/{name}-sft")
    mesh = make_mesh(settings.parallel.mesh)
    settings, shape = setup.shape_for(settings, mesh)
    text = setup.text_for(settings, shape)
    folder = workdir / "coldstart"
    if folder.exists():
        raise InputError(f"--workdir {workdir}: expected no fine-tuned model there yet, got {folder}")
    writer = jax.process_index() == 0
    with open_workdir(workdir, settings, writes=writer):
        start.wait_for_workdir(workdir)
        if settings.model.path:
            master = start.load_masters(hub.model_folder(settings.model.path), settings, mesh)
        else:
            master = setup.fresh_model(settings, shape, mesh)
        start.fine_tuned(settings, shape, mesh, text, master, folder)
    if writer:
        print(f"fine-tuned model: {folder}  (crpo_jax.train takes it as model.path={folder})", file=sys.stderr)


if __name__ == "__main__":
    config.run_command("sft", main)
