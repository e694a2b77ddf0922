"""Hugging Face folders, in and out: one key table both ways, one tensor in host memory at a time.

`load_model` reads each tensor of the safetensors once, puts its pieces on the devices that hold them and only then reads the
next, so the host never holds the model. `save_model` goes the other way, also tensor by tensor, and ends in one rename. Export
then import gives the same bits. Weights are only ever read from safetensors: a pickle (`pytorch_model.bin`) runs code.
"""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from crpo_jax.errors import InputError
from crpo_jax.model.architecture import ARCHITECTURES, Weight
from crpo_jax.model.shape import Shape, read_shape
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.layout import Axes, weight_spec

IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers that old folders hold and rope_theta replaces; the only extra keys that are accepted, with a line that says so."""

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The types a stored tensor may have, as safetensors names them."""

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


class Tensor(NamedTuple):
    """A tensor of the safetensors and the weight it is (a layer of)."""

    key: str
    weight: Weight
    layer: int | None
    sizes: tuple[int, ...]


class Header(NamedTuple):
    """What a safetensors file says about one of its tensors."""

    file: Path
    sizes: tuple[int, ...]
    dtype: str


def stored_sizes(weight: Weight, shape: Shape) -> tuple[int, ...]:
    """[n * h, d] for a weight stored as "nh d"."""
    return tuple(math.prod(shape.dims(axis)) for axis in weight.stored.split())


def model_tensors(shape: Shape) -> list[Tensor]:
    """Every tensor that the safetensors of a model must hold, no more and no fewer, layer by layer."""
    per_layer = [weight for weight in shape.weights if weight.stacked]
    first = shape.weights.index(per_layer[0])

    def tensor(weight: Weight, layer: int | None = None) -> Tensor:
        return Tensor(weight.key.format(l=layer), weight, layer, stored_sizes(weight, shape))

    ends = [tensor(weight) for weight in shape.weights if not weight.stacked]
    return [*ends[:first], *(tensor(weight, layer) for layer in range(shape.l) for weight in per_layer), *ends[first:]]


# --- reading ----------------------------------------------------------------------------------------------------------


def model_folder(path: str) -> Path:
    """The local folder of a model: `path` itself, or the snapshot of a hub id, downloaded where it is not in the cache."""
    folder = Path(path).expanduser()
    if path and folder.is_dir():  # Path("") is the working directory
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise InputError(
            f"model.path: expected a folder, or a hub id such as Qwen/Qwen2.5-3B, got {path!r}, which is neither"
        )
    import huggingface_hub  # here, because most runs read a local folder and this import is slow
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError's bases are the error of the HTTP client, which differs between the hub's versions, and OSError.
    failures: tuple[Any, ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=list(HUB_FILES)))
    except failures as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model.path: {path}: no such folder here, and the hub did not give it: {reason}") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got: {error}") from None


def read_header(file: Path) -> dict[str, Header]:
    """The header of one safetensors file; the library checks that the file is as long as its header says."""
    try:
        with safe_open(file, framework="numpy") as source:
            slices = {key: source.get_slice(key) for key in source.keys()}  # noqa: SIM118 (not a mapping)
            return {key: Header(file, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except SafetensorError as error:
        raise InputError(
            f"{file}: expected a whole safetensors file, got {file.stat().st_size} bytes: {error}"
        ) from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from None


def read_headers(folder: Path) -> tuple[Path, dict[str, Header]]:
    """Every tensor of a folder, and the file that lists them: the single safetensors, or the index, which must not err."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return single, read_header(single)
    if not index.is_file():
        found = sorted(
            path.name
            for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
            for path in folder.glob(pattern)
        )
        got = f"got only {', '.join(found[:3])}" if found else "got neither"
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in found)
        why = (
            "; a pickle can run code when it is read: write safetensors with transformers' save_pretrained"
            if pickled
            else ""
        )
        raise InputError(f"{folder}: expected {SINGLE} or {INDEX}, {got}{why}")
    content = read_json(index)
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index}: weight_map: expected a mapping of keys to file names, got {listed!r:.60}")
    headers: dict[str, Header] = {}
    for name in sorted(set(listed.values())):
        keys, file = {key for key, value in listed.items() if value == name}, folder / name
        if Path(name).name != name or not file.is_file():
            raise InputError(f"{index}: {min(keys)}: expected in {name}, which is not in this folder")
        held = read_header(file)
        for key in sorted(keys - held.keys()):
            raise InputError(f"{file}: {key}: missing; {INDEX} expects it here")
        for key in sorted(held.keys() - keys):
            raise InputError(f"{file}: {key}: extra; {INDEX} does not list it here")
        headers |= held
    return index, headers


def check_keys(shape: Shape, listing: Path, headers: Mapping[str, Header]) -> None:
    """Refuses missing, extra, mis-shaped and mis-typed tensors, before any is read."""
    expected = {tensor.key: tensor for tensor in model_tensors(shape)}
    extra = [
        key
        for key in headers
        if key not in expected and not IGNORED.fullmatch(key) and not (shape.tied and key == "lm_head.weight")
    ]
    for kind, keys in (("missing", [key for key in expected if key not in headers]), ("extra", extra)):
        if keys:
            more = f" ({len(keys) - 1} more are {kind})" if len(keys) > 1 else ""
            wanted = (
                f"shape {list(expected[keys[0]].sizes)}"
                if kind == "missing"
                else f"no such key in this {shape.l}-layer {shape.model_type} model"
            )
            untied = ", since config.json does not set tie_word_embeddings" if keys[0] == "lm_head.weight" else ""
            got = f", got shape {list(headers[keys[0]].sizes)}" if kind == "extra" else ""
            raise InputError(f"{listing}: {keys[0]}: {kind}; expected {wanted}{untied}{got}{more}")
    for key, tensor in expected.items():
        header = headers[key]
        if header.sizes != tensor.sizes:
            raise InputError(f"{header.file}: {key}: expected shape {list(tensor.sizes)}, got {list(header.sizes)}")
        if header.dtype not in DTYPES:
            raise InputError(
                f"{header.file}: {key}: expected {', '.join(DTYPES)} (weights that are not quantized), got {header.dtype}"
            )


def check_tied(headers: Mapping[str, Header]) -> None:
    """Refuses an lm_head.weight that differs from the embedding it is tied to; compared in blocks of rows."""
    key, other = "lm_head.weight", "model.embed_tokens.weight"
    if key not in headers:
        return
    head, embedding = headers[key], headers[other]
    equal = head[1:] == embedding[1:]
    if equal:
        with safe_open(head.file, framework="numpy") as one, safe_open(embedding.file, framework="numpy") as two:
            ours, theirs = one.get_slice(key), two.get_slice(other)
            rows = head.sizes[0]
            blocks = (slice(row, min(row + 4096, rows)) for row in range(0, rows, 4096))
            equal = all(np.array_equal(ours[block], theirs[block]) for block in blocks)
    if not equal:
        raise InputError(
            f"{head.file}: {key}: expected no such key, or the same values as {other}, since config.json sets tie_word_embeddings"
        )


def load_model(path: str, mesh: Mesh, axes: Axes, dtype: Any = jnp.float32) -> Transformer:
    """The model of a folder or hub id as `axes` place it on the mesh, converted to `dtype` on the devices.

    The host holds one stored tensor at a time, and its pieces on their way to the devices. On a mesh of several processes
    every process calls this and puts only what its own devices hold. The mesh must split the shape (`check_layout`).

    Raises InputError, naming file and key, for whatever is missing, extra, mis-shaped, quantized, cut short or a pickle.
    A tied model's lm_head.weight is accepted where it equals the embedding; old rotary buffers (IGNORED) are skipped.
    """
    folder = model_folder(path)
    shape = read_shape(folder)
    listing, headers = read_headers(folder)
    check_keys(shape, listing, headers)
    if shape.tied:
        check_tied(headers)
    ignored = [key for key in headers if IGNORED.fullmatch(key)]
    if ignored and jax.process_index() == 0:
        print(
            f"{listing}: {ignored[0]}: ignored ({len(ignored)} such keys), rope_theta={shape.rope_theta:g} gives these angles",
            file=sys.stderr,
        )

    tensors = {tensor.key: tensor for tensor in model_tensors(shape)}
    weights: dict[str, jax.Array | None] = {}
    insert = {weight.name: insertion(weight, shape, mesh, axes, jnp.dtype(dtype)) for weight in shape.weights}
    for file in dict.fromkeys(header.file for header in headers.values()):
        with safe_open(file, framework="numpy") as source:
            for key in source.offset_keys():  # the order on disk
                if key in tensors:
                    name, layer = tensors[key].weight.name, tensors[key].layer
                    weights[name] = insert[name](weights.get(name), source.get_tensor(key), layer)
                    jax.block_until_ready(
                        weights[name]
                    )  # else later tensors are read while earlier ones wait in host memory
    return Transformer(shape, lambda weight: weights[weight.name])


@functools.cache
def insertion(
    weight: Weight, shape: Shape, mesh: Mesh, axes: Axes, dtype: Any
) -> Callable[[jax.Array | None, np.ndarray, int | None], jax.Array]:
    """`(weight so far, stored tensor, layer) -> weight` with that tensor in it; the stack is allocated once, then donated."""
    letters, dims = weight.stored.replace(" ", ""), weight.dims
    arriving = NamedSharding(mesh, weight_spec(axes, letters, mesh, shape.k))
    final = NamedSharding(mesh, weight_spec(axes, weight.stacked_dims, mesh, shape.k))

    def converted(x: jax.Array) -> jax.Array:
        return x.transpose([letters.index(letter) for letter in dims]).astype(dtype)

    def inserted(stack: jax.Array, x: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, converted(x), layer, 0)

    whole = jax.jit(converted, out_shardings=final)
    insert = jax.jit(inserted, out_shardings=final, donate_argnums=0)
    empty = jax.jit(lambda: jnp.zeros(shape.dims("l" + dims), dtype), out_shardings=final)

    def put(stack: jax.Array | None, stored: np.ndarray, layer: int | None) -> jax.Array:
        stored = stored.reshape(shape.dims(letters))
        # Not device_put: to a sharding over several processes it would first compare the values of all of them.
        x = jax.make_array_from_callback(stored.shape, arriving, lambda index: stored[index])
        return whole(x) if layer is None else insert(empty() if stack is None else stack, x, np.int32(layer))

    return put


# --- writing ----------------------------------------------------------------------------------------------------------


def config_of(
    shape: Shape, dtype: str, token_ids: Mapping[str, Any], max_position_embeddings: int = 32768
) -> dict[str, Any]:
    """The config.json of a shape, in the keys that Qwen2.5 was published with; `shape_of` reads it back.

    No pad_token_id, as there: transformers would make it the embedding's padding_idx, a row that gets no gradient.
    """
    return {
        "architectures": [ARCHITECTURES[shape.model_type].class_name],
        "attention_dropout": 0.0,
        **{key: token_ids[key] for key in ("bos_token_id", "eos_token_id") if key in token_ids},
        **({} if shape.h * shape.n == shape.d else {"head_dim": shape.h}),
        "hidden_act": "silu",
        "hidden_size": shape.d,
        "initializer_range": 0.02,
        "intermediate_size": shape.f,
        "max_position_embeddings": max_position_embeddings,
        "model_type": shape.model_type,
        "num_attention_heads": shape.n,
        "num_hidden_layers": shape.l,
        "num_key_value_heads": shape.k,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.v,
    }


def special_token_ids(folder: Path) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id of a tokenizer, as far as it names them."""
    settings, tokenizer = read_json(folder / "tokenizer_config.json"), read_json(folder / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    named = {role: settings.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    contents = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}
    return {f"{role}_token_id": ids[content] for role, content in contents.items() if content in ids}


def shards_of(wanted: Sequence[Tensor], width: int, max_shard_bytes: int) -> dict[str, list[Tensor]]:
    """The tensors by file, none over `max_shard_bytes` unless a single tensor is; `width` is an element's bytes."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in wanted:
        size = int(np.prod(tensor.sizes)) * width
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    count = len(shards)
    return {
        SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }


def safetensors_header(shard: Sequence[Tensor], dtype: str, width: int) -> bytes:
    """What stands before the bytes of the tensors, which follow in this order.

    The library's own writer wants every tensor of a file in memory; the format (huggingface.co/docs/safetensors) is eight
    bytes of length, then JSON with each tensor's place, padded with spaces to a multiple of eight.
    """
    code = {value: key for key, value in DTYPES.items()}[dtype]
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        end = at + int(np.prod(tensor.sizes)) * width
        content[tensor.key] = {"dtype": code, "shape": list(tensor.sizes), "data_offsets": [at, end]}
        at = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stored_tensors(model: Transformer, dtype: str) -> Callable[[Tensor], jax.Array]:
    """`tensor -> its values` as they are stored, whole on every device; each of a mesh's processes must call it."""

    @functools.cache
    def gather(weight: Weight) -> Any:
        letters, dims = weight.stored.replace(" ", ""), weight.dims
        placed = model[weight.name].sharding
        placed = placed if isinstance(placed, NamedSharding) else None

        def stored(values: jax.Array, layer: jax.Array | None) -> jax.Array:
            if layer is not None:
                values = jax.lax.dynamic_index_in_dim(values, layer, 0, keepdims=False)
                if placed:  # or the compiler may gather the whole stack to take one layer of it
                    parts = tuple(placed.spec) + (None,) * (values.ndim + 1 - len(placed.spec))
                    values = jax.lax.with_sharding_constraint(values, NamedSharding(placed.mesh, P(*parts[1:])))
            values = values.astype(dtype).transpose([dims.index(letter) for letter in letters])
            return values.reshape(stored_sizes(weight, model.shape))

        return jax.jit(stored, out_shardings=NamedSharding(placed.mesh, P()) if placed else None)

    def values(tensor: Tensor) -> jax.Array:
        layer = None if tensor.layer is None else np.int32(tensor.layer)
        return gather(tensor.weight)(model[tensor.weight.name], layer)

    return values


@contextlib.contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that becomes it at the end, or disappears with the error that stopped the writing."""
    temporary = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, folder)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def free_folder(folder: str | Path) -> Path:
    """The absolute path of a folder to write; refused by every process where the first one finds something there."""
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    occupied = (
        jax.process_index() == 0 and os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))
    )
    if multihost_utils.broadcast_one_to_all(
        np.int32(occupied)
    ):  # all stop, or the others would wait for the writer for ever
        raise InputError(f"{folder}: expected a new or empty folder, got one that exists; nothing was written")
    return folder


def inherited_settings(folder: Path) -> dict[str, Any]:
    """What a model folder says beside its shape and its weights, as `save_model` takes it."""
    longest = read_json(folder / "config.json").get("max_position_embeddings")
    generation = folder / "generation_config.json"
    found = {"max_position_embeddings": longest} if isinstance(longest, int) else {}
    return {**found, "generation": read_json(generation)} if generation.is_file() else found


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_folder: str | Path | None = None,
    generation: Mapping[str, Any] | None = None,
    max_position_embeddings: int = 32768,
) -> None:
    """Writes a model as a folder that transformers, vLLM and `load_model` read; refuses one that holds files.

    `generation` is the content of generation_config.json, whose bos and eos ids config.json repeats; None: the tokenizer's ids.
    The folder appears whole or not at all. The host holds one tensor at a time. On a mesh of several processes every
    process calls this; the first one writes.
    """
    writer = jax.process_index() == 0
    tokenizer = None if tokenizer_folder is None else Path(tokenizer_folder)
    if generation is None:
        generation = special_token_ids(tokenizer) if tokenizer else {}
    if tokenizer and not (tokenizer / "tokenizer.json").is_file():
        raise InputError(f"{tokenizer}: expected a folder with a tokenizer.json")
    folder = free_folder(folder)
    width = jnp.dtype(dtype).itemsize
    shape = model.shape
    shards = shards_of(model_tensors(shape), width, max_shard_bytes)
    values_of = stored_tensors(model, dtype)
    with written_at_once(folder) if writer else contextlib.nullcontext() as temporary:
        for name, shard in shards.items():
            with open(temporary / name, "wb") if temporary else contextlib.nullcontext() as file:
                if file:
                    file.write(safetensors_header(shard, dtype, width))
                for tensor in shard:
                    values = jax.block_until_ready(values_of(tensor))
                    if file:
                        file.write(np.ascontiguousarray(values.addressable_data(0)).reshape(-1).view(np.uint8).data)
        if temporary:
            sizes = sum(int(np.prod(tensor.sizes)) for shard in shards.values() for tensor in shard)
            written = {
                "config.json": config_of(shape, dtype, generation, max_position_embeddings),
                **({"generation_config.json": dict(generation)} if generation else {}),
            }
            if len(shards) > 1:
                listed = {tensor.key: name for name, shard in shards.items() for tensor in shard}
                written[INDEX] = {"metadata": {"total_size": sizes * width}, "weight_map": listed}
            for name, content in written.items():
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for name in TOKENIZER_FILES:
                if tokenizer and (tokenizer / name).is_file():
                    shutil.copyfile(tokenizer / name, temporary / name)
    multihost_utils.sync_global_devices("the folder is written")
