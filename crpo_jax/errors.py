"""What ends a command, each with its exit code: bad input (2) and what is nobody's fault (1)."""

import reprlib
from typing import Any


class InputError(Exception):
    """Bad input from a user: one line that names the file, line, key or flag, what was expected and what was got.

    Commands print it on standard error and exit with code 2. Whatever of it came from a file is shown without control
    characters, which could rewrite what a terminal shows, and cut in the middle where it is very long.
    """

    def __init__(self, line: str) -> None:
        shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        super().__init__(
            shown if len(shown) <= LONGEST_LINE else f"{shown[: LONGEST_LINE // 2]} ... {shown[-LONGEST_LINE // 2 :]}"
        )


LONGEST_LINE = 2000


class Fault(Exception):
    """What ends a run through no fault of its input, such as a full disk: one line with what happened, what is safe and what to do.

    Commands print it on standard error and exit with code 1.
    """


def brief(value: Any, limit: int = 80) -> str:
    """A value as Python writes it, cut short: a YAML file of nine lines can hold a value with a billion parts."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxset, short.maxdict = 3, 6, 6, 6, 6
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        return short.repr(value)
    except ValueError:  # a number too long to be written, inside a list
        return f"a {type(value).__name__}"
