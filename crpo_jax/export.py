"""A run's model as a Hugging Face folder, or its LoRA adapter in PEFT's format: `python -m crpo_jax.export --workdir
DIR --out FOLDER`."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from crpo_jax import cli
from crpo_jax.config import Config
from crpo_jax.errors import InputError
from crpo_jax.model.huggingface import MAX_SHARD_BYTES, model_folder
from crpo_jax.model.peft import save_adapters
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel import processes
from crpo_jax.runtime.fine_tuning import is_cold_start
from crpo_jax.runtime.fine_tuning_report import best_step, held_out_losses
from crpo_jax.runtime.runtime import open_runtime
from crpo_jax.runtime.same_inputs import require_same_workdir
from crpo_jax.store.checkpoint import Checkpoints

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.build_parser("export", __doc__ or "")
    parser.add_argument(
        "--out", metavar="FOLDER", type=cli.path_of("--out"), required=True, help="a new or empty folder"
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="the checkpoint after step N (default: the newest; of a cold start the best)",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="type of the written weights (default bfloat16; of an adapter float32)",
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="a weight file's most, as 500MB or 5GB (default 5GB)"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with LoRA the adapter alone, for PEFT; without this it is merged",
    )
    processes.add_process_flags(parser)
    args = parser.parse_args(arguments)
    if not args.workdir:
        raise InputError("--workdir: expected the folder of a run, got none")
    workdir, shard_bytes = Path(args.workdir), size_of(args.max_shard_size)
    with processes.join_processes("export", args):
        require_same_workdir(workdir)
        if not (workdir / "config.yaml").is_file():
            raise InputError(f"--workdir {workdir}: expected a run's folder with config.yaml, got none there")
        settings = cli.load_settings(args, workdir / "config.yaml")
        step = export(
            settings,
            workdir,
            args.out,
            step=args.step,
            dtype=args.dtype,
            adapter_alone=args.adapter,
            max_shard_bytes=shard_bytes,
        )
    what = "adapter" if args.adapter else "model"
    print(f"the {what} after step {step} of {workdir}: {args.out}", file=sys.stderr)


def export(
    settings: Config,
    workdir: Path,
    folder: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    adapter_alone: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Writes a run's model, or its adapter alone, into a new or empty folder; the step that was exported.

    `step` is by default the newest checkpoint, of a cold start the best; `dtype` bfloat16, of an adapter float32.
    """
    runtime = open_runtime(settings)
    settings, fine_tuned = runtime.settings, is_cold_start(workdir)
    start = None if fine_tuned else workdir / "coldstart"
    if settings.model.path:
        start = model_folder(settings.model.path)
    trainer = runtime.trainer("supervised" if fine_tuned else "crpo", 1)
    state = trainer.abstract_state()
    if adapter_alone and isinstance(state.master, Transformer):
        raise InputError(f"--adapter: expected a run with LoRA, got {workdir}, which trained every parameter")
    if adapter_alone and (
        start is None or settings.model.adapter
    ):  # adapters belong to the weights they were trained on
        base = f"with model.adapter={settings.model.adapter} merged in" if start else "from random weights"
        raise InputError(
            f"--adapter: expected a run that started from a model folder, got {workdir}, which began {base}"
        )
    with Checkpoints(workdir / "checkpoints", settings.run.keep) as checkpoints:
        if step is None and fine_tuned:
            step = best_step(held_out_losses(workdir), [saved for saved in checkpoints.steps() if saved])
        step = checkpoints.select(step)
        trained = checkpoints.restore(step, state).master
    if adapter_alone:
        base = settings.model.path or str(start)
        save_adapters(trained, runtime.shape, folder, base=base, dtype=dtype or "float32")
    else:
        runtime.export(trained, start, folder, dtype=dtype or "bfloat16", max_shard_bytes=max_shard_bytes)
    return step


def size_of(text: str) -> int:
    """Bytes of 500MB or 5GB, in powers of ten as transformers counts them."""
    match = re.fullmatch(r"([1-9]\d{0,8})([KMG]B)", text.strip().upper())
    if not match:
        raise InputError(f"--max-shard-size: expected a size such as 500MB or 5GB, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


if __name__ == "__main__":
    cli.run_command("export", main)
