"""Meshes, the places of the state's arrays, and batches on their way to the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cnn_jax.runtime.sharding import batch_sharding, make_mesh, replicated, shard_state, to_devices


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({}, (8, 1)),
        ({"data": 8}, (8, 1)),
        ({"fsdp": 8}, (1, 8)),
        ({"fsdp": 2}, (4, 2)),
        ({"data": 4, "fsdp": 2}, (4, 2)),
        ({"data": 2, "fsdp": -1}, (2, 4)),
    ],
)
def test_make_mesh_of_all_devices(arguments, sizes):
    mesh = make_mesh(**arguments)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == sizes
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_make_mesh_of_given_devices():
    devices = jax.devices()[2:5]
    mesh = make_mesh(devices=devices)
    assert mesh.devices.shape == (3, 1)
    assert mesh.devices.ravel().tolist() == devices


@pytest.mark.parametrize(
    ("data", "fsdp"), [(3, 1), (4, 1), (4, 4), (-1, 3), (16, -1), (-1, -1), (0, 8), (8, 0), (-1, 0)]
)
def test_make_mesh_refuses_sizes_that_do_not_multiply_to_the_devices(data, fsdp):
    message = f"data={data}, fsdp={fsdp}: must multiply to the number of devices, 8"
    with pytest.raises(ValueError, match=message):
        make_mesh(data=data, fsdp=fsdp)


SHAPES = {  # of an array: the axis that fsdp=2 divides, and the axis that fsdp=8 divides
    (): (None, None),
    (3,): (None, None),
    (6,): (0, None),
    (64,): (0, 0),
    (3, 3, 16, 32): (3, 3),
    (3, 3, 32, 16): (2, 2),
    (1, 1, 16, 16): (2, 2),
    (3, 3, 1, 5): (None, None),
    (4, 9): (0, None),
    (12, 10, 8): (0, 2),
}


@pytest.mark.parametrize(("fsdp", "column"), [(2, 0), (8, 1)])
def test_shard_state_divides_the_longest_axis_that_fsdp_divides(fsdp, column):
    mesh = make_mesh(fsdp=fsdp)
    arrays = [np.arange(np.prod(shape, dtype=int)).reshape(shape) for shape in SHAPES]
    abstract = [jax.ShapeDtypeStruct(array.shape, jnp.int32) for array in arrays]
    for array, leaf, axes in zip(arrays, shard_state(mesh, abstract), SHAPES.values(), strict=True):
        part = list(array.shape)
        if axes[column] is not None:
            part[axes[column]] //= fsdp
        placed = jax.device_put(array.astype(np.int32), leaf.sharding)
        assert (leaf.shape, leaf.dtype) == (array.shape, jnp.int32)
        assert {shard.data.shape for shard in placed.addressable_shards} == {tuple(part)}
        assert len(placed.addressable_shards) == 8
        np.testing.assert_array_equal(placed, array)


def test_shard_state_without_fsdp_replicates_everything_and_keeps_the_tree():
    tree = {"a": (jnp.zeros((8, 8)), {}), "b": [jnp.zeros((), jnp.int32)]}
    sharded = shard_state(make_mesh(), tree)
    assert jax.tree.structure(sharded) == jax.tree.structure(tree)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_to_devices_gives_each_device_its_share_in_order(fsdp):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(16, 3, 3, 1), dtype=np.uint8),
        "label": rng.integers(10, size=16, dtype=np.int32),
        "mask": np.ones(16, np.float32),
    }
    mesh = make_mesh(fsdp=fsdp)
    placed = to_devices(batch, batch_sharding(mesh))
    assert placed.keys() == batch.keys()
    for name, array in placed.items():
        assert array.sharding.spec == PartitionSpec(("data", "fsdp"))
        assert array.dtype == batch[name].dtype
        np.testing.assert_array_equal(array, batch[name])
        for number, device in enumerate(mesh.devices.ravel()):
            (shard,) = (each for each in array.addressable_shards if each.device == device)
            np.testing.assert_array_equal(shard.data, batch[name][2 * number : 2 * number + 2])


def test_replicated_gives_every_device_the_whole_array():
    batch = {"mean": np.arange(6, dtype=np.float32)}
    placed = to_devices(batch, replicated(make_mesh(fsdp=2)))["mean"]
    assert len(placed.addressable_shards) == 8
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, batch["mean"])
