"""A raw record of a data file, and checks of its fields whose errors name the record's place. No jax."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from crpo_jax.data.question import LETTERS
from crpo_jax.errors import InputError, brief


@dataclass(frozen=True)
class Record:
    """The fields of a record and its place: `file:line`, `file: row n` of a table, or `questions[n]` of a list."""

    fields: Mapping[str, Any]
    where: str
    from_table: bool = False  # from columns, where an option that the record lacks is None
    zero_based: bool = False  # the schema declares `cop` a class label, which counts from 0

    def fail(self, name: str, expected: str, got: Any) -> NoReturn:
        raise InputError(f"{self.where}: {name}: expected {expected}, got {brief(got)}")

    def has(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def value(self, name: str) -> Any:
        if name not in self.fields:
            names = ", ".join(self.fields) or "no fields"
            raise InputError(f"{self.where}: {name}: expected a field of this name, got {names}")
        return self.fields[name]

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
        """Options by letter: A, B, ... without a gap."""
        value = self.fields.get("options")
        if not isinstance(value, Mapping):
            self.fail("options", "an object of texts by letter", value)
        if self.from_table:  # the columns are the letters of the longest record
            value = {letter: text for letter, text in value.items() if text is not None}
        letters = sorted(value)
        if not 2 <= len(letters) <= len(LETTERS) or letters != list(LETTERS[: len(letters)]):
            self.fail("options", "letters A, B, ... without a gap, at least two", ", ".join(letters) or "none")
        return {letter: self.check_text(f"options.{letter}", value[letter]) for letter in letters}

    def letter(self, name: str, options: Mapping[str, str]) -> str:
        value = self.text(name)
        return value if value in options else self.fail(name, f"a letter among {', '.join(options)}", value)

    def columns(self, *used: str) -> dict[str, Any]:
        """The fields besides those named."""
        return {name: value for name, value in self.fields.items() if name not in used}
