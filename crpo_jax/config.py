"""Every setting once: its type, default, unit and source. Strict YAML, `section.key=value` overrides, no jax.

The defaults are the paper's run on Qwen2.5-3B from a cold start. `source` is "paper" for arXiv 2512.00601, "code" for
the authors' released scripts, "ours" for a decision of this project.
"""

import contextlib
import dataclasses
import difflib
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from crpo_jax.errors import InputError, brief

LARGEST = 2**31 - 1  # of a whole number, where a setting has no bound of its own: what devices count with
LARGEST_FILE = 1_000_000


def setting(
    default: Any, doc: str, *, unit: str = "", source: str = "ours", low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field with what `--help` prints; `low` and `high` are inclusive bounds."""
    return field(default=default, metadata={"doc": doc, "unit": unit, "source": source, "low": low, "high": high})


def section(kind: type, **changed: Any) -> Any:
    """A nested section, optionally with defaults of its own."""
    return field(default_factory=lambda: kind(**changed))


@dataclass(frozen=True)
class ModelShape:
    """A Qwen2 made from scratch; used where `model.path` is empty. Names follow config.json."""

    vocab_size: int = setting(1280, "rows of the embedding", low=1)
    hidden_size: int = setting(128, "width of the residual stream", low=1)
    num_hidden_layers: int = setting(3, "transformer blocks", low=1)
    num_attention_heads: int = setting(4, "query heads", low=1)
    num_key_value_heads: int = setting(2, "key-value heads", low=1)
    intermediate_size: int = setting(384, "width of the feed-forward layer", low=1)
    tie_word_embeddings: bool = setting(True, "the output projection is the embedding")
    rope_theta: float = setting(10000.0, "base of the rotary angles", low=1)
    rms_norm_eps: float = setting(1e-6, "added to the mean square in every norm", low=0)


@dataclass(frozen=True)
class Model:
    path: str = setting(
        "", "a folder in Hugging Face format, or a hub id; empty: a model made from model.shape, with a cold start"
    )
    adapter: str = setting(
        "", "a folder with a LoRA adapter in PEFT's format, merged into model.path before anything else; empty: none"
    )
    shape: ModelShape = section(ModelShape)
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "compute type of weights and activations; masters are float32"
    )


@dataclass(frozen=True)
class Tokenizer:
    path: str = setting("", "a folder with tokenizer.json and tokenizer_config.json; empty: the model's folder")


@dataclass(frozen=True)
class Data:
    source: Literal["vignettes", "medqa", "medmcqa", "medxpertqa", "jsonl"] = setting(
        "medqa", "the kind of questions", source="paper"
    )
    path: str = setting("", "a local file or folder with the training questions; empty: the source's published hub id")
    split: str = setting("train", "the split to train on")
    part: Literal["all", "first_half", "second_half"] = setting(
        "second_half",
        "which deterministic half of the split RL trains on; the cold start takes the other",
        source="paper",
    )
    eval_path: str = setting("", "a local file or folder with held-out questions; empty: as data.path")
    eval_split: str = setting("test", "the split to evaluate on")
    eval_questions: int = setting(512, "held-out questions per evaluation; 0: all of them", low=0)
    prompt: Literal["crpo", "grpo", "grpo_dx", "released", "brief"] = setting(
        "crpo", "the instruction around the question", source="paper"
    )
    system_prompt: str = setting(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "the system turn, the same in cold start, RL and evaluation",
        source="code",
    )
    max_prompt_tokens: int = setting(1024, "longest prompt", unit="tokens", source="code", low=1)
    overlong_prompts: Literal["drop", "error"] = setting(
        "drop", "a prompt over the limit is dropped and counted, or an error; never cut"
    )
    vignettes: int = setting(8192, "vignettes in the embedded world's training split", low=1)


@dataclass(frozen=True)
class Rollout:
    max_new_tokens: int = setting(4096, "longest response", unit="tokens", source="code", low=1)
    temperature: float = setting(
        0.6,
        "logits are divided by it, in sampling and in every log-prob; 0 is greedy (evaluation only)",
        source="code",
        low=0,
    )
    top_p: float = setting(1.0, "smallest set of tokens with this probability; 1 is off", source="code", low=0, high=1)
    top_k: int = setting(0, "most probable tokens kept; 0 is off", source="code", low=0)
    slots: int = setting(128, "rows decoded together on each data shard", unit="rows", low=1)
    chunk: int = setting(16, "decode steps between two looks of the host at the finished rows", unit="tokens", low=1)
    stop: tuple[str, ...] = setting(
        ("<|im_end|>", "<|endoftext|>"), "tokens that end a response; the one drawn belongs to it"
    )


@dataclass(frozen=True)
class CrossReference:
    """When a conclusion counts as citing its analysis (the paper leaves the rule open)."""

    min_terms: int = setting(3, "distinct terms shared by conclusion and dx", low=0)
    min_system2_terms: int = setting(1, "of them, from the System 2 part", low=0)
    min_case_facts: int = setting(1, "whole case facts in question, dx and conclusion alike", low=0)
    min_cited_share: float = setting(1 / 3, "cited terms over the conclusion's distinct terms", low=0, high=1)
    min_distinct_share: float = setting(0.7, "distinct terms over all terms of the conclusion", low=0, high=1)
    max_copied_share: float = setting(
        0.5, "most of the conclusion's word n-grams that may stand verbatim in dx", low=0, high=1
    )
    copy_ngram: int = setting(8, "length of those n-grams", unit="words", low=1)


@dataclass(frozen=True)
class Reward:
    design: str = setting(
        "crpo",
        "crpo, grpo, released, or a user's own as module:function; several: crpo*1.0+my.module:f*0.5",
        source="paper",
    )
    k: float = setting(10.0, "weight of accuracy", source="paper", low=0)
    format: float = setting(1.0, "clinical reasoning: weight of the format", source="paper", low=0)
    citation: float = setting(
        0.5, "clinical reasoning: added where the conclusion cross-references dx", source="paper", low=0
    )
    consistency: float = setting(0.5, "weight of the share of effective tokens", source="paper", low=0)
    min_section_words: int = setting(
        3, "words that System 1, System 2 and the conclusion need each", unit="words", low=0
    )
    grpo_tags: tuple[str, ...] = setting(
        ("think", "answer"), "the two tags of the grpo design; dx, conclusion after a shared cold start"
    )
    cross_reference: CrossReference = section(CrossReference)
    workers: int = setting(2, "scoring processes; 0: in the training process, without time limits", low=0)
    time_limit: float = setting(5.0, "a response's scoring is given up after this", unit="seconds", low=0.001)
    max_failed_share: float = setting(0.1, "the run stops when more of a batch could not be scored", low=0, high=1)


@dataclass(frozen=True)
class Optimizer:
    algorithm: Literal["adamw", "muon"] = setting(
        "adamw",
        "muon: orthogonal momentum for the blocks' matrices, AdamW with Nesterov's momentum elsewhere",
        source="code",
    )
    learning_rate: float = setting(1e-6, "peak learning rate", source="paper", low=0)
    schedule: Literal["constant", "cosine", "linear"] = setting("constant", "after the warm-up", source="code")
    warmup_steps: int = setting(0, "linear warm-up", unit="optimizer steps", source="code", low=0)
    beta1: float = setting(0.9, "AdamW", source="code", low=0, high=1)
    beta2: float = setting(0.999, "AdamW", source="code", low=0, high=1)
    eps: float = setting(1e-8, "AdamW", source="code", low=0)
    weight_decay: float = setting(0.01, "on every tensor, as the authors' trainer has it", source="code", low=0)
    clip_norm: float = setting(1.0, "global gradient norm; 0 is off", source="code", low=0)


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, by the names that config.json's models and PEFT give them."""


@dataclass(frozen=True)
class Lora:
    rank: int = setting(0, "width of the adapters (r); 0: no adapters, every parameter is trained", low=0)
    alpha: float = setting(16.0, "adapters are scaled by alpha / rank", source="code", low=0)
    targets: tuple[str, ...] = setting(LINEAR_LAYERS, "the linear layers that get adapters", source="code")


@dataclass(frozen=True)
class Crpo:
    steps: int = setting(0, "RL steps; 0: as many as crpo.epochs needs", unit="steps", low=0)
    epochs: int = setting(20, "passes over the training questions", source="paper", low=1)
    prompts_per_step: int = setting(512, "questions per rollout", source="code", low=1)
    group_size: int = setting(5, "responses per question (G)", source="paper", low=2)
    mini_batch_prompts: int = setting(16, "questions per optimizer step", source="code", low=1)
    advantage: Literal["grpo", "dr_grpo"] = setting(
        "grpo",
        "rewards less their group's mean, over its deviation (equation 3); dr_grpo: without the deviation (arXiv 2503.20783)",
        source="paper",
    )
    ratio: Literal["token", "sequence"] = setting(
        "token",
        "of probabilities, per token, or one per response (GSPO, arXiv 2507.18071, with aggregation sequence_mean)",
        source="code",
    )
    clip_low: float = setting(0.2, "the ratio is clipped below 1 - clip_low", source="code", low=0, high=1)
    clip_high: float = setting(0.2, "and above 1 + clip_high; DAPO (arXiv 2503.14476) has 0.28", source="code", low=0)
    sequence_clip_low: float = setting(
        3e-4, "the same for ratio=sequence, which moves far less (arXiv 2507.18071, section 5.1)", low=0, high=1
    )
    sequence_clip_high: float = setting(4e-4, "the same for ratio=sequence", low=0)
    dynamic_sampling: int = setting(
        0,
        "further batches of questions sampled at most to replace groups whose rewards are all equal (DAPO)",
        unit="batches",
        low=0,
    )
    kl_coef: float = setting(0.001, "beta, weight of the k3 KL to the frozen start", source="paper", low=0)
    kl_target: float = setting(
        0.0,
        "above 0: kl_coef follows the KL to this mean (arXiv 1909.08593, section 2.2)",
        unit="nats per token",
        low=0,
    )
    kl_gain: float = setting(
        0.1, "of that controller: kl_coef changes by at most 0.2 of it per optimizer step", low=0, high=1
    )
    entropy_coef: float = setting(0.001, "weight of the entropy bonus; 0 is the paper's text", source="code", low=0)
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = setting(
        "token_mean",
        "over all tokens of the mini-batch; per response, then over responses (equation 1); or as if each had rollout.max_new_tokens (Dr. GRPO)",
        source="code",
    )
    truncated: Literal["keep", "mask"] = setting(
        "keep", "responses cut at rollout.max_new_tokens: trained on, or left out of the gradient"
    )


@dataclass(frozen=True)
class Sft:
    path: str = setting(
        "",
        "teacher traces, JSON lines of id, question, options, answer, response; empty with vignettes: the built-in teacher",
    )
    steps: int = setting(0, "optimizer steps; 0: as many as sft.epochs needs", unit="steps", low=0)
    epochs: int = setting(20, "passes over the traces", source="paper", low=1)
    batch_size: int = setting(256, "traces per optimizer step", source="paper", low=1)
    max_tokens: int = setting(
        4096, "longest trace, prompt included; longer ones are dropped and counted", unit="tokens", source="code", low=2
    )
    held_out: float = setting(0.1, "share of the traces kept for the evaluation loss", source="paper", low=0, high=0.9)
    patience: int = setting(
        0,
        "stop after this many epochs without a lower held-out loss; 0: never; the best epoch is kept either way",
        low=0,
    )
    previews: int = setting(
        2, "held-out prompts answered at every evaluation; all kept in samples.jsonl, the first one shown", low=0
    )
    save_every: int = setting(
        0, "a checkpoint every n steps, besides those at the end of every epoch", unit="steps", low=0
    )
    lora: Lora = section(Lora, rank=32)
    optimizer: Optimizer = section(Optimizer, learning_rate=1e-4)


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible server."""

    base_url: str = setting("", "address of the server up to and with /v1, such as http://localhost:8000/v1")
    model: str = setting("", "name of the model on that server")
    key_variable: str = setting(
        "OPENAI_API_KEY", "environment variable that holds the key; where it is unset, none is sent"
    )
    temperature: float = setting(0.0, "sampling temperature", low=0, high=2)
    top_p: float = setting(1.0, "smallest set of tokens with this probability; 1 is off", low=0, high=1)
    sampling: Literal["send", "omit"] = setting(
        "send", "omit: leave temperature and top_p to the server, for models that refuse them"
    )
    max_tokens: int = setting(2048, "longest reply, reasoning included", unit="tokens", low=1)
    limit_name: Literal["max_tokens", "max_completion_tokens"] = setting(
        "max_tokens", "what the server calls that limit"
    )
    concurrency: int = setting(8, "requests under way at the same time", low=1)
    timeout: float = setting(600.0, "a request with no whole reply is given up after this", unit="seconds", low=0.001)
    retries: int = setting(6, "tries after the first, with growing pauses or as Retry-After says", low=0)
    max_reply_bytes: int = setting(8_000_000, "a larger reply is malformed", unit="bytes", low=1)


@dataclass(frozen=True)
class Distill(Endpoint):
    temperature: float = setting(0.6, "sampling temperature, as DeepSeek-R1 asks for", low=0, high=2)
    top_p: float = setting(0.95, "smallest set of tokens with this probability; 1 is off", low=0, high=1)
    max_tokens: int = setting(16384, "longest reply, reasoning included", unit="tokens", low=1)
    prompt: Literal["teacher", "crpo"] = setting(
        "teacher", "ask for reasoning and an answer, converted afterwards, or for the dx format itself"
    )
    attempts: int = setting(1, "tries per question until the answer is right; every reply is kept", low=1)
    questions: int = setting(0, "questions to ask, from the start of the half that RL does not train on; 0: all", low=0)
    convert: Literal["extract", "rewrite"] = setting(
        "extract",
        "traces into the dx format by rules, every sentence the teacher's, or by asking the model again to write it so",
    )


@dataclass(frozen=True)
class Evaluate:
    samples: int = setting(4, "responses per question", source="ours", low=1)
    temperature: float = setting(0.8, "logits are divided by it; 0 is greedy", source="code", low=0)
    top_p: float = setting(0.95, "smallest set of tokens with this probability; 1 is off", source="code", low=0, high=1)
    max_new_tokens: int = setting(4096, "longest response", unit="tokens", source="code", low=1)
    questions: int = setting(
        0, "questions per data set, from its start; 0: all, and of the vignettes data.eval_questions", low=0
    )
    answer: Literal["tagged", "anywhere"] = setting(
        "tagged",
        "where the one box with the answer must stand: in the part that its format gives it, as the rewards ask, or anywhere",
    )
    subjects: tuple[str, ...] = setting(
        ("meta_info", "subject_name", "medical_task", "body_system", "condition"),
        "columns of the questions to tell accuracy apart by, where they are",
    )


@dataclass(frozen=True)
class Judge(Endpoint):
    samples: int = setting(1, "responses judged per question, of those there are", low=1)
    questions: int = setting(0, "questions judged per data set, from its start; 0: all", low=0)
    second: Endpoint = section(Endpoint)


@dataclass(frozen=True)
class Parallel:
    mesh: str = setting("", "data x model, in devices, such as 8x1; empty: all devices on the data axis")
    layout: Literal["zero1", "fsdp", "replicated", "auto"] = setting(
        "zero1",
        "which table of crpo_jax.parallel.layout places the tensors; auto: zero1, or fsdp where that would fill half of a device's memory",
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = setting(
        "auto",
        "causal attention of prompts and training: cuDNN on GPUs, Splash on TPUs, XLA by chunks of queries anywhere; auto follows the devices",
    )
    remat: bool = setting(True, "recompute each block in the backward pass instead of storing its activations")
    unroll: bool = setting(
        False,
        "unroll the blocks in training instead of scanning over them: faster for a few layers, slow to compile for many",
    )
    micro_batch_tokens: int = setting(
        8192, "budget of one forward and backward pass per device, padding included", unit="tokens", low=1
    )
    length_multiple: int = setting(128, "rows are padded to a multiple of this", unit="tokens", low=1)
    logprob_chunk: int = setting(
        512, "tokens whose logits stand in memory at once, per row block", unit="tokens", low=1
    )


@dataclass(frozen=True)
class Limits:
    """Beyond these a run warns and explains, or stops; each is off at 0."""

    skipped: int = setting(
        3, "updates in a row that were not applied, since loss or gradient was not finite: the run stops", low=0
    )
    kl: float = setting(1.0, "mean k3 KL to the start model above this", unit="nats a token", low=0)
    entropy: float = setting(0.01, "entropy of the policy below this", unit="nats a token", low=0)
    zero_variance: float = setting(1.0, "share of groups whose rewards are all equal at or above this", low=0, high=1)
    truncated: float = setting(1.0, "share of responses cut at rollout.max_new_tokens at or above this", low=0, high=1)
    action: Literal["warn", "stop"] = setting("warn", "what to do beyond a limit other than `skipped`")
    patience: int = setting(5, "with stop: after this many steps in a row", unit="steps", low=1)


@dataclass(frozen=True)
class Run:
    seed: int = setting(0, "every random draw of a run follows from it", low=0, high=2**63 - 1)
    save_every: int = setting(10, "a checkpoint every n steps, and at the end; 0: at the end only", unit="steps", low=0)
    eval_every: int = setting(
        20, "a held-out evaluation every n steps, besides before and after; 0: those two only", unit="steps", low=0
    )
    keep: int = setting(2, "newest checkpoints kept", low=1)
    keep_best: int = setting(
        1, "checkpoints kept besides: of those saved at a step that was evaluated too, the highest eval/mean", low=0
    )
    compile_cache: str = setting(
        "~/.cache/crpo_jax",
        "where compiled programs stay for the next start, unless JAX_COMPILATION_CACHE_DIR says; empty: nowhere",
    )
    limits: Limits = section(Limits)


@dataclass(frozen=True)
class Config:
    """All settings of a run, by section."""

    model: Model = section(Model)
    tokenizer: Tokenizer = section(Tokenizer)
    data: Data = section(Data)
    rollout: Rollout = section(Rollout)
    reward: Reward = section(Reward)
    crpo: Crpo = section(Crpo)
    optimizer: Optimizer = section(Optimizer)
    lora: Lora = section(Lora)
    sft: Sft = section(Sft)
    distill: Distill = section(Distill)
    evaluate: Evaluate = section(Evaluate)
    judge: Judge = section(Judge)
    parallel: Parallel = section(Parallel)
    run: Run = section(Run)


def is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def leaves(kind: type = Config, prefix: str = "") -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Every setting by its dotted key: its type, its default and its description."""
    hints, found = typing.get_type_hints(kind), {}
    defaults = kind()
    for item in dataclasses.fields(kind):
        key, hint = prefix + item.name, hints[item.name]
        if is_section(hint):
            inner, nested = getattr(defaults, item.name), leaves(hint, key + ".")
            found |= {
                name: (kind_, get(inner, name[len(key) + 1 :]), meta) for name, (kind_, _, meta) in nested.items()
            }
        else:
            found[key] = (hint, getattr(defaults, item.name), dict(item.metadata))
    return found


def get(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " | ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "list of strings"
    return {int: "whole number", float: "number", bool: "true or false", str: "string"}[kind]


def converted(value: Any, kind: Any, key: str, where: str) -> Any:
    """`value` as `kind`, or an InputError that names the key. A whole number is accepted where a number is asked for."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    if choices is not None:
        fits = isinstance(value, str) and value in choices
    elif typing.get_origin(kind) is tuple:
        fits = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        value = tuple(value) if fits else value
    elif kind is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-6 as a string
            with contextlib.suppress(ValueError):
                value = float(value)
        fits = (
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        )  # no nan, no inf
        value = float(value) if fits else value
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise InputError(f"{where}: {key}: expected {type_name(kind)}, got {brief(value)}")
    for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
        if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise InputError(
                f"{where}: {key}: expected text that a file can hold, without NUL and lone surrogates, got {brief(text)}"
            )
    return value


def build(kind: type, values: Any, where: str, prefix: str = "", base: Any = None) -> Any:
    """A section from a mapping, over `base` (or the defaults); unknown keys, wrong types and bounds are InputErrors."""
    if not isinstance(values, dict):
        raise InputError(
            f"{where}: {prefix.rstrip('.') or 'the file'}: expected a mapping of settings, got {brief(values)}"
        )
    hints, changed = typing.get_type_hints(kind), {}
    fields_ = {item.name: item for item in dataclasses.fields(kind)}
    base = kind() if base is None else base
    for name, value in values.items():
        key = f"{prefix}{name if isinstance(name, str) else brief(name)}"[:200]
        if name not in fields_:
            close = difflib.get_close_matches(str(key[len(prefix) :]), fields_, n=1)
            hint = f"; did you mean {prefix}{close[0]}? The" if close else "; the"
            raise InputError(f"{where}: {key}: unknown key{hint} legal keys here: {', '.join(fields_)}")
        if is_section(hints[name]):
            changed[name] = build(hints[name], {} if value is None else value, where, key + ".", getattr(base, name))
            continue
        value = converted(value, hints[name], key, where)
        low, high = fields_[name].metadata["low"], fields_[name].metadata["high"]
        if high is None and hints[name] is int and value > LARGEST:
            raise InputError(f"{where}: {key}: expected at most {LARGEST}, got {brief(value)}")
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = [f"{bound:g}" if abs(bound) < 1e6 else str(bound) for bound in (low, high) if bound is not None]
            wanted = f"at least {bounds[0]}" if high is None else f"between {' and '.join(bounds)}"
            raise InputError(f"{where}: {key}: expected {wanted}, got {brief(value)}")
        changed[name] = value
    return dataclasses.replace(base, **changed)


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice, which plain YAML would silently overwrite."""


def unique_mapping(loader: UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(
                f"{key_node.start_mark.name}:{line}: expected the name of a setting, got a list or mapping as a key"
            )
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise InputError(
                f"{key_node.start_mark.name}:{line}: <<: expected every setting written out, got a merge key"
            )
        key = loader.construct_object(key_node)
        if key in seen:
            raise InputError(f"{key_node.start_mark.name}:{line}: {key}: written twice, first in line {seen[key]}")
        seen[key] = line
    return loader.construct_mapping(node, deep=True)


def plain_number(loader: UniqueKeyLoader, node: yaml.ScalarNode) -> int | float:
    """YAML 1.1 reads 010 as 8 and 1:30 as 90; whoever wrote that meant something else."""
    whole = node.tag == "tag:yaml.org,2002:int"
    if ":" in node.value or (whole and re.match(r"[-+]?0\d", node.value)):
        raise InputError(
            f"{node.start_mark.name}:{node.start_mark.line + 1}: expected a plain decimal number, got {brief(node.value)}"
        )
    return loader.construct_yaml_int(node) if whole else loader.construct_yaml_float(node)


UniqueKeyLoader.add_constructor("tag:yaml.org,2002:int", plain_number)
UniqueKeyLoader.add_constructor("tag:yaml.org,2002:float", plain_number)
UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, unique_mapping)


def read_yaml(text: str, name: str) -> Any:
    """The text's value; YAML's own errors pass, InputErrors name `name` and the line."""
    loader = UniqueKeyLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except RecursionError:
        raise InputError(f"{name}: expected settings by section, got lists or mappings nested too deeply") from None
    finally:
        loader.dispose()


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = (), model: bool = True) -> Config:
    """The config of a YAML file (None: the defaults) with `section.key=value` overrides, checked as a whole.

    A command that loads no model says `model=False`: what the config says, or does not say, of one is not checked.
    """
    config = Config()
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read(LARGEST_FILE + 1)
            if len(text) > LARGEST_FILE:
                raise InputError(f"--config {path}: expected at most {LARGEST_FILE:,} characters of settings, got more")
            values = read_yaml(text, str(path))
        except OSError as error:
            raise InputError(f"--config {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"--config {path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at offset {error.start}"
            ) from None
        except (
            yaml.YAMLError,
            ValueError,
        ) as error:  # ValueError: a date or number that YAML recognises and cannot hold
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            problem = " ".join(str(getattr(error, "problem", None) or error).split())
            raise InputError(f"{path}{line}: not valid YAML: {problem}") from None
        config = build(Config, {} if values is None else values, str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override}: expected section.key=value")
        known = leaves()
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            raise InputError(
                f"{key}: unknown key"
                + (f"; did you mean {' or '.join(close)}?" if close else "; --help lists the legal ones")
            )
        try:
            value = text if known[key][0] is str else read_yaml(text, f"override: {key}")
        except (yaml.YAMLError, ValueError):
            value = text
        nested: Any = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        config = build(Config, nested, "override", base=config)
    check(config, model)
    return config


def check(config: Config, model: bool = True) -> None:
    """What single bounds cannot say: settings that contradict each other."""
    c = config
    if c.crpo.prompts_per_step % c.crpo.mini_batch_prompts:
        raise InputError(
            f"crpo.mini_batch_prompts: expected a divisor of crpo.prompts_per_step={c.crpo.prompts_per_step}, got {c.crpo.mini_batch_prompts}"
        )
    if c.crpo.kl_target and not c.crpo.kl_coef:
        raise InputError(
            f"crpo.kl_coef: expected more than 0, from which crpo.kl_target={c.crpo.kl_target} can move it, got 0"
        )
    if c.reward.design == "grpo" and len(c.reward.grpo_tags) != 2:
        raise InputError(f"reward.grpo_tags: expected two tags, got {list(c.reward.grpo_tags)}")
    for where, lora in (("lora", c.lora), ("sft.lora", c.sft.lora)):
        if (
            not lora.targets
            or len(set(lora.targets)) < len(lora.targets)
            or not set(lora.targets) <= set(LINEAR_LAYERS)
        ):
            raise InputError(
                f"{where}.targets: expected some of {', '.join(LINEAR_LAYERS)}, each once, got {list(lora.targets)}"
            )
    if c.model.adapter and not c.model.path:
        raise InputError(
            f"model.adapter: expected model.path beside it, the model that the adapter was trained on, got only {c.model.adapter}"
        )
    for name, optimizer in (("optimizer", c.optimizer), ("sft.optimizer", c.sft.optimizer)):
        for beta in ("beta1", "beta2"):
            if getattr(optimizer, beta) == 1:
                raise InputError(f"{name}.{beta}: expected less than 1, got 1")
        if optimizer.eps == 0:
            raise InputError(f"{name}.eps: expected more than 0, got 0")
    if c.rollout.top_p == 0:
        raise InputError("rollout.top_p: expected more than 0, got 0")
    if c.evaluate.top_p == 0:
        raise InputError("evaluate.top_p: expected more than 0, got 0")
    if model and not c.model.path:
        shape = c.model.shape
        if shape.hidden_size % shape.num_attention_heads:
            raise InputError(
                f"model.shape.hidden_size: expected a multiple of num_attention_heads={shape.num_attention_heads}, got {shape.hidden_size}"
            )
        if shape.num_attention_heads % shape.num_key_value_heads:
            kv = shape.num_key_value_heads
            raise InputError(
                f"model.shape.num_attention_heads: expected a multiple of num_key_value_heads={kv}, got {shape.num_attention_heads}"
            )
        if not c.tokenizer.path:
            raise InputError("tokenizer.path: expected a folder, since model.path is empty and brings none")


def as_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values, in the order of declaration."""
    plain = dataclasses.asdict(config)
    return typing.cast(dict[str, Any], _plain(plain))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def dump(config: Config) -> str:
    """YAML that `load` reads back to the same config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=140)


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every setting that differs."""
    return [f"{key}: {get(old, key)!r} -> {get(new, key)!r}" for key in leaves() if get(old, key) != get(new, key)]


def config_folder() -> Path:
    """Where the shipped configs lie: the repository's configs/, or the copy inside an installed wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def default_config(platform: str) -> Path:
    """The config of a command that is given none: the embedded world on a CPU, the paper's run on accelerators."""
    return config_folder() / ("tiny.yaml" if platform == "cpu" else "clinical_r1_3b.yaml")


def replaced(settings: Config, changed: dict[str, Any]) -> Config:
    """The settings with others in the place of some, by dotted key."""
    for key, value in changed.items():
        nested: Any = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        settings = build(Config, nested, "changed", base=settings)
    return settings
