"""What reward.design sums: whole designs, built-in parts, a judge, and functions, each with its weight."""

import difflib
import math
import re
from collections.abc import Collection, Sequence

from crpo_jax.config import Reward
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.reward.answer import answer_place
from crpo_jax.reward.parts import PARTS
from crpo_jax.reward.rules import DESIGNS

JUDGE = "judge"
"""The part that a model behind a server scores (reward.judge)."""

TAG_COUNTS = {"format": 1, "citation": 2, "grpo": 2}
"""The fewest tags that what reads them needs; the design grpo reads no more than two."""


def design_parts(settings: Reward, functions: Collection[str] = ()) -> tuple[tuple[str, float], ...]:
    """The rewards that `settings.design` sums, each with its weight: "crpo*1.0+my.module:f*0.5".

    A name is a whole design, a part, one of `functions`, or `module:function`.
    """
    built_in, parts = (*PARTS, JUDGE), dict[str, float]()
    for piece in settings.design.split("+"):
        name, star, factor = (text.strip() for text in piece.partition("*"))
        known = (*DESIGNS, *functions)
        if name not in known and name not in built_in and not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name):
            close = difflib.get_close_matches(name, (*known, *built_in), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(
                f"reward.design: expected {', '.join(known)} or module:function, got {name!r} in {settings.design!r}; "
                f"the parts may also be {', '.join(built_in)}{hint}"
            )
        if name in parts:
            raise InputError(f"reward.design: {name} stands twice in {settings.design!r}")
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise InputError(f"reward.design: expected a number after {name}*, got {factor!r}")
        parts[name] = weight
    answer_place(settings.answer_in)
    check_tags(settings, [name for name in parts if name not in functions])
    return tuple(parts.items())


def design_of_evaluations(settings: Reward, questions: Sequence[Question]) -> str:
    """The design by which runs are compared: `crpo`, whatever a run's own, or the run's own where questions have no
    options, since the clinical format means nothing there."""
    return "crpo" if all(question.kind == "choice" for question in questions) else settings.design


def built_in_part(design: str) -> str:
    """What of a design needs neither a judge nor a function of a user's; may be empty."""
    named = {piece: piece.partition("*")[0].strip() for piece in design.split("+")}
    return "+".join(piece for piece, name in named.items() if name in DESIGNS or name in PARTS)


def check_tags(settings: Reward, names: Collection[str]) -> None:
    """InputError where reward.tags does not suit what reads it."""
    readers, tags = [name for name in TAG_COUNTS if name in names], settings.tags
    if not readers:
        return
    fewest = max(TAG_COUNTS[name] for name in readers)
    if len(tags) < fewest or ("grpo" in readers and len(tags) > 2):
        wanted = "two different tag names" if "grpo" in readers else f"at least {fewest} different tag names"
    elif len(set(tags)) < len(tags) or not all(re.fullmatch(r"[\w-]+", tag) for tag in tags):
        wanted = "two different tag names" if "grpo" in readers else "different tag names"
    else:
        return
    raise InputError(f"reward.tags: expected {wanted}, got {list(tags)}")
