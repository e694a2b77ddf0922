"""The commands, settings, files, names, links and snippets of the documentation exist and work, and its site builds."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_imports import API, ROOMS, commands

import crpo_jax
from crpo_jax import config
from crpo_jax.parallel.layout import Layout, find_layout

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
    """Every setting or section that a page names: before an equals sign, alone in backticks, or as a key in Python."""
    sections = "|".join(SECTIONS)
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_0-9.]+)=", ALL))
    named |= set(re.findall(rf"`((?:{sections})(?:\.[a-z_0-9]+)+(?:\.\*)?)`", ALL))
    named |= set(re.findall(rf'"((?:{sections})\.[a-z_0-9.]+)":', ALL))
    return sorted(name for name in named if not name.endswith(FILE_ENDINGS))


@pytest.mark.parametrize("name", settings_named())
def test_every_setting_named_exists(name: str) -> None:
    prefix = name.removesuffix("*")
    assert config.find_setting(name) or any(key.startswith(f"{prefix.rstrip('.')}.") for key in config.setting_fields())


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z-]+)[ `]", ALL)) - {"--help"}))
def test_every_flag_named_exists(flag: str) -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*") if path.is_file())
    assert f'"{flag}"' in SOURCE + scripts or f"{flag} as the first argument" in scripts


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b((?:configs|crpo_jax|scripts|tests)/[\w./-]*\w)", ALL))))
def test_every_file_named_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(crpo_jax(?:\.\w+)+)`", ALL))))
def test_every_python_name_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(module), attribute)


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


SNIPPET_PAGES = sorted({page for page, _ in snippets()})
NEED_A_MODEL = set(crpo_jax.__all__) - {"score"}


def called(tree: ast.AST) -> dict[str, list[ast.Call]]:
    """The calls in a snippet, by the name called: `find_layout`, `crpo_jax.train`."""
    calls: dict[str, list[ast.Call]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            calls.setdefault(ast.unparse(node.func), []).append(node)
    return calls


def run_snippets(page: str) -> dict[str, Any]:
    """The names that a page's snippets define; what needs a model, and what follows from that, is not run."""
    names: dict[str, Any] = {}
    skipped: set[str] = set()
    statements = [node for source, code in snippets() if source == page for node in ast.parse(code, page).body]
    for statement in statements:
        variables = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        needs_model = {f"crpo_jax.{name}" for name in NEED_A_MODEL} & called(statement).keys()
        if needs_model or skipped & {node.id for node in variables if isinstance(node.ctx, ast.Load)}:
            skipped |= {node.id for node in variables if isinstance(node.ctx, ast.Store)}
        else:
            exec(compile(ast.Module([statement], []), page, "exec"), names)  # noqa: S102 (this repository's pages)
    return names


def test_the_readme_and_the_python_page_have_snippets() -> None:
    assert {"README.md", "docs/how-to/python.md"} <= set(SNIPPET_PAGES)


@pytest.mark.parametrize("page", SNIPPET_PAGES)
def test_snippets_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert run_snippets(page)


@pytest.mark.parametrize("page", SNIPPET_PAGES)
def test_every_call_of_this_package_in_a_snippet_fits_its_signature(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = run_snippets(page)
    for code in [code for source, code in snippets() if source == page]:
        for name, calls in called(ast.parse(code)).items():
            function: Any = names.get(name)
            if name.startswith("crpo_jax."):
                assert name.removeprefix("crpo_jax.") in crpo_jax.__all__
                function = getattr(crpo_jax, name.removeprefix("crpo_jax."))
            for call in calls if function else ():
                inspect.signature(function).bind(*call.args, **{str(word.arg): word.value for word in call.keywords})


def test_the_python_page_has_every_function_with_its_signature() -> None:
    def signature(name: str) -> str:
        full = inspect.signature(getattr(crpo_jax, name))
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in full.parameters.values()]
        return f"{name}{full.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"

    written = re.findall(r"```text\n(\w+\(.*\))\n```", TEXTS["docs/how-to/python.md"])
    assert sorted(written) == sorted(map(signature, crpo_jax.__all__))


def test_the_python_page_shows_the_scores_that_its_example_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names, page = run_snippets("docs/how-to/python.md"), "docs/how-to/python.md"
    (session,) = re.findall(r"```pycon\n(.*?)```", TEXTS[page], re.DOTALL)
    example = doctest.DocTestParser().get_doctest(session, names, page, page, 0)
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_example_in_the_apis_docstring() -> None:
    outcome = doctest.testmod(importlib.import_module("crpo_jax.api"))
    assert outcome.attempted > 3
    assert outcome.failed == 0


def test_the_layout_of_the_layouts_page_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [code for page, code in snippets() if page == "docs/how-to/layouts.md"]
    (name,) = set(re.findall(r"parallel\.layout=(my_layouts:\w+)", TEXTS["docs/how-to/layouts.md"]))
    (tmp_path / "my_layouts.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_layouts", raising=False)
    assert isinstance(find_layout(name), Layout)
    sys.modules.pop("my_layouts")


def test_contributing_has_the_import_table() -> None:
    """The table of CONTRIBUTING.md is the one that test_imports enforces, in the same order."""
    section = TEXTS["CONTRIBUTING.md"].partition("## Rooms and imports")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    named = [(re.findall(r"`(\w+)`", first), set(re.findall(r"`(\w+)`", last))) for first, _, last in rows]
    *rooms, (command_names, command_imports), (api, _) = named
    assert [(room, allowed) for (room,), allowed in rooms] == list(ROOMS.items())
    assert (set(command_names), command_imports) == (commands(), set())
    assert api == [API]


def test_every_metric_is_in_the_reference_and_exists() -> None:
    """Some keys are put together in the code, from a group and a name: then both halves must occur in it."""
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
