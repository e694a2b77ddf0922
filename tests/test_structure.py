"""Functions of the package stay short enough to be read at once."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "crpo_jax"
LONGEST = 80
"""Lines of a function, its docstring included."""


def functions(source: str) -> list[tuple[str, int, str]]:
    """Name, number of lines and def line of every function in a module, methods and nested functions included."""
    lines = source.splitlines()
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [(node.name, (node.end_lineno or 0) - node.lineno + 1, lines[node.lineno - 1]) for node in nodes]


def too_long(source: str) -> list[str]:
    """Functions over the limit without a comment `# long: reason` on their def line."""
    return [name for name, count, line in functions(source) if count > LONGEST and "# long: " not in line]


def test_no_function_is_too_long():
    modules = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert len(modules) > 50
    assert {module: names for module, source in modules.items() if (names := too_long(source))} == {}


def test_the_training_loop_is_short_without_exception():
    lengths = {name: count for name, count, _ in functions((PACKAGE / "train.py").read_text(encoding="utf-8"))}
    assert lengths["train"] < LONGEST


def test_a_long_function_needs_a_reason():
    for indent, head in (("", "def f():"), ("    ", "class A:\n    def f():"), ("", "async def f():")):
        body = f"\n{indent}    pass"
        assert too_long(head + body * (LONGEST - 1)) == []
        assert too_long(head + body * LONGEST) == ["f"]
        assert too_long(f"{head}  # long: a table{body * LONGEST}") == []
