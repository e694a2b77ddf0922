"""Which questions a step trains on: a pure function of the seed and the step, with no iterator whose state could be lost."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import grain

from crpo_jax.config import Data
from crpo_jax.data.question import Question, halves, read
from crpo_jax.errors import InputError

Item = TypeVar("Item")


class Batches(Generic[Item]):
    """Batches of questions, or of a cold start's traces, shuffled anew every epoch.

    Step s takes the positions [s*p, (s+1)*p) of the endless sequence of epochs, p = prompts_per_step; an epoch is a
    permutation of all questions, and where it ends inside a batch the next one goes on. Another `stream` of the same seed is
    another order.
    """

    def __init__(self, questions: Sequence[Item], prompts_per_step: int, seed: int, stream: str = "questions") -> None:
        if not questions:
            raise InputError("data: expected at least one question to train on, got none")
        if prompts_per_step < 1:
            raise InputError(f"crpo.prompts_per_step: expected at least 1, got {prompts_per_step}")
        self.questions = questions
        self.prompts_per_step = prompts_per_step
        # grain seeds with 32 bits; seeds that agree in their low bits must not give the same order
        low = int.from_bytes(hashlib.sha256(f"{stream}:{seed}".encode()).digest()[:4], "big")
        self._order: Any = grain.MapDataset.range(len(questions)).seed(low).shuffle().repeat(reseed_each_epoch=True)

    def batch(self, step: int) -> list[Item]:
        """The questions of a step."""
        start = step * self.prompts_per_step
        return [self.questions[int(self._order[place])] for place in range(start, start + self.prompts_per_step)]

    def steps(self, epochs: int) -> int:
        """Steps until every question has been seen `epochs` times."""
        return -(-epochs * len(self.questions) // self.prompts_per_step)


def questions_for(data: Data, split: str) -> list[Question]:
    """The questions of data.split (with data.part applied) or data.eval_split (whole).

    Vignettes are made, not read; their splits share no combination of findings.
    """
    if split not in (data.split, data.eval_split):
        raise InputError(f"split: expected data.split={data.split} or data.eval_split={data.eval_split}, got {split!r}")
    if data.split == data.eval_split:
        raise InputError(f"data.eval_split: expected another split than data.split, got {data.eval_split!r} for both")
    training = split == data.split
    if data.source == "vignettes":
        from crpo_jax.data.vignettes import vignettes

        if training:
            return halves(vignettes(split, data.vignettes), data.part)
        return vignettes(split, data.eval_questions or data.vignettes)
    if training:
        return halves(read(data.source, data.path, split), data.part)
    return read(data.source, evaluation_path(data), split)


def evaluation_path(data: Data) -> str:
    """data.eval_path, or data.path where that is a folder or the hub: a single file is one split, and no run reports on what it trained on."""
    if (
        data.path
        and Path(data.path).is_file()
        and (not data.eval_path or Path(data.eval_path).resolve() == Path(data.path).resolve())
    ):
        got = (
            f"data.path={data.path} for both"
            if data.eval_path
            else f"none beside the single file data.path={data.path}"
        )
        raise InputError(f"data.eval_path: expected a file or folder of its own for split {data.eval_split}, got {got}")
    return data.eval_path or data.path
