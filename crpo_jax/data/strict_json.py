"""JSON whose objects write each key once. No jax."""

import json
from typing import Any


def object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are each written once; plain JSON would keep the last option A and lose the first."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=object_of_unique_keys)


def json_fault(error: Exception) -> str:
    """What is wrong with a text that DECODER refused."""
    if isinstance(error, RecursionError):
        return "JSON that is nested too deeply"
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
