"""A user's own objects, which settings name as `module:NAME`."""

import difflib
import importlib
import os
import sys
from typing import Any

from crpo_jax.errors import InputError


def import_user_object(path: str, expected: str) -> Any:
    """The object at `module:NAME`, also in the working directory; where there is none, InputError that begins with
    `expected`."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # noqa: BLE001 (importing a user's module runs any code)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{expected}; {path} cannot be imported: {reason}") from None
    if not hasattr(module, name):
        similar = difflib.get_close_matches(name, vars(module), n=1)
        hint = f"; did you mean {module_name}:{similar[0]}?" if similar else ""
        reason = f"AttributeError: module {module_name!r} has no attribute {name!r}"
        raise InputError(f"{expected}; {path} cannot be imported: {reason}{hint}")
    return getattr(module, name)
