"""LoRA adapters in PEFT's format, both ways: against the library where it is installed, and against recorded keys."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import SHAPE, mesh_of
from safetensors.numpy import load_file, save_file

from crpo_jax import config
from crpo_jax.errors import InputError
from crpo_jax.model.adapters import Adapters
from crpo_jax.model.huggingface import load_model
from crpo_jax.model.lora import trained_shapes, trained_shardings
from crpo_jax.model.peft import load_adapters, save_adapters
from crpo_jax.parallel.layout import SHARDED, TENSOR

LORA = config.Lora(rank=5, alpha=2.0)


def random_adapters(mesh: Any, lora: config.Lora = LORA) -> Adapters:
    rng = np.random.default_rng(3)
    shapes, shardings = trained_shapes(SHAPE, lora), trained_shardings(SHAPE, lora, SHARDED, mesh)
    return jax.tree.map(lambda leaf, to: jax.device_put(np.float32(rng.normal(size=leaf.shape)), to), shapes, shardings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapters(random_adapters(mesh_of(1, 1)), SHAPE, tmp_path / "adapter", base="some/model")
    return tmp_path / "adapter"


RECORDED = {
    "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": (5, 24),
    "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": (16, 5),
    "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight": (5, 16),
    "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight": (24, 5),
    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (5, 16),
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": (24, 5),
    "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": (5, 16),
    "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight": (12, 5),
    "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": (5, 48),
    "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight": (16, 5),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (5, 16),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (48, 5),
    "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight": (5, 16),
    "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight": (12, 5),
}
"""The first layer's tensors as PEFT 0.21.2 wrote them for a model of SHAPE (a live test checks that it still does)."""


def first_layer(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in tensors.items() if ".layers.0." in key}


def test_the_keys_are_those_that_peft_writes(folder: Path):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert first_layer(tensors) == RECORDED
    assert len(tensors) == SHAPE.l * len(RECORDED)
    settings = json.loads((folder / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 5, "lora_alpha": 2.0, "base_model_name_or_path": "some/model"}
    assert settings | expected == settings
    assert tuple(settings["target_modules"]) == config.LINEAR_LAYERS


@pytest.mark.parametrize(("sizes", "targets"), [((4, 2), config.LINEAR_LAYERS), ((1, 8), ("k_proj", "o_proj"))])
def test_written_and_read_again_are_the_same_bits(tmp_path: Path, sizes: tuple[int, int], targets: tuple[str, ...]):
    mesh = mesh_of(*sizes)
    before = random_adapters(mesh, dataclasses.replace(LORA, targets=targets))
    save_adapters(before, SHAPE, tmp_path / "adapter", base="")
    after = load_adapters(tmp_path / "adapter", SHAPE, mesh, SHARDED)
    assert (after.weights, after.scale, after.rank) == (before.weights, before.scale, 5)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
        np.testing.assert_array_equal(old, new)
    with pytest.raises(InputError, match="expected a new or empty folder"):
        save_adapters(before, SHAPE, tmp_path / "adapter", base="")


def test_bf16_on_request(tmp_path: Path):
    mesh = mesh_of(1, 1)
    save_adapters(random_adapters(mesh), SHAPE, tmp_path / "adapter", base="", dtype="bfloat16")
    loaded = load_adapters(tmp_path / "adapter", SHAPE, mesh, SHARDED)
    for old, new in zip(jax.tree.leaves(random_adapters(mesh)), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(old.astype("bfloat16"), new)


def test_rank_stabilised_scale(folder: Path):
    change(folder, use_rslora=True)
    assert load_adapters(folder, SHAPE, mesh_of(1, 1), TENSOR).scale == pytest.approx(2 / math.sqrt(5))


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


Q = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (r"adapter_config.json: use_dora: expected unset, since it is not supported, got True", {"use_dora": True}, {}),
    (r"peft_type: expected 'LORA', got 'IA3'", {"peft_type": "IA3"}, {}),
    (r"rank_pattern: expected unset", {"rank_pattern": {"q_proj": 8}}, {}),
    (r"r: expected a positive whole number, got 0", {"r": 0}, {}),
    (r"lora_alpha: expected a number, got None", {"lora_alpha": None}, {}),
    (r"layers\.2\.self_attn\.q_proj\.lora_A\.weight: missing; expected shape \[5, 16\]", {}, {Q: None}),
    (
        r"q_proj\.lora_A\.weight: expected shape \[5, 16\] of F32, BF16, F16, got \[4, 16\] F32",
        {},
        {Q: np.zeros((4, 16), np.float32)},
    ),
    (r"expected shape .*, got \[5, 16\] I32", {}, {Q: np.zeros((5, 16), np.int32)}),
    (
        r"lm_head\.lora_A\.weight: extra; expected no such key for a 3-layer qwen2 model",
        {},
        {"base_model.model.lm_head.lora_A.weight": np.zeros((5, 16), np.float32)},
    ),
]


@pytest.mark.parametrize(("message", "settings", "tensors"), REFUSED)
def test_unsupported_settings_and_wrong_tensors_are_refused(
    folder: Path, message: str, settings: dict[str, Any], tensors: dict[str, Any]
):
    change(folder, **settings)
    path = folder / "adapter_model.safetensors"
    changed = load_file(path) | tensors
    save_file({key: value for key, value in changed.items() if value is not None}, path)
    with pytest.raises(InputError, match=message):
        load_adapters(folder, SHAPE, mesh_of(1, 1), TENSOR)


def test_a_pickle_is_not_read(folder: Path):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        InputError, match=r"model.adapter: .*expected adapter_config.json and adapter_model.safetensors"
    ):
        load_adapters(folder, SHAPE, mesh_of(1, 1), TENSOR)


# --- live: needs torch and peft ---------------------------------------------------------------------------------------


def libraries() -> tuple[Any, Any, Any]:
    try:
        import peft as theirs
        import torch
        import transformers
    except ImportError as error:
        pytest.skip(f"parity with live PEFT needs torch and peft, pip install 'crpo_jax[parity]': {error}")
    return torch, transformers, theirs


def adapted_logits(base: Path, adapter: Path, tokens: np.ndarray) -> np.ndarray:
    mesh = mesh_of(1, 1)
    model = load_model(str(base), mesh, TENSOR)
    adapters = load_adapters(adapter, model.shape, mesh, TENSOR)
    forward = jax.jit(lambda model, adapters: model.logits(model(tokens, adapters=adapters)))
    return np.asarray(forward(model, adapters))


@pytest.mark.parametrize("targets", [config.LINEAR_LAYERS, ("q_proj", "o_proj", "down_proj")], ids=["all", "three"])
def test_logits_equal_peft_both_ways(tmp_path: Path, targets: tuple[str, ...]):
    """PEFT writes, we read it and write it again, PEFT reads that: the same logits, and the same bits in the file."""
    torch, transformers, theirs = libraries()
    settings = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    }
    base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    base.save_pretrained(tmp_path / "base")
    model = theirs.get_peft_model(
        base, theirs.LoraConfig(r=5, lora_alpha=3, target_modules=list(targets), task_type="CAUSAL_LM")
    ).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.tensor(rng.normal(size=weight.shape) * 0.2))
    model.save_pretrained(tmp_path / "theirs")
    tokens = rng.integers(40, size=(2, 9))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
        plain = model.get_base_model()
        with model.disable_adapter():
            assert np.abs(plain(torch.tensor(tokens)).logits.numpy() - expected).max() > 0.1
    np.testing.assert_allclose(adapted_logits(tmp_path / "base", tmp_path / "theirs", tokens), expected, atol=1e-4)

    loaded = load_adapters(tmp_path / "theirs", SHAPE, mesh_of(4, 2), SHARDED)
    save_adapters(loaded, SHAPE, tmp_path / "ours", base=str(tmp_path / "base"))
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert {k: value.tobytes() for k, value in before.items()} == {k: value.tobytes() for k, value in after.items()}
    fresh = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
    again = theirs.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(tokens)).logits.numpy(), expected)
    if targets == config.LINEAR_LAYERS:
        assert first_layer(before) == RECORDED
