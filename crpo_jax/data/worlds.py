"""The embedded worlds: data sources that are generated, not read, and bring a teacher of their own. No jax."""

from collections.abc import Sequence

from crpo_jax.config import Data
from crpo_jax.data import arithmetic, vignettes
from crpo_jax.data.question import Question

WORLDS = ("vignettes", "arithmetic")
"""The values of data.source that are embedded worlds."""


def generate_questions(data: Data, split: str) -> list[Question]:
    """The questions of a split: data.vignettes or data.problems of them for training, data.eval_questions held out."""
    generate, count = (
        (vignettes.vignettes, data.vignettes) if data.source == "vignettes" else (arithmetic.problems, data.problems)
    )
    return generate(split, count if split == data.split else data.eval_questions or count)


def teacher_responses(source: str, questions: Sequence[Question], seed: int) -> list[str]:
    """The responses of a world's built-in teacher to its questions."""
    respond = vignettes.teacher_response if source == "vignettes" else arithmetic.teacher_response
    return [respond(question, seed) for question in questions]
