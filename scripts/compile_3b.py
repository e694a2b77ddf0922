"""Compiles one update of the full-size model ahead of time for hardware that is not here, and prints its memory.

    python scripts/compile_3b.py --topology v5e:4x4 --mesh 16x1 [section.key=value ...]

Needs `pip install libtpu` in the version that `jax[tpu]` names; no TPU, no weights. Sizes are per device.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(name, value)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from crpo_jax import config
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.qwen2 import abstract, parameter_count
from crpo_jax.model.shape import shape_of
from crpo_jax.parallel.layout import LAYOUTS, ROWS_B, TOKENS_BT, check_layout
from crpo_jax.parallel.mesh import DATA, MODEL, data_size, parse_mesh
from crpo_jax.update.step import trainer

QWEN25_3B = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
}


TARGETS = {  # what libtpu needs to know; v4 and v5p chips count as two devices unless told to act as one
    "v5e": {},
    "v6e": {},
    "v4": {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1, "wrap": (False,) * 3},
    "v5": {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1, "wrap": (False,) * 3},
}
GIB = 2**30


def placed(shapes, shardings):
    """ShapeDtypeStructs with shardings: arguments to compile for, without any memory behind them."""
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def compiled(name: str, function, *arguments) -> None:
    """Lowers and compiles, and prints seconds and memory per device."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    seconds, memory = time.perf_counter() - start, program.memory_analysis()
    held, made, shared = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.alias_size_in_bytes
    total = held + made - shared + memory.temp_size_in_bytes
    parts = f"arguments {held / GIB:.2f}, new results {(made - shared) / GIB:.2f}, temporaries {memory.temp_size_in_bytes / GIB:.2f}"
    print(f"{name:<12} {total / GIB:6.2f} GiB per device ({parts}); compiled in {seconds:.0f} s", flush=True)


def main() -> None:
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4", help="TPU topology, such as v5e:4x4 (16 chips)")
    parser.add_argument("--mesh", default="16x1", help="data x model")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch per data shard")
    parser.add_argument("--tokens", type=int, default=5120, help="tokens of a row")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    settings = config.load(config.config_folder() / "clinical_r1_3b.yaml", args.overrides)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology, **TARGETS[args.topology.split(":")[0]])
    sizes = parse_mesh(args.mesh)
    mesh = topologies.make_mesh(topology, sizes, (DATA, MODEL))
    mesh = Mesh(mesh.devices, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))
    shape, layout = shape_of(QWEN25_3B), LAYOUTS[settings.parallel.layout]
    check_layout(layout, mesh, {letter: getattr(shape, letter) for letter in "dnkfv"})
    print(
        f"{parameter_count(shape):,} parameters, {args.topology} as {args.mesh}, layout {settings.parallel.layout}, "
        f"{args.rows} x {args.tokens} tokens per data shard"
    )

    run = trainer(shape, mesh, settings, settings.optimizer, 1, loss="crpo")
    b = args.rows * data_size(mesh)
    tokens, rows = NamedSharding(mesh, TOKENS_BT), NamedSharding(mesh, ROWS_B)
    batch = {
        name: jax.ShapeDtypeStruct((b, args.tokens), kind, sharding=tokens)
        for name, kind in (("tokens", jnp.int32), ("old", jnp.float32), ("reference", jnp.float32), ("sampler", jnp.float32))
    }
    batch |= {
        name: jax.ShapeDtypeStruct((b,), kind, sharding=rows)
        for name, kind in (("prompt_lengths", jnp.int32), ("lengths", jnp.int32), ("advantages", jnp.float32), ("weights", jnp.float32))
    }
    gradients = placed(abstract(shape), run.states.master)
    state = placed(jax.eval_shape(run.begin, abstract(shape)), run.states)
    weights = placed(abstract(shape, jnp.bfloat16), weight_shardings(shape, layout.compute, mesh))
    compiled("accumulate", run.accumulate, gradients, jax.eval_shape(run.zero)[1], weights, batch)
    compiled("apply", run.apply, state, gradients)


if __name__ == "__main__":
    config.run_command("compile_3b", main)
