"""Meshes and layouts: what the tables say fits the weights they place, and what cannot be split is refused with the reason."""

import dataclasses
import math
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import SHAPE, mesh_of, random_weights
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from crpo_jax.errors import InputError
from crpo_jax.model.placement import (
    automatic_layout,
    resident_bytes,
    sampling_shardings,
    to_sampling,
    training_placement,
    weight_shardings,
)
from crpo_jax.model.transformer import Block, Qwen2, abstract, dims_of
from crpo_jax.parallel import layout
from crpo_jax.parallel.layout import LAYOUTS, SHARDED, TENSOR, WeightTable, check_layout, kv_copies, spec, wasteful
from crpo_jax.parallel.mesh import DATA, MODEL, data_size, make_mesh, model_size, parse_mesh

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

NAMES = [field.name for field in dataclasses.fields(WeightTable)]
TABLES = {
    f"{name}.{use}": getattr(each, use) for name, each in LAYOUTS.items() for use in ("master", "compute", "reference")
}
SIZES = {letter: getattr(SHAPE, letter) for letter in "dnkfv"}


def by_name(tree: Qwen2) -> dict[str, object]:
    """Leaves by the names of the weights they stand for."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        found[next(name for name in names if "_" in name)] = leaf
    return found


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "sizes"), [("8x1", (8, 1)), ("1x1", (1, 1)), ("16x4", (16, 4))])
def test_parse_mesh(text: str, sizes: tuple[int, int]):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "x1", "0x1", "8x0", "-1x8", "8X1", "8x1x1", " 8x1", "8x1\n", "08x1", "8.0x1", "٨x1"]
)
def test_not_a_mesh(text: str):
    with pytest.raises(InputError, match=re.escape(f"--mesh: expected DxM in devices, such as 8x1, got {text!r}")):
        parse_mesh(text)


@pytest.mark.parametrize("text", ["8x1", "4x2", "2x4", "1x8"])
def test_make_mesh(text: str):
    made = make_mesh(text)
    assert (data_size(made), model_size(made)) == parse_mesh(text)
    assert made.axis_names == (DATA, MODEL)
    assert made.axis_types == (AxisType.Auto, AxisType.Auto)
    assert set(made.devices.flat) == set(jax.devices())


def test_no_mesh_is_all_devices_on_the_data_axis():
    assert dict(make_mesh().shape) == {DATA: 8, MODEL: 1}


@pytest.mark.parametrize("text", ["1x1", "4x1", "16x1", "3x3"])
def test_a_mesh_that_is_not_the_devices(text: str):
    """Fewer devices than there are would leave some idle without a word."""
    data, model = parse_mesh(text)
    line = (
        f"--mesh {text}: expected data x model = the 8 cpu devices here, got {data} x {model} = {data * model}"
        f"; XLA_FLAGS=--xla_force_host_platform_device_count={data * model} gives that many on a CPU"
    )
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        make_mesh(text)


# --- tables against weights -------------------------------------------------------------------------------------------


def test_every_field_is_a_weight_and_every_weight_a_field():
    assert sorted(NAMES) == sorted(by_name(abstract(SHAPE)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", TABLES)
def test_a_spec_has_an_entry_per_dim(table: str, name: str):
    """A PartitionSpec shorter than its array is silently padded, so an entry on the wrong dim would go unseen."""
    placed = getattr(TABLES[table], name)
    assert len(placed) == len(dims_of(name))
    used = [axis for axis in placed if axis is not None]
    assert set(used) <= {DATA, MODEL}
    assert len(used) == len(set(used))


SPLIT_OVER_MODEL = {"n", "k", "f", "v"}
"""The dims that Megatron's split divides; every other dim is whole on every model shard."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", TABLES)
def test_names_say_what_is_split(table: str, name: str):
    """The model axis divides heads, ffn and vocabulary, and nothing else; the data axis divides the width of matrices only.

    A table entry once stood on the kernel of another dim order in a public project, unseen since both dims had one size.
    """
    dims, placed = dims_of(name), getattr(TABLES[table], name)
    for letter, axis in zip(dims, placed, strict=True):
        assert (axis == MODEL) == (letter in SPLIT_OVER_MODEL)
        if axis == DATA:
            assert (letter, TABLES[table]) == ("d", SHARDED)
    assert (DATA in placed) == (TABLES[table] is SHARDED and "d" in dims and len(dims) > 1)


@pytest.mark.parametrize(
    ("name", "dims"),
    [(name, name.rsplit("_", 1)[1].lower()) for name in vars(layout) if re.fullmatch(r"[A-Z]+_[A-Z]+", name)],
    ids=lambda x: x,
)
def test_activation_specs_have_an_entry_per_dim(name: str, dims: str):
    placed = getattr(layout, name)
    assert len(placed) == len(dims)
    for letter, axis in zip(dims, placed, strict=True):
        assert axis == {"b": DATA, "n": MODEL, "k": MODEL, "v": MODEL}.get(letter)


def test_there_are_activation_specs():
    assert {"TOKENS_BT", "HIDDEN_BTD", "KV_BTKH", "LOGITS_BTV", "ROWS_B", "CACHE_BKSH"} <= set(vars(layout))


def test_a_layout_says_what_it_promises():
    assert LAYOUTS["zero1"] == layout.Layout(master=SHARDED, compute=TENSOR, reference=SHARDED)
    assert LAYOUTS["fsdp"] == layout.Layout(master=SHARDED, compute=SHARDED, reference=SHARDED)
    assert LAYOUTS["replicated"] == layout.Layout(master=TENSOR, compute=TENSOR, reference=TENSOR)


@pytest.mark.parametrize("table", TABLES)
def test_shardings_fit_stacked_weights(mesh: Mesh, table: str):
    """The leading l of stacked weights is whole; every other dim is divided as the table says, KV heads by the rule below."""
    shardings, weights = by_name(weight_shardings(SHAPE, TABLES[table], mesh)), by_name(abstract(SHAPE))
    assert shardings.keys() == weights.keys()
    for name, weight in weights.items():
        dims = ("l" if len(weight.shape) > len(dims_of(name)) else "") + dims_of(name)
        axes = {"l": None, **dict(zip(dims_of(name), getattr(TABLES[table], name), strict=True))}
        if mesh.shape[MODEL] > SHAPE.k:
            axes |= {"k": None} if "k" in axes else {}
        expected = tuple(
            size // (mesh.shape[axes[letter]] if axes[letter] else 1)
            for letter, size in zip(dims, weight.shape, strict=True)
        )
        assert shardings[name].shard_shape(weight.shape) == expected, name


# --- KV heads past their number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_axis", "kv_heads", "copies"), [(1, 2, 1), (2, 2, 1), (4, 2, 2), (8, 2, 4), (8, 1, 8), (2, 8, 1), (8, 8, 1)]
)
def test_kv_copies(model_axis: int, kv_heads: int, copies: int):
    assert kv_copies(mesh_of(1, model_axis), kv_heads) == copies


def test_kv_weights_are_whole_where_heads_are_copied():
    two, four = mesh_of(4, 2), mesh_of(2, 4)
    assert spec(SHARDED, "k_dkh", two, 2, stacked=True) == P(None, DATA, MODEL, None)
    assert spec(SHARDED, "k_dkh", four, 2, stacked=True) == P(None, DATA, None, None)
    assert spec(SHARDED, "v_bias_kh", four, 2, stacked=False) == P(None, None)
    assert spec(SHARDED, "q_dnh", four, 2, stacked=False) == P(DATA, MODEL, None)


def test_every_model_shard_holds_the_kv_head_of_its_queries(mesh: Mesh, model: Qwen2):
    """Query head q reads KV head q // (n / k); after copying, the same must hold inside each shard, heads counted locally."""
    weights = to_sampling(SHAPE, mesh, "float32")(model)
    n, k, shards = SHAPE.n, SHAPE.k, mesh.shape[MODEL]
    assert len(weights.layers) == SHAPE.l
    for layer, of in enumerate(weights.layers):
        for fused, names in (
            ("qkv", ("q_dnh", "k_dkh", "v_dkh")),
            ("qkv_bias", ("q_bias_nh", "k_bias_kh", "v_bias_kh")),
        ):
            q, *kv = (
                np.asarray(getattr(model.blocks, name)[layer]).reshape(-1, heads, SHAPE.h)
                for name, heads in zip(names, (n, k, k), strict=True)
            )
            for shard in getattr(of, fused).addressable_shards:
                index, queries = list(mesh.devices.flat).index(shard.device) % shards, n // shards
                held = np.asarray(shard.data).reshape(q.shape[0], -1, SHAPE.h)
                local = (held.shape[1] - queries) // 2
                np.testing.assert_array_equal(held[:, :queries], q[:, index * queries : (index + 1) * queries])
                for query in range(queries):
                    for part, whole in enumerate(kv):
                        here = held[:, queries + part * local + query // (queries // local)]
                        np.testing.assert_array_equal(here, whole[:, (index * queries + query) // (n // k)])


def test_every_model_shard_holds_the_up_columns_of_its_gates(mesh: Mesh, model: Qwen2):
    weights, columns = to_sampling(SHAPE, mesh, "float32")(model), SHAPE.f // mesh.shape[MODEL]
    for shard in weights.layers[1].gate_up.addressable_shards:
        first = list(mesh.devices.flat).index(shard.device) % mesh.shape[MODEL] * columns
        for name, held in zip(("gate_df", "up_df"), np.split(np.asarray(shard.data), 2, axis=1), strict=True):
            np.testing.assert_array_equal(held, getattr(model.blocks, name)[1][:, first : first + columns])


def test_sampling_form_is_the_tensor_table_on_every_mesh(mesh: Mesh, model: Qwen2):
    weights = to_sampling(SHAPE, mesh, "bfloat16")(model)
    wanted = sampling_shardings(SHAPE, mesh)
    for value, to in zip(jax.tree.leaves(weights), jax.tree.leaves(wanted), strict=True):
        assert value.sharding.is_equivalent_to(to, value.ndim)
        assert value.dtype == "bfloat16"
    np.testing.assert_array_equal(weights.embed_vd, model.embed_vd[...].astype("bfloat16"))
    np.testing.assert_array_equal(weights.layers[1].down_fd, model.blocks.down_fd[1].astype("bfloat16"))


def test_training_placement_copies_kv_heads_in_blocks(mesh: Mesh):
    """Head i of the copies is head i // copies of the original: repeated, not tiled."""
    heads = np.random.default_rng(0).normal(size=(8, 3, SHAPE.k, SHAPE.h)).astype(np.float32)
    copied = jax.jit(training_placement(SHAPE, mesh).kv_heads)(heads)
    copies = max(1, mesh.shape[MODEL] // SHAPE.k)
    np.testing.assert_array_equal(copied, np.repeat(heads, copies, axis=2))


def test_training_placement_changes_no_value(mesh: Mesh, model: Qwen2):
    place = training_placement(SHAPE, mesh)
    ended = jax.jit(place.ends)(model)
    for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(ended), strict=True):
        np.testing.assert_array_equal(before, after)
    first = Block(lambda name, _: getattr(model.blocks, name)[0], stacked=False)
    for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(jax.jit(place.block)(first)), strict=True):
        np.testing.assert_array_equal(before, after)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_fits_is_let_through(mesh: Mesh, name: str):
    check_layout(LAYOUTS[name], mesh, SIZES)


@pytest.mark.parametrize(
    ("sizes", "changed", "line"),
    [
        ((1, 8), {"n": 12}, "--mesh 1x8: expected a model axis that divides the 12 query heads, got 8"),
        (
            (1, 4),
            {"n": 12, "k": 3},
            "--mesh 1x4: expected a model axis that divides the 3 KV heads or is a multiple of them, got 4",
        ),
        ((1, 8), {"f": 20}, "--mesh 1x8: expected a model axis that divides the ffn width 20, got 8"),
        ((2, 2), {"v": 41}, "--mesh 2x2: expected a model axis that divides the vocabulary 41, got 2"),
        (
            (8, 1),
            {"d": 12},
            "--mesh 8x1: expected a data axis that divides the width 12 for this parallel.layout, got 8",
        ),
    ],
)
def test_what_cannot_be_split(sizes: tuple[int, int], changed: dict[str, int], line: str):
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        check_layout(LAYOUTS["fsdp"], mesh_of(*sizes), SIZES | changed)


def test_a_replicated_width_need_not_be_divided():
    check_layout(LAYOUTS["replicated"], mesh_of(8, 1), SIZES | {"d": 12})
    with pytest.raises(InputError, match="divides the width 12"):
        check_layout(LAYOUTS["zero1"], mesh_of(8, 1), SIZES | {"d": 12})


@pytest.mark.parametrize(
    ("sizes", "name", "prompts", "rows", "lines"),
    [
        ((4, 2), "zero1", 8, 16, []),
        (
            (2, 4),
            "fsdp",
            2,
            2,
            ["4 model shards keep 2 copies of each of the 2 KV heads: the cache does not shrink beyond 2 shards"],
        ),
        (
            (8, 1),
            "fsdp",
            8,
            5,
            ["a mini-batch of 5 responses leaves 3 of 8 data shards idle in every update (crpo.mini_batch_prompts)"],
        ),
        ((8, 1), "zero1", 6, 8, ["a rollout of 6 questions leaves 2 of 8 data shards idle (crpo.prompts_per_step)"]),
        (
            (2, 1),
            "replicated",
            2,
            2,
            [
                "each of 2 data shards keeps masters and moments whole, 12 bytes a parameter; parallel.layout=zero1 splits them"
            ],
        ),
    ],
)
def test_what_would_be_wasted_is_said(sizes: tuple[int, int], name: str, prompts: int, rows: int, lines: list[str]):
    assert wasteful(LAYOUTS[name], mesh_of(*sizes), SIZES, prompts, rows) == lines


def test_what_training_keeps_is_counted_from_the_tables(mesh: Mesh):
    """By hand for one tensor: of q_dnh, fsdp keeps an eighth everywhere; zero1's compute copy is split over the model axis alone."""
    one = {name: resident_bytes(SHAPE, each, mesh_of(1, 1), "bfloat16") for name, each in LAYOUTS.items()}
    assert one == dict.fromkeys(
        LAYOUTS, sum(leaf.size for leaf in jax.tree.leaves(abstract(SHAPE))) * 20
    )  # 16 + 2 + 2 bytes
    here = {name: resident_bytes(SHAPE, each, mesh, "bfloat16") for name, each in LAYOUTS.items()}
    assert here["fsdp"] <= here["zero1"] <= here["replicated"] <= one["zero1"]
    assert (here["fsdp"] < here["zero1"]) == (mesh.shape[DATA] > 1)


def test_auto_takes_the_layout_that_leaves_room():
    mesh = mesh_of(8, 1)
    needs = resident_bytes(SHAPE, LAYOUTS["zero1"], mesh, "bfloat16")
    assert automatic_layout(SHAPE, mesh, "bfloat16", None) == "zero1"
    assert automatic_layout(SHAPE, mesh, "bfloat16", 2 * needs) == "zero1"
    assert automatic_layout(SHAPE, mesh, "bfloat16", 2 * needs - 1) == "fsdp"


@pytest.mark.parametrize("name", LAYOUTS)
def test_check_layout_is_exact(name: str):
    """What it lets through can be placed and copied; what it refuses cannot. Every model axis up to 8, many head counts."""
    for m in (1, 2, 4, 8):
        here = mesh_of(1, m)
        for n, k in [(8, 1), (8, 2), (8, 4), (8, 8), (12, 3), (12, 6), (12, 12), (6, 2)]:
            try:
                check_layout(LAYOUTS[name], here, SIZES | {"n": n, "k": k})
            except InputError:
                assert n % m or (k % m and m % k)
                continue
            copies = kv_copies(here, k)
            assert n % m == 0
            assert (k * copies) % m == 0
            # with every head copied the same number of times, shard i's queries need only the KV heads of shard i
            assert (n // m) % (k * copies // m) == 0


def test_sizes_of_the_test_shape_are_all_different():
    """Else a spec on the wrong dim could fit by chance, here and in every test that uses it."""
    assert len({getattr(SHAPE, letter) for letter in "dnkhfvl"}) == 7
    assert math.prod(SHAPE.dims("nh")) != SHAPE.d
    assert random_weights(SHAPE).blocks.q_dnh[...].shape == SHAPE.dims("ldnh")


def test_importing_the_mesh_starts_no_backend():
    """`jax.distributed.initialize` must come before the first array, so nothing may be computed at import."""
    check = "import crpo_jax.train\nfrom jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()\n"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
