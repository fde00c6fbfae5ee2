"""Sources: the examples of one split, by number, from memory, from records or made up."""

import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cnn_jax.data.datasets import DatasetInfo, dataset_info, split_range
from cnn_jax.errors import UserError


@runtime_checkable
class Source(Protocol):
    """The examples of one split; safe to use from many threads."""

    @property
    def info(self) -> DatasetInfo: ...

    @property
    def split(self) -> str: ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns `image` uint8 [n h w c] and `label` int32 [n] of the numbered examples.

        Raises:
          UserError: a record is damaged; the message names its file and its index in it.
        """
        ...


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str = "",
    source_dir: str = "",
    memory_limit_mb: int = 1024,
    log: Callable[[str], None] = print,
) -> Source:
    """Returns the examples of `split` of the data set `name`, prepared first if need be.

    Args:
      split: a name or a TFDS slice of one, such as "train" or "train[:1000]".
      data_dir: where prepared data sets are kept; "" is TFDS's own choice, `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      source_dir: the directory of the data set's original files, for one that needs them.
      memory_limit_mb: a split whose decoded images fit in this many MiB is read into memory once.
      log: receives one line when there is something to prepare.

    Raises:
      UserError: unknown name or split; the original files are missing or wrong; the data set
        cannot be written or is damaged.
    """
    info = dataset_info(name)
    split_name, examples = split_range(info, split)
    if name == "synthetic":
        return SyntheticSource(info, split, split_name, examples)
    records = _open_records(info, split, split_name, data_dir, source_dir, log)
    if len(records) * math.prod(info.image_shape) <= memory_limit_mb * 2**20:
        return read_into_memory(records)
    return records


def fingerprint(source: Source, *, batch_size: int, seed: int) -> dict[str, Any]:
    """Returns, as JSON values, all that decides which examples a step trains on.

    `content` is the SHA-256 of 64 examples spread evenly over the split, the same for a split in
    memory and on disk.
    """
    sample = source.batch(np.linspace(0, len(source) - 1, num=64).astype(np.int64))
    content = hashlib.sha256(sample["image"].tobytes() + sample["label"].astype("<i4").tobytes())
    return {
        "name": source.info.name,
        "version": source.info.version,
        "split": source.split,
        "num_examples": len(source),
        "image_shape": list(source.info.image_shape),
        "num_classes": source.info.num_classes,
        "batch_size": batch_size,
        "seed": seed,
        "content": content.hexdigest(),
    }


@dataclass(frozen=True)
class MemorySource:
    """Decoded examples in memory."""

    info: DatasetInfo
    split: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.images[indices], "label": self.labels[indices]}


@dataclass(frozen=True)
class SyntheticSource:
    """Images made up from their number alone: a coarse pattern of their class under noise."""

    info: DatasetInfo
    split: str
    split_name: str
    examples: range

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        numbers = self.examples.start + np.asarray(indices, np.int64)
        labels = (numbers % self.info.num_classes).astype(np.int32)
        images = np.empty((len(numbers), *self.info.image_shape), np.uint8)
        for image, number, label in zip(images, numbers, labels, strict=True):
            image[:] = self._noise(int(number)) // 2 + self._pattern(int(label))
        return {"image": images, "label": labels}

    def _noise(self, number: int) -> np.ndarray:
        stream = list(self.info.splits).index(self.split_name)
        return _random_bytes(self.info.image_shape, key=(stream, number))

    def _pattern(self, label: int) -> np.ndarray:
        height, width, channels = self.info.image_shape
        coarse = _random_bytes((7, 7, channels), key=(len(self.info.splits), label)) // 2
        return coarse.repeat(height // 7, axis=0).repeat(width // 7, axis=1)


def _random_bytes(shape: tuple[int, ...], key: tuple[int, int]) -> np.ndarray:
    # NumPy keeps the raw stream of a bit generator for ever, the methods of Generator not.
    size = math.prod(shape)
    raw = np.random.Philox(key=np.array(key, np.uint64)).random_raw(-(-size // 8))
    return raw.astype("<u8", copy=False).view(np.uint8)[:size].reshape(shape)


class RecordSource:
    """Examples in array_record files, read when asked for."""

    def __init__(self, info: DatasetInfo, split: str, features: Any, shards: list[Any]):
        """`features` decode a record; `shards` are the TFDS file instructions of the split."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.info = info
        self.split = split
        self._features = features
        self._shards = shards
        self._ends = list(itertools.accumulate(shard.take for shard in shards))
        self._records = ArrayRecordDataSource(shards)

    def __len__(self) -> int:
        return self._ends[-1]

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        try:
            records = self._records.__getitems__(indices.tolist())
            examples = [self._features.deserialize_example_np(record) for record in records]
        except Exception:  # whichever way it failed, find the record
            examples = [self._example(int(index)) for index in indices]
        return {
            "image": np.stack([example["image"] for example in examples]),
            "label": np.array([example["label"] for example in examples], np.int32),
        }

    def _example(self, index: int) -> dict[str, Any]:
        try:
            return self._features.deserialize_example_np(self._records[index])
        except Exception as error:
            shard_number = bisect_right(self._ends, index)
            shard = self._shards[shard_number]
            position = index - self._ends[shard_number] + shard.take + shard.skip
            raise UserError(
                f"{shard.filename} is damaged: record {position} cannot be read ({error}); "
                "delete the directory it is in, and the data set is prepared again"
            ) from error


def _open_records(
    info: DatasetInfo,
    split: str,
    split_name: str,
    data_dir: str,
    source_dir: str,
    log: Callable[[str], None],
) -> RecordSource:
    from cnn_jax.data.builders.fashion_mnist import FashionMnist, FashionMnist10k
    from cnn_jax.data.preparing import prepared_builder

    if info.name == "fashion_mnist":
        builder = prepared_builder(FashionMnist, data_dir=data_dir, log=log, source_dir=source_dir)
    else:
        builder = prepared_builder(FashionMnist10k, data_dir=data_dir, log=log)
    if builder.info.splits[split_name].num_examples != info.splits[split_name]:
        raise UserError(f"{builder.data_path} does not hold {info.splits[split_name]} examples")
    shards = builder.info.splits[split].file_instructions
    return RecordSource(info, split, builder.info.features, shards)


def read_into_memory(records: Source) -> MemorySource:
    """Returns the same examples, decoded in memory."""
    images = np.empty((len(records), *records.info.image_shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), 1024):
        part = slice(start, start + 1024)
        batch = records.batch(np.arange(start, min(start + 1024, len(records))))
        images[part], labels[part] = batch["image"], batch["label"]
    return MemorySource(records.info, records.split, images, labels)
