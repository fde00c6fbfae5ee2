"""Directories and URLs of object storage: the same files, checkpoints and examples in both."""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
import simplejpeg
from object_stores import STORES

from cnn_jax.data.datasets import dataset_info
from cnn_jax.data.sources import Crops, open_source
from cnn_jax.errors import UserError
from cnn_jax.runtime.checkpoint import Checkpoints, find_damage
from cnn_jax.runtime.files import GrowingFile
from cnn_jax.runtime.workdir import claim
from cnn_jax.storage import files_below, is_remote, local_copy, move, place, write_atomically
from cnn_jax.training.state import TrainState


@pytest.fixture(scope="module", params=STORES)
def bucket(request):
    pytest.importorskip({"s3": "moto", "gs": "gcp_storage_emulator"}[request.param])
    with STORES[request.param]() as (url, _):
        yield url


@pytest.fixture
def upload():
    """Returns a function that copies a directory, file by file, and gives its URL."""

    def copied(directory: Path, url: str) -> str:
        for path in directory.rglob("*"):
            if path.is_file():
                with fsspec.open(f"{url}/{path.relative_to(directory)}", "wb") as object:
                    object.write(path.read_bytes())
        return url

    return copied


WITHOUT_ROOM = """
import pathlib, resource, sys
from cnn_jax.storage import write_atomically
path = pathlib.Path(sys.argv[1])
write_atomically(path, "short")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(path, 2000 * "long")
except OSError as error:
    print(error.filename, error.strerror, sep=": ")
"""


def test_a_file_for_which_there_is_no_room_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    command = [sys.executable, "-c", WITHOUT_ROOM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{path}: File too large\n"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "short"


def test_a_directory_is_itself_and_so_is_a_file_url(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("a/b") == Path("a/b")
    assert place("~/b") == tmp_path / "b"
    assert place(f"file://{tmp_path}/b") == tmp_path / "b"
    assert place(tmp_path) is tmp_path
    assert not is_remote(tmp_path)
    assert local_copy(tmp_path) is tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://host/x", r"http://host/x: must be a directory or one of file://, gs://, s3://"),
        ("s3://", "s3://: names no bucket"),
        ("gs://bucket/x", r"gs://bucket/x: needs gcsfs: pip install 'cnn_jax\[gs\]'"),
        ("s3://bucket/x", r"s3://bucket/x: needs s3fs: pip install 'cnn_jax\[s3\]'"),
    ],
)
def test_a_url_that_is_of_no_use_is_told(name, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        place(name)


def test_files_are_whole_objects(bucket, tmp_path):
    root = place(f"{bucket}/files")
    assert is_remote(root)
    assert str(root) == f"{bucket}/files"
    write_atomically(root / "deep" / "a.json", "old")
    write_atomically(root / "deep" / "a.json", "new")
    write_atomically(root / "b", b"\x00")
    assert files_below(root) == ["b", "deep/a.json"]
    assert (root / "deep" / "a.json").read_text() == "new"
    move(root / "deep", to=root / "aside" / "deep")
    assert files_below(root) == ["aside/deep/a.json", "b"]


def test_a_growing_file_is_there_at_a_sync_and_begins_as_told(bucket):
    path = place(f"{bucket}/grows/rows")
    file = GrowingFile(path)
    file.write(b"one\n")
    assert not path.exists()
    file.sync()
    assert path.read_bytes() == b"one\n"
    file.write(b"two\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\n"
    again = GrowingFile(path, b"one\n")
    again.write(b"deux\n")
    again.close()
    assert path.read_bytes() == b"one\ndeux\n"


def test_a_growing_file_of_another_process_is_left_alone(bucket):
    path = place(f"{bucket}/lost/rows")
    write_atomically(path, "theirs")

    def confirm():
        raise UserError("lost")

    file = GrowingFile(path, confirm=confirm)
    file.write(b"ours")
    for end in (file.sync, file.close):
        with pytest.raises(UserError, match="lost"):
            end()
    assert path.read_bytes() == b"theirs"


def test_the_newest_claim_holds(bucket):
    directory = place(f"{bucket}/claimed")
    with claim(directory) as first:
        first()
        with claim(directory) as second:
            second()
            with pytest.raises(UserError, match=f"process {os.getpid()} of .* has begun to train"):
                first()


def test_a_bucket_that_is_not_there_is_one_message(bucket):
    directory = place(f"{bucket}-of-another/run")
    with (
        pytest.raises(OSError, match=f"{directory}/owner.json cannot be written: ."),
        claim(directory) as confirm,
    ):
        confirm()


def test_damage_is_set_aside_and_a_save_that_was_cut_short_is_nothing(bucket):
    def state(step):
        values = np.full((2, 3), step / 7, np.float32)
        return jax.device_put(
            TrainState(
                step=np.asarray(step, np.int32),
                params={"kernel": values},
                batch_stats={"mean": values[0]},
                opt_state=({"trace": -values},),
            )
        )

    directory = place(f"{bucket}/saved/checkpoints")
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
    )
    lines: list[str] = []
    with contextlib.closing(Checkpoints(directory, keep=4, log=lines.append)) as checkpoints:
        for step in (3, 6):
            checkpoints.save(state(step), record={"at": step}, accuracy=0.5)
    assert [find_damage(directory / str(step)) for step in (3, 6)] == [None, None]
    names = files_below(directory / "6")
    for name in set(names) - {"manifest.json", "commit_success.txt"}:
        write_atomically(directory / "9" / name, (directory / "6" / name).read_bytes())
    damaged = next(name for name in names if "/d/" in name)
    content = (directory / "6" / damaged).read_bytes()
    write_atomically(directory / "6" / damaged, content[:-1] + bytes([content[-1] ^ 1]))

    with contextlib.closing(Checkpoints(directory, keep=4, log=lines.append)) as checkpoints:
        assert checkpoints.latest_step() == 3
        assert checkpoints.record() == {"at": 3}
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract), state(3))
        (line,) = lines
        assert f"checkpoint {directory}/6 is skipped: {damaged} is truncated or altered" in line
        assert f"moved to {bucket}/saved/damaged/6" in line
        assert damaged in files_below(place(f"{bucket}/saved/damaged/6"))
        checkpoints.save(state(9), record={"at": 9}, accuracy=0.5)
        checkpoints.wait()
        assert checkpoints.latest_step() == 9
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract), state(9))


def jpeg(number):
    noise = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
    return simplejpeg.encode_jpeg(noise, quality=95)


@pytest.fixture
def images(tmp_path) -> dict[str, Path]:
    """Directories with the same 12 images, as a folder, a table and shards."""
    places = {kind: tmp_path / kind for kind in ("folder", "csv", "tar")}
    for directory in places.values():
        directory.mkdir()
    rows = ["path,label,split"]
    for split in ("train", "test"):
        with tarfile.open(places["tar"] / f"{split}-000000.tar", "w") as tar:
            for number in range(6):
                path = f"{split}/{'cat' if number < 3 else 'dog'}/{number}.jpg"
                for kind in ("folder", "csv"):
                    (places[kind] / path).parent.mkdir(parents=True, exist_ok=True)
                    (places[kind] / path).write_bytes(jpeg(number))
                rows.append(f"{path},{path.split('/')[1]},{split}")
                for suffix, content in (("jpg", jpeg(number)), ("cls", str(number // 3).encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (places["csv"] / "table.csv").write_text("\n".join(rows))
    return places


@pytest.mark.parametrize("kind", ["folder", "csv", "tar"])
def test_examples_on_object_storage_are_those_of_the_directory(
    bucket, images, upload, kind, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = upload(images[kind], f"{bucket}/{tmp_path.name}/{kind}")
    table = "/table.csv" if kind == "csv" else ""
    batches = []
    for source in (str(images[kind]), url):
        options = {"source_dir": f"{source}{table}", "data_dir": str(tmp_path / "sets")}
        info = dataset_info(kind, **options, image_size=16)
        assert info.splits == {"train": 6, "test": 6}
        opened = open_source(kind, "test", **options, crops=Crops(image_size=16))
        batches.append(opened.batch(np.arange(6), np.zeros(6, int)))
    assert batches[0]["label"].tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_equal(batches[1], batches[0])
    copies = list((tmp_path / "cache").rglob("*.tar"))
    assert len(copies) == (2 if kind == "tar" else 0)
    assert ("copying 2 files" in capsys.readouterr().err) == (kind == "tar")


def test_a_copy_is_made_once_and_again_after_a_change(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = place(f"{bucket}/copied")
    write_atomically(source / "a", "1")
    write_atomically(source / "deep" / "b", "2")
    copy = local_copy(source)
    assert (copy / "a").read_text() + (copy / "deep" / "b").read_text() == "12"
    assert capsys.readouterr().err.startswith(f"copying 2 files, 0.0 MB, of {source} to {copy}")
    (copy / "deep" / "b").unlink()  # as a kill would leave it
    assert local_copy(source) == copy
    assert capsys.readouterr().err.startswith("copying 1 files")
    assert local_copy(source) == copy
    assert capsys.readouterr().err == ""
    write_atomically(source / "a", "3")
    assert (local_copy(source) / "a").read_text() == "3"
    with pytest.raises(UserError, match=f"{bucket}/nothing: there is nothing"):
        local_copy(place(f"{bucket}/nothing"))


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_sets_of_tfds_are_copied_and_those_made_here_stay_here(
    bucket, upload, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = open_source("fashion_mnist_10k", "test[:50]", data_dir=f"{bucket}/sets")
    (directory,) = (tmp_path / "cache" / "cnn_jax" / "sets").glob("*/1.0.0")
    url = upload(directory, f"{bucket}/tfds/clothes/1.0.0")
    copied = open_source("tfds", "test[:50]", source_dir=url)
    np.testing.assert_equal(copied.batch(np.arange(50)), made.batch(np.arange(50)))
    assert copied.info.name == "clothes"
    assert f"MB, of {url} to {tmp_path}/cache/cnn_jax/" in capsys.readouterr().err
    assert files_below(place(f"{bucket}/sets")) == []
