"""Times one part of an RL step on this machine and prints one JSON line.

    python scripts/bench.py rollout --model DIR --prompts FILE.jsonl --group 5 --max-new 64 [--stop IDS...] [--mesh DxM]
    python scripts/bench.py update --model DIR --lengths FILE.json [--padded] [--mesh DxM] [section.key=value ...]

`first_seconds` includes compilation; `seconds` is the median of the repeats after it, in wall-clock time.
A prompts file has an object with `tokens` on every line; a rollout's useful tokens are those of its responses, stop
tokens included. A lengths file is a list of row lengths; an update is one gradient of a log-prob loss over all of those
rows, and every token of a row is useful.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crpo_jax import cli, config
from crpo_jax.errors import InputError
from crpo_jax.model.config_json import read_shape
from crpo_jax.model.decode import SamplerWeights
from crpo_jax.model.huggingface import load_model, model_folder
from crpo_jax.model.lora import Policy
from crpo_jax.model.shape import forward_flops
from crpo_jax.parallel.layout import check_layout, find_layout
from crpo_jax.parallel.mesh import data_size, make_mesh, model_size
from crpo_jax.rollout import Response, RolloutProgress, Sampling, load_engine
from crpo_jax.update.batches import Row, make_batch, pad_rows, supervised_batches
from crpo_jax.update.losses import Batch, row_weights
from crpo_jax.update.trainer import Trainer


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until everything that `work` returns is computed, and what it returns."""
    began = time.perf_counter()
    result = jax.block_until_ready(work())
    return time.perf_counter() - began, result


def bandwidth(megabytes: int = 512) -> float:
    """Bytes per second that one device reads and writes in y = a * x + y over float32, the median of ten passes."""
    x, y = jnp.ones(megabytes * 2**18), jnp.ones(megabytes * 2**18)
    triad = jax.jit(lambda x, y: 2 * x + y, donate_argnums=1)
    y = jax.block_until_ready(triad(x, y))
    passes = []
    for _ in range(10):
        spent, y = timed(lambda y=y: triad(x, y))
        passes.append(spent)
    return 3 * x.nbytes / statistics.median(passes)


def read_prompts(path: str, vocabulary: int) -> list[list[int]]:
    """The token ids of every line's `tokens`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path}: expected a readable file of JSON lines, got {error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            tokens = json.loads(line)["tokens"]
        except (ValueError, TypeError, KeyError):
            tokens = None
        known = isinstance(tokens, list) and all(type(token) is int and 0 <= token < vocabulary for token in tokens)
        if not known or not tokens:
            raise InputError(f'{path}:{number}: expected {{"tokens": [ids below {vocabulary}]}}, got {line[:60]!r}')
        prompts.append(tokens)
    return prompts


def rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Samples every prompt's group, once to compile and then --repeats times, each with its own key.

    A decode step reads, on each device, all weights that a token's logits need and the cache at its length then.
    """
    sampling = Sampling(args.temperature, stop_ids=tuple(args.stop))
    engine, weights = load_engine(
        args.model, sampling, args.max_new, mesh=args.mesh, dtype=args.dtype, slots=args.slots, chunk=args.chunk
    )
    jax.block_until_ready(weights)
    prompts = read_prompts(args.prompts, engine.shape.v)
    tallies: list[RolloutProgress] = []

    def sample(seed: int, limit: int = args.max_new) -> list[list[Response]]:
        tallies.clear()
        limits = [limit] * len(prompts)
        return engine.generate(
            weights, prompts, key=jax.random.key(seed), group=args.group, limits=limits, on_progress=tallies.append
        )

    first, _ = timed(lambda: sample(0))
    prefill = statistics.median(timed(lambda seed=seed: sample(seed, 1))[0] for seed in range(args.repeats))
    runs = [timed(lambda seed=seed: sample(seed)) for seed in range(1, args.repeats + 1)]
    seconds = statistics.median(spent for spent, _ in runs)
    tokens = sum(len(response.tokens) for group in runs[-1][1] for response in group)
    steps = max(tallies[-1].steps, 1)
    before = [0, *(tally.steps for tally in tallies)]
    cache_bytes = sum((now.steps - old) * now.cache_bytes for old, now in zip(before, tallies, strict=False)) / steps
    step_bytes = weight_bytes(weights, tied=engine.shape.tied) // model_size(engine.mesh) + cache_bytes
    speed = bandwidth()
    share = step_bytes * steps / max(runs[-1][0] - prefill, 1e-9) / speed
    return {
        "peer": "crpo_jax",
        "what": "rollout",
        "first_seconds": round(first, 3),
        "seconds": round(seconds, 3),
        "useful_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "prefill_seconds": round(prefill, 3),
        "decode_seconds": round(seconds - prefill, 3),
        "steps": steps,
        "bytes_per_step": round(step_bytes),
        "bandwidth": round(speed),
        "share_of_bandwidth": float(f"{share:.3g}"),
    }


def weight_bytes(weights: SamplerWeights, *, tied: bool) -> int:
    """Bytes of the weights that a decode step reads: of an embedding for the input alone it is a row per token."""
    ends = {name: weight for name, weight in weights.ends.items() if tied or name != "embed_vd"}
    return sum(leaf.nbytes for leaf in jax.tree.leaves((ends, weights.layers)))


def read_lengths(path: str) -> list[int]:
    """Row lengths in tokens."""
    try:
        lengths = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--lengths {path}: expected a readable JSON file, got {error}") from None
    whole = isinstance(lengths, list) and all(type(length) is int and length > 1 for length in lengths)
    if not whole or not lengths:
        raise InputError(f"--lengths {path}: expected a list of whole numbers above 1, got {str(lengths)[:60]}")
    return lengths


def update(args: argparse.Namespace) -> dict[str, Any]:
    """The gradient of all rows' mean log-prob, without an optimizer step; the host forms the micro-batches every time.

    With --padded every row is as long as the longest, in arrival order, under the same token budget.
    """
    mesh, lengths = make_mesh(args.mesh), read_lengths(args.lengths)
    settings = config.load_config(None, [f"model.dtype={args.dtype}", *args.overrides], model=False)
    shape, parallel = read_shape(model_folder(args.model)), settings.parallel
    layout = find_layout(parallel.layout)
    check_layout(layout, mesh, {dim: getattr(shape, dim) for dim in "dnkhfv"})
    trainer = Trainer(shape, mesh, settings, settings.optimizer, 1, loss="supervised")
    policy = jax.block_until_ready(Policy(trainer.compute_copy(load_model(args.model, mesh, layout.master))))
    kl_coef = jnp.float32(0)  # which only the CRPO loss takes
    rng = np.random.default_rng(0)
    rows = [Row([0], rng.integers(shape.v, size=length - 1).tolist()) for length in lengths]

    def batches() -> list[Batch]:
        if not args.padded:
            return supervised_batches(rows, parallel, data_size(mesh))
        weights = row_weights(np.array(lengths) - 1, np.ones(len(rows), bool), "token_mean")
        t = -(-max(lengths) // parallel.length_multiple) * parallel.length_multiple
        b = data_size(mesh) * max(1, parallel.micro_batch_tokens // t)
        parts = [range(first, min(first + b, len(rows))) for first in range(0, len(rows), b)]
        return [make_batch(pad_rows(rows, part, b, t), weights) for part in parts]

    def gradient() -> Any:
        gradients, metrics = trainer.zero()
        for batch in trainer.put_batches(batches()):
            gradients, metrics = trainer.accumulate(gradients, metrics, policy, batch, kl_coef)
        return gradients, metrics

    first, _ = timed(gradient)
    seconds = statistics.median(timed(gradient)[0] for _ in range(args.repeats))
    flops = 3 * sum(forward_flops(shape, length) for length in lengths)
    shapes = [batch.tokens.shape for batch in batches()]
    return {
        "peer": "crpo_jax padded" if args.padded else "crpo_jax",
        "what": "update",
        "first_seconds": round(first, 3),
        "seconds": round(seconds, 3),
        "useful_tokens": sum(lengths),
        "tokens_per_second": round(sum(lengths) / seconds, 1),
        "padding": round(1 - sum(lengths) / sum(b * t for b, t in shapes), 4),
        "shapes": len(set(shapes)),
        "model_gflops_per_second": round(flops / seconds / 1e9, 1),
        "devices": mesh.size,
    }


def main() -> None:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    shared.add_argument("--mesh", default="", metavar="DxM", help="data x model, in devices; default: all on data")
    shared.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and cache")
    shared.add_argument("--repeats", type=int, default=3, help="timed runs after the first")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="PART")
    part = parts.add_parser("rollout", parents=[shared], help="sampling: prefill and decode")
    part.set_defaults(run=rollout)
    part.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines with tokens")
    part.add_argument("--group", type=int, default=5, help="responses per prompt")
    part.add_argument("--max-new", type=int, default=64, help="longest response, in tokens")
    part.add_argument("--stop", type=int, nargs="*", default=[], help="stop token ids; default: none")
    part.add_argument("--temperature", type=float, default=1.0)
    part.add_argument("--slots", type=int, default=128, help="rows decoded together on each data shard")
    part.add_argument("--chunk", type=int, default=16, help="decode steps per call from the host")
    part = parts.add_parser("update", parents=[shared], help="one gradient over rows of different lengths")
    part.set_defaults(run=update)
    part.add_argument("--lengths", required=True, metavar="FILE", help="JSON list of row lengths")
    part.add_argument("--padded", action="store_true", help="pad every row to the longest, in arrival order")
    part.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, such as parallel.micro_batch_tokens=4096"
    )
    args = parser.parse_args()
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    cli.run_command("bench", main)
