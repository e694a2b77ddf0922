"""What a page holds of a workdir: its curves, its tables, and as many of its responses as fit."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crpo_jax.answer.records import read_answer
from crpo_jax.answer.statistics import extract_answer
from crpo_jax.config import Config, load_config
from crpo_jax.data.record import Record
from crpo_jax.errors import InputError, one_line
from crpo_jax.page.lines import Lines
from crpo_jax.page.marks import clip, find_marks, in_utf16
from crpo_jax.page.measures import evaluation_tables, read_curves
from crpo_jax.page.parts import number, reasons_of, reward_parts
from crpo_jax.page.selection import EVERYTHING, ResponseSet, Selection, Take, response_sets, takes
from crpo_jax.reward.answer import PatternTimeout, is_right
from crpo_jax.reward.effective import find_effective_table
from crpo_jax.reward.rules import score_response
from crpo_jax.reward.scorer import score_row
from crpo_jax.store.metrics import read_metrics

MAX_BYTES = 4_900_000  # of what a page holds; its program and styles are the rest of 5 MB
MAX_RESPONSES = 3000
HEAD, TAIL, MAX_MARKS = 14_000, 6_000, 1500  # characters of a long text, and marks of any


def read_content(workdir: Path, selection: Selection = EVERYTHING) -> dict[str, Any]:
    """Everything that a page shows, as plain values; InputError names a file that cannot be read."""
    settings, metrics = load_config(workdir / "config.yaml", model=False), read_metrics(workdir)
    sets, curves, tables = response_sets(workdir, settings), read_curves(metrics), evaluation_tables(workdir, metrics)
    collected = Collected(settings, MAX_BYTES - len(encoded([curves, tables, [each.name for each in sets]])))
    lines = {each: Lines(each.path, partial(selection.wants, step=each.step)) for each in sets}
    for turn in takes(lines):
        if not collected.add(*turn):
            break
    written = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "run": {
            "name": workdir.resolve().name,
            "facts": run_facts(settings, trained=bool(metrics)),
            "written": written,
        },
        "selection": {"step": selection.step, "question": selection.question},
        "curves": curves,
        "tables": tables,
        "sets": [
            {
                "name": each.name,
                "step": each.step,
                "total": len(lines[each]),
                "shown": collected.shown.get(each.name, 0),
            }
            for each in sets
        ],
        "questions": list(collected.questions.values()),
        "responses": collected.in_order(sets),
    }


class Collected:
    """Questions and responses, until they fill the `room` of a page, in bytes."""

    def __init__(self, settings: Config, room: int) -> None:
        self.settings, self._room = settings, room
        self.questions: dict[tuple[str, str], dict[str, Any]] = {}
        self.responses: list[dict[str, Any]] = []
        self.shown: dict[str, int] = {}
        self._effective: list[np.ndarray | None] = []

    def add(self, *turn: Take) -> bool:
        """Adds responses that belong together; False once there is no more room."""
        entries, new = [], dict(self.questions)
        for responses, place, row in turn:
            row, right = self.scored(responses, row)
            key = str(row.get("id", "")), str(row.get("question", row.get("prompt", "")))
            if key not in new:
                new[key] = question_entry(row, len(new))
            entry = self.response_entry(responses, row, right)
            entries.append({"set": responses.name, "place": place, "question": new[key]["number"], **entry})
        added = [*entries, *list(new.values())[len(self.questions) :]]
        size = sum(len(encoded(each)) + 1 for each in added)
        if size > self._room or len(self.responses) + len(entries) > MAX_RESPONSES:
            return False
        self._room -= size
        self.questions = new
        self.responses += entries
        for entry in entries:
            self.shown[entry["set"]] = self.shown.get(entry["set"], 0) + 1
        return True

    def in_order(self, sets: Sequence[ResponseSet]) -> list[dict[str, Any]]:
        """The responses as their files have them."""
        order = {each.name: number for number, each in enumerate(sets)}
        return sorted(self.responses, key=lambda entry: (order[entry["set"]], entry["place"]))

    def scored(self, responses: ResponseSet, row: dict[str, Any]) -> tuple[dict[str, Any], bool | None]:
        """The row with its score, which the responses of an evaluation do not have on disk, and whether its answer is
        right."""
        if responses.step is not None or responses.path.parent.name != "responses":
            accuracy = number(row.get("accuracy"))
            return row, None if accuracy is None else accuracy >= 1
        try:
            answer = read_answer(Record(row, str(responses.path)), {})
        except InputError as problem:
            return row | {"error": str(problem)}, None
        reward = replace(self.settings.reward, design=responses.design)
        ids, effective = answer.token_ids, self.effective_table() if answer.token_ids is not None else None
        try:
            score = score_row(score_response(answer.question, answer.response, reward, ids, effective))
        except PatternTimeout as problem:
            return row | {"error": str(problem)}, None
        return row | score, is_right(answer.question, extract_answer(answer, self.settings), self.settings.reward)

    def effective_table(self) -> np.ndarray | None:
        if not self._effective:
            self._effective.append(find_effective_table(self.settings))
        return self._effective[0]

    def response_entry(self, responses: ResponseSet, row: Mapping[str, Any], right: bool | None) -> dict[str, Any]:
        response, question = text_of(row, "response"), text_of(row, "question", "prompt")
        why = reasons_of(row)
        tags, systems = asked_format(responses.design, self.settings)
        asked_about, marks = find_marks(question, response, why, tags, systems=systems)
        question, asked_about = clip(question, asked_about, HEAD, TAIL, MAX_MARKS)
        response, marks = clip(response, marks, HEAD, TAIL, MAX_MARKS)
        entry = {
            "step": number(row.get("step", responses.step)),
            "sample": number(row.get("sample")),
            "text": response,
            "marks": in_utf16(response, marks),
            "question_marks": in_utf16(question, asked_about),
            "total": number(row.get("total")),
            "right": right if row.get("answer") else None,
            "answer": clipped(row, "answer_found"),
            "parts": reward_parts(row, responses.design, self.settings.reward),
            "tokens": number(row.get("tokens")),
            "stopped": flag(row, "stopped"),
            "advantage": number(row.get("advantage")),
            "trained": flag(row, "trained"),
            "error": clipped(row, "error"),
            "traceback": clipped(row, "traceback"),
            "teacher": clipped(row, "teacher"),
        }
        return {name: value for name, value in entry.items() if value not in (None, [], "")}


def asked_format(design: str, settings: Config) -> tuple[tuple[str, str], bool]:
    """The tags of the two parts that a design wants, and whether it wants System 1 and System 2 in the first."""
    names = [name.partition("*")[0].strip() for name in design.split("+")]
    if {"grpo", "format", "citation"} & {*names} and "crpo" not in names:
        return (settings.reward.tags[0], settings.reward.tags[-1]), False
    return (("think", "answer"), False) if "released" in names else (("dx", "conclusion"), True)


def question_entry(row: Mapping[str, Any], place: int) -> dict[str, Any]:
    options = row.get("options")
    turns = row.get("turns")
    text, _ = clip(text_of(row, "question", "prompt"), [], HEAD, TAIL, MAX_MARKS)
    return {
        "number": place,
        "id": str(row.get("id", "")),
        "text": text,
        "options": [[str(name), str(option)[:HEAD]] for name, option in options.items()]
        if isinstance(options, Mapping)
        else [],
        "answer": str(row.get("answer", ""))[:HEAD],
        "turns": [turn_entry(turn) for turn in turns] if isinstance(turns, list) else [],
        "source": " ".join(str(row[name]) for name in ("source", "split") if row.get(name)),
    }


def turn_entry(turn: Any) -> list[str]:
    """Role and content of an earlier turn, written as a pair or as an object."""
    if isinstance(turn, Mapping):
        turn = [turn.get("role"), turn.get("content")]
    role, content = turn if isinstance(turn, list) and len(turn) == 2 else ("", turn)
    return [str(role), str(content)[: HEAD + TAIL]]


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that is a text that is not empty."""
    return next((row[name] for name in names if isinstance(row.get(name), str) and row[name]), "")


def clipped(row: Mapping[str, Any], name: str) -> str:
    return clip(text_of(row, name), [], HEAD, TAIL, MAX_MARKS)[0]


def flag(row: Mapping[str, Any], name: str) -> bool | None:
    return row[name] if isinstance(row.get(name), bool) else None


def run_facts(settings: Config, *, trained: bool) -> list[tuple[str, str]]:
    """What the head of the page says of a run; of an evaluation the data sets are in its table."""
    facts = [("model", one_line(settings.model.path or "from scratch", 120))]
    if trained:
        facts += [("questions", settings.data.source), ("reward", one_line(settings.reward.design, 200))]
    return [*facts, ("seed", str(settings.run.seed))]


def encoded(value: Any) -> bytes:
    """JSON that can stand in a script element: no `<`, and a lone surrogate as the escape it came from."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode("utf-8", "backslashreplace")
