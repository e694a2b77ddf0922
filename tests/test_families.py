"""Every family of models on every mesh and layout: the same samples, losses and gradients as on one device."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from conftest import SHAPE, mesh_of, one_micro_batch, placed, random_weights
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.config import replaced
from crpo_jax.model.architecture import ARCHITECTURES
from crpo_jax.model.lora import Policy
from crpo_jax.model.placement import to_sampler
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape
from crpo_jax.rollout.draw import Sampling
from crpo_jax.rollout.engine import Engine
from crpo_jax.update.batches import Row, align_to_tokens, make_batch
from crpo_jax.update.losses import Batch
from crpo_jax.update.trainer import Trainer

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

LLAMA3 = Rope(1e4, "llama3", factor=4.0, low=1.0, high=4.0, original_context=16)
FAMILIES: dict[str, Shape] = {
    "qwen3": dataclasses.replace(SHAPE, model_type="qwen3"),
    "llama": dataclasses.replace(SHAPE, model_type="llama", rope=LLAMA3),
    "mistral": dataclasses.replace(SHAPE, model_type="mistral", window=6, layers_windowed=(True,) * SHAPE.l),
    "gemma3_text": dataclasses.replace(
        SHAPE,
        model_type="gemma3_text",
        tied=True,
        rope=Rope(1e6, "linear", 8.0),
        window=6,
        window_rope=Rope(1e4),
        layers_windowed=(True, False, True),
        score_width=10,
    ),
}
"""Qwen2 is what all other tests use."""

RUNS = {
    "qwen3": [("8x1", "fsdp"), ("2x4", "zero1")],
    "llama": [("4x2", "zero1")],
    "mistral": [("2x4", "fsdp")],
    "gemma3_text": [("4x2", "fsdp"), ("8x1", "zero1"), ("2x4", "fsdp")],
}
"""Meshes and layouts by family; the axes themselves, and both layouts on every mesh, are tested with Qwen2."""

SETTINGS = config.load_config(
    None,
    ["model.dtype=float32", "parallel.remat=false", "parallel.logprob_chunk=64", "parallel.micro_batch_tokens=512"],
    model=False,
)


def meshed(text: str) -> Mesh:
    data, model = map(int, text.split("x"))
    return mesh_of(data, model)


def crpo_batch(shape: Shape, mesh: Mesh) -> Batch:
    """Eight rows longer than the window, two to a prompt, with log-probs of other policies."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(shape.v, size=p).tolist() for p in (4, 7, 9, 11)]
    rows = [
        Row(prompt, rng.integers(shape.v, size=20 - len(prompt) - i).tolist()) for prompt in prompts for i in (0, 1)
    ]
    micro = one_micro_batch(rows, mesh)
    logprobs = align_to_tokens([np.float32(rng.normal(size=len(row.response)) * 0.1 - 3) for row in rows], micro)
    batch = make_batch(micro, np.full(8, 1 / 96, np.float32), np.float32(rng.normal(size=8)), logprobs)
    return batch._replace(reference=logprobs, old=logprobs)


def gradients(shape: Shape, mesh: Mesh, layout: str) -> tuple[list[np.ndarray], dict[str, float]]:
    settings = replaced(SETTINGS, {"parallel.layout": layout})
    trainer = Trainer(shape, mesh, settings, settings.optimizer, 10, loss="crpo")
    state = trainer.begin(placed(random_weights(shape), trainer.shardings.master))
    summed, metrics = trainer.gradients(state, trainer.put_batches([crpo_batch(shape, mesh)]))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(summed)], {name: float(x) for name, x in metrics.items()}


def samples(shape: Shape, mesh: Mesh) -> list[list[int]]:
    """Groups whose prompts are shorter and longer than the window; rows end at different lengths."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(shape.v, size=length).tolist() for length in (3, 15, 8, 5)]
    engine = Engine(shape, mesh, Sampling(0.9, stop_ids=(0, 7)), 40, slots=8, chunk=8)
    weights: Any = to_sampler(shape, mesh, "float32")(Policy(random_weights(shape)))
    groups = engine.generate(weights, prompts, key=jax.random.key(2), group=2)
    return [response.tokens.tolist() for group in groups for response in group]


def test_every_family_is_tested():
    assert FAMILIES.keys() == RUNS.keys() == ARCHITECTURES.keys() - {"qwen2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same_on_every_mesh_and_layout(family: str):
    shape = FAMILIES[family]
    expected, expected_metrics = gradients(shape, mesh_of(1, 1), "replicated")
    scale = max(np.abs(leaf).max() for leaf in expected)
    assert all(np.abs(leaf).max() > 1e-5 * scale for leaf in expected), "a weight that does not matter"
    for mesh, layout in RUNS[family]:
        ours, metrics = gradients(shape, meshed(mesh), layout)
        for leaf, reference in zip(ours, expected, strict=True):
            np.testing.assert_allclose(leaf, reference, rtol=2e-4, atol=2e-6 * scale)
        assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_the_same_on_every_mesh(family: str):
    shape = FAMILIES[family]
    expected = samples(shape, mesh_of(1, 1))
    assert len({len(tokens) for tokens in expected}) > 2
    for mesh in dict.fromkeys(mesh for mesh, _ in RUNS[family]):
        assert samples(shape, meshed(mesh)) == expected
