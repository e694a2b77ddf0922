"""Opens what every command that runs a model needs: mesh, shape, layout, tokenizer, start weights, programs."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from crpo_jax.config import Config, Lora, Optimizer, config_folder, replaced
from crpo_jax.data.chat_template import stop_ids
from crpo_jax.data.tokenizer import first_difference, load_tokenizer, tokenizer_of_class
from crpo_jax.errors import InputError, brief
from crpo_jax.model.attention import choose_attention
from crpo_jax.model.config_json import read_shape, shape_of
from crpo_jax.model.decode import SamplerWeights
from crpo_jax.model.huggingface import (
    MAX_SHARD_BYTES,
    check_keys,
    inherited_settings,
    load_model,
    model_folder,
    read_headers,
    save_model,
    special_token_ids,
    stopping_at,
)
from crpo_jax.model.lora import Policy, initial_adapters, merge_adapters, trained_shardings
from crpo_jax.model.peft import load_adapters
from crpo_jax.model.placement import automatic_layout, to_sampler, weight_shardings
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Transformer, random_model
from crpo_jax.parallel.layout import Axes, Layout, check_layout, find_layout
from crpo_jax.parallel.mesh import make_mesh
from crpo_jax.parallel.processes import gather_from_processes
from crpo_jax.reward.effective import effective_table, read_vocabulary
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import Engine, Response
from crpo_jax.runtime.exported_tokenizer import exported_tokenizer
from crpo_jax.runtime.same_inputs import require_same_files, require_same_settings
from crpo_jax.update.trainer import Loss, Trainer, TrainState

if TYPE_CHECKING:
    from crpo_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """The run's tokenizer, the ids that end a response, and which ids are effective tokens (bool, one per id)."""

    folder: Path
    tokenizer: "Tokenizer"
    stop_ids: tuple[int, ...]
    effective: np.ndarray

    def content_ids(self, response: Response) -> list[int]:
        """The response's tokens without the one that stopped it."""
        return response.tokens[: len(response.tokens) - response.stopped].tolist()

    def decode(self, response: Response) -> str:
        # Llama 3's settings ask for spaces before punctuation to be removed: not what the model wrote.
        how: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(self.content_ids(response), **how))


@dataclass(frozen=True)
class Runtime:
    """An opened model on an opened mesh; `settings.parallel.layout` names the layout in use, never "auto"."""

    settings: Config
    mesh: Mesh
    shape: Shape
    vocabulary: Vocabulary

    @property
    def layout(self) -> Layout:
        return find_layout(self.settings.parallel.layout)

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return jax.process_index() == 0

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.settings.run.seed)

    # ---- sampling ----------------------------------------------------------------------------------------------------

    @cached_property
    def sampler(self) -> Engine:
        """With the settings of `rollout`."""
        rollout, parallel = self.settings.rollout, self.settings.parallel
        renormalize = self.settings.crpo.old_logprobs == "sampler"
        how = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, self.vocabulary.stop_ids, renormalize)
        platform = self.mesh.devices.flat[0].platform
        attention = choose_attention(parallel.attention, platform, self.settings.model.dtype, self.shape.h)
        return Engine(self.shape, self.mesh, how, rollout.max_new_tokens, rollout.slots, rollout.chunk, attention)

    def sampler_weights(self, policy: Policy) -> SamplerWeights:
        return to_sampler(self.shape, self.mesh, self.settings.model.dtype, policy.adapted)(policy)

    # ---- training ----------------------------------------------------------------------------------------------------

    def trained_by(self, loss: Loss) -> tuple[Optimizer, Lora]:
        """The settings of CRPO's optimizer and adapters, or of the cold start's."""
        section = self.settings if loss == "crpo" else self.settings.sft
        return section.optimizer, section.lora

    def trainer(self, loss: Loss, optimizer_steps: int) -> Trainer:
        optimizer, lora = self.trained_by(loss)
        return Trainer(self.shape, self.mesh, self.settings, optimizer, optimizer_steps, loss=loss, lora=lora)

    def start_state(self, trainer: Trainer, start: Path | None) -> TrainState:
        """The state before the first step, from the model in the folder `start` (None: a random one)."""
        lora = self.trained_by(trainer.loss)[1]
        if not lora.rank:
            return trainer.begin(self.start_weights(start, self.layout.master, "float32"))
        shardings = trained_shardings(self.shape, lora, self.layout.master, self.mesh)
        adapters = jax.jit(lambda key: initial_adapters(self.shape, lora, key), out_shardings=shardings)(self.key)
        return trainer.begin(adapters, self.start_weights(start, self.layout.compute, self.settings.model.dtype))

    def start_weights(self, start: Path | None, axes: Axes, dtype: str) -> Transformer:
        """The model of a folder with model.adapter merged into it; with no folder a random one, the same on every
        mesh."""
        if start is None:

            def random(key: jax.Array) -> Transformer:
                return jax.tree.map(lambda x: x.astype(dtype), random_model(self.shape, key))

            return jax.jit(random, out_shardings=weight_shardings(self.shape, axes, self.mesh))(self.key)
        model, adapter = load_model(str(start), self.mesh, axes, dtype), self.settings.model.adapter
        return merge_adapters(Policy(model, load_adapters(adapter, self.shape, self.mesh, axes) if adapter else None))

    # ---- export ------------------------------------------------------------------------------------------------------

    def check_export(self) -> None:
        """InputError where `export` would refuse the tokenizer: better before hours of training than after them."""
        with exported_tokenizer(self.vocabulary.folder, self.vocabulary.tokenizer, self.shape.model_type):
            return

    def export(
        self,
        trained: Any,
        start: Path | None,
        folder: str | Path,
        *,
        dtype: Any = "float32",
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Writes what was trained from `start` as a Hugging Face folder: adapters are merged into the start model, read
        again in float32.

        What the start model's folder says besides its weights (generation_config.json, longest position) is passed on.
        Refused, before anything is written, where AutoTokenizer would make other ids of texts than this run.
        """
        if not isinstance(trained, Transformer):
            trained = merge_adapters(Policy(self.start_weights(start, self.layout.master, "float32"), trained))
        vocabulary, inherited = self.vocabulary, inherited_settings(start) if start else {}
        generation = inherited.get("generation") or special_token_ids(vocabulary.folder)
        inherited["generation"] = stopping_at(generation, vocabulary.stop_ids)
        with exported_tokenizer(vocabulary.folder, vocabulary.tokenizer, self.shape.model_type) as tokenizer_folder:
            save_model(
                trained,
                folder,
                dtype=dtype,
                max_shard_bytes=max_shard_bytes,
                tokenizer_folder=tokenizer_folder,
                **inherited,
            )


def open_runtime(settings: Config) -> Runtime:
    """Opens the mesh, the model's shape and the tokenizer; InputError, before anything is written, where they do not
    fit, or where the processes of the run differ in their settings or files."""
    require_same_settings(settings)
    mesh = make_mesh(settings.parallel.mesh)
    shape = open_shape(settings)
    if settings.parallel.layout == "auto":
        memory = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 0)
        smallest = min(gather_from_processes([memory])) or None  # all processes must choose the same layout
        layout = automatic_layout(shape, mesh, settings.model.dtype, smallest, settings.crpo.has_reference)
        settings = replaced(settings, {"parallel.layout": layout})
    check_layout(find_layout(settings.parallel.layout), mesh, {dim: getattr(shape, dim) for dim in "dnkhfv"})
    vocabulary, model = open_vocabulary(settings, shape), settings.model
    require_same_files(model.path and model_folder(model.path), vocabulary.folder, model.adapter)
    return Runtime(settings, mesh, shape, vocabulary)


def open_shape(settings: Config) -> Shape:
    """The shape of model.path, whose files must hold all its tensors, or of model.shape."""
    if not settings.model.path:
        return shape_of(asdict(settings.model.shape), "model.shape")
    folder = model_folder(settings.model.path)
    shape = read_shape(folder)
    check_keys(shape, *read_headers(folder))
    return shape


def open_vocabulary(settings: Config, shape: Shape) -> Vocabulary:
    """The tokenizer of tokenizer.path, or of the model's folder; refused where it does not match the model's
    vocabulary."""
    path = settings.tokenizer.path
    of_model = model_folder(settings.model.path) if settings.model.path else None
    folder = find_shipped(path) if path else model_folder(settings.model.path)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.get_vocab()
    if of_model and path and (of_model / "tokenizer.json").is_file():
        check_same_ids(ids, folder, of_model)
    if (folder / "config.json").is_file():  # a model's folder, which a server would open with AutoTokenizer
        warn_of_other_ids(tokenizer, folder)
    size = max(len(tokenizer), max(ids.values()) + 1)  # ids may have gaps
    if size > shape.v:
        raise InputError(f"tokenizer.path: expected at most the model's {shape.v} tokens, got {size} in {folder}")
    stops = stop_ids(tokenizer, settings.rollout.stop, [folder, *([of_model] if of_model else [])])
    return Vocabulary(folder, tokenizer, stops, effective_table(folder / "tokenizer.json", shape.v))


def check_same_ids(ids: Mapping[str, int], folder: Path, of_model: Path) -> None:
    """Refuses a tokenizer that gives a token another id than the one in the model's own folder does: the model would
    read noise."""
    own = read_vocabulary(of_model / "tokenizer.json")
    other = next((token for token, number in ids.items() if own.get(token, number) != number), None)
    if other is not None:
        raise InputError(
            f"tokenizer.path: expected the ids of model.path={of_model}, got {ids[other]} instead of {own[other]} for "
            f"{brief(other)} in {folder}; tokenizer.path= takes the model's own"
        )


def warn_of_other_ids(tokenizer: "Tokenizer", folder: Path) -> None:
    """One line where AutoTokenizer makes other ids of a text than the folder's tokenizer.json, which is used here."""
    difference = first_difference(tokenizer, tokenizer_of_class("AutoTokenizer", folder))
    if difference and jax.process_index() == 0:
        print(
            f"{folder}: transformers' AutoTokenizer makes other ids than tokenizer.json says, which this run follows: "
            f"{brief(difference.other)} instead of {brief(difference.ids)} in {brief(difference.text)}; "
            "exports of this run give the same ids in both",
            file=sys.stderr,
        )


def find_shipped(path: str) -> Path:
    """The path, or for `configs/...` outside a checkout the copy inside this package."""
    local, shipped = Path(path).expanduser(), config_folder().parent / path
    return shipped if not local.exists() and shipped.exists() else local
