"""A full-size model folder made by transformers, imported, exported, and read again by transformers: equal bit for bit.

    python scripts/bench_hub.py --config FILE_OF_CONFIG.json --folder EMPTY_FOLDER [--keep]

Four steps, each a process of its own so that its memory is its own: transformers makes a random model in bfloat16 and saves
it in shards; this package imports it in bfloat16 to one CPU device and exports it; transformers loads the export, and every
parameter is compared with the first folder's. Needs torch, twice the model's size on the disk and once in memory.

One JSON line: seconds, and how far host memory rose above the parameters themselves, as `anonymous` memory (what the
process had allocated) and `resident` (with the pages of the safetensors file that the kernel had mapped for it).
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


def make(config: str, folder: str) -> dict[str, Any]:
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**json.loads(Path(config).read_text(encoding="utf-8")))
    )
    with torch.no_grad():  # transformers' own start has zero biases and unit norms, which would hide an exchanged one
        for name, weight in model.named_parameters():
            if "bias" in name or "norm" in name:
                weight.normal_()
    model.save_pretrained(folder, max_shard_size="2GB")
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def import_and_export(source: str, target: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from crpo_jax.model import huggingface
    from crpo_jax.parallel.layout import TENSOR
    from crpo_jax.parallel.mesh import make_mesh

    jnp.zeros(1).block_until_ready()  # the runtime's own memory is no part of the import
    with Watch() as watch:
        began = time.perf_counter()
        shape, model = huggingface.load(source, make_mesh(), TENSOR, "bfloat16")
        jax.block_until_ready(model)
        loaded = time.perf_counter()
        during_import = dict(watch.peak)
        huggingface.save(model, shape, target, dtype="bfloat16", max_shard_bytes=2 * GIGABYTE)
        saved = time.perf_counter()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    found: dict[str, Any] = {
        "parameters_gb": round(size / GIGABYTE, 3),
        "import_s": round(loaded - began, 1),
        "export_s": round(saved - loaded, 1),
    }
    for step, peak in (("import", during_import), ("both", watch.peak)):
        found |= {
            f"{step}_{kind}_above_parameters_gb": round((value - watch.before[kind] - size) / GIGABYTE, 3)
            for kind, value in peak.items()
        }
    return found


class Watch:
    """The highest memory of this process, looked at every 5 ms."""

    def __enter__(self) -> "Watch":
        self.before = memory()
        self.peak = dict(self.before)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            for kind, value in memory().items():
                self.peak[kind] = max(self.peak[kind], value)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def memory() -> dict[str, int]:
    """Bytes by kind, from /proc."""
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
    state, seen = model.state_dict(), set()
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                if not torch.equal(tensors.get_tensor(key).view(torch.int16), state[key].view(torch.int16)):
                    raise SystemExit(f"{key}: the exported bits differ from those of {file}")
                seen.add(key)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if seen - tied != state.keys() - tied:
        raise SystemExit(f"only one side has {sorted(seen ^ state.keys())}")
    return {"tensors_equal": len(seen)}


def step(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--step", name, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="config.json of the shape, such as Qwen2.5-3B's")
    parser.add_argument("--folder", help="where the two model folders are made")
    parser.add_argument("--keep", action="store_true", help="leave them there")
    parser.add_argument("--step", choices=["make", "round", "compare"], help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        steps = {"make": make, "round": import_and_export, "compare": compare}
        print(json.dumps(steps[args.step](*args.arguments)))
        return
    if not args.config or not args.folder:
        parser.error("expected --config and --folder")
    theirs, ours = Path(args.folder) / "theirs", Path(args.folder) / "ours"
    if theirs.exists() or ours.exists():
        parser.error(f"--folder {args.folder}: expected no 'theirs' or 'ours' in it")
    try:
        found = (
            step("make", args.config, str(theirs))
            | step("round", str(theirs), str(ours))
            | step("compare", str(theirs), str(ours))
        )
    finally:
        for made in () if args.keep else (theirs, ours):
            shutil.rmtree(made, ignore_errors=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
