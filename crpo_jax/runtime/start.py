"""The model a run starts from, what of it is trained, and how what came of it is written."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.errors import InputError
from crpo_jax.model import huggingface, lora, peft
from crpo_jax.model.lora import Adapted, Adapters
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Qwen2, initial
from crpo_jax.parallel import processes
from crpo_jax.parallel.layout import LAYOUTS, WeightTable


def wait_for_workdir(workdir: Path) -> None:
    """Returns when the process that writes has opened the workdir; InputError in one that does not see it."""
    processes.barrier("the workdir is open")
    if not (workdir / "config.yaml").exists():
        raise InputError(
            f"--workdir {workdir}: expected a folder on a disk that all processes share, got one that only the first of them sees"
        )


def start_model(
    folder: Path | None, settings: config.Config, shape: Shape, mesh: Mesh, table: WeightTable, dtype: str
) -> Qwen2:
    """The model of a folder with model.adapter merged into it, or without a folder one drawn from run.seed, the same on every mesh."""
    if folder is None:
        made = jax.jit(
            lambda key: jax.tree.map(lambda x: x.astype(dtype), initial(shape, key)),
            out_shardings=weight_shardings(shape, table, mesh),
        )
        return made(jax.random.key(settings.run.seed))
    model = huggingface.load(str(folder), mesh, table, dtype)[1]
    if not settings.model.adapter:
        return model
    return lora.merge(Adapted(model, peft.load(settings.model.adapter, shape, mesh, table)))


def trainee(
    folder: Path | None, settings: config.Config, shape: Shape, mesh: Mesh, adapters: config.Lora
) -> tuple[Any, Qwen2 | None]:
    """What is trained, float32 in the layout's master table, and what stays frozen: the whole start model and nothing, or
    fresh adapters and the start model as it computes."""
    layout = LAYOUTS[settings.parallel.layout]
    if not adapters.rank:
        return start_model(folder, settings, shape, mesh, layout.master, "float32"), None
    fresh = jax.jit(
        lambda key: lora.initial(shape, adapters, key),
        out_shardings=lora.shardings(shape, adapters, layout.master, mesh),
    )
    return fresh(jax.random.key(settings.run.seed)), start_model(
        folder, settings, shape, mesh, layout.compute, settings.model.dtype
    )


def adapter_fits_a_folder(settings: config.Config, adapters: config.Lora) -> bool:
    """Whether what is trained are adapters, and the start they belong on is model.path as it stands."""
    return adapters.rank > 0 and bool(settings.model.path) and not settings.model.adapter


def write(
    trained: Any,
    folder: Path | None,
    settings: config.Config,
    shape: Shape,
    mesh: Mesh,
    out: str | Path,
    tokenizer_folder: Path,
    *,
    dtype: Any = "float32",
    max_shard_bytes: int = huggingface.MAX_SHARD_BYTES,
) -> None:
    """What was trained from `folder` as a Hugging Face folder: adapters are merged into the start model, read anew in float32.

    What the start model says of itself beside its weights (generation_config.json, longest position) is passed on.
    """
    if isinstance(trained, Adapters):
        base = start_model(folder, settings, shape, mesh, LAYOUTS[settings.parallel.layout].master, "float32")
        trained = lora.merge(Adapted(base, trained))
    passed_on = huggingface.inherited(folder) if folder else {}
    huggingface.save(
        trained,
        shape,
        out,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer_folder=tokenizer_folder,
        **passed_on,
    )
