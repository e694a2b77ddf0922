"""A model answers whole data sets, wave by wave, each wave's responses on disk before the next begins."""

import dataclasses
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from crpo_jax.answer.records import Answer, letter_of, row_of
from crpo_jax.config import Config
from crpo_jax.data.prompts import Fitting, fit_prompts
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.model import huggingface
from crpo_jax.model.decode import Weights
from crpo_jax.model.placement import to_sampling
from crpo_jax.model.shape import Shape
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.parallel.mesh import make_mesh
from crpo_jax.rollout.engine import Engine, Response
from crpo_jax.runtime import setup, start
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.signals import Stop, Stopped
from crpo_jax.store.journal import Journal


def examine(settings: Config, sets: Mapping[str, Sequence[Question]], folder: Path, stop: Stop) -> None:
    """Answers every question evaluate.samples times into folder/NAME.jsonl; what stands there already is not asked again.

    A response depends on run.seed, the data set's name, the question's place in it and the sample, not on when or with
    which others it was drawn: a run that was stopped ends with the same responses. Questions longer than
    data.max_prompt_tokens go into folder/dropped.json. Raises Stopped where `stop` asks for it.
    """
    evaluate = settings.evaluate
    drawn = {"temperature": evaluate.temperature, "top_p": evaluate.top_p, "max_new_tokens": evaluate.max_new_tokens}
    settings = dataclasses.replace(settings, rollout=dataclasses.replace(settings.rollout, **drawn))
    mesh = make_mesh(settings.parallel.mesh)
    settings, shape = setup.shape_for(settings, mesh)
    text = setup.text_for(settings, shape)
    fitted = {name: fit_prompts(questions, settings.data, text.tokenizer) for name, questions in sets.items()}
    engine, weights = setup.sampler(settings, shape, mesh, text), None
    for name, asked in fitted.items():
        with Journal(folder / f"{name}.jsonl") as journal:
            before = samples_on_disk(journal, asked)
            complete = np.array([len(before.get(question.id, ())) >= evaluate.samples for question in asked.questions])
            weights = weights or (None if complete.all() else sampling_weights(settings, shape, mesh))
            tally = Tally(name, settings, len(asked.questions), int(complete.sum()))
            if weights:
                ask(
                    engine,
                    weights,
                    asked,
                    np.flatnonzero(~complete),
                    text,
                    settings,
                    name,
                    journal,
                    before,
                    tally,
                    stop,
                )
            tally.end()
    if any(asked.dropped for asked in fitted.values()):
        kept = folder / "dropped.json"
        dropped = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        kept.write_text(json.dumps(dropped | {name: asked.dropped for name, asked in fitted.items()}), encoding="utf-8")


def ask(
    engine: Engine,
    weights: Weights,
    asked: Fitting,
    left: np.ndarray,
    text: setup.Text,
    settings: Config,
    name: str,
    journal: Journal,
    before: Mapping[str, set[int]],
    tally: "Tally",
    stop: Stop,
) -> None:
    """Draws the samples of the questions at the places `left`, and keeps those that are not on disk."""

    def finished(responses: list[Response]) -> None:
        answers = []
        for response in responses:
            question, ids = asked.questions[int(left[response.prompt])], text.body(response)
            answers.append(
                Answer(question, response.sample, text.of(response), ids, len(response.tokens), response.stopped)
            )
        journal.append(
            *(row_of(answer) for answer in answers if answer.sample not in before.get(answer.question.id, ()))
        )
        tally.add(answers)
        if stop.requested:
            raise Stopped

    key = jax.random.fold_in(jax.random.key(settings.run.seed), zlib.crc32(name.encode()))
    prompts = [asked.prompts[int(place)] for place in left]
    engine.generate(weights, prompts, key=key, group=settings.evaluate.samples, ids=left.tolist(), finished=finished)


def samples_on_disk(journal: Journal, asked: Fitting) -> dict[str, set[int]]:
    """The samples that the file holds of each question; a file of other questions is refused."""
    wanted = {question.id: question for question in asked.questions}
    found: dict[str, set[int]] = {}
    for row in journal.rows:
        question = wanted.get(row.get("id", ""))
        if question is None or row.get("question") != question.question:
            raise InputError(
                f"{journal.path}: expected responses to the questions of --data, got one to {row.get('id')!r}; take another --workdir"
            )
        found.setdefault(question.id, set()).add(int(row["sample"]))
    return found


def sampling_weights(settings: Config, shape: Shape, mesh: Mesh) -> Weights:
    """The model's weights in their sampling form, never held in more than model.dtype."""
    table = LAYOUTS[settings.parallel.layout].master
    loaded = start.start_model(
        huggingface.model_folder(settings.model.path), settings, shape, mesh, table, settings.model.dtype
    )
    return to_sampling(shape, mesh, settings.model.dtype)(loaded)


class Tally:
    """What a person sees while a data set is answered: how far, how well, how fast, how long still."""

    def __init__(self, name: str, settings: Config, questions: int, done: int) -> None:
        self._name, self._settings, self._questions, self._samples = (
            name,
            settings,
            questions,
            settings.evaluate.samples,
        )
        self._progress = Progress(questions * self._samples, done * self._samples)
        self._done, self._right, self._valid, self._drawn, self._tokens = done * self._samples, 0, 0, 0, 0
        self._said, self._began = self._tenth(), time.monotonic()
        self._progress.keep(
            f"{name}: {questions} questions x {self._samples} samples"
            + (f", {done} questions answered before" if done else "")
        )

    def _tenth(self) -> int:
        return 10 * self._done // max(self._questions * self._samples, 1)

    def add(self, answers: Sequence[Answer]) -> None:
        letters: list[Any] = [letter_of(answer, self._settings) for answer in answers]
        self._done, self._drawn = self._done + len(answers), self._drawn + len(answers)
        self._right += sum(letter == answer.question.answer for letter, answer in zip(letters, answers, strict=True))
        self._valid += sum(letter is not None for letter in letters)
        self._tokens += sum(answer.tokens or 0 for answer in answers)
        rate = self._tokens / (time.monotonic() - self._began)
        line = f"{self._name}  accuracy {self._right / self._drawn:.3f}  valid {self._valid / self._drawn:.3f}  {rate:,.0f} tok/s"
        self._progress.show(self._done, line)
        if self._tenth() > self._said:
            self._said = self._tenth()
            self._progress.keep(f"{self._done}/{self._questions * self._samples}  {line}")

    def end(self) -> None:
        self._progress.keep(f"{self._name}: {self._questions} questions answered")
