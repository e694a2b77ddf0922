"""CRPO from a script or a notebook: the commands as functions, with questions as lists and rewards as Python functions.

Every function takes the settings of `--help`: `config` is a YAML file or the name of a shipped one, or several as on
the command line (by default the shipped one that fits), `settings` overrides single ones by dotted key. All raise
`crpo_jax.errors.InputError` for bad input, before anything is written, and `crpo_jax.errors.Fault` where a run cannot
continue, such as on a full disk. A call with the same `workdir` resumes.

    >>> import crpo_jax
    >>> question = {"id": "q1", "question": "Fever, new murmur?", "options": {"A": "IE", "B": "flu"}, "answer": "A"}
    >>> [score] = crpo_jax.score([question], ["The answer is \\\\boxed{A}"])
    >>> score["accuracy"], score["format"]
    (0.0, 0.0)
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crpo_jax.answer.records import question_to_row
from crpo_jax.config import Config, ConfigFiles, check_config, default_config_path, load_config, replaced
from crpo_jax.data.question import Question, hold_out
from crpo_jax.data.readers import questions_from
from crpo_jax.disk import local_path
from crpo_jax.errors import InputError
from crpo_jax.reward.functions import RewardFunction, design_name
from crpo_jax.reward.scorer import Scorer

Questions = Sequence[Mapping[str, Any] | Question]
"""Dictionaries with question, options if there are any, answer (the letter of an option, a number, a text, a list of
texts, or none), and perhaps an id; further keys are columns, which reward functions receive by name."""

Rewards = str | RewardFunction | Sequence[str | RewardFunction]
"""A value of reward.design, such as crpo or accuracy*10+format; a function of TRL's convention, async or not,
`f(prompts, completions, **columns)` with a list of a number or None per completion; or several, which are summed."""

HELD_OUT_SHARE = 0.1
"""Of the questions given to `train` without `held_out`, chosen by a hash of their ids."""


def train(
    workdir: str | Path,
    *,
    config: ConfigFiles | None = None,
    settings: Mapping[str, Any] | None = None,
    model: str | Path | None = None,
    questions: Questions | None = None,
    held_out: Questions | None = None,
    reward: Rewards | None = None,
    allow_changes: bool = False,
) -> list[dict[str, Any]]:
    """Trains by CRPO; the rows of WORKDIR/metrics.jsonl, one per step.

    `model` is a Hugging Face folder or hub id; without it a cold start comes first. `questions` replace data.source;
    `held_out` are for evaluation, by default a tenth of the questions; the first data.eval_questions of them are used.
    """
    import jax

    from crpo_jax.runtime.runtime import open_runtime
    from crpo_jax.store.metrics import read_metrics
    from crpo_jax.train import train as run_training

    workdir = local_path("workdir", workdir)
    design, functions = reward_design(reward)
    chosen = choose_settings(config, settings, {"model.path": model, "reward.design": design}, jax.default_backend())
    training = None if questions is None else as_questions(questions)
    evaluation = None if held_out is None else as_questions(held_out)
    if training is not None and evaluation is None:
        training, evaluation = hold_out(training, HELD_OUT_SHARE)
    run_training(
        open_runtime(chosen),
        workdir,
        questions=training,
        held_out=evaluation,
        reward_functions=functions,
        allow_changes=allow_changes,
    )
    return read_metrics(workdir)


def fine_tune(
    workdir: str | Path,
    *,
    config: ConfigFiles | None = None,
    settings: Mapping[str, Any] | None = None,
    model: str | Path | None = None,
    traces: Questions | None = None,
    allow_changes: bool = False,
) -> Path | None:
    """Fine-tunes on teacher traces (the cold start); the folder of the model with the lowest held-out loss, or None
    where a signal stopped the run.

    `traces` are questions with a key `response`, and replace sft.path.
    """
    import jax

    from crpo_jax.runtime.fine_tuning import fine_tune as run_fine_tuning
    from crpo_jax.runtime.inputs import open_traces
    from crpo_jax.runtime.runtime import open_runtime
    from crpo_jax.runtime.same_inputs import require_same_workdir
    from crpo_jax.store.workdir import has_folder

    workdir = local_path("workdir", workdir)
    runtime = open_runtime(choose_settings(config, settings, {"model.path": model}, jax.default_backend()))
    require_same_workdir(workdir)
    folder = workdir / "coldstart"
    if not has_folder(workdir, folder.name):
        opened = open_traces(runtime, None if traces is None else as_questions(traces))
        run_fine_tuning(runtime, workdir, folder, opened, allow_changes=allow_changes)
    return folder if folder.is_dir() else None


def sample(
    model: str | Path,
    questions: Questions,
    n: int = 1,
    *,
    config: ConfigFiles | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """`n` responses of a model to every question, prompted and sampled as the settings of `data` and `rollout` say."""
    import jax

    from crpo_jax.data.prompts import render_prompts
    from crpo_jax.model.huggingface import model_folder
    from crpo_jax.model.lora import Policy
    from crpo_jax.runtime.runtime import open_runtime

    runtime = open_runtime(choose_settings(config, settings, {"model.path": model}, jax.default_backend()))
    data, dtype = runtime.settings.data, runtime.settings.model.dtype
    prompts = render_prompts(as_questions(questions), data, runtime.vocabulary.tokenizer)
    start = model_folder(str(model))
    weights = runtime.sampler_weights(Policy(runtime.start_weights(start, runtime.layout.master, dtype)))
    groups = runtime.sampler.generate(weights, prompts, key=runtime.key, group=n)
    return [[runtime.vocabulary.decode(response) for response in group] for group in groups]


def score(
    questions: Questions,
    responses: Sequence[str],
    *,
    reward: Rewards = "crpo",
    config: ConfigFiles | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The reward of each response by parts, with the reasons in `why`, or an `error`; needs no model and no jax."""
    if len(questions) != len(responses):
        raise InputError(
            f"score: expected a response per question, got {len(questions)} questions, {len(responses)} responses"
        )
    design, functions = reward_design(reward)
    chosen = choose_settings(config, settings, {"reward.design": design}, "cpu", model=False)
    with Scorer(chosen.reward, functions=functions) as scorer:
        scores = scorer.score(as_questions(questions), responses)
    return [dataclasses.asdict(score) for score in scores]


def evaluate(
    workdir: str | Path,
    *,
    model: str | Path | None = None,
    data: Mapping[str, Questions] | Sequence[str] = (),
    config: ConfigFiles | None = None,
    settings: Mapping[str, Any] | None = None,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """Lets a model answer data sets, given by name or as questions by name; the content of WORKDIR/summary.json.

    Without `model` the responses that `workdir` holds are judged or summarized again.
    """
    from crpo_jax.evaluate import evaluate as run_evaluation
    from crpo_jax.evaluate import load_data_sets

    workdir = local_path("workdir", workdir)
    platform, previous = "cpu", workdir / "config.yaml"
    if model is None and data:
        raise InputError("evaluate: expected a model to answer the data sets, got none")
    if model is not None:
        import jax

        platform = jax.default_backend()
    config = previous if config is None and previous.is_file() else config
    chosen = choose_settings(config, settings, {"model.path": model}, platform, model=model is not None)
    if isinstance(data, Mapping):
        sets = {name: as_questions(questions) for name, questions in data.items()}
    else:
        sets = load_data_sets(data, chosen)
    return run_evaluation(chosen, workdir, sets, allow_changes=allow_changes)


def export(workdir: str | Path, folder: str | Path, *, step: int | None = None, dtype: str = "bfloat16") -> Path:
    """Writes the model after `step` (default: the newest checkpoint, of a cold start the best) as a Hugging Face
    folder."""
    from crpo_jax.export import export as run_export

    workdir = local_path("workdir", workdir)
    run_export(load_config(workdir / "config.yaml"), workdir, folder, step=step, dtype=dtype)
    return Path(folder)


def choose_settings(
    config: ConfigFiles | None,
    settings: Mapping[str, Any] | None,
    arguments: Mapping[str, Any],
    platform: str,
    *,
    model: bool = True,
) -> Config:
    """The settings of a call; `arguments` that are None are not given."""
    given = {key: str(value) for key, value in arguments.items() if value is not None}
    values = {**(settings or {}), **given}
    default = default_config_path(platform, str(values.get("model.path", "")))
    chosen = replaced(load_config(config or default, model=False), values)
    check_config(chosen, model)
    return chosen


def as_questions(rows: Questions) -> list[Question]:
    return questions_from(
        [{**question_to_row(row), **row.columns} if isinstance(row, Question) else row for row in rows]
    )


def reward_design(reward: Rewards | None) -> tuple[str | None, dict[str, RewardFunction]]:
    """The value of reward.design, and the functions that it names."""
    if reward is None or isinstance(reward, str):
        return reward, {}
    parts = [reward] if callable(reward) else list(reward)
    functions: dict[str, RewardFunction] = {design_name(part): part for part in parts if not isinstance(part, str)}
    return "+".join(part if isinstance(part, str) else design_name(part) for part in parts), functions
