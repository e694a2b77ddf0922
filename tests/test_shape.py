"""config.json -> Shape: the published configs, both spellings of rope, and one line for everything refused."""

import json
import re
from pathlib import Path

import pytest
from conftest import leaves_by_name

from crpo_jax.errors import InputError
from crpo_jax.model.config_json import read_shape, shape_of, unknown_keys
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape, backward_flops, forward_flops
from crpo_jax.model.transformer import model_shapes, parameter_count

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "qwen2.5"

QWEN_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_3b_has_the_published_number_of_parameters():
    shape = shape_of(QWEN_3B)
    assert shape == Shape(d=2048, n=16, k=2, h=128, f=11008, v=151936, l=36, tied=True, rope=Rope(1e6), norm_eps=1e-6)
    assert parameter_count(shape) == 3_085_938_688


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("3b", 3_085_938_688), ("7b", 7_615_616_512)],
)
def test_published_configs(size: str, parameters: int, tmp_path: Path):
    config = PUBLISHED / f"config-{size}.json"
    if not config.is_file():
        pytest.skip(f"{config.name} is not in shared/data/qwen2.5 beside the repository")
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    assert parameter_count(read_shape(tmp_path)) == parameters


def test_rope_theta_in_both_spellings():
    without = {key: value for key, value in QWEN_3B.items() if key != "rope_theta"}
    assert shape_of(without | {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}) == shape_of(
        QWEN_3B
    )
    assert shape_of(without).rope.theta == 10000.0  # transformers' default


def test_head_dim_is_free_of_the_width():
    assert shape_of(QWEN_3B | {"head_dim": 96}).h == 96
    assert shape_of(QWEN_3B | {"head_dim": None}).h == 128


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"model_type": "qwen3_moe"},
            "config.json: model_type: expected one of 'qwen2', 'qwen3', 'llama', 'mistral', 'gemma3_text', "
            "got 'qwen3_moe'",
        ),
        ({"vision_config": {"depth": 2}}, "config.json: vision_config: expected None, got {'depth': 2}"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act: expected 'silu', got 'gelu'"),
        (
            {"use_sliding_window": True, "max_window_layers": -1, "sliding_window": None},
            "config.json: max_window_layers: expected a whole number of at least 0, got -1",
        ),
        (
            {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": None},
            "config.json: sliding_window: expected a positive whole number, got None",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "config.json: rope_scaling.type: expected one of 'default', 'linear', 'llama3', got 'yarn'",
        ),
        (  # transformers applies the scaling; the mapping beside it used to hide it
            {
                "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
            "config.json: rope_scaling: expected what rope_parameters says, got {'rope_type': 'linear', 'factor': 4.0}",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            "config.json: rope_parameters.rope_theta: expected 1000000.0, got 10000.0",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "config.json: rope_parameters.partial_rotary_factor: expected 1 or None, got 0.5",
        ),
        (
            {"rope_scaling": {"mrope_section": [16, 24, 24]}},
            "config.json: rope_scaling.mrope_section: expected None, got [16, 24, 24]",
        ),
        (
            {"layer_types": ["full_attention"] * 35 + ["sliding_attention"]},
            "config.json: layer_types: expected 'full_attention', got 'sliding_attention'",
        ),
        ({"attention_bias": False}, "config.json: attention_bias: expected True, got False"),
        ({"mlp_bias": True}, "config.json: mlp_bias: expected False or None, got True"),
        ({"attention_dropout": 0.1}, "config.json: attention_dropout: expected 0 or None, got 0.1"),
        ({"partial_rotary_factor": 0.25}, "config.json: partial_rotary_factor: expected 1 or None, got 0.25"),
        (
            {"quantization_config": {"bits": 4}},
            "config.json: quantization_config: expected None, got {'bits': 4}",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "config.json: rope_parameters.factor: expected a positive number, got None",
        ),
        ({"vocab_size": None}, "config.json: vocab_size: expected a positive whole number, got None"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers: expected a positive whole number, got 0"),
        (
            {"intermediate_size": "11008"},
            "config.json: intermediate_size: expected a positive whole number, got '11008'",
        ),
        (
            {"num_key_value_heads": 3},
            "config.json: num_attention_heads: expected a multiple of num_key_value_heads=3, got 16",
        ),
        (
            {"hidden_size": 2050},
            "config.json: hidden_size: expected an even multiple of num_attention_heads=16, got 2050",
        ),
        ({"head_dim": 127}, "config.json: head_dim: expected an even number, got 127"),
    ],
)
def test_refused(changed: dict[str, object], line: str):
    with pytest.raises(InputError) as error:
        shape_of(QWEN_3B | changed)
    assert str(error.value) == line


def test_every_field_of_transformers_qwen2_is_decided_upon():
    """A field that a new transformers adds must be read, or put among the harmless or the neutral ones."""
    transformers = pytest.importorskip("transformers", reason="the fields are those of transformers' Qwen2Config")
    config = transformers.Qwen2Config(tie_word_embeddings=True).to_dict()
    assert shape_of(config).tied
    assert not unknown_keys(dict.fromkeys(config, "set"))
    assert unknown_keys(QWEN_3B | {"attention_sinks": 4, "sink_width": None}) == ["attention_sinks"]


def test_unreadable_config(tmp_path: Path):
    with pytest.raises(InputError, match=r"config\.json: No such file"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: expected JSON, got: "):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3B))
    assert read_shape(tmp_path) == shape_of(QWEN_3B)


def test_names_spell_the_dims():
    """With a different size for every dim, a weight whose name and shape disagree cannot hide."""
    shape = Shape(d=2, n=3, k=5, h=7, f=11, v=13, l=17, tied=False, rope=Rope(1e4), norm_eps=1e-6)
    model = model_shapes(shape)
    in_blocks = leaves_by_name(model.blocks)
    assert len(leaves_by_name(model)) == 15
    for name, weight in leaves_by_name(model).items():
        assert weight.shape == shape.dims("l" * (name in in_blocks) + name.rsplit("_", 1)[1]), name


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"head_dim": "64"}, "head_dim: expected a positive whole number, got '64'"),
        ({"head_dim": -2}, "head_dim: expected a positive whole number, got -2"),
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a positive number, got None"),
        ({"rope_theta": "x"}, "rope_theta: expected a positive number, got 'x'"),
        ({"rope_scaling": [1]}, "rope_scaling: expected a mapping, got [1]"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected True or False, got 'false'"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(changed, expected):
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 256,
        "num_hidden_layers": 2,
    }
    with pytest.raises(InputError, match=re.escape(expected)):
        shape_of({**sizes, **changed})


def test_flops_of_a_forward_pass():
    """By hand: 2 per weight and token, the embedding's look-up none; 4 per query, head width and visible key."""
    s = Shape(d=4, n=2, k=1, h=2, f=8, v=10, l=3, tied=True, rope=Rope(1e4), norm_eps=1e-6)
    block = 4 * (2 * 2) + 2 * 4 * (1 * 2) + (2 * 2) * 4 + 3 * 4 * 8
    attention = 3 * 2 * 2 * 4 * 6 * 6 / 2
    assert forward_flops(s, 6) == 2 * (3 * block + 4 * 10) * 6 + attention
    assert forward_flops(s, 6, 7) == forward_flops(s, 6) + 2 * 7 * 6


def test_flops_of_a_backward_pass():
    """Twice the forward pass if every weight is trained. Under adapters a frozen weight has no gradient of its own."""
    s = Shape(d=4, n=2, k=1, h=2, f=8, v=10, l=3, tied=True, rope=Rope(1e4), norm_eps=1e-6)
    assert backward_flops(s, 6) == 2 * forward_flops(s, 6)
    weights, attention = 2 * (3 * 144 + 4 * 10) * 6, 3 * 2 * 2 * 4 * 6 * 6 / 2
    assert forward_flops(s, 6) == weights + attention
    assert backward_flops(s, 6, 7) == weights + 2 * (2 * 7 * 6) + 2 * attention
