"""The data sets by name, with what is known of each before anything is prepared or decoded."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cnn_jax.errors import UserError, nearest
from cnn_jax.storage import place


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set holds: `image_shape` is (height, width, channels), `splits` their sizes.

    Images that come in many sizes, `has_one_size` False, are cropped to the shape when read.
    """

    name: str
    version: str
    image_shape: tuple[int, int, int]
    num_classes: int
    splits: Mapping[str, int]
    class_names: tuple[str, ...] = ()
    has_one_size: bool = True

    @property
    def shown_names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers where there are no names."""
        return self.class_names or tuple(map(str, range(self.num_classes)))


FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

DATASETS = {
    "fashion_mnist": DatasetInfo(
        name="fashion_mnist",
        version="1.0.0",
        image_shape=(28, 28, 1),
        num_classes=10,
        splits={"train": 60_000, "test": 10_000},
        class_names=FASHION_MNIST_CLASSES,
    ),
    "fashion_mnist_10k": DatasetInfo(
        name="fashion_mnist_10k",
        version="1.0.0",
        image_shape=(28, 28, 1),
        num_classes=10,
        splits={"train": 10_000, "test": 2_000},
        class_names=FASHION_MNIST_CLASSES,
    ),
    # Of TFDS: a version, its splits and class names as it prepares them.
    "mnist": DatasetInfo(
        name="mnist",
        version="3.0.1",
        image_shape=(28, 28, 1),
        num_classes=10,
        splits={"train": 60_000, "test": 10_000},
        class_names=tuple("0123456789"),
    ),
    "cifar10": DatasetInfo(
        name="cifar10",
        version="3.0.2",
        image_shape=(32, 32, 3),
        num_classes=10,
        splits={"train": 50_000, "test": 10_000},
        class_names=CIFAR10_CLASSES,
    ),
    "cifar100": DatasetInfo(
        name="cifar100",
        version="3.0.2",
        image_shape=(32, 32, 3),
        num_classes=100,
        splits={"train": 50_000, "test": 10_000},
    ),
    "oxford_flowers102": DatasetInfo(
        name="oxford_flowers102",
        version="2.1.1",
        image_shape=(224, 224, 3),
        num_classes=102,
        splits={"train": 1_020, "validation": 1_020, "test": 6_149},
        has_one_size=False,
    ),
    "imagenet2012": DatasetInfo(
        name="imagenet2012",
        version="5.1.0",
        image_shape=(224, 224, 3),
        num_classes=1000,
        splits={"train": 1_281_167, "validation": 50_000},
        has_one_size=False,
    ),
    "synthetic": DatasetInfo(
        name="synthetic",
        version="1.0.0",
        image_shape=(224, 224, 3),
        num_classes=1000,
        splits={"train": 1_281_167, "test": 50_000},
    ),
}


FOUND = ("folder", "csv", "tar", "records", "tfds")
"""Kinds of data sets of which nothing is known but what is found at `source_dir`."""

NAMES = (*DATASETS, *FOUND)


def dataset_info(
    name: str, *, data_dir: str = "", source_dir: str = "", image_size: int = 0
) -> DatasetInfo:
    """Returns what is known of the data set `name`, of `FOUND` what is found at `source_dir`.

    Images of many sizes become squares of `image_size` pixels, 0 being 224; others keep theirs.

    Raises:
      UserError: there is no such data set, or no such images at `source_dir`; an `image_size` for a
        data set whose images are all of another one.
    """
    if name in FOUND:
        from cnn_jax.data.finding import found_info

        info = found_info(name, source_dir=source_dir, data_dir=data_dir)
    elif name in DATASETS:
        info = DATASETS[name]
    else:
        raise UserError(
            f"no data set is called {name!r}{nearest(name, NAMES)}; there are {', '.join(NAMES)}"
        )
    if not image_size or info.image_shape[:2] == (image_size, image_size):
        return info
    if info.has_one_size:
        height, width, _ = info.image_shape
        raise UserError(f"the images of {name} are all of {height} x {width} pixels; leave it at 0")
    return dataclasses.replace(info, image_shape=(image_size, image_size, info.image_shape[-1]))


def directory_of_sets(data_dir: str) -> Path:
    """Returns where prepared data sets are kept: `data_dir`, or TFDS's own choice if it is ""."""
    default = os.environ.get("TFDS_DATA_DIR", os.path.join("~", "tensorflow_datasets"))
    return place(data_dir or default)


def split_range(info: DatasetInfo, split: str) -> tuple[str, range]:
    """Returns a split's name and which of its examples `split` takes.

    `split` is a name or a TFDS slice of one, such as "train", "train[:1000]" or "test[10%:20%]".

    Raises:
      UserError: `split` is not one slice of one of the splits, or the slice is empty.
    """
    name = split.partition("[")[0]
    if "+" in (split[len(name) :] if name in info.splits else split):
        raise UserError(
            f"{split!r} adds up several splits; of {info.name} one is taken, or one slice of it, "
            f"such as {next(iter(info.splits))}[:1000]"
        )
    if name not in info.splits:
        raise UserError(
            f"{info.name} has no split {split!r}{nearest(name, info.splits)}; it has "
            f"{', '.join(info.splits)} and slices of them such as 'train[:1000]'"
            + (
                ""
                if len(info.splits) > 1
                else "; hold out a part: train[:90%] and train[90%:], or data.holdout=10"
            )
        )
    examples = range(info.splits[name])
    if split != name:
        examples = _slice(info, name, split)
    if not examples:
        raise UserError(f"the split {split!r} of {info.name} has no examples")
    return name, examples


def _slice(info: DatasetInfo, name: str, split: str) -> range:
    import tensorflow_datasets as tfds

    whole = tfds.core.SplitInfo(name=name, shard_lengths=[info.splits[name]], num_bytes=0)
    try:
        (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({name: whole})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{split!r} is not one slice, such as {name}[:1000] or {name}[10%:20%], of the "
            f"{info.splits[name]} examples of {info.name}"
        ) from error
    return range(part.from_ or 0, info.splits[name] if part.to is None else part.to)
