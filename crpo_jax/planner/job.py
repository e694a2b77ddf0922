"""What is planned: a config's model, batch and settings on a target's devices, in a mesh and a layout."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh

from crpo_jax.config import Config, replaced
from crpo_jax.errors import InputError
from crpo_jax.model.attention import Implementation, implementation
from crpo_jax.model.placement import automatic_layout
from crpo_jax.model.shape import Shape, read_shape, shape_of
from crpo_jax.parallel.layout import LAYOUTS, Layout, check_layout
from crpo_jax.parallel.mesh import DATA, MODEL, parse_mesh
from crpo_jax.planner.targets import Target

FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)
PUBLISHED = {  # of the config.json of each size
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
}
"""Qwen2.5 by size: a model can be planned for that is not on this machine."""

PROMPT_SHARE, RESPONSE_SHARE = 0.4, 0.25
"""Mean lengths over the longest that the settings allow, for time only; memory is for the longest. MedQA's prompts have a median of
394 of 1,024 tokens; responses of lognormal length have a mean of about a quarter of their limit."""


def planned_shape(settings: Config) -> Shape:
    """The shape of model.path if that is a folder here, of a published Qwen2.5 if it names one, of model.shape if it is empty."""
    path = settings.model.path
    if not path:
        return shape_of(dataclasses.asdict(settings.model.shape), "model.shape")
    if (Path(path).expanduser() / "config.json").is_file():
        return read_shape(Path(path).expanduser())
    named = re.search(r"Qwen2\.5-(\d+(?:\.\d+)?B)(?:-Instruct)?$", path)
    if not named or named[1] not in PUBLISHED:
        known = ", ".join(f"Qwen/Qwen2.5-{size}" for size in PUBLISHED)
        raise InputError(
            f"model.path: expected a folder with config.json or one of {known} (or -Instruct), got {path!r}"
        )
    return shape_of(
        {**dict(zip(FIELDS, PUBLISHED[named[1]], strict=True)), "rope_theta": 1e6, "rms_norm_eps": 1e-6}, path
    )


@dataclass(frozen=True)
class Job:
    """One thing to plan. Counts are per device, or per data shard where rows are meant."""

    settings: Config
    shape: Shape
    target: Target
    data: int
    model: int

    def __post_init__(self) -> None:
        if self.data * self.model != self.target.count:
            here = f"{self.data} x {self.model} = {self.data * self.model}"
            raise InputError(
                f"--mesh {self.mesh_text}: expected data x model = the {self.target.count} devices of {self.target.name}, got {here}"
            )
        check_layout(self.layout, self.mesh, {letter: getattr(self.shape, letter) for letter in "dnkfv"})

    @property
    def mesh_text(self) -> str:
        return f"{self.data}x{self.model}"

    @property
    def layout_name(self) -> str:
        return self.settings.parallel.layout

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.layout_name]

    @functools.cached_property
    def mesh(self) -> Any:
        """The mesh without devices: enough to say how anything is split."""
        return AbstractMesh((self.data, self.model), (DATA, MODEL))

    @property
    def attention(self) -> Implementation:
        """What the run attends with on the target."""
        return implementation(
            self.settings.parallel.attention, self.target.chip.kind, self.settings.model.dtype, self.shape.h
        )

    def having(self, changed: Mapping[str, Any]) -> "Job":
        """The same with other settings, by dotted key."""
        return dataclasses.replace(self, settings=replaced(self.settings, changed))

    # ---- the rollout -----------------------------------------------------------------------------------------------
    @property
    def wave_prompts(self) -> int:
        """Prompts decoded together on a data shard, each with its whole group."""
        crpo, slots = self.settings.crpo, self.settings.rollout.slots
        return max(1, min(slots // crpo.group_size, -(-crpo.prompts_per_step // self.data)))

    @property
    def wave_rows(self) -> int:
        return self.wave_prompts * self.settings.crpo.group_size

    @property
    def kv_heads(self) -> int:
        """KV heads that a device holds while sampling."""
        return max(1, self.shape.k // self.model)

    # ---- the update ------------------------------------------------------------------------------------------------
    @property
    def micro_batch(self) -> tuple[int, int]:
        """(rows on a data shard, tokens of a row) of the micro-batch that needs the most: as many tokens as the budget allows, in the
        longest rows that reach it; one row of the longest length where that is over the budget."""
        parallel = self.settings.parallel
        longest = self.settings.data.max_prompt_tokens + self.settings.rollout.max_new_tokens
        lengths = range(parallel.length_multiple, longest + parallel.length_multiple, parallel.length_multiple)
        mini = -(-self.settings.crpo.mini_batch_prompts * self.settings.crpo.group_size // self.data)
        shapes = [(min(mini, max(1, parallel.micro_batch_tokens // t)), t) for t in lengths]
        return max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))

    @property
    def updates(self) -> int:
        """Optimizer steps in one RL step."""
        return self.settings.crpo.prompts_per_step // self.settings.crpo.mini_batch_prompts

    # ---- what one RL step has to do, at mean lengths ---------------------------------------------------------------------
    @property
    def prompt_tokens(self) -> float:
        return PROMPT_SHARE * self.settings.data.max_prompt_tokens

    @property
    def response_tokens(self) -> float:
        return RESPONSE_SHARE * self.settings.rollout.max_new_tokens

    @property
    def rows(self) -> float:
        """Responses of a step on a data shard."""
        return self.settings.crpo.prompts_per_step * self.settings.crpo.group_size / self.data

    @property
    def waves(self) -> int:
        return -(-self.settings.crpo.prompts_per_step // (self.wave_prompts * self.data))

    @property
    def decode_steps(self) -> float:
        """Tokens drawn one after another: every slot busy until all rows are done."""
        return self.rows * self.response_tokens / self.wave_rows

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step, filled without padding."""
        rows, t = self.micro_batch
        return max(1, -(-int(self.rows / self.updates * (self.prompt_tokens + self.response_tokens)) // (rows * t)))


def job_for(settings: Config, target: Target, mesh: str = "") -> Job:
    data, model = parse_mesh(mesh) if mesh else (target.count, 1)
    shape = planned_shape(settings)
    if settings.parallel.layout == "auto":
        mesh_alone: Any = AbstractMesh((data, model), (DATA, MODEL))
        layout = automatic_layout(shape, mesh_alone, settings.model.dtype, target.chip.memory)
        settings = replaced(settings, {"parallel.layout": layout})
    return Job(settings, shape, target, data, model)
