"""What a run measured, read from its metrics.jsonl."""

from pathlib import Path
from typing import Any

from crpo_jax.errors import InputError
from crpo_jax.store.files import read_rows


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Every step of metrics.jsonl; InputError names a line that is none."""
    path, rows = workdir / "metrics.jsonl", []
    for number, row in enumerate(read_rows(path), start=1):
        if type(row.get("step")) is not int or any(not isinstance(value, float | int | None) for value in row.values()):
            raise InputError(
                f"{path}:{number}: expected a step and its measures, got {str(row)[:60]}; "
                "remove the line, or choose another --workdir"
            )
        rows.append(row)
    return rows


def held_out_rewards(workdir: Path) -> dict[int, float]:
    """The mean reward of the held-out responses (eval/mean), by the step at which it was measured."""
    return {row["step"]: row["eval/mean"] for row in read_metrics(workdir) if row.get("eval/mean") is not None}
