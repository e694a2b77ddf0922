"""Times one part of an RL step on this machine and prints one JSON line.

    python scripts/bench.py rollout --model DIR --prompts FILE.jsonl --group 5 --max-new 64 [--stop IDS...] [--mesh DxM]
    python scripts/bench.py update --model DIR --lengths FILE.json [--padded] [--mesh DxM] [section.key=value ...]

`first_seconds` includes compilation; `seconds` is the median of the repeats after it. A prompts file has one object with
`tokens` per line; useful tokens of a rollout are those of the responses, stop tokens included. A lengths file is a list of
rows' lengths; an update is one gradient of a log-prob loss over all of them, and every token of a row is useful. All times
are wall-clock seconds.
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
from crpo_jax.model import huggingface
from crpo_jax.model.shape import forward_flops, read_shape
from crpo_jax.parallel.layout import LAYOUTS, check_layout
from crpo_jax.parallel.mesh import data_size, make_mesh, model_size
from crpo_jax.rollout import Response, RolloutProgress, Sampling, load_engine
from crpo_jax.update.batches import MicroBatch, Row, micro_batch, micro_batches, of_rows
from crpo_jax.update.losses import row_weights
from crpo_jax.update.trainer import on_devices, trainer


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until everything that `work` returns is there, and that."""
    began = time.perf_counter()
    made = jax.block_until_ready(work())
    return time.perf_counter() - began, made


def bandwidth(megabytes: int = 512) -> float:
    """Bytes a second that one device reads and writes in y = a * x + y over float32, the median of ten passes."""
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
        if (
            not isinstance(tokens, list)
            or not tokens
            or not all(type(token) is int and 0 <= token < vocabulary for token in tokens)
        ):
            raise InputError(f'{path}:{number}: expected {{"tokens": [ids below {vocabulary}]}}, got {line[:60]!r}')
        prompts.append(tokens)
    return prompts


def rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Samples every prompt's group, once to compile and then --repeats times, each with a key of its own.

    Bytes of a decode step on each device: all weights that a token's logits need, and the cache as long as it was.
    """
    how = Sampling(args.temperature, stop_ids=tuple(args.stop))
    engine, weights = load_engine(
        args.model, how, args.max_new, mesh=args.mesh, dtype=args.dtype, slots=args.slots, chunk=args.chunk
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
    whole, tokens = (
        statistics.median(spent for spent, _ in runs),
        sum(len(one.tokens) for group in runs[-1][1] for one in group),
    )
    read = (
        weights._replace(embed_vd=None) if weights.unembed_dv is not None else weights
    )  # a token reads one row of an embedding of its own
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(read)) // model_size(engine.mesh)
    steps = max(tallies[-1].steps, 1)
    before = [0, *(tally.steps for tally in tallies)]
    cache_bytes = (
        sum((tally.steps - old) * tally.cache_bytes for old, tally in zip(before, tallies, strict=False)) / steps
    )
    speed = bandwidth()
    return {
        "peer": "crpo_jax",
        "what": "rollout",
        "first_seconds": round(first, 3),
        "seconds": round(whole, 3),
        "useful_tokens": tokens,
        "tokens_per_second": round(tokens / whole, 1),
        "prefill_seconds": round(prefill, 3),
        "decode_seconds": round(whole - prefill, 3),
        "steps": steps,
        "bytes_per_step": round(weight_bytes + cache_bytes),
        "bandwidth": round(speed),
        "share_of_bandwidth": round((weight_bytes + cache_bytes) * steps / max(runs[-1][0] - prefill, 1e-9) / speed, 3),
    }


def read_lengths(path: str) -> list[int]:
    """The lengths of rows, in tokens."""
    try:
        lengths = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--lengths {path}: expected a readable JSON file, got {error}") from None
    if (
        not isinstance(lengths, list)
        or not lengths
        or not all(type(length) is int and length > 1 for length in lengths)
    ):
        raise InputError(f"--lengths {path}: expected a list of whole numbers above 1, got {str(lengths)[:60]}")
    return lengths


def update(args: argparse.Namespace) -> dict[str, Any]:
    """Gradients of the mean log-prob of all rows, micro-batches made on the host each time; the optimizer step is not in it.

    With --padded every row is as long as the longest, in arrival order, under the same token budget.
    """
    mesh, lengths = make_mesh(args.mesh), read_lengths(args.lengths)
    settings = config.load_config(None, [f"model.dtype={args.dtype}", *args.overrides], model=False)
    shape, parallel = read_shape(huggingface.model_folder(args.model)), settings.parallel
    layout = LAYOUTS[parallel.layout]
    check_layout(layout, mesh, {letter: getattr(shape, letter) for letter in "dnkfv"})
    run = trainer(shape, mesh, settings, settings.optimizer, 1, loss="supervised")
    weights = jax.block_until_ready(
        run.compute_weights(huggingface.load(args.model, mesh, layout.master, jnp.float32)[1])
    )
    draw = np.random.default_rng(0)
    rows = [Row([0], draw.integers(shape.v, size=length - 1).tolist()) for length in lengths]
    per_token = row_weights(np.array(lengths) - 1, np.ones(len(rows), bool), "token_mean")

    def micros() -> list[MicroBatch]:
        if not args.padded:
            return micro_batches(
                rows, budget=parallel.micro_batch_tokens, multiple=parallel.length_multiple, shards=data_size(mesh)
            )
        t = -(-max(lengths) // parallel.length_multiple) * parallel.length_multiple
        b = data_size(mesh) * max(1, parallel.micro_batch_tokens // t)
        return [micro_batch(rows, range(first, min(first + b, len(rows))), b, t) for first in range(0, len(rows), b)]

    def gradient() -> Any:
        gradients, totals = run.zero()
        for micro in micros():
            batch = on_devices(micro, mesh, weights=of_rows(per_token, micro.rows))
            gradients, totals = run.accumulate(gradients, totals, weights, batch)
        return gradients, totals

    first, _ = timed(gradient)
    spent = statistics.median(timed(gradient)[0] for _ in range(args.repeats))
    flops = 3 * sum(forward_flops(shape, length) for length in lengths)
    return {
        "peer": "crpo_jax padded" if args.padded else "crpo_jax",
        "what": "update",
        "first_seconds": round(first, 3),
        "seconds": round(spent, 3),
        "useful_tokens": sum(lengths),
        "tokens_per_second": round(sum(lengths) / spent, 1),
        "padding": round(1 - sum(lengths) / sum(micro.tokens.size for micro in micros()), 4),
        "shapes": len({micro.tokens.shape for micro in micros()}),
        "model_gflops_per_second": round(flops / spent / 1e9, 1),
        "devices": mesh.size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="PART")
    part = parts.add_parser("rollout", help="sampling: prefill and decode")
    part.set_defaults(run=rollout)
    part.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    part.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines with tokens")
    part.add_argument("--group", type=int, default=5, help="responses per prompt")
    part.add_argument("--max-new", type=int, default=64, help="longest response, in tokens")
    part.add_argument(
        "--stop", type=int, nargs="*", default=[], help="stop token ids; none: every row runs to --max-new"
    )
    part.add_argument("--temperature", type=float, default=1.0)
    part.add_argument(
        "--mesh", default="", metavar="DxM", help="data x model, in devices; default: all on the data axis"
    )
    part.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and cache")
    part.add_argument("--repeats", type=int, default=3, help="timed runs after the first")
    part.add_argument("--slots", type=int, default=128, help="rows decoded together on each data shard")
    part.add_argument("--chunk", type=int, default=16, help="decode steps between two looks of the host")
    part = parts.add_parser("update", help="one gradient over rows of different lengths")
    part.set_defaults(run=update)
    part.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    part.add_argument("--lengths", required=True, metavar="FILE", help="JSON list of the rows' lengths")
    part.add_argument("--padded", action="store_true", help="pad every row to the longest, in arrival order")
    part.add_argument(
        "--mesh", default="", metavar="DxM", help="data x model, in devices; default: all on the data axis"
    )
    part.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute type")
    part.add_argument("--repeats", type=int, default=3, help="timed runs after the first")
    part.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, such as parallel.micro_batch_tokens=4096"
    )
    args = parser.parse_args()
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    cli.run_command("bench", main)
