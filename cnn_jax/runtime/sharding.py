"""Where arrays live: one mesh with the axes `data` and `fsdp`, from one device to many hosts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax.typing import Batch

AXES = ("data", "fsdp")


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of all devices with axes `data` and `fsdp`; one size may be -1, the rest.

    The devices of a process follow one another, whatever the order they are given in: so its part
    of a batch is one piece, and `fsdp` gathers within a host where it can.

    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda device: device.process_index
    )
    known = max(data, 1) * max(fsdp, 1)
    sizes = [len(devices) // known if size == -1 else size for size in (data, fsdp)]
    if data == fsdp == -1 or min(sizes) < 1 or sizes[0] * sizes[1] != len(devices):
        raise ValueError(
            f"data={data}, fsdp={fsdp}: must multiply to the number of devices, {len(devices)}; "
            "one of them may be -1, the rest"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def describe_mesh(mesh: Mesh) -> str:
    """Returns such as `data 2, fsdp 4`."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that gives every device the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that divides the first axis among all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shard_state(mesh: Mesh, abstract_state: Any) -> Any:
    """Returns the abstract state with a sharding on every array.

    With `fsdp` > 1 each array is divided along its longest axis that `fsdp` divides (parameters and
    optimiser state alike; XLA gathers them where they are used); all others are replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        spec: list[str | None] = [None] * leaf.ndim
        divisible = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % fsdp == 0]
        if fsdp > 1 and divisible:
            spec[max(divisible, key=lambda axis: leaf.shape[axis])] = "fsdp"
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract_state)


def shard_rows(mesh: Mesh, abstract: Any) -> Any:
    """Returns abstract arrays with a sharding: those of two axes are divided along the first.

    Each device has one row, of as many as there are devices; all others are replicated.
    """
    rows, all_of_it = batch_sharding(mesh), replicated(mesh)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = rows if leaf.ndim == 2 else all_of_it
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, abstract)


def to_devices(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> Batch:
    """Returns this process's part of a batch as global arrays on the devices."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
