"""Meshes and layouts: every weight is placed, training is the same on all, and what cannot be split is refused."""

import importlib
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from conftest import SHAPE, leaves_by_name, mesh_of, one_micro_batch, placed, random_weights
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crpo_jax import config
from crpo_jax.errors import InputError
from crpo_jax.model.lora import Policy
from crpo_jax.model.placement import (
    automatic_layout,
    resident_bytes,
    sampler_specs,
    to_sampler,
    training_placement,
    weight_shardings,
)
from crpo_jax.model.transformer import Block, Transformer, model_shapes
from crpo_jax.parallel import layout
from crpo_jax.parallel.layout import (
    LAYOUTS,
    SHARDED,
    TENSOR,
    Axes,
    Layout,
    check_layout,
    find_layout,
    kv_copies,
    layout_warnings,
    weight_spec,
)
from crpo_jax.parallel.mesh import DATA, MODEL, data_size, make_mesh, model_size, parse_mesh
from crpo_jax.update.batches import Row, align_to_tokens, make_batch
from crpo_jax.update.losses import Batch
from crpo_jax.update.trainer import Trainer

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

NAMES = [weight.name for weight in SHAPE.weights]
TABLES = {f"{name}.{use}": axes for name, each in LAYOUTS.items() for use, axes in each._asdict().items()}
SIZES = {dim: getattr(SHAPE, dim) for dim in "dnkhfv"}


def spec_of(axes: Axes, name: str) -> P:
    """Of one layer of a weight, on a mesh that splits every KV head."""
    return weight_spec(axes, SHAPE.weight(name).dims, mesh_of(1, 1), SHAPE.k)


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
    mesh = make_mesh(text)
    assert (data_size(mesh), model_size(mesh)) == parse_mesh(text)
    assert mesh.axis_names == (DATA, MODEL)
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert set(mesh.devices.flat) == set(jax.devices())


def test_no_mesh_is_all_devices_on_the_data_axis():
    assert dict(make_mesh().shape) == {DATA: 8, MODEL: 1}


@pytest.mark.parametrize("text", ["1x1", "4x1", "16x1", "3x3"])
def test_a_mesh_that_is_not_the_devices(text: str):
    """A mesh of fewer devices would leave some idle silently."""
    data, model = parse_mesh(text)
    line = (
        f"--mesh {text}: expected data x model = the 8 cpu devices here, got {data} x {model} = {data * model}"
        f"; XLA_FLAGS=--xla_force_host_platform_device_count={data * model} gives that many on a CPU"
    )
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        make_mesh(text)


# --- axes against weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_every_layout_places_every_weight(table: str):
    """No weight without a sharding, and no dim that the axes do not know, which would be replicated silently."""
    shardings = leaves_by_name(weight_shardings(SHAPE, TABLES[table], mesh_of(4, 2)))
    assert sorted(NAMES) == sorted(leaves_by_name(model_shapes(SHAPE))) == sorted(shardings)
    assert all(isinstance(sharding, NamedSharding) for sharding in shardings.values())
    assert {dim for weight in SHAPE.weights for dim in weight.dims} == set(Axes._fields)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", TABLES)
def test_a_spec_has_an_entry_per_dim(table: str, name: str):
    """A PartitionSpec shorter than its array is silently padded, so an entry on the wrong dim would go unnoticed."""
    spec = spec_of(TABLES[table], name)
    assert len(spec) == len(SHAPE.weight(name).dims)
    used = [axis for axis in spec if axis is not None]
    assert set(used) <= {DATA, MODEL}
    assert len(used) == len(set(used))


SPLIT_OVER_MODEL = {"n", "k", "f", "v"}
"""The dims that Megatron's split divides; every other dim is whole on every model shard."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", TABLES)
def test_names_say_what_is_split(table: str, name: str):
    """The model axis divides heads, ffn and vocabulary only; the data axis divides the width of matrices only.

    A public project once had a spec in another order of dims, unnoticed because both dims had one size.
    """
    dims, spec = SHAPE.weight(name).dims, spec_of(TABLES[table], name)
    for dim, axis in zip(dims, spec, strict=True):
        assert (axis == MODEL) == (dim in SPLIT_OVER_MODEL)
        if axis == DATA:
            assert (dim, TABLES[table]) == ("d", SHARDED)
    assert (DATA in spec) == (TABLES[table] == SHARDED and "d" in dims and len(dims) > 1)


@pytest.mark.parametrize(
    ("name", "dims"),
    [(name, name.rsplit("_", 1)[1].lower()) for name in vars(layout) if re.fullmatch(r"[A-Z]+_[A-Z]+", name)],
    ids=lambda x: x,
)
def test_activation_specs_have_an_entry_per_dim(name: str, dims: str):
    spec = getattr(layout, name)
    assert len(spec) == len(dims)
    for dim, axis in zip(dims, spec, strict=True):
        assert axis == {"b": DATA, "n": MODEL, "k": MODEL, "v": MODEL}.get(dim)


def test_there_are_activation_specs():
    assert {"TOKENS_BT", "HIDDEN_BTD", "KV_BTKH", "LOGITS_BTV", "ROWS_B", "CACHE_BKSH"} <= set(vars(layout))


def test_the_built_in_layouts():
    assert LAYOUTS["zero1"] == Layout(master=SHARDED, compute=TENSOR, reference=SHARDED)
    assert LAYOUTS["fsdp"] == Layout(master=SHARDED, compute=SHARDED, reference=SHARDED)
    assert LAYOUTS["replicated"] == Layout(master=TENSOR, compute=TENSOR, reference=TENSOR)


@pytest.mark.parametrize("table", TABLES)
def test_shardings_fit_stacked_weights(mesh: Mesh, table: str):
    """The leading l of stacked weights is whole; the axes divide every other dim, KV heads by the rule below."""
    shardings = leaves_by_name(weight_shardings(SHAPE, TABLES[table], mesh))
    for weight in SHAPE.weights:
        axes = dict(zip(weight.dims, spec_of(TABLES[table], weight.name), strict=True))
        if mesh.shape[MODEL] > SHAPE.k:
            axes["k"] = None
        parts = [mesh.shape[axes[dim]] if axes.get(dim) else 1 for dim in weight.stacked_dims]
        sizes = SHAPE.dims(weight.stacked_dims)
        expected = tuple(size // part for size, part in zip(sizes, parts, strict=True))
        assert shardings[weight.name].shard_shape(sizes) == expected, weight.name


# --- training with every layout, a user's own included ----------------------------------------------------------------

OWN_LAYOUTS = """
from crpo_jax.parallel.layout import TENSOR, Axes, Layout
from crpo_jax.parallel.mesh import DATA, MODEL

FFN_OVER_DATA = Layout(
    master=Axes(n=MODEL, k=MODEL, f=DATA, v=DATA), compute=Axes(d=MODEL, f=DATA, v=DATA), reference=Axes()
)
UNKNOWN_AXIS = Layout(master=TENSOR._replace(d="rows"), compute=TENSOR, reference=TENSOR)
ONE_AXIS_TWICE = Layout(master=TENSOR, compute=TENSOR._replace(d=MODEL), reference=TENSOR)
HEADS_AND_WIDTH = Layout(master=TENSOR, compute=TENSOR, reference=TENSOR._replace(h=MODEL))
AXES = TENSOR
PLAIN_TUPLES = Layout(TENSOR, TENSOR, (None, "model"))
"""


@pytest.fixture(scope="module", autouse=True)
def own_layouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory with modules of the user's own."""
    folder = tmp_path_factory.mktemp("own_layouts")
    (folder / "my_layouts.py").write_text(OWN_LAYOUTS)
    (folder / "my_error.py").write_text('raise ValueError("no layout today\\nnor tomorrow")\n')
    (folder / "my_typo.py").write_text("def layout(:\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        importlib.invalidate_caches()
        yield
    sys.modules.pop("my_layouts", None)


EVERY_LAYOUT = (*LAYOUTS, "my_layouts:FFN_OVER_DATA")
ROWS = [Row([3, 1, 4], [1, 5, 9, 2]), Row([6], [5, 3, 5]), Row([8, 9], [7]), Row([9, 3, 2], [3, 8, 4, 6, 2])]


def train_one_step(mesh: Mesh, name: str, model: Transformer) -> tuple[Trainer, Any, Any, Any, Batch]:
    """The trainer, its state before and after a step, the gradients, and the batch with the reference's log-probs."""
    overrides = ["model.dtype=float32", "parallel.remat=false", "optimizer.learning_rate=0.01", "optimizer.eps=1e-3"]
    settings = config.load_config(None, [*overrides, f"parallel.layout={name}"], model=False)
    trainer = Trainer(SHAPE, mesh, settings, settings.optimizer, 100, loss="crpo")
    state = trainer.begin(placed(model, weight_shardings(SHAPE, find_layout(name).master, mesh)))
    micro, rng = one_micro_batch(ROWS, mesh), np.random.default_rng(0)
    advantages = np.float32(rng.normal(size=(4,)))
    sampler = align_to_tokens([np.float32(rng.normal(size=len(row.response))) for row in ROWS], micro)
    batch = make_batch(micro, np.full(4, 1 / 13, np.float32), advantages, sampler)
    ((batch,),) = trainer.with_logprobs(state, [trainer.put_batches([batch])])
    gradients, _ = trainer.gradients(state, [batch])
    updated, _ = trainer.update(jax.tree.map(lambda x: x.copy(), state), [batch])
    return trainer, state, updated, gradients, batch


def by_response(batch: Batch) -> list[np.ndarray]:
    """The reference's log-probs of every response, in the order of their tokens: shards hold them in orders of their
    own."""
    rows = [
        (tokens[:n].tolist(), values[:n])
        for tokens, values, n in zip(*map(np.asarray, (batch.tokens, batch.reference, batch.lengths)), strict=True)
        if n
    ]
    return [values for _, values in sorted(rows, key=lambda row: row[0])]


@pytest.fixture(scope="module")
def expected_step(model: Transformer) -> tuple[Any, Any, Batch]:
    """On one device: the updated state, the gradients and the batch."""
    return train_one_step(mesh_of(1, 1), "replicated", model)[2:]


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_training_is_the_same_with_every_layout(
    mesh: Mesh, name: str, model: Transformer, expected_step: tuple[Any, Any, Batch]
):
    """Masters, moments, gradients, compute weights and the reference are where the layout places them, and their values
    are those of one device."""
    axes = find_layout(name)
    check_layout(axes, mesh, SIZES)
    trainer, before, state, gradients, batch = train_one_step(mesh, name, model)
    expected_state, expected_gradients, expected_batch = expected_step

    def assert_same(tree: Any, expected: Any, axes: Axes) -> None:
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        shardings = jax.tree.leaves(weight_shardings(SHAPE, axes, mesh))
        for leaf, exact, sharding in zip(*map(jax.tree.leaves, (tree, expected)), shardings, strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            np.testing.assert_allclose(leaf, exact, rtol=1e-4, atol=1e-5 * largest)

    assert_same(trainer.weights(before).model, model, axes.compute)
    assert_same(before.frozen, model, axes.reference)
    for ours, expected in zip(by_response(batch), by_response(expected_batch), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert_same(gradients, expected_gradients, axes.master)
    assert_same(state.master, expected_state.master, axes.master)
    assert (
        max(np.abs(new - old).max() for new, old in zip(*map(jax.tree.leaves, (state.master, model)), strict=True))
        > 1e-3
    )
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    masters = 2 * jax.tree.leaves(state.master)
    assert all(moment.sharding == master.sharding for moment, master in zip(moments, masters, strict=True))


EXPECTED = "parallel.layout: expected zero1, fsdp, replicated, auto or a layout of your own as module:NAME"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("zero2", f"{EXPECTED}, got 'zero2'"),
        (
            "no_such_module:FSDP",
            f"{EXPECTED}; no_such_module:FSDP cannot be imported: "
            "ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            "my_layouts:MISSING",
            f"{EXPECTED}; my_layouts:MISSING cannot be imported: "
            "AttributeError: module 'my_layouts' has no attribute 'MISSING'",
        ),
        ("my_error:FSDP", f"{EXPECTED}; my_error:FSDP cannot be imported: ValueError: no layout today nor tomorrow"),
        (
            "my_typo:FSDP",
            f"{EXPECTED}; my_typo:FSDP cannot be imported: SyntaxError: invalid syntax (my_typo.py, line 1)",
        ),
        (":FSDP", f"{EXPECTED}; :FSDP cannot be imported: ValueError: Empty module name"),
        (
            "my_layouts:AXES",
            "parallel.layout: expected my_layouts:AXES to be a crpo_jax.parallel.layout.Layout, "
            "got Axes(d=None, n='model', k='model', h=None, f='model', v='model')",
        ),
        (
            "my_layouts:PLAIN_TUPLES",
            "parallel.layout: expected my_layouts:PLAIN_TUPLES to be a crpo_jax.parallel.layout.Layout, "
            "got Layout(master=Axes(d=None, n='model', k='model', h=None, f='model', v='model'),",
        ),
        ("my_layouts:UNKNOWN_AXIS", "parallel.layout: d: expected the mesh axis data or model, got 'rows'"),
        (
            "my_layouts:ONE_AXIS_TWICE",
            "parallel.layout: expected different mesh axes for d and n, which share a weight, got model for both",
        ),
        (
            "my_layouts:HEADS_AND_WIDTH",
            "parallel.layout: expected different mesh axes for n and h, which share a weight, got model for both",
        ),
    ],
)
def test_what_is_no_layout_is_refused_in_one_line(name: str, line: str):
    with pytest.raises(InputError) as error:
        check_layout(find_layout(name), mesh_of(2, 2), SIZES)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


# --- KV heads past their number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_axis", "kv_heads", "copies"), [(1, 2, 1), (2, 2, 1), (4, 2, 2), (8, 2, 4), (8, 1, 8), (2, 8, 1), (8, 8, 1)]
)
def test_kv_copies(model_axis: int, kv_heads: int, copies: int):
    assert kv_copies(mesh_of(1, model_axis), kv_heads) == copies


def test_kv_weights_are_whole_where_heads_are_copied():
    two, four = mesh_of(4, 2), mesh_of(2, 4)
    assert weight_spec(SHARDED, "ldkh", two, 2) == P(None, DATA, MODEL, None)
    assert weight_spec(SHARDED, "ldkh", four, 2) == P(None, DATA, None, None)
    assert weight_spec(SHARDED, "kh", four, 2) == P(None, None)
    assert weight_spec(SHARDED, "dnh", four, 2) == P(DATA, MODEL, None)


def test_every_model_shard_holds_the_kv_head_of_its_queries(mesh: Mesh, model: Transformer):
    """Query head q reads KV head q // (n / k); after copying, so it does inside each shard, heads counted locally."""
    weights = to_sampler(SHAPE, mesh, "float32")(Policy(model))
    n, k, shards = SHAPE.n, SHAPE.k, mesh.shape[MODEL]
    assert len(weights.layers) == SHAPE.l
    for layer, buffers in enumerate(weights.layers):
        for fused, names in (
            ("qkv", ("q_dnh", "k_dkh", "v_dkh")),
            ("qkv_bias", ("q_bias_nh", "k_bias_kh", "v_bias_kh")),
        ):
            q, *kv = (
                np.asarray(model[name][layer]).reshape(-1, heads, SHAPE.h)
                for name, heads in zip(names, (n, k, k), strict=True)
            )
            for shard in buffers[fused].addressable_shards:
                index, queries = list(mesh.devices.flat).index(shard.device) % shards, n // shards
                heads = np.asarray(shard.data).reshape(q.shape[0], -1, SHAPE.h)
                local = (heads.shape[1] - queries) // 2
                np.testing.assert_array_equal(heads[:, :queries], q[:, index * queries : (index + 1) * queries])
                for query in range(queries):
                    for part, whole in enumerate(kv):
                        head = heads[:, queries + part * local + query // (queries // local)]
                        np.testing.assert_array_equal(head, whole[:, (index * queries + query) // (n // k)])


def test_every_model_shard_holds_the_up_columns_of_its_gates(mesh: Mesh, model: Transformer):
    weights, columns = to_sampler(SHAPE, mesh, "float32")(Policy(model)), SHAPE.f // mesh.shape[MODEL]
    for shard in weights.layers[1]["gate_up"].addressable_shards:
        first = list(mesh.devices.flat).index(shard.device) % mesh.shape[MODEL] * columns
        for name, part in zip(("gate_df", "up_df"), np.split(np.asarray(shard.data), 2, axis=1), strict=True):
            np.testing.assert_array_equal(part, model[name][1][:, first : first + columns])


def test_the_samplers_weights_are_split_by_tensor_on_every_mesh(mesh: Mesh, model: Transformer):
    weights = to_sampler(SHAPE, mesh, "bfloat16")(Policy(model))
    for value, spec in zip(*map(jax.tree.leaves, (weights, sampler_specs(SHAPE, mesh))), strict=True):
        assert value.sharding.is_equivalent_to(NamedSharding(mesh, spec), value.ndim)
        assert value.dtype == "bfloat16"
    np.testing.assert_array_equal(weights.ends["embed_vd"], model["embed_vd"].astype("bfloat16"))
    np.testing.assert_array_equal(weights.layers[1]["down_fd"], model["down_fd"][1].astype("bfloat16"))
    assert weights.layers[1]["down_fd"].sharding.spec == weight_spec(TENSOR, "fd", mesh, SHAPE.k)


def test_training_placement_copies_kv_heads_in_blocks(mesh: Mesh):
    """Head i of the copies is head i // copies of the original: repeated, not tiled."""
    heads = np.random.default_rng(0).normal(size=(8, 3, SHAPE.k, SHAPE.h)).astype(np.float32)
    copied = jax.jit(training_placement(SHAPE, mesh).kv_heads)(heads)
    copies = max(1, mesh.shape[MODEL] // SHAPE.k)
    np.testing.assert_array_equal(copied, np.repeat(heads, copies, axis=2))


def test_training_placement_changes_no_value(mesh: Mesh, model: Transformer):
    placement = training_placement(SHAPE, mesh)
    first = Block(SHAPE, lambda weight: model[weight.name][0])
    for function, tree in ((placement.ends, model), (placement.block, first)):
        for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(jax.jit(function)(tree)), strict=True):
            np.testing.assert_array_equal(before, after)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_fits_is_accepted(mesh: Mesh, name: str):
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
                "each of 2 data shards keeps whole masters and moments, 12 bytes a parameter; "
                "parallel.layout=zero1 splits them"
            ],
        ),
    ],
)
def test_warnings_of_waste(sizes: tuple[int, int], name: str, prompts: int, rows: int, lines: list[str]):
    assert layout_warnings(LAYOUTS[name], mesh_of(*sizes), SHAPE.k, prompts, rows) == lines


def test_memory_of_training_follows_from_the_layout(mesh: Mesh):
    """fsdp splits everything; zero1 replicates its compute weights over the data axis; replicated replicates all."""
    whole = {name: resident_bytes(SHAPE, each, mesh_of(1, 1), "bfloat16") for name, each in LAYOUTS.items()}
    count = sum(leaf.size for leaf in jax.tree.leaves(model_shapes(SHAPE)))
    assert whole == dict.fromkeys(LAYOUTS, count * 20)  # 16 + 2 + 2 bytes
    split = {name: resident_bytes(SHAPE, each, mesh, "bfloat16") for name, each in LAYOUTS.items()}
    assert split["fsdp"] <= split["zero1"] <= split["replicated"] <= whole["zero1"]
    assert (split["fsdp"] < split["zero1"]) == (mesh.shape[DATA] > 1)


def test_auto_takes_the_layout_that_leaves_room():
    mesh = mesh_of(8, 1)
    needs = resident_bytes(SHAPE, LAYOUTS["zero1"], mesh, "bfloat16")
    assert automatic_layout(SHAPE, mesh, "bfloat16", None) == "zero1"
    assert automatic_layout(SHAPE, mesh, "bfloat16", 2 * needs) == "zero1"
    assert automatic_layout(SHAPE, mesh, "bfloat16", 2 * needs - 1) == "fsdp"


@pytest.mark.parametrize("name", LAYOUTS)
def test_check_layout_is_exact(name: str):
    """What it accepts can be placed and copied; what it refuses cannot. Every model axis up to 8, many head counts."""
    for m in (1, 2, 4, 8):
        mesh = mesh_of(1, m)
        for n, k in [(8, 1), (8, 2), (8, 4), (8, 8), (12, 3), (12, 6), (12, 12), (6, 2)]:
            try:
                check_layout(LAYOUTS[name], mesh, SIZES | {"n": n, "k": k})
            except InputError:
                assert n % m or (k % m and m % k)
                continue
            copies = kv_copies(mesh, k)
            assert n % m == 0
            assert (k * copies) % m == 0
            # every head is copied equally often, so the queries of shard i need only the KV heads of shard i
            assert (n // m) % (k * copies // m) == 0


def test_sizes_of_the_test_shape_are_all_different():
    """Otherwise a spec on the wrong dim could fit by chance, in every test that uses this shape."""
    assert len({getattr(SHAPE, letter) for letter in "dnkhfvl"}) == 7
    assert math.prod(SHAPE.dims("nh")) != SHAPE.d
    assert random_weights(SHAPE)["q_dnh"].shape == SHAPE.dims("ldnh")


def test_importing_the_mesh_starts_no_backend():
    """`jax.distributed.initialize` must come before the first array, so nothing may be computed at import."""
    check = "import crpo_jax.train\nfrom jax._src import xla_bridge\nassert not xla_bridge.backends_are_initialized()\n"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
