"""A run's policy as a Hugging Face folder: `python -m crpo_jax.export --workdir DIR --out FOLDER`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from crpo_jax import config
from crpo_jax.config import InputError
from crpo_jax.model import hub
from crpo_jax.parallel import processes
from crpo_jax.parallel.mesh import make_mesh
from crpo_jax.run import setup
from crpo_jax.run.checkpoint import Checkpoints
from crpo_jax.update.step import trainer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = config.parser("export", __doc__ or "")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="a new or empty folder")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint after step N (default: the newest)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="type of the written weights (default bfloat16)")
    processes.add_flags(parser)
    args = parser.parse_args(arguments)
    if not args.workdir:
        raise InputError("--workdir: expected the folder of a run, got none")
    workdir = Path(args.workdir)
    if not (workdir / "config.yaml").is_file():
        raise InputError(f"--workdir {workdir}: expected a run's folder with config.yaml, got none there")
    with processes.joined("export", args):
        export(args, workdir)


def export(args: argparse.Namespace, workdir: Path) -> None:
    settings = config.from_arguments(args, workdir / "config.yaml")
    mesh = make_mesh(settings.parallel.mesh)
    settings, shape = setup.shape_for(settings, mesh)
    text = setup.text_for(settings, shape)
    with Checkpoints(workdir / "checkpoints", settings.run.keep) as checkpoints:
        step = checkpoints.chosen(args.step)
        run = trainer(shape, mesh, settings, settings.optimizer, 1, loss="crpo")
        state = checkpoints.restore(step, run.begin(setup.fresh_model(settings, shape, mesh)))
    hub.save(state.master, shape, args.out, dtype=args.dtype, tokenizer_folder=text.folder)
    print(f"the policy after step {step} of {workdir}, {args.dtype}: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    config.run_command("export", main)
