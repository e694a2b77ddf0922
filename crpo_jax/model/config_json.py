"""config.json: what it says of a model's shape, read and written; what it says and this package lacks is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from crpo_jax.errors import InputError
from crpo_jax.model.architecture import ARCHITECTURES
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape

SIZE_KEYS = {
    "d": "hidden_size",
    "n": "num_attention_heads",
    "k": "num_key_value_heads",
    "f": "intermediate_size",
    "v": "vocab_size",
    "l": "num_hidden_layers",
}
"""The keys of config.json by the dim they give."""

READ_KEYS = {
    *SIZE_KEYS.values(),
    *("head_dim", "hidden_act", "model_type", "rms_norm_eps", "tie_word_embeddings"),
    *("rope_parameters", "rope_scaling", "rope_theta"),
    *("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
}
"""What is read in every family."""

GEMMA_KEYS = {
    *("hidden_activation", "query_pre_attn_scalar", "rope_local_base_freq"),
    *("sliding_window_pattern", "_sliding_window_pattern"),
}

HARMLESS_KEYS = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"),
    *("max_position_embeddings", "cache_implementation", "initializer_range", "use_cache", "use_mrope"),
    *("attn_implementation", "_attn_implementation", "gradient_checkpointing"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "is_decoder", "is_encoder_decoder"),
    *("unsloth_version", "unsloth_fixed", "pretraining_tp"),
}
"""What a config.json may hold besides: nothing in it changes the logits of a model without dropout."""

NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "attention_multiplier": (1, None),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (1, None),
    "final_logit_softcapping": (None,),
    "hidden_dropout": (0, None),
    "layer_norm_type": ("rms_norm", None),
    "logit_scale": (1, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "residual_multiplier": (1, None),
    "tie_encoder_decoder": (False, None),
    "use_bidirectional_attention": (False, None),
    "use_qk_norm": (False, None),
    "vision_config": (None,),
}
"""What would change the mathematics, and the values at which it does not."""

ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each scaling of the rotary frequencies reads, besides its type and rope_theta."""

NEUTRAL_ROPE: Mapping[str, tuple[Any, ...]] = {
    "attention_factor": (1, None),
    "factor": (1, None),
    "partial_rotary_factor": (1, None),
}
"""The neutral values of what a scaling does not read."""

NULLABLE_KEYS = {
    *("head_dim", "rope_theta", "rope_local_base_freq", "layer_types", "use_sliding_window"),
    *("sliding_window_pattern", "max_window_layers"),
}
"""Keys whose null means what their absence does."""

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
SLIDING, FULL = "sliding_attention", "full_attention"

COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"max_window_layers": 28},
    "qwen3": {"max_window_layers": 28, "head_dim": 128},
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
    },
}
"""What transformers assumes where config.json is silent, by model_type."""


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape that a config.json describes. Raises InputError, naming the key, for what is not implemented."""
    return ConfigReader(config, where).read()


def read_shape(folder: str | Path) -> Shape:
    """The shape of a Hugging Face model folder."""
    path = Path(folder) / "config.json"
    return shape_of(read_mapping(path, "model.path: "), str(path))


def read_mapping(path: Path, prefix: str = "") -> dict[str, Any]:
    """The JSON object in a file; `prefix` opens the message where the file cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{prefix}{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping, got {content!r:.60}")
    return content


class ConfigReader:
    """Checks of one config.json, whose errors name the file and the key."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.given, self.where = config, config, where
        self.model_type = self.option("model_type", config.get("model_type", "qwen2"), *ARCHITECTURES)
        given = {key: value for key, value in config.items() if value is not None or key not in NULLABLE_KEYS}
        self.config = COMMON_DEFAULTS | DEFAULTS[self.model_type] | given

    def refuse(self, key: str, expected: str, value: Any) -> NoReturn:
        raise InputError(f"{self.where}: {key}: expected {expected}, got {value!r}")

    def option(self, key: str, value: Any, *allowed: Any) -> Any:
        names = list(map(repr, allowed))
        expected = " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
        return value if value in allowed else self.refuse(key, expected, value)

    def whole(self, key: str, value: Any) -> int:
        return value if type(value) is int and value > 0 else self.refuse(key, "a positive whole number", value)

    def number(self, key: str, value: Any) -> float:
        return (
            float(value) if type(value) in (int, float) and value > 0 else self.refuse(key, "a positive number", value)
        )

    def mapping(self, key: str, value: Any) -> Mapping[str, Any]:
        return value if isinstance(value, dict) else self.refuse(key, "a mapping", value)

    def read(self) -> Shape:
        config, gemma = self.config, self.model_type == "gemma3_text"
        for key in sorted(config.keys() & NEUTRAL_VALUES.keys()):
            self.option(key, config[key], *NEUTRAL_VALUES[key])
        biased = any("bias" in weight.name for weight in ARCHITECTURES[self.model_type].weights)
        for key in ("attention_bias", "qkv_bias"):
            self.option(key, config.get(key, biased), biased)
        activation = ACTIVATIONS[ARCHITECTURES[self.model_type].activation]
        key = "hidden_activation" if gemma else "hidden_act"
        self.option(key, config.get(key, activation), activation)
        sizes = {dim: self.whole(key, config.get(key)) for dim, key in SIZE_KEYS.items()}
        rope, window_rope = self.read_ropes()
        windowed = self.read_windows(sizes["l"])
        return Shape(
            **sizes,
            h=self.read_head_width(sizes["d"], sizes["n"], sizes["k"]),
            tied=bool(self.option("tie_word_embeddings", config["tie_word_embeddings"], True, False)),
            rope=rope,
            norm_eps=self.number("rms_norm_eps", config["rms_norm_eps"]),
            model_type=self.model_type,
            window=self.whole("sliding_window", config.get("sliding_window")) if any(windowed) else 0,
            window_rope=window_rope,
            layers_windowed=windowed if any(windowed) else (),
            score_width=self.whole("query_pre_attn_scalar", config["query_pre_attn_scalar"]) if gemma else None,
        )

    def read_head_width(self, d: int, n: int, k: int) -> int:
        h = self.config.get("head_dim")
        if n % k:
            self.refuse("num_attention_heads", f"a multiple of num_key_value_heads={k}", n)
        if not h and d % (2 * n):
            self.refuse("hidden_size", f"an even multiple of num_attention_heads={n}", d)
        if h and self.whole("head_dim", h) % 2:
            self.refuse("head_dim", "an even number", h)
        return h or d // n

    def read_windows(self, layers: int) -> tuple[bool, ...]:
        """Of each layer, whether it attends to the last `sliding_window` tokens only; by layer_types or a family's
        rule."""
        config = self.config
        if (types := config.get("layer_types")) is not None:
            if not isinstance(types, list) or len(types) != layers:
                self.refuse("layer_types", f"a list of num_hidden_layers={layers} names", types)
            no_windows = self.model_type in ("qwen2", "qwen3") and not config.get("use_sliding_window")
            allowed = (FULL,) if no_windows or self.model_type == "llama" else (FULL, SLIDING)
            return tuple(self.option("layer_types", kind, *allowed) == SLIDING for kind in types)
        if self.model_type == "gemma3_text":
            pattern = self.whole("sliding_window_pattern", config["sliding_window_pattern"])
            return tuple((layer + 1) % pattern != 0 for layer in range(layers))
        if self.model_type == "mistral":
            return (config["sliding_window"] is not None,) * layers
        if self.option("use_sliding_window", config.get("use_sliding_window", False), True, False):
            first = config.get("max_window_layers")
            if type(first) is not int or first < 0:
                self.refuse("max_window_layers", "a whole number of at least 0", first)
            return tuple(layer >= first for layer in range(layers))
        return (False,) * layers

    def read_ropes(self) -> tuple[Rope, Rope | None]:
        """The rotary frequencies of layers that see every token, and of those with a window where they differ.

        rope_parameters and rope_scaling are two names of one thing; where both are given they must agree.
        """
        given = [key for key in ("rope_parameters", "rope_scaling") if self.config.get(key)]
        read = [self.read_ropes_at(key, self.mapping(key, self.config[key])) for key in given]
        for key, other in zip(given[1:], read[1:], strict=True):
            if other != read[0]:
                self.refuse(key, f"what {given[0]} says", self.config[key])
        return read[0] if read else self.read_ropes_at("rope_parameters", {})

    def read_ropes_at(self, place: str, parameters: Mapping[str, Any]) -> tuple[Rope, Rope | None]:
        if self.model_type != "gemma3_text":
            return self.read_rope(place, parameters, "rope_theta"), None
        if FULL not in parameters and SLIDING not in parameters:  # a scaling is that of the layers without a window
            return self.read_rope(place, parameters, "rope_theta"), self.read_rope(place, {}, "rope_local_base_freq")
        full, sliding = (self.mapping(f"{place}.{key}", parameters.get(key)) for key in (FULL, SLIDING))
        return (
            self.read_rope(f"{place}.{FULL}", full, "rope_theta"),
            self.read_rope(f"{place}.{SLIDING}", sliding, "rope_local_base_freq"),
        )

    def read_rope(self, place: str, parameters: Mapping[str, Any], theta_key: str) -> Rope:
        """Frequencies by one mapping; their base may stand in it or beside it, and where in both, both are equal."""
        kind_key = "rope_type" if "rope_type" in parameters else "type"
        kind = self.option(f"{place}.{kind_key}", parameters.get(kind_key, "default"), *ROPE_KEYS)
        for key in sorted(parameters.keys() - {"rope_theta", "rope_type", "type", *ROPE_KEYS[kind]}):
            self.option(f"{place}.{key}", parameters[key], *NEUTRAL_ROPE.get(key, (None,)))
        beside, inside = self.given.get(theta_key), parameters.get("rope_theta")
        theta = self.number(theta_key, self.config[theta_key] if inside is None else inside)
        if beside is not None and inside is not None:
            self.option(f"{place}.rope_theta", inside, beside)

        def number(key: str) -> float:
            return self.number(f"{place}.{key}", parameters.get(key))

        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, kind, number("factor"))
        key = "original_max_position_embeddings"
        context = self.whole(f"{place}.{key}", parameters.get(key))
        return Rope(theta, kind, number("factor"), number("low_freq_factor"), number("high_freq_factor"), context)


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """What a config.json sets without anyone here knowing what it means."""
    known = READ_KEYS | HARMLESS_KEYS | NEUTRAL_VALUES.keys() | {"attention_bias", "qkv_bias"}
    known |= GEMMA_KEYS if config.get("model_type") == "gemma3_text" else set()
    return sorted(key for key in config.keys() - known if config[key] is not None)


def config_of(
    shape: Shape, dtype: str, token_ids: Mapping[str, Any], max_position_embeddings: int = 32768
) -> dict[str, Any]:
    """The config.json of a shape, with the keys of published models; `shape_of` reads it back.

    Like those of Qwen it has no pad_token_id: transformers would use it as the embedding's padding_idx, a row without
    gradient.
    """
    activation, gemma = ACTIVATIONS[shape.architecture.activation], shape.model_type == "gemma3_text"
    default_width = DEFAULTS[shape.model_type].get("head_dim", shape.d // shape.n)
    settings = {
        "architectures": [shape.architecture.class_name],
        "attention_dropout": 0.0,
        **{key: token_ids[key] for key in ("bos_token_id", "eos_token_id") if key in token_ids},
        **({} if shape.h == default_width else {"head_dim": shape.h}),
        **{key: getattr(shape, dim) for dim, key in SIZE_KEYS.items()},
        ("hidden_activation" if gemma else "hidden_act"): activation,
        "initializer_range": 0.02,
        "max_position_embeddings": max_position_embeddings,
        "model_type": shape.model_type,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope.theta,
        **({} if shape.rope.scaling == "default" else {"rope_scaling": rope_scaling(shape.rope)}),
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        **window_settings(shape),
    }
    if gemma:
        assert shape.window_rope is not None
        settings |= {"query_pre_attn_scalar": shape.score_width, "rope_local_base_freq": shape.window_rope.theta}
    return dict(sorted(settings.items()))


def rope_scaling(rope: Rope) -> dict[str, Any]:
    settings: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        settings |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
        settings |= {"original_max_position_embeddings": rope.original_context}
    return settings


def window_settings(shape: Shape) -> dict[str, Any]:
    """What config.json says of windows, by family."""
    if shape.model_type == "llama":
        return {}
    if shape.model_type == "mistral":
        return {"sliding_window": shape.window or None}
    if not shape.window:
        return {"layer_types": [FULL] * shape.l} if shape.model_type == "gemma3_text" else {"use_sliding_window": False}
    kinds = [SLIDING if windowed else FULL for windowed in shape.windowed]
    settings = {"layer_types": kinds, "sliding_window": shape.window}
    return settings if shape.model_type == "gemma3_text" else settings | {"use_sliding_window": True}
