"""The exceptions that end a command with one line, and values abbreviated for such lines."""

import reprlib
from typing import Any

LONGEST_LINE = 2000  # characters


class InputError(Exception):
    """Bad input: one line with the file, line, key or flag, what was expected and what was got; exit code 2.

    Control characters are escaped, since text from a file must not rewrite the terminal; a long line loses its middle.
    """

    def __init__(self, line: str) -> None:
        super().__init__(one_line(line))


class Fault(Exception):
    """What ends a run despite good input, such as a full disk; exit code 1.

    One line with what happened, what is safe and what to do.
    """


def one_line(text: str, limit: int = LONGEST_LINE) -> str:
    """A text as one line that a terminal can show: control characters escaped, the middle of a long one left out."""

    def cut(text: str) -> str:
        return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"

    return cut("".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut(text)))


def brief(value: Any, limit: int = 80) -> str:
    """A value's repr, abbreviated: nine lines of YAML can hold a value with a billion parts."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxset, short.maxdict = 3, 6, 6, 6, 6
    short.maxstring = short.maxother = short.maxlong = limit
    try:
        return short.repr(value)
    except ValueError:  # a number too long to print, inside a list
        return f"a {type(value).__name__}"
