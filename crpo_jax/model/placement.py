"""A model on a mesh: the shardings of its weights, the constraints of its forward pass, its form for the sampler."""

import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crpo_jax.model.adapters import Adapters, matrix_names
from crpo_jax.model.architecture import Weight
from crpo_jax.model.attention import AttentionKind
from crpo_jax.model.decode import SamplerWeights, sampler_buffers
from crpo_jax.model.lora import Policy, matrix_sizes
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Block, Placement, Transformer, attend_rows
from crpo_jax.parallel.layout import (
    HIDDEN_BTD,
    KV_BTKH,
    LAYOUTS,
    Q_BTNH,
    SHARDED,
    TENSOR,
    TOKENS_BT,
    Axes,
    Layout,
    kv_copies,
    weight_spec,
)
from crpo_jax.parallel.mesh import MODEL, data_size, model_size


def weight_shardings(shape: Shape, axes: Axes, mesh: Mesh) -> Transformer:
    """A NamedSharding in the place of every stacked weight."""
    return Transformer(shape, lambda weight: NamedSharding(mesh, weight_spec(axes, weight.stacked_dims, mesh, shape.k)))


def resident_bytes(shape: Shape, layout: Layout, mesh: Mesh, dtype: str, reference: bool = True) -> int:
    """What training keeps on each device between micro-batches: float32 masters, two moments and gradients, compute
    weights, and those of a `reference`."""

    def numbers(axes: Axes) -> int:
        placed = [
            (weight.stacked_dims, weight_spec(axes, weight.stacked_dims, mesh, shape.k)) for weight in shape.weights
        ]
        return sum(math.prod(NamedSharding(mesh, spec).shard_shape(shape.dims(dims))) for dims, spec in placed)

    narrow = jnp.dtype(dtype).itemsize
    frozen = numbers(layout.reference) if reference else 0
    return 16 * numbers(layout.master) + narrow * (numbers(layout.compute) + frozen)


def automatic_layout(shape: Shape, mesh: Mesh, dtype: str, memory: int | None, reference: bool = True) -> str:
    """parallel.layout=auto: zero1, which moves weights once per optimizer step, while what it keeps leaves half of a
    device's `memory` in bytes (None: not known) to activations and logits; otherwise fsdp, which moves them per
    block."""
    fits = memory is None or resident_bytes(shape, LAYOUTS["zero1"], mesh, dtype, reference) <= memory / 2
    return "zero1" if fits else "fsdp"


def training_placement(shape: Shape, mesh: Mesh, attention: AttentionKind = "xla") -> Placement:
    """The constraints of the training forward: a block's weights are gathered to TENSOR before use, rows stay split
    over the data axis, and KV heads are repeated until every model shard has its own.

    Attention in packed rows and attention kernels run on each device's rows and heads by themselves; XLA's attention of
    plain rows the compiler splits the same way.
    """
    copies = kv_copies(mesh, shape.k)

    def constrain(x: Any, spec: P) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def gather(x: Any, dims: str) -> Any:
        return constrain(x, weight_spec(TENSOR, dims, mesh, shape.k))

    def block(block: Block) -> Block:
        return Block(shape, lambda weight: gather(block[weight.name], weight.dims))

    def low_rank(adapters: Adapters) -> Adapters:
        """One layer's: without the dim l."""

        def make(dims: str, weight: Any) -> Any:
            a, b = adapters.pair(weight.name)
            return gather(a if dims[-1] == "r" else b, dims[1:])

        return Adapters(adapters.weights, adapters.scale, make)

    def ends(model: Transformer) -> Transformer:
        gathered = nnx.clone(model)
        for weight in shape.weights:
            if not weight.stacked:
                setattr(gathered, weight.name, nnx.Param(gather(model[weight.name], weight.dims)))
        gathered.blocks = model.blocks
        return gathered

    def kv_heads(x_btkh: Any) -> Any:
        return constrain(jnp.repeat(x_btkh, copies, axis=2) if copies > 1 else x_btkh, KV_BTKH)

    def attend(q: Any, k: Any, v: Any, packing: Any, scale: float, window: int) -> Any:
        local = functools.partial(attend_rows, scale=scale, window=window, kind=attention)
        if attention == "xla" and packing is None:
            return local(q, k, v, None)
        specs = (Q_BTNH, KV_BTKH, KV_BTKH, jax.tree.map(lambda _: TOKENS_BT, packing))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=Q_BTNH, check_vma=False)(q, k, v, packing)

    def split_width(total: Any, dims: str) -> Any:
        return total if shape.d % data_size(mesh) else constrain(total, weight_spec(SHARDED, dims, mesh, shape.k))

    def embedding_gradient(total_vd: Any) -> Any:
        """Each data shard sums its part of the width over all tokens: these are exchanged, and no sums."""
        return split_width(total_vd, "vd")

    def output_gradient(total: Any) -> Any:
        """Whole on each data shard while chunks add to it, and reduced once."""
        dims = "vd" if shape.tied else "dv"
        return split_width(gather(total, dims), dims)

    return Placement(
        block,
        low_rank,
        ends,
        lambda x: constrain(x, HIDDEN_BTD),
        kv_heads,
        attend,
        embedding_gradient,
        output_gradient,
    )


# --- the sampler's form -----------------------------------------------------------------------------------------------


def sampler_form(policy: Policy, mesh: Mesh, dtype: Any) -> SamplerWeights:
    """The weights as the sampler wants them: cast, one set of buffers per layer with their adapters beside them, KV
    heads repeated where there are more model shards; call under `jit`."""
    model, adapters = policy
    shape = model.shape
    copies, shards = kv_copies(mesh, shape.k), model_size(mesh)

    def in_form(value: Any, dims: str) -> Any:
        value = value.astype(dtype)
        return jnp.repeat(value, copies, axis=dims.index("k")) if copies > 1 and "k" in dims else value

    def buffer(weights: list[Weight], index: int) -> Any:
        parts = [in_form(model[weight.name][index], weight.dims) for weight in weights]
        if not weights[0].fused:
            return parts[0]
        inputs = parts[0].shape[: len(weights[0].inputs)]
        split = [part.reshape(*inputs, shards, -1) for part in parts]  # every model shard has its piece of each part
        return jnp.concatenate(split, axis=-1).reshape(*inputs, -1)

    def low_rank(adapters: Adapters, index: int) -> dict[str, Any]:
        """A and B of every weight of an adapted buffer; of one that is not adapted itself, zeros."""
        matrices: dict[str, Any] = {"adapter_scale": jnp.float32(adapters.scale)}
        for weight in adapted_weights(shape, adapters.adapted):
            for half, name in enumerate(matrix_names(weight)):
                dims = name.rsplit("_", 1)[1]
                if weight.name in adapters.adapted:
                    value = adapters.pair(weight.name)[half][index]
                else:
                    value = jnp.zeros(matrix_sizes(shape, adapters.rank, dims))
                matrices[name] = in_form(value, dims)
        return matrices

    buffers = sampler_buffers(shape)

    def layer(index: int) -> dict[str, Any]:
        named = {name: buffer(weights, index) for name, weights in buffers.items()}
        return named if adapters is None else named | low_rank(adapters, index)

    return SamplerWeights(
        {weight.name: model[weight.name].astype(dtype) for weight in shape.weights if not weight.stacked},
        tuple(layer(index) for index in range(shape.l)),
    )


def adapted_weights(shape: Shape, adapted: Collection[str]) -> list[Weight]:
    """The weights of all buffers of which a weight is adapted."""
    buffers = sampler_buffers(shape).values()
    return [weight for weights in buffers if any(each.name in adapted for each in weights) for weight in weights]


def sampler_specs(shape: Shape, mesh: Mesh, adapted: Collection[str] = ()) -> SamplerWeights:
    """The spec of every buffer of the sampler, for `shard_map`: TENSOR, with a fused buffer split along its last
    dim; and of A and B where weights of these names are `adapted`."""

    def split(dims: str) -> P:
        return P(*(getattr(TENSOR, dim, None) for dim in dims))

    def spec(weights: list[Weight]) -> P:
        if weights[0].fused:
            return P(*(None,) * len(weights[0].inputs), MODEL)
        return split(weights[0].dims) if weights[0].dims != "d" else P(None)

    layer: Any = {name: spec(weights) for name, weights in sampler_buffers(shape).items()}
    for weight in adapted_weights(shape, adapted):
        layer |= {name: split(name.rsplit("_", 1)[1]) for name in matrix_names(weight)} | {"adapter_scale": P()}
    ends: Any = {weight.name: spec([weight]) for weight in shape.weights if not weight.stacked}
    return SamplerWeights(ends, (layer,) * shape.l)


def adapted_names(shape: Shape, weights: SamplerWeights) -> frozenset[str]:
    """The weights that have adapters in this sampling form."""
    pairs = {weight.name: matrix_names(weight)[0] for weight in shape.weights if weight.inputs}
    return frozenset(name for name, a in pairs.items() if a in weights.layers[0])


@functools.cache
def to_sampler(shape: Shape, mesh: Mesh, dtype: str, adapted: frozenset[str] = frozenset()) -> Any:
    """The jitted gather of a `Policy`, of which `adapted` weights have adapters, from the training layout into the
    sampler's form, once per rollout."""
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), sampler_specs(shape, mesh, adapted))
    return jax.jit(lambda policy: sampler_form(policy, mesh, jnp.dtype(dtype)), out_shardings=placed)
