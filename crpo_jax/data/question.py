"""The record of one multiple-choice question, whatever it came from. No jax."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    """A question with its options by letter and the letter of the right one.

    `question` is the text without the options; `columns` keeps everything else the source had, for plug-in rewards,
    per-subject tables and the embedded world's truth.
    """

    id: str
    question: str
    options: Mapping[str, str]
    answer: str
    source: str = ""
    split: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
