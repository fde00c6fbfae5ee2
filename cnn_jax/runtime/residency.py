"""Whether a data set may lie on the devices, a whole copy on each.

Copies rather than shards: each device then gathers its own part of a batch from its own memory, so
no step sends an image, the program is the same on every mesh, and which examples a batch has
depends on no device. What a shard would save is little where a set is this small a share.
"""

from typing import Any

from jax.sharding import Mesh

from cnn_jax.runtime.accelerators import ACCELERATORS

RESIDENCIES = ("auto", "device", "host")

SHARE = 0.1
"""Of a device's memory, at most, unless the configuration says "device"."""

CPU_BYTES = 256 * 2**20
"""Likewise of this machine's memory, where CPUs are the devices: for all copies together."""

STEPS_PER_CALL = 10
"""Of a resident set on a TPU, where to start a program costs what a small step does."""


def fits(num_bytes: int, mesh: Mesh) -> bool:
    """Returns whether a copy of so many bytes on each device is small enough."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return num_bytes * len(mesh.local_devices or mesh.devices.flat) <= CPU_BYTES
    memory = _memory(device)
    return memory is not None and num_bytes <= SHARE * memory


def steps_per_call(asked: int, mesh: Mesh, *, at_most: int) -> int:
    """Returns the steps that a resident set takes in a call; `asked` is 0 for a choice by platform.

    On CPUs it is one: XLA's CPU compiler (jaxlib 0.10.2) brings a gradient's convolutions into the
    form that its fast kernels take only outside of loops, and inside takes 20 times as long. On
    GPUs too: XLA launches the kernels of a loop one by one, those outside as CUDA graphs.
    """
    if asked:
        return asked
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return max(1, min(STEPS_PER_CALL, at_most)) if on_tpu else 1


def _memory(device: Any) -> int | None:
    """Returns the bytes of a device, there or described; None where nobody says."""
    for accelerator in ACCELERATORS.values():
        if accelerator.kind == device.device_kind:
            return accelerator.memory
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (NotImplementedError, RuntimeError):  # of a described device
        return None
