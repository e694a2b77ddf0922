"""The run to plan: a config's model, batch and settings on a target's devices, in a mesh and a layout."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from crpo_jax.config import Config, replaced
from crpo_jax.errors import InputError
from crpo_jax.model.attention import AttentionKind, choose_attention
from crpo_jax.model.config_json import read_shape, shape_of
from crpo_jax.model.placement import automatic_layout
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import check_layout, find_layout
from crpo_jax.parallel.mesh import DATA, MODEL, parse_mesh
from crpo_jax.planner.targets import Target
from crpo_jax.update.packing import most_responses, row_lengths


def qwen(d: int, l: int, n: int, k: int, h: int, f: int, v: int, tied: bool, family: str = "qwen2") -> Shape:  # noqa: E741
    return Shape(d, n, k, h, f, v, l, tied, Rope(1e6), 1e-6, family)


def llama(d: int, l: int, n: int, f: int, tied: bool, factor: float) -> Shape:  # noqa: E741
    rope = Rope(5e5, "llama3", factor, low=1.0, high=4.0, original_context=8192)
    return Shape(d, n, 8, 128, f, 128256, l, tied, rope, 1e-5, "llama")


PUBLISHED_SHAPES = {
    "Qwen/Qwen2.5-0.5B": qwen(d=896, l=24, n=14, k=2, h=64, f=4864, v=151936, tied=True),
    "Qwen/Qwen2.5-1.5B": qwen(d=1536, l=28, n=12, k=2, h=128, f=8960, v=151936, tied=True),
    "Qwen/Qwen2.5-3B": qwen(d=2048, l=36, n=16, k=2, h=128, f=11008, v=151936, tied=True),
    "Qwen/Qwen2.5-7B": qwen(d=3584, l=28, n=28, k=4, h=128, f=18944, v=152064, tied=False),
    "Qwen/Qwen3-4B": qwen(d=2560, l=36, n=32, k=8, h=128, f=9728, v=151936, tied=True, family="qwen3"),
    "Qwen/Qwen3-8B": qwen(d=4096, l=36, n=32, k=8, h=128, f=12288, v=151936, tied=False, family="qwen3"),
    "meta-llama/Llama-3.2-3B": llama(d=3072, l=28, n=24, f=8192, tied=True, factor=32.0),
    "meta-llama/Llama-3.1-8B": llama(d=4096, l=32, n=32, f=14336, tied=False, factor=8.0),
    "google/gemma-3-4b": Shape(
        d=2560, n=8, k=4, h=256, f=10240, v=262208, l=34, tied=True, norm_eps=1e-6, model_type="gemma3_text",
        rope=Rope(1e6, "linear", 8.0), window=1024, window_rope=Rope(1e4),
        layers_windowed=tuple((layer + 1) % 6 != 0 for layer in range(34)), score_width=256,
    ),
}  # fmt: skip
"""Shapes by hub id, so that a model can be planned before it is downloaded; Gemma's is that of its text model."""

WITH_VISION = {"google/gemma-3-4b"}
"""Models whose hub folder has a vision tower beside the text model that is planned: train refuses such a folder."""

MEAN_PROMPT, MEAN_RESPONSE = 0.4, 0.25
"""Mean lengths as shares of the longest that the settings allow; only times use them. The median of MedQA's prompts is
394 of 1,024 tokens; the mean of responses of lognormal length is about a quarter of their limit."""


def resolve_shape(settings: Config) -> Shape:
    """The shape of the folder or the published model that model.path names, or of model.shape if it is empty."""
    path = settings.model.path
    if not path:
        return shape_of(dataclasses.asdict(settings.model.shape), "model.shape")
    if (Path(path).expanduser() / "config.json").is_file():
        return read_shape(Path(path).expanduser())
    if name := published_name(path):
        return PUBLISHED_SHAPES[name]
    names = ", ".join(PUBLISHED_SHAPES)
    raise InputError(
        f"model.path: expected a folder with config.json or one of {names} (or -Instruct, -it, -pt), got {path!r}"
    )


def published_name(path: str) -> str | None:
    """The key of PUBLISHED_SHAPES that model.path means."""
    name = re.sub(r"-(Instruct|it|pt)$", "", path.rsplit("/", 1)[-1])
    return next((published for published in PUBLISHED_SHAPES if published.endswith(f"/{name}")), None)


@dataclass(frozen=True)
class PlannedRun:
    """A run on a mesh of `data` x `model` devices. Counts are per device; counts of rows are per data shard."""

    settings: Config
    shape: Shape
    target: Target
    data: int
    model: int

    def __post_init__(self) -> None:
        if self.data * self.model != self.target.count:
            product = f"{self.data} x {self.model} = {self.data * self.model}"
            devices = f"the {self.target.count} devices of {self.target.name}"
            raise InputError(f"--mesh {self.mesh_text}: expected data x model = {devices}, got {product}")
        sizes = {letter: getattr(self.shape, letter) for letter in "dnkhfv"}
        check_layout(find_layout(self.layout_name), self.mesh, sizes)

    @property
    def mesh_text(self) -> str:
        return f"{self.data}x{self.model}"

    @property
    def is_text_part(self) -> bool:
        """Whether the model was planned from its published name, and is a part of what the hub has under that name."""
        path = self.settings.model.path
        return published_name(path) in WITH_VISION and not (Path(path).expanduser() / "config.json").is_file()

    @property
    def layout_name(self) -> str:
        return self.settings.parallel.layout

    @functools.cached_property
    def mesh(self) -> Any:
        """The mesh without devices, from which shardings follow."""
        return AbstractMesh((self.data, self.model), (DATA, MODEL))

    @property
    def attention(self) -> AttentionKind:
        """The attention that the run uses on the target."""
        settings, platform = self.settings, self.target.chip.kind
        return choose_attention(settings.parallel.attention, platform, settings.model.dtype, self.shape.h)

    def with_settings(self, changes: Mapping[str, Any]) -> "PlannedRun":
        """The same run with new values by dotted key."""
        return dataclasses.replace(self, settings=replaced(self.settings, changes))

    # ---- rollout ---------------------------------------------------------------------------------------------------
    @property
    def wave_prompts(self) -> int:
        """Prompts decoded together on a data shard, each with its whole group."""
        crpo, slots = self.settings.crpo, self.settings.rollout.slots
        return max(1, min(slots // crpo.group_size, -(-crpo.prompts_per_step // self.data)))

    @property
    def wave_rows(self) -> int:
        return self.wave_prompts * self.settings.crpo.group_size

    @property
    def waves(self) -> int:
        return -(-self.settings.crpo.prompts_per_step // (self.wave_prompts * self.data))

    # ---- update ----------------------------------------------------------------------------------------------------
    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.settings.data.max_prompt_tokens + self.settings.rollout.max_new_tokens

    @property
    def packed_length(self) -> int:
        """Places of the longest packed row that a data shard computes at once: the budget's, as many as a mini-batch's
        longest groups fill if these are fewer, or those of the longest response if it exceeds the budget."""
        crpo, parallel = self.settings.crpo, self.settings.parallel
        group = self.settings.data.max_prompt_tokens + crpo.group_size * self.settings.rollout.max_new_tokens
        most = max(self.longest_row, -(-crpo.mini_batch_prompts * group // self.data))
        budget, _ = row_lengths(parallel.micro_batch_tokens, parallel.length_multiple, self.longest_row)
        return min(budget, -(-most // parallel.length_multiple) * parallel.length_multiple)

    @property
    def packed_responses(self) -> int:
        """Responses that a packed row of that length has room for."""
        return most_responses(self.responses / self.optimizer_steps / self.micro_batches)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps in one RL step."""
        return self.settings.crpo.prompts_per_step // self.settings.crpo.mini_batch_prompts

    # ---- the work of one RL step, at mean lengths ------------------------------------------------------------------
    @property
    def mean_prompt(self) -> float:
        return MEAN_PROMPT * self.settings.data.max_prompt_tokens

    @property
    def mean_response(self) -> float:
        return MEAN_RESPONSE * self.settings.rollout.max_new_tokens

    @property
    def responses(self) -> float:
        """Responses of an RL step on a data shard."""
        return self.settings.crpo.prompts_per_step * self.settings.crpo.group_size / self.data

    @property
    def prompt_tokens(self) -> float:
        """Tokens of an RL step's prompts on a data shard, each once."""
        return self.responses / self.settings.crpo.group_size * self.mean_prompt

    @property
    def response_tokens(self) -> float:
        """Tokens of an RL step's responses on a data shard."""
        return self.responses * self.mean_response

    @property
    def decode_steps(self) -> float:
        """Tokens drawn one after another if every slot is busy until all responses are done."""
        return self.responses * self.mean_response / self.wave_rows

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step, filled without padding."""
        return max(
            1, math.ceil((self.prompt_tokens + self.response_tokens) / self.optimizer_steps / self.packed_length)
        )


def resolve_run(settings: Config, target: Target, mesh: str = "") -> PlannedRun:
    """The run on `mesh` (DxM; empty: all devices on the data axis); parallel.layout=auto is resolved as in training."""
    data, model = parse_mesh(mesh) if mesh else (target.count, 1)
    shape = resolve_shape(settings)
    if settings.parallel.layout == "auto":
        devices: Any = AbstractMesh((data, model), (DATA, MODEL))
        reference = settings.crpo.has_reference
        layout = automatic_layout(shape, devices, settings.model.dtype, target.chip.memory, reference)
        settings = replaced(settings, {"parallel.layout": layout})
    return PlannedRun(settings, shape, target, data, model)
