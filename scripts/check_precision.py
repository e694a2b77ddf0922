"""Where bf16 and float32 round, in four comparisons on a small random Qwen2; runs on a CPU.

    python scripts/check_precision.py

1. The ratio of policy to old policy before anything has been learnt, by mini-batch of a rollout, in bf16: 1 exactly in
   the first, which needs no old log-probs; in the others as far off as two programs round apart.
2. The error of each attention kernel in bf16 against float32, output and gradients, relative in L2; Splash is
   interpreted.
3. The precision that the programs of training ask of their products, by compute type.
4. How far the sampler's log-probs are from the trainer's of the same weights, with and without adapters, and with all
   weights twice as large: what crpo.old_logprobs=sampler puts into its ratios.
"""

import functools
import itertools
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from crpo_jax import config
from crpo_jax.model import attention
from crpo_jax.model.attention import causal_attention
from crpo_jax.model.lora import Policy, initial_adapters
from crpo_jax.model.placement import to_sampler
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import random_model
from crpo_jax.parallel.mesh import make_mesh
from crpo_jax.rollout import Engine, Sampling
from crpo_jax.update.batches import Row, crpo_mini_batches
from crpo_jax.update.losses import response_mask
from crpo_jax.update.trainer import Trainer

SHAPE = Shape(d=128, n=8, k=4, h=16, f=320, v=2048, l=3, tied=False, rope=Rope(1e4), norm_eps=1e-6)
MINI_BATCHES, ROWS, PROMPT, LENGTH = 4, 8, 16, 128


def settings_of(dtype: str) -> config.Config:
    keys = {"model.dtype": dtype, "crpo.mini_batch_prompts": 2, "crpo.prompts_per_step": 2 * MINI_BATCHES}
    keys |= {"crpo.group_size": ROWS // 2, "parallel.remat": "false", "parallel.logprob_chunk": 256}
    return config.load_config(None, [f"{key}={value}" for key, value in keys.items()], model=False)


def print_ratios() -> None:
    settings, mesh, rng = settings_of("bfloat16"), make_mesh(), np.random.default_rng(0)
    trainer = Trainer(SHAPE, mesh, settings, settings.optimizer, 10, loss="crpo")
    state = trainer.begin(jax.device_put(random_model(SHAPE, jax.random.key(0)), trainer.shardings.master))
    tokens = rng.integers(SHAPE.v, size=(MINI_BATCHES * ROWS, LENGTH)).tolist()
    rows = [Row(row[:PROMPT], row[PROMPT:]) for row in tokens]
    logprobs = [np.zeros(LENGTH - PROMPT, np.float32)] * len(rows)
    advantages, counted = rng.normal(size=len(rows)).astype(np.float32), np.ones(len(rows), bool)
    mini_batches = crpo_mini_batches(rows, logprobs, advantages, counted, settings, 1)
    placed = [trainer.put_batches(batches) for batches in mini_batches]
    for number, batches in enumerate(trainer.with_logprobs(state, placed)):
        metrics = trainer.gradients(state, batches)[1]
        largest = max(float(metrics["max/log_ratio"]), -float(metrics["min/log_ratio"]))
        print(f"mini-batch {number}: largest |log ratio| before its update {largest:.2g}")


def print_attention_errors() -> None:
    attention.INTERPRET = True
    rng = np.random.default_rng(0)
    for width in (64, 128):
        q = jnp.float32(rng.normal(size=(1, 128, 2, width)) * 3)
        k, v, weights = (
            jnp.asarray(rng.normal(size=(1, 128, heads, width)) * size, jnp.bfloat16)
            for heads, size in ((1, 3), (1, 1), (2, 1))
        )

        def run(kind: Any, dtype: Any, inputs: Any = (q, k, v, weights)) -> list[Any]:
            q, k, v, weights = inputs
            attend: Any = functools.partial(causal_attention, kind=kind)
            out, pull = jax.vjp(attend, q, k.astype(dtype), v.astype(dtype))
            return [np.float32(x) for x in (out, *pull(weights.astype(out.dtype)))]

        exact = run("xla", jnp.float32)
        for kind in ("xla", "splash"):
            pairs = zip(run(kind, jnp.bfloat16), exact, strict=True)
            errors = [np.linalg.norm(ours - expected) / np.linalg.norm(expected) for ours, expected in pairs]
            named = zip(("output", "dq", "dk", "dv"), errors, strict=True)
            print(f"heads of {width}, {kind}: " + ", ".join(f"{name} {error:.3%}" for name, error in named))


def print_precisions() -> None:
    for dtype in ("float32", "bfloat16"):
        settings = settings_of(dtype)
        trainer = Trainer(SHAPE, make_mesh(), settings, settings.optimizer, 10, loss="crpo")
        policy = Policy(jax.eval_shape(trainer.compute_copy, trainer.shapes))
        rows = [Row([1] * PROMPT, [1] * (LENGTH - PROMPT))] * (MINI_BATCHES * ROWS)
        zeros = np.zeros(len(rows), np.float32)
        logprobs = [np.zeros(LENGTH - PROMPT, np.float32)] * len(rows)
        batch = crpo_mini_batches(rows, logprobs, zeros, np.ones(len(rows), bool), settings, 1)[0][0]
        batch: Any = batch._replace(reference=batch.sampler, old=batch.sampler)
        gradients, metrics = jax.eval_shape(trainer.zero)
        lowered = trainer.accumulate.lower(gradients, metrics, policy, batch, jnp.float32(0))
        products = re.findall(r"stablehlo\.dot_general.*", lowered.as_text())
        precisions = [re.search(r"precision = \[(\w+), \w+\]", product) for product in products]
        counts = Counter(match[1] if match else "DEFAULT" for match in precisions)
        print(f"model.dtype={dtype}: {', '.join(f'{count} products at {name}' for name, count in counts.items())}")


def print_mismatch(dtype: str, rank: int, factor: float) -> None:
    """Of responses of 112 tokens at temperature 0.6; adapters are random, the size of some updates."""
    keys = [f"lora.rank={rank}", "rollout.temperature=0.6", "crpo.kl_coef=0"]
    settings, mesh = config.replaced(settings_of(dtype), dict(config.read_override(key) for key in keys)), make_mesh()
    trainer = Trainer(SHAPE, mesh, settings, settings.optimizer, 10, loss="crpo", lora=settings.lora)
    model = jax.tree.map(lambda x: x * factor if x.ndim > 2 else x, random_model(SHAPE, jax.random.key(0)))
    if rank:
        adapters = initial_adapters(SHAPE, settings.lora, jax.random.key(1))
        noise = jax.random.normal(jax.random.key(2), (SHAPE.l, rank, SHAPE.d))
        adapters = jax.tree.map(lambda x: x + 0.01 * jnp.resize(noise, x.shape), adapters)
        state = trainer.begin(adapters, jax.tree.map(lambda x: x.astype(dtype), model))
    else:
        state = trainer.begin(model)
    engine = Engine(SHAPE, mesh, Sampling(0.6), LENGTH - PROMPT, 64, 16)
    weights = to_sampler(SHAPE, mesh, dtype, state.policy.adapted)(state.policy)
    prompts = np.random.default_rng(0).integers(SHAPE.v, size=(ROWS // 2, PROMPT)).tolist()
    groups = engine.generate(weights, prompts, key=jax.random.key(5), group=ROWS // 2)
    responses = [response for group in groups for response in group]
    rows = [Row(prompts[response.prompt], response.tokens.tolist()) for response in responses]
    ones, logprobs = np.ones(len(rows), np.float32), [response.logprobs for response in responses]
    mini_batches = crpo_mini_batches(rows, logprobs, ones, ones > 0, settings, 1)
    policy, gaps = trainer.weights(state), list[np.ndarray]()
    for batch in (batch for batches in mini_batches for batch in trainer.put_batches(batches)):
        of_trainer, mask = np.asarray(trainer.logprobs(policy, batch)), np.asarray(response_mask(batch))
        gaps += [gap[inside] for gap, inside in zip(of_trainer - np.asarray(batch.sampler), mask, strict=True)]
    sizes, sums = np.abs(np.concatenate(gaps)), np.array([gap.sum() for gap in gaps])
    print(
        f"{dtype}, LoRA rank {rank}, weights x {factor:g}: |log ratio| of trainer to sampler {sizes.mean():.2g} on "
        f"average, at most {sizes.max():.2g}; summed over a response {np.sqrt(np.mean(sums**2)):.2g} (rms)"
    )


if __name__ == "__main__":
    print_ratios()
    print_attention_errors()
    print_precisions()
    for dtype, rank, factor in (("float32", 0, 1), *itertools.product(["bfloat16"], [0, 32], [1, 2])):
        print_mismatch(dtype, rank, factor)
