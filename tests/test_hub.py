"""Folders in and out: the key table, the same bits after a round trip, one line for each bad folder, one tensor at a time."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from crpo_jax.config import config_folder
from crpo_jax.errors import InputError
from crpo_jax.model.huggingface import HF_KEYS, config_of, inherited, load, model_folder, save, stored_letters, tensors
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.shape import Shape, shape_of
from crpo_jax.model.transformer import Qwen2, abstract, dims_of
from crpo_jax.parallel.layout import LAYOUTS, SHARDED, TENSOR

SHAPE = Shape(d=16, n=4, k=2, h=6, f=28, v=40, l=3, tied=False, rope_theta=1e6, norm_eps=1e-6)
TIED = dataclasses.replace(SHAPE, tied=True)

Tensors = dict[str, np.ndarray]


def mesh_of(data: int, model: int) -> Mesh:
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def drawn(shape: Shape, dtype: Any = np.float32) -> Tensors:
    """Every stored tensor with values that a float conversion could lose: subnormals, signed zeros, the largest ones."""
    draw, found = np.random.default_rng(0), {}
    for tensor in tensors(shape):
        values = draw.standard_normal(tensor.sizes).astype(dtype)
        edge = ml_dtypes.finfo(dtype)
        values.reshape(-1)[:5] = [-0.0, edge.smallest_subnormal, -edge.smallest_subnormal, edge.max, edge.tiny]
        found[tensor.key] = values
    return found


def write(folder: Path, shape: Shape, stored: Tensors, shards: int = 1) -> Path:
    """A Hugging Face folder by the safetensors library's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape, "float32", {})))
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
        return folder
    listed = {key: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(stored)}
    for name in sorted(set(listed.values())):
        save_file({key: value for key, value in stored.items() if listed[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def read(folder: Path) -> Tensors:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def bits(stored: Tensors) -> dict[str, tuple[Any, bytes]]:
    return {key: (value.dtype, value.tobytes()) for key, value in stored.items()}


def ones(shape: Shape) -> Qwen2:
    return Qwen2(lambda _, dims: jnp.ones(shape.dims(dims)), tied=shape.tied)


def same_weights(one: Qwen2, two: Qwen2) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


# --- the key table ----------------------------------------------------------------------------------------------------


def test_every_weight_has_a_key_with_the_same_dims():
    model = abstract(SHAPE)
    ours = {
        name
        for owner in (model, model.blocks)
        for name in vars(owner)
        if "_" in name and name.rsplit("_", 1)[1].isalpha() and name[0] != "_"
    }
    assert ours == set(HF_KEYS)
    assert all(sorted(stored_letters(name)) == sorted(dims_of(name)) for name in HF_KEYS)


@pytest.mark.parametrize("shards", [1, 3])
def test_load_puts_each_tensor_where_it_belongs(shards: int, tmp_path: Path):
    """The transposes written out by hand for one matrix of each kind, per layer."""
    stored = drawn(SHAPE)
    shape, model = load(str(write(tmp_path, SHAPE, stored, shards)), mesh_of(1, 1), TENSOR)
    assert shape == SHAPE
    assert jax.tree.structure(model) == jax.tree.structure(abstract(SHAPE))
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(abstract(SHAPE)), strict=True)
    assert all((weight.shape, weight.dtype) == (wanted.shape, wanted.dtype) for weight, wanted in pairs)
    np.testing.assert_array_equal(model.embed_vd[...], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.unembed_dv[...], stored["lm_head.weight"].T)
    blocks: Any = model.blocks
    for layer in range(SHAPE.l):
        here = f"model.layers.{layer}."
        np.testing.assert_array_equal(blocks.k_dkh[layer], stored[here + "self_attn.k_proj.weight"].T.reshape(16, 2, 6))
        np.testing.assert_array_equal(blocks.v_bias_kh[layer], stored[here + "self_attn.v_proj.bias"].reshape(2, 6))
        np.testing.assert_array_equal(blocks.o_nhd[layer], stored[here + "self_attn.o_proj.weight"].T.reshape(4, 6, 16))
        np.testing.assert_array_equal(blocks.down_fd[layer], stored[here + "mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(blocks.mlp_norm_d[layer], stored[here + "post_attention_layernorm.weight"])


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "max_shard_bytes"), [(SHAPE, 5_000_000_000), (TIED, 9_000)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_then_export_gives_the_same_bits(shape: Shape, max_shard_bytes: int, dtype: Any, tmp_path: Path):
    stored = drawn(shape, jnp.dtype(dtype))
    _, model = load(str(write(tmp_path / "in", shape, stored)), mesh_of(1, 1), TENSOR)
    assert model.embed_vd[...].dtype == jnp.float32
    save(model, shape, tmp_path / "out", dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert bits(read(tmp_path / "out")) == bits(stored)
    again_shape, again = load(str(tmp_path / "out"), mesh_of(1, 1), TENSOR)
    assert again_shape == shape
    assert same_weights(again, model)


def test_float16_folders_are_widened(tmp_path: Path):
    stored = drawn(TIED, np.float16)
    _, model = load(str(write(tmp_path, TIED, stored)), mesh_of(1, 1), TENSOR)
    np.testing.assert_array_equal(model.embed_vd[...], stored["model.embed_tokens.weight"].astype(np.float32))


def test_load_converts_on_request(tmp_path: Path):
    stored = drawn(TIED)
    _, model = load(str(write(tmp_path, TIED, stored)), mesh_of(1, 1), TENSOR, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(model.final_norm_d[...], stored["model.norm.weight"].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("data", "model_axis", "table"), [(4, 2, LAYOUTS["zero1"].master), (2, 4, SHARDED), (4, 2, TENSOR)]
)
def test_a_mesh_of_eight_holds_and_exports_the_same_weights(data: int, model_axis: int, table: Any, tmp_path: Path):
    """2x4 has more model shards than KV heads, which are then whole on each of them."""
    stored, mesh = drawn(SHAPE), mesh_of(data, model_axis)
    folder = write(tmp_path / "in", SHAPE, stored)
    _, one = load(str(folder), mesh_of(1, 1), TENSOR)
    _, eight = load(str(folder), mesh, table)
    assert same_weights(one, eight)
    pairs = zip(jax.tree.leaves(eight), jax.tree.leaves(weight_shardings(SHAPE, table, mesh)), strict=True)
    assert all(weight.sharding == wanted for weight, wanted in pairs)
    save(eight, SHAPE, tmp_path / "out", dtype="float32")
    assert bits(read(tmp_path / "out")) == bits(stored)


def test_host_memory_is_one_tensor_not_the_model(tmp_path: Path):
    """Python's own allocations (numpy's and the safetensors library's are among them) in `load` and `save`, at their highest.

    A tensor may stand twice for a moment, whole and in pieces for its devices.
    """
    shape = Shape(d=256, n=4, k=2, h=64, f=1024, v=1280, l=8, tied=True, rope_theta=1e4, norm_eps=1e-6)
    stored = drawn(shape)
    whole, largest = sum(value.nbytes for value in stored.values()), max(value.nbytes for value in stored.values())
    folder = write(tmp_path / "in", shape, stored, shards=2)
    del stored
    mesh = mesh_of(4, 2)
    load(str(folder), mesh, SHARDED)  # compiles, whose memory is not meant here

    def peak(function: Callable[[], Any]) -> tuple[Any, int]:
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            return function(), tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()

    (_, model), loading = peak(lambda: load(str(folder), mesh, SHARDED))
    _, saving = peak(lambda: save(model, shape, tmp_path / "out", dtype="float32", max_shard_bytes=whole // 2))
    print(f"model {whole:,} bytes, largest tensor {largest:,}; peak on the host: load {loading:,}, save {saving:,}")
    assert whole > 10 * largest
    assert largest <= loading < 2.5 * largest
    assert saving < 2.5 * largest


# --- what is accepted with a word, what is refused --------------------------------------------------------------------


def test_tied_folder_may_repeat_its_embedding(tmp_path: Path):
    stored = drawn(TIED)
    head = {"lm_head.weight": stored["model.embed_tokens.weight"].copy()}
    _, plain = load(str(write(tmp_path / "plain", TIED, stored)), mesh_of(1, 1), TENSOR)
    _, repeated = load(str(write(tmp_path / "repeated", TIED, stored | head)), mesh_of(1, 1), TENSOR)
    assert repeated.tied
    assert same_weights(plain, repeated)
    head["lm_head.weight"][-1, -1] += 1
    with pytest.raises(
        InputError, match=r"lm_head\.weight: expected no such key, or the same values as model\.embed_tokens\.weight"
    ):
        load(str(write(tmp_path / "other", TIED, stored | head)), mesh_of(1, 1), TENSOR)


def test_old_rotary_buffers_are_ignored_visibly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for layer in range(3)}
    load(str(write(tmp_path, TIED, drawn(TIED) | old)), mesh_of(1, 1), TENSOR)
    assert (
        "model.layers.0.self_attn.rotary_emb.inv_freq: ignored (3 such keys), rope_theta=1e+06"
        in capsys.readouterr().err
    )


def without(*keys: str) -> Callable[[Path], None]:
    return lambda folder: save_file(
        {key: value for key, value in drawn(SHAPE).items() if key not in keys}, folder / "model.safetensors"
    )


def with_changed(**changed: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save_file(drawn(SHAPE) | changed, folder / "model.safetensors")


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])


def git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6171926992\n"
    )


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def indexed(change: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write(folder, SHAPE, drawn(SHAPE), shards=2)
        index = folder / "model.safetensors.index.json"
        listed = json.loads(index.read_text())["weight_map"]
        new = change(folder, listed)
        index.write_text(json.dumps({"weight_map": listed if new is None else new}))

    return apply


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, GATE, UP = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"

BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (without(GATE), f"model.safetensors: {GATE}: missing; expected shape [28, 16]"),
    "two missing": (
        without(GATE, UP),
        f"model.safetensors: {GATE}: missing; expected shape [28, 16] (1 more are missing)",
    ),
    "no output": (
        without("lm_head.weight"),
        "model.safetensors: lm_head.weight: missing; expected shape [40, 16], since config.json does not set tie_word_embeddings",
    ),
    "extra": (
        with_changed(**{"model.layers.3.mlp.up_proj.weight": np.ones((28, 16), np.float32)}),
        "model.safetensors: model.layers.3.mlp.up_proj.weight: extra; expected no such key in this 3-layer Qwen2, got shape [28, 16]",
    ),
    "a bias that Qwen2 lacks": (
        with_changed(**{"model.layers.0.self_attn.o_proj.bias": np.ones(16, np.float32)}),
        "model.safetensors: model.layers.0.self_attn.o_proj.bias: extra; expected no such key in this 3-layer Qwen2, got shape [16]",
    ),
    "mis-shaped": (
        with_changed(**{GATE: np.ones((16, 28), np.float32)}),
        f"model.safetensors: {GATE}: expected shape [28, 16], got [16, 28]",
    ),
    "quantized": (
        with_changed(**{GATE: np.ones((28, 16), np.int8)}),
        f"model.safetensors: {GATE}: expected F32, BF16, F16 (weights that are not quantized), got I8",
    ),
    "cut short": (cut_short, "model.safetensors: expected a whole safetensors file, got "),
    "empty": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors: expected a whole safetensors file, got 0 bytes: ",
    ),
    "Git LFS pointer": (git_lfs_pointer, "model.safetensors: expected a whole safetensors file, got 73 bytes: "),
    "pickle": (
        only_a_pickle,
        ": expected model.safetensors or model.safetensors.index.json, got only pytorch_model.bin; a pickle can run code when it is read: "
        "write safetensors with transformers' save_pretrained",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ": expected model.safetensors or model.safetensors.index.json, got neither",
    ),
    "an adapter": (
        lambda folder: (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
        ": expected model.safetensors or model.safetensors.index.json, got only adapter_model.safetensors",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: No such file or directory"),
    "a shard that is not there": (
        indexed(lambda folder, _: (folder / SECOND).unlink()),
        f"model.safetensors.index.json: model.layers.0.input_layernorm.weight: expected in {SECOND}, which is not in this folder",
    ),
    "a shard cut short": (
        indexed(lambda folder, _: os.truncate(folder / SECOND, 5_000)),
        f"{SECOND}: expected a whole safetensors file, got ",
    ),
    "a shard outside the folder": (
        indexed(lambda _, listed: listed | {NORM: "../model.safetensors"}),
        f"model.safetensors.index.json: {NORM}: expected in ../model.safetensors, which is not in this folder",
    ),
    "a key in another shard than listed": (
        indexed(lambda _, listed: listed | {NORM: SECOND if listed[NORM] == FIRST else FIRST}),
        f"{FIRST}: {NORM}: missing; model.safetensors.index.json expects it here",
    ),
    "a key that the index lacks": (
        indexed(lambda _, listed: {key: name for key, name in listed.items() if key != GATE}),
        f": {GATE}: extra; model.safetensors.index.json does not list it here",
    ),
    "an index of another form": (
        indexed(lambda _, __: ["model.safetensors"]),
        "model.safetensors.index.json: weight_map: expected a mapping of keys to file names, got ['model.safetensors']",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(name: str, tmp_path: Path):
    damage, line = BAD[name]
    damage(write(tmp_path, SHAPE, drawn(SHAPE)))
    with pytest.raises(InputError) as error:
        load(str(tmp_path), mesh_of(1, 1), TENSOR)
    assert line in str(error.value)
    assert str(error.value).startswith((str(tmp_path), f"model.path: {tmp_path}"))
    assert "\n" not in str(error.value)


def test_index_that_is_not_json(tmp_path: Path):
    write(tmp_path, SHAPE, drawn(SHAPE), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: expected JSON, got: "):
        load(str(tmp_path), mesh_of(1, 1), TENSOR)


# --- names of models --------------------------------------------------------------------------------------------------


def test_model_folder_takes_folders_and_refuses_what_is_neither(tmp_path: Path):
    assert model_folder(str(tmp_path)) == tmp_path
    for path in ("", str(tmp_path / "none"), "Qwen2.5-3B", "./a/b", "a/b/c", "a b/c"):
        with pytest.raises(
            InputError,
            match=re.escape(f"model.path: expected a folder, or a hub id such as Qwen/Qwen2.5-3B, got {path!r}"),
        ):
            model_folder(path)


def test_hub_ids_come_from_the_cache_or_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as error:
        load("someone/no-such-model", mesh_of(1, 1), TENSOR)
    assert str(error.value).startswith(
        "model.path: someone/no-such-model: no such folder here, and the hub did not give it: "
    )
    assert "\n" not in str(error.value)

    kept = tmp_path / "models--someone--a-model"
    snapshot = write(kept / "snapshots" / ("0" * 40), TIED, drawn(TIED))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    assert model_folder("someone/a-model").resolve() == snapshot.resolve()
    assert load("someone/a-model", mesh_of(1, 1), TENSOR)[0] == TIED


# --- the folder that is written ---------------------------------------------------------------------------------------


def test_config_round_trip():
    assert shape_of(config_of(SHAPE, "float32", {})) == SHAPE
    square = dataclasses.replace(SHAPE, h=4)
    assert "head_dim" not in config_of(square, "float32", {})
    assert shape_of(config_of(square, "bfloat16", {"eos_token_id": 3})) == square


def test_shards_and_their_index(tmp_path: Path):
    model = ones(SHAPE)
    save(model, SHAPE, tmp_path / "out", dtype="bfloat16", max_shard_bytes=3_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert index["weight_map"].keys() == {tensor.key for tensor in tensors(SHAPE)}
    assert index["metadata"]["total_size"] == sum(leaf.size for leaf in jax.tree.leaves(model)) * 2
    for file in files:
        with safe_open(file, framework="numpy") as source:
            assert source.metadata() == {"format": "pt"}
            keys = source.offset_keys()
            assert keys == [key for key, name in index["weight_map"].items() if name == file.name]
            assert sum(source.get_tensor(key).nbytes for key in keys) <= 3_000 or len(keys) == 1
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_tokenizer_files_and_token_ids(tmp_path: Path):
    """Without generation settings the tokenizer says which tokens end a text; with them they are written as they are."""
    tokenizer, model = config_folder() / "tiny_tokenizer", ones(TIED)
    save(model, TIED, tmp_path / "one", dtype="float32", tokenizer_folder=tokenizer)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tokenizer / file).read_bytes()
    ids = {"eos_token_id": 1279, "pad_token_id": 1277}
    assert json.loads((tmp_path / "one" / "generation_config.json").read_text()) == ids
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["eos_token_id"], config.get("pad_token_id"), config["torch_dtype"]) == (1279, None, "float32")
    given = {"eos_token_id": [5, 6], "bos_token_id": 7, "temperature": 0.6}
    save(model, TIED, tmp_path / "two", dtype="float32", tokenizer_folder=tokenizer, generation=given)
    assert json.loads((tmp_path / "two" / "generation_config.json").read_text()) == given
    assert json.loads((tmp_path / "two" / "config.json").read_text())["eos_token_id"] == [5, 6]
    with pytest.raises(InputError, match=r"expected a folder with a tokenizer\.json"):
        save(model, TIED, tmp_path / "three", dtype="float32", tokenizer_folder=tmp_path, generation={})
    assert not (tmp_path / "three").exists()


def test_save_never_overwrites_and_leaves_no_half_folder(tmp_path: Path):
    model = ones(TIED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(
            InputError, match=f"{name}: expected a new or empty folder, got one that exists; nothing was written"
        ):
            save(model, TIED, tmp_path / name, dtype="float32")
    with pytest.raises(InputError, match="inside: "):
        save(model, TIED, tmp_path / "file" / "inside", dtype="float32")
    with pytest.raises(AttributeError):  # stopped in the middle: a tied model has no output matrix
        save(model, SHAPE, tmp_path / "half", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]

    (tmp_path / "new").mkdir()
    (tmp_path / ".new.unfinished").mkdir()
    (tmp_path / ".new.unfinished" / "left.safetensors").write_text("by a process that was killed")
    save(model, TIED, tmp_path / "new", dtype="float32")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "new"]


def test_what_a_folder_says_of_itself_is_passed_on(tmp_path: Path):
    said = {"eos_token_id": [5, 6], "temperature": 0.7, "do_sample": True}
    save(ones(TIED), TIED, tmp_path / "start", dtype="float32", generation=said, max_position_embeddings=131072)
    save(ones(TIED), TIED, tmp_path / "tuned", dtype="float32", **inherited(tmp_path / "start"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "tuned" / name).read_text() == (tmp_path / "start" / name).read_text()
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["max_position_embeddings"] == 131072


# --- several processes ------------------------------------------------------------------------------------------------

PROCESS = """
    import os
    import sys
    import jax
    from crpo_jax.config import InputError
    from crpo_jax.model.huggingface import load, save
    from crpo_jax.parallel.layout import LAYOUTS
    from crpo_jax.parallel.mesh import make_mesh

    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 2, int(os.environ["JAX_PROCESS_ID"]))
    source, target = sys.argv[1:]
    assert (jax.process_count(), len(jax.local_devices()), len(jax.devices())) == (2, 4, 8)
    shape, model = load(source, make_mesh("4x2"), LAYOUTS["zero1"].master)
    assert not model.blocks.q_dnh[...].is_fully_addressable
    save(model, shape, target, dtype="float32")
    try:
        save(model, shape, target, dtype="float32")
    except InputError as error:
        print("refused:", error)
    assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_two_processes_load_and_save_together(tmp_path: Path):
    """Each holds half of the devices, reads the folder by itself and takes part in every gather; one of them writes."""
    stored = drawn(SHAPE)
    folder = write(tmp_path / "in", SHAPE, stored, shards=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(folder), str(tmp_path / "out")]
    shared = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    shared.pop("JAX_NUM_CPU_DEVICES", None)
    both = [
        subprocess.Popen(
            command,
            env=shared | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for process, text in zip(both, said, strict=True):
        assert process.returncode == 0, text
        assert "refused:" in text
    assert bits(read(tmp_path / "out")) == bits(stored)
