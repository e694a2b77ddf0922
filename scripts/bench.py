"""Times one part of an RL step on this machine and prints one JSON line.

    python scripts/bench.py rollout --model DIR --prompts FILE.jsonl --group 5 --max-new 64 [--stop IDS...] [--mesh DxM]

`first_seconds` includes compilation; `seconds` is the median of the repeats after it. A prompts file has one object with
`tokens` per line. Useful tokens are those of the responses, stop tokens included. All times are wall-clock seconds.
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

from crpo_jax import config
from crpo_jax.config import InputError
from crpo_jax.parallel.mesh import model_size
from crpo_jax.rollout import Response, Sampling, Tally, load


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
        if not isinstance(tokens, list) or not tokens or not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
            raise InputError(f'{path}:{number}: expected {{"tokens": [ids below {vocabulary}]}}, got {line[:60]!r}')
        prompts.append(tokens)
    return prompts


def rollout(args: argparse.Namespace) -> dict[str, Any]:
    """Samples every prompt's group, once to compile and then --repeats times, each with a key of its own.

    Bytes of a decode step on each device: all weights that a token's logits need, and the cache as long as it was.
    """
    how = Sampling(args.temperature, stop_ids=tuple(args.stop))
    engine, weights = load(args.model, how, args.max_new, mesh=args.mesh, dtype=args.dtype, slots=args.slots, chunk=args.chunk)
    jax.block_until_ready(weights)
    prompts = read_prompts(args.prompts, engine.shape.v)
    tallies: list[Tally] = []

    def sample(seed: int, limit: int = args.max_new) -> list[list[Response]]:
        tallies.clear()
        limits = [limit] * len(prompts)
        return engine.generate(weights, prompts, key=jax.random.key(seed), group=args.group, limits=limits, progress=tallies.append)

    first, _ = timed(lambda: sample(0))
    prefill = statistics.median(timed(lambda seed=seed: sample(seed, 1))[0] for seed in range(args.repeats))
    runs = [timed(lambda seed=seed: sample(seed)) for seed in range(1, args.repeats + 1)]
    whole, tokens = statistics.median(spent for spent, _ in runs), sum(len(one.tokens) for group in runs[-1][1] for one in group)
    read = weights._replace(embed_vd=None) if weights.unembed_dv is not None else weights  # a token reads one row of an embedding of its own
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(read)) // model_size(engine.mesh)
    steps = max(tallies[-1].steps, 1)
    before = [0, *(tally.steps for tally in tallies)]
    cache_bytes = sum((tally.steps - old) * tally.cache_bytes for old, tally in zip(before, tallies, strict=False)) / steps
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="PART")
    part = parts.add_parser("rollout", help="sampling: prefill and decode")
    part.set_defaults(run=rollout)
    part.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face folder")
    part.add_argument("--prompts", required=True, metavar="FILE", help="JSON lines with tokens")
    part.add_argument("--group", type=int, default=5, help="responses per prompt")
    part.add_argument("--max-new", type=int, default=64, help="longest response, in tokens")
    part.add_argument("--stop", type=int, nargs="*", default=[], help="stop token ids; none: every row runs to --max-new")
    part.add_argument("--temperature", type=float, default=1.0)
    part.add_argument("--mesh", default="", metavar="DxM", help="data x model, in devices; default: all on the data axis")
    part.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and cache")
    part.add_argument("--repeats", type=int, default=3, help="timed runs after the first")
    part.add_argument("--slots", type=int, default=128, help="rows decoded together on each data shard")
    part.add_argument("--chunk", type=int, default=16, help="decode steps between two looks of the host")
    args = parser.parse_args()
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    config.run_command("bench", main)
