"""A user's own measures of responses, evaluate.measures: functions called as reward functions are, apart from any
reward."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from crpo_jax.answer.records import Answer
from crpo_jax.config import Config
from crpo_jax.errors import Fault, InputError
from crpo_jax.reward.scorer import Scored, Scorer, ScoringError

BATCH = 256  # responses in a call

Measures = Mapping[str, Scorer]
"""By the name in evaluate.measures."""


@contextlib.contextmanager
def open_measures(settings: Config) -> Iterator[Measures]:
    """The functions, each in a process of its own; InputError where one cannot be loaded."""
    names = settings.evaluate.measures
    for name in names:
        if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name) or names.count(name) > 1:
            raise InputError(f"evaluate.measures: expected module:function, each once, got {list(names)}")
    with contextlib.ExitStack() as scorers:
        yield {
            name: scorers.enter_context(
                Scorer(replace(settings.reward, design=name, workers=0), setting="evaluate.measures")
            )
            for name in names
        }


def measure_answers(measures: Measures, answers: Sequence[Answer]) -> dict[str, list[Scored]]:
    """By measure what it says of every answer; a Fault where more than reward.max_failed_share of a call failed."""
    results: dict[str, list[Scored]] = {name: [] for name in measures}
    for name, scorer in measures.items():
        for start in range(0, len(answers), BATCH):
            batch = answers[start : start + BATCH]
            known = [answer.token_ids for answer in batch if answer.token_ids is not None]
            ids = known if len(known) == len(batch) else None
            try:
                results[name] += scorer.score(
                    [answer.question for answer in batch], [answer.response for answer in batch], ids
                )
            except ScoringError as error:
                raise Fault(f"evaluate.measures: {error}") from None
    return results
