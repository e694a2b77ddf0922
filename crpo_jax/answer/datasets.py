"""A model answers whole data sets: responses are on disk as they end, and a stopped run continues with what is
missing."""

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from crpo_jax.answer.records import Answer, answer_to_row, read_dropped
from crpo_jax.answer.statistics import extract_answer
from crpo_jax.config import Config, replaced
from crpo_jax.data.prompts import Fitting, check_dropped, fit_prompts
from crpo_jax.data.question import Question
from crpo_jax.disk import replace_file
from crpo_jax.errors import InputError
from crpo_jax.model.decode import SamplerWeights
from crpo_jax.model.huggingface import model_folder
from crpo_jax.model.lora import Policy
from crpo_jax.reward.answer import is_right
from crpo_jax.rollout.engine import Response
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.runtime import Runtime, open_runtime
from crpo_jax.runtime.signals import StopRequested, StopSignal
from crpo_jax.store.files import writing
from crpo_jax.store.journal import Journal


def answer_data_sets(
    settings: Config, data_sets: Mapping[str, Sequence[Question]], folder: Path, stop: StopSignal
) -> None:
    """Answers every question evaluate.samples times into folder/NAME.jsonl; what is on disk already is not sampled
    again.

    A response depends on run.seed, the data set's name, the question's place in it and the sample, not on when or with
    which others it was sampled: a run that was stopped ends with the same responses. Questions longer than
    data.max_prompt_tokens go into folder/dropped.json. Raises StopRequested where `stop` asks for it.
    """
    evaluate = settings.evaluate
    runtime = open_runtime(
        replaced(
            settings,
            {
                "rollout.temperature": evaluate.temperature,
                "rollout.top_p": evaluate.top_p,
                "rollout.max_new_tokens": evaluate.max_new_tokens,
            },
        )
    )
    tokenizer, weights = runtime.vocabulary.tokenizer, None
    prompted = {name: fit_prompts(questions, settings.data, tokenizer) for name, questions in data_sets.items()}
    for name, questions in prompted.items():
        check_dropped(questions.dropped.values(), len(data_sets[name]), f"questions of {name}", settings.data)
    for name, questions in prompted.items():
        with Journal(folder / f"{name}.jsonl", {"id": str, "question": str, "sample": int}) as journal:
            on_disk = samples_on_disk(journal, questions)
            answered = [len(on_disk.get(question.id, ())) >= evaluate.samples for question in questions.questions]
            missing = np.flatnonzero(~np.array(answered, bool))
            status = Status(name, runtime.settings, len(answered), sum(answered))
            if missing.size:
                weights = weights or evaluated_weights(runtime)
                with status.progress:
                    answer_missing(runtime, weights, questions, missing, name, journal, on_disk, status, stop)
            status.end()
    if any(questions.dropped for questions in prompted.values()):
        path = folder / "dropped.json"
        dropped = read_dropped(folder)
        with writing(path):
            replace_file(path, json.dumps(dropped | {name: fits.dropped for name, fits in prompted.items()}))


def answer_missing(
    runtime: Runtime,
    weights: SamplerWeights,
    questions: Fitting,
    missing: np.ndarray,
    name: str,
    journal: Journal,
    on_disk: Mapping[str, set[int]],
    status: "Status",
    stop: StopSignal,
) -> None:
    """Samples the questions at the places `missing`, and writes the responses that are not on disk."""
    vocabulary = runtime.vocabulary

    def finished(responses: list[Response]) -> None:
        answers = []
        for response in responses:
            question, ids = questions.questions[int(missing[response.prompt])], vocabulary.content_ids(response)
            text, tokens = vocabulary.decode(response), len(response.tokens)
            answers.append(Answer(question, response.sample, text, ids, tokens, response.stopped))
        new = [answer for answer in answers if answer.sample not in on_disk.get(answer.question.id, ())]
        journal.append(*map(answer_to_row, new))
        status.add(answers)
        if stop.requested:
            raise StopRequested

    key = jax.random.fold_in(runtime.key, zlib.crc32(name.encode()))
    prompts, group = [questions.prompts[int(place)] for place in missing], runtime.settings.evaluate.samples
    runtime.sampler.generate(weights, prompts, key=key, group=group, ids=missing.tolist(), on_finished=finished)


def samples_on_disk(journal: Journal, questions: Fitting) -> dict[str, set[int]]:
    """The samples that the file holds of each question; a file of other questions is refused."""
    by_id = {question.id: question for question in questions.questions}
    samples: dict[str, set[int]] = {}
    for row in journal.rows:
        question = by_id.get(row.get("id", ""))
        if question is None or row.get("question") != question.question:
            raise InputError(
                f"{journal.path}: expected responses to the questions of --data, got a response to {row.get('id')!r}; "
                "take another --workdir"
            )
        samples.setdefault(question.id, set()).add(row["sample"])
    return samples


def evaluated_weights(runtime: Runtime) -> SamplerWeights:
    """The model's weights in their sampling form, never held in more than model.dtype."""
    folder, dtype = model_folder(runtime.settings.model.path), runtime.settings.model.dtype
    return runtime.sampler_weights(Policy(runtime.start_weights(folder, runtime.layout.master, dtype)))


class Status:
    """What a person sees while a data set is answered: progress, accuracy, speed and time left."""

    def __init__(self, name: str, settings: Config, questions: int, done: int) -> None:
        self._name, self._settings, self._questions, self._samples = (
            name,
            settings,
            questions,
            settings.evaluate.samples,
        )
        self.progress = Progress(questions * self._samples, done * self._samples)
        self._done, self._right, self._valid, self._sampled, self._tokens = done * self._samples, 0, 0, 0, 0
        self._judged = False  # whether there are right answers to compare with
        self._printed, self._began = self._tenth(), time.monotonic()
        resumed = f", {done} questions answered before" if done else ""
        self.progress.write(f"{name}: {questions} questions x {self._samples} samples{resumed}")

    def _tenth(self) -> int:
        return 10 * self._done // max(self._questions * self._samples, 1)

    def add(self, answers: Sequence[Answer]) -> None:
        found = [extract_answer(answer, self._settings) for answer in answers]
        self._done, self._sampled = self._done + len(answers), self._sampled + len(answers)
        reward, pairs = self._settings.reward, zip(answers, found, strict=True)
        self._right += sum(is_right(answer.question, text, reward) for answer, text in pairs)
        self._valid += sum(text is not None for text in found)
        self._tokens += sum(answer.tokens or 0 for answer in answers)
        self._judged |= any(answer.question.kind != "none" for answer in answers)
        shares = f"accuracy {self._right / self._sampled:.3f}  valid {self._valid / self._sampled:.3f}  "
        speed = f"{self._tokens / (time.monotonic() - self._began):,.0f} tok/s"
        line = f"{self._name}  {shares if self._judged else ''}{speed}"
        self.progress.update(self._done, line)
        if self._tenth() > self._printed:
            self._printed = self._tenth()
            self.progress.write(f"{self._done}/{self._questions * self._samples}  {line}")

    def end(self) -> None:
        self.progress.write(f"{self._name}: {self._questions} questions answered")
