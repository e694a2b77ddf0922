"""The table of who may import whom, and which modules load without jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "crpo_jax"

ROOMS = {
    "errors": set(),
    "hardware": {"errors"},
    "config": {"errors"},
    "cli": {"errors", "config"},
    "parallel": {"errors", "config"},
    "data": {"errors", "config"},
    "reward": {"errors", "config", "data"},
    "model": {"errors", "config", "parallel"},
    "rollout": {"errors", "config", "parallel", "model"},
    "update": {"errors", "config", "parallel", "model"},
    "store": {"errors", "config", "parallel"},
    "chat": {"errors", "config", "data", "reward", "store"},
    "runtime": {"errors", "hardware", "config", "parallel", "data", "reward", "model", "rollout", "update", "store"},
    "answer": {"errors", "config", "parallel", "data", "reward", "model", "rollout", "update", "store", "runtime"},
    "judge": {"errors", "config", "data", "reward", "store", "chat", "answer"},
    "planner": {"errors", "hardware", "config", "parallel", "model", "rollout", "update"},
}
"""A room may import its own modules and those of the rooms named here, which all stand above it in this table."""

WITHOUT_CRPO_JAX = ("errors.py",)
"""The ground imports nothing of the package at all."""


def modules() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """ "update/losses.py" -> "update", "config.py" -> "config"; a command is a room of its own."""
    return module.split("/")[0].removesuffix(".py")


def imported(module: str) -> set[str]:
    """Dotted names under crpo_jax that a module imports anywhere in it, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import hides which room it is from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("crpo_jax.") for name in found if name.startswith("crpo_jax.")}


def commands() -> set[str]:
    return {room(module) for module in modules() if "/" not in module} - set(ROOMS) - {"__init__"}


def test_the_table_covers_every_room():
    assert {room(module) for module in modules() if "/" in module} <= set(ROOMS)
    assert {"train", "score"} <= commands()


def test_a_name_is_found_wherever_it_is_imported():
    """The tests below cannot pass because nothing was read."""
    assert "update.losses.crpo_loss" in imported("update/trainer.py")
    assert "config" in imported("train.py")
    assert "data.vignettes.vignettes" in imported("data/batches.py")  # inside a function


@pytest.mark.parametrize("module", modules())
def test_imports_go_down_only(module: str):
    used = {name.split(".")[0] for name in imported(module)} - {room(module)}
    allowed = set(ROOMS) if room(module) in commands() else ROOMS.get(room(module), set())
    assert used <= allowed


@pytest.mark.parametrize("module", modules())
def test_nobody_imports_a_command(module: str):
    used = {name.split(".")[0] for name in imported(module)}
    assert not used & (commands() - {room(module)})


@pytest.mark.parametrize("module", WITHOUT_CRPO_JAX)
def test_nothing_of_the_package(module: str):
    assert imported(module) == set()


HOST_MODULES = [
    "crpo_jax.config",
    "crpo_jax.data.question",
    "crpo_jax.score",
    "crpo_jax.distill",
    "crpo_jax.evaluate",
    *(
        f"crpo_jax.{path.parent.name}.{path.stem}"
        for room in ("reward", "judge")
        for path in sorted((PACKAGE / room).glob("[!_]*.py"))
    ),
]


def test_host_modules_load_no_jax():
    """Scoring processes start by the dozen and `score` runs where no accelerator is: neither may pay for jax, or need
    it."""
    check = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    loaded = sorted({'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'torch', 'transformers'} & set(sys.modules))\n"
        "    assert not loaded, f'{name} loads {loaded}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, *HOST_MODULES], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
