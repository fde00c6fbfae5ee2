"""Data sets that TFDS prepared: found by name or directory, read without TensorFlow."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cnn_jax import predict
from cnn_jax.__main__ import main
from cnn_jax.data.datasets import DATASETS, DatasetInfo, dataset_info
from cnn_jax.data.sources import Crops, ImageSource, MemorySource, open_source
from cnn_jax.errors import UserError


def picture(number: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(number).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def png(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


class _Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """12 train and 4 test images in three classes, of `SHAPE` or, where that is None, of two."""

    VERSION = tfds.core.Version("3.0.2")
    SHAPE = (32, 32, 3)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=self.SHAPE),
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cow"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12, 0), "test": self._generate_examples(4, 50)}

    def _generate_examples(self, count, first):
        for index in range(count):
            height = self.SHAPE[0] or 64 + 8 * (index % 2)
            pixels = picture(first + index, height, self.SHAPE[1] or 80)
            yield index, {"image": png(pixels), "label": index % 3}


class OneSize(_Pictures, skip_registration=True):
    name = "cifar10"


class Unnamed(_Pictures, skip_registration=True):
    name = "cifar100"  # of which the table of data sets has no class names


class ManySizes(_Pictures, skip_registration=True):
    name = "pictures"
    SHAPE = (None, None, 3)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    for builder in (OneSize, Unnamed, ManySizes):
        builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def small(name: str) -> DatasetInfo:
    """What is known of a data set by name, were it one of those made here."""
    splits = {"train": 12, "test": 4}
    return dataclasses.replace(DATASETS[name], splits=splits, num_classes=3)


def test_table_agrees_with_tfds():
    for name in ("mnist", "cifar10", "cifar100"):
        assert str(tfds.builder_cls(name).VERSION) == DATASETS[name].version


def test_images_of_one_size_by_name(data_dir, monkeypatch):
    monkeypatch.setitem(DATASETS, "cifar10", small("cifar10"))
    source = open_source("cifar10", "train[3:9]", data_dir=str(data_dir))
    assert isinstance(source, MemorySource)
    assert source.info.class_names == ("ant", "bee", "cow")
    batch = source.batch(np.arange(6))
    np.testing.assert_array_equal(batch["image"], [picture(i, 32, 32) for i in range(3, 9)])
    assert batch["label"].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.slow
def test_names_of_classes_travel_with_the_checkpoint(data_dir, tmp_path, monkeypatch):
    """From what TFDS prepared, by way of training, to predictions that need no data."""
    monkeypatch.setitem(DATASETS, "cifar100", small("cifar100"))
    monkeypatch.chdir(Path(__file__).parents[2])
    flags = {
        "data.name": "cifar100",
        "data.data_dir": data_dir,
        "data.mean": "0.5,0.5,0.5",
        "data.std": "0.5,0.5,0.5",
        "model.width": 4,
        "model.stage_sizes": "1,",
        "batch_size": 8,
        "eval.batch_size": 8,
        "num_epochs": 1,
    }
    texts = [f"--config.{key}={value}" for key, value in flags.items()]
    run = tmp_path / "run"
    assert main(["train", "--config=configs/default.py", *texts, f"--workdir={run}"]) == 0
    (tmp_path / "image.png").write_bytes(png(picture(0, 32, 32)).getvalue())
    monkeypatch.setitem(DATASETS, "cifar100", small("mnist"))  # nothing but the checkpoint tells
    (predicted,) = predict(run, [str(tmp_path / "image.png")], top=3)
    assert sorted(name for name, _ in predicted.classes) == ["ant", "bee", "cow"]


def test_name_with_other_examples_than_known(data_dir):
    with pytest.raises(UserError, match="does not hold 50000 examples in the split 'train' but 12"):
        open_source("cifar10", "train", data_dir=str(data_dir))


def test_images_of_many_sizes_by_directory(data_dir):
    directory = str(data_dir / "pictures" / "3.0.2")
    info = dataset_info("tfds", source_dir=directory, image_size=40)
    assert (info.name, info.image_shape, info.num_classes) == ("pictures", (40, 40, 3), 3)
    assert dict(info.splits) == {"train": 12, "test": 4}
    crops = Crops(image_size=64, eval_fraction=1.0)
    source = open_source("tfds", "test[1:]", source_dir=directory, crops=crops)
    assert isinstance(source, ImageSource)
    batch = source.batch(np.arange(3))
    assert batch["label"].tolist() == source.classes(np.arange(3)).tolist() == [1, 2, 0]
    np.testing.assert_array_equal(batch["image"][1], picture(52, 64, 80)[:, 8:72])


def test_missing_file_is_named(data_dir, tmp_path):
    import shutil

    directory = tmp_path / "pictures" / "3.0.2"
    shutil.copytree(data_dir / "pictures" / "3.0.2", directory)
    (file,) = directory.glob("*-test.array_record*")
    file.unlink()
    with pytest.raises(UserError, match=rf"{file}, shard 0 of 1, is missing"):
        open_source("tfds", "test", source_dir=str(directory))


def test_not_prepared_says_how(tmp_path):
    with pytest.raises(UserError, match="`python -m cnn_jax data prepare imagenet2012` makes it"):
        open_source("imagenet2012", "train", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="holds no data set that TFDS can read"):
        dataset_info("tfds", source_dir=str(tmp_path))
