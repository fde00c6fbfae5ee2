"""Sources: memory equals records, damage is named, the made-up images are what they say."""

import dataclasses
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from cnn_jax.data.bad_records import open_without_bad_records
from cnn_jax.data.builders.fashion_mnist import FashionMnist, FashionMnist10k
from cnn_jax.data.datasets import DATASETS, dataset_info, split_range
from cnn_jax.data.sources import (
    MemorySource,
    RecordSource,
    Selected,
    fingerprint,
    open_source,
)
from cnn_jax.errors import UserError


def open_subset(data_dir: Path, split: str = "train", **arguments):
    return open_source("fashion_mnist_10k", split, data_dir=str(data_dir), **arguments)


def test_data_sets_are_known_without_importing_tfds_or_grain():
    code = (
        "import sys, cnn_jax.data.sources, cnn_jax.data.pipeline;"
        "print({'tensorflow_datasets', 'grain', 'array_record', 'tensorflow'} & {*sys.modules})"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True
    )
    assert output.stdout == b"set()\n"


@pytest.mark.parametrize(
    ("name", "builder_class"),
    [("fashion_mnist", FashionMnist), ("fashion_mnist_10k", FashionMnist10k)],
)
def test_table_agrees_with_the_builders(name, builder_class, tmp_path):
    builder = builder_class(data_dir=tmp_path)
    info = DATASETS[name]
    assert info.name == name
    assert builder.info.features["image"].shape == info.image_shape
    assert tuple(builder.info.features["label"].names) == info.class_names
    assert len(info.class_names) == info.num_classes
    assert str(builder.version) == info.version


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(
        UserError,
        match=r"'fashion_mnits' \(did you mean 'fashion_mnist'\?\); there are .*synthetic",
    ):
        dataset_info("fashion_mnits")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ("train", range(10_000))),
        ("test", ("test", range(2_000))),
        ("train[:1000]", ("train", range(1000))),
        ("test[-10:]", ("test", range(1990, 2000))),
        ("train[10%:20%]", ("train", range(1000, 2000))),
    ],
)
def test_split_range(split, expected):
    assert split_range(DATASETS["fashion_mnist_10k"], split) == expected


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tarin", r"no split 'tarin' \(did you mean 'train'\?\); it has train, test"),
        (
            "train+test",
            r"adds up several splits; of \w+ one is taken, or one slice of it, such as ",
        ),
        ("train[:5]+test", r"'train\[:5\]\+test' adds up several splits"),
        ("train[", "not one slice"),
        ("train[:20000]", "not one slice"),
        ("train[5:5]", "has no examples"),
    ],
)
def test_bad_split(split, message):
    with pytest.raises(UserError, match=message):
        split_range(DATASETS["fashion_mnist_10k"], split)


def test_a_split_may_have_a_plus_in_its_name():
    info = dataclasses.replace(DATASETS["fashion_mnist_10k"], splits={"a+b": 100})
    assert split_range(info, "a+b") == ("a+b", range(100))
    with pytest.raises(UserError, match="adds up several splits"):
        split_range(info, "a+b+a+b")


def test_memory_limit_decides_the_kind(prepared_dir):
    """1,337 images of 28 by 28 bytes are less than a MiB, 1,338 are more."""
    assert isinstance(open_subset(prepared_dir, "test[:1337]", memory_limit_mb=1), MemorySource)
    assert isinstance(open_subset(prepared_dir, "test[:1338]", memory_limit_mb=1), RecordSource)


@pytest.mark.parametrize("split", ["test", "train[100:300]", "train[-3000:]"])
def test_records_equal_memory(prepared_dir, split):
    memory = open_subset(prepared_dir, split)
    records = open_subset(prepared_dir, split, memory_limit_mb=0)
    assert len(records) == len(memory) == len(split_range(memory.info, split)[1])
    indices = np.random.default_rng(0).integers(0, len(memory), 500)
    np.testing.assert_equal(records.batch(indices), memory.batch(indices))
    assert fingerprint(records, batch_size=8, seed=0) == fingerprint(memory, batch_size=8, seed=0)


@pytest.mark.parametrize("memory_limit_mb", [0, 100])
def test_classes_without_images(prepared_dir, memory_limit_mb):
    whole = open_subset(prepared_dir, "test[50:90]", memory_limit_mb=memory_limit_mb)
    held_out = Selected(whole, "some", np.array([3, 17, 39]))
    made_up = open_source("synthetic", "train[995:1005]")
    for source in (whole, held_out, made_up):
        indices = np.random.default_rng(0).permutation(len(source))
        np.testing.assert_array_equal(source.classes(indices), source.batch(indices)["label"])
    assert made_up.classes(np.arange(10)).tolist() == [*range(995, 1000), *range(5)]


def test_a_slice_is_that_part_of_the_whole(prepared_dir):
    whole = open_subset(prepared_dir).batch(np.arange(100, 300))
    np.testing.assert_equal(
        open_subset(prepared_dir, "train[100:300]").batch(np.arange(200)), whole
    )


def test_threads_share_a_record_source(prepared_dir):
    memory = open_subset(prepared_dir, "test")
    records = open_subset(prepared_dir, "test", memory_limit_mb=0)
    parts = np.random.default_rng(0).integers(0, len(memory), (32, 50))
    with ThreadPoolExecutor(8) as pool:
        for part, batch in zip(parts, pool.map(records.batch, parts), strict=True):
            np.testing.assert_equal(batch, memory.batch(part))


def readable(reader: ArrayRecordDataSource, index: int) -> bool:
    try:
        reader[index]
    except Exception:
        return False
    return True


@pytest.fixture
def damaged_train_shard(own_prepared_dir) -> tuple[Path, int]:
    """The path of a train shard in which one byte is flipped, and the record that it spoils."""
    (path,) = own_prepared_dir.rglob("*-train.array_record*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    reader = ArrayRecordDataSource([str(path)])
    (spoiled,) = [index for index in range(len(reader)) if not readable(reader, index)]
    return path, spoiled


def test_flipped_byte_names_file_and_record(own_prepared_dir, damaged_train_shard):
    path, spoiled = damaged_train_shard
    message = f"{re.escape(str(path))} is damaged: record {spoiled} cannot be read"
    with pytest.raises(UserError, match=message):
        open_subset(own_prepared_dir)
    with pytest.raises(UserError, match=message):
        open_subset(own_prepared_dir, f"train[{spoiled - 10}:]")

    records = open_subset(own_prepared_dir, memory_limit_mb=0)
    with pytest.raises(UserError, match=message):
        records.batch(np.array([0, spoiled, 5]))
    assert records.batch(np.array([0, spoiled + 1]))["image"].shape == (2, 28, 28, 1)


def test_damage_is_named_in_the_right_shard(own_prepared_dir, damaged_train_shard):
    path, spoiled = damaged_train_shard
    builder = FashionMnist10k(data_dir=own_prepared_dir)
    shards = builder.info.splits[f"test[50:90]+train[{spoiled - 3}:]"].file_instructions
    source = RecordSource(DATASETS["fashion_mnist_10k"], "", builder.info.features, shards)
    source.batch(np.arange(43))
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is damaged: record {spoiled} "):
        source.batch(np.arange(50))


def test_a_damaged_record_is_skipped_in_memory_as_on_disk(own_prepared_dir, damaged_train_shard):
    path, spoiled = damaged_train_shard
    for memory_limit_mb in (0, 64):
        lines = []
        source = open_without_bad_records(
            "fashion_mnist_10k",
            f"train[{spoiled - 3}:{spoiled + 5}]",
            data_dir=str(own_prepared_dir),
            memory_limit_mb=memory_limit_mb,
            log=lines.append,
        )
        labels = source.batch(np.arange(8))["label"]
        assert labels[3] == labels[4]
        assert source.is_good(np.arange(8)).tolist() == [i != 3 for i in range(8)]
        (line,) = lines
        assert f"{path} is damaged: record {spoiled} cannot be read" in line


@pytest.mark.parametrize("memory_limit_mb", [0, 64])
@pytest.mark.parametrize("length", [None, 0, 100, 1_000_000])
def test_missing_or_truncated_file_is_named_at_the_start(own_prepared_dir, length, memory_limit_mb):
    (path,) = own_prepared_dir.rglob("*-train.array_record*")
    whole = path.read_bytes()
    path.unlink()
    if length is not None:
        path.write_bytes(whole[:length])
    told = f"{re.escape(str(path))}, shard 0 of 1, is {'missing' if length is None else 'damaged'}"
    with pytest.raises(UserError, match=f"{told}.*; delete {re.escape(str(path.parent))}, and the"):
        open_subset(own_prepared_dir, memory_limit_mb=memory_limit_mb)


def test_fingerprint_tells_everything_that_matters(prepared_dir):
    source = open_subset(prepared_dir)
    first = fingerprint(source, batch_size=128, seed=3)
    assert json.loads(json.dumps(first)) == first
    assert {key: first[key] for key in first if key != "content"} == {
        "name": "fashion_mnist_10k",
        "version": "1.0.0",
        "split": "train",
        "num_examples": 10_000,
        "image_shape": [28, 28, 1],
        "num_classes": 10,
        "batch_size": 128,
        "seed": 3,
    }
    brighter = MemorySource(source.info, source.split, source.images | 1, source.labels)
    relabelled = MemorySource(source.info, source.split, source.images, 9 - source.labels)
    contents = [fingerprint(s, batch_size=1, seed=0)["content"] for s in (brighter, relabelled)]
    assert len({first["content"], *contents}) == 3


def test_synthetic_images_depend_on_their_number_alone():
    train = open_source("synthetic", "train")
    later = open_source("synthetic", "train[1000:1002]")
    test = open_source("synthetic", "test")
    assert (len(train), len(later), len(test)) == (1_281_167, 2, 50_000)

    batch = train.batch(np.array([1000, 7, 1000]))
    assert batch["image"].shape == (3, 224, 224, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][0], batch["image"][2])
    np.testing.assert_array_equal(later.batch(np.array([0]))["image"][0], batch["image"][0])
    assert not np.array_equal(batch["image"][1], test.batch(np.array([7]))["image"][0])


def test_synthetic_images_are_pinned():
    image = open_source("synthetic", "train").batch(np.array([12]))["image"][0]
    assert image[0, :3].tolist() == [[66, 146, 171], [174, 168, 176], [160, 170, 170]]


def test_synthetic_classes_can_be_learned():
    """An image is nearer to the mean of other images of its class than to any other mean."""
    source = open_source("synthetic", "train")
    classes = np.arange(5)
    images = [source.batch(classes + 1000 * k)["image"].astype(np.float64) for k in range(4)]
    means = np.mean(images[:3], axis=0)
    distances = [[np.square(image - mean).sum() for mean in means] for image in images[3]]
    assert np.argmin(distances, axis=1).tolist() == classes.tolist()
