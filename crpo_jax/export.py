"""A run's model as a Hugging Face folder, or its LoRA adapter in PEFT's format: `python -m crpo_jax.export --workdir DIR --out FOLDER`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from crpo_jax import cli
from crpo_jax.errors import InputError
from crpo_jax.model import huggingface, lora, peft
from crpo_jax.model.transformer import abstract
from crpo_jax.parallel import processes
from crpo_jax.parallel.mesh import make_mesh
from crpo_jax.runtime import fine_tuning, fine_tuning_report, setup, start
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.update.trainer import trainer

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.parser("export", __doc__ or "")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="a new or empty folder")
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
    processes.add_flags(parser)
    args = parser.parse_args(arguments)
    if not args.workdir:
        raise InputError("--workdir: expected the folder of a run, got none")
    workdir, shard_bytes = Path(args.workdir), size_of(args.max_shard_size)
    if not (workdir / "config.yaml").is_file():
        raise InputError(f"--workdir {workdir}: expected a run's folder with config.yaml, got none there")
    with processes.joined("export", args):
        export(args, workdir, shard_bytes)


def export(args: argparse.Namespace, workdir: Path, shard_bytes: int) -> None:
    dtype = args.dtype or ("float32" if args.adapter else "bfloat16")
    settings = cli.from_arguments(args, workdir / "config.yaml")
    tuned = fine_tuning.is_cold_start(workdir)
    adapters, optimizer = (settings.sft.lora, settings.sft.optimizer) if tuned else (settings.lora, settings.optimizer)
    mesh = make_mesh(settings.parallel.mesh)
    settings, shape = setup.shape_for(settings, mesh)
    text = setup.text_for(settings, shape)
    origin = (
        huggingface.model_folder(settings.model.path)
        if settings.model.path
        else None
        if tuned
        else workdir / "coldstart"
    )
    if args.adapter and not adapters.rank:
        raise InputError(f"--adapter: expected a run with LoRA, got {workdir}, which trained every parameter")
    if args.adapter and (
        origin is None or settings.model.adapter
    ):  # an adapter means something only on the weights it was trained on
        began = f"with model.adapter={settings.model.adapter} merged in" if origin else "from weights drawn at random"
        raise InputError(
            f"--adapter: expected a run that started from a model folder as it stands, got {workdir}, which began {began}"
        )
    with Checkpoints(workdir / "checkpoints", settings.run.keep) as checkpoints:
        best = (
            fine_tuning_report.best_of(
                fine_tuning_report.held_out_losses(workdir), [step for step in checkpoints.steps() if step]
            )
            if tuned
            else None
        )
        step = checkpoints.select(best if args.step is None else args.step)
        run = trainer(shape, mesh, settings, optimizer, 1, loss="supervised" if tuned else "crpo", adapters=adapters)
        made = jax.eval_shape(run.begin, lora.abstract(shape, adapters) if adapters.rank else abstract(shape))
        like = jax.tree.map(
            lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), made, run.states
        )
        trained = checkpoints.restore(step, like).master
    if args.adapter:
        peft.save(trained, shape, args.out, base=settings.model.path or str(origin), dtype=dtype)
    else:
        start.write(
            trained, origin, settings, shape, mesh, args.out, text.folder, dtype=dtype, max_shard_bytes=shard_bytes
        )
    print(
        f"the {'adapter' if args.adapter else 'model'} after step {step} of {workdir}, {dtype}: {args.out}",
        file=sys.stderr,
    )


def size_of(text: str) -> int:
    """Bytes of 500MB or 5GB, in powers of ten as transformers counts them."""
    match = re.fullmatch(r"([1-9]\d{0,8})([KMG]B)", text.strip().upper())
    if not match:
        raise InputError(f"--max-shard-size: expected a size such as 500MB or 5GB, got {text!r}")
    return int(match[1]) * UNITS[match[2]]


if __name__ == "__main__":
    cli.run_command("export", main)
