"""Targets by name; the compilers themselves where they are installed."""

import os
import subprocess
import sys

import pytest

from crpo_jax.errors import InputError
from crpo_jax.hardware import CHIPS
from crpo_jax.planner.targets import describe_gpu, find_missing_compiler, find_slice_sides, parse_target


@pytest.mark.parametrize(
    ("name", "chip", "count"),
    [
        ("8xa6000", "a6000", 8),
        ("a6000", "a6000", 1),
        ("h100x8", "h100", 8),
        ("H200", "h200", 1),
        ("16xh100", "h100", 16),
        ("rtx4090", "rtx4090", 1),
        ("2xrtx3090", "rtx3090", 2),
        ("a100-80gb", "a100", 1),
        ("4xa100-40gb", "a100-40gb", 4),
        ("v5e-16", "v5e", 16),
        ("v6e-8", "v6e", 8),
        ("v4-16", "v4", 8),  # two cores per chip
        ("v5p-8", "v5p", 4),
    ],
)
def test_a_name_means_its_chips(name: str, chip: str, count: int):
    target = parse_target(name)
    assert target.chip is CHIPS[chip]
    assert target.count == count


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("8xa600", "did you mean 8xa6000?"),
        ("b300", "expected a name such as"),
        ("", "expected a name such as"),
        ("8xh100x8", "expected a name such as"),
        ("0xh200", "expected 1 to 8 or a multiple of 8"),
        ("12xh100", "expected 1 to 8 or a multiple of 8"),
        ("16xa6000", "expected 1 to 8 a6000, got 16"),
        ("v5e-12", "v5e slice of 1, 2, 4"),
        ("v4-4", "v4 slice of 8, 16"),
    ],
)
def test_an_unknown_name_is_refused_in_one_line(name: str, message: str):
    with pytest.raises(InputError) as refused:
        parse_target(name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_slice_has_as_many_chips_as_its_sides():
    for chip in (CHIPS["v5e"], CHIPS["v4"]):
        shapes = [shape for chips in range(300) if (shape := find_slice_sides(chip, chips))]
        assert len(shapes) >= 7
    assert find_slice_sides(CHIPS["v5e"], 8) == (2, 4)
    assert find_slice_sides(CHIPS["v4"], 8) == (2, 2, 2)
    assert find_slice_sides(CHIPS["v5p"], 16) == (2, 2, 4)


def test_a_gpu_is_described_to_its_compiler():
    text = describe_gpu(parse_target("8xa6000"))
    for part in (
        "core_count: 84",
        "device_memory_size: 51041271808",
        "major: 8 minor: 6",
        "shared_memory_per_core: 102400",
    ):
        assert part in text


PROGRAM = """
import sys
from crpo_jax.planner.targets import compiler_options, make_target_mesh, parse_target
target = parse_target(sys.argv[1])
mesh = make_target_mesh(target, target.count, 1)
import jax, jax.numpy as jnp
to = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=to)
program = jax.jit(lambda x: jnp.sum(x)).lower(x).compile(compiler_options=compiler_options(target))
print(target.count, program.memory_analysis().argument_size_in_bytes, "all-reduce" in program.as_text())
"""


@pytest.mark.parametrize("name", ["8xa6000", "v5e-16", "v4-16"])
def test_a_program_compiles_for_devices_that_are_not_attached(name: str):
    target = parse_target(name)
    if missing := find_missing_compiler(target):
        pytest.skip(missing)
    clean = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, timeout=300, check=False, env=clean
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(target.count), str(64 * 128 * 4 // target.count), "True"]
