"""MkDocs hooks: pages from the repository's root, and equations as MathML, which browsers render without scripts."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert  # pyright: ignore[reportMissingImports] (extra `docs`)
from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")
"""Forges expect these in the root; the site shows them in lower case beside the pages of docs/."""


def on_files(files: Files, config: Any) -> Files:
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to root pages, such as `../LOG.md` from docs/ or `LOG.md` from another root page, lead to their copies."""
    link = re.compile(rf"\]\(((?:\.\./)*)({'|'.join(map(re.escape, ROOT_PAGES))})")
    return link.sub(lambda match: f"]({match[1].removeprefix('../')}{match[2].lower()}", markdown)


def on_page_content(html: str, **_: Any) -> str:
    html = re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>',
        lambda match: mathml(match[1], "block"),
        html,
        flags=re.DOTALL,
    )
    return re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>',
        lambda match: mathml(match[1], "inline"),
        html,
        flags=re.DOTALL,
    )


def mathml(escaped: str, display: str) -> str:
    tex = escaped.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return convert(tex.strip(), display=display)
