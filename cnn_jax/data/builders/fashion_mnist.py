"""Fashion-MNIST, whole and as a vendored subset, as TFDS builders that need no TensorFlow."""

import gzip
import hashlib
import http.client
import io
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cnn_jax.data.datasets import DATASETS, FASHION_MNIST_CLASSES
from cnn_jax.errors import UserError

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
SUBSET = Path(__file__).with_name("fashion_mnist_10k.tar.xz")
SUBSET_SHA256 = "2b9e6964663bbb9442b95a4914c472b5a4b097a37eed203c7ffee7c4a2d17a96"

# Of the decompressed files: the gzip headers of Debian's copies differ from the official ones.
OFFICIAL_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

# Seconds without an answer or a byte. TFDS's own download tries for minutes on an offline machine.
DOWNLOAD_TIMEOUT = 5


def read_idx(data: bytes) -> np.ndarray:
    """Returns the uint8 array of an IDX file: 0, 0, type 8, rank, big-endian sizes, elements."""
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"not an IDX file of uint8: it begins with {data[:3]!r}")
    rank = data[3]
    shape = np.frombuffer(data, ">u4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_official_files(source_dir: str | Path = "") -> dict[str, bytes]:
    """Returns the four official IDX files, decompressed, by name.

    They come from `source_dir` if given, else from Debian's package, else from the official site.

    Raises:
      UserError: a file is missing or is not the official one, or the site cannot be reached.
    """
    if source_dir:
        return {name: _read_gzip(Path(source_dir, f"{name}.gz")) for name in OFFICIAL_SHA256}
    if DEBIAN_DIRECTORY.is_dir():
        return {name: _read_gzip(DEBIAN_DIRECTORY / f"{name}.gz") for name in OFFICIAL_SHA256}
    return {name: _download_gzip(f"{URL}{name}.gz") for name in OFFICIAL_SHA256}


def read_subset() -> dict[str, bytes]:
    """Returns the four IDX files of the vendored subset, by name."""
    archive = SUBSET.read_bytes()
    if hashlib.sha256(archive).hexdigest() != SUBSET_SHA256:
        raise UserError(f"{SUBSET} is damaged (its SHA-256 is wrong): install cnn_jax again")
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:xz") as members:
        opened = {name: members.extractfile(name) for name in OFFICIAL_SHA256}
        return {name: file.read() for name, file in opened.items() if file}


def _read_gzip(path: Path) -> bytes:
    try:
        compressed = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); Fashion-MNIST needs the files "
            f"{', '.join(f'{name}.gz' for name in OFFICIAL_SHA256)} in that directory"
        ) from error
    return _decompress(path.stem, compressed, origin=str(path))


def _download_gzip(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response:
            compressed = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"Fashion-MNIST is not on this machine and {url} cannot be reached ({error}). "
            "Any one of three ways mends it:\n"
            "  --config.data.source_dir=DIR  where DIR holds the four official .gz files\n"
            "  apt-get install dataset-fashion-mnist  (Debian and Ubuntu)\n"
            f"  network access to {URL}"
        ) from error
    return _decompress(Path(url).stem, compressed, origin=url)


def _decompress(name: str, compressed: bytes, origin: str) -> bytes:
    try:
        data = gzip.decompress(compressed)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{origin} is damaged: {error}") from error
    if hashlib.sha256(data).hexdigest() != OFFICIAL_SHA256[name]:
        raise UserError(
            f"{origin} is not the official Fashion-MNIST file: the SHA-256 of its decompressed "
            f"bytes is not {OFFICIAL_SHA256[name]}"
        )
    return data


class _IdxBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes four IDX files as array_record, in file order."""

    DESCRIPTION: str

    def __init__(self, **kwargs: Any):
        super().__init__(**{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    # Raw bytes, compressed by array_record: a third of the time of reading PNGs.
                    "image": tfds.features.Tensor(
                        shape=(28, 28, 1), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
                    ),
                    "label": tfds.features.ClassLabel(names=FASHION_MNIST_CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            citation="Xiao, Rasul and Vollgraf (2017), Fashion-MNIST, arXiv:1708.07747",
            license="MIT, Copyright 2017 Zalando SE",
            disable_shuffling=True,  # index i of a split is image i of its file
        )

    def _read_files(self) -> Mapping[str, bytes]:
        raise NotImplementedError

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        arrays = {name: read_idx(data) for name, data in self._read_files().items()}
        return {
            split: self._generate_examples(
                arrays[f"{prefix}-images-idx3-ubyte"], arrays[f"{prefix}-labels-idx1-ubyte"]
            )
            for split, prefix in {"train": "train", "test": "t10k"}.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image[..., np.newaxis], "label": int(label)}


class FashionMnist(_IdxBuilder):
    """All 60,000 training and 10,000 test images."""

    name = "cnn_jax_fashion_mnist"
    VERSION = tfds.core.Version(DATASETS["fashion_mnist"].version)
    DESCRIPTION = "Fashion-MNIST: 60,000 training and 10,000 test images of 10 kinds of clothing."

    def __init__(self, *, source_dir: str | Path = "", **kwargs: Any):
        """`source_dir` is the directory of the four official .gz files, if the user names one."""
        self._source_dir = source_dir
        super().__init__(**kwargs)

    def _read_files(self) -> Mapping[str, bytes]:
        return read_official_files(self._source_dir)


class FashionMnist10k(_IdxBuilder):
    """The first 1,000 training and the first 200 test images of each class."""

    name = "cnn_jax_fashion_mnist_10k"
    VERSION = tfds.core.Version(DATASETS["fashion_mnist_10k"].version)
    DESCRIPTION = (
        "A balanced subset of Fashion-MNIST: of each of the 10 classes the first 1,000 training "
        "and the first 200 test images, in the order of the official files."
    )

    def _read_files(self) -> Mapping[str, bytes]:
        return read_subset()
