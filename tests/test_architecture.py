"""Another architecture is a short list of declarations, here Qwen3's: norms of queries and keys, and no biases.

Everything but the forward pass follows from it.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SHAPE, leaves_by_name, mesh_of, random_weights
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from crpo_jax.config import LINEAR_LAYERS
from crpo_jax.errors import InputError
from crpo_jax.model.architecture import ARCHITECTURES, Architecture
from crpo_jax.model.config_json import shape_of
from crpo_jax.model.huggingface import config_of, load_model, model_tensors, save_model
from crpo_jax.model.lora import Policy, linear_layers
from crpo_jax.model.placement import sampler_specs, to_sampler, weight_shardings
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import model_shapes, parameter_count, random_model
from crpo_jax.parallel.layout import LAYOUTS, SHARDED, TENSOR
from crpo_jax.update.trainer import muon_dimensions

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

KEYS = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (48, 16),
    "model.layers.0.self_attn.k_proj.weight": (12, 16),
    "model.layers.0.self_attn.v_proj.weight": (12, 16),
    "model.layers.0.self_attn.q_norm.weight": (6,),
    "model.layers.0.self_attn.k_norm.weight": (6,),
    "model.layers.0.self_attn.o_proj.weight": (16, 48),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.layers.0.mlp.gate_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
"""The first layer's keys, and those outside the layers, of transformers' Qwen3 with the sizes of SHAPE."""


@pytest.fixture
def shape() -> Shape:
    """A Qwen3 of SHAPE's sizes."""
    return dataclasses.replace(SHAPE, model_type="qwen3")


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_declarations_are_consistent(architecture: Architecture):
    """Names, keys and axes that contradict each other would show only in what a model says."""
    weights = architecture.weights
    assert len({weight.name for weight in weights}) == len({weight.key for weight in weights}) == len(weights)
    for weight in weights:
        assert sorted(weight.stored.replace(" ", "")) == sorted(weight.dims), weight.name
        assert weight.dims.startswith(weight.inputs), weight.name
        assert not (weight.inputs and not weight.stacked), weight.name
    for fused in {weight.fused for weight in weights} - {""}:
        assert len({weight.inputs for weight in weights if weight.fused == fused}) == 1, fused


def test_keys_and_shapes_follow(shape: Shape):
    sizes = {tensor.key: tensor.sizes for tensor in model_tensors(shape)}
    assert {key: sizes[key] for key in sizes if ".layers." not in key or ".layers.0." in key} == KEYS
    assert len(sizes) == 3 + 11 * shape.l
    leaves = leaves_by_name(model_shapes(shape))
    assert leaves.keys() == {weight.name for weight in shape.weights}
    assert leaves["k_norm_h"].shape == (shape.l, shape.h)
    assert parameter_count(shape) == sum(leaf.size for leaf in leaves.values())
    assert shape_of(config_of(shape, "float32", {})) == shape


def test_keys_are_those_of_transformers(shape: Shape):
    torch = pytest.importorskip("torch", reason="needs torch, pip install 'crpo_jax[parity]'")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config_of(shape, "float32", {})))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {tensor.key: tensor.sizes for tensor in model_tensors(shape)} == theirs


@pytest.mark.parametrize("name", LAYOUTS)
def test_shardings_follow(name: str, shape: Shape):
    """The new weights are placed by every layout, the others as they were."""
    mesh = mesh_of(4, 2)
    for axes in LAYOUTS[name]:
        qwen3, qwen2 = (leaves_by_name(weight_shardings(each, axes, mesh)) for each in (shape, SHAPE))
        assert qwen3["q_norm_h"].spec == qwen3["k_norm_h"].spec == P(None, None)
        assert {key: qwen3[key] for key in qwen2 if key in qwen3} == {key: qwen2[key] for key in qwen2 if key in qwen3}


def test_initial_weights_adapters_and_muon_follow(shape: Shape):
    qwen3, qwen2 = (leaves_by_name(random_model(each, jax.random.key(0))) for each in (shape, SHAPE))
    for key, value in qwen3.items():
        np.testing.assert_array_equal(value, qwen2[key] if key in qwen2 else np.ones((shape.l, shape.h)))
    assert tuple(linear_layers(shape)) == LINEAR_LAYERS
    in_muon = leaves_by_name(muon_dimensions(model_shapes(shape))).keys()
    assert in_muon == {weight.name for weight in linear_layers(shape).values()}


def test_the_samplers_buffers_follow(shape: Shape):
    mesh = mesh_of(4, 2)
    layer = sampler_specs(shape, mesh).layers[0]
    assert layer.keys() == sampler_specs(SHAPE, mesh).layers[0].keys() - {"qkv_bias"} | {"q_norm_h", "k_norm_h"}
    model = random_weights(shape)
    weights = to_sampler(shape, mesh, "float32")(Policy(model))
    np.testing.assert_array_equal(weights.layers[2]["k_norm_h"], model["k_norm_h"][2])


def test_folders_follow(shape: Shape, tmp_path: Path):
    """A folder is written and read with exactly the declared keys, bit for bit, and refused without one of them."""
    model = random_weights(shape)
    save_model(model, tmp_path / "qwen3", dtype="float32")
    described = json.loads((tmp_path / "qwen3" / "config.json").read_text())
    assert (described["model_type"], described["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    stored = load_file(tmp_path / "qwen3" / "model.safetensors")
    assert stored.keys() == {tensor.key for tensor in model_tensors(shape)}
    loaded = load_model(str(tmp_path / "qwen3"), mesh_of(4, 2), SHARDED)
    assert loaded.shape == shape
    for old, new in zip(*map(jax.tree.leaves, (model, loaded)), strict=True):
        np.testing.assert_array_equal(old, new)

    save_model(random_weights(SHAPE), tmp_path / "qwen2", dtype="float32")
    (tmp_path / "qwen2" / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight: missing; expected shape \[6\]"):
        load_model(str(tmp_path / "qwen2"), mesh_of(1, 1), TENSOR)
