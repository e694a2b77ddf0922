"""The questions of a run, and of each of its steps: a function of the seed and the step, with no state to be saved."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import grain

from crpo_jax.config import Data
from crpo_jax.data.question import Question, select_part
from crpo_jax.data.readers import read_questions
from crpo_jax.data.worlds import WORLDS, generate_questions
from crpo_jax.errors import InputError

Example = TypeVar("Example")


class Batches(Generic[Example]):
    """Batches of training examples (questions, or traces of the cold start), shuffled anew every epoch.

    The epochs, each a permutation of all examples, form one endless sequence; step s takes its positions
    [s * batch_size, (s + 1) * batch_size), across the end of an epoch where it falls inside a batch. Another `stream`
    of the same seed is another order.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, stream: str = "questions") -> None:
        if not examples:
            raise InputError("data: expected at least one question to train on, got none")
        if batch_size < 1:
            raise InputError(f"crpo.prompts_per_step: expected at least 1, got {batch_size}")
        self._examples = examples
        self._batch_size = batch_size
        # grain seeds with 32 bits; seeds that agree in their low bits must not give the same order
        seed32 = int.from_bytes(hashlib.sha256(f"{stream}:{seed}".encode()).digest()[:4], "big")
        self._order: Any = grain.MapDataset.range(len(examples)).seed(seed32).shuffle().repeat(reseed_each_epoch=True)

    def batch(self, step: int) -> list[Example]:
        """The examples of a step."""
        start = step * self._batch_size
        return [self._examples[int(self._order[place])] for place in range(start, start + self._batch_size)]

    def steps(self, epochs: int) -> int:
        """Steps until every example has been seen `epochs` times."""
        return -(-epochs * len(self._examples) // self._batch_size)


def load_questions(data: Data, split: str) -> list[Question]:
    """The questions of data.split (with data.part applied, auto as all) or data.eval_split (all of them).

    Those of an embedded world are generated, not read.
    """
    if split not in (data.split, data.eval_split):
        raise InputError(f"split: expected data.split={data.split} or data.eval_split={data.eval_split}, got {split!r}")
    if data.split == data.eval_split:
        raise InputError(f"data.eval_split: expected another split than data.split, got {data.eval_split!r} for both")
    training = split == data.split
    if data.source in WORLDS:
        questions = generate_questions(data, split)
    else:
        questions = read_questions(data.source, data.path if training else evaluation_path(data), split, data)
    return select_part(questions, data.part) if training and data.part != "auto" else questions


def evaluation_path(data: Data) -> str:
    """data.eval_path, or data.path where that is a folder or the hub.

    A single file is one split: a run that evaluated on it would report on the questions it trained on.
    """
    training, evaluation = Path(data.path), Path(data.eval_path or data.path)
    if data.path and training.is_file() and training.resolve() == evaluation.resolve():
        got = (
            f"data.path={data.path} for both"
            if data.eval_path
            else f"none beside the single file data.path={data.path}"
        )
        raise InputError(f"data.eval_path: expected a file or folder of its own for split {data.eval_split}, got {got}")
    return data.eval_path or data.path
