"""Every weight of every architecture, declared once.

Shardings, initial values, Hugging Face keys, adapters, Muon's matrices and the sampler's fused buffers all follow from
these declarations and from a layout's table of mesh axes (`parallel/layout.py`). A weight's name ends in its dims, one
letter each: `q_dnh` maps the width d to n heads of h.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Initializer = Callable[[Array, tuple[int, ...], Any], Array]
"""(key, sizes, Shape) -> float32 values."""


def ones(key: Array, sizes: tuple[int, ...], shape: Any) -> Array:
    return jnp.ones(sizes)


def zeros(key: Array, sizes: tuple[int, ...], shape: Any) -> Array:
    return jnp.zeros(sizes)


def normal(key: Array, sizes: tuple[int, ...], shape: Any) -> Array:
    """Deviation d^-1/2."""
    return jax.random.normal(key, sizes) * shape.d**-0.5


def residual(key: Array, sizes: tuple[int, ...], shape: Any) -> Array:
    """For the two matrices of a layer that write the residual stream: smaller by depth."""
    return normal(key, sizes, shape) * (2 * shape.l) ** -0.5


def embedding(key: Array, sizes: tuple[int, ...], shape: Any) -> Array:
    """Deviation 1 where the output projection is another matrix, so that the first layers do not drown the
    embedding."""
    return normal(key, sizes, shape) if shape.tied else jax.random.normal(key, sizes)


@dataclass(frozen=True)
class Weight:
    """A weight: its name, its key in the safetensors (`{l}` is the layer) and the axes stored there, "nh d" for [n * h,
    d].

    `inputs` are the input dims of a linear layer inside a block: such a weight may take a LoRA adapter, and Muon trains
    it. Weights with the same `fused` name stand side by side in one buffer of the sampler, in the order declared.
    """

    name: str
    key: str
    stored: str
    initializer: Initializer = normal
    inputs: str = ""
    fused: str = ""

    @property
    def dims(self) -> str:
        """The dims of one layer: "dnh"."""
        return self.name.rsplit("_", 1)[1]

    @property
    def stacked(self) -> bool:
        """Whether every layer has one; they are stacked along a leading dim l."""
        return "{l}" in self.key

    @property
    def stacked_dims(self) -> str:
        return "l" * self.stacked + self.dims

    @property
    def outputs(self) -> str:
        return self.dims.removeprefix(self.inputs)

    @property
    def layer_name(self) -> str:
        """What PEFT calls the linear layer: "q_proj"."""
        return self.key.split(".")[-2]


@dataclass(frozen=True)
class Architecture:
    """A family of models: `class_name` is its class in transformers, `weights` are in the order of the forward pass."""

    class_name: str
    weights: tuple[Weight, ...]


LAYER = "model.layers.{l}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."

QWEN2 = Architecture(
    "Qwen2ForCausalLM",
    (
        Weight("embed_vd", "model.embed_tokens.weight", "v d", embedding),
        Weight("attn_norm_d", LAYER + "input_layernorm.weight", "d", ones),
        Weight("q_dnh", ATTENTION + "q_proj.weight", "nh d", inputs="d", fused="qkv"),
        Weight("k_dkh", ATTENTION + "k_proj.weight", "kh d", inputs="d", fused="qkv"),
        Weight("v_dkh", ATTENTION + "v_proj.weight", "kh d", inputs="d", fused="qkv"),
        Weight("q_bias_nh", ATTENTION + "q_proj.bias", "nh", zeros, fused="qkv_bias"),
        Weight("k_bias_kh", ATTENTION + "k_proj.bias", "kh", zeros, fused="qkv_bias"),
        Weight("v_bias_kh", ATTENTION + "v_proj.bias", "kh", zeros, fused="qkv_bias"),
        Weight("o_nhd", ATTENTION + "o_proj.weight", "d nh", residual, inputs="nh"),
        Weight("mlp_norm_d", LAYER + "post_attention_layernorm.weight", "d", ones),
        Weight("gate_df", MLP + "gate_proj.weight", "f d", inputs="d", fused="gate_up"),
        Weight("up_df", MLP + "up_proj.weight", "f d", inputs="d", fused="gate_up"),
        Weight("down_fd", MLP + "down_proj.weight", "d f", residual, inputs="f"),
        Weight("final_norm_d", "model.norm.weight", "d", ones),
        Weight("unembed_dv", "lm_head.weight", "v d"),
    ),
)
"""Qwen2 and Qwen2.5: "Qwen2.5 Technical Report" (arXiv 2412.15115)."""

ARCHITECTURES = {"qwen2": QWEN2}
"""By `model_type` of config.json."""
