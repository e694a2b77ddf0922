"""What a person sees of a run, and the figures in it that are computed on the host."""

import json
import math

import pytest

from crpo_jax import config
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape, backward_flops, forward_flops
from crpo_jax.runtime.report import closing, step_line, update_flops

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
