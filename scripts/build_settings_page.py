"""Writes docs/reference/settings.md from the declarations in crpo_jax/config.py: python scripts/build_settings_page.py

A test fails if the committed page differs from what this writes.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from crpo_jax import config

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "settings.md"
HEAD = """\
# Settings

<!-- Written by scripts/build_settings_page.py; edit crpo_jax/config.py instead. -->

Every command takes settings as `section.key=value` after its flags, or from a YAML file named by `--config`. A setting
on the command line replaces the file's. Unknown keys, wrong types and values out of bounds are refused in one line,
before anything is written.

The defaults are the paper's run with Qwen2.5-3B after a cold start. The source says where a default comes from: a
section or equation of the **paper**, [arXiv 2512.00601](https://arxiv.org/abs/2512.00601); where that is silent, the
**authors' code**, which is [their scripts](https://github.com/BoyangGu1/Clinical-R1-3B) and the defaults of verl, which
these call; a section of another paper; or **ours**, a decision of this project.
"""
COLUMNS = "| setting | default | values | meaning | source |\n| --- | --- | --- | --- | --- |"


def values_of(item: config.Setting) -> str:
    """A setting's choices, or its type with bounds and unit."""
    choices = item.legal.split(" | ")
    values = ", ".join(f"`{choice}`" for choice in choices) if len(choices) > 1 else item.legal
    return values + (f"; {item.unit}" if item.unit else "")


def default_of(default: Any) -> str:
    if default in ("", (), {}):
        return "empty"
    if isinstance(default, tuple):
        return ", ".join(f"`{item}`" for item in default)
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:.6g}`" if isinstance(default, float) else f"`{default}`"


def cell(text: str) -> str:
    """Text as a table's cell: outside code, `<` and `|` would become markup."""
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def page() -> str:
    sections: dict[str, list[str]] = {}
    for key, item in config.setting_fields().items():
        cells = [f"`{key}`", default_of(item.default), values_of(item), item.doc, item.source]
        sections.setdefault(key.rpartition(".")[0], []).append(f"| {' | '.join(map(cell, cells))} |")
    parts = [HEAD]
    for section, rows in sections.items():
        parts += [f"{'#' * (2 + section.count('.'))} {section}\n", COLUMNS, *rows, ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
