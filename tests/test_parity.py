"""A model folder gives the same logits as transformers in float32, in the training forward and in the sampler.

Where torch is installed, random models written by transformers are compared live. Everywhere, a model with weights from
a fixed seed must give recorded logits of transformers (and a live test checks that they are current).
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from safetensors.numpy import load_file, save_file

from crpo_jax.model.decode import Cache, Shard, decode, prefill
from crpo_jax.model.huggingface import load_model, save_model
from crpo_jax.model.lora import Policy
from crpo_jax.model.placement import to_sampler
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.layout import TENSOR
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import Engine

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOLERANCE = 1e-4


def load(folder: Path) -> Transformer:
    return load_model(str(folder), mesh_of(1, 1), TENSOR)


def trainer_logits(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """[b, t, v] by the training forward."""
    return np.asarray(jax.jit(lambda model, tokens: model.logits(model(tokens)))(model, tokens))


def sampler_logits(model: Transformer, prompts: list[np.ndarray], responses: np.ndarray) -> np.ndarray:
    """[b, s + 1, v] by prefill and decode of the given responses [b, s]; b = p * g rows, prompt-major."""
    shape, lengths = model.shape, jnp.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), max(len(prompt) for prompt in prompts)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    b, s = responses.shape
    weights = to_sampler(shape, mesh_of(1, 1), "float32")(Policy(model))
    first, prompt_cache = jax.jit(lambda weights, tokens: prefill(weights, tokens, lengths, shape, Shard(None), "xla"))(
        weights, tokens
    )
    before = jnp.repeat(lengths, b // len(prompts))
    step = jax.jit(
        lambda weights, tokens, cursor, cache: decode(
            weights, tokens, before + cursor, lengths, cursor, cache, shape, Shard(None)
        )
    )
    cache = [Cache(k, v, *(jnp.zeros((b, shape.k, s, shape.h)) for _ in range(2))) for k, v in prompt_cache]
    logits = [np.repeat(np.asarray(first), b // len(prompts), axis=0)]
    for cursor in range(s):
        of_token, cache = step(weights, responses[:, cursor], np.int32(cursor), cache)
        logits.append(np.asarray(of_token))
    return np.stack(logits, axis=1)


# --- recorded: runs everywhere ----------------------------------------------------------------------------------------

RECORDED_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
    "model_type": "qwen2",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 67,
}
RECORDED_TOKENS = np.array([[5, 66, 0, 13, 41, 7, 7, 29, 58, 1]])
RECORDED_AT = [(0, 3), (0, 66), (1, 0), (2, 17), (3, 50), (4, 31), (5, 5), (6, 44), (7, 12), (8, 63), (9, 0), (9, 33)]
"""(position, vocabulary entry) of RECORDED_LOGITS."""
RECORDED_LOGITS = [
    -1.139475,
    0.202701,
    -0.398475,
    1.435741,
    -0.213097,
    0.241412,
    0.4495,
    -0.054763,
    2.261799,
    0.758624,
    -1.554924,
    2.417773,
]
"""By transformers 5.23.0 and torch 2.13.0 on a CPU."""


def recorded_folder(folder: Path) -> Path:
    """Weights of RandomState(0), a stream that numpy guarantees never to change, under keys written out by hand."""
    d, heads, kv, f, v = 48, 6 * 8, 2 * 8, 80, 67
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (v, d),
    }
    for layer in range(2):
        block = f"model.layers.{layer}"
        sizes |= {
            f"{block}.input_layernorm.weight": (d,),
            f"{block}.self_attn.q_proj.weight": (heads, d),
            f"{block}.self_attn.q_proj.bias": (heads,),
            f"{block}.self_attn.k_proj.weight": (kv, d),
            f"{block}.self_attn.k_proj.bias": (kv,),
            f"{block}.self_attn.v_proj.weight": (kv, d),
            f"{block}.self_attn.v_proj.bias": (kv,),
            f"{block}.self_attn.o_proj.weight": (d, heads),
            f"{block}.post_attention_layernorm.weight": (d,),
            f"{block}.mlp.gate_proj.weight": (f, d),
            f"{block}.mlp.up_proj.weight": (f, d),
            f"{block}.mlp.down_proj.weight": (d, f),
        }
    rng = np.random.RandomState(0)
    weights = {
        key: ((rng.standard_normal(size) * 0.2) + ("norm" in key)).astype(np.float32) for key, size in sizes.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(RECORDED_CONFIG))
    return folder


def test_recorded_logits(tmp_path: Path):
    model, tokens = load(recorded_folder(tmp_path)), RECORDED_TOKENS
    ours = trainer_logits(model, tokens)[0]
    sampled = sampler_logits(model, [tokens[0, :4]], tokens[:, 4:])[0]
    at = tuple(np.array(RECORDED_AT).T)
    np.testing.assert_allclose(ours[at], RECORDED_LOGITS, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(sampled, ours[3:], rtol=0, atol=TOLERANCE)


# --- live: needs torch ------------------------------------------------------------------------------------------------


def torch_and_transformers() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        pytest.skip(
            f"parity with live transformers needs torch and transformers, pip install 'crpo_jax[parity]': {error}"
        )
    return torch, transformers


def reference_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    torch, transformers = torch_and_transformers()
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def test_recorded_logits_are_transformers(tmp_path: Path):
    theirs = reference_logits(recorded_folder(tmp_path), RECORDED_TOKENS)[0]
    np.testing.assert_allclose(theirs[tuple(np.array(RECORDED_AT).T)], RECORDED_LOGITS, rtol=0, atol=1e-5)


SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
}
QWEN, GEMMA = {"num_attention_heads": 4, "num_key_value_heads": 2}, {"num_hidden_layers": 7, "sliding_window": 5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, tied": ("qwen2", QWEN | {"tie_word_embeddings": True}),
    "qwen2, untied, 4 KV heads": (
        "qwen2",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 1e6},
    ),
    "qwen2, tied, wide head": (
        "qwen2",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 24},
    ),
    "qwen2, narrow head, windows from layer 1": (
        "qwen2",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3, tied": ("qwen3", QWEN | {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3, head wider than d / n": ("qwen3", QWEN | {"tie_word_embeddings": False, "head_dim": 32}),
    "qwen3, one KV head": (
        "qwen3",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "llama, scaled frequencies": ("llama", QWEN | {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, plain, all KV heads": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama, linear frequencies, own head width": (
        "llama",
        QWEN | {"head_dim": 12, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral, window": ("mistral", QWEN | {"sliding_window": 4}),
    "mistral, no window": ("mistral", QWEN | {"sliding_window": None, "rope_theta": 1e6}),
    "mistral, own head width": ("mistral", QWEN | {"sliding_window": 9, "head_dim": 20, "tie_word_embeddings": True}),
    "gemma3, two bases": ("gemma3_text", QWEN | GEMMA | {"head_dim": 16, "query_pre_attn_scalar": 24}),
    "gemma3, linear global frequencies": (
        "gemma3_text",
        QWEN
        | GEMMA
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "gemma3, every second layer global, untied": (
        "gemma3_text",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": False,
        },
    ),
}
"""model_type and settings; windows are shorter than the prompts and responses of the tests."""


def random_transformers_model(name: str, seed: int) -> Any:
    """Every parameter random: transformers starts biases at 0 and norms at 1, which would hide an exchanged key."""
    torch, transformers = torch_and_transformers()
    model_type, settings = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            mean = float("norm" in key and model_type != "gemma3_text")  # Gemma's weights are added to 1
            weight.copy_(torch.tensor(rng.normal(mean, 0.2, weight.shape)))
    return model


SHARD_SIZES = itertools.cycle(["5GB", "100KB", "100KB", "5GB"])


@pytest.mark.parametrize(("name", "max_shard_size"), list(zip(MODELS, SHARD_SIZES)))  # noqa: B905 (endless)
def test_logits_equal_transformers(name: str, max_shard_size: str, tmp_path: Path):
    """A folder by transformers, whole or in shards; right-padded rows; groups that share their prompt's keys."""
    torch, _ = torch_and_transformers()
    theirs = random_transformers_model(name, seed=1)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (max_shard_size == "100KB")
    model = load(tmp_path)
    shape = model.shape

    rng = np.random.default_rng(2)
    prompts = [rng.integers(shape.v, size=length) for length in (3, 11, 7)]
    group, width = 2, 6
    responses = rng.integers(shape.v, size=(len(prompts) * group, width)).astype(np.int32)
    sampled = sampler_logits(model, prompts, responses)
    rows = [np.concatenate([prompts[row // group], response]) for row, response in enumerate(responses)]
    padded = np.array([np.pad(row, (0, 32 - len(row)), constant_values=7) for row in rows])
    trained = trainer_logits(model, padded)
    for row, tokens in enumerate(rows):
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens[None])).logits[0].numpy()
        assert np.abs(expected).max() > 1  # otherwise the tolerance would be loose
        np.testing.assert_allclose(trained[row, : len(tokens)], expected, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(sampled[row], expected[len(prompts[row // group]) - 1 :], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(MODELS, itertools.cycle(["float32", "float32", "bfloat16", "bfloat16"]))),
)
def test_transformers_loads_what_we_export(name: str, dtype: Any, tmp_path: Path):
    """transformers -> load -> save -> transformers: the same parameters bit for bit, the same logits, no extra key."""
    torch, transformers = torch_and_transformers()
    random_transformers_model(name, seed=3).to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    generation = {"eos_token_id": [3, 4], "pad_token_id": 4}
    save_model(load(tmp_path / "theirs"), tmp_path / "ours", dtype=dtype, max_shard_bytes=60_000, generation=generation)
    after, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not any(notes.values()), notes
    assert after.dtype == getattr(torch, dtype)
    assert after.config.eos_token_id == [3, 4]
    assert after.generation_config.eos_token_id == [3, 4]
    assert after.generation_config.pad_token_id == 4
    expected, exported = before.state_dict(), after.state_dict()
    assert expected.keys() == exported.keys()
    assert all(torch.equal(expected[key], exported[key]) for key in expected)
    tokens = torch.tensor(np.random.default_rng(4).integers(SMALL["vocab_size"], size=(2, 9)))
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = {key: value for file in (tmp_path / "ours").glob("*.safetensors") for key, value in load_file(file).items()}
    assert {key: value.tobytes() for key, value in ours.items()} == {
        key: value.tobytes() for key, value in theirs.items()
    }


EVERY_FAMILY = (
    *("qwen2, narrow head, windows from layer 1", "qwen3, tied", "llama, scaled frequencies", "mistral, window"),
    "gemma3, linear global frequencies",
)
"""For greedy generation, which compiles most; CRPO_JAX_EVERY_MODEL=1 takes all."""


@pytest.mark.parametrize("name", MODELS if os.environ.get("CRPO_JAX_EVERY_MODEL") else EVERY_FAMILY)
def test_greedy_generation_is_that_of_transformers(name: str, tmp_path: Path):
    """64 tokens after prompts of several lengths. Rows that end early make the engine gather and merge the others, and
    lengthen caches; in a layer with a window the cache is a ring that goes round many times."""
    torch, _ = torch_and_transformers()
    theirs = random_transformers_model(name, seed=5)
    theirs.save_pretrained(tmp_path)
    model, rng, width = load(tmp_path), np.random.default_rng(6), 64
    prompts = [rng.integers(3, model.shape.v, size=length).tolist() for length in (2, 33, 9, 17, 21, 5)]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            whole = theirs.generate(tokens, attention_mask=mask, max_new_tokens=width, do_sample=False, eos_token_id=-1)
        expected.append(whole[0, len(prompt) :].tolist())
    limits = [64, 20, 64, 9, 40, 64]
    engine = Engine(model.shape, mesh_of(1, 1), Sampling(temperature=0), width, slots=3, chunk=8)
    weights = to_sampler(model.shape, mesh_of(1, 1), "float32")(Policy(model))
    groups = engine.generate(weights, prompts, key=jax.random.key(0), group=1, limits=limits)
    assert [group[0].tokens.tolist() for group in groups] == [
        tokens[:limit] for tokens, limit in zip(expected, limits, strict=True)
    ]
