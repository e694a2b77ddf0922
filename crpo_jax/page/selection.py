"""Which responses of a workdir a page takes, and in which order while there is room."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crpo_jax.config import Config
from crpo_jax.page.lines import Lines, spread

WHOLE_HISTORIES = 16  # held-out questions shown at every evaluation; further ones at the first and the last alone


@dataclass(frozen=True)
class ResponseSet:
    """A file of responses; `design` is the reward that scored them."""

    name: str
    path: Path
    design: str
    step: int | None = None


@dataclass(frozen=True)
class Selection:
    """Which responses a page is to hold: those of one step, or to one question; all where both are None."""

    step: int | None = None
    question: str | None = None

    def wants(self, line: bytes, step: int | None) -> bool:
        """Whether a line of a file is one of them; a held-out file is of one `step`, which its lines do not name."""
        if self.step is None and self.question is None:
            return True
        if self.step is not None and step is None and f'"step": {self.step},'.encode() not in line:
            return False
        if self.question is not None and quoted(self.question) not in line:
            return False
        try:
            row = json.loads(line)  # slow, so only where the bytes are right
        except (ValueError, RecursionError):
            return True  # reading it will say what is wrong
        matches = isinstance(row, dict) and self.question in (None, row.get("id"))
        return matches and self.step in (None, row.get("step", step))


def quoted(text: str) -> bytes:
    """A text as files of JSON lines have it."""
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace")


EVERYTHING = Selection()


def held_out_step(path: Path) -> int:
    """The step of a file report/held_out_<step>.jsonl."""
    return int(path.stem.rpartition("_")[2])


def held_out_files(workdir: Path) -> list[Path]:
    paths = (workdir / "report").glob("held_out_*.jsonl")
    return sorted((path for path in paths if path.stem.rpartition("_")[2].isdecimal()), key=held_out_step)


def response_sets(workdir: Path, settings: Config) -> list[ResponseSet]:
    """The files of responses in a workdir: a run's, its held-out questions by step, an evaluation's data sets."""
    sets = [ResponseSet("training", workdir / "samples.jsonl", settings.reward.design)]
    for path in held_out_files(workdir):
        step = held_out_step(path)
        sets.append(ResponseSet(f"held out, step {step}", path, "crpo", step))
    sets += [ResponseSet(path.stem, path, "crpo") for path in sorted((workdir / "responses").glob("*.jsonl"))]
    return [each for each in sets if each.path.is_file()]


Take = tuple[ResponseSet, int, dict[str, Any]]


def takes(lines_of: Mapping[ResponseSet, Lines]) -> Iterator[list[Take]]:
    """The responses in the order in which they are taken while there is room, some at a time: held-out questions at
    every evaluation or at the first and the last, groups of a training step whole, samples of a data set."""
    held_out = {each: lines for each, lines in lines_of.items() if each.step is not None}
    others = {each: lines for each, lines in lines_of.items() if each.step is None}
    streams = [held_out_takes(held_out)] if held_out else []
    streams += [group_takes(each, lines) for each, lines in others.items()]
    while streams:
        for stream in list(streams):
            rows = next(stream, None)
            if rows is None:
                streams.remove(stream)
            else:
                yield rows


def held_out_takes(lines_of: Mapping[ResponseSet, Lines]) -> Iterator[list[Take]]:
    """The same questions at the first and the last evaluation, some at all of them; then what is left."""
    places = list(spread(max(map(len, lines_of.values()))))
    ends, histories = {min(lines_of, key=step_of), max(lines_of, key=step_of)}, {*places[:WHOLE_HISTORIES]}
    for first in (True, False):
        for place in places:
            sets = [each for each in lines_of if (each in ends or place in histories) == first]
            yield [(each, place, lines_of[each][place]) for each in sets if place < len(lines_of[each])]


def step_of(responses: ResponseSet) -> int:
    return responses.step or 0


def group_takes(responses: ResponseSet, lines: Lines) -> Iterator[list[Take]]:
    """Whole groups, evenly spread over the file."""
    taken: set[int] = set()
    for place in spread(len(lines)):
        if place not in taken:
            rows = lines.group(place)
            taken.update(place for place, _ in rows)
            yield [(responses, place, row) for place, row in rows]
