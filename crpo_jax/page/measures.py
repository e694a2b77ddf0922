"""The curves and the tables of evaluations that a page shows, from a run's files."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crpo_jax.answer.records import read_summary
from crpo_jax.answer.statistics import estimate_count, estimate_share
from crpo_jax.page.parts import number
from crpo_jax.page.selection import held_out_files, held_out_step
from crpo_jax.store.files import read_rows

MAX_POINTS = 400  # of a curve; more steps are averaged
MAX_EVALUATIONS = 200  # in a table and among the points of a curve; of more, as many evenly spread ones
SHARES = ("accuracy", "format", "cross_reference", "consistency")
EVALUATION = "eval/"


def read_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every metric by step; `every` steps in a row are one point, their mean, at the first of them.

    Evaluations stand apart, at their own steps.
    """
    trained = [row for row in rows if any(name != "step" and not name.startswith(EVALUATION) for name in row)]
    every = max(1, math.ceil(len(trained) / MAX_POINTS))
    bins = [trained[start : start + every] for start in range(0, len(trained), every)]
    names = dict.fromkeys(name for row in trained for name in row if name != "step" and not name.startswith(EVALUATION))
    evaluated = thinned([row for row in rows if any(name.startswith(EVALUATION) for name in row)])
    measured = dict.fromkeys(name for row in evaluated for name in row if name.startswith(EVALUATION))
    return {
        "every": every,
        "steps": [part[0]["step"] for part in bins],
        "metrics": {name: [mean_of(part, name) for part in bins] for name in names},
        "evaluated": [row["step"] for row in evaluated],
        "measured": {name: [short(row.get(name)) for row in evaluated] for name in measured},
    }


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return short(sum(values) / len(values)) if values else None


def short(value: Any) -> float | None:
    """A number with the digits that a curve needs."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def evaluation_tables(workdir: Path, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table of the held-out evaluations of a training run, and one of an evaluation's summary, where there are
    such."""
    return [table for table in (held_out_table(workdir, metrics), summary_table(workdir)) if table["rows"]]


def held_out_table(workdir: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row per evaluation; the intervals are of 95% over questions."""
    files = {held_out_step(path): path for path in held_out_files(workdir)}
    means = {
        row["step"]: {name: estimate for name in row if (estimate := only_mean(row, name))}
        for row in metrics
        if any(name.startswith(EVALUATION) for name in row)
    }
    evaluated = sorted({*files, *means})
    steps = thinned(evaluated)
    rows = {step: means.get(step, {}) | (measure_held_out(files[step]) if step in files else {}) for step in steps}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    return {
        "title": "Held-out questions"
        + (f", {len(steps)} of {len(evaluated)} evaluations" if steps != evaluated else ""),
        "first": "step",
        "columns": columns,
        "rows": [{"name": str(step), "cells": [rows[step].get(name) for name in columns]} for step in steps],
    }


def thinned(values: Sequence[Any]) -> Sequence[Any]:
    """At most MAX_EVALUATIONS of the values, evenly spread, the first and the last among them."""
    if len(values) <= MAX_EVALUATIONS:
        return values
    return [values[place] for place in np.linspace(0, len(values) - 1, MAX_EVALUATIONS).round().astype(int)]


def only_mean(row: Mapping[str, Any], name: str) -> dict[str, float] | None:
    value = number(row[name]) if name.startswith(EVALUATION) else None
    return None if value is None else {"mean": value}


def measure_held_out(path: Path) -> dict[str, dict[str, float]]:
    """The measures of one evaluation with their intervals, under the names that metrics.jsonl gives them."""
    values: dict[str, list[list[float]]] = {}

    def add(name: str, value: Any) -> None:
        if (value := number(value)) is not None:
            values.setdefault(EVALUATION + name, []).append([value])

    for row in read_rows(path):
        add("mean", row.get("total"))
        for name in SHARES:
            add(name, row.get(name))
        add("failed", float("error" in row))
        add("length", row.get("tokens"))
        add("truncated", float(row.get("stopped") is False))
    return {name: estimate(values[name]) for name in values}


def estimate(by_question: list[list[float]]) -> dict[str, float]:
    shares = all(0 <= value <= 1 for values in by_question for value in values)
    of: Callable[[Sequence[Sequence[float]]], dict[str, float]] = estimate_share if shares else estimate_count
    return rounded(of(by_question))


def rounded(estimate: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name in ("mean", "low", "high") if (value := number(estimate.get(name))) is not None}


def summary_table(workdir: Path) -> dict[str, Any]:
    """A row per measure of summary.json, a column per data set."""
    path = workdir / "summary.json"
    data = read_summary(path)["data"] if path.exists() else {}
    cells = {name: dict(sorted(estimates(results), key=is_subject)) for name, results in data.items()}
    measures = list(dict.fromkeys(measure for of_set in cells.values() for measure in of_set))
    return {
        "title": "Data sets",
        "first": "measure",
        "columns": [f"{name} ({results.get('questions')} questions)" for name, results in data.items()],
        "rows": [{"name": measure, "cells": [cells[name].get(measure) for name in cells]} for measure in measures],
    }


def is_subject(entry: tuple[str, dict[str, float]]) -> bool:
    return entry[0].startswith("subjects / ")


def estimates(results: Mapping[str, Any], path: str = "") -> list[tuple[str, dict[str, float]]]:
    """Everything in a data set's results that has a mean, with the path that leads to it."""
    entries: list[tuple[str, dict[str, float]]] = []
    for name, value in results.items():
        if isinstance(value, Mapping):
            if number(value.get("mean")) is not None:
                entries.append((f"{path}{name}", rounded(value)))
            else:
                entries += estimates(value, f"{path}{name} / ")
    return entries
