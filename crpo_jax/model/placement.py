"""A model on a mesh: the shardings of its weights, the constraints of its forward, its form for the sampler."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crpo_jax.model.attention import Implementation, causal_attention
from crpo_jax.model.decode import Layer, Weights
from crpo_jax.model.lora import Adapted, Adapters, adapter_spec, merged
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Block, Placement, Qwen2, abstract, dims_of
from crpo_jax.parallel.layout import HIDDEN_BTD, KV_BTKH, LAYOUTS, Q_BTNH, TENSOR, Layout, WeightTable, kv_copies, spec
from crpo_jax.parallel.mesh import MODEL, model_size


def weight_shardings(shape: Shape, table: WeightTable, mesh: Mesh) -> Qwen2:
    """A NamedSharding in the place of every stacked weight."""

    def make(name: str, dims: str) -> NamedSharding:
        return NamedSharding(mesh, spec(table, name, mesh, shape.k, stacked=dims[0] == "l"))

    return Qwen2(make, tied=shape.tied)


def resident_bytes(shape: Shape, layout: Layout, mesh: Mesh, dtype: str) -> int:
    """What training keeps on each device between micro-batches: float32 masters, two moments and gradients, compute and reference weights."""

    def bytes_of(table: WeightTable, width: int) -> int:
        weights, shardings = jax.tree.leaves(abstract(shape)), jax.tree.leaves(weight_shardings(shape, table, mesh))
        return sum(
            math.prod(to.shard_shape(weight.shape)) * width for weight, to in zip(weights, shardings, strict=True)
        )

    narrow = jnp.dtype(dtype).itemsize
    return bytes_of(layout.master, 16) + bytes_of(layout.compute, narrow) + bytes_of(layout.reference, narrow)


def automatic_layout(shape: Shape, mesh: Mesh, dtype: str, memory: int | None) -> str:
    """parallel.layout=auto: zero1, which moves weights once per optimizer step, while what it keeps leaves half of a device's
    `memory` in bytes (None: not known) to activations and logits; fsdp, which moves them per block, where it does not."""
    return "zero1" if memory is None or resident_bytes(shape, LAYOUTS["zero1"], mesh, dtype) <= memory / 2 else "fsdp"


def training_placement(shape: Shape, mesh: Mesh, attention: Implementation = "xla") -> Placement:
    """The constraints of the training forward: a block's weights are gathered to the tensor-parallel table before use,
    rows stay split over the data axis, and KV heads are repeated until every model shard has its own.

    An attention kernel runs on each device's rows and heads by itself; XLA's attention the compiler splits the same way.
    """
    copies = kv_copies(mesh, shape.k)

    def constrain(x: Any, to: P) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, to))

    def weights(block: Block) -> Block:
        return Block(
            lambda name, _: constrain(getattr(block, name)[...], spec(TENSOR, name, mesh, shape.k, stacked=False)),
            stacked=False,
        )

    def low_rank(adapters: Adapters) -> Adapters:
        def make(name: str, dims: str, weight: str) -> Any:
            return constrain(getattr(adapters, name)[...], adapter_spec(TENSOR, weight, dims, mesh, shape.k))

        return Adapters(make, adapters.weights, adapters.scale, stacked=False)

    def ends(model: Qwen2) -> Qwen2:
        return _with(
            model, lambda name, value: constrain(value, spec(TENSOR, name, mesh, shape.k, stacked=False)), model.blocks
        )

    def kv_heads(x_btkh: Any) -> Any:
        return constrain(jnp.repeat(x_btkh, copies, axis=2) if copies > 1 else x_btkh, KV_BTKH)

    def attend(q: Any, k: Any, v: Any) -> Any:
        if attention == "xla":
            return causal_attention(q, k, v, attention)
        local = functools.partial(causal_attention, implementation=attention)
        return jax.shard_map(local, mesh=mesh, in_specs=(Q_BTNH, KV_BTKH, KV_BTKH), out_specs=Q_BTNH, check_vma=False)(
            q, k, v
        )

    return Placement(
        block=weights,
        adapters=low_rank,
        ends=ends,
        activations=lambda x: constrain(x, HIDDEN_BTD),
        kv_heads=kv_heads,
        attend=attend,
    )


def _with(model: Qwen2, change: Any, blocks: Any) -> Qwen2:
    """The model with its embedding, last norm and output changed, and these blocks."""
    new = nnx.clone(model)
    for name in ("embed_vd", "final_norm_d") + (() if model.tied else ("unembed_dv",)):
        setattr(new, name, nnx.Param(change(name, getattr(model, name)[...])))
    new.blocks = blocks
    return new


def sampling_form(policy: Qwen2 | Adapted, shape: Shape, mesh: Mesh, dtype: Any) -> Weights:
    """The weights as the sampler wants them: adapters merged, cast, a buffer per layer, projections of one input side by side, KV
    heads repeated past their number; call under `jit`."""
    copies, shards = kv_copies(mesh, shape.k), model_size(mesh)
    model, adapters = policy if isinstance(policy, Adapted) else (policy, None)

    def beside(*parts: Any, leading: int) -> Any:
        """The parts' last dims as one, in which every model shard has its piece of each part in turn."""
        split = [part.reshape(*part.shape[:leading], shards, -1) for part in parts]
        return jnp.concatenate(split, axis=-1).reshape(*parts[0].shape[:leading], -1)

    def layer(index: int) -> Layer:
        def weight(name: str) -> Any:
            value = getattr(model.blocks, name)[index]
            if adapters is not None and name in adapters.weights:
                a, b = adapters.pair(name)
                value = merged(value, a[index], b[index], adapters.scale)
            value = value.astype(dtype)
            return (
                jnp.repeat(value, copies, axis=dims_of(name).index("k"))
                if copies > 1 and "k" in dims_of(name)
                else value
            )

        return Layer(
            attn_norm_d=weight("attn_norm_d"),
            qkv=beside(weight("q_dnh"), weight("k_dkh"), weight("v_dkh"), leading=1),
            qkv_bias=beside(weight("q_bias_nh"), weight("k_bias_kh"), weight("v_bias_kh"), leading=0),
            o_nhd=weight("o_nhd"),
            mlp_norm_d=weight("mlp_norm_d"),
            gate_up=beside(weight("gate_df"), weight("up_df"), leading=1),
            down_fd=weight("down_fd"),
        )

    return Weights(
        embed_vd=model.embed_vd[...].astype(dtype),
        layers=tuple(layer(index) for index in range(shape.l)),
        final_norm_d=model.final_norm_d[...].astype(dtype),
        unembed_dv=None if model.tied else model.unembed_dv[...].astype(dtype),
    )


def sampling_shardings(shape: Shape, mesh: Mesh, *, specs: bool = False) -> Weights:
    """The NamedSharding (or, for `shard_map`, the spec) of every weight in its sampling form: the tensor-parallel table."""

    fused = {"qkv": P(None, MODEL), "qkv_bias": P(MODEL), "gate_up": P(None, MODEL)}

    def place(name: str) -> Any:
        here = fused.get(name) or P(*getattr(TENSOR, name))
        return here if specs else NamedSharding(mesh, here)

    layer = Layer._make(map(place, Layer._fields))
    return Weights(
        place("embed_vd"), (layer,) * shape.l, place("final_norm_d"), None if shape.tied else place("unembed_dv")
    )


@functools.cache
def to_sampling(shape: Shape, mesh: Mesh, dtype: str) -> Any:
    """The jitted gather from the training layout into the sampling layout, once per rollout."""
    return jax.jit(
        lambda model: sampling_form(model, shape, mesh, jnp.dtype(dtype)),
        out_shardings=sampling_shardings(shape, mesh),
    )
