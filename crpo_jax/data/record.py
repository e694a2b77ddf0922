"""A raw record of a data file, and checks of its fields whose errors name the record's place. No jax."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from crpo_jax.data.number import read_number
from crpo_jax.data.question import LETTERS
from crpo_jax.data.strict_json import DECODER
from crpo_jax.errors import InputError, brief

ROLES = ("system", "user", "assistant")
MISSING = object()


@dataclass(frozen=True)
class Record:
    """The fields of a record and its place: `file:line`, `file: row n` of a table, or `questions[n]` of a list."""

    fields: Mapping[str, Any]
    where: str
    from_table: bool = False  # from columns, where an option that the record lacks is None
    zero_based: bool = False  # the schema declares `cop` a class label, which counts from 0
    columns_of: Mapping[str, str] = field(default_factory=dict)  # by field, the path of its column in the file

    def fail(self, name: str, expected: str, got: Any) -> NoReturn:
        head, dot, rest = name.partition(".")
        column = (self.columns_of.get(head) or head) + dot + rest
        raise InputError(f"{self.where}: {column}: expected {expected}, got {brief(got)}")

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def value(self, name: str) -> Any:
        if name not in self.fields:
            names = ", ".join(map(str, self.fields)) or "no fields"
            name = self.columns_of.get(name) or name
            raise InputError(f"{self.where}: {name}: expected a field of this name, got {names}")
        return self.fields[name]

    def structure(self, name: str) -> Any:
        """The field's value, read as JSON where a cell holds it as text."""
        value = self.value(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                return DECODER.decode(value.strip())
            except (ValueError, RecursionError):
                return value
        return value

    def string(self, name: str) -> str:
        """The field's text as it stands."""
        value = self.value(name)
        return value if isinstance(value, str) else self.fail(name, "a text", value)

    def text(self, name: str) -> str:
        """The field's text without surrounding white space."""
        return self.check_text(name, self.value(name))

    def check_text(self, name: str, value: Any) -> str:
        """The text without surrounding white space; it must not be empty or hold lone surrogates, which UTF-8 lacks."""
        if not isinstance(value, str):
            self.fail(name, "a text", value)
        try:
            value.encode()
        except UnicodeEncodeError:
            self.fail(name, "text that UTF-8 can write", value.encode("ascii", "backslashreplace").decode())
        return value.strip() or self.fail(name, "a text that is not empty", value)

    def identity(self, *names: str, default: str = "") -> str:
        """The first of the id fields that the record has; `default` where it has none."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
            if value is not None:
                return self.text(name)
        return default or self.text(names[0])

    def options(self) -> dict[str, str]:
        """Options by letter: A, B, ... without a gap; a list has its letters by position."""
        value = self.structure("options") if "options" in self.fields else None
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            value = dict(zip(LETTERS, value, strict=False)) if len(value) <= len(LETTERS) else value
        if not isinstance(value, Mapping):
            self.fail("options", "an object of texts by letter, or a list", value)
        if self.from_table:  # the columns are the letters of the longest record
            value = {letter: text for letter, text in value.items() if text is not None}
        letters = sorted(map(str, value))
        if not 2 <= len(letters) <= len(LETTERS) or letters != list(LETTERS[: len(letters)]):
            self.fail("options", "letters A, B, ... without a gap, at least two", ", ".join(letters) or "none")
        return {letter: self.check_text(f"options.{letter}", value[letter]) for letter in letters}

    def has_options(self) -> bool:
        """Whether the record has any; a table has empty columns where it has none."""
        value = self.fields.get("options")
        empty = isinstance(value, Mapping) and all(text is None for text in value.values())
        return value is not None and not (self.from_table and empty)

    def letter(self, name: str, options: Mapping[str, str]) -> str:
        value = self.text(name)
        return value if value in options else self.fail(name, f"a letter among {', '.join(options)}", value)

    def choice(self, name: str, options: Mapping[str, str]) -> str:
        """The letter of the right option; of options in a list, also its position from 0."""
        value = self.value(name)
        if isinstance(value, int) and not isinstance(value, bool) and not isinstance(self.fields["options"], Mapping):
            letters = list(options)
            if 0 <= value < len(letters):
                return letters[value]
            self.fail(name, f"a letter, or a position from 0 to {len(letters) - 1}", value)
        return self.letter(name, options)

    def number(self, name: str) -> str:
        """A number, or a text that is one, as text."""
        value = self.value(name)
        if is_number(value):
            text = number_text(value)
        elif isinstance(value, str):
            text = self.text(name)
        else:
            self.fail(name, "a number", value)
        return text if read_number(text) else self.fail(name, "a finite number of moderate length", value)

    def texts(self, name: str) -> tuple[str, ...]:
        """One text, or a list of at least one."""
        value = self.structure(name) if isinstance(self.value(name), Sequence) else self.value(name)
        if is_number(value):
            return (self.number(name),)
        if isinstance(value, str):
            return (self.text(name),)
        if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
            self.fail(name, "a text, or a list of texts", value)
        return tuple(self.check_text(f"{name}.{place}", text) for place, text in enumerate(value))

    def messages(self, name: str) -> list[tuple[str, str]]:
        """A conversation as role and content, which ends with the user's turn."""
        value = self.structure(name)
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
            self.fail(name, "a list of messages with role and content", value)
        turns = []
        for place, message in enumerate(value):
            if not isinstance(message, Mapping):
                self.fail(f"{name}.{place}", "a message with role and content", message)
            if message.get("role") not in ROLES:
                self.fail(f"{name}.{place}.role", f"one of {', '.join(ROLES)}", message.get("role"))
            turns.append((message["role"], self.check_text(f"{name}.{place}.content", message.get("content"))))
        if turns[-1][0] != "user":
            self.fail(f"{name}.{len(turns) - 1}.role", "user in the last message", turns[-1][0])
        return turns

    def columns(self, *used: str) -> dict[str, Any]:
        """The fields besides those named."""
        return {name: value for name, value in self.fields.items() if name not in used}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def number_text(value: float) -> str:
    """The shortest text of a number; "" of one that is too long."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


def at_path(fields: Mapping[str, Any], path: str) -> Any:
    """The value at a column's name, or at a dotted path into nested columns and lists; MISSING where there is none."""
    value: Any = fields
    for name in [path] if path in fields else path.split("."):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list | tuple) and name.isdecimal() and len(name) < 10 and int(name) < len(value):
            value = value[int(name)]
        else:
            return MISSING
    return value


def renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with the project's own fields read from the columns at these paths.

    A column that becomes a field is no column any more, one of which a part becomes a field is; InputError where a path
    other than a field's own name leads nowhere.
    """
    paths = {name: path for name, path in columns.items() if path != name}
    if not paths:
        return record
    values = {name: at_path(record.fields, path) for name, path in paths.items() if path}
    for name, value in values.items():
        if value is MISSING:
            names = ", ".join(map(str, record.fields)) or "no fields"
            raise InputError(f"{record.where}: {paths[name]}: expected what data.columns.{name} names, got {names}")
    rest = {name: value for name, value in record.fields.items() if name not in {*paths, *paths.values()}}
    return Record(rest | values, record.where, record.from_table, record.zero_based, paths)
