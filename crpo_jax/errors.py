"""The exceptions that end a command with one line, and values abbreviated for such lines."""

import reprlib
from typing import Any

LONGEST_LINE = 2000  # characters


class InputError(Exception):
    """Bad input: one line with the file, line, key or flag, what was expected and what was got; exit code 2.

    Control characters are escaped, since text from a file must not rewrite the terminal; a long line loses its middle.
    """

    def __init__(self, line: str) -> None:
        line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        if len(line) > LONGEST_LINE:
            line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
        super().__init__(line)


class Fault(Exception):
    """What ends a run despite good input, such as a full disk; exit code 1.

    One line with what happened, what is safe and what to do.
    """


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
