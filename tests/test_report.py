"""What a person sees of a run, and the figures in it that are computed on the host."""

import dataclasses
import json
import math

import jax.numpy as jnp
import pytest

from crpo_jax import config
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape, backward_flops, block_weights, forward_flops
from crpo_jax.runtime.report import closing, needed_share, step_line, update_flops, update_metrics
from crpo_jax.update.batches import Row
from crpo_jax.update.losses import Batch, crpo_loss
from crpo_jax.update.trainer import Update

SHAPE = Shape(d=64, n=4, k=2, h=16, f=128, v=256, l=2, tied=True, rope=Rope(1e4), norm_eps=1e-6)
LENGTHS = [100, 90, 80, 70]


def test_mfu_counts_the_old_policy_for_later_mini_batches_only():
    every = config.Config()
    single = sum(2 * forward_flops(SHAPE, length) + backward_flops(SHAPE, length) for length in LENGTHS)
    assert update_flops(SHAPE, every, LENGTHS, 4) == single
    assert update_flops(SHAPE, every, LENGTHS, 2) == single + forward_flops(SHAPE, 80) + forward_flops(SHAPE, 70)
    without_kl = config.Config(crpo=config.Crpo(kl_coef=0.0))
    assert update_flops(SHAPE, without_kl, LENGTHS, 4) == single - sum(forward_flops(SHAPE, n) for n in LENGTHS)


def test_mfu_does_not_count_gradients_of_frozen_weights():
    """A LoRA run used to report a third more than it did: four forward passes' worth of arithmetic are three."""
    lora = config.Config(lora=config.Lora(rank=1, targets=("q_proj",)))
    adapters = 2 * (64 + 64)  # in two layers, A [64, 1] and B [1, 64]
    forward = sum(forward_flops(SHAPE, length) for length in LENGTHS)
    assert update_flops(SHAPE, lora, LENGTHS, 4) == forward + sum(
        forward_flops(SHAPE, length, adapters) + backward_flops(SHAPE, length, adapters) for length in LENGTHS
    )
    assert update_flops(SHAPE, lora, LENGTHS, 4) == pytest.approx(3 * forward, rel=0.1)


def test_questions_without_a_right_answer_have_no_accuracy_in_lines_and_tables(tmp_path):
    """The logs write nan as null, and the closing table could not print it."""
    names = ("mean", "accuracy", "format", "cross_reference", "consistency", "length", "truncated")
    rows = [{"step": step, **{f"eval/{name}": 0.5 for name in names}, "eval/accuracy": None} for step in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = closing(tmp_path, 4)
    assert "accuracy" not in text
    assert "format 0.500 ± 0.250 0.500 ± 0.250 +0.00" in " ".join(text.split())
    line = step_line({"reward/mean": 1.5, "reward/accuracy": math.nan, "reward/format": 1.0, "response/length": 9})
    assert line == "reward 1.50  format 1.00  9 tokens"


def test_a_shared_prompt_is_needed_once():
    """Four responses of one token to a prompt of 10,000: nearly all of the arithmetic is the prompt's, and a quarter of
    it is needed; the output projection is needed four times instead of 40,000."""
    rows = [Row([0] * 10_000, [1])] * 4
    shape = dataclasses.replace(SHAPE, window=1, layers_windowed=(True,) * SHAPE.l)  # hardly any attention
    blocks, output = block_weights(shape), shape.d * shape.v
    expected = blocks / (blocks + output) / 4
    assert needed_share(shape, rows) == pytest.approx(expected, rel=0.05)
    assert needed_share(shape, [Row([0], [1] * 500)]) == pytest.approx(1, rel=0.01)


def test_where_no_response_carries_gradient_there_are_no_means():
    """All cut and crpo.truncated=mask: an entropy of 0 would be taken for a policy that says the same in every draw."""
    per_row, per_token = jnp.zeros(2), jnp.zeros((2, 3))
    lengths = jnp.array([3, 2])
    batch = Batch(per_token.astype(int), lengths, per_row, per_row, sampler=per_token, reference=per_token)
    metrics = crpo_loss(per_token, per_token, batch, config.Crpo(importance="token"), 0.1)[1]
    measures = update_metrics([Update(metrics, jnp.float32(0), jnp.float32(1))])
    means = {name for name in measures if name.startswith(("importance/", "policy/clipped_"))}
    means |= {"kl/mean", "policy/entropy", "policy/sampler_difference_mean"}
    assert {name for name, value in measures.items() if math.isnan(value)} == means
    assert "kl" not in step_line(measures | {"reward/mean": 0.0, "response/length": 3.0})
