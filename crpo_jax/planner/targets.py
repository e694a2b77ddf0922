"""Accelerators by name: what they can do, as published, and compile-only devices for one that is not here.

A GPU target is a count and a card (`8xa6000`, `h100x8`, `h200`); a TPU target is a slice by its cloud name (`v5e-16`,
`v4-16`), whose number counts chips for v5e and v6e and cores, two a chip, for v4 and v5p.

`devices(target)` needs `pip install 'crpo_jax[plan-tpu]'` or `'crpo_jax[plan-gpu]'`, but no accelerator. Nothing else here
needs jax.
"""

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from crpo_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as its maker publishes it: dense bf16 FLOP/s with float32 sums, bytes of memory and bytes/s to it, and bytes/s that
    a device sends to others while it receives as much, inside a host (or a TPU slice) and between hosts (0: one host only)."""

    kind: Literal["gpu", "tpu"]
    flops: float
    memory: int
    bandwidth: float
    link: str
    link_bandwidth: float
    network_bandwidth: float
    source: str
    spare: int  # bytes that programs cannot have: the runtime, collectives' buffers, cuDNN's workspace
    gpu: tuple[int, int, int] = (
        0,
        0,
        0,
    )  # compute capability * 10, cores, bytes of L2 cache; a GPU's compiler wants to know
    topology: str = ""  # a TPU's name for its compiler


def gpu(
    flops: float,
    memory: int,
    bandwidth: float,
    link: tuple[str, float],
    network: float,
    compiler: tuple[int, int, int],
    source: str,
) -> Chip:
    return Chip("gpu", flops, memory, bandwidth, *link, network, source, spare=3 * GIB, gpu=compiler)


def tpu(flops: float, memory_gib: int, bandwidth: float, ici: float, topology: str, source: str) -> Chip:
    return Chip("tpu", flops, memory_gib * GIB, bandwidth, "ICI", ici, 0, source, spare=GIB // 4, topology=topology)


PCIE4 = ("PCIe 4.0 x16", 32e9)
MIB = 2**20

CHIPS: dict[str, Chip] = {
    # Memory is what the driver reports where XLA's own device descriptions have it, else the nominal size.
    "rtx3090": gpu(71e12, 24 * GIB, 936e9, PCIE4, 0, (86, 82, 6 * MIB), "NVIDIA Ampere GA102 whitepaper, table 9"),
    "rtx4090": gpu(
        165.2e12, 24564 * MIB, 1008e9, PCIE4, 0, (89, 128, 72 * MIB), "NVIDIA Ada GPU architecture whitepaper, table 2"
    ),
    "a6000": gpu(
        154.8e12,
        51_041_271_808,
        768e9,
        PCIE4,
        0,
        (86, 84, 6 * MIB),
        "NVIDIA RTX A6000 datasheet (half of its figure with sparsity)",
    ),
    "l40s": gpu(362e12, 48 * GIB, 864e9, PCIE4, 0, (89, 142, 96 * MIB), "NVIDIA L40S datasheet"),
    "a100-40gb": gpu(
        312e12, 42_331_013_120, 1555e9, ("NVLink 3", 300e9), 25e9, (80, 108, 40 * MIB), "NVIDIA A100 datasheet (SXM)"
    ),
    "a100": gpu(
        312e12, 85_100_068_864, 2039e9, ("NVLink 3", 300e9), 25e9, (80, 108, 40 * MIB), "NVIDIA A100 datasheet (SXM)"
    ),
    "h100": gpu(
        989e12, 84_942_979_072, 3350e9, ("NVLink 4", 450e9), 50e9, (90, 132, 50 * MIB), "NVIDIA H100 datasheet (SXM)"
    ),
    "h200": gpu(
        989e12, 151_397_597_184, 4800e9, ("NVLink 4", 450e9), 50e9, (90, 132, 50 * MIB), "NVIDIA H200 datasheet (SXM)"
    ),
    # ICI: both directions of the links along one axis of the slice, which one ring of a collective uses.
    "v4": tpu(275e12, 32, 1228e9, 90e9, "v4", "Google Cloud TPU v4 page; links: How to Scale Your Model, chapter 2"),
    "v5e": tpu(197e12, 16, 819e9, 90e9, "v5e", "Google Cloud TPU v5e page; links: How to Scale Your Model, chapter 2"),
    "v5p": tpu(459e12, 95, 2765e9, 180e9, "v5", "Google Cloud TPU v5p page; links: How to Scale Your Model, chapter 2"),
    "v6e": tpu(
        918e12, 32, 1640e9, 180e9, "v6e", "Google Cloud TPU v6e page; links: How to Scale Your Model, chapter 2"
    ),
}

SAME = {"a100-80gb": "a100", "rtx-a6000": "a6000", "h100-80gb": "h100"}
DEVICE_KINDS = {
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA L40S": "l40s",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
}
"""How jax calls a device of each chip."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device that jax calls so, None where it is not known."""
    return CHIPS[DEVICE_KINDS[device_kind]].flops if device_kind in DEVICE_KINDS else None


CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}  # in the number of a slice's name
GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Target:
    """Devices to plan for: `name` as the user wrote it, `count` devices as a JAX program sees them."""

    name: str
    chip: Chip
    count: int

    @property
    def usable(self) -> int:
        """Bytes a device that programs can have."""
        return self.chip.memory - self.chip.spare

    @property
    def extra(self) -> str:
        return f"plan-{self.chip.kind}"


def parse_target(name: str) -> Target:
    """The target of a name such as 8xa6000, h100x8, h200, v5e-16."""
    text = name.lower()
    slice_of = re.fullmatch(r"(v\w+)-(\d{1,4})", text)
    if slice_of and slice_of[1] in CORES_PER_CHIP:
        chips, rest = divmod(int(slice_of[2]), CORES_PER_CHIP[slice_of[1]])
        chip = CHIPS[slice_of[1]]
        if rest or not slice_shape(chip, chips):
            sizes = [size * CORES_PER_CHIP[slice_of[1]] for size in range(1, 257) if slice_shape(chip, size)]
            raise InputError(
                f"--target {name}: expected a {slice_of[1]} slice of {', '.join(map(str, sizes))}, got {slice_of[2]}"
            )
        return Target(name, chip, chips)
    cards = [*(card for card, chip in CHIPS.items() if chip.kind == "gpu"), *SAME]
    match = re.fullmatch(rf"(?:(?P<before>\d{{1,4}})x)?(?P<card>{'|'.join(cards)})(?:x(?P<after>\d{{1,4}}))?", text)
    if not match or (match["before"] and match["after"]):
        examples = [
            *(card for card in cards if card not in SAME),
            "8xa6000",
            "h100x8",
            *(f"{known}-16" for known in CORES_PER_CHIP),
        ]
        close = difflib.get_close_matches(text, examples, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"--target: expected one such as {', '.join(examples)}, got {name!r}{meant}")
    card = SAME.get(match["card"], match["card"])
    count = int(match["before"] or match["after"] or 1)
    most = 1024 if CHIPS[card].network_bandwidth else GPUS_PER_HOST
    if not 1 <= count <= most or (count > GPUS_PER_HOST and count % GPUS_PER_HOST):
        known = f"1 to {GPUS_PER_HOST}" + (
            f" or a multiple of {GPUS_PER_HOST} up to {most}" if most > GPUS_PER_HOST else ""
        )
        raise InputError(f"--target {name}: expected {known} {card}, got {count}")
    return Target(name, CHIPS[card], count)


def slice_shape(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """How a slice of so many chips is laid out, or None where there is none of that size: a square or twice one (v5e, v6e), or a
    box whose sides are powers of two, the longest at most four times the shortest (v4, v5p)."""
    if chips < 1 or chips & (chips - 1) or chips > 256:
        return None
    power = chips.bit_length() - 1
    if chip.topology in ("v5e", "v6e"):
        return (2 ** (power // 2), 2 ** (power - power // 2))
    return (
        (2, 2, 1)
        if chips == 4
        else (2 ** (power // 3), 2 ** ((power + 1) // 3), 2 ** ((power + 2) // 3))
        if chips > 4
        else None
    )


def plug_in_missing(target: Target) -> str:
    """Which package a compilation for this target lacks, as a sentence; empty where it has what it needs."""
    names = ["libtpu"] if target.chip.kind == "tpu" else ["jax_cuda13_plugin", "jax_cuda12_plugin"]
    if any(importlib.util.find_spec(name) for name in names):
        return ""
    return f"compiling for {target.name} needs its compiler: pip install 'crpo_jax[{target.extra}]'"


def prepare(target: Target) -> None:
    """Sets what the target's compiler reads from the environment; call before jax makes its first device."""
    wanted = {"JAX_PLATFORMS": "cpu"}
    if target.chip.kind == "tpu":
        wanted |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        }
        wanted |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3"}
    else:
        wanted |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


@cache
def devices(target: Target) -> tuple[Any, ...]:
    """Devices that programs can be compiled for and that nothing can run on.

    Lower with ShapeDtypeStructs whose shardings are over a mesh of these, and compile with `options(target)`.
    """
    if missing := plug_in_missing(target):
        raise InputError(missing)
    prepare(target)
    from jax._src import xla_bridge
    from jax.experimental import topologies

    chip, more = target.chip, {}
    if chip.kind == "gpu":
        hosts = max(1, target.count // GPUS_PER_HOST)
        # With no GPU present jax cannot tell which maker's "gpu" stands for, which rules for one platform ask for (jax 0.10, 0.11).
        xla_bridge._alias_to_platforms["gpu"] = ["cuda"]
        xla_bridge.backends()  # registers the plug-ins
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{target.count // hosts}", target_config=description(target)
        )
        return tuple(found.devices)
    sides = slice_shape(chip, target.count)
    assert sides is not None  # parse_target refuses what has none
    if target.count == 1:
        more = {"chips_per_host_bounds": (1, 1, 1)}
    elif len(sides) == 3:  # else every chip counts as two devices
        more = {
            "chip_config_name": "megacore",
            "chips_per_host_bounds": (2, 2, 1),
            "num_slices": 1,
            "wrap": (False,) * 3,
        }
    name = f"{chip.topology}:{'x'.join(map(str, sides))}"
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices)


def mesh_on(target: Target, data: int, model: int) -> "Mesh":
    """The training mesh over the target's devices."""
    import jax
    from jax.sharding import AxisType

    from crpo_jax.parallel.mesh import DATA, MODEL

    return jax.make_mesh(
        (data, model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices(target)
    )


def options(target: Target) -> dict[str, Any]:
    """Compiler options: a GPU's compiler must not time kernels on a GPU that is not there."""
    return {"xla_gpu_autotune_level": 0} if target.chip.kind == "gpu" else {}


def description(target: Target) -> str:
    """The GPU in the form that XLA's compiler takes (stream_executor.GpuTargetConfigProto as text)."""
    chip = target.chip
    capability, cores, l2 = chip.gpu
    shared, threads, units = {80: (164, 2048, 64), 86: (100, 1536, 128), 89: (100, 1536, 128), 90: (228, 2048, 128)}[
        capability
    ]
    accelerated = "feature_extension: ACCELERATED_FEATURES" if capability == 90 else ""
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": shared * 1024,
        "shared_memory_per_block_optin": (shared - 1) * 1024,
        "threads_per_core_limit": threads,
        "core_count": cores,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": l2,
        "clock_rate_ghz": 1.8,
        "device_memory_size": chip.memory,
    }
    lines = [f"{name}: {value}" for name, value in fields.items()]
    compute = f"cuda_compute_capability {{ major: {capability // 10} minor: {capability % 10} {accelerated} }}"
    cudnn = "dnn_version_info { major: 9 minor: 10 patch: 0 }"
    return f'gpu_device_info {{ {" ".join(lines)} {compute} }} platform_name: "CUDA" {cudnn} device_description_str: "{target.name}"'
