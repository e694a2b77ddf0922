"""The page as one file: data, styles and program in it, and a policy that lets nothing else run or load."""

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from crpo_jax.disk import make_folder, replace_file
from crpo_jax.errors import InputError
from crpo_jax.page.content import encoded, read_content
from crpo_jax.store.files import writing

ASSETS = files("crpo_jax.page") / "assets"
PROGRAM = ("elements", "responses", "filters", "list", "detail", "curves", "tables", "page")
"""The files of the page's program, which are one script in it."""


def page_path(workdir: Path) -> Path:
    return workdir / "report" / "index.html"


def write_page(workdir: Path) -> Path:
    """Writes report/index.html from the files of a run or an evaluation, whole or not at all.

    InputError names a file that cannot be read, Fault says why the page cannot be written.
    """
    path = page_path(workdir)
    page = render_page(read_content(workdir))
    with writing(path):
        make_folder(path.parent)
        replace_file(path, page)
    return path


def keep_page(workdir: Path, say: Callable[[str], None]) -> None:
    """`write_page` beside other work: what is wrong with a file that the page would only show is said, and no more."""
    try:
        write_page(workdir)
    except (InputError, KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as damage:
        say(f"{page_path(workdir)}: not written: {type(damage).__name__}: {damage}")


def render_page(content: Mapping[str, Any], *, served: bool = False) -> bytes:
    """The page of this content; one that is `served` asks its server, and no other, whether there is more."""
    style = (ASSETS / "page.css").read_bytes()
    program = b"\n".join((ASSETS / f"{name}.js").read_bytes() for name in PROGRAM)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{digest(program)}'",
            f"style-src '{digest(style)}'",
            "img-src data:",
            "connect-src 'self'" if served else "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    page = (ASSETS / "page.html").read_bytes()
    parts = {b"POLICY": policy.encode(), b"STYLE": style, b"PROGRAM": program, b"DATA": encoded(content)}
    pieces = page.split(b"@@")  # text and names of parts in turn
    return b"".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def digest(content: bytes) -> str:
    """By which a Content-Security-Policy knows the content."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}"
