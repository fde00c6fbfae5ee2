"""Sources: the examples of one split, by number, from memory, records or images, or made up."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cnn_jax.data.datasets import DatasetInfo, dataset_info, split_range
from cnn_jax.data.found_images import EncodedImages
from cnn_jax.data.holdout import Part
from cnn_jax.data.record_files import RecordFiles
from cnn_jax.data.stages import DECODING, READING, Stages
from cnn_jax.errors import UserError

OWN_BUILDERS = ("fashion_mnist", "fashion_mnist_10k")
"""Data sets that this package prepares itself."""


@runtime_checkable
class Source(Protocol):
    """The examples of one split; safe to use from many threads."""

    @property
    def info(self) -> DatasetInfo: ...

    @property
    def split(self) -> str: ...

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns `image` uint8 [n h w c] and `label` int32 [n] of the numbered examples.

        With `epochs`, int [n], images of many sizes are cropped at random, each as its epoch and
        number say; without, and in all other sources, an example is always the same.

        Raises:
          UserError: a record is damaged; the message names its file and its index in it.
        """
        ...

    def classes(self, indices: np.ndarray) -> np.ndarray:
        """Returns the numbered examples' classes, int [n], as noted; decodes no image.

        One may be out of range, and is -1 where the record is damaged.
        """
        ...


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str = "",
    source_dir: str = "",
    part: Part | None = None,
    memory_limit_mb: int = 1024,
    crops: "Crops | None" = None,
    stages: Stages | None = None,
    log: Callable[[str], None] = print,
) -> Source:
    """Returns the examples of `split` of the data set `name`, prepared first if need be.

    Args:
      split: a name or a TFDS slice of one, such as "train" or "train[:1000]".
      data_dir: where prepared data sets are kept; "" is TFDS's own choice, `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      source_dir: the directory of the data set's original files, for one that needs them.
      part: what is taken of the split, by default all of it.
      memory_limit_mb: a split whose decoded images fit in this many MiB is read into memory once,
        if they are all of one size.
      crops: how images of many sizes become those of `Crops.image_size`, by default of 224 pixels.
      stages: receives what reading and decoding take, of a source that does them when asked.
      log: receives one line when there is something to prepare.

    Raises:
      UserError: unknown name or split; the original files are missing or wrong; the data set
        cannot be written or is damaged.
    """
    crops, stages = crops or Crops(), stages or Stages()
    info = dataset_info(name, data_dir=data_dir, source_dir=source_dir, image_size=crops.image_size)
    split_name, examples = split_range(info, split)
    if name == "synthetic":
        return _taken(SyntheticSource(info, split, split_name, examples), part)
    if name in OWN_BUILDERS:
        records = _open_records(info, split, split_name, data_dir, source_dir, log)
    else:
        from cnn_jax.data.finding import open_found

        opened = open_found(info, split, data_dir=data_dir, source_dir=source_dir)
        if not isinstance(opened, RecordSource):
            return _taken(ImageSource(opened, crops, stages), part)
        records = opened
    taken = _taken(records, part)
    if len(taken) * math.prod(info.image_shape) <= memory_limit_mb * 2**20:
        return read_into_memory(taken)
    records.stages = stages
    return taken


def _taken(source: "Source", part: Part | None) -> "Source":
    """Returns the part of a source."""
    if part is None:
        return source
    numbers, split = part.numbers(len(source)), part.name(source.split)
    if isinstance(source, ImageSource):
        return source.select(numbers, split)
    return Selected(source, split, numbers)


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
class Crops:
    """How images of many sizes become those of one.

    Attributes:
      image_size: pixels of a side; 0 is the data set's own.
      seed: decides, with the epoch and the number of an example, its random crop.
      min_area: the least share of an image's area that a random crop takes.
      eval_fraction: the central crop's side as a share of the image's shorter side.
    """

    image_size: int = 0
    seed: int = 0
    min_area: float = 0.08
    eval_fraction: float = 0.875


@dataclass(frozen=True)
class MemorySource:
    """Decoded examples in memory."""

    info: DatasetInfo
    split: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        del epochs
        return {"image": self.images[indices], "label": self.labels[indices]}

    def classes(self, indices: np.ndarray) -> np.ndarray:
        return self.labels[indices]


@dataclass(frozen=True)
class Selected:
    """The examples of a source that `numbers` name, in that order."""

    source: Source
    split: str
    numbers: np.ndarray

    @property
    def info(self) -> DatasetInfo:
        return self.source.info

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return self.source.batch(self.numbers[indices], epochs)

    def classes(self, indices: np.ndarray) -> np.ndarray:
        return self.source.classes(self.numbers[indices])


@dataclass(frozen=True)
class SyntheticSource:
    """Images made up from their number alone: a coarse pattern of their class under noise."""

    info: DatasetInfo
    split: str
    split_name: str
    examples: range

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        del epochs
        numbers = self.examples.start + np.asarray(indices, np.int64)
        labels = self.classes(indices).astype(np.int32)
        images = np.empty((len(numbers), *self.info.image_shape), np.uint8)
        for image, number, label in zip(images, numbers, labels, strict=True):
            image[:] = self._noise(int(number)) // 2 + self._pattern(int(label))
        return {"image": images, "label": labels}

    def classes(self, indices: np.ndarray) -> np.ndarray:
        return (self.examples.start + np.asarray(indices, np.int64)) % self.info.num_classes

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


@dataclass(frozen=True)
class Images:
    """The encoded images of a split: of all that `encoded` has, those that `examples` number."""

    info: DatasetInfo
    split: str
    encoded: EncodedImages
    examples: Sequence[int]


class ImageSource:
    """Encoded images, decoded and cropped when asked for."""

    def __init__(self, images: Images, crops: Crops, stages: Stages | None = None):
        # Now rather than in a thread, where an import can meet tensorflow_datasets' own.
        from cnn_jax.data import images as decoding

        self.info = images.info
        self.split = images.split
        self._images = images
        self._crops = crops
        self._stages = stages or Stages()
        self._decoding = decoding

    def __len__(self) -> int:
        return len(self._images.examples)

    def select(self, numbers: np.ndarray, split: str) -> "ImageSource":
        """Returns a source of those that `numbers` name, in that order."""
        examples = [self._images.examples[number] for number in numbers.tolist()]
        images = dataclasses.replace(self._images, split=split, examples=examples)
        return ImageSource(images, self._crops, self._stages)

    def resized(self, image_size: int) -> "ImageSource":
        """Returns the same examples, as squares of `image_size` pixels."""
        shape = (image_size, image_size, self.info.image_shape[-1])
        info = dataclasses.replace(self.info, image_shape=shape)
        images = dataclasses.replace(self._images, info=info)
        return ImageSource(images, self._crops, self._stages)

    def name(self, index: int) -> str:
        """Returns where the numbered example is, for a person to find it."""
        return self._images.encoded.name(self._images.examples[index])

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the numbered example's encoded image and its class.

        Raises OSError or ValueError for damage.
        """
        data, label = self._images.encoded.read(self._images.examples[index])
        if not 0 <= label < self.info.num_classes:
            raise ValueError(f"label {label}: must be 0 to {self.info.num_classes - 1}")
        return data, label

    def batch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        numbers = np.asarray(indices).tolist()
        images = np.empty((len(numbers), *self.info.image_shape), np.uint8)
        labels = np.empty(len(numbers), np.int32)
        for place, index in enumerate(numbers):
            try:
                with self._stages.measure(READING):
                    data, labels[place] = self.read(index)
                with self._stages.measure(DECODING):
                    if epochs is None:
                        fraction = self._crops.eval_fraction
                        self._decoding.crop_center(data, images[place], fraction=fraction)
                    else:
                        box_of = self._box_of(index, int(epochs[place]))
                        self._decoding.crop(data, box_of, images[place])
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{self.name(index)}: {error} (example {index} of {self.split})"
                ) from error
        return {"image": images, "label": labels}

    def classes(self, indices: np.ndarray) -> np.ndarray:
        numbers = [self._images.examples[index] for index in indices.tolist()]
        return self._images.encoded.classes(np.array(numbers))

    def _box_of(self, index: int, epoch: int) -> Callable[[int, int], Any]:
        return functools.partial(
            self._decoding.random_box,
            seed=self._crops.seed,
            epoch=epoch,
            index=index,
            min_area=self._crops.min_area,
        )


class RecordSource:
    """Examples in array_record files, read when asked for."""

    def __init__(self, info: DatasetInfo, split: str, features: Any, shards: list[Any]):
        """`features` decode a record; `shards` are the TFDS file instructions of the split.

        Raises UserError where a file is missing, damaged, or holds another number of records.
        """
        self.info = info
        self.split = split
        self._features = features
        self._records = RecordFiles(shards)
        self.stages = Stages()

    def __len__(self) -> int:
        return len(self._records)

    def batch(self, indices: np.ndarray, epochs: np.ndarray | None = None) -> dict[str, np.ndarray]:
        del epochs
        try:
            with self.stages.measure(READING):
                records = self._records.many(indices.tolist())
            with self.stages.measure(DECODING):
                examples = [self._features.deserialize_example_np(record) for record in records]
        except Exception:  # whichever way it failed, find the record
            examples = [self._example(int(index)) for index in indices]
        return {
            "image": np.stack([example["image"] for example in examples]),
            "label": np.array([example["label"] for example in examples], np.int32),
        }

    def classes(self, indices: np.ndarray) -> np.ndarray:
        return self._records.classes(indices, functools.partial(class_in_record, self._features))

    def _example(self, index: int) -> dict[str, Any]:
        try:
            return self._features.deserialize_example_np(*self._records.many([index]))
        except Exception as error:
            file, number = self._records.place(index)
            raise UserError(
                f"{file} is damaged: record {number} cannot be read ({error}); "
                "delete the directory it is in, and the data set is prepared again"
            ) from error


def class_in_record(features: Any, record: bytes) -> int:
    """Returns the class in a record of TFDS, without decoding its image."""
    import tensorflow_datasets as tfds

    undecoded = {"image": tfds.decode.SkipDecoding()}
    return int(features.deserialize_example_np(record, decoders=undecoded)["label"])


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
    try:
        return RecordSource(info, split, builder.info.features, shards)
    except UserError as error:
        again = f"delete {builder.data_path}, and the data set is prepared again"
        raise UserError(f"{error}; {again}") from error


def read_into_memory(records: Source) -> MemorySource:
    """Returns the same examples, decoded in memory."""
    images = np.empty((len(records), *records.info.image_shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), 1024):
        part = slice(start, start + 1024)
        batch = records.batch(np.arange(start, min(start + 1024, len(records))))
        images[part], labels[part] = batch["image"], batch["label"]
    return MemorySource(records.info, records.split, images, labels)
