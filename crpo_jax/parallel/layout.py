"""Where every tensor is placed: a layout says which dims of the weights are split over which axis of the mesh.

Adding a layout is adding an entry to LAYOUTS, or passing one's own as `parallel.layout=module:NAME`.
"""

from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crpo_jax.errors import InputError
from crpo_jax.parallel.mesh import DATA, MODEL, data_size, model_size
from crpo_jax.user_code import import_user_object


class Axes(NamedTuple):
    """The mesh axis that each dim of a weight is split over; None keeps the dim whole on every device."""

    d: str | None = None
    n: str | None = None
    k: str | None = None
    h: str | None = None
    f: str | None = None
    v: str | None = None


TENSOR = Axes(n=MODEL, k=MODEL, f=MODEL, v=MODEL)
"""Megatron's split over the model axis, whole on every data shard: how the sampler and each block compute."""

SHARDED = TENSOR._replace(d=DATA)
"""The width of every matrix is split over the data axis as well."""


class Layout(NamedTuple):
    """How training places the float32 masters (with their moments and gradients), the compute weights between two
    optimizer steps, and the frozen reference."""

    master: Axes
    compute: Axes
    reference: Axes


LAYOUTS: Mapping[str, Layout] = {
    "zero1": Layout(master=SHARDED, compute=TENSOR, reference=SHARDED),  # weights move once per optimizer step
    "fsdp": Layout(master=SHARDED, compute=SHARDED, reference=SHARDED),  # weights move per block and micro-batch
    "replicated": Layout(master=TENSOR, compute=TENSOR, reference=TENSOR),  # only gradients move
}

# Activations and batches.
TOKENS_BT = P(DATA, None)
HIDDEN_BTD = P(DATA, None, None)
Q_BTNH = P(DATA, None, MODEL, None)
KV_BTKH = P(DATA, None, MODEL, None)
LOGITS_BTV = P(DATA, None, MODEL)
ROWS_B = P(DATA)
CACHE_BKSH = P(DATA, MODEL, None, None)


def find_layout(name: str) -> Layout:
    """The layout of a name in LAYOUTS, or a user's own as `module:NAME`, looked for in the working directory as
    well."""
    if name in LAYOUTS:
        return LAYOUTS[name]
    expected = f"parallel.layout: expected {', '.join(LAYOUTS)}, auto or a layout of your own as module:NAME"
    if ":" not in name:
        raise InputError(f"{expected}, got {name!r}")
    layout = import_user_object(name, expected)
    if not (isinstance(layout, Layout) and all(isinstance(axes, Axes) for axes in layout)):
        raise InputError(
            f"parallel.layout: expected {name} to be a crpo_jax.parallel.layout.Layout, got {layout!r:.80}"
        )
    return layout


def kv_copies(mesh: Mesh, kv_heads: int) -> int:
    """How many model shards hold a copy of each KV head: 1 until the model axis is longer than there are KV heads."""
    return max(1, model_size(mesh) // kv_heads)


def weight_spec(axes: Axes, dims: str, mesh: Mesh, kv_heads: int) -> P:
    """The spec of a weight with these dims, such as "ldnh"; layers (l) and an adapter's rank (r) are never split.

    KV heads that the model axis cannot split are whole on every shard, and so is the width of a norm, which is too
    small to be worth a collective.
    """

    def axis_of(dim: str) -> str | None:
        if (dim == "k" and kv_copies(mesh, kv_heads) > 1) or (dim == "d" and dims.strip("l") == "d"):
            return None
        return getattr(axes, dim, None)

    return P(*map(axis_of, dims))


def check_layout(layout: Layout, mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that cannot split these dims, with the reason; `sizes` gives every dim by its letter."""
    flag = f"--mesh {data_size(mesh)}x{model_size(mesh)}"
    names = {"d": "width", "n": "query heads", "k": "KV heads", "h": "head width", "f": "ffn width", "v": "vocabulary"}
    for axes in dict.fromkeys((TENSOR, *layout)):  # every layout computes in TENSOR
        for dim, axis in axes._asdict().items():
            if axis is None:
                continue
            if axis not in (DATA, MODEL):
                raise InputError(f"parallel.layout: {dim}: expected the mesh axis {DATA} or {MODEL}, got {axis!r}")
            size, parts = sizes[dim], mesh.shape[axis]
            if size % parts and not (dim == "k" and axis == MODEL and parts % size == 0):
                what = f"the {size} {names[dim]}" if dim in "nk" else f"the {names[dim]} {size}"
                what += (
                    " or is a multiple of them" if dim == "k" else "" if axes == TENSOR else " for this parallel.layout"
                )
                raise InputError(f"{flag}: expected a {axis} axis that divides {what}, got {parts}")
        for first, second in ("dn", "dk", "df", "dv", "dh", "nh", "kh"):
            axis = getattr(axes, first)
            if axis and axis == getattr(axes, second):
                expected = f"expected different mesh axes for {first} and {second}, which share a weight"
                raise InputError(f"parallel.layout: {expected}, got {axis} for both")


def layout_warnings(layout: Layout, mesh: Mesh, kv_heads: int, prompts: int, rows: int) -> list[str]:
    """What a mesh and layout that can run would waste, with the reason; `prompts` are a rollout's, `rows` a
    mini-batch's."""
    d, m, copies, warnings = data_size(mesh), model_size(mesh), kv_copies(mesh, kv_heads), []
    if copies > 1:
        warnings.append(
            f"{m} model shards keep {copies} copies of each of the {kv_heads} KV heads: "
            f"the cache does not shrink beyond {kv_heads} shards"
        )
    if rows < d:
        warnings.append(
            f"a mini-batch of {rows} responses leaves {d - rows} of {d} data shards idle in every update "
            "(crpo.mini_batch_prompts)"
        )
    if prompts < d:
        warnings.append(
            f"a rollout of {prompts} questions leaves {d - prompts} of {d} data shards idle (crpo.prompts_per_step)"
        )
    if DATA not in layout.master and d > 1:
        warnings.append(
            f"each of {d} data shards keeps whole masters and moments, 12 bytes a parameter; "
            "parallel.layout=zero1 splits them"
        )
    return warnings
