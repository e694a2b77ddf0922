"""Cold start: fine-tuning on teacher traces, the loss on the response. `python -m crpo_jax.sft --help` lists every setting."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from crpo_jax import cli
from crpo_jax.parallel import processes
from crpo_jax.parallel.mesh import make_mesh
from crpo_jax.runtime import fine_tuning, fine_tuning_report, setup
from crpo_jax.runtime.limits import one_line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.parser("sft", __doc__ or "")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on in a workdir that holds a run of another config or other traces",
    )
    processes.add_process_flags(parser)
    args = parser.parse_args(arguments)
    with processes.join_processes("sft", args), one_line("crpo_jax.sft"):
        fine_tune(args)


def fine_tune(args: argparse.Namespace) -> None:
    settings, name = cli.for_platform(args, jax.default_backend())
    workdir = Path(args.workdir or f"runs/{name}-sft")
    mesh = make_mesh(settings.parallel.mesh)
    settings, shape = setup.shape_for(settings, mesh)
    text = setup.text_for(settings, shape)
    folder = workdir / "coldstart"
    if not folder.is_dir():
        fine_tuning.fine_tune(settings, shape, mesh, text, workdir, folder, changes=args.allow_changes)
    elif jax.process_index() == 0:
        print(f"{fine_tuning_report.closing(workdir, folder)}\nfinished before, nothing to do", file=sys.stderr)


if __name__ == "__main__":
    cli.run_command("sft", main)
