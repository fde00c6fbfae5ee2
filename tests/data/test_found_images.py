"""Folders, tables, shards and records of images: the same examples whichever way they lie."""

import contextlib
import io
import json
import os
import signal
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader

from cnn_jax.config import ConfigError
from cnn_jax.data import found_images
from cnn_jax.data.datasets import dataset_info
from cnn_jax.data.found_images import files_below
from cnn_jax.data.images import size_of
from cnn_jax.data.pipeline import train_batches
from cnn_jax.data.resized_records import write_records
from cnn_jax.data.sources import Crops, fingerprint, open_source
from cnn_jax.errors import UserError

CLASSES = ("cat", "dog", "emu")


def jpeg(number: int, height: int = 30, width: int = 40) -> bytes:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 255, (height // 10, width // 10, 3), np.uint8)
    return simplejpeg.encode_jpeg(coarse.repeat(10, 0).repeat(10, 1), quality=90)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes, 8 images of each to train with and 2 to test with."""
    root = tmp_path / "images"
    for split, count in {"train": 8, "test": 2}.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                path = root / split / name / f"{number}.jpg"
                path.write_bytes(jpeg(1000 * label + number + 100 * (split == "test")))
    return root


def opened(kind: str, source: Path, split: str = "train", **options):
    return open_source(
        kind, split, source_dir=str(source), data_dir=str(source.parent / "data"), **options
    )


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def table(folder, tmp_path) -> Path:
    path = tmp_path / "table.csv"
    lines = [
        f"images/{split}/{name}/{number}.jpg,{label},{split}"
        for split, count in {"train": 8, "test": 2}.items()
        for label, name in enumerate(CLASSES)
        for number in range(count)
    ]
    path.write_text("\n".join(["path,label,split", *lines]))
    return path


@pytest.fixture
def shards(folder, tmp_path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            members = {}
            for path in sorted((folder / split / name).iterdir()):
                members[f"{name}/{path.stem}.jpg"] = path.read_bytes()
                members[f"{name}/{path.stem}.cls"] = str(label).encode()
            write_tar(root / f"{split}-{label:06d}.tar", members)
    return root


@pytest.fixture
def records(folder, tmp_path) -> Path:
    directory = tmp_path / "records"
    prepare(folder, directory)
    return directory


def prepare(folder: Path, directory: Path) -> None:
    write_records(
        {split: opened("folder", folder, split) for split in ("train", "test")},
        directory,
        shorter_side=256,
        num_threads=2,
        advance=lambda count: None,
        images_in_a_file=10,
    )


def test_every_way_gives_the_same_examples(folder, table, shards, records):
    expected = opened("folder", folder)
    everything = np.arange(24)
    assert expected.info.class_names == CLASSES
    assert expected.info.splits == {"train": 24, "test": 6}
    batch = expected.batch(everything)
    assert batch["image"].shape == (24, 224, 224, 3)
    assert batch["label"].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for kind, source in {"csv": table, "tar": shards, "records": records}.items():
        other = opened(kind, source)
        assert dict(other.info.splits) == {"train": 24, "test": 6}
        np.testing.assert_equal(other.batch(everything), batch)
        np.testing.assert_equal(
            other.batch(everything, everything), expected.batch(everything, everything)
        )


def test_image_is_the_one_of_its_file(folder):
    source = opened("folder", folder, "test[3:5]", crops=Crops(image_size=30, eval_fraction=1.0))
    assert [Path(source.name(i)).name for i in range(2)] == ["1.jpg", "0.jpg"]
    for index in range(2):
        pixels = simplejpeg.decode_jpeg(Path(source.name(index)).read_bytes())
        image = source.batch(np.array([index]))["image"][0]
        np.testing.assert_array_equal(image, pixels[:, 5:35])


def test_crops_follow_from_seed_epoch_and_number(folder):
    source = opened("folder", folder, crops=Crops(image_size=32, seed=1))
    other_seed = opened("folder", folder, crops=Crops(image_size=32, seed=2))
    index, epoch = np.array([4, 4, 9]), np.array([0, 1, 0])
    images = source.batch(index, epoch)["image"]
    assert not np.array_equal(images[0], images[1])
    np.testing.assert_array_equal(source.batch(index[1:2], epoch[1:2])["image"][0], images[1])
    assert not np.array_equal(other_seed.batch(index, epoch)["image"], images)

    arguments = {"batch_size": 8, "seed": 1, "stop_step": 7}
    whole = list(train_batches(source, **arguments, start_step=0, num_threads=2))
    rest = list(train_batches(source, **arguments, start_step=4, num_threads=0))
    np.testing.assert_equal(rest, whole[4:])
    parts = [
        list(train_batches(source, **arguments, start_step=0, process_index=i, process_count=2))
        for i in range(2)
    ]
    for step, batch in enumerate(whole):
        joined = np.concatenate([part[step]["image"] for part in parts])
        np.testing.assert_array_equal(joined, batch["image"])


def test_a_folder_without_splits_is_one_split_whose_slices_hold_every_class(folder):
    info = dataset_info("folder", source_dir=str(folder / "train"))
    assert info.splits == {"train": 24}
    with pytest.raises(UserError, match=r"hold out a part: train\[:90%\] and train\[90%:\]"):
        opened("folder", folder / "train", "test")
    first, rest = (opened("folder", folder / "train", s) for s in ("train[:75%]", "train[75%:]"))
    names = [[each.name(i) for i in range(len(each))] for each in (first, rest)]
    assert len({*names[0], *names[1]}) == len(names[0]) + len(names[1]) == 24
    assert set(first.batch(np.arange(18))["label"].tolist()) == {0, 1, 2}


def test_image_size(folder):
    assert dataset_info("folder", source_dir=str(folder), image_size=64).image_shape == (64, 64, 3)
    assert dataset_info("imagenet2012", image_size=160).image_shape == (160, 160, 3)
    with pytest.raises(UserError, match="images of cifar10 are all of 32 x 32 pixels"):
        dataset_info("cifar10", image_size=64)


def test_links_are_followed_and_every_folder_is_read_once(folder, tmp_path):
    train = folder / "train"
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "x.jpg").write_bytes(jpeg(7))
    (outside / "back").symlink_to(outside)
    (train / "cat" / "loop").symlink_to(train)
    (train / "cat" / "self").symlink_to("self")
    (train / "cat" / "d").symlink_to("../dog")
    (train / "dog" / "c").symlink_to("../cat")
    (train / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (train / "dog" / "more").symlink_to(folder / "test" / "dog")
    (train / "dog" / "out").symlink_to(outside)
    (train / "emu" / "out").symlink_to(outside / "deep")
    (train / "emu" / "up").symlink_to(tmp_path)
    found = dict(files_below(train))
    images = [path for path, why in found.items() if not why]
    assert len(images) == 24 + 2 + 1
    assert {"dog/more/1.jpg", "dog/out/deep/x.jpg"} <= set(images)
    twice = "a folder that is read under another path: not read again"
    holds = "a link to a folder that holds it: not followed"
    assert {path: why for path, why in found.items() if why} == {
        "cat/d": twice,
        "cat/loop": holds,
        "cat/self": "a link to nothing: not read",
        "dog/c": twice,
        "dog/gone.jpg": "a link to nothing: not read",
        "dog/out/back": holds,
        "emu/out": twice,
        "emu/up": holds,
    }
    assert opened("folder", folder).batch(np.arange(27))["label"].tolist() == (
        [0] * 8 + [1] * 11 + [2] * 8
    )


@contextlib.contextmanager
def without_the_rights_of_root() -> Iterator[None]:
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("locked", [".", "train", "train/dog", "train/dog/deep"])
def test_folder_that_cannot_be_read_is_named(locked):
    with tempfile.TemporaryDirectory() as place:  # others may not enter pytest's
        Path(place).chmod(0o755)
        (Path(place) / "train" / "dog" / "deep").mkdir(parents=True)
        (Path(place) / "train" / "dog" / "link").symlink_to("deep/more")
        (Path(place) / locked).chmod(0)
        told = rf"{Path(place, locked)}\S* cannot be read: Permission denied"
        try:
            with without_the_rights_of_root(), pytest.raises(UserError, match=told):
                dataset_info("folder", source_dir=place)
        finally:
            (Path(place) / locked).chmod(0o755)


def fingerprint_of(source):
    return fingerprint(source, batch_size=4, seed=0)


def test_fingerprint_sees_another_image(folder):
    before = fingerprint_of(opened("folder", folder))
    (folder / "train" / "cat" / "0.jpg").write_bytes(jpeg(77))
    assert fingerprint_of(opened("folder", folder)) != before


def empty(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        path.unlink()


def one_class(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        if path.parent.name != "cat":
            path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"), [(empty, "holds no images"), (one_class, "has one class, cat")]
)
def test_folder_that_cannot_be_learned_from(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        dataset_info("folder", source_dir=str(folder))


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        dataset_info("folder", source_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"'csv' needs data\.source_dir, the path of the table"):
        dataset_info("csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.jpg,1", "no column 'path'"),
        ("path,label\na.jpg,", "row 2: its path or its label is empty"),
        ("path,label", "lists no images"),
        ("path,label\na.jpg,0\nb.jpg,2", r"label 2 is out of range; .* must be 0 to 1"),
        ("path,label\na.jpg,-1\nb.jpg,0", r"label -1 is out of range"),
    ],
)
def test_bad_table(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        dataset_info("csv", source_dir=str(tmp_path / "table.csv"))


def test_damaged_image_is_named_with_its_file_and_number(folder):
    path = folder / "train" / "dog" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    source = opened("folder", folder)
    with pytest.raises(UserError, match=rf"{path}: damaged .*\(example 11 of train\)"):
        source.batch(np.arange(24))
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: .*No such file.*\(example 11 of train\)"):
        source.batch(np.arange(24), np.zeros(24, int))


def test_missing_shard(shards):
    (shards / "train-000001.tar").unlink()
    with pytest.raises(UserError, match="of the split 'train' the shard 1 is missing"):
        dataset_info("tar", source_dir=str(shards), data_dir=str(shards.parent))


@pytest.mark.parametrize("length", [0, 700, 5000])
def test_truncated_shard_is_named_at_the_start(shards, length):
    path = shards / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{path} is damaged"):
        dataset_info("tar", source_dir=str(shards), data_dir=str(shards.parent))


def facts_of(shards: Path):
    found_images.find_images.cache_clear()  # as in another process
    return dataset_info("tar", source_dir=str(shards), data_dir=str(shards.parent / "data"))


@pytest.mark.parametrize("damage", ["a flipped bit", "a hole", "another behind it"])
def test_shard_that_tarfile_would_read_in_part_is_named(shards, damage):
    path = shards / "train-000001.tar"
    data = bytearray(path.read_bytes())
    place, after = data.index(b"dog/2.jpg"), "dog/1.cls"
    if damage == "a flipped bit":
        data[place] ^= 1
    elif damage == "a hole":  # as a file system leaves one
        data[place : place + 2048] = bytes(2048)
    else:
        place, after = -(-len(data.rstrip(b"\0")) // 512) * 512, "dog/7.cls"
        data = 2 * data
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} is damaged: after {after}, at byte {place}: "):
        facts_of(shards)


@pytest.mark.parametrize(("gone", "width"), [(1, 6), (2, 5)])
def test_missing_shard_of_so_many(shards, gone, width):
    """The last one too, as the names of the others tell."""
    for path in sorted(shards.glob("train-*.tar")):
        number = int(path.stem[-1])
        path.rename(path.with_name(f"train-{number:0{width}d}-of-{3:0{width}d}.tar"))
    assert facts_of(shards).splits == {"train": 24, "test": 6}
    path = shards / f"train-{gone:0{width}d}-of-{3:0{width}d}.tar"
    path.rename(path.with_suffix(".away"))
    with pytest.raises(UserError, match=f"{path}: of the split 'train' the shard {gone} is miss"):
        facts_of(shards)
    path.with_suffix(".away").rename(shards / f"train-{gone:0{width}d}-of-{4:0{width}d}.tar")
    with pytest.raises(UserError, match="the shards of 'train' are of several sets"):
        facts_of(shards)


@pytest.mark.parametrize("pattern", ["train-000002.tar", "test-*.tar"])
def test_shard_that_was_there_before_is_missed(shards, pattern):
    (shards / "more.tar").touch()
    assert facts_of(shards).splits == {"train": 24, "test": 6}
    gone = sorted(shards.glob(pattern))
    for path in gone:
        path.unlink()
    with pytest.raises(UserError, match=f"{gone[0]} is missing: it was there before") as caught:
        facts_of(shards)
    Path(str(caught.value).rpartition("delete ")[2]).unlink()
    assert facts_of(shards).splits["train"] == (16 if "train" in pattern else 24)


@pytest.mark.parametrize("label", ["3000000", "3", "1" + "0" * 30])
def test_label_in_a_shard_out_of_range(shards, label):
    write_tar(shards / "train-000003.tar", {"x.jpg": jpeg(0), "x.cls": label.encode()})
    path = shards / "train-000003.tar"
    if label == "3":
        assert facts_of(shards).num_classes == 4
        (shards / "train-000000.tar").write_bytes((shards / "train-000001.tar").read_bytes())
        (shards / "test-000000.tar").write_bytes((shards / "train-000001.tar").read_bytes())
    with pytest.raises(UserError, match=rf"{path}: (image 0|x).*(must be 0 to|from 0 to)"):
        facts_of(shards)


@pytest.mark.parametrize("content", [None, b"-1"])
def test_image_in_a_shard_without_a_class(shards, content):
    extra = {} if content is None else {"more/x.cls": content}
    write_tar(shards / "train-000003.tar", {"more/x.jpg": jpeg(0), **extra})
    with pytest.raises(UserError, match=r"train-000003\.tar: more/x has no class"):
        dataset_info("tar", source_dir=str(shards), data_dir=str(shards.parent))


def test_shards_are_read_through_once(shards, monkeypatch):
    first = opened("tar", shards).batch(np.arange(24))
    found_images.find_images.cache_clear()
    monkeypatch.setattr(found_images, "_read_index", None)
    np.testing.assert_equal(opened("tar", shards).batch(np.arange(24)), first)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"[1"])
def test_damaged_notes_of_shards_are_made_again(shards, content):
    before = facts_of(shards)
    notes = list((shards.parent / "data" / ".cnn_jax_index").iterdir())
    assert len(notes) == 6 + 1
    for note in notes:
        note.write_bytes(content)
    assert facts_of(shards) == before
    assert content not in [note.read_bytes() for note in notes]


def test_file_of_records_is_found_damaged_or_missing_at_the_start(records):
    path = records / "train-00001.array_record"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{path}, shard 1 of 3, is damaged"):
        opened("records", records)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}, shard 1 of 3, is missing"):
        opened("records", records)


def test_flipped_byte_in_records_names_file_and_record(records):
    path = records / "train-00001.array_record"
    data = bytearray(path.read_bytes())
    start = data.index(b"\xff\xd8\xff")
    data[start + 200] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path}: record \d+: damaged record"):
        opened("records", records).batch(np.arange(24))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"class_names": 3, "splits": {}}'])
def test_damaged_facts_of_records(folder, records, content):
    facts = records / "cnn_jax_records.json"
    facts.write_text(content)
    with pytest.raises(UserError, match=f"{facts} is damaged"):
        opened("records", records)
    unfinished = facts.rename(records / "cnn_jax_records.json.unfinished")
    with pytest.raises(UserError, match=f"{unfinished} is damaged .*: delete its directory"):
        prepare(folder, records)
    for path in records.glob("*.array_record"):
        path.unlink()
    prepare(folder, records)  # nothing had been written
    assert dict(opened("records", records).info.splits) == {"train": 24, "test": 6}


DIE_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from cnn_jax.data.resized_records import write_records
from cnn_jax.data.sources import open_source
source = open_source("folder", "train", source_dir=sys.argv[1])
def advance(count):
    if int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
write_records({"train": source}, Path(sys.argv[2]), shorter_side=20, num_threads=1,
              advance=advance, images_in_a_file=10)
"""


def test_killed_preparation_goes_on(folder, tmp_path, start_python):
    directory = tmp_path / "records"
    dead = start_python(DIE_WHILE_WRITING, folder, directory, 1)
    dead.communicate()
    assert dead.returncode == -signal.SIGKILL
    first = directory / "train-00000.array_record"
    written = first.stat().st_mtime_ns
    with pytest.raises(UserError, match="the same `data prepare` again finishes"):
        opened("records", directory)
    alive = start_python(DIE_WHILE_WRITING, folder, directory, 0)
    assert alive.communicate()[1] == ""
    assert first.stat().st_mtime_ns == written
    assert not [name for name in os.listdir(directory) if "unfinished" in name]
    source = opened("records", directory)
    assert [size_of(source.read(i)[0]) for i in range(24)] == [(20, 27)] * 24
    reader = ArrayRecordReader(str(directory / "train-00002.array_record"))
    assert reader.num_records() == 4
    reader.close()
    other = opened("folder", folder / "test", "train")
    with pytest.raises(UserError, match="holds other images"):
        write_records(
            {"train": other}, directory, shorter_side=20, num_threads=1, advance=lambda n: None
        )


def test_configuration_finds_the_facts(folder):
    from cnn_jax.config import parse
    from cnn_jax.plan import make_model
    from configs import default

    values = default.get_config().to_dict()
    values["data"] |= {"name": "folder", "mean": (0.5,) * 3, "std": (0.2,) * 3, "image_size": 64}
    values |= {"batch_size": 8, "eval": {**values["eval"], "batch_size": 8}}
    with pytest.raises(ConfigError, match=r"data\.name = 'folder': .* needs data\.source_dir"):
        parse(values, num_devices=8)
    values["data"]["source_dir"] = str(folder)
    config = parse(values, num_devices=8)
    assert config.data.dataset().image_shape == (64, 64, 3)
    assert make_model(config, config.data.dataset()).num_classes == 3
    assert json.loads(json.dumps(config.as_dict())) == config.as_dict()
