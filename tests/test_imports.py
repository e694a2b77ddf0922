"""The table of who may import whom, and which modules load without jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "crpo_jax"

ROOMS = {
    "errors": set(),
    "hardware": set(),
    "user_code": {"errors"},
    "disk": {"errors"},
    "config": {"errors"},
    "cli": {"errors", "disk", "config"},
    "parallel": {"errors", "user_code", "disk"},
    "data": {"errors", "config"},
    "store": {"errors", "disk", "config"},
    "chat": {"errors", "config"},
    "reward": {"errors", "config", "data", "store", "chat"},
    "traces": {"config", "data", "reward"},
    "model": {"errors", "disk", "config", "parallel"},
    "rollout": {"errors", "parallel", "model"},
    "update": {"errors", "user_code", "config", "parallel", "model"},
    "runtime": {
        "errors",
        "hardware",
        "disk",
        "config",
        "parallel",
        "data",
        "reward",
        "model",
        "rollout",
        "update",
        "store",
    },
    "answer": {
        "errors",
        "disk",
        "config",
        "parallel",
        "data",
        "reward",
        "model",
        "rollout",
        "update",
        "store",
        "runtime",
    },
    "judge": {"errors", "disk", "config", "data", "reward", "store", "chat", "answer"},
    "page": {"errors", "disk", "config", "data", "reward", "store", "answer"},
    "planner": {"errors", "hardware", "config", "parallel", "model", "rollout", "update"},
}
"""A room imports its own modules and those of the rooms named here, which all stand above it in this table."""

API = "api"
"""The Python API, the only room that imports commands; the package itself imports nothing but this."""

WITHOUT_CRPO_JAX = ("errors.py", "hardware.py")
"""These import nothing of the package at all."""


def modules() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """ "update/losses.py" -> "update", "config.py" -> "config"; a command is a room of its own."""
    return module.split("/")[0].removesuffix(".py")


def imported(module: str) -> set[str]:
    """Dotted names under crpo_jax that a module imports anywhere in it, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import hides which room it is from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("crpo_jax.") for name in names if name.startswith("crpo_jax.")}


def commands() -> set[str]:
    return {room(module) for module in modules() if "/" not in module} - set(ROOMS) - {"__init__", API}


def allowed(name: str) -> set[str]:
    """The rooms that a room may import besides itself."""
    if name == "__init__":
        return {API}
    if name == API:
        return set(ROOMS) | commands()
    return set(ROOMS) if name in commands() else ROOMS[name]


def test_the_table_covers_every_room():
    assert {room(module) for module in modules() if "/" in module} <= set(ROOMS)
    assert {"train", "score"} <= commands()


def test_a_room_imports_only_those_above_it():
    names = list(ROOMS)
    assert [name for i, name in enumerate(names) if not ROOMS[name] <= set(names[:i])] == []


def test_an_import_counts_wherever_it_stands():
    """The tests below cannot pass because nothing was read."""
    assert "update.losses.crpo_loss" in imported("update/trainer.py")
    assert "config.default_config_path" in imported("train.py")
    assert "data.vignettes.vignettes" in imported("data/tokenizer.py")  # inside a function


@pytest.mark.parametrize("module", modules())
def test_imports_go_down_only(module: str):
    used = {name.split(".")[0] for name in imported(module)} - {room(module)}
    assert used <= allowed(room(module))


@pytest.mark.parametrize("module", [module for module in modules() if room(module) not in ("__init__", API)])
def test_only_the_api_imports_commands(module: str):
    used = {name.split(".")[0] for name in imported(module)}
    assert not used & ({API} | commands() - {room(module)})


@pytest.mark.parametrize("module", WITHOUT_CRPO_JAX)
def test_nothing_of_the_package(module: str):
    assert imported(module) == set()


@pytest.mark.parametrize("name", ROOMS)
def test_the_table_allows_nothing_that_is_not_used(name: str):
    used = {used.split(".")[0] for module in modules() if room(module) == name for used in imported(module)}
    assert ROOMS[name] <= used


HOST_MODULES = [
    *("errors", "hardware", "config", "cli", "api", "score", "distill", "evaluate", "plan", "view", "traces"),
    "planner.targets",
    *("answer.records", "answer.statistics", "answer.truth", "runtime.progress", "runtime.signals"),
    *("store.event_file", "store.files", "store.journal", "store.metrics", "store.skipped", "store.workdir"),
    *(
        f"{folder}.{path.stem}"
        for folder in ("chat", "data", "judge", "page", "reward")
        for path in sorted((PACKAGE / folder).glob("[!_]*.py"))
        if path.stem != "batches"  # grain imports jax
    ),
]


def test_host_modules_load_no_jax():
    """Scoring processes start by the dozen, and `score` runs where no accelerator is: neither may load jax."""
    check = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    loaded = sorted({'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'torch', 'transformers'} & set(sys.modules))\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    names = [f"crpo_jax.{name}" for name in HOST_MODULES]
    done = subprocess.run(
        [sys.executable, "-c", check, *names], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
