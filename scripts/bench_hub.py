"""Imports and exports a model folder of full size that transformers wrote, and compares every bit.

    python scripts/bench_hub.py --config CONFIG_JSON --folder EMPTY_FOLDER [--keep]

Three steps, each in a process of its own to measure its memory: transformers writes a random bfloat16 model in shards;
this package imports it in bfloat16 to one CPU device and exports it; transformers loads the export, and every parameter
is compared with the first folder's. Needs torch, twice the model's size on disk and once in memory.

Prints one JSON line: seconds, and how far host memory rose above the size of the parameters, as `anonymous` memory
(allocated by the process) and `resident` (which adds the pages of the safetensors files that the kernel maps).
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

GIGABYTE = 10**9


def write_with_transformers(config: str, folder: str) -> dict[str, Any]:
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**json.loads(Path(config).read_text(encoding="utf-8")))
    )
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide an exchanged key
        for name, weight in model.named_parameters():
            if "bias" in name or "norm" in name:
                weight.normal_()
    model.save_pretrained(folder, max_shard_size="2GB")
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def import_and_export(source: str, target: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from crpo_jax.model.huggingface import load_model, save_model
    from crpo_jax.parallel.layout import TENSOR
    from crpo_jax.parallel.mesh import make_mesh

    jnp.zeros(1).block_until_ready()  # starts the backend, whose memory is not the import's
    with MemoryWatch() as watch:
        began = time.perf_counter()
        model = jax.block_until_ready(load_model(source, make_mesh(), TENSOR, "bfloat16"))
        loaded = time.perf_counter()
        during_import = dict(watch.peak)
        save_model(model, target, dtype="bfloat16", max_shard_bytes=2 * GIGABYTE)
        saved = time.perf_counter()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    measured: dict[str, Any] = {
        "parameters_gb": round(size / GIGABYTE, 3),
        "import_s": round(loaded - began, 1),
        "export_s": round(saved - loaded, 1),
    }
    for step, peak in (("import", during_import), ("both", watch.peak)):
        measured |= {
            f"{step}_{kind}_above_parameters_gb": round((value - watch.before[kind] - size) / GIGABYTE, 3)
            for kind, value in peak.items()
        }
    return measured


class MemoryWatch:
    """The peak memory of this process, sampled every 5 ms."""

    def __enter__(self) -> "MemoryWatch":
        self.before = memory()
        self.peak = dict(self.before)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            for kind, value in memory().items():
                self.peak[kind] = max(self.peak[kind], value)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def memory() -> dict[str, int]:
    """Memory of this process in bytes, from /proc."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {
        kind: int(lines[name].split()[0]) * 1024 for kind, name in (("anonymous", "RssAnon"), ("resident", "VmRSS"))
    }


def compare(source: str, exported: str) -> dict[str, Any]:
    import torch
    import transformers
    from safetensors import safe_open

    loaded: Any = transformers.Qwen2ForCausalLM.from_pretrained(exported, dtype="auto", output_loading_info=True)
    model, notes = loaded
    if any(notes.values()):
        raise SystemExit(f"transformers loaded {exported} with {notes}")
    state, compared = model.state_dict(), set()
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                if not torch.equal(tensors.get_tensor(key).view(torch.int16), state[key].view(torch.int16)):
                    raise SystemExit(f"{key}: the exported bits differ from those of {file}")
                compared.add(key)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if compared - tied != state.keys() - tied:
        raise SystemExit(f"only one folder has {sorted(compared ^ state.keys())}")
    return {"tensors_equal": len(compared)}


STEPS = {"write": write_with_transformers, "round_trip": import_and_export, "compare": compare}


def run_step(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", name, *arguments]
    completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(completed.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="config.json of the model's shape, such as Qwen2.5-3B's")
    parser.add_argument("--folder", help="folder in which the two model folders are written")
    parser.add_argument("--keep", action="store_true", help="do not delete them at the end")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(STEPS[args.step](*args.arguments)))
        return
    if not args.config or not args.folder:
        parser.error("expected --config and --folder")
    theirs, ours = Path(args.folder) / "theirs", Path(args.folder) / "ours"
    if theirs.exists() or ours.exists():
        parser.error(f"--folder {args.folder}: expected no 'theirs' or 'ours' in it")
    try:
        results = run_step("write", args.config, str(theirs))
        results |= run_step("round_trip", str(theirs), str(ours))
        results |= run_step("compare", str(theirs), str(ours))
    finally:
        for folder in () if args.keep else (theirs, ours):
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
