"""The data sets by name, with what is known of each without preparing or importing anything."""

from collections.abc import Mapping
from dataclasses import dataclass

from cnn_jax.errors import UserError, nearest


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set holds: `image_shape` is (height, width, channels), `splits` their sizes."""

    name: str
    version: str
    image_shape: tuple[int, int, int]
    num_classes: int
    splits: Mapping[str, int]
    class_names: tuple[str, ...] = ()


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
    "synthetic": DatasetInfo(
        name="synthetic",
        version="1.0.0",
        image_shape=(224, 224, 3),
        num_classes=1000,
        splits={"train": 1_281_167, "test": 50_000},
    ),
}


def dataset_info(name: str) -> DatasetInfo:
    """Returns what is known of the data set `name`; an unknown one is a UserError with the list."""
    if name not in DATASETS:
        raise UserError(
            f"no data set is called {name!r}{nearest(name, DATASETS)}; "
            f"there are {', '.join(DATASETS)}"
        )
    return DATASETS[name]


def split_range(info: DatasetInfo, split: str) -> tuple[str, range]:
    """Returns a split's name and which of its examples `split` takes.

    `split` is a name or a TFDS slice of one, such as "train", "train[:1000]" or "test[10%:20%]".

    Raises:
      UserError: `split` is not one slice of one of the splits, or the slice is empty.
    """
    name = split.partition("[")[0]
    if name not in info.splits:
        raise UserError(
            f"{info.name} has no split {split!r}{nearest(name, info.splits)}; it has "
            f"{', '.join(info.splits)} and slices of them such as 'train[:1000]'"
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
