"""Data sets that are found rather than made: their facts and their examples."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnn_jax.data.datasets import DATASETS, DatasetInfo, directory_of_sets, split_range
from cnn_jax.data.found_images import Found, find_images
from cnn_jax.data.record_files import RecordFiles
from cnn_jax.data.sources import Images, RecordSource, class_in_record
from cnn_jax.errors import UserError
from cnn_jax.storage import absolute, cache, is_remote, local_copy, place, reason

IMAGE_SHAPE = (224, 224, 3)
"""Of images of many sizes, unless the configuration says another."""


_OF_IMAGES = ("folder", "csv", "tar", "records")


def found_info(name: str, *, source_dir: str, data_dir: str) -> DatasetInfo:
    """Returns what is found at `source_dir`, of one of the kinds of `datasets.FOUND`.

    Raises UserError where nothing of the kind is there.
    """
    if not source_dir:
        what = {"csv": "the table", "tfds": "the data set's directory NAME/VERSION"}
        raise UserError(
            f"data.name = {name!r} needs data.source_dir, the path of "
            f"{what.get(name, 'the directory')}"
        )
    source = place(source_dir)
    if name == "tfds":
        whole = source if is_remote(source) else source.resolve()
        return _tfds_info(_builder(source), name=whole.parent.name)
    found = _found(name, source, data_dir)
    return DatasetInfo(
        name=name,
        version="1.0.0",
        image_shape=IMAGE_SHAPE,
        num_classes=len(found.class_names),
        splits={split: len(images) for split, images in found.splits.items()},
        class_names=found.class_names,
        has_one_size=False,
    )


def open_found(
    info: DatasetInfo, split: str, *, data_dir: str, source_dir: str
) -> Images | RecordSource:
    """Returns the examples of `split`: encoded images, or records of images of one size.

    Raises UserError where a file of the split is missing, or the data set is not prepared; the
    message says how to get it.
    """
    split_name, examples = split_range(info, split)
    if info.name in _OF_IMAGES:
        found = _found(info.name, place(source_dir), data_dir)
        return Images(info, split, found.splits[split_name], examples)
    directory = place(source_dir)
    if info.name in DATASETS:
        directory = _prepared_directory(info, data_dir)
    return _open_tfds(info, split, split_name, _builder(directory))


def passed_over(name: str, *, source_dir: str, data_dir: str) -> Sequence[tuple[str, str]]:
    """Returns the path of each thing at `source_dir` that is read for no image, and why."""
    if name not in _OF_IMAGES:
        return ()
    return _found(name, place(source_dir), data_dir).passed_over


def _found(kind: str, source: Path, data_dir: str) -> Found:
    if kind == "records":
        from cnn_jax.data.resized_records import find_records

        return find_records(local_copy(source))
    sets = directory_of_sets(data_dir)
    index_dir = cache() / "index" if is_remote(sets) else sets / ".cnn_jax_index"
    known_as = str(absolute(source))
    source = local_copy(source) if kind == "tar" else absolute(source)
    try:
        return find_images(kind, source, index_dir, known_as)
    except UserError:
        raise
    except Exception as error:
        if not is_remote(source):
            raise
        raise UserError(f"{source} cannot be read: {reason(error)}") from error


def _prepared_directory(info: DatasetInfo, data_dir: str) -> Path:
    root = directory_of_sets(data_dir) / info.name
    directory = root / info.version
    if not directory.is_dir():
        others = sorted(path.name for path in root.glob("[0-9]*") if path.is_dir())
        raise UserError(
            f"{info.name} {info.version} is not prepared in {directory}"
            + (f" (there is {', '.join(others)})" if others else "")
            + f": `python -m cnn_jax data prepare {info.name}` makes it or says what it needs"
        )
    return directory


@functools.lru_cache(maxsize=8)
def _builder(directory: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(local_copy(directory))
    except Exception as error:  # JSON, protobuf and others: TFDS reads its metadata
        raise UserError(f"{directory} holds no data set that TFDS can read: {error}") from error
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
        raise UserError(
            f"{directory} is prepared as {file_format.value if file_format else 'nothing known'}, "
            "which has no random access: prepare it again with file_format='array_record'"
        )
    return builder


def _tfds_info(builder: Any, *, name: str) -> DatasetInfo:
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(f"{builder.data_path} has no image or no label but {', '.join(features)}")
    shape = features["image"].shape
    has_one_size = None not in shape
    return DatasetInfo(
        name=name if name not in DATASETS else "tfds",
        version=str(builder.version),
        image_shape=shape if has_one_size else IMAGE_SHAPE,
        num_classes=features["label"].num_classes,
        splits={name: split.num_examples for name, split in builder.info.splits.items()},
        class_names=tuple(features["label"].names),
        has_one_size=has_one_size,
    )


def _open_tfds(
    info: DatasetInfo, split: str, split_name: str, builder: Any
) -> Images | RecordSource:
    here = _tfds_info(builder, name=info.name)
    if here.splits.get(split_name) != info.splits[split_name]:
        raise UserError(
            f"{builder.data_path} does not hold {info.splits[split_name]} examples in the split "
            f"{split_name!r} but {here.splits.get(split_name, 0)}"
        )
    info = dataclasses.replace(info, class_names=here.class_names)
    shards = builder.info.splits[split].file_instructions
    if info.has_one_size:
        return RecordSource(info, split, builder.info.features, shards)
    encoded = TfdsImages(builder.info.features, RecordFiles(shards))
    return Images(info, split, encoded, range(len(encoded)))


class TfdsImages:
    """Encoded images in the records of a TFDS data set."""

    def __init__(self, features: Any, records: RecordFiles):
        import tensorflow_datasets as tfds

        self._decoders = {"image": tfds.decode.SkipDecoding()}
        self._features = features
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return self._records.name(index)

    def read(self, index: int) -> tuple[bytes, int]:
        example = self._features.deserialize_example_np(
            self._records[index], decoders=self._decoders
        )
        return example["image"], int(example["label"])

    def classes(self, numbers: np.ndarray) -> np.ndarray:
        return self._records.classes(numbers, functools.partial(class_in_record, self._features))
