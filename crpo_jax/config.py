"""Every setting, declared once: type, default, bounds, unit and source; and how YAML files and overrides set them.

The defaults are the paper's run on Qwen2.5-3B after a cold start. A setting's `source` is the section or equation of
the paper, arXiv 2512.00601, that has its default; "authors' code" where only their scripts
(github.com/BoyangGu1/Clinical-R1-3B) or the defaults of verl, which these call, have it; another paper's section; or
"ours", a choice of this project. `tests/test_sources.py` has the words of every source. Nothing here imports jax.
"""

import contextlib
import dataclasses
import difflib
import filecmp
import os
import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from crpo_jax.errors import InputError, brief

LARGEST_WHOLE = 2**31 - 1
"""Upper bound of whole numbers without a tighter one: what 32-bit counters on devices hold."""

LONGEST_FILE = 1_000_000  # characters

ConfigFiles = str | Path | Sequence[str | Path]
"""A YAML file, or several, each over those before it."""

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
"""No unknown keys, no conversions (true is no number, "3" is no whole number), no nan, no infinities.

Validators are built at first use, since scoring processes import this module by the dozen and use next to none of them.
"""


def parse_number(value: Any) -> Any:
    """Text as a float where it is one, since YAML 1.1 reads 1e-6 as text; other values unchanged."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


Whole = Annotated[int, Field(le=LARGEST_WHOLE)]
Count = Annotated[Whole, Field(ge=0)]
PositiveCount = Annotated[Whole, Field(ge=1)]
Real = Annotated[float, BeforeValidator(parse_number)]
Number = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
String = Annotated[str, Field(pattern=r"\A[^\x00]*\z")]
Strings = Annotated[tuple[String, ...], BeforeValidator(lambda text: tuple(text) if isinstance(text, list) else text)]
PositiveCounts = Annotated[
    tuple[PositiveCount, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


Name = Annotated[str, Field(pattern=r"\A[A-Za-z_]\w*\z")]
"""A key of a setting with free keys, which are set one by one."""

PROMPT_NAMES = ("crpo", "grpo", "grpo_dx", "released", "brief", "boxed")
"""The built-in values of data.prompt."""

RENAMED = {"reward.grpo_tags": "reward.tags"}
"""Settings by the names under which the files of earlier runs have them."""


def setting(default: Any, doc: str, *, unit: str = "", source: str = "ours", **bounds: Any) -> Any:
    """A field with what `--help` prints; `bounds` are pydantic's: ge, gt, le, lt."""
    return Field(default, description=doc, json_schema_extra={"unit": unit, "source": source}, **bounds)


def section(kind: type, source: str = "ours", /, **defaults: Any) -> Any:
    """A field with a nested section, optionally with other defaults than the section's own, and their source."""
    extra: Any = {"sources": dict.fromkeys(defaults, source)}
    return Field(default_factory=lambda: kind(**defaults), json_schema_extra=extra)


@dataclass(frozen=True, config=STRICT)
class ModelShape:
    """A Qwen2 with random weights; used when `model.path` is empty. Names follow config.json."""

    vocab_size: PositiveCount = setting(1280, "rows of the embedding")
    hidden_size: PositiveCount = setting(128, "width of the residual stream")
    num_hidden_layers: PositiveCount = setting(3, "transformer blocks")
    num_attention_heads: PositiveCount = setting(4, "query heads")
    num_key_value_heads: PositiveCount = setting(2, "key-value heads")
    intermediate_size: PositiveCount = setting(384, "width of the feed-forward layer")
    tie_word_embeddings: bool = setting(True, "use the embedding as the output projection")
    rope_theta: Real = setting(10000.0, "base of the rotary angles", ge=1)
    rms_norm_eps: Number = setting(1e-6, "added to the mean square in every norm")


@dataclass(frozen=True, config=STRICT)
class Model:
    path: String = setting(
        "", "folder in Hugging Face format, or hub id; empty: random weights in model.shape, then a cold start"
    )
    adapter: String = setting(
        "", "folder with a LoRA adapter in PEFT's format, merged into model.path on loading; empty: none"
    )
    shape: ModelShape = section(ModelShape)
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16", "compute type of weights and activations; master weights are float32"
    )


@dataclass(frozen=True, config=STRICT)
class Tokenizer:
    path: String = setting("", "folder with tokenizer.json and tokenizer_config.json; empty: the model's folder")


@dataclass(frozen=True, config=STRICT)
class Columns:
    """Where a source of one's own has the parts of a question: a column, or a dotted path into a nested one."""

    id: String = setting("id", "column with a unique id; a record without one gets a digest of its question")
    question: String = setting("question", "column with the question")
    messages: String = setting(
        "messages", "column with a conversation in the question's place, which a user's turn ends"
    )
    options: String = setting("options", "column with the options, by letter or as a list")
    answer: String = setting("answer", "column with the right answer")


@dataclass(frozen=True, config=STRICT)
class Data:
    source: Literal[
        "vignettes", "arithmetic", "medqa", "medmcqa", "medxpertqa", "pubmedqa", "mmlu", "healthbench", "gsm8k",
        "math500", "file", "hub", "jsonl",
    ] = setting(
        "medqa",
        "data set; or questions of your own: file (jsonl is the same), or hub with an id in data.path",
        source="paper, section 4.3",
    )  # fmt: skip
    path: String = setting(
        "",
        "local file or folder with the training questions, or with source=hub an id; empty: the source's hub data set",
    )
    config: String = setting(
        "", "named configuration of the hub data set, or several with commas; empty: the source's own"
    )
    answer: Literal["auto", "choice", "number", "text", "none"] = setting(
        "auto",
        "what answers of your own questions are compared as; none: there is no right one. "
        "auto: choice with options, number or text by the answer's type, none without an answer",
    )
    columns: Columns = section(Columns)
    split: String = setting("train", "split to train on", source="paper, section 4.3")
    part: Literal["auto", "all", "first_half", "second_half"] = setting(
        "auto",
        "part of the split that RL trains on: all of it or a fixed half; a cold start takes the other half; "
        "auto: second_half after a cold start on questions of the first, else all",
        source="paper, section 4.3",
    )
    eval_path: String = setting("", "local file or folder with held-out questions; empty: data.path")
    eval_split: String = setting("test", "split to evaluate on", source="paper, section 4.3")
    eval_questions: Count = setting(512, "held-out questions per evaluation; 0: all")
    prompt: String = setting(
        "crpo",
        f"instruction around the question: {', '.join(PROMPT_NAMES)}, worded by this project, or a Jinja file that "
        "writes the whole user turn",
    )
    system_prompt: String = setting(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "system turn, the same in cold start, RL and evaluation: a text, or file:PATH for the text of a file",
        source="authors' code",
    )
    chat_template_kwargs: Annotated[
        dict[Name, JsonValue],
        setting(..., "arguments of the chat template by name, as in data.chat_template_kwargs.enable_thinking=false"),
    ] = dataclasses.field(default_factory=dict, hash=False)
    max_prompt_tokens: PositiveCount = setting(1024, "longest prompt", unit="tokens", source="authors' code")
    overlong_prompts: Literal["drop", "error"] = setting(
        "drop", "drop and count questions with a longer prompt, or stop with an error; prompts are never truncated"
    )
    max_dropped_share: Share = setting(
        0.1, "the run stops before it begins if a larger share of its questions or traces is too long"
    )
    vignettes: PositiveCount = setting(8192, "vignettes in the training split, with source=vignettes")
    problems: PositiveCount = setting(16384, "word problems in the training split, with source=arithmetic")


@dataclass(frozen=True, config=STRICT)
class Rollout:
    max_new_tokens: PositiveCount = setting(4096, "longest response", unit="tokens", source="authors' code")
    temperature: Number = setting(
        0.6,
        "divides the logits, in sampling and in every log-prob; 0: greedy (evaluation only)",
        source="authors' code",
    )
    top_p: Real = setting(
        1.0, "nucleus sampling: probability mass to sample from; 1: off", source="authors' code", gt=0, le=1
    )
    top_k: Count = setting(0, "sample from this many most probable tokens; 0: off", source="authors' code")
    slots: PositiveCount = setting(128, "responses decoded at the same time on each data shard", unit="rows")
    chunk: PositiveCount = setting(16, "decode steps between the host's checks for finished responses", unit="tokens")
    stop: Strings = setting(
        (),
        "tokens that end a response; the one sampled is part of the response; empty: the end of turn of the chat "
        "template, the tokenizer's eos_token and the eos_token_id of generation_config.json",
    )


@dataclass(frozen=True, config=STRICT)
class CrossReference:
    """When a conclusion counts as citing its analysis (the paper leaves the rule open)."""

    min_terms: Count = setting(3, "fewest distinct terms that the conclusion cites from dx")
    min_system2_terms: Count = setting(1, "fewest of these terms that System 2 holds")
    min_case_facts: Count = setting(1, "fewest whole case facts common to question, dx and conclusion")
    min_cited_share: Share = setting(1 / 3, "smallest ratio of cited terms to the conclusion's distinct terms")
    min_distinct_share: Share = setting(0.7, "smallest ratio of the conclusion's distinct terms to all its terms")
    max_copied_share: Share = setting(0.5, "largest share of the conclusion's word n-grams that occur verbatim in dx")
    copy_ngram: PositiveCount = setting(8, "length of these n-grams", unit="words")


@dataclass(frozen=True, config=STRICT)
class Endpoint:
    """A model behind an OpenAI-compatible server."""

    base_url: String = setting("", "address of the server, including /v1, such as http://localhost:8000/v1")
    model: String = setting("", "name of the model on that server")
    key_variable: String = setting("OPENAI_API_KEY", "environment variable with the API key; unset: no key is sent")
    temperature: Real = setting(0.0, "sampling temperature", ge=0, le=2)
    top_p: Share = setting(1.0, "nucleus sampling: probability mass to sample from; 1: off")
    sampling: Literal["send", "omit"] = setting(
        "send", "omit: leave temperature and top_p to the server, for models that refuse them"
    )
    max_tokens: PositiveCount = setting(2048, "longest reply, reasoning included", unit="tokens")
    limit_name: Literal["max_tokens", "max_completion_tokens"] = setting(
        "max_tokens", "name of that limit on the server"
    )
    concurrency: PositiveCount = setting(8, "requests in flight at the same time")
    timeout: Real = setting(600.0, "time after which an unfinished request is given up", unit="seconds", ge=0.001)
    retries: Count = setting(6, "attempts after the first, with growing pauses or as Retry-After says")
    max_reply_bytes: PositiveCount = setting(8_000_000, "a larger reply counts as malformed", unit="bytes")


@dataclass(frozen=True, config=STRICT)
class RewardJudge(Endpoint):
    """The model behind the part `judge` of a design."""

    timeout: Real = setting(60.0, "time after which an unfinished request is given up", unit="seconds", ge=0.001)
    rubric: String = setting(
        "",
        "text file with what the judge assesses, or a whole prompt with {question}, {answer} and {response}; "
        "empty: the criteria in the questions' column rubrics, each by itself",
    )
    lowest: Real = setting(0.0, "with a rubric file: the judge's lowest score, a reward of 0")
    highest: Real = setting(10.0, "with a rubric file: the judge's highest score, a reward of 1")
    time_limit: Real = setting(
        180.0, "time after which a request and its further attempts are given up", unit="seconds", ge=0.001
    )


@dataclass(frozen=True, config=STRICT)
class Reward:
    design: String = setting(
        "crpo",
        "crpo, grpo or released; or a weighted sum of these, of the parts accuracy, format, citation, consistency, "
        "length and judge, and of your own module:function, such as accuracy*10+format+my.module:f*0.5",
        source="paper, section 3",
    )
    k: Number = setting(10.0, "weight of accuracy", source="paper, section 4.3")
    format: Number = setting(1.0, "clinical reasoning: weight of the format", source="paper, section 3")
    citation: Number = setting(
        0.5, "clinical reasoning: bonus if the conclusion cross-references dx", source="paper, section 3"
    )
    consistency: Number = setting(0.5, "weight of the share of effective tokens", source="paper, equation 4")
    overlong: Number = setting(
        0.0, "weight of DAPO's soft overlong punishment (arXiv 2503.14476, equation 13) in training rewards; 0: off"
    )
    overlong_share: Real = setting(
        0.2,
        "share of rollout.max_new_tokens, the last of them, over which that punishment grows from 0 to 1",
        source="arXiv 2503.14476, section 4.1",
        gt=0,
        le=1,
    )
    min_section_words: Count = setting(3, "fewest words in each of System 1, System 2 and the conclusion", unit="words")
    tags: Strings = setting(
        ("think", "answer"),
        "the tagged parts of a response, in order, for format, citation and the grpo design (two of them); "
        "[dx, conclusion] after a cold start shared with crpo",
    )
    target_length: PositiveCount = setting(
        1024, "length: up to this many tokens 0, from there linearly less, -1 from twice as many on", unit="tokens"
    )
    answer_in: String = setting(
        "box",
        "where a response's answer stands: box (\\boxed{...}), tag:NAME, after:MARK (up to the end of the line), or "
        "pattern:REGEX with one group",
    )
    tolerance: Number = setting(
        0.0, "largest difference between a right number and the right answer, as a share of the latter; 0: none"
    )
    cross_reference: CrossReference = section(CrossReference)
    judge: RewardJudge = section(RewardJudge)
    workers: Count = setting(
        2,
        "scoring processes; 0: built-in designs are scored in the training process, your functions in one of their own",
    )
    time_limit: Real = setting(5.0, "time after which scoring a response is given up", unit="seconds", ge=0.001)
    max_failed_share: Share = setting(0.1, "the run stops if a larger share of a batch could not be scored")


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    algorithm: Literal["adamw", "muon"] = setting(
        "adamw",
        "muon: orthogonalized momentum for the blocks' matrices, AdamW with Nesterov momentum for the rest",
        source="authors' code",
    )
    learning_rate: Number = setting(1e-6, "peak learning rate", source="authors' code")
    schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant", "learning rate after the warm-up", source="authors' code"
    )
    warmup_steps: Count = setting(
        0, "linear warm-up; 0: as long as warmup_ratio says", unit="optimizer steps", source="authors' code"
    )
    warmup_ratio: Share = setting(
        0.0,
        "linear warm-up as a share of all optimizer steps, rounded down; only where warmup_steps is 0",
        source="authors' code",
    )
    beta1: Real = setting(0.9, "AdamW: decay of the first moment", source="authors' code", ge=0, lt=1)
    beta2: Real = setting(0.999, "AdamW: decay of the second moment", source="authors' code", ge=0, lt=1)
    eps: Real = setting(1e-8, "AdamW: added to the denominator", source="authors' code", gt=0)
    weight_decay: Number = setting(0.01, "applied to every tensor, also norms and biases", source="authors' code")
    clip_norm: Number = setting(1.0, "global norm that gradients are clipped to; 0: off", source="authors' code")


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, under the names that Hugging Face models and PEFT use."""


@dataclass(frozen=True, config=STRICT)
class Lora:
    rank: Count = setting(
        0, "rank of the adapters (r); 0: no adapters, every parameter is trained", source="authors' code"
    )
    alpha: Number = setting(16.0, "adapters are scaled by alpha / rank")
    targets: Strings = setting(LINEAR_LAYERS, "linear layers that get adapters")


POLICY_LOSSES = ("clip", "cispo", "sapo")
"""The values of crpo.loss besides a user's own."""


@dataclass(frozen=True, config=STRICT)
class Crpo:
    steps: Count = setting(0, "RL steps; 0: as many as crpo.epochs takes", unit="steps")
    epochs: PositiveCount = setting(20, "passes over the training questions", source="paper, section 4.3")
    prompts_per_step: PositiveCount = setting(512, "questions per rollout", source="authors' code")
    group_size: Whole = setting(5, "responses per question (G)", source="paper, section 4.3", ge=2)
    mini_batch_prompts: PositiveCount = setting(16, "questions per optimizer step", source="authors' code")
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = setting(
        "grpo",
        "reward minus its group's mean, divided by the group's standard deviation (equation 3); "
        "dr_grpo: not divided (arXiv 2503.20783); rloo: minus the mean of the group's others (arXiv 2402.14740); "
        "reinforce_plus_plus: normalized over the batch (arXiv 2501.03262); _baseline: after the group's mean is taken "
        "off",
        source="paper, equation 3",
    )
    loss: String = setting(
        "clip",
        "policy loss: clip (PPO's), cispo (arXiv 2506.13585), sapo (arXiv 2511.20347), or your own as module:function",
        source="authors' code",
    )
    old_logprobs: Literal["trainer", "sampler"] = setting(
        "trainer",
        "the ratio's denominator: log-probs of the trainer, which take a forward pass, or those that the sampler drew "
        "with",
        source="authors' code",
    )
    importance: Literal["off", "token", "sequence"] = setting(
        "off",
        "truncated importance sampling (TIS) for the difference of sampler and trainer, by token or by response",
    )
    importance_cap: Real = setting(2.0, "importance weights are truncated at this", ge=1)
    importance_bound: Number = setting(
        0.0, "tokens or responses whose importance weight leaves 1/bound to bound are masked; 0: off"
    )
    ratio: Literal["token", "sequence"] = setting(
        "token",
        "probability ratio per token, or per response (GSPO, arXiv 2507.18071, with aggregation=sequence_mean)",
        source="authors' code",
    )
    clip_low: Share = setting(0.2, "the ratio is clipped below 1 - clip_low", source="authors' code")
    clip_high: Number = setting(
        0.2, "the ratio is clipped above 1 + clip_high; DAPO (arXiv 2503.14476): 0.28", source="authors' code"
    )
    sequence_clip_low: Share = setting(
        3e-4, "clip_low with ratio=sequence, a ratio that varies far less", source="arXiv 2507.18071, section 5.1"
    )
    sequence_clip_high: Number = setting(4e-4, "clip_high with ratio=sequence", source="arXiv 2507.18071, section 5.1")
    sapo_tau_positive: Real = setting(
        1.0, "loss=sapo: temperature of the gate of good responses", source="arXiv 2511.20347", gt=0
    )
    sapo_tau_negative: Real = setting(
        1.05, "loss=sapo: temperature of the gate of the others", source="arXiv 2511.20347", gt=0
    )
    dynamic_sampling: Count = setting(
        0,
        "most extra batches of questions per step, to replace groups whose rewards are all equal (DAPO)",
        unit="batches",
    )
    kl_coef: Number = setting(
        0.001,
        "beta, weight of the KL to the frozen start model; 0: no KL, and no start model is held or run",
        source="authors' code",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = setting(
        "k3", "estimate of the KL per token (joschu.net/blog/kl-approx.html)", source="paper, equation 2"
    )
    kl_in: Literal["loss", "reward"] = setting(
        "loss",
        "the KL is a term of the loss, or taken off a response's reward, as the KL of the policy that sampled",
        source="authors' code",
    )
    kl_target: Number = setting(
        0.0,
        "above 0: kl_coef is adapted to hold the mean KL at this value (arXiv 1909.08593, section 2.2)",
        unit="nats per token",
    )
    kl_gain: Share = setting(
        0.1,
        "gain of that controller: a step changes kl_coef by at most 0.2 * kl_gain of itself",
        source="arXiv 1909.08593, section 2.2",
    )
    entropy_coef: Number = setting(0.001, "weight of the entropy bonus; the paper has none", source="authors' code")
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = setting(
        "token_mean",
        "token losses averaged over the mini-batch; per response, then over responses, as equation 1 has them; "
        "or summed and divided by responses times rollout.max_new_tokens (Dr. GRPO)",
        source="authors' code",
    )
    truncated: Literal["keep", "mask"] = setting(
        "keep",
        "train on responses cut at rollout.max_new_tokens, or leave them out of the gradient",
        source="authors' code",
    )

    @property
    def has_reference(self) -> bool:
        """Whether there is a KL, also an adaptive one: its coefficient starts above 0."""
        return self.kl_coef > 0


@dataclass(frozen=True, config=STRICT)
class Sft:
    path: String = setting(
        "",
        "teacher traces, JSON lines of id, question, options, answer, response; "
        "empty, with data.source=vignettes or arithmetic: the built-in teacher",
    )
    steps: Count = setting(0, "optimizer steps; 0: as many as sft.epochs takes", unit="steps")
    epochs: PositiveCount = setting(20, "passes over the traces", source="paper, section 4.3")
    batch_size: PositiveCount = setting(256, "traces per optimizer step", source="authors' code")
    max_tokens: Whole = setting(
        4096,
        "longest trace, prompt included; longer ones are dropped and counted",
        unit="tokens",
        source="authors' code",
        ge=2,
    )
    held_out: Real = setting(
        0.1, "share of the traces held out for the evaluation loss", source="authors' code", ge=0, le=0.9
    )
    patience: Count = setting(
        0, "stop after this many epochs without a lower held-out loss, and use the best epoch either way; 0: never"
    )
    previews: Count = setting(
        2, "held-out prompts answered at every evaluation: all in samples.jsonl, the first printed"
    )
    save_every: Count = setting(
        0, "a checkpoint every n steps, besides those at the end of every epoch; 0: off", unit="steps"
    )
    lora: Lora = section(Lora, "authors' code", rank=32, alpha=16.0, targets=LINEAR_LAYERS)
    optimizer: Optimizer = section(
        Optimizer, "authors' code", learning_rate=1e-4, schedule="cosine", warmup_ratio=0.1, beta2=0.95
    )


@dataclass(frozen=True, config=STRICT)
class Distill(Endpoint):
    temperature: Real = setting(0.6, "sampling temperature, as recommended for DeepSeek-R1", ge=0, le=2)
    top_p: Share = setting(0.95, "nucleus sampling: probability mass to sample from; 1: off")
    max_tokens: PositiveCount = setting(16384, "longest reply, reasoning included", unit="tokens")
    prompt: Literal["teacher", "crpo"] = setting(
        "teacher", "ask for reasoning and an answer, converted afterwards, or directly for the dx format"
    )
    attempts: PositiveCount = setting(1, "most attempts per question until an answer is right; all replies are kept")
    questions: Count = setting(0, "first n questions of the half that RL does not train on; 0: all")
    convert: Literal["extract", "rewrite"] = setting(
        "extract",
        "convert traces to the dx format by rules, keeping the teacher's sentences, or have the model rewrite them",
    )


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    samples: PositiveCount = setting(4, "responses per question")
    temperature: Number = setting(0.8, "divides the logits; 0: greedy", source="authors' code")
    top_p: Real = setting(
        0.95, "nucleus sampling: probability mass to sample from; 1: off", source="authors' code", gt=0, le=1
    )
    max_new_tokens: PositiveCount = setting(4096, "longest response", unit="tokens", source="authors' code")
    questions: Count = setting(0, "first n questions of each data set; 0: all, or data.eval_questions of the vignettes")
    answer: Literal["tagged", "anywhere"] = setting(
        "tagged",
        "where the one box with the answer must be: in the section its format prescribes, as for rewards, or anywhere",
    )
    k: PositiveCounts = setting(
        (1, 4), "numbers of samples for pass@k and majority@k; one that exceeds a question's samples is left out"
    )
    measures: Strings = setting(
        (), "measures of your own, each as module:function, called as reward functions are and apart from any reward"
    )
    subjects: Strings = setting(
        ("meta_info", "subject_name", "medical_task", "body_system", "condition"),
        "question columns to break accuracy down by, where present",
    )


@dataclass(frozen=True, config=STRICT)
class Judge(Endpoint):
    samples: PositiveCount = setting(1, "most responses judged per question")
    questions: Count = setting(0, "first n questions judged of each data set; 0: all")
    second: Endpoint = section(Endpoint)


@dataclass(frozen=True, config=STRICT)
class Parallel:
    mesh: String = setting("", "data x model, in devices, such as 8x1; empty: all devices on the data axis")
    layout: String = setting(
        "zero1",
        "placement of the tensors: zero1, fsdp, replicated, auto, or a layout of your own as module:NAME; "
        "auto: zero1, or fsdp if zero1 would fill more than half of a device's memory",
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = setting(
        "auto",
        "causal attention of prompts and training: cuDNN on GPUs, Splash on TPUs, XLA in chunks of queries anywhere; "
        "auto: by device",
    )
    remat: bool = setting(True, "recompute each block in the backward pass instead of storing its activations")
    unroll: bool = setting(
        False, "unroll the blocks in training instead of scanning: faster with few layers, slower to compile"
    )
    micro_batch_tokens: PositiveCount = setting(
        8192,
        "places of the packed row that a data shard computes in a forward and backward pass: prompts, each once, and "
        "their responses; a longer response has a longer row",
        unit="tokens",
    )
    length_multiple: PositiveCount = setting(128, "lengths of packed rows are a multiple of this", unit="tokens")
    logprob_chunk: PositiveCount = setting(512, "tokens whose logits are in memory together", unit="tokens")


@dataclass(frozen=True, config=STRICT)
class Limits:
    """Limits beyond which a run warns and explains, or stops; 0 switches a limit off."""

    skipped: Count = setting(3, "the run stops after this many updates in a row whose loss or gradient was not finite")
    kl: Number = setting(1.0, "largest mean KL to the start model, as crpo.kl_estimator has it", unit="nats per token")
    entropy: Number = setting(0.01, "smallest entropy of the policy", unit="nats per token")
    zero_variance: Share = setting(1.0, "share of groups whose rewards are all equal, at or above which to act")
    truncated: Share = setting(1.0, "share of responses cut at rollout.max_new_tokens, at or above which to act")
    action: Literal["warn", "stop"] = setting("warn", "action beyond a limit other than run.limits.skipped")
    patience: PositiveCount = setting(
        5, "with action=stop: steps in a row beyond a limit until the run stops", unit="steps"
    )


@dataclass(frozen=True, config=STRICT)
class Run:
    seed: int = setting(0, "seed of every random draw", ge=0, le=2**63 - 1)
    save_every: Count = setting(10, "a checkpoint every n steps and at the end; 0: at the end only", unit="steps")
    eval_every: Count = setting(
        20, "an evaluation every n steps, besides before and after; 0: these two only", unit="steps"
    )
    keep: PositiveCount = setting(2, "newest checkpoints to keep")
    keep_best: Count = setting(1, "further checkpoints to keep: those of evaluated steps with the highest eval/mean")
    compile_cache: String = setting(
        "~/.cache/crpo_jax",
        "folder of compiled programs for later starts, unless JAX_COMPILATION_CACHE_DIR is set; empty: none",
    )
    limits: Limits = section(Limits)


@dataclass(frozen=True, config=STRICT)
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


class Setting(NamedTuple):
    """What `--help` and error messages say of a setting."""

    default: Any
    legal: str  # as legal_values puts it
    doc: str
    unit: str
    source: str  # of the default


def setting_fields(
    section: Any = None, prefix: str = "", sources: Mapping[str, str] | None = None
) -> dict[str, Setting]:
    """Every setting by its dotted key, in the order of declaration; `sources` are of defaults other than declared."""
    section = section or Config()
    settings: dict[str, Setting] = {}
    for name, info in section.__pydantic_fields__.items():
        default, extra = getattr(section, name), info.json_schema_extra
        if dataclasses.is_dataclass(default):
            settings |= setting_fields(default, f"{prefix}{name}.", **extra)
        else:
            facts = {**extra, "source": (sources or {}).get(name, extra["source"])}
            settings[prefix + name] = Setting(default, legal_values(info), info.description, **facts)
    return settings


def find_setting(key: str) -> str | None:
    """The setting that a key names: itself, or the one with free keys under which it stands."""
    settings = setting_fields()
    free = (name for name, item in settings.items() if item.default == {} and key.startswith(f"{name}."))
    return key if key in settings else next(free, None)


def closest_settings(name: str, sections: Sequence[str] = ()) -> list[str]:
    """The settings of these sections, or of all, that end in the name, or else the one that is spelled most like it.

    The name of a section means its path.
    """
    keys = [key for key in setting_fields() if not sections or key.split(".")[0] in sections]
    if f"{name}.path" in keys:
        return [f"{name}.path"]
    endings = [key for key in keys if key.endswith(f".{name}")]
    return endings or difflib.get_close_matches(name, keys, n=1)


def legal_values(info: FieldInfo) -> str:
    """A setting's type and bounds in words, such as `a number >= 0` or `keep | mask`."""
    kind = info.annotation
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is dict:
        return "values by name"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    words[tuple[PositiveCount, ...]] = "a list of whole numbers >= 1"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in info.metadata
        for name, sign in signs.items()
        if getattr(limit, name, LARGEST_WHOLE) != LARGEST_WHOLE
    ]
    return " ".join([words.get(kind, "a list of strings"), " and ".join(bounds)]).strip()


def replaced(settings: Config, values: Mapping[str, Any]) -> Config:
    """The settings with some values replaced, by dotted key; InputError as for an override."""
    for key, value in values.items():
        nested = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        settings = merge_settings(settings, nested, "override")
    return settings


def merge_settings(section: Any, values: Any, origin: str, prefix: str = "") -> Any:
    """The section with nested values replaced; InputError for unknown keys and for values that pydantic refuses."""
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the file"
        raise InputError(f"{origin}: {where}: expected a mapping of settings, got {brief(values)}")
    fields, changed = section.__pydantic_fields__, {}
    for name, value in values.items():
        name = RENAMED.get(f"{prefix}{name}", f"{prefix}{name}").removeprefix(prefix) if isinstance(name, str) else name
        key = f"{prefix}{name if isinstance(name, str) else brief(name)}"[:200]
        if name not in fields:
            close = [prefix + match for match in difflib.get_close_matches(key.removeprefix(prefix), fields, n=1)]
            close = close or ([] if prefix else closest_settings(key))
            hint = f"; did you mean {' or '.join(close)}? The" if close else "; the"
            raise InputError(f"{origin}: {key}: unknown key{hint} legal keys here: {', '.join(fields)}")
        current = getattr(section, name)
        if isinstance(current, dict) and isinstance(value, Mapping):
            value = {**current, **value}
        elif dataclasses.is_dataclass(current):
            value = merge_settings(current, {} if value is None else value, origin, f"{key}.")
        changed[name] = value
    try:
        return dataclasses.replace(section, **changed)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = problem["loc"][0]
        legal = legal_values(fields[name])
        if problem["type"] in ("string_unicode", "string_pattern_mismatch") and not isinstance(changed[name], dict):
            legal = "text that a file can hold, without NUL and lone surrogates"
        elif problem.get("ctx", {}).get("le") == LARGEST_WHOLE:
            legal = f"at most {LARGEST_WHOLE}"
        raise InputError(f"{origin}: {prefix}{name}: expected {legal}, got {brief(changed[name])}") from None


class StrictLoader(yaml.SafeLoader):
    """YAML without its traps: no key twice in a mapping, no merge keys, no octal or base-60 numbers."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Where SafeLoader would merge `<<`."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused as unhashable
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                raise InputError(f"{self.name}:{line}: <<: expected every setting written out, got a merge key")
            if key.value in lines:
                raise InputError(f"{self.name}:{line}: {key.value}: written twice, first in line {lines[key.value]}")
            lines[key.value] = line

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        """YAML 1.1 reads 010 as 8 and 1:30 as 90, which nobody means."""
        whole = node.tag == "tag:yaml.org,2002:int"
        if ":" in node.value or (whole and re.match(r"[-+]?0\d", node.value)):
            line = node.start_mark.line + 1
            raise InputError(f"{self.name}:{line}: expected a plain decimal number, got {brief(node.value)}")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_decimal)
StrictLoader.add_constructor("tag:yaml.org,2002:float", StrictLoader.construct_decimal)


def read_yaml(text: str, name: str) -> Any:
    """The text's value; InputErrors name `name` and the line, YAML's own errors pass."""
    loader = StrictLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except RecursionError:
        raise InputError(f"{name}: expected settings by section, got lists or mappings nested too deeply") from None
    finally:
        loader.dispose()


def read_config_file(path: str | Path) -> Any:
    """The value of a YAML file or a shipped config, or an InputError with what is wrong and where."""
    try:
        with open(find_config(path), encoding="utf-8") as file:
            text = file.read(LONGEST_FILE + 1)
        if len(text) > LONGEST_FILE:
            raise InputError(f"--config {path}: expected at most {LONGEST_FILE:,} characters of settings, got more")
        return read_yaml(text, str(path))
    except OSError as error:
        is_name = isinstance(error, FileNotFoundError) and Path(path).parent.as_posix() in (".", "configs")
        hint = f"; expected a file, or one of {', '.join(shipped_configs())}" if is_name else ""
        raise InputError(f"--config {path}: {error.strerror}{hint}") from None
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x} at offset {error.start}"
        raise InputError(f"--config {path}: expected UTF-8 text, got byte {byte}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that cannot be, such as 2001-99-99
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{path}{line}: not valid YAML: {problem}") from None


def read_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of `section.key=value`: text where the setting is text, else YAML."""
    key, equals, value = override.partition("=")
    if not equals:
        close = closest_settings(key)
        hint = f"; did you mean {' or '.join(f'{name}=VALUE' for name in close)}?" if close else ""
        raise InputError(f"{override}: expected section.key=value{hint}")
    key = RENAMED.get(key, key)
    name = find_setting(key)
    if name and not isinstance(setting_fields()[name].default, str):
        with contextlib.suppress(yaml.YAMLError, ValueError):
            return key, read_yaml(value, f"override: {key}")
    return key, value


def load_config(files: ConfigFiles | None, overrides: Sequence[str] = (), model: bool = True) -> Config:
    """The config of YAML files (None: the defaults) with `section.key=value` overrides, checked.

    Each of several files replaces what it names in those before it. `model=False` is for commands that load no model:
    the settings of one may then be missing or wrong.
    """
    config = Config()
    for file in [files] if isinstance(files, str | Path) else files or ():
        values = read_config_file(file)
        config = merge_settings(config, {} if values is None else values, str(file))
    for key, value in map(read_override, overrides):
        config = replaced(config, {key: value})
    check_config(config, model)
    return config


def check_config(config: Config, model: bool = True) -> None:
    """Refuses settings that contradict each other."""
    c = config
    if c.crpo.prompts_per_step % c.crpo.mini_batch_prompts:
        wanted = f"a divisor of crpo.prompts_per_step={c.crpo.prompts_per_step}"
        raise InputError(f"crpo.mini_batch_prompts: expected {wanted}, got {c.crpo.mini_batch_prompts}")
    if c.crpo.kl_target and not c.crpo.kl_coef:
        wanted = f"more than 0, from which crpo.kl_target={c.crpo.kl_target} can move it"
        raise InputError(f"crpo.kl_coef: expected {wanted}, got 0")
    if c.crpo.loss not in POLICY_LOSSES and ":" not in c.crpo.loss:
        close = difflib.get_close_matches(c.crpo.loss, POLICY_LOSSES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        wanted = f"{', '.join(POLICY_LOSSES)} or a function of your own as module:function"
        raise InputError(f"crpo.loss: expected {wanted}, got {brief(c.crpo.loss)}{hint}")
    if 0 < c.crpo.importance_bound < 1:
        raise InputError(f"crpo.importance_bound: expected 0 or at least 1, got {c.crpo.importance_bound}")
    if c.crpo.kl_in == "reward" and not c.crpo.kl_coef:
        raise InputError("crpo.kl_coef: expected more than 0, since crpo.kl_in=reward takes a KL off rewards, got 0")
    if c.reward.design == "grpo" and len(c.reward.tags) != 2:
        raise InputError(f"reward.tags: expected two tags, got {list(c.reward.tags)}")
    if c.data.source not in ("file", "hub", "jsonl") and (c.data.columns != Columns() or c.data.answer != "auto"):
        keys = [key for key, value in dataclasses.asdict(c.data.columns).items() if value != getattr(Columns(), key)]
        key = f"columns.{keys[0]}" if keys else "answer"
        raise InputError(f"data.{key}: expected it with data.source=file or hub only, got data.source={c.data.source}")
    for where, lora in (("lora", c.lora), ("sft.lora", c.sft.lora)):
        targets = set(lora.targets)
        if not targets or len(targets) < len(lora.targets) or not targets <= set(LINEAR_LAYERS):
            wanted = f"some of {', '.join(LINEAR_LAYERS)}, each once"
            raise InputError(f"{where}.targets: expected {wanted}, got {list(lora.targets)}")
    if c.model.adapter and not c.model.path:
        wanted = "model.path beside it, the model that the adapter was trained on"
        raise InputError(f"model.adapter: expected {wanted}, got only {c.model.adapter}")
    if model and not c.model.path:
        width, heads = c.model.shape.hidden_size, c.model.shape.num_attention_heads
        kv_heads = c.model.shape.num_key_value_heads
        if width % heads:
            wanted = f"a multiple of num_attention_heads={heads}"
            raise InputError(f"model.shape.hidden_size: expected {wanted}, got {width}")
        if heads % kv_heads:
            wanted = f"a multiple of num_key_value_heads={kv_heads}"
            raise InputError(f"model.shape.num_attention_heads: expected {wanted}, got {heads}")
        if not c.tokenizer.path:
            raise InputError("tokenizer.path: expected a folder, since model.path is empty and brings none")
    if model and c.data.prompt not in PROMPT_NAMES and not os.path.isfile(os.path.expanduser(c.data.prompt)):
        raise InputError(
            f"data.prompt: expected {' | '.join(PROMPT_NAMES)} or a Jinja file, got {brief(c.data.prompt)}"
        )


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to the same config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=140)


def changed_settings(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every setting that differs."""
    pairs = ((key, attrgetter(key)(old), attrgetter(key)(new)) for key in setting_fields())
    return [f"{key}: {before!r} -> {after!r}" for key, before, after in pairs if before != after]


def config_folder() -> Path:
    """The folder of the shipped configs: the repository's configs/, or its copy in an installed wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_configs() -> list[str]:
    """The names of the shipped configs, such as tiny."""
    folder = config_folder()
    paths = (*folder.glob("*.yaml"), *folder.glob("variants/*.yaml"))
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in paths)


def find_config(path: str | Path) -> Path:
    """The file at the path, or else the shipped config of that name, spelled configs/tiny.yaml, tiny.yaml or tiny."""
    local, name = Path(path).expanduser(), Path(path).as_posix().removeprefix("configs/").removesuffix(".yaml")
    shipped = [known for known in shipped_configs() if name in (known, Path(known).name)]
    return config_folder() / f"{shipped[0]}.yaml" if shipped and not local.is_file() else local


def default_config_path(platform: str, model: str = "") -> Path:
    """The config of a command without --config: for a model of an embedded world that world's, for other models and on
    accelerators the paper's run, else the vignettes'."""
    fallback = config_folder() / ("tiny.yaml" if platform == "cpu" and not model else "clinical_r1_3b.yaml")
    return embedded_config(model) or fallback


def embedded_config(model: str) -> Path | None:
    """The config of the embedded world whose tokenizer a model's folder has; None for all other models."""
    own = Path(model).expanduser() / "tokenizer.json"
    for name in ("tiny", "arithmetic"):
        embedded = config_folder() / f"{name}_tokenizer" / "tokenizer.json"
        if model and own.is_file() and filecmp.cmp(own, embedded, shallow=False):
            return config_folder() / f"{name}.yaml"
    return None
