"""Times a checkpoint of the default CPU run: the seconds until training goes on, and until it is sealed on the disk.

python scripts/bench_checkpoint.py --folder FOLDER [--saves 30]

FOLDER must be on the disk to be measured: a tmpfs syncs nothing. The state has the shapes, types and number of arrays
of configs/tiny.yaml, filled with random numbers; a step's log lines stand between two saves. Prints medians, and the
first and the third quartile.
"""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from crpo_jax.config import default_config_path, load_config
from crpo_jax.runtime.runtime import open_runtime
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.store.logs import Log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--saves", type=int, default=30)
    args = parser.parse_args()
    runtime = open_runtime(load_config(default_config_path("cpu"), ["parallel.mesh=1x1"]))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding),
        runtime.trainer("crpo", 1).abstract_state(),
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    workdir = args.folder / "bench_checkpoint"
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    seconds: dict[str, list[float]] = {"until training goes on": [], "until it is sealed": []}
    with Log(workdir) as log, Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        for step in range(args.saves + 3):
            log.samples([{"step": step, "response": "x" * 1000} for _ in range(128)])
            log.step(step, {f"measure/{number}": float(number) for number in range(60)})
            began = time.perf_counter()
            checkpoints.save(step + 1, state)
            seconds["until training goes on"].append(time.perf_counter() - began)
            checkpoints.wait()
            seconds["until it is sealed"].append(time.perf_counter() - began)
    files = sum(path.is_file() for path in (workdir / "checkpoints" / str(args.saves + 3)).rglob("*"))
    print(f"{len(jax.tree.leaves(state))} arrays, {size / 1e6:.1f} MB, {files} files, {args.saves} saves")
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values[3:], n=4)  # the first saves warm up
        print(f"{name}: median {median:.3f} s ({low:.3f} to {high:.3f})")
    shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
