"""Model folders: declared keys, the same bits after a round trip, one line per bad folder, memory of one tensor."""

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
from conftest import leaves_by_name, mesh_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from crpo_jax.config import config_folder
from crpo_jax.errors import InputError
from crpo_jax.model.config_json import shape_of
from crpo_jax.model.huggingface import (
    config_of,
    inherited_settings,
    load_model,
    model_folder,
    model_tensors,
    save_model,
)
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Transformer, model_shapes
from crpo_jax.parallel.layout import LAYOUTS, SHARDED, TENSOR, Axes

SHAPE = Shape(d=16, n=4, k=2, h=6, f=28, v=40, l=3, tied=False, rope=Rope(1e6), norm_eps=1e-6)
TIED = dataclasses.replace(SHAPE, tied=True)

Tensors = dict[str, np.ndarray]


def random_tensors(shape: Shape, dtype: Any = np.float32) -> Tensors:
    """Every stored tensor, with values that a conversion could lose: subnormals, signed zeros, the largest ones."""
    rng, stored = np.random.default_rng(0), {}
    for tensor in model_tensors(shape):
        values = rng.standard_normal(tensor.sizes).astype(dtype)
        edge = ml_dtypes.finfo(dtype)
        values.reshape(-1)[:5] = [-0.0, edge.smallest_subnormal, -edge.smallest_subnormal, edge.max, edge.tiny]
        stored[tensor.key] = values
    return stored


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


def load(folder: Path) -> Transformer:
    return load_model(str(folder), mesh_of(1, 1), TENSOR)


def ones(shape: Shape) -> Transformer:
    return Transformer(shape, lambda weight: jnp.ones(shape.dims(weight.stacked_dims)))


def same_bits(first: Transformer, second: Transformer) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


# --- declared keys ----------------------------------------------------------------------------------------------------


def test_every_weight_has_a_key_with_the_same_dims():
    assert leaves_by_name(model_shapes(SHAPE)).keys() == {weight.name for weight in SHAPE.weights}
    assert len({weight.key for weight in SHAPE.weights}) == len(SHAPE.weights)
    assert all(sorted(weight.stored.replace(" ", "")) == sorted(weight.dims) for weight in SHAPE.weights)


@pytest.mark.parametrize("shards", [1, 3])
def test_load_puts_each_tensor_where_it_belongs(shards: int, tmp_path: Path):
    """The transposes written out by hand for one matrix of each kind, per layer."""
    stored = random_tensors(SHAPE)
    model = load(write(tmp_path, SHAPE, stored, shards))
    assert model.shape == SHAPE
    assert jax.tree.structure(model) == jax.tree.structure(model_shapes(SHAPE))
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(model_shapes(SHAPE)), strict=True)
    assert all((weight.shape, weight.dtype) == (expected.shape, expected.dtype) for weight, expected in pairs)
    np.testing.assert_array_equal(model["embed_vd"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model["unembed_dv"], stored["lm_head.weight"].T)
    for layer in range(SHAPE.l):
        block, attention = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
        expected = {
            "k_dkh": stored[attention + "k_proj.weight"].T.reshape(16, 2, 6),
            "v_bias_kh": stored[attention + "v_proj.bias"].reshape(2, 6),
            "o_nhd": stored[attention + "o_proj.weight"].T.reshape(4, 6, 16),
            "down_fd": stored[block + "mlp.down_proj.weight"].T,
            "mlp_norm_d": stored[block + "post_attention_layernorm.weight"],
        }
        for name, values in expected.items():
            np.testing.assert_array_equal(model[name][layer], values)


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "max_shard_bytes"), [(SHAPE, 5_000_000_000), (TIED, 9_000)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_then_export_gives_the_same_bits(shape: Shape, max_shard_bytes: int, dtype: Any, tmp_path: Path):
    stored = random_tensors(shape, jnp.dtype(dtype))
    model = load(write(tmp_path / "in", shape, stored))
    assert model["embed_vd"].dtype == jnp.float32
    save_model(model, tmp_path / "out", dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert bits(read(tmp_path / "out")) == bits(stored)
    reloaded = load(tmp_path / "out")
    assert reloaded.shape == shape
    assert same_bits(reloaded, model)


def test_float16_folders_are_widened(tmp_path: Path):
    stored = random_tensors(TIED, np.float16)
    model = load(write(tmp_path, TIED, stored))
    np.testing.assert_array_equal(model["embed_vd"], stored["model.embed_tokens.weight"].astype(np.float32))


def test_load_converts_on_request(tmp_path: Path):
    stored = random_tensors(TIED)
    model = load_model(str(write(tmp_path, TIED, stored)), mesh_of(1, 1), TENSOR, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(model["final_norm_d"], stored["model.norm.weight"].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("sizes", "axes"), [((4, 2), LAYOUTS["zero1"].master), ((2, 4), SHARDED), ((4, 2), TENSOR)])
def test_a_mesh_of_eight_loads_and_exports_the_same_weights(sizes: tuple[int, int], axes: Axes, tmp_path: Path):
    """2x4 has more model shards than KV heads, which are then whole on each of them."""
    stored, mesh = random_tensors(SHAPE), mesh_of(*sizes)
    folder = write(tmp_path / "in", SHAPE, stored)
    model = load_model(str(folder), mesh, axes)
    assert same_bits(model, load(folder))
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(weight_shardings(SHAPE, axes, mesh)), strict=True)
    assert all(weight.sharding == expected for weight, expected in pairs)
    save_model(model, tmp_path / "out", dtype="float32")
    assert bits(read(tmp_path / "out")) == bits(stored)


def test_host_memory_is_one_tensor_not_the_model(tmp_path: Path):
    """The peak of Python's allocations, with numpy's and the safetensors library's, while loading and while saving.

    A tensor may be in memory twice for a moment, whole and split for its devices.
    """
    shape = Shape(d=256, n=4, k=2, h=64, f=1024, v=1280, l=8, tied=True, rope=Rope(1e4), norm_eps=1e-6)
    stored = random_tensors(shape)
    whole, largest = sum(value.nbytes for value in stored.values()), max(value.nbytes for value in stored.values())
    folder = write(tmp_path / "in", shape, stored, shards=2)
    del stored
    mesh = mesh_of(4, 2)
    load_model(str(folder), mesh, SHARDED)  # compiles, outside the measurement

    def peak(function: Callable[[], Any]) -> tuple[Any, int]:
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            return function(), tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()

    model, loading = peak(lambda: load_model(str(folder), mesh, SHARDED))
    _, saving = peak(lambda: save_model(model, tmp_path / "out", dtype="float32", max_shard_bytes=whole // 2))
    print(f"model {whole:,} bytes, largest tensor {largest:,}; peak on the host: load {loading:,}, save {saving:,}")
    assert whole > 10 * largest
    assert largest <= loading < 2.5 * largest
    assert saving < 2.5 * largest


# --- accepted with a notice, or refused --------------------------------------------------------------------


def test_tied_folder_may_repeat_its_embedding(tmp_path: Path):
    stored = random_tensors(TIED)
    head = {"lm_head.weight": stored["model.embed_tokens.weight"].copy()}
    plain, repeated = (
        load(write(tmp_path / "plain", TIED, stored)),
        load(write(tmp_path / "repeated", TIED, stored | head)),
    )
    assert repeated.shape.tied
    assert same_bits(plain, repeated)
    head["lm_head.weight"][-1, -1] += 1
    with pytest.raises(
        InputError, match=r"lm_head\.weight: expected no such key, or the same values as model\.embed_tokens\.weight"
    ):
        load(write(tmp_path / "other", TIED, stored | head))


def test_old_rotary_buffers_are_ignored_with_a_line_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for layer in range(3)}
    load(write(tmp_path, TIED, random_tensors(TIED) | old))
    line = "model.layers.0.self_attn.rotary_emb.inv_freq: ignored (3 such keys), rope_theta=1e+06 is used instead"
    assert line in capsys.readouterr().err


def without(*keys: str) -> Callable[[Path], None]:
    return lambda folder: save_file(
        {key: value for key, value in random_tensors(SHAPE).items() if key not in keys}, folder / "model.safetensors"
    )


def with_changed(**changed: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save_file(random_tensors(SHAPE) | changed, folder / "model.safetensors")


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
        write(folder, SHAPE, random_tensors(SHAPE), shards=2)
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
        f"model.safetensors: {GATE}: missing; expected shape [28, 16] (1 more missing)",
    ),
    "no output": (
        without("lm_head.weight"),
        "model.safetensors: lm_head.weight: missing; expected shape [40, 16], "
        "since config.json does not set tie_word_embeddings",
    ),
    "extra": (
        with_changed(**{"model.layers.3.mlp.up_proj.weight": np.ones((28, 16), np.float32)}),
        "model.safetensors: model.layers.3.mlp.up_proj.weight: extra; "
        "expected no such key in this 3-layer qwen2 model, got shape [28, 16]",
    ),
    "a bias that Qwen2 lacks": (
        with_changed(**{"model.layers.0.self_attn.o_proj.bias": np.ones(16, np.float32)}),
        "model.safetensors: model.layers.0.self_attn.o_proj.bias: extra; "
        "expected no such key in this 3-layer qwen2 model, got shape [16]",
    ),
    "mis-shaped": (
        with_changed(**{GATE: np.ones((16, 28), np.float32)}),
        f"model.safetensors: {GATE}: expected shape [28, 16], got [16, 28]",
    ),
    "quantized": (
        with_changed(**{GATE: np.ones((28, 16), np.int8)}),
        f"model.safetensors: {GATE}: expected unquantized F32, BF16, F16, got I8",
    ),
    "cut short": (cut_short, "model.safetensors: expected a whole safetensors file, got "),
    "empty": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors: expected a whole safetensors file, got 0 bytes: ",
    ),
    "Git LFS pointer": (git_lfs_pointer, "model.safetensors: expected a whole safetensors file, got 73 bytes: "),
    "pickle": (
        only_a_pickle,
        ": expected model.safetensors or model.safetensors.index.json, got only pytorch_model.bin; "
        "reading a pickle can run code: write safetensors with transformers' save_pretrained",
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
        f"model.safetensors.index.json: model.layers.0.input_layernorm.weight: expected in {SECOND}, "
        "which is not in this folder",
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
        f"{FIRST}: {NORM}: missing; expected in this file by model.safetensors.index.json",
    ),
    "a key that the index lacks": (
        indexed(lambda _, listed: {key: name for key, name in listed.items() if key != GATE}),
        f": {GATE}: extra; not listed for this file by model.safetensors.index.json",
    ),
    "an index of another form": (
        indexed(lambda _, __: ["model.safetensors"]),
        "model.safetensors.index.json: weight_map: expected a mapping of keys to file names, got ['model.safetensors']",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(name: str, tmp_path: Path):
    damage, line = BAD[name]
    damage(write(tmp_path, SHAPE, random_tensors(SHAPE)))
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert line in str(error.value)
    assert str(error.value).startswith((str(tmp_path), f"model.path: {tmp_path}"))
    assert "\n" not in str(error.value)


def test_index_that_is_not_json(tmp_path: Path):
    write(tmp_path, SHAPE, random_tensors(SHAPE), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: expected JSON, got: "):
        load(tmp_path)


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
        load_model("someone/no-such-model", mesh_of(1, 1), TENSOR)
    assert str(error.value).startswith(
        "model.path: someone/no-such-model: not a local folder, and it cannot be downloaded from the hub: "
    )
    assert "\n" not in str(error.value)

    cached = tmp_path / "models--someone--a-model"
    snapshot = write(cached / "snapshots" / ("0" * 40), TIED, random_tensors(TIED))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert model_folder("someone/a-model").resolve() == snapshot.resolve()
    assert load_model("someone/a-model", mesh_of(1, 1), TENSOR).shape == TIED


# --- the folder that is written ---------------------------------------------------------------------------------------


def test_config_round_trip():
    assert shape_of(config_of(SHAPE, "float32", {})) == SHAPE
    square = dataclasses.replace(SHAPE, h=4)
    assert "head_dim" not in config_of(square, "float32", {})
    assert shape_of(config_of(square, "bfloat16", {"eos_token_id": 3})) == square


def test_shards_and_their_index(tmp_path: Path):
    model = ones(SHAPE)
    save_model(model, tmp_path / "out", dtype="bfloat16", max_shard_bytes=3_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    assert index["weight_map"].keys() == {tensor.key for tensor in model_tensors(SHAPE)}
    assert index["metadata"]["total_size"] == sum(leaf.size for leaf in jax.tree.leaves(model)) * 2
    for file in files:
        with safe_open(file, framework="numpy") as source:
            assert source.metadata() == {"format": "pt"}
            keys = source.offset_keys()
            assert keys == [key for key, name in index["weight_map"].items() if name == file.name]
            assert sum(source.get_tensor(key).nbytes for key in keys) <= 3_000 or len(keys) == 1
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_tokenizer_files_and_token_ids(tmp_path: Path):
    """The tokenizer's ids are written where no generation settings are given; otherwise those, unchanged."""
    tokenizer, model = config_folder() / "tiny_tokenizer", ones(TIED)
    save_model(model, tmp_path / "from_tokenizer", dtype="float32", tokenizer_folder=tokenizer)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "from_tokenizer" / file).read_bytes() == (tokenizer / file).read_bytes()
    ids = {"eos_token_id": 1279, "pad_token_id": 1277}
    assert json.loads((tmp_path / "from_tokenizer" / "generation_config.json").read_text()) == ids
    config = json.loads((tmp_path / "from_tokenizer" / "config.json").read_text())
    assert (config["eos_token_id"], config.get("pad_token_id"), config["torch_dtype"]) == (1279, None, "float32")
    generation = {"eos_token_id": [5, 6], "bos_token_id": 7, "temperature": 0.6}
    save_model(model, tmp_path / "from_settings", dtype="float32", tokenizer_folder=tokenizer, generation=generation)
    assert json.loads((tmp_path / "from_settings" / "generation_config.json").read_text()) == generation
    assert json.loads((tmp_path / "from_settings" / "config.json").read_text())["eos_token_id"] == [5, 6]
    with pytest.raises(InputError, match=r"expected a folder with a tokenizer\.json"):
        save_model(model, tmp_path / "no_tokenizer", dtype="float32", tokenizer_folder=tmp_path, generation={})
    assert not (tmp_path / "no_tokenizer").exists()


def test_save_never_overwrites_and_leaves_no_half_folder(tmp_path: Path):
    model = ones(TIED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(
            InputError, match=f"{name}: expected a new or empty folder, got one that exists; nothing was written"
        ):
            save_model(model, tmp_path / name, dtype="float32")
    with pytest.raises(InputError, match="inside: "):
        save_model(model, tmp_path / "file" / "inside", dtype="float32")
    model.shape = SHAPE  # which has an output matrix that the model lacks
    with pytest.raises(AttributeError):  # fails in the middle
        save_model(model, tmp_path / "half", dtype="float32")
    model.shape = TIED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]

    (tmp_path / "new").mkdir()
    (tmp_path / ".new.unfinished").mkdir()
    (tmp_path / ".new.unfinished" / "left.safetensors").write_text("by a process that was killed")
    save_model(model, tmp_path / "new", dtype="float32")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "new"]


def test_settings_of_the_start_model_are_passed_on(tmp_path: Path):
    generation = {"eos_token_id": [5, 6], "temperature": 0.7, "do_sample": True}
    save_model(ones(TIED), tmp_path / "start", dtype="float32", generation=generation, max_position_embeddings=131072)
    save_model(ones(TIED), tmp_path / "tuned", dtype="float32", **inherited_settings(tmp_path / "start"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "tuned" / name).read_text() == (tmp_path / "start" / name).read_text()
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["max_position_embeddings"] == 131072


# --- several processes ------------------------------------------------------------------------------------------------

PROCESS = """
    import os
    import sys
    import jax
    from crpo_jax.errors import InputError
    from crpo_jax.model.huggingface import load_model, save_model
    from crpo_jax.parallel.layout import LAYOUTS
    from crpo_jax.parallel.mesh import make_mesh

    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 2, int(os.environ["JAX_PROCESS_ID"]))
    source, target = sys.argv[1:]
    assert (jax.process_count(), len(jax.local_devices()), len(jax.devices())) == (2, 4, 8)
    model = load_model(source, make_mesh("4x2"), LAYOUTS["zero1"].master)
    assert not model["q_dnh"].is_fully_addressable
    save_model(model, target, dtype="float32")
    try:
        save_model(model, target, dtype="float32")
    except InputError as error:
        print("refused:", error)
    assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_two_processes_load_and_save_together(tmp_path: Path):
    """Each has half of the devices, reads the folder by itself and takes part in every gather; the first one writes."""
    stored = random_tensors(SHAPE)
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
        outputs = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for process, text in zip(both, outputs, strict=True):
        assert process.returncode == 0, text
        assert "refused:" in text
    assert bits(read(tmp_path / "out")) == bits(stored)
