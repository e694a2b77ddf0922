"""What the documentation tells a reader to type, names and links to; and that its site builds."""

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_imports import ROOMS, commands

from crpo_jax import config

ROOT = Path(__file__).parents[1]
GENERATED = "docs/reference/settings.md"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")),
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
ALL = "\n".join(TEXTS.values()).replace("\\\n", " ")  # a command on several lines is one command
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "crpo_jax").rglob("*.py")))

SECTIONS = sorted({key.split(".")[0] for key in config.setting_fields()})
FILE_ENDINGS = (".json", ".jsonl", ".md", ".png", ".py", ".safetensors", ".yaml")
LAYOUT_OF_A_USER = re.compile(r"parallel\.layout=\w+:\w+")


# ---- commands, settings, files -------------------------------------------------------------------------------------


COMMANDS = sorted(set(re.findall(r"python -m crpo_jax\.([a-z]+)([^`\n]*)", ALL)))


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_every_command_exists_and_its_settings_are_known(name: str, arguments: str) -> None:
    assert name in commands()
    words = shlex.split(arguments, comments=True)
    assert [flag for flag in words if flag.startswith("--") and flag != "--help" and f'"{flag}"' not in SOURCE] == []
    overrides = [word for word in words if re.match(r"[a-z]+\.[a-z_.]+=", word) and not LAYOUT_OF_A_USER.match(word)]
    config.load_config(ROOT / "configs" / "clinical_r1_3b.yaml", overrides)


def settings_named() -> list[str]:
    """Every setting or section that any page names: before an equals sign, or alone in backticks."""
    sections = "|".join(SECTIONS)
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_0-9.]+)=", ALL))
    named |= set(re.findall(rf"`((?:{sections})(?:\.[a-z_0-9]+)+(?:\.\*)?)`", ALL))
    return sorted(name for name in named if not name.endswith(FILE_ENDINGS))


@pytest.mark.parametrize("name", settings_named())
def test_every_setting_named_exists(name: str) -> None:
    prefix = name.removesuffix("*")
    assert name in config.setting_fields() or any(
        key.startswith(f"{prefix.rstrip('.')}.") for key in config.setting_fields()
    )


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z-]+)[ `]", ALL)) - {"--help"}))
def test_every_flag_named_exists(flag: str) -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*") if path.is_file())
    assert f'"{flag}"' in SOURCE + scripts or f"{flag} as the first argument" in scripts


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b((?:configs|scripts|tests)/[\w./-]*\w)", ALL))))
def test_every_file_named_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    lost = []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.is_file() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            lost.append(target)
    assert lost == []


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    }


# ---- code and tables -----------------------------------------------------------------------------------------------


def snippets() -> list[tuple[str, str]]:
    return [(page, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL)]


def test_the_readme_and_the_python_page_have_snippets() -> None:
    assert {"README.md", "docs/how-to/python.md"} <= {page for page, _ in snippets()}


@pytest.mark.parametrize(("page", "code"), snippets())
def test_every_snippet_is_python_and_its_imports_from_this_package_exist(page: str, code: str) -> None:
    for node in ast.walk(ast.parse(code, page)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("crpo_jax"):
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_contributing_has_the_import_table() -> None:
    """The table of CONTRIBUTING.md is the one that test_imports enforces, in the same order."""
    section = TEXTS["CONTRIBUTING.md"].partition("## Rooms and imports")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    named = [(re.findall(r"`(\w+)`", first), set(re.findall(r"`(\w+)`", last))) for first, _, last in rows]
    *rooms, (last_row, _) = named
    assert [(room, allowed) for (room,), allowed in rooms] == list(ROOMS.items())
    assert set(last_row) == commands()


def test_every_metric_is_in_the_reference_and_exists() -> None:
    """Keys are told apart by their group; some are put together in the code, and then the two halves must be there."""
    groups = "reward|response|loss|kl|policy|eval|time|sft"
    page = TEXTS["docs/reference/metrics.md"]
    documented = set(re.findall(rf"`((?:{groups})/[a-z_0-9]+)`", page))
    written = set(re.findall(rf'"((?:{groups})/[a-z_0-9]+)"', SOURCE))
    assert written <= documented
    for key in documented:
        group, name = key.split("/")
        assert f'"{key}"' in SOURCE or (f'"{group}/{{' in SOURCE and re.search(rf'["/]{name}"', SOURCE)), key


def loaded(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_is_what_its_script_writes() -> None:
    assert TEXTS[GENERATED] == loaded("build_settings_page").page(), "run python scripts/build_settings_page.py"


def test_the_settings_page_has_every_setting() -> None:
    assert sorted(re.findall(r"^\| `([a-z_0-9.]+)` \|", TEXTS[GENERATED], re.MULTILINE)) == sorted(
        config.setting_fields()
    )


# ---- the README, the site, the citation ----------------------------------------------------------------------------


def test_the_readme_is_short_and_has_the_two_commands() -> None:
    readme = TEXTS["README.md"]
    assert len(readme.split()) <= 700
    assert "\npip install -e . && python -m crpo_jax.train\n" in readme
    assert "\npip install -e '.[test]' && pytest\n" in readme


def test_the_citation_and_the_project_agree() -> None:
    citation = config.read_yaml((ROOT / "CITATION.cff").read_text(encoding="utf-8"), "CITATION.cff")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert f"## [{citation['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for name in ("mkdocs", "material", "pymdownx", "latex2mathml"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|link|img)[^>]* (?:src|href)="?(?:https?:)?//[^>]*', html) == []
    method = (tmp_path / "method.html").read_text(encoding="utf-8")
    assert "<math" in method
    assert "arithmatex" not in method
