"""Cold start: fine-tuning on teacher traces, the loss on the response. `python -m crpo_jax.sft --help` lists its
settings."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from crpo_jax import cli
from crpo_jax.config import default_config_path
from crpo_jax.page.html import keep_page
from crpo_jax.parallel import processes
from crpo_jax.runtime import fine_tuning_report
from crpo_jax.runtime.faults import faults_end_in_one_line
from crpo_jax.runtime.fine_tuning import fine_tune
from crpo_jax.runtime.inputs import open_traces
from crpo_jax.runtime.runtime import open_runtime
from crpo_jax.runtime.same_inputs import require_same_workdir
from crpo_jax.store.workdir import has_folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.build_parser("sft", __doc__ or "", lambda model: default_config_path(jax.default_backend(), model))
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue a workdir that holds a run of another config or other traces",
    )
    processes.add_process_flags(parser)
    args = parser.parse_args(arguments)
    with processes.join_processes("sft", args), faults_end_in_one_line("crpo_jax.sft"):
        settings, name = cli.load_platform_settings(args, jax.default_backend())
        workdir = Path(args.workdir or f"runs/{name}-sft")
        folder = workdir / "coldstart"
        runtime = open_runtime(settings)
        require_same_workdir(workdir)
        if not has_folder(workdir, folder.name):
            fine_tune(runtime, workdir, folder, open_traces(runtime), allow_changes=args.allow_changes)
            if runtime.writes:
                keep_page(workdir, lambda line: print(line, file=sys.stderr))
        elif runtime.writes:
            print(
                f"{fine_tuning_report.sft_closing(workdir, folder)}\nthis run is finished, nothing to do",
                file=sys.stderr,
            )


if __name__ == "__main__":
    cli.run_command("sft", main)
