"""Where bf16 and float32 round, in three comparisons on a small random Qwen2; runs on a CPU.

    python scripts/check_precision.py

1. The ratio of policy to old policy before anything has been learnt, by mini-batch of a rollout, in bf16: 1 exactly in
   the first, which needs no old log-probs; in the others as far off as two programs round apart.
2. The error of each attention kernel in bf16 against float32, output and gradients, relative in L2; Splash is
   interpreted.
3. The precision that the programs of training ask of their products, by compute type.
"""

import functools
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
from crpo_jax.model.lora import Policy
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import random_model
from crpo_jax.parallel.mesh import make_mesh
from crpo_jax.update.batches import Row, crpo_mini_batches
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


if __name__ == "__main__":
    print_ratios()
    print_attention_errors()
    print_precisions()
