"""Where every tensor lies: one table per layout, a tensor's dims spelled in the field's name.

A table gives each weight a PartitionSpec over its dims. A layout says which table holds the float32 masters (with their
moments and gradients), which the compute weights between optimizer steps, and which the frozen reference. Adding a
layout is adding an entry to LAYOUTS; the layout-equality tests cover it by name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crpo_jax.errors import InputError
from crpo_jax.parallel.mesh import DATA, MODEL, data_size, model_size


@dataclass(frozen=True)
class WeightTable:
    """A PartitionSpec per weight, over the dims that its name spells (stacked layers add an unsplit l in front)."""

    embed_vd: P
    attn_norm_d: P
    q_dnh: P
    q_bias_nh: P
    k_dkh: P
    k_bias_kh: P
    v_dkh: P
    v_bias_kh: P
    o_nhd: P
    mlp_norm_d: P
    gate_df: P
    up_df: P
    down_fd: P
    final_norm_d: P
    unembed_dv: P


TENSOR = WeightTable(
    embed_vd=P(MODEL, None),
    attn_norm_d=P(None),
    q_dnh=P(None, MODEL, None),
    q_bias_nh=P(MODEL, None),
    k_dkh=P(None, MODEL, None),
    k_bias_kh=P(MODEL, None),
    v_dkh=P(None, MODEL, None),
    v_bias_kh=P(MODEL, None),
    o_nhd=P(MODEL, None, None),
    mlp_norm_d=P(None),
    gate_df=P(None, MODEL),
    up_df=P(None, MODEL),
    down_fd=P(MODEL, None),
    final_norm_d=P(None),
    unembed_dv=P(None, MODEL),
)
"""Megatron's split over the model axis, whole on every data shard; what the sampler and a block's arithmetic use."""

SHARDED = dataclasses.replace(
    TENSOR,
    embed_vd=P(MODEL, DATA),
    q_dnh=P(DATA, MODEL, None),
    k_dkh=P(DATA, MODEL, None),
    v_dkh=P(DATA, MODEL, None),
    o_nhd=P(MODEL, None, DATA),
    gate_df=P(DATA, MODEL),
    up_df=P(DATA, MODEL),
    down_fd=P(MODEL, DATA),
    unembed_dv=P(DATA, MODEL),
)
"""The same with every matrix's width split over the data axis too; norms and biases are too small to be worth it."""


@dataclass(frozen=True)
class Layout:
    """Which table holds what during training."""

    master: WeightTable
    compute: WeightTable
    reference: WeightTable


LAYOUTS: Mapping[str, Layout] = {
    "zero1": Layout(master=SHARDED, compute=TENSOR, reference=SHARDED),  # weights move once per optimizer step
    "fsdp": Layout(master=SHARDED, compute=SHARDED, reference=SHARDED),  # weights move per block and micro-batch
    "replicated": Layout(master=TENSOR, compute=TENSOR, reference=TENSOR),  # nothing moves but gradients
}

# Activations and batches.
TOKENS_BT = P(DATA, None)
HIDDEN_BTD = P(DATA, None, None)
Q_BTNH = P(DATA, None, MODEL, None)
KV_BTKH = P(DATA, None, MODEL, None)
LOGITS_BTV = P(DATA, None, MODEL)
ROWS_B = P(DATA)
CACHE_BKSH = P(DATA, MODEL, None, None)


def kv_copies(mesh: Mesh, kv_heads: int) -> int:
    """How many model shards hold a copy of each KV head: 1 until the model axis is longer than there are KV heads."""
    return max(1, model_size(mesh) // kv_heads)


def spec(table: WeightTable, name: str, mesh: Mesh, kv_heads: int, stacked: bool) -> P:
    """The spec of a weight as it is stored; KV heads that cannot be split over the model axis are whole on every shard."""
    parts = list(getattr(table, name))
    if kv_copies(mesh, kv_heads) > 1:
        parts = [None if letter == "k" else part for letter, part in zip(name.rsplit("_", 1)[1], parts, strict=True)]
    return P(None, *parts) if stacked else P(*parts)


def sharding(mesh: Mesh, of: P) -> NamedSharding:
    return NamedSharding(mesh, of)


def check_layout(layout: Layout, mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that cannot split these dims, with the reason; `sizes` gives every dim by its letter."""
    m, n, k = model_size(mesh), sizes["n"], sizes["k"]
    here = f"--mesh {data_size(mesh)}x{m}"
    if n % m:
        raise InputError(f"{here}: expected a model axis that divides the {n} query heads, got {m}")
    if m % k and k % m:
        raise InputError(
            f"{here}: expected a model axis that divides the {k} KV heads or is a multiple of them, got {m}"
        )
    for letter, meaning in (("f", "ffn width"), ("v", "vocabulary")):
        if sizes[letter] % m:
            raise InputError(f"{here}: expected a model axis that divides the {meaning} {sizes[letter]}, got {m}")
    if layout.master is SHARDED and sizes["d"] % data_size(mesh):
        raise InputError(
            f"{here}: expected a data axis that divides the width {sizes['d']} for this parallel.layout, got {data_size(mesh)}"
        )


def wasteful(layout: Layout, mesh: Mesh, sizes: Mapping[str, int], prompts: int, rows: int) -> list[str]:
    """What a mesh and layout that can run would waste, with the reason; `prompts` are a rollout's, `rows` a mini-batch's."""
    d, m, k, found = data_size(mesh), model_size(mesh), sizes["k"], []
    if kv_copies(mesh, k) > 1:
        found.append(
            f"{m} model shards keep {kv_copies(mesh, k)} copies of each of the {k} KV heads: the cache does not shrink beyond {k} shards"
        )
    if rows < d:
        found.append(
            f"a mini-batch of {rows} responses leaves {d - rows} of {d} data shards idle in every update (crpo.mini_batch_prompts)"
        )
    if prompts < d:
        found.append(
            f"a rollout of {prompts} questions leaves {d - prompts} of {d} data shards idle (crpo.prompts_per_step)"
        )
    if layout.master is TENSOR and d > 1:
        found.append(
            f"each of {d} data shards keeps masters and moments whole, 12 bytes a parameter; parallel.layout=zero1 splits them"
        )
    return found
