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
    return ConfigReader(config, where).shape()


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
        self.config, self.where = config, where
        self.model_type = self.option("model_type", config.get("model_type", "qwen2"), *ARCHITECTURES)
        self.config = COMMON_DEFAULTS | DEFAULTS[self.model_type] | {
            key: value for key, value in config.items() if value is not None or key == "sliding_window"
        }  # fmt: skip

    def refuse(self, key: str, expected: str, value: Any) -> NoReturn:
        raise InputError(f"{self.where}: {key}: expected {expected}, got {value!r}")

    def option(self, key: str, value: Any, *allowed: Any) -> Any:
        return value if value in allowed else self.refuse(key, " or ".join(map(repr, allowed)), value)

    def whole(self, key: str, value: Any) -> int:
        return value if type(value) is int and value > 0 else self.refuse(key, "a positive whole number", value)

    def number(self, key: str, value: Any) -> float:
        return (
            float(value) if type(value) in (int, float) and value > 0 else self.refuse(key, "a positive number", value)
        )

    def mapping(self, key: str, value: Any) -> Mapping[str, Any]:
        return value if isinstance(value, dict) else self.refuse(key, "a mapping", value)

    def shape(self) -> Shape:
        config, gemma = self.config, self.model_type == "gemma3_text"
        activation = ACTIVATIONS[ARCHITECTURES[self.model_type].activation]
        key = "hidden_activation" if gemma else "hidden_act"
        self.option(key, config.get(key, activation), activation)
        sizes = {dim: self.whole(key, config.get(key)) for dim, key in SIZE_KEYS.items()}
        rope, window_rope = self.ropes()
        windowed = self.layers_windowed(sizes["l"])
        return Shape(
            **sizes,
            h=self.head_width(sizes["d"], sizes["n"], sizes["k"]),
            tied=bool(self.option("tie_word_embeddings", config["tie_word_embeddings"], True, False)),
            rope=rope,
            norm_eps=self.number("rms_norm_eps", config["rms_norm_eps"]),
            model_type=self.model_type,
            window=self.whole("sliding_window", config.get("sliding_window")) if any(windowed) else 0,
            window_rope=window_rope,
            layers_windowed=windowed if any(windowed) else (),
            score_width=self.whole("query_pre_attn_scalar", config["query_pre_attn_scalar"]) if gemma else None,
        )

    def head_width(self, d: int, n: int, k: int) -> int:
        h = self.config.get("head_dim")
        if n % k:
            self.refuse("num_attention_heads", f"a multiple of num_key_value_heads={k}", n)
        if not h and d % (2 * n):
            self.refuse("hidden_size", f"an even multiple of num_attention_heads={n}", d)
        if h and self.whole("head_dim", h) % 2:
            self.refuse("head_dim", "an even number", h)
        return h or d // n

    def layers_windowed(self, layers: int) -> tuple[bool, ...]:
        """Of each layer, whether it attends to the last `sliding_window` tokens only; by layer_types or a family's
        rule."""
        config = self.config
        if (types := config.get("layer_types")) is not None:
            if not isinstance(types, list) or len(types) != layers:
                self.refuse("layer_types", f"a list of num_hidden_layers={layers} names", types)
            return tuple(self.option("layer_types", kind, FULL, SLIDING) == SLIDING for kind in types)
        if self.model_type == "gemma3_text":
            pattern = self.whole("sliding_window_pattern", config["sliding_window_pattern"])
            return tuple((layer + 1) % pattern != 0 for layer in range(layers))
        if self.model_type == "mistral":
            return (config["sliding_window"] is not None,) * layers
        if self.option("use_sliding_window", config.get("use_sliding_window", False), True, False):
            first = self.whole("max_window_layers", config.get("max_window_layers"))
            return tuple(layer >= first for layer in range(layers))
        return (False,) * layers

    def ropes(self) -> tuple[Rope, Rope | None]:
        """The rotary frequencies of layers that see every token, and of those with a window where they differ."""
        config = self.config
        parameters = self.mapping("rope_parameters", config.get("rope_parameters") or config.get("rope_scaling") or {})
        if self.model_type != "gemma3_text":
            return self.rope(parameters, config["rope_theta"]), None
        if FULL in parameters or SLIDING in parameters:
            full, sliding = (self.mapping(f"rope_parameters.{key}", parameters.get(key)) for key in (FULL, SLIDING))
        else:
            full, sliding = parameters, {}
        return self.rope(full, config["rope_theta"]), self.rope(sliding, config["rope_local_base_freq"])

    def rope(self, parameters: Mapping[str, Any], theta: Any) -> Rope:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        kind = self.option("rope_parameters.rope_type", kind, "default", "linear", "llama3")
        theta = self.number("rope_theta", parameters.get("rope_theta") or theta)

        def number(key: str) -> float:
            return self.number(f"rope_parameters.{key}", parameters.get(key))

        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, kind, number("factor"))
        context = parameters.get("original_max_position_embeddings")
        context = self.whole("rope_parameters.original_max_position_embeddings", context)
        return Rope(theta, kind, number("factor"), number("low_freq_factor"), number("high_freq_factor"), context)


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
