"""What a run reads besides its config and its start model: questions with their prompts, teacher traces, and digests of
all of it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crpo_jax.config import Config, load_config
from crpo_jax.data.batches import Batches, load_questions
from crpo_jax.data.prompts import Fitting, check_dropped, encode_response, fit_prompts, render_prompts
from crpo_jax.data.question import OTHER_HALF, Question, hold_out, select_part
from crpo_jax.data.readers import read_questions
from crpo_jax.data.worlds import WORLDS, generate_questions, teacher_responses
from crpo_jax.errors import InputError
from crpo_jax.parallel.agreement import cached_digest
from crpo_jax.parallel.processes import gather_from_processes, process_share
from crpo_jax.reward.rules import require_choices
from crpo_jax.runtime.runtime import Runtime
from crpo_jax.runtime.same_inputs import require_same_questions
from crpo_jax.store.workdir import read_traced
from crpo_jax.update.batches import Row


@dataclass(frozen=True)
class TrainingQuestions:
    """The questions that CRPO trains on and those it is evaluated on, each with its prompt's tokens."""

    training: Fitting
    held_out: Fitting
    set_aside: int  # questions of the split that are not trained on, because of data.part
    batches: Batches[Question]
    replacements: Batches[Question]  # dynamic sampling's: for groups whose rewards are all equal

    @functools.cached_property
    def prompt_of(self) -> Mapping[str, list[int]]:
        return {
            question.id: prompt for question, prompt in zip(self.training.questions, self.training.prompts, strict=True)
        }

    def batch(self, step: int, turn: int, turns: int) -> list[Question]:
        """The questions of a step; `turn` 1 to `turns` are further ones for it."""
        return self.replacements.batch(step * turns + turn - 1) if turn else self.batches.batch(step)


def open_questions(
    runtime: Runtime,
    questions: Sequence[Question] | None = None,
    held_out: Sequence[Question] | None = None,
    workdir: Path | None = None,
) -> TrainingQuestions:
    """The questions of the settings, or those given; only the first data.eval_questions held-out ones are used.

    `workdir` is the run's, whose cold start decides data.part=auto.
    """
    data, crpo, seed = runtime.settings.data, runtime.settings.crpo, runtime.settings.run.seed
    tokenizer, set_aside = runtime.vocabulary.tokenizer, 0
    if questions is None:
        whole = load_questions(dataclasses.replace(data, part="all"), data.split)
        questions = select_part(whole, resolve_part(runtime.settings, whole, workdir))
        set_aside = len(whole) - len(questions)
    if held_out is None:
        held_out = load_questions(data, data.eval_split)
    require_same_questions(f"{data.path or data.source}: training questions", questions)
    require_same_questions(f"{data.eval_path or data.path or data.source}: held-out questions", held_out)
    if not questions or not held_out:
        raise InputError(
            f"questions: expected some to train on and some held out, got {len(questions)} and {len(held_out)}"
        )
    require_choices(runtime.settings.reward, [*questions, *held_out])
    training = fit_prompts(questions, data, tokenizer, render_shared)
    fits = fit_prompts(held_out, data, tokenizer, render_shared)
    for name, given, chosen in (("training", questions, training), ("held-out", held_out, fits)):
        check_dropped(chosen.dropped.values(), len(given), f"{name} questions", data)
    count = data.eval_questions or len(fits.questions)
    return TrainingQuestions(
        training,
        Fitting(fits.questions[:count], fits.prompts[:count], fits.dropped),
        set_aside,
        Batches(training.questions, crpo.prompts_per_step, seed),
        Batches(training.questions, crpo.prompts_per_step, seed, stream="further"),
    )


def resolve_part(settings: Config, questions: Sequence[Question], workdir: Path | None = None) -> str:
    """data.part, with "auto" decided: the half that the run's cold start has left, or all where it took none of these
    questions.

    The cold start is the run's own, in WORKDIR/sft, where model.path is empty, and where that is a cold start's folder
    the one that wrote it; any other model has seen none of the questions as far as can be known.
    """
    if settings.data.part != "auto":
        return settings.data.part
    if settings.model.path:
        folder = cold_start_workdir(Path(settings.model.path).expanduser().absolute())
        cold_start = load_config(folder / "config.yaml", model=False) if folder else None
    else:
        folder, cold_start = workdir and workdir / "sft", settings
    if cold_start is None or cold_start.data.part == "all":
        return "all"
    part = "second_half" if cold_start.data.part == "auto" else cold_start.data.part
    traced = traced_questions(cold_start, folder)
    if traced is None:
        return part if cold_start.sft.path or cold_start.data.source == settings.data.source else "all"
    return part if any(question.id in traced for question in select_part(questions, OTHER_HALF[part])) else "all"


def cold_start_workdir(model: Path) -> Path | None:
    """The folder with the config of the cold start that wrote this model; None where the model is no cold start's.

    A cold start of its own run is in WORKDIR/sft, one of `crpo_jax.sft` in WORKDIR, and both write WORKDIR/coldstart.
    """
    places = (model.parent / "sft", model.parent) if model.name == "coldstart" else ()
    return next((folder for folder in places if (folder / "config.yaml").is_file()), None)


def traced_questions(cold_start: Config, workdir: Path | None) -> frozenset[str] | None:
    """The ids of the questions whose traces a cold start takes, as its workdir records them or else as sft.path has
    them; None for the built-in teacher's and where nobody can say any more."""
    path = cold_start.sft.path
    if workdir and (recorded := read_traced(workdir)) is not None:
        return recorded
    if path and Path(path).exists():
        return frozenset(question.id for question in read_questions("jsonl", path, "train"))
    return None


def render_shared(questions: Sequence[Question], *how: Any) -> list[list[int]]:
    """Prompt tokens of all questions; each process renders its share of them, and the results are shared with every
    process."""
    return gather_from_processes(render_prompts([questions[i] for i in process_share(len(questions))], *how))


# ---- teacher traces --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traces:
    """Teacher traces as token rows, how many were longer than sft.max_tokens, and the ids of all their questions."""

    train: list[Row]
    held_out: list[Row]
    dropped: int
    questions: list[str]


def open_traces(runtime: Runtime, traces: Sequence[Question] | None = None) -> Traces:
    """The traces of sft.path, those given (questions with a column `response`), or the built-in teacher's on the half
    of an embedded world's questions that CRPO does not train on."""
    sft, data, tokenizer = runtime.settings.sft, runtime.settings.data, runtime.vocabulary.tokenizer
    if traces is not None or sft.path:
        questions = list(traces) if traces is not None else read_questions("jsonl", sft.path, "train")
        for question in questions:
            response = question.columns.get("response")
            if not isinstance(response, str):
                name = sft.path if traces is None else "traces"
                raise InputError(f"{name}: {question.id}: response: expected the teacher's text, got {response!r}")
        responses = [str(question.columns["response"]) for question in questions]
    elif data.source in WORLDS:
        questions = select_part(generate_questions(data, data.split), OTHER_HALF[data.part])
        responses = teacher_responses(data.source, questions, runtime.settings.run.seed)
    else:
        raise InputError(
            f"sft.path: expected a file of teacher traces, since data.source={data.source} has no built-in teacher"
        )
    require_same_questions(f"{sft.path or data.source}: teacher traces", questions)
    prompts = render_prompts(questions, data, tokenizer)
    rows, dropped = {}, []
    for question, prompt, response in zip(questions, prompts, responses, strict=True):
        row = Row(prompt, encode_response(response, tokenizer))
        if row.length <= sft.max_tokens:
            rows[question.id] = (question, row)
        else:
            dropped.append(row.length)
    if not rows:
        raise InputError(f"sft.max_tokens: expected room for at least one trace, got {sft.max_tokens}")
    check_dropped(dropped, len(questions), "traces", data, "sft.max_tokens", sft.max_tokens)
    parts = hold_out([question for question, _ in rows.values()], sft.held_out)
    train, evaluated = ([rows[question.id][1] for question in part] for part in parts)
    return Traces(train, evaluated, len(questions) - len(rows), [question.id for question in questions])


# ---- digests: the same numbers come only from the same inputs --------------------------------------------------------


def question_digests(questions: TrainingQuestions) -> dict[str, str]:
    """SHA-256 of the questions that CRPO trains on and is evaluated on, with their prompts."""

    def digest(chosen: Fitting) -> str:
        rows = zip(map(question_content, chosen.questions), chosen.prompts, strict=True)
        lines = (json.dumps(list(row), sort_keys=True, default=repr).encode() + b"\n" for row in rows)
        return hashlib.sha256(b"".join(lines)).hexdigest()

    return {"training questions": digest(questions.training), "held-out questions": digest(questions.held_out)}


def question_content(question: Question) -> dict[str, Any]:
    """The question as digests have it: without what only questions of other kinds have."""
    content = dataclasses.asdict(question)
    return content if question.kind != "choice" or question.turns else {name: content[name] for name in CHOICE_FIELDS}


CHOICE_FIELDS = ("id", "question", "options", "answer", "source", "split", "columns")


def trace_digest(traces: Traces) -> str:
    """SHA-256 of the token rows, the held-out ones apart."""
    return hashlib.sha256(json.dumps([traces.train, traces.held_out]).encode()).hexdigest()


def model_digests(runtime: Runtime, start: Path | None) -> dict[str, str]:
    """SHA-256 of the tokenizer, and of the start model's and the adapter's files where there are any."""

    def digest(folder: Path, *patterns: str) -> str:
        total = hashlib.sha256()
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            total.update(path.name.encode() + bytes.fromhex(cached_digest(path)))
        return total.hexdigest()

    tokenizer_files = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    digests = {"tokenizer": digest(runtime.vocabulary.folder, *tokenizer_files)}
    if start:
        digests["start model"] = digest(start, "config.json", "*.safetensors")
    if adapter := runtime.settings.model.adapter:
        digests["start adapter"] = digest(Path(adapter).expanduser(), "adapter_*")
    return digests
