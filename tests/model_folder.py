"""Folders of tiny models as their publishers would make them: a tokenizer of the family's kind with its chat template,
config.json, generation_config.json and random weights."""

import functools
import json
from pathlib import Path

import numpy as np
from chat_templates import FAMILIES, Family
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer

from crpo_jax.data.vignettes import teacher_response, vignettes
from crpo_jax.model.config_json import shape_of
from crpo_jax.model.huggingface import model_tensors

VOCABULARY = 512
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

COMMON = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
SIZES = {
    "qwen2.5": {"model_type": "qwen2", "num_hidden_layers": 1},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 1, "head_dim": 16},
    "llama3.1": {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", "num_hidden_layers": 1, "sliding_window": 48},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 48,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
}


@functools.cache
def corpus() -> list[str]:
    return [text for question in vignettes("train", 60) for text in (question.question, teacher_response(question, 0))]


def byte_level(tokens: tuple[str, ...]) -> Tokenizer:
    """As Qwen's and Llama 3's."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = VOCABULARY - len(tokens)
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def pieces(tokens: tuple[str, ...], prefix: bool) -> Tokenizer:
    """As Gemma's, and with `prefix` as Mistral's, whose texts begin with a space that decoding removes."""
    replace = normalizers.Replace(" ", SPACE)
    trained = Tokenizer(BPE())
    trained.normalizer = replace
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trained.train_from_iterator(
        corpus(), BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*tokens, *BYTES], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    unknown = "<unk>"
    tokenizer = Tokenizer(BPE(model["vocab"], merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    if prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and XLM's: pieces with scores; every character of the corpus, bytes, and some words."""
    words = sorted({f"{SPACE}{word}" for text in corpus()[:6] for word in text.split()})
    characters = sorted({SPACE, *"".join(corpus())} - {" "})
    vocabulary = [("<unk>", 0.0), *((byte, -9.0) for byte in BYTES)]
    vocabulary += [(character, -5.0) for character in characters] + [(word, -3.0) for word in words]
    known = dict(vocabulary)
    tokenizer = Tokenizer(Unigram(list(known.items()), 0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def build_tokenizer(name: str) -> Tokenizer:
    family = FAMILIES[name]
    tokenizer = byte_level(family.tokens) if family.byte_level else pieces(family.tokens, prefix=name == "mistral")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.tokens])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.text_tokens])
    if family.bos:
        of_bos = [(family.bos, tokenizer.token_to_id(family.bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=of_bos)
    return tokenizer


def write_tokenizer(folder: Path, name: str, family: Family | None = None, as_file: bool = False) -> Path:
    """tokenizer.json, tokenizer_config.json and generation_config.json; on demand the template in its own file."""
    family, tokenizer = family or FAMILIES[name], build_tokenizer(name)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": family.bos,
        "clean_up_tokenization_spaces": name.startswith("llama"),  # as published
        "eos_token": family.eos,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if as_file else {"chat_template": family.template}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if as_file:
        (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    ids = [tokenizer.token_to_id(token) for token in family.stops]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids if len(ids) > 1 else ids[0]}))
    return folder


def write_model(folder: Path, name: str) -> Path:
    """A whole model folder."""
    write_tokenizer(folder, name, as_file=name in ("qwen3", "gemma3"))
    size = build_tokenizer(name).get_vocab_size() + 8
    sizes = {**COMMON, "vocab_size": size, "max_position_embeddings": 1024, **SIZES[name]}
    (folder / "config.json").write_text(json.dumps(sizes))
    draw = np.random.default_rng(0)
    weights = {
        tensor.key: (draw.normal(size=tensor.sizes) * 0.1 + ("norm" in tensor.key)).astype(np.float32)
        for tensor in model_tensors(shape_of(sizes))
    }
    save_file(weights, folder / "model.safetensors")
    return folder
