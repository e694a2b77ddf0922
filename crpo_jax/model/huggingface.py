"""Reads and writes Hugging Face model folders, one tensor in host memory at a time.

`load_model` reads each tensor of the safetensors once and puts it on its devices before it reads the next, so the host
never holds the whole model. `save_model` writes tensor by tensor, and the finished folder appears by one rename. Export
then import gives the same bits. Weights are read from safetensors only: a pickle (`pytorch_model.bin`) can run code.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open

from crpo_jax.disk import local_path, written_at_once
from crpo_jax.errors import InputError
from crpo_jax.model.architecture import Weight
from crpo_jax.model.config_json import config_of, read_mapping, read_shape, unknown_keys
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.layout import Axes, weight_spec

ROTARY_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Buffers of old folders, which rope_theta replaces: the only extra keys accepted, with a line on standard error."""

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The types that a stored tensor may have, by their names in safetensors."""

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
TOKENIZER_CLASS_FILE = "tokenizer_class.py"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    TOKENIZER_CLASS_FILE,
)
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
EMBEDDING_KEY, OUTPUT_KEY = "model.embed_tokens.weight", "lm_head.weight"
MAX_SHARD_BYTES = 5_000_000_000


class Tensor(NamedTuple):
    """A tensor of the safetensors and the weight it holds, or holds one layer of."""

    key: str
    weight: Weight
    layer: int | None
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)


class Header(NamedTuple):
    """What a safetensors file states about one of its tensors."""

    file: Path
    sizes: tuple[int, ...]
    dtype: str


def stored_sizes(weight: Weight, shape: Shape) -> tuple[int, ...]:
    """[n * h, d] for a weight stored as "nh d"."""
    return tuple(math.prod(shape.dims(axis)) for axis in weight.stored.split())


def model_tensors(shape: Shape) -> list[Tensor]:
    """Every tensor that the safetensors of a model must hold, no more and no fewer, layer by layer."""
    return [
        Tensor(weight.key.format(l=layer), weight, layer, stored_sizes(weight, shape))
        for stacked, weights in itertools.groupby(shape.weights, lambda weight: weight.stacked)
        for layer, weight in itertools.product(range(shape.l) if stacked else [None], weights)
    ]


# --- reading ----------------------------------------------------------------------------------------------------------


def model_folder(path: str) -> Path:
    """The local folder of a model: `path` itself, or the snapshot of a hub id, downloaded unless it is in the cache."""
    folder = Path(path).expanduser()
    if path and folder.is_dir():  # Path("") is the working directory
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise InputError(
            f"model.path: expected a folder, or a hub id such as Qwen/Qwen2.5-3B, got {path!r}, which is neither"
        )
    import huggingface_hub  # slow to import, and most runs read a local folder
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError's bases are OSError and the HTTP client's error, which differs between versions of huggingface_hub.
    failures: tuple[Any, ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=list(HUB_FILES)))
    except failures as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model.path: {path}: not a local folder, and it cannot be downloaded from the hub: {reason}"
        ) from None


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
    """The file that lists a folder's tensors, model.safetensors or an index, and every tensor's header.

    Raises InputError where the index and its files disagree.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return single, read_header(single)
    if not index.is_file():
        refuse_other_weights(folder)
    listed = read_mapping(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index}: weight_map: expected a mapping of keys to file names, got {listed!r:.60}")
    headers: dict[str, Header] = {}
    for name in sorted(set(listed.values())):
        keys, file = {key for key, value in listed.items() if value == name}, folder / name
        if Path(name).name != name or not file.is_file():
            raise InputError(f"{index}: {min(keys)}: expected in {name}, which is not in this folder")
        of_file = read_header(file)
        for key in sorted(keys - of_file.keys()):
            raise InputError(f"{file}: {key}: missing; expected in this file by {INDEX_FILE}")
        for key in sorted(of_file.keys() - keys):
            raise InputError(f"{file}: {key}: extra; not listed for this file by {INDEX_FILE}")
        headers |= of_file
    return index, headers


def refuse_other_weights(folder: Path) -> NoReturn:
    """Raises InputError for a folder without a model in safetensors, naming the weights that it holds instead."""
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
    names = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    got = f"only {', '.join(names[:3])}" if names else "neither"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        got += "; reading a pickle can run code: write safetensors with transformers' save_pretrained"
    raise InputError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, got {got}")


def check_keys(shape: Shape, listing: Path, headers: Mapping[str, Header]) -> None:
    """Refuses missing, extra, mis-shaped and mis-typed tensors before any is read."""
    expected = {tensor.key: tensor for tensor in model_tensors(shape)}
    repeated = {OUTPUT_KEY} if shape.tied else set()
    missing = [key for key in expected if key not in headers]
    extra = [key for key in headers if key not in expected.keys() | repeated and not ROTARY_BUFFERS.fullmatch(key)]
    if missing:
        key, count = missing[0], len(missing) - 1
        why = ", since config.json does not set tie_word_embeddings" if key == OUTPUT_KEY else ""
        more = f" ({count} more missing)" if count else ""
        raise InputError(f"{listing}: {key}: missing; expected shape {list(expected[key].sizes)}{why}{more}")
    if extra:
        key, model, count = extra[0], f"{shape.l}-layer {shape.model_type} model", len(extra) - 1
        got = f"shape {list(headers[key].sizes)}" + (f" ({count} more extra)" if count else "")
        raise InputError(f"{listing}: {key}: extra; expected no such key in this {model}, got {got}")
    for key, tensor in expected.items():
        file, sizes, dtype = headers[key]
        if sizes != tensor.sizes:
            raise InputError(f"{file}: {key}: expected shape {list(tensor.sizes)}, got {list(sizes)}")
        if dtype not in DTYPES:
            raise InputError(f"{file}: {key}: expected unquantized {', '.join(DTYPES)}, got {dtype}")


def check_tied(headers: Mapping[str, Header]) -> None:
    """Refuses an lm_head.weight that differs from the embedding it is tied to; compared in blocks of rows."""
    if OUTPUT_KEY not in headers:
        return
    output, embedding = headers[OUTPUT_KEY], headers[EMBEDDING_KEY]
    equal = output[1:] == embedding[1:]
    if equal:
        with safe_open(output.file, framework="numpy") as first, safe_open(embedding.file, framework="numpy") as second:
            output_rows, embedding_rows = first.get_slice(OUTPUT_KEY), second.get_slice(EMBEDDING_KEY)
            count = output.sizes[0]
            blocks = (slice(row, min(row + 4096, count)) for row in range(0, count, 4096))
            equal = all(np.array_equal(output_rows[block], embedding_rows[block]) for block in blocks)
    if not equal:
        raise InputError(
            f"{output.file}: {OUTPUT_KEY}: expected no such key, or the same values as {EMBEDDING_KEY}, "
            "since config.json sets tie_word_embeddings"
        )


def load_model(path: str, mesh: Mesh, axes: Axes, dtype: Any = jnp.float32) -> Transformer:
    """The model of a folder or hub id as `axes` place it on the mesh, converted to `dtype` on the devices.

    The host holds one stored tensor at a time, and the parts of it that are in transfer. On a mesh of several processes
    each of them calls this and transfers only its own devices' parts. The mesh must pass `check_layout`.

    Raises InputError, naming file and key, for tensors that are missing, extra, mis-shaped or quantized, and for files
    that are truncated or pickles. A tied model may repeat its embedding as lm_head.weight; ROTARY_BUFFERS are skipped.
    """
    folder = model_folder(path)
    shape = read_shape(folder)
    listing, headers = read_headers(folder)
    check_keys(shape, listing, headers)
    if shape.tied:
        check_tied(headers)
    if jax.process_index() == 0:
        for key in unknown_keys(read_mapping(folder / "config.json")):
            print(f"{folder / 'config.json'}: {key}: ignored, since its meaning is not known here", file=sys.stderr)
    ignored = [key for key in headers if ROTARY_BUFFERS.fullmatch(key)]
    if ignored and jax.process_index() == 0:
        reason = f"({len(ignored)} such keys), rope_theta={shape.rope.theta:g} is used instead"
        print(f"{listing}: {ignored[0]}: ignored {reason}", file=sys.stderr)

    tensors = {tensor.key: tensor for tensor in model_tensors(shape)}
    weights: dict[str, jax.Array | None] = {}
    insert = {weight.name: insertion(weight, shape, mesh, axes, jnp.dtype(dtype)) for weight in shape.weights}
    for file in dict.fromkeys(header.file for header in headers.values()):
        with safe_open(file, framework="numpy") as source:
            for key in source.offset_keys():  # the order on disk
                if key in tensors:
                    name, layer = tensors[key].weight.name, tensors[key].layer
                    weights[name] = insert[name](weights.get(name), source.get_tensor(key), layer)
                    jax.block_until_ready(weights[name])  # or tensors would pile up in host memory
    return Transformer(shape, lambda weight: weights[weight.name])


@functools.cache
def insertion(
    weight: Weight, shape: Shape, mesh: Mesh, axes: Axes, dtype: Any
) -> Callable[[jax.Array | None, np.ndarray, int | None], jax.Array]:
    """A function (stack, stored tensor, layer) -> stack with that tensor as its layer; the first call allocates it.

    The stack is donated. A weight that is not stacked has neither stack nor layer.
    """
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


def special_token_ids(folder: Path) -> dict[str, int]:
    """Those of bos_token_id, eos_token_id and pad_token_id that a tokenizer defines."""
    settings, tokenizer = read_mapping(folder / "tokenizer_config.json"), read_mapping(folder / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    named = {role: settings.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    contents = {role: token["content"] if isinstance(token, dict) else token for role, token in named.items()}
    return {f"{role}_token_id": ids[content] for role, content in contents.items() if content in ids}


def stopping_at(generation: Mapping[str, Any], stop_ids: Sequence[int]) -> dict[str, Any]:
    """The content of generation_config.json with every stop token among its eos_token_id, unless all stand there.

    A base model's own ends texts, not turns: served with that alone, a model trained on turns would never stop.
    """
    listed = generation.get("eos_token_id", [])
    listed = listed if isinstance(listed, list) else [listed]
    if set(stop_ids) <= set(listed):
        return dict(generation)
    return {**generation, "eos_token_id": [*stop_ids, *(token for token in listed if token not in stop_ids)]}


def split_into_files(tensors: Sequence[Tensor], width: int, max_shard_bytes: int) -> dict[str, list[Tensor]]:
    """The tensors by file name, at most `max_shard_bytes` a file unless a single tensor is larger.

    `width` is the bytes of an element.
    """
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = tensor.elements * width
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    count = len(shards)
    if count == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def safetensors_header(shard: Sequence[Tensor], dtype: str, width: int) -> bytes:
    """The bytes of a safetensors file before those of its tensors, which follow in this order.

    The library's own writer needs every tensor of a file in memory. The format (huggingface.co/docs/safetensors) is
    eight bytes of length, then JSON with the place of each tensor, padded with spaces to a multiple of eight.
    """
    code = {value: key for key, value in DTYPES.items()}[dtype]
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        end = start + tensor.elements * width
        content[tensor.key] = {"dtype": code, "shape": list(tensor.sizes), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def gather_tensors(model: Transformer, dtype: str) -> Callable[[Tensor], jax.Array]:
    """A function from a tensor to its values as they are stored, whole on every device; all processes must call it."""

    @functools.cache
    def program(weight: Weight) -> Any:
        letters, dims = weight.stored.replace(" ", ""), weight.dims
        sharding = model[weight.name].sharding
        named = sharding if isinstance(sharding, NamedSharding) else None

        def gather(values: jax.Array, layer: jax.Array | None) -> jax.Array:
            if layer is not None:
                values = jax.lax.dynamic_index_in_dim(values, layer, 0, keepdims=False)
                if named:  # or the compiler may gather the whole stack to take one layer of it
                    axes = tuple(named.spec) + (None,) * (values.ndim + 1 - len(named.spec))
                    values = jax.lax.with_sharding_constraint(values, NamedSharding(named.mesh, P(*axes[1:])))
            values = values.astype(dtype).transpose([dims.index(letter) for letter in letters])
            return values.reshape(stored_sizes(weight, model.shape))

        return jax.jit(gather, out_shardings=NamedSharding(named.mesh, P()) if named else None)

    def values(tensor: Tensor) -> jax.Array:
        layer = None if tensor.layer is None else np.int32(tensor.layer)
        return program(tensor.weight)(model[tensor.weight.name], layer)

    return values


def free_folder(folder: str | Path) -> Path:
    """The absolute path of a folder to write; every process raises InputError if the first one finds files in it."""
    folder = Path(os.path.abspath(local_path("folder", folder)))
    writer = jax.process_index() == 0
    occupied = writer and os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))
    if multihost_utils.broadcast_one_to_all(np.int32(occupied)):  # all stop, or the others would wait for the writer
        raise InputError(f"{folder}: expected a new or empty folder, got one that exists; nothing was written")
    return folder


def inherited_settings(folder: Path) -> dict[str, Any]:
    """What a model folder states besides its shape and weights, as arguments of `save_model`."""
    longest = read_mapping(folder / "config.json").get("max_position_embeddings")
    generation = folder / "generation_config.json"
    inherited = {"max_position_embeddings": longest} if isinstance(longest, int) else {}
    return {**inherited, "generation": read_mapping(generation)} if generation.is_file() else inherited


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
    """Writes a model as a folder that transformers, vLLM and `load_model` read; refuses a folder that holds files.

    `generation` is the content of generation_config.json, and config.json repeats its bos and eos ids; None takes the
    tokenizer's ids. The folder appears whole or not at all. The host holds one tensor at a time. On a mesh of several
    processes each of them calls this and the first one writes.
    """
    writer = jax.process_index() == 0
    tokenizer = None if tokenizer_folder is None else Path(tokenizer_folder)
    if generation is None:
        generation = special_token_ids(tokenizer) if tokenizer else {}
    if tokenizer and not (tokenizer / "tokenizer.json").is_file():
        raise InputError(f"{tokenizer}: expected a folder with a tokenizer.json")
    folder, shape, width = free_folder(folder), model.shape, jnp.dtype(dtype).itemsize
    files = split_into_files(model_tensors(shape), width, max_shard_bytes)
    values_of = gather_tensors(model, dtype)
    with written_at_once(folder) if writer else contextlib.nullcontext() as temporary:
        for name, tensors in files.items():
            with open(temporary / name, "wb") if temporary else contextlib.nullcontext() as file:
                if file:
                    file.write(safetensors_header(tensors, dtype, width))
                for tensor in tensors:
                    values = jax.block_until_ready(values_of(tensor))
                    if file:
                        file.write(np.ascontiguousarray(values.addressable_data(0)).reshape(-1).view(np.uint8).data)
        if temporary:
            settings = {"config.json": config_of(shape, dtype, generation, max_position_embeddings)}
            if generation:
                settings["generation_config.json"] = dict(generation)
            if len(files) > 1:
                total = sum(tensor.elements for tensors in files.values() for tensor in tensors) * width
                listed = {tensor.key: name for name, tensors in files.items() for tensor in tensors}
                settings[INDEX_FILE] = {"metadata": {"total_size": total}, "weight_map": listed}
            for name, content in settings.items():
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for name in TOKENIZER_FILES:
                if tokenizer and (tokenizer / name).is_file():
                    shutil.copyfile(tokenizer / name, temporary / name)
    multihost_utils.sync_global_devices("the folder is written")
