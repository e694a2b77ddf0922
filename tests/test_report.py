"""What a person sees of a run, and the figures in it that are computed on the host."""

import json
from pathlib import Path
from typing import Any

import pytest

from crpo_jax import config
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape, backward_flops, forward_flops
from crpo_jax.runtime.report import before_and_after, update_flops

SHAPE = Shape(d=64, n=4, k=2, h=16, f=128, v=256, l=2, tied=True, rope=Rope(1e4), norm_eps=1e-6)
LENGTHS = [100, 90, 80, 70]


def test_mfu_counts_the_old_policy_for_later_mini_batches_only():
    every = config.Lora(rank=0)
    single = sum(2 * forward_flops(SHAPE, length) + backward_flops(SHAPE, length) for length in LENGTHS)
    assert update_flops(SHAPE, every, LENGTHS, 4) == single
    assert update_flops(SHAPE, every, LENGTHS, 2) == single + forward_flops(SHAPE, 80) + forward_flops(SHAPE, 70)


def test_mfu_does_not_count_gradients_of_frozen_weights():
    """A LoRA run used to report a third more than it did: four forward passes' worth of arithmetic are three."""
    lora = config.Lora(rank=1, targets=("q_proj",))
    adapters = 2 * (64 + 64)  # in two layers, A [64, 1] and B [1, 64]
    forward = sum(forward_flops(SHAPE, length) for length in LENGTHS)
    assert update_flops(SHAPE, lora, LENGTHS, 4) == forward + sum(
        forward_flops(SHAPE, length, adapters) + backward_flops(SHAPE, length, adapters) for length in LENGTHS
    )
    assert update_flops(SHAPE, lora, LENGTHS, 4) == pytest.approx(3 * forward, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"options": {"A": "gout", "B": "flu"}, "answer": "A"}, "Which?\nA) gout\nB) flu\n(answer A)\n\n-- before"),
        ({"answer": "44"}, "Which?\n(answer 44)\n\n-- before"),
        ({"answer": ""}, "Which?\n\n-- before"),
    ],
)
def test_a_question_is_shown_before_and_after_with_what_it_has(fields: dict[str, Any], shown: str, tmp_path: Path):
    """One without options ended in a complaint about the files."""
    (tmp_path / "report").mkdir()
    for step, total in ((0, 1.0), (3, 2.0)):
        row = {"id": "q", "question": "Which?", "response": f"{total}", "total": total, **fields}
        (tmp_path / "report" / f"held_out_{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    text = before_and_after(tmp_path, 0, 3)
    assert text.startswith(shown)
    assert "-- after, reward 2.00:\n2.0" in text
