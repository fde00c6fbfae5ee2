"""The builders against the raw bytes: IDX files, hashes, the three origins of the official set."""

import functools
import gzip
import hashlib
import http.server
import lzma
import socket
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from cnn_jax.data.builders import fashion_mnist, make_fashion_mnist_10k
from cnn_jax.data.sources import open_source
from cnn_jax.errors import UserError

needs_debian_files = pytest.mark.skipif(
    not fashion_mnist.DEBIAN_DIRECTORY.is_dir(),
    reason="needs the Debian package dataset-fashion-mnist",
)


def parse_idx(data: bytes) -> np.ndarray:
    """An IDX reader of the test's own."""
    zero, kind, rank = struct.unpack_from(">HBB", data)
    assert (zero, kind) == (0, 8)
    sizes = struct.unpack_from(f">{rank}I", data, 4)
    values = np.array(list(data[4 + 4 * rank :]), np.uint8)
    return values.reshape(sizes)


@pytest.fixture(scope="module")
def vendored() -> dict[str, np.ndarray]:
    with tarfile.open(fashion_mnist.SUBSET) as archive:
        return {
            member.name: parse_idx(archive.extractfile(member).read())
            for member in archive.getmembers()
        }


@pytest.fixture
def tiny_files(tmp_path, monkeypatch) -> dict[str, bytes]:
    """Four gzipped IDX files of a few images under `tmp_path/origin`, taken as the official."""
    random = np.random.default_rng(0)
    files = {}
    for prefix, count in {"train": 7, "t10k": 3}.items():
        pixels = random.integers(0, 256, count * 784, np.uint8).tobytes()
        labels = random.integers(0, 10, count, np.uint8).tobytes()
        header = struct.pack(">4I", 0x803, count, 28, 28)
        files[f"{prefix}-images-idx3-ubyte"] = header + pixels
        files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, count) + labels
    (tmp_path / "origin").mkdir()
    for name, data in files.items():
        (tmp_path / "origin" / f"{name}.gz").write_bytes(gzip.compress(data))
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(fashion_mnist, "OFFICIAL_SHA256", hashes)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", tmp_path / "no such directory")
    return files


@pytest.fixture
def closed_url(monkeypatch) -> str:
    """The official URL, replaced by one where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    monkeypatch.setattr(fashion_mnist, "URL", url)
    return url


def test_subset_is_served_byte_for_byte_in_file_order(prepared_dir, vendored):
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        source = open_source("fashion_mnist_10k", split, data_dir=str(prepared_dir))
        batch = source.batch(np.arange(len(source)))
        np.testing.assert_array_equal(
            batch["image"][..., 0], vendored[f"{prefix}-images-idx3-ubyte"]
        )
        np.testing.assert_array_equal(batch["label"], vendored[f"{prefix}-labels-idx1-ubyte"])
        assert batch["image"].shape == (len(source), 28, 28, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32


def test_subset_is_balanced(vendored):
    assert np.bincount(vendored["train-labels-idx1-ubyte"]).tolist() == [1000] * 10
    assert np.bincount(vendored["t10k-labels-idx1-ubyte"]).tolist() == [200] * 10


def test_subset_note_states_the_checksum():
    archive = fashion_mnist.SUBSET.read_bytes()
    note = fashion_mnist.SUBSET.with_name("fashion_mnist_10k.md").read_text()
    assert hashlib.sha256(archive).hexdigest() == fashion_mnist.SUBSET_SHA256
    assert fashion_mnist.SUBSET_SHA256 in note


def test_damaged_subset_is_refused(tmp_path, monkeypatch):
    damaged = bytearray(fashion_mnist.SUBSET.read_bytes())
    damaged[1000] ^= 1
    path = tmp_path / "subset.tar.xz"
    path.write_bytes(damaged)
    monkeypatch.setattr(fashion_mnist, "SUBSET", path)
    with pytest.raises(UserError, match=r"subset.tar.xz is damaged"):
        open_source("fashion_mnist_10k", "train", data_dir=str(tmp_path / "data"))


@needs_debian_files
def test_subset_is_made_again_from_the_official_files():
    tar = make_fashion_mnist_10k.make_tar(fashion_mnist.read_official_files())
    assert tar == lzma.decompress(fashion_mnist.SUBSET.read_bytes())


def test_first_of_each_class_keeps_file_order():
    labels = np.array([2, 0, 2, 1, 2, 0, 0, 1, 1])
    assert make_fashion_mnist_10k.first_of_each_class(labels, 2).tolist() == [0, 1, 2, 3, 5, 7]


def test_read_idx_refuses_other_files():
    with pytest.raises(ValueError, match="not an IDX file"):
        fashion_mnist.read_idx(b"\x89PNG")


def test_source_dir_is_prepared(tiny_files, tmp_path):
    builder = fashion_mnist.FashionMnist(data_dir=tmp_path / "d", source_dir=tmp_path / "origin")
    builder.download_and_prepare()
    examples = list(builder.as_data_source("train"))
    expected = parse_idx(tiny_files["train-images-idx3-ubyte"])
    np.testing.assert_array_equal([example["image"][..., 0] for example in examples], expected)


def test_source_dir_comes_before_debian_and_debian_before_the_network(
    tiny_files, tmp_path, monkeypatch, closed_url
):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", tmp_path / "origin")
    assert fashion_mnist.read_official_files() == tiny_files
    with pytest.raises(UserError, match=r"named/train-images-idx3-ubyte\.gz"):
        fashion_mnist.read_official_files(tmp_path / "named")


def test_download(tiny_files, tmp_path, monkeypatch):
    class QuietHandler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    handler = functools.partial(QuietHandler, directory=str(tmp_path / "origin"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever).start()
        try:
            assert fashion_mnist.read_official_files() == tiny_files
        finally:
            server.shutdown()


def test_offline_names_the_three_ways(tmp_path, monkeypatch, closed_url):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", tmp_path / "no such directory")
    with pytest.raises(UserError) as error:
        open_source("fashion_mnist", "train", data_dir=str(tmp_path))
    for way in (
        "--config.data.source_dir=DIR",
        "apt-get install dataset-fashion-mnist",
        closed_url,
    ):
        assert way in str(error.value)


def test_site_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIRECTORY", tmp_path / "no such directory")
    monkeypatch.setattr(fashion_mnist, "DOWNLOAD_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        with pytest.raises(UserError, match="timed out"):
            fashion_mnist.read_official_files()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: gzip.compress(data[:-1] + b"\0"), "is not the official Fashion-MNIST file"),
        (lambda data: gzip.compress(data)[:-9], "is damaged"),
        (lambda data: b"<html>404</html>", "is damaged"),
    ],
    ids=["other bytes", "truncated", "not gzip"],
)
def test_wrong_file_is_named(tiny_files, tmp_path, damage, message):
    path = tmp_path / "origin" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(tiny_files["t10k-images-idx3-ubyte"]))
    with pytest.raises(UserError, match=f"t10k-images-idx3-ubyte.gz {message}"):
        fashion_mnist.read_official_files(tmp_path / "origin")


@needs_debian_files
@pytest.mark.slow
def test_all_of_debians_fashion_mnist(tmp_path):
    for split, prefix, size in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        source = open_source("fashion_mnist", split, data_dir=str(tmp_path))
        batch = source.batch(np.arange(size))
        for key, kind in (("image", "images-idx3"), ("label", "labels-idx1")):
            path = Path(fashion_mnist.DEBIAN_DIRECTORY, f"{prefix}-{kind}-ubyte.gz")
            with gzip.open(path) as file:
                expected = parse_idx(file.read())
            np.testing.assert_array_equal(batch[key].reshape(expected.shape), expected)
