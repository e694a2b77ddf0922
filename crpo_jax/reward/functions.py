"""A user's reward functions, TRL's convention: `f(prompts, completions, **columns)` returns a reward or None for each.

reward.design names them as `module:function`; from Python they may also be given as objects.
"""

import importlib
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from crpo_jax.data.question import Question
from crpo_jax.reward.rules import TokenIds

RewardFunction = Callable[..., Iterable[float | None]]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a response has no score; such a response carries no gradient."""

    error: str
    traceback: str = ""


class BadRewards(Exception):
    """A function returned something other than a list with a reward for each completion."""


def failure_of(error: BaseException) -> Failure:
    return Failure(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))


def import_path(function: RewardFunction) -> str | None:
    """`module:function` if another process can import the object by it; None for a lambda, a closure and the like."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not name or module == "__main__":
        return None
    package = module.partition(".")[0]
    try:
        same = attrgetter(name)(sys.modules[module]) is function
        on_disk = any(finder.find_spec(package, None) for finder in sys.meta_path)
    except (KeyError, AttributeError):
        return None
    return f"{module}:{name}" if same and on_disk else None


def design_name(function: RewardFunction) -> str:
    """What reward.design calls a function given as an object: its import path, or its bare name where it has none."""
    name = getattr(function, "__name__", type(function).__name__)
    return import_path(function) or re.sub(r"\W", "", name) or "function"


def load_function(path: str) -> RewardFunction | Failure:
    """The function at `module:function`, also in the working directory; a Failure where it cannot be loaded."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: RewardFunction = attrgetter(name)(importlib.import_module(module))
        if not callable(function):
            raise TypeError(f"{path} is no function but {function!r}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 (an import runs any code)
        return failure_of(error)
    return function


def call_function(
    function: RewardFunction,
    name: str,
    questions: Sequence[Question],
    responses: Sequence[str],
    token_ids: Sequence[TokenIds] | None,
) -> list[float | Failure | None]:
    """A function's rewards for a whole batch.

    The function gets `prompts` (the questions' texts), `completions`, `completion_ids` where the tokens are known, and
    by name a list per column: id, answer, options, source, split and every extra column of the questions.
    """
    extra = dict.fromkeys(key for question in questions for key in question.columns)
    columns: dict[str, list[Any]] = {key: [question.columns.get(key) for question in questions] for key in extra}
    for key in ("id", "answer", "options", "source", "split"):
        columns[key] = [getattr(question, key) for question in questions]
    columns |= {"prompts": [question.question for question in questions], "completions": list(responses)}
    columns.pop("completion_ids", None)
    if token_ids is not None:
        columns["completion_ids"] = [list(map(int, ids)) for ids in token_ids]
    rewards = function(**columns)
    try:
        rewards = list(rewards)
    except TypeError:
        raise BadRewards(f"{name}: expected a list of {len(responses)} rewards, got {rewards!r}") from None
    if len(rewards) != len(responses):
        raise BadRewards(f"{name}: expected {len(responses)} rewards, one per completion, got {len(rewards)}")
    return [None if reward is None else check_reward(reward, name) for reward in rewards]


def check_reward(reward: Any, name: str) -> float | Failure:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        return Failure(f"{name}: expected a number or None as reward, got {reward!r}")
    return value if math.isfinite(value) else Failure(f"{name}: expected a finite reward, got {value}")
