"""A user's reward functions, TRL's convention: `f(prompts, completions, **columns)` returns a reward or None for each.

A function may be async. In a scoring process its time limit is that of any function; where it is called in the run's
own process, it is cancelled after as long.

reward.design names them as `module:function`; from Python they may also be given as objects.
"""

import asyncio
import difflib
import importlib
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from crpo_jax.data.question import Question
from crpo_jax.errors import brief, one_line
from crpo_jax.reward.rules import TokenIds

RewardFunction = Callable[..., Iterable[float | None] | Awaitable[Iterable[float | None]]]

LONGEST_TRACEBACK = 20_000  # characters


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a response has no score, in one line; such a response carries no gradient.

    Only where a function raised is there a traceback: it points into that function.
    """

    error: str
    traceback: str = ""


class BadRewards(Exception):
    """A function returned something other than a list with a reward for each completion."""


def failure_of(error: BaseException) -> Failure:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (an exception of the user's own, whose text may be broken too)
        text = "(an exception without a readable text)"
    frames, own = error.__traceback__, {__file__, str(Path(__file__).with_name("worker.py"))}
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename in own:  # how the function was called
        frames = frames.tb_next
    trace = "".join(traceback.format_exception(type(error), error, frames))
    if len(trace) > LONGEST_TRACEBACK:
        trace = f"{trace[: LONGEST_TRACEBACK // 2]}\n...\n{trace[-LONGEST_TRACEBACK // 2 :]}"
    return Failure(one_line(f"{type(error).__name__}: {text}"), trace)


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
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:  # noqa: BLE001 (an import runs any code)
        return Failure(f"{failure_of(error).error}{raised_at(error)}")
    try:
        function: RewardFunction = attrgetter(name)(module)
    except AttributeError as error:
        similar = difflib.get_close_matches(name, (key for key, value in vars(module).items() if callable(value)))
        return Failure(failure_of(error).error + (f"; similar: {', '.join(similar)}" if similar else ""))
    return function if callable(function) else Failure(one_line(f"{path} is no function but {brief(function)}"))


def raised_at(error: BaseException) -> str:
    """The line of the user's code that an import failed in, where it was not the import itself."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    ours = {__file__, importlib.__file__}
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames[-1].filename not in ours else ""


def call_function(
    function: RewardFunction,
    questions: Sequence[Question],
    responses: Sequence[str],
    token_ids: Sequence[TokenIds] | None,
    async_limit: float | None = None,
) -> list[float | Failure | None]:
    """A function's rewards for a whole batch; an async function is cancelled after `async_limit` seconds.

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
    rewards, expected = function(**columns), f"{len(responses)} rewards, one per completion"
    if inspect.isawaitable(rewards):
        rewards = run_async(rewards, async_limit)
    try:
        # To iterate over these would give numbers that are no rewards: keys, or the digits of a text.
        iterator = None if isinstance(rewards, str | bytes | bytearray | Mapping | Set) else iter(rewards)
    except TypeError:
        iterator = None
    if iterator is None:
        raise BadRewards(one_line(f"expected a list of {expected}, got {brief(rewards)}"))
    values = list(islice(iterator, len(responses) + 1))  # a generator may have no end
    if len(values) != len(responses):
        raise BadRewards(f"expected {expected}, got {len(values) if len(values) < len(responses) else 'more'}")
    return [None if reward is None else check_reward(reward) for reward in values]


def run_async(rewards: Awaitable[Any], limit: float | None) -> Any:
    """What an async function returns; TimeoutError after `limit` seconds."""

    async def bounded() -> Any:
        clock = asyncio.timeout(limit)
        try:
            async with clock:
                return await rewards
        except TimeoutError:
            if not clock.expired():  # a time-out of the function's own
                raise
        raise TimeoutError(f"took longer than reward.time_limit={limit:g} seconds and was cancelled")

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(bounded())
    with ThreadPoolExecutor(1) as thread:  # a notebook's thread runs a loop already, and one thread cannot run two
        return thread.submit(asyncio.run, bounded()).result()


def check_reward(reward: Any) -> float | Failure:
    """The reward as a float; a text is no number, even where it spells one."""
    try:
        is_number = not isinstance(reward, str | bytes | bytearray) and getattr(reward, "shape", ()) == ()
        value = float(reward) if is_number else None
    except Exception:  # noqa: BLE001 (an object of any type)
        value = None
    if value is None:
        return Failure(one_line(f"expected a number or None as reward, got {brief(reward)}"))
    return value if math.isfinite(value) else Failure(f"expected a finite reward, got {value}")
