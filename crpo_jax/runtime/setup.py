"""What a run starts from: tokenizer, questions with their prompts, teacher traces, the start model and the sampler."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.data.batches import load_questions
from crpo_jax.data.prompts import Fitting, encode_response, fit_prompts, load_tokenizer, render_prompts
from crpo_jax.data.question import OTHER_HALF, Question, hold_out, select_part
from crpo_jax.data.readers import read_questions
from crpo_jax.errors import InputError
from crpo_jax.model import huggingface
from crpo_jax.model.attention import implementation
from crpo_jax.model.placement import automatic_layout
from crpo_jax.model.shape import Shape, read_shape, shape_of
from crpo_jax.parallel.layout import LAYOUTS, check_layout
from crpo_jax.parallel.processes import gathered, share
from crpo_jax.reward.effective import effective_table
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import Engine, Response
from crpo_jax.update.batches import Row

if TYPE_CHECKING:
    from crpo_jax.data.prompts import Tokenizer


@dataclass(frozen=True)
class Text:
    """The run's tokenizer: where a response stops, what it says, which of its tokens are effective."""

    folder: Path
    tokenizer: "Tokenizer"
    stop_ids: tuple[int, ...]
    effective: np.ndarray

    def body(self, response: Response) -> list[int]:
        """The response's tokens without the one that stopped it."""
        return response.tokens[: len(response.tokens) - response.stopped].tolist()

    def of(self, response: Response) -> str:
        return str(self.tokenizer.decode(self.body(response), skip_special_tokens=False))


def text_for(settings: config.Config, shape: Shape) -> Text:
    """The tokenizer of tokenizer.path, or of the model's folder; one that does not match the vocabulary is refused."""
    folder = (
        shipped(settings.tokenizer.path) if settings.tokenizer.path else huggingface.model_folder(settings.model.path)
    )
    tokenizer = load_tokenizer(folder)
    known = tokenizer.get_vocab()
    tokens = max(len(tokenizer), max(known.values()) + 1)  # ids may have gaps
    if tokens > shape.v:
        raise InputError(f"tokenizer.path: expected at most the model's {shape.v} tokens, got {tokens} in {folder}")
    for stop in settings.rollout.stop:
        if stop not in known:
            raise InputError(f"rollout.stop: expected tokens of {folder}, got {stop!r}")
    return Text(
        folder,
        tokenizer,
        tuple(known[stop] for stop in settings.rollout.stop),
        effective_table(folder / "tokenizer.json", shape.v),
    )


def shipped(path: str) -> Path:
    """A path as it stands; `configs/...` also from outside the repository, where it means what this package brings."""
    here, folder = Path(path).expanduser(), config.config_folder()
    return folder.parent / here if not here.exists() and (folder.parent / here).exists() else here


def shape_for(settings: config.Config, mesh: Mesh) -> tuple[config.Config, Shape]:
    """The shape of model.path, whose files must hold all its tensors, or of model.shape, once this mesh and layout can hold it; and
    the settings with the layout that `auto` stands for."""
    if settings.model.path:
        folder = huggingface.model_folder(settings.model.path)
        shape = read_shape(folder)
        huggingface.check_keys(shape, *huggingface.read_headers(folder))
    else:
        shape = shape_of(config.as_dict(settings.model.shape), "model.shape")
    if settings.parallel.layout == "auto":
        memory = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
        name = automatic_layout(shape, mesh, settings.model.dtype, memory)
        settings = config.build(config.Config, {"parallel": {"layout": name}}, "auto", base=settings)
    check_layout(LAYOUTS[settings.parallel.layout], mesh, {letter: getattr(shape, letter) for letter in "dnkfv"})
    return settings, shape


def rendered(questions: Sequence[Question], *how: Any) -> list[list[int]]:
    """Prompt tokens of all questions; each process renders its share of them, and then all hold all."""
    return gathered(render_prompts([questions[i] for i in share(len(questions))], *how))


def training_questions(settings: config.Config, text: Text) -> Fitting:
    return fit_prompts(load_questions(settings.data, settings.data.split), settings.data, text.tokenizer, rendered)


def evaluation_questions(settings: config.Config, text: Text) -> Fitting:
    """The first data.eval_questions that fit; the same for every run of a config."""
    found = fit_prompts(
        load_questions(settings.data, settings.data.eval_split), settings.data, text.tokenizer, rendered
    )
    count = settings.data.eval_questions or len(found.questions)
    return Fitting(found.questions[:count], found.prompts[:count], found.dropped)


def digests(training: Fitting, asked: Fitting) -> dict[str, str]:
    """SHA-256 of the questions a run reads from outside its config: the same numbers come only from the same inputs."""

    def of_questions(found: Fitting) -> str:
        rows = (
            [dataclasses.asdict(question), prompt]
            for question, prompt in zip(found.questions, found.prompts, strict=True)
        )
        return hashlib.sha256(
            b"".join(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n" for row in rows)
        ).hexdigest()

    return {"training questions": of_questions(training), "held-out questions": of_questions(asked)}


def model_digests(settings: config.Config, text: Text, model: Path | None) -> dict[str, str]:
    """SHA-256 of the tokenizer, and of the start model's files where it has any."""

    def of_files(folder: Path, *patterns: str) -> str:
        total = hashlib.sha256()
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    found = {"tokenizer": of_files(text.folder, "tokenizer.json", "tokenizer_config.json")}
    if model:
        found["start model"] = of_files(model, "config.json", "*.safetensors")
    if settings.model.adapter:
        found["start adapter"] = of_files(Path(settings.model.adapter).expanduser(), "adapter_*")
    return found


@dataclass(frozen=True)
class Traces:
    """Teacher traces as token rows, and how many were longer than sft.max_tokens."""

    train: list[Row]
    held_out: list[Row]
    dropped: int


def teacher_traces(settings: config.Config, text: Text) -> Traces:
    """The traces of sft.path, or the built-in teacher's on the half of the vignettes that RL does not train on."""
    sft, data = settings.sft, settings.data
    if sft.path:
        questions = read_questions("jsonl", sft.path, "train")
        for question in questions:
            if not isinstance(question.columns.get("response"), str):
                raise InputError(
                    f"{sft.path}: {question.id}: response: expected the teacher's text, got {question.columns.get('response')!r}"
                )
        responses = [str(question.columns["response"]) for question in questions]
    elif data.source == "vignettes":
        from crpo_jax.data.vignettes import teacher_response, vignettes

        questions = select_part(vignettes(data.split, data.vignettes), OTHER_HALF[data.part])
        responses = [teacher_response(question, settings.run.seed) for question in questions]
    else:
        raise InputError(
            f"sft.path: expected a file of teacher traces, since data.source={data.source} has no built-in teacher"
        )
    prompts = render_prompts(questions, data.prompt, data.system_prompt, text.tokenizer)
    rows = {}
    for question, prompt, response in zip(questions, prompts, responses, strict=True):
        row = Row(prompt, encode_response(response, text.tokenizer))
        if len(row.prompt) + len(row.response) <= sft.max_tokens:
            rows[question.id] = (question, row)
    train, held = hold_out([question for question, _ in rows.values()], sft.held_out)

    def of(chosen: Sequence[Question]) -> list[Row]:
        return [rows[question.id][1] for question in chosen]

    if not rows:
        raise InputError(f"sft.max_tokens: expected room for at least one trace, got {sft.max_tokens}")
    return Traces(of(train), of(held), len(questions) - len(rows))


def sampler(settings: config.Config, shape: Shape, mesh: Mesh, text: Text) -> Engine:
    """The engine with the settings of `rollout`."""
    rollout = settings.rollout
    how = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, text.stop_ids)
    attention = implementation(
        settings.parallel.attention, mesh.devices.flat[0].platform, settings.model.dtype, shape.h
    )
    return Engine(shape, mesh, how, rollout.max_new_tokens, rollout.slots, rollout.chunk, attention)
