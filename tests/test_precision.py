"""Whoever asks for float32 gets it on every platform: the precision that lowered programs ask of their products."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import SHAPE, mesh_of

from crpo_jax import config
from crpo_jax.model.attention import causal_attention
from crpo_jax.model.decode import Cache, Shard, decode, prefill
from crpo_jax.model.lora import Policy, merged_weight, trained_shapes
from crpo_jax.model.placement import to_sampler
from crpo_jax.model.transformer import model_shapes
from crpo_jax.update.losses import Batch
from crpo_jax.update.trainer import Trainer

LORA = config.Lora(rank=4)


def product_precisions(lowered: Any) -> list[str]:
    """The precision of each product of a lowered program: DEFAULT or HIGHEST."""
    products = re.findall(r"stablehlo\.dot_general.*", lowered.as_text())
    assert products
    return [(re.search(r"precision = \[(\w+), \w+\]", line) or ["", "DEFAULT"])[1] for line in products]


def abstract(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def lowered_programs(dtype: str) -> dict[str, Any]:
    mesh, b, t = mesh_of(1, 1), 2, 8
    settings = config.load_config(
        None, [f"model.dtype={dtype}", "optimizer.algorithm=muon", "parallel.logprob_chunk=4"], model=False
    )
    programs: dict[str, Any] = {}
    tokens, rows = jax.ShapeDtypeStruct((b, t), jnp.int32), jax.ShapeDtypeStruct((b,), jnp.int32)
    numbers, row_numbers = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (tokens, rows))
    of_packed = dict.fromkeys(("packed_tokens", "targets", "positions", "sequences", "prompts"), tokens)
    batch: Any = Batch(tokens, rows, row_numbers, row_numbers, numbers, numbers, numbers, starts=rows, **of_packed)
    model = abstract(model_shapes(SHAPE), dtype)
    for name, lora in (("every weight", config.Lora(rank=0)), ("adapters", LORA)):
        trainer = Trainer(SHAPE, mesh, settings, settings.optimizer, 10, loss="crpo", lora=lora)
        adapters = abstract(trained_shapes(SHAPE, lora), dtype) if lora.rank else None
        gradients, metrics = jax.eval_shape(trainer.zero)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        programs[f"accumulate, {name}"] = trainer.accumulate.lower(
            gradients, metrics, Policy(model, adapters), batch, scalar
        )
        programs[f"logprobs, {name}"] = trainer.logprobs.lower(Policy(model, adapters), batch)
        programs[f"optimizer step, {name}"] = trainer.apply.lower(trainer.abstract_state(), gradients, metrics)
    weights = jax.eval_shape(to_sampler(SHAPE, mesh, dtype), Policy(model))
    programs["prefill"] = jax.jit(
        lambda weights, tokens, lengths: prefill(weights, tokens, lengths, SHAPE, Shard(None), "xla")
    ).lower(weights, tokens, rows)
    cache = [Cache(*(jax.ShapeDtypeStruct((b, SHAPE.k, t, SHAPE.h), dtype) for _ in range(4)))] * SHAPE.l
    programs["decode"] = jax.jit(
        lambda weights, tokens, lengths, cache: decode(
            weights, tokens, lengths, lengths, jnp.int32(1), cache, SHAPE, Shard(None)
        )
    ).lower(weights, rows, rows, cache)
    return programs


def test_every_product_of_float32_is_float32():
    programs = lowered_programs("float32")
    for name, lowered in programs.items():
        assert set(product_precisions(lowered)) == {"HIGHEST"}, name


def test_products_of_a_bfloat16_run_are_as_fast_as_the_platform_makes_them():
    programs = lowered_programs("bfloat16")
    for name, lowered in programs.items():
        assert set(product_precisions(lowered)) == {"DEFAULT"}, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_merged_in_float32(dtype: str):
    """Whatever the model's type: a change of the weight is small beside it."""
    weight, a, b = (jax.ShapeDtypeStruct(sizes, dtype) for sizes in ((16, 8, 6), (16, 4), (4, 8, 6)))
    lowered = jax.jit(lambda *of: merged_weight(*of, 2.0)).lower(weight, a, b)
    assert product_precisions(lowered) == ["HIGHEST"]


def test_the_backward_pass_of_attention_inherits_its_precision():
    q, k = jax.ShapeDtypeStruct((1, 8, 4, 6), jnp.float32), jax.ShapeDtypeStruct((1, 8, 2, 6), jnp.float32)
    backward = jax.jit(jax.grad(lambda *qkv: jnp.sum(causal_attention(*qkv, "xla")), argnums=(0, 1, 2)))
    assert set(product_precisions(backward.lower(q, k, k))) == {"HIGHEST"}
