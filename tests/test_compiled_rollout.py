"""The compiled decode loop: no token copies a weight or a cache, or costs a collective on a mesh without a model axis.

`python tests/test_compiled_rollout.py TARGET` prints the figures for Qwen2.5-3B on 8xa6000, v5e-16 or v6e-8, using the
compiler of that target and none of its devices.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from crpo_jax.planner.targets import compiler_options, find_missing_compiler, make_target_mesh, parse_target

ROWS, SLOTS = 128, 5120
TARGETS = {"8xa6000": ROWS, "v5e-16": ROWS // 8, "v6e-8": ROWS // 2}
"""Rows on each device. The cache of 128 rows of 5,120 slots takes 22.5 GiB beside 5.8 GiB of weights: it fits an A6000,
half of it fits a v6e, an eighth a v5e."""


class CompiledLoop(NamedTuple):
    """Bytes per device, and the instructions in the token loop that move as many elements as a weight or cache has."""

    cache: int
    temporaries: int
    instructions: int  # in the loop
    copies: list[str]
    collectives: list[str]


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of every computation of an HLO module, by its name."""
    instructions: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=\S)", text):
        head = re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{", block)
        if head:
            instructions[head[1]] = [line.strip() for line in block.splitlines()[1:] if " = " in line]
    return instructions


def inside_loops(text: str) -> list[str]:
    """Every instruction that runs in some loop, called computations included; a fusion counts as one instruction."""
    all_ = computations(text)
    waiting = [
        name
        for lines in all_.values()
        for line in lines
        if " while(" in line
        for name in re.findall(r"(?:body|condition)=%?([\w.-]+)", line)
    ]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            for line in all_[name]:
                if " fusion(" not in line:
                    waiting += [
                        called
                        for called in re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)", line)
                        if called in all_
                    ]
    return [line for name in sorted(seen) for line in all_[name]]


def sizes(line: str) -> list[tuple[tuple[int, ...], str]]:
    """Dims (ones left out, sorted) and layout of every array that an instruction makes."""
    result = line.split(" = ", 1)[1]
    result = result[: re.search(r" [\w-]+\(", result).start()]  # type: ignore[union-attr]
    arrays = re.findall(r"\w+\[([\d,]*)\](\{[^}]*\})?", result)
    return [(tuple(sorted(int(n) for n in dims.split(",") if n not in ("", "1"))), layout) for dims, layout in arrays]


def read_loop(text: str, whole: set[tuple[int, ...]], cache: int, temporaries: int) -> CompiledLoop:
    """`whole` are the sorted dims of caches and weights. A TPU's prefetch into on-chip memory, S(1), is not a copy."""
    lines, copies, collectives = inside_loops(text), [], []
    for line in lines:
        name = re.search(r" ([\w-]+)\(", line.split(" = ", 1)[1])
        kind = name[1] if name else ""
        if kind in ("copy", "copy-start", "transpose", "concatenate", "pad", "gather") or (
            kind == "fusion" and re.search(r"copy|transpose", line.split(" = ", 1)[0])
        ):
            copies += [line[:200] for dims, layout in sizes(line)[:1] if dims in whole and "S(1)" not in layout]
        if re.match(r"(all|reduce-scatter|collective)-?", kind):
            collectives.append(line[:200])
    return CompiledLoop(cache, temporaries, len(lines), copies, collectives)


def decode_program(mesh: Any, shape: Any, rows: int, slots: int, dtype: Any, compiler: dict[str, Any]) -> CompiledLoop:
    """The chunk of decode steps over `rows` gathered rows on each data shard, compiled."""
    import jax
    import jax.numpy as jnp

    from crpo_jax.model.decode import Cache
    from crpo_jax.model.lora import Policy
    from crpo_jax.model.placement import sampler_form, sampler_specs
    from crpo_jax.model.transformer import model_shapes
    from crpo_jax.parallel.layout import CACHE_BKSH, ROWS_B, kv_copies
    from crpo_jax.parallel.mesh import data_size, model_size
    from crpo_jax.rollout.draw import Sampling
    from crpo_jax.rollout.sample import RowState, sampling_programs

    def placed(shapes: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)

    def over(spec: Any) -> Any:
        return jax.sharding.NamedSharding(mesh, spec)

    b, heads = rows * data_size(mesh), shape.k * kv_copies(mesh, shape.k)
    weights = placed(
        jax.eval_shape(lambda model: sampler_form(Policy(model), mesh, dtype), model_shapes(shape)),
        jax.tree.map(over, sampler_specs(shape, mesh)),
    )
    layer = Cache(
        *(
            jax.ShapeDtypeStruct((b, heads, size, shape.h), dtype, sharding=over(CACHE_BKSH))
            for size in (0, 0, slots, slots)
        )
    )
    state = RowState(*(jax.ShapeDtypeStruct((b,), jnp.int32, sharding=over(ROWS_B)) for _ in RowState._fields))
    key = jax.eval_shape(lambda: jax.random.key(0))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    run = sampling_programs(shape, mesh, Sampling(1.0, stop_ids=(1, 2)), 16, "xla")
    program = run.decode_chunk.lower(weights, (layer,) * shape.l, state, key, number, number).compile(
        compiler_options=compiler
    )

    def local(x: Any) -> tuple[int, ...]:
        return tuple(sorted(n for n in x.sharding.shard_shape(x.shape) if n != 1))

    whole = {local(x) for x in [*jax.tree.leaves(weights), layer.k_bksh] if len(local(x)) > 1}
    cache = (
        2 * shape.l * math.prod(layer.k_bksh.shape) * jnp.dtype(dtype).itemsize // (data_size(mesh) * model_size(mesh))
    )
    return read_loop(program.as_text(), whole, cache, program.memory_analysis().temp_size_in_bytes)


def test_decoding_copies_and_sends_nothing_per_token_on_a_cpu():
    """The weights and the cache differ in size from each other and from the rest: no other copy is taken for theirs."""
    import jax.numpy as jnp
    from conftest import SHAPE, mesh_of

    loop = decode_program(mesh_of(8, 1), SHAPE, 11, 33, jnp.float32, {})
    assert loop.instructions > 50
    assert loop.copies == []
    assert loop.collectives == []
    split = decode_program(mesh_of(4, 2), SHAPE, 11, 33, jnp.float32, {})
    assert any("all-reduce" in line for line in split.collectives)  # a model axis needs sums: the reading can tell


def test_the_reading_finds_copies_and_collectives():
    """In a loop that must copy, because the layout of its array changes with every step."""
    import jax
    import jax.numpy as jnp

    def careless(x: Any) -> Any:
        def step(x: Any) -> Any:
            return jnp.sort(x.T + 1.0, axis=0).T[::-1]

        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: jax.lax.optimization_barrier(step(x)), x)

    text = jax.jit(careless).lower(jnp.zeros((33, 77))).compile().as_text()
    loop = read_loop(text, {(33, 77)}, 1, 0)
    assert loop.copies


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_decoding_3b_copies_and_sends_nothing_per_token(name: str):
    target = parse_target(name)
    if missing := find_missing_compiler(target):
        pytest.skip(missing)
    clean = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    root = Path(__file__).parents[1]
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), clean.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, __file__, name], capture_output=True, text=True, timeout=900, check=False, env=clean
    )
    assert done.returncode == 0, done.stderr
    loop = CompiledLoop(**json.loads(done.stdout))
    assert loop.instructions > 500
    assert loop.copies == []
    assert loop.collectives == []
    assert loop.temporaries < 0.05 * loop.cache


def main(name: str) -> None:
    target = parse_target(name)
    mesh = make_target_mesh(target, target.count, 1)
    import jax.numpy as jnp

    from crpo_jax.model.rotary import Rope
    from crpo_jax.model.shape import Shape

    shape = Shape(d=2048, n=16, k=2, h=128, f=11008, v=151936, l=36, tied=True, rope=Rope(1e6), norm_eps=1e-6)
    print(
        json.dumps(decode_program(mesh, shape, TARGETS[name], SLOTS, jnp.bfloat16, compiler_options(target))._asdict())
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
