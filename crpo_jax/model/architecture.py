"""Every weight of every architecture, declared once.

Shardings, initial values, Hugging Face keys, adapters, Muon's matrices and the sampler's fused buffers all follow from
these declarations and from a layout's table of mesh axes (`parallel/layout.py`). A weight's name ends in its dims, one
letter each: `q_dnh` maps the width d to n heads of h.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
    """A family of models: `class_name` is its class in transformers, `weights` are in the order of the forward pass.

    Norms multiply by their weight plus `norm_offset`. `scaled_embedding`: embeddings are multiplied by d^1/2.
    """

    class_name: str
    weights: tuple[Weight, ...]
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: float = 0.0
    scaled_embedding: bool = False


LAYER = "model.layers.{l}."
ATTENTION, MLP = LAYER + "self_attn.", LAYER + "mlp."

EMBEDDING = Weight("embed_vd", "model.embed_tokens.weight", "v d", embedding)
QKV = (
    Weight("q_dnh", ATTENTION + "q_proj.weight", "nh d", inputs="d", fused="qkv"),
    Weight("k_dkh", ATTENTION + "k_proj.weight", "kh d", inputs="d", fused="qkv"),
    Weight("v_dkh", ATTENTION + "v_proj.weight", "kh d", inputs="d", fused="qkv"),
)
QKV_BIASES = (
    Weight("q_bias_nh", ATTENTION + "q_proj.bias", "nh", zeros, fused="qkv_bias"),
    Weight("k_bias_kh", ATTENTION + "k_proj.bias", "kh", zeros, fused="qkv_bias"),
    Weight("v_bias_kh", ATTENTION + "v_proj.bias", "kh", zeros, fused="qkv_bias"),
)
OUTPUT = Weight("o_nhd", ATTENTION + "o_proj.weight", "d nh", residual, inputs="nh")
GATED_MLP = (
    Weight("gate_df", MLP + "gate_proj.weight", "f d", inputs="d", fused="gate_up"),
    Weight("up_df", MLP + "up_proj.weight", "f d", inputs="d", fused="gate_up"),
    Weight("down_fd", MLP + "down_proj.weight", "d f", residual, inputs="f"),
)
UNEMBEDDING = Weight("unembed_dv", "lm_head.weight", "v d")


def norm(name: str, key: str, initializer: Initializer = ones) -> Weight:
    return Weight(name, f"{key}.weight", name.rsplit("_", 1)[1], initializer)


ATTENTION_NORM, FINAL_NORM = norm("attn_norm_d", LAYER + "input_layernorm"), norm("final_norm_d", "model.norm")
MLP_NORM = norm("mlp_norm_d", LAYER + "post_attention_layernorm")
HEAD_NORMS = (norm("q_norm_h", ATTENTION + "q_norm"), norm("k_norm_h", ATTENTION + "k_norm"))


def decoder(*attention: Weight) -> tuple[Weight, ...]:
    """A pre-norm decoder with a gated feed-forward network, given what its attention reads."""
    return (EMBEDDING, ATTENTION_NORM, *attention, OUTPUT, MLP_NORM, *GATED_MLP, FINAL_NORM, UNEMBEDDING)


GEMMA3 = (
    EMBEDDING,
    norm("attn_norm_d", LAYER + "input_layernorm", zeros),
    *QKV,
    norm("q_norm_h", ATTENTION + "q_norm", zeros),
    norm("k_norm_h", ATTENTION + "k_norm", zeros),
    OUTPUT,
    norm("attn_post_norm_d", LAYER + "post_attention_layernorm", zeros),
    norm("mlp_norm_d", LAYER + "pre_feedforward_layernorm", zeros),
    *GATED_MLP,
    norm("mlp_post_norm_d", LAYER + "post_feedforward_layernorm", zeros),
    norm("final_norm_d", "model.norm", zeros),
    UNEMBEDDING,
)

ARCHITECTURES = {
    "qwen2": Architecture("Qwen2ForCausalLM", decoder(*QKV, *QKV_BIASES)),  # and Qwen2.5, arXiv 2412.15115
    "qwen3": Architecture("Qwen3ForCausalLM", decoder(*QKV, *HEAD_NORMS)),  # arXiv 2505.09388
    "llama": Architecture("LlamaForCausalLM", decoder(*QKV)),  # arXiv 2407.21783
    "mistral": Architecture("MistralForCausalLM", decoder(*QKV)),  # arXiv 2310.06825
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM", GEMMA3, activation="gelu_tanh", norm_offset=1.0, scaled_embedding=True
    ),  # arXiv 2503.19786
}
"""By `model_type` of config.json."""
