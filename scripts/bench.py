"""Times one part of an RL step on this machine and prints one JSON line.

    python scripts/bench.py rollout --model DIR --prompts FILE.jsonl --group 5 --max-new 64 [--stop IDS...] [--mesh DxM]
    python scripts/bench.py update --model DIR --lengths FILE.json [--mesh DxM] [section.key=value ...]
    python scripts/bench.py update --model DIR --groups FILE.json [--unshared] [--mesh DxM] [section.key=value ...]
    python scripts/bench.py step --model DIR --questions FILE.jsonl --group 5 --max-new 64 [section.key=value ...]

`first_seconds` includes compilation; `seconds` is the median of the repeats after it, in wall-clock time.
A prompts file has an object with `tokens` on every line; a rollout's useful tokens are those of its responses, stop
tokens included. A lengths file is a list of row lengths: the update is one gradient of a log-prob loss over those rows.
A groups file is a list of {"prompt": n, "responses": [m, ...]}: the update is a training step's. Every token of every
row is useful, also those of a prompt that is computed once for its group.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crpo_jax import cli, config
from crpo_jax.api import as_questions
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.model.config_json import read_shape
from crpo_jax.model.decode import SamplerWeights
from crpo_jax.model.huggingface import load_model, model_folder
from crpo_jax.model.lora import Policy
from crpo_jax.model.shape import forward_flops
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.layout import check_layout, find_layout
from crpo_jax.parallel.mesh import data_size, make_mesh, model_size
from crpo_jax.rollout import Response, RolloutProgress, Sampling, load_engine
from crpo_jax.runtime.runtime import open_runtime
from crpo_jax.train import train
from crpo_jax.update.batches import Row, count_places, crpo_mini_batches, supervised_batches
from crpo_jax.update.losses import Batch
from crpo_jax.update.trainer import Loss, Trainer


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


def read_lines(flag: str, path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: expected a readable file of JSON lines, got {error}") from None


def read_questions(path: str) -> list[Question]:
    """The questions of a file of JSON lines, as the Python API takes them."""
    rows = []
    for number, line in enumerate(read_lines("--questions", path), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise InputError(f"{path}:{number}: expected a question as JSON, got {line[:60]!r}") from None
    return as_questions(rows)


def read_prompts(path: str, vocabulary: int) -> list[list[int]]:
    """The token ids of every line's `tokens`."""
    lines = read_lines("--prompts", path)
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


def read_json(flag: str, path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: expected a readable JSON file, got {error}") from None


def are_lengths(values: Any, least: int) -> bool:
    return isinstance(values, list) and bool(values) and all(type(each) is int and each >= least for each in values)


def read_lengths(path: str) -> list[int]:
    """Row lengths in tokens."""
    lengths = read_json("--lengths", path)
    if not are_lengths(lengths, 2):
        raise InputError(f"--lengths {path}: expected a list of whole numbers above 1, got {str(lengths)[:60]}")
    return lengths


def read_groups(path: str) -> list[dict[str, Any]]:
    """The lengths of every prompt and of the responses to it."""
    groups = read_json("--groups", path)
    if not isinstance(groups, list) or not groups:
        raise InputError(f"--groups {path}: expected a list of groups, got {str(groups)[:60]}")
    for number, group in enumerate(groups, 1):
        prompt, responses = (group.get("prompt"), group.get("responses")) if isinstance(group, dict) else (None, None)
        if not (are_lengths([prompt], 1) and are_lengths(responses, 1)):
            expected = '{"prompt": n, "responses": [m, ...]} with whole numbers above 0'
            raise InputError(f"--groups {path}: group {number}: expected {expected}, got {str(group)[:60]}")
    return groups


def open_trainer(args: argparse.Namespace, loss: Loss) -> tuple[config.Config, Trainer, Transformer]:
    """The trainer of a model's folder on the mesh, and its float32 masters."""
    mesh = make_mesh(args.mesh)
    settings = config.load_config(None, [f"model.dtype={args.dtype}", *args.overrides], model=False)
    shape, layout = read_shape(model_folder(args.model)), find_layout(settings.parallel.layout)
    check_layout(layout, mesh, {dim: getattr(shape, dim) for dim in "dnkhfv"})
    trainer = Trainer(shape, mesh, settings, settings.optimizer, 1, loss=loss)
    return settings, trainer, jax.block_until_ready(load_model(args.model, mesh, layout.master))


def update(args: argparse.Namespace) -> dict[str, Any]:
    return update_groups(args) if args.groups else update_rows(args)


def update_rows(args: argparse.Namespace) -> dict[str, Any]:
    """The gradient of all rows' mean log-prob, without an optimizer step; the host forms the micro-batches every
    time."""
    lengths = read_lengths(args.lengths)
    settings, trainer, master = open_trainer(args, "supervised")
    policy, kl_coef = Policy(trainer.compute_copy(master)), jnp.float32(0)  # which only the CRPO loss takes
    rng, shape = np.random.default_rng(0), master.shape
    rows = [Row([0], rng.integers(shape.v, size=length - 1).tolist()) for length in lengths]

    def gradient() -> Any:
        batches = supervised_batches(rows, settings.parallel, data_size(trainer.mesh))
        gradients, metrics = trainer.zero()
        for batch in trainer.put_batches(batches):
            gradients, metrics = trainer.accumulate(gradients, metrics, policy, batch, kl_coef)
        return gradients, metrics

    first, _ = timed(gradient)
    seconds = statistics.median(timed(gradient)[0] for _ in range(args.repeats))
    flops = 3 * sum(forward_flops(shape, length) for length in lengths)
    batches = supervised_batches(rows, settings.parallel, data_size(trainer.mesh))
    return describe_update(args, first, seconds, rows, batches) | {
        "model_gflops_per_second": round(flops / seconds / 1e9, 1),
        "devices": trainer.mesh.size,
    }


def update_groups(args: argparse.Namespace) -> dict[str, Any]:
    """A step's update as training does it: micro-batches, log-probs of the reference and where needed of the old
    policy, and an optimizer step per mini-batch of crpo.mini_batch_prompts, by default all groups.

    With --unshared every response has a prompt of its own, of the same length.
    """
    groups = read_groups(args.groups)
    size = len(groups[0]["responses"])
    if any(len(group["responses"]) != size for group in groups):
        raise InputError(f"--groups {args.groups}: expected as many responses in every group, got several numbers")
    of_groups = [f"crpo.{name}={len(groups)}" for name in ("prompts_per_step", "mini_batch_prompts")]
    longest = max(max(group["responses"]) for group in groups)
    args.overrides = [*of_groups, f"crpo.group_size={size}", f"rollout.max_new_tokens={longest}", *args.overrides]
    settings, trainer, master = open_trainer(args, "crpo")
    rng, shards, rows = np.random.default_rng(0), data_size(trainer.mesh), list[Row]()

    def draw(length: int) -> list[int]:
        return rng.integers(master.shape.v, size=length).tolist()

    for group in groups:
        shared = draw(group["prompt"])
        rows += [Row(draw(group["prompt"]) if args.unshared else shared, draw(length)) for length in group["responses"]]
    advantages = rng.normal(size=len(rows)).astype(np.float32)
    logprobs = [np.full(len(row.response), -np.log(master.shape.v), np.float32) for row in rows]
    state, passes = trainer.begin(master), list[float]()

    def mini_batches() -> list[list[Batch]]:
        return crpo_mini_batches(rows, logprobs, advantages, np.ones(len(rows), bool), settings, shards)

    def whole() -> Any:
        nonlocal state
        began = time.perf_counter()
        batches = [trainer.put_batches(batch) for batch in mini_batches()]
        batches = jax.block_until_ready(trainer.with_logprobs(state, batches))
        passes.append(time.perf_counter() - began)
        measured = []
        for mini_batch in batches:
            state, of_mini_batch = trainer.update(state, mini_batch)
            measured.append(of_mini_batch)
        return state.step, measured

    first, _ = timed(whole)
    passes.clear()
    seconds = statistics.median(timed(whole)[0] for _ in range(args.repeats))
    described = describe_update(args, first, seconds, rows, [batch for batches in mini_batches() for batch in batches])
    return described | {"logprobs_seconds": round(statistics.median(passes), 3), "devices": trainer.mesh.size}


def describe_update(
    args: argparse.Namespace, first: float, seconds: float, rows: list[Row], batches: list[Batch]
) -> dict[str, Any]:
    """Every token of every row is useful, whether its prompt is shared or not; padding is of the places computed."""
    tokens, shapes = sum(row.length for row in rows), [np.asarray(batch.packed_tokens).shape for batch in batches]
    return {
        "peer": "crpo_jax unshared" if args.unshared else "crpo_jax",
        "what": "update",
        "first_seconds": round(first, 3),
        "seconds": round(seconds, 3),
        "useful_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "padding": round(1 - count_places(rows) / sum(c * t for c, t in shapes), 4),
        "shapes": len(set(shapes)),
    }


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Whole steps of training on a question file, with a reward that takes no time: rollout, scoring, update.

    `seconds` is the median over the steps after the first, without evaluations and checkpoints.
    """
    changes = {"model.path": args.model, "model.dtype": args.dtype, "parallel.mesh": args.mesh}
    changes |= {"rollout.max_new_tokens": args.max_new}
    changes |= {"crpo.prompts_per_step": args.prompts_per_step, "crpo.mini_batch_prompts": args.prompts_per_step}
    changes |= {"crpo.group_size": args.group, "crpo.steps": args.steps + 1}
    changes |= {"reward.design": "letters", "reward.workers": 0, "data.eval_questions": 1}
    changes |= {"evaluate.max_new_tokens": 1, "run.save_every": 0, "run.eval_every": 0}
    overrides = [f"{name}={value}" for name, value in changes.items()]
    settings = config.load_config(None, [*overrides, *args.overrides])
    questions = read_questions(args.questions)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train(
            open_runtime(settings),
            Path(folder),
            questions=questions,
            held_out=questions[:1],
            reward_functions={"letters": count_letters},
        )
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "time/update" in row]
    parts = {name: [row[f"time/{name}"] for row in steps] for name in ("rollout", "score", "update")}
    whole = [sum(spent) for spent in zip(*parts.values(), strict=True)]
    return {
        "peer": "crpo_jax",
        "what": "step",
        "first_seconds": round(whole[0], 3),
        "seconds": round(statistics.median(whole[1:]), 3),
        **{f"{name}_seconds": round(statistics.median(spent[1:]), 3) for name, spent in parts.items()},
        "steps": len(whole) - 1,
    }


def count_letters(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that differs within a group and costs nothing."""
    return [float(len(set(str(completion))) % 7) for completion in completions]


def add_overrides(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, such as parallel.micro_batch_tokens=4096"
    )


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
    part = parts.add_parser("update", parents=[shared], help="a gradient over rows, or the whole update over groups")
    part.set_defaults(run=update)
    what = part.add_mutually_exclusive_group(required=True)
    what.add_argument("--lengths", metavar="FILE", help="JSON list of row lengths")
    what.add_argument("--groups", metavar="FILE", help='JSON list of {"prompt": n, "responses": [m, ...]}')
    part.add_argument("--unshared", action="store_true", help="a prompt of its own for every response of a group")
    add_overrides(part)
    part = parts.add_parser("step", parents=[shared], help="whole steps: rollout, scoring, update")
    part.set_defaults(run=step)
    part.add_argument("--questions", required=True, metavar="FILE", help="JSON lines of questions")
    part.add_argument("--prompts-per-step", type=int, default=4)
    part.add_argument("--group", type=int, default=5, help="responses per prompt")
    part.add_argument("--max-new", type=int, default=64, help="longest response, in tokens")
    part.add_argument("--steps", type=int, default=4, help="timed steps after the first")
    add_overrides(part)
    args = parser.parse_args()
    print(json.dumps(args.run(args)))


if __name__ == "__main__":
    cli.run_command("bench", main)
