"""Accelerators as their makers publish them: arithmetic, memory and links."""

from dataclasses import dataclass
from typing import Literal

GIB, MIB = 2**30, 2**20
GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Chip:
    """The published peaks of one device."""

    kind: Literal["gpu", "tpu"]
    flops: float  # dense bf16 FLOP/s, accumulated in float32
    memory: int  # bytes
    bandwidth: float  # bytes/s of that memory
    link: str
    link_bandwidth: float  # bytes/s sent while receiving as much, inside a host or a TPU slice
    network_bandwidth: float  # the same between hosts; 0 for a chip that is planned on one host only
    source: str
    reserved: int  # bytes that programs cannot use: the runtime, buffers of collectives, cuDNN's workspace
    gpu: tuple[int, int, int] = (0, 0, 0)  # compute capability * 10, cores and bytes of L2 cache, for a GPU's compiler
    topology: str = ""  # the name of a TPU for its compiler


# Name, bytes/s inside a host, bytes/s between hosts.
PCIE4 = ("PCIe 4.0 x16", 32e9, 0)
NVLINK3 = ("NVLink 3", 300e9, 25e9)
NVLINK4 = ("NVLink 4", 450e9, 50e9)


def make_gpu(
    flops: float, memory: int, bandwidth: float, link: tuple[str, float, float], gpu: tuple[int, int, int], source: str
) -> Chip:
    return Chip("gpu", flops, memory, bandwidth, *link, source, reserved=3 * GIB, gpu=gpu)


def make_tpu(name: str, flops: float, memory: int, bandwidth: float, ici: float, topology: str) -> Chip:
    """`ici` is both directions of the links along one axis of the slice, which one ring of a collective uses."""
    source = f"Google Cloud TPU {name} page; links: How to Scale Your Model, chapter 2"
    return Chip("tpu", flops, memory, bandwidth, "ICI", ici, 0, source, reserved=GIB // 4, topology=topology)


AMPERE, ADA = "NVIDIA Ampere GA102 whitepaper, table 9", "NVIDIA Ada GPU architecture whitepaper, table 2"
A6000 = "NVIDIA RTX A6000 datasheet (half of its figure with sparsity)"
A100, H100, H200 = (f"NVIDIA {name} datasheet (SXM)" for name in ("A100", "H100", "H200"))

# Memory is what the driver reports if XLA's own device descriptions list it, otherwise the nominal size.
CHIPS: dict[str, Chip] = {
    "rtx3090": make_gpu(71e12, 24 * GIB, 936e9, PCIE4, (86, 82, 6 * MIB), AMPERE),
    "rtx4090": make_gpu(165.2e12, 24564 * MIB, 1008e9, PCIE4, (89, 128, 72 * MIB), ADA),
    "a6000": make_gpu(154.8e12, 51_041_271_808, 768e9, PCIE4, (86, 84, 6 * MIB), A6000),
    "l40s": make_gpu(362e12, 48 * GIB, 864e9, PCIE4, (89, 142, 96 * MIB), "NVIDIA L40S datasheet"),
    "a100-40gb": make_gpu(312e12, 42_331_013_120, 1555e9, NVLINK3, (80, 108, 40 * MIB), A100),
    "a100": make_gpu(312e12, 85_100_068_864, 2039e9, NVLINK3, (80, 108, 40 * MIB), A100),
    "h100": make_gpu(989e12, 84_942_979_072, 3350e9, NVLINK4, (90, 132, 50 * MIB), H100),
    "h200": make_gpu(989e12, 151_397_597_184, 4800e9, NVLINK4, (90, 132, 50 * MIB), H200),
    "v4": make_tpu("v4", 275e12, 32 * GIB, 1228e9, 90e9, topology="v4"),
    "v5e": make_tpu("v5e", 197e12, 16 * GIB, 819e9, 90e9, topology="v5e"),
    "v5p": make_tpu("v5p", 459e12, 95 * GIB, 2765e9, 180e9, topology="v5"),
    "v6e": make_tpu("v6e", 918e12, 32 * GIB, 1640e9, 180e9, topology="v6e"),
}

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
"""The chip behind each `device_kind` of jax."""


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by jax's name for it; None if the table has no such device."""
    return CHIPS[DEVICE_KINDS[device_kind]].flops if device_kind in DEVICE_KINDS else None
