"""The methods that a report compares: what their workdirs hold, and which of them differ by more than chance."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crpo_jax.answer.records import read_answers, read_summary
from crpo_jax.answer.statistics import summarize
from crpo_jax.config import load_config
from crpo_jax.errors import InputError
from crpo_jax.store.files import read_rows

FEWEST_QUESTIONS = 6  # with fewer even one model right and the other wrong on all of them is chance, at 95%
HELD_OUT = "held_out"
"""The name of a training run's held-out questions among the data sets."""


@dataclass(frozen=True)
class Seed:
    """What a workdir holds: its summary.json, by data set every question's own means and the file of the responses, and
    its training metrics if any."""

    label: str
    summary: Mapping[str, Any]
    questions: Mapping[str, Sequence[Mapping[str, Any]]]
    responses: Mapping[str, Path]
    metrics: Sequence[Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True)
class Method:
    """A row of Table 1."""

    name: str
    seeds: Sequence[Seed]

    def results(self, data: str) -> list[Mapping[str, Any]]:
        """The summary of a data set by seed, without the seeds that did not answer it."""
        return [seed.summary["data"][data] for seed in self.seeds if data in seed.summary["data"]]

    def question_means(self, data: str, column: "Column") -> dict[str, float]:
        """Each question's mean over the seeds, by its id."""
        values: dict[str, list[float]] = {}
        for row in (row for seed in self.seeds for row in seed.questions.get(data, ())):
            if (value := column.of_question(row)) is not None:
                values.setdefault(row["id"], []).append(value)
        return {identity: statistics.fmean(seeds) for identity, seeds in values.items()}


@dataclass(frozen=True)
class Column:
    """A column of Table 1: the keys of its estimate in a data set's summary, and how it is printed."""

    label: str
    keys: tuple[str, ...]
    digits: int = 2
    scale: float = 1.0
    more_is_better: bool | None = True  # None: neither
    unit: str = ""  # that the estimate must have: tokens and words are not to be compared

    @property
    def title(self) -> str:
        return self.label + ("↓" if self.more_is_better is False else "")

    def estimate(self, result: Mapping[str, Any]) -> Mapping[str, float] | None:
        """The mean, with its interval if it has one; None if it was not measured."""
        for key in self.keys:
            result = result.get(key, {})
        return result if result.get("mean") is not None and self.unit in ("", result.get("unit")) else None

    def of_question(self, row: Mapping[str, Any]) -> float | None:
        """A question's own mean, in the column's unit."""
        value: Any = row
        for key in self.keys:
            value = value.get(key, {})
        return self.scale * value if isinstance(value, float) else None

    def values(self, method: Method, data: str) -> list[float]:
        """The value of every seed that has one, in the column's unit."""
        estimates = map(self.estimate, method.results(data))
        return [self.scale * estimate["mean"] for estimate in estimates if estimate]


def read_methods(specifications: Sequence[str]) -> list[Method]:
    """The methods of NAME=FOLDER, in the order given; a repeated name adds a seed.

    A folder is an evaluation's, that of a run which holds one in `evaluation`, or that of a training run.
    """
    seeds: dict[str, list[Seed]] = {}
    for text in specifications:
        name, equals, path = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--report {text}: expected NAME=FOLDER")
        seeds.setdefault(name.strip(), []).append(read_seed(text, Path(path)))
    methods = [Method(name, of_method) for name, of_method in seeds.items()]
    check_questions(methods)
    return methods


def read_seed(text: str, folder: Path) -> Seed:
    """The evaluation of NAME=FOLDER, or the newest held-out questions of a training run that has none."""
    evaluated = folder if (folder / "summary.json").is_file() else folder / "evaluation"
    logs = [path for path in (folder / "metrics.jsonl", evaluated.parent / "metrics.jsonl") if path.is_file()]
    metrics = list(read_rows(logs[0])) if logs else []
    if not (evaluated / "summary.json").is_file():
        return read_training_run(text, folder, metrics)
    summary = read_summary(evaluated / "summary.json")
    for name in summary["data"]:
        if not questions_path(evaluated, name).is_file():
            raise InputError(
                f"--report {text}: expected {questions_path(evaluated, name)}, which earlier versions did not write; "
                f"`python -m crpo_jax.evaluate --workdir {evaluated}` adds it"
            )
    questions = {name: list(read_rows(questions_path(evaluated, name))) for name in summary["data"]}
    responses = {path.stem: path for path in sorted((evaluated / "responses").glob("*.jsonl"))}
    return Seed(text, summary, questions, responses, metrics)


def read_training_run(text: str, folder: Path, metrics: Sequence[Mapping[str, Any]]) -> Seed:
    files = sorted((folder / "report").glob("held_out_*.jsonl"))
    if not files:
        expected = "the workdir of a finished evaluation, or of a training run with held-out questions"
        raise InputError(
            f"--report {text}: expected {expected}, got no summary.json and no report/held_out_*.jsonl in it"
        )
    step, settings = int(files[-1].stem.rpartition("_")[2]), load_config(folder / "config.yaml", model=False)
    summary, rows = summarize(read_answers(files[-1], "--report"), settings)
    note = f"{text}: a training run, its held-out questions after step {step}."
    return Seed(text, {"data": {HELD_OUT: summary}}, {HELD_OUT: rows}, {HELD_OUT: files[-1]}, metrics, note)


def questions_path(workdir: Path, data: str) -> Path:
    """Every question's own means, a line each."""
    return workdir / "questions" / f"{data}.jsonl"


def check_questions(methods: Sequence[Method]) -> None:
    """InputError where a data set's questions are not the same for all: their means would not compare models."""
    for data in data_set_names(methods):
        seeds = [seed for method in methods for seed in method.seeds if data in seed.questions]
        digests = [{row["id"]: row["digest"] for row in seed.questions[data]} for seed in seeds]
        for seed, theirs in zip(seeds, digests, strict=True):
            if theirs == digests[0]:
                continue
            kinds = {
                f"only in {seeds[0].label}": digests[0].keys() - theirs.keys(),
                f"only in {seed.label}": theirs.keys() - digests[0].keys(),
                "of another wording": {
                    id_ for id_ in digests[0].keys() & theirs.keys() if digests[0][id_] != theirs[id_]
                },
            }
            parts = [f"{len(ids)} {kind} (such as {min(ids)})" for kind, ids in kinds.items() if ids]
            raise InputError(
                f"--report: expected answers to the same questions of {data}, got {len(digests[0])} questions in "
                f"{seeds[0].label} and {len(theirs)} in {seed.label}: {', '.join(parts)}"
            )


def data_set_names(methods: Sequence[Method]) -> list[str]:
    return list(dict.fromkeys(name for method in methods for seed in method.seeds for name in seed.summary["data"]))


def find_best(methods: Sequence[Method], data: str, column: Column) -> set[str]:
    """The best method of a column and those that cannot be told from it; none if that is all of them."""
    means = {method.name: statistics.fmean(values) for method in methods if (values := column.values(method, data))}
    if column.more_is_better is None or not means:
        return set()
    name = (max if column.more_is_better else min)(means, key=lambda name: means[name])
    measured = [method for method in methods if method.name in means]
    best = next(method for method in measured if method.name == name)
    equals = {method.name for method in measured if method is best or not differ(best, method, data, column)}
    return equals if len(equals) < len(measured) else set()


def differ(first: Method, second: Method, data: str, column: Column) -> bool:
    """Whether the means of two methods differ by more than chance, at the 95% level.

    The difference varies with the questions, by as much as the methods' means of the same question differ, and with the
    seeds of each method that has several. The three variances add up; Satterthwaite's degrees of freedom.
    """
    from scipy.stats import t

    ours, theirs = (method.question_means(data, column) for method in (first, second))
    differences = [ours[identity] - theirs[identity] for identity in ours.keys() & theirs.keys()]
    if len(differences) < FEWEST_QUESTIONS:
        return False
    samples = [differences, *(values for method in (first, second) if len(values := column.values(method, data)) > 1)]
    variances = [statistics.variance(sample) / len(sample) for sample in samples]
    total, mean = sum(variances), abs(statistics.fmean(differences))
    if not total:
        return mean > 0
    pairs = zip(variances, samples, strict=True)
    freedom = total**2 / sum(variance**2 / (len(sample) - 1) for variance, sample in pairs)
    return mean > float(t.ppf(0.975, freedom)) * math.sqrt(total)
