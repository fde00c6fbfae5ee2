"""Makes fashion_mnist_10k.tar.xz from the official Fashion-MNIST files.

python -m cnn_jax.data.builders.make_fashion_mnist_10k [DIRECTORY OF THE OFFICIAL FILES]

Of each class it takes the first 1,000 training and the first 200 test images and keeps them in
the order of the official files. The same input gives the same bytes (with the same liblzma).
"""

import hashlib
import io
import lzma
import struct
import sys
import tarfile
from collections.abc import Mapping

import numpy as np

from cnn_jax.data.builders import fashion_mnist

EXAMPLES_PER_CLASS = {"train": 1000, "t10k": 200}


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices, ascending, of the first `count` examples of each class."""
    first = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(first))


def to_idx(array: np.ndarray) -> bytes:
    """Returns the IDX file of a uint8 array."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def make_tar(official_files: Mapping[str, bytes]) -> bytes:
    """Returns the subset's four IDX files as a tar archive without dates or owners."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as members:
        for prefix, count in EXAMPLES_PER_CLASS.items():
            names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
            images, labels = (fashion_mnist.read_idx(official_files[name]) for name in names)
            chosen = first_of_each_class(labels, count)
            for name, array in zip(names, (images, labels), strict=True):
                data = to_idx(array[chosen])
                member = tarfile.TarInfo(name)
                member.size = len(data)
                members.addfile(member, io.BytesIO(data))
    return archive.getvalue()


def main(source_dir: str = "") -> None:
    tar = make_tar(fashion_mnist.read_official_files(source_dir))
    compressed = lzma.compress(tar, preset=9 | lzma.PRESET_EXTREME)
    fashion_mnist.SUBSET.write_bytes(compressed)
    print(hashlib.sha256(compressed).hexdigest(), fashion_mnist.SUBSET.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
