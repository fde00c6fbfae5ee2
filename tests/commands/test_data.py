"""`data`: what it says of good and of bad images, what it writes, what it refuses."""

import io
import itertools
import os
import re
import shutil
import struct
import tarfile
import time
import zlib
from pathlib import Path

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from driver import ROOT
from matplotlib.axes import Axes
from PIL import Image

from cnn_jax.__main__ import main
from cnn_jax.cli.config_files import load
from cnn_jax.commands import data as command
from cnn_jax.config import override, parse
from cnn_jax.data.holdout import Part
from cnn_jax.data.resized_records import write_records
from cnn_jax.data.sources import open_source
from cnn_jax.plan import Plan, make_plan, source_options
from cnn_jax.training.state import TrainState


@pytest.fixture
def images(tmp_path) -> Path:
    """Two classes, 8 images of each to train with and 8 to test with."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 255, (5, 6, 3), np.uint8).repeat(10, 0).repeat(10, 1)
                path = tmp_path / "images" / split / name / f"{number}.jpg"
                path.write_bytes(simplejpeg.encode_jpeg(pixels))
    return tmp_path / "images"


@pytest.fixture
def data(images, capsys, monkeypatch):
    """Returns a function that types a `data` command: (exit code, output)."""
    monkeypatch.chdir(ROOT)
    overrides = {
        "data.name": "folder",
        "data.source_dir": images,
        "data.image_size": 32,
        "data.test_split": "val",
        "data.mean": "0.5,0.5,0.5",
        "data.std": "0.5,0.5,0.5",
        "batch_size": 8,
        "eval.batch_size": 8,
    }

    def run(action: str, *flags: str) -> tuple[int, str]:
        texts = [f"--config.{key}={value}" for key, value in overrides.items()]
        code = main(["data", action, "--config=configs/default.py", *texts, *flags])
        streams = capsys.readouterr()
        return code, streams.out + streams.err

    return run


def test_check_says_that_all_is_well(data):
    assert data("check") == (
        0,
        "train: 16 images read\nval: 16 images read\n0 damaged, 0 notes\n",
    )


def test_check_names_everything_that_is_wrong_or_odd(data, images):
    folder = images / "train" / "cat"
    whole = (folder / "0.jpg").read_bytes()
    picture = Image.open(io.BytesIO(whole))
    (folder / "cut.jpg").write_bytes(whole[:-100])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    picture.save(folder / "named.jpg", "PNG")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "grey.jpg")
    Image.fromarray(np.zeros((50, 50), np.uint16)).save(folder / "deep.png")
    picture.save(folder / "moving.webp", save_all=True, append_images=[picture.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    (folder / "loop").symlink_to(images / "train")
    (folder / "gone.jpg").symlink_to("nowhere")
    for kind in ("webp", "bmp", "gif"):
        picture.save(folder / f"a_{kind}.jpg", kind)
    picture.save(folder / "a_tiff.png", "TIFF")
    cv2.imwrite(str(folder / "deep_colour.png"), np.zeros((50, 50, 3), np.uint16))
    avif, tiff, png = (encoded(picture, kind) for kind in ("AVIF", "TIFF", "PNG"))
    (folder / "hostile_avif.jpg").write_bytes(avif.replace(b"iloc", b"free"))
    pages = 8 + 2 + 12 * int.from_bytes(tiff[8:10], "little")  # a second one without a size
    second = len(tiff).to_bytes(4, "little")
    (folder / "hostile_tiff.jpg").write_bytes(tiff[:pages] + second + tiff[pages + 4 :] + bytes(6))
    empty_profile = struct.pack(">I4sBI", 1, b"iCCP", 0, zlib.crc32(b"iCCP\0"))
    (folder / "hostile.png").write_bytes(png[:33] + empty_profile + png[33:])
    (images / "train" / "bird").mkdir()
    picture.save(images / "train" / "loose.jpg")
    (images / "valid" / "cat").mkdir(parents=True)
    picture.save(images / "valid" / "cat" / "0.jpg")

    code, output = data("check")
    assert code == 1
    for kind, name, text in (
        ("DAMAGED", "cut.jpg", "damaged ("),
        ("DAMAGED", "empty.jpg", "not an image of a kind that can be read"),
        ("DAMAGED", "text.png", "not an image of a kind that can be read"),
        ("note", "notes.txt", "not read: its name must end with one of .jpg"),
        ("note", "named.jpg", "a PNG named .jpg: read as what it is"),
        ("note", "cmyk.jpg", "CMYK: converted to RGB"),
        ("note", "grey.jpg", "greyscale: repeated to three channels"),
        ("note", "deep.png", "16 bits or more: the upper 8 are taken"),
        ("note", "moving.webp", "animated: the first frame is taken"),
        ("note", "turned.jpg", "EXIF orientation 6: turned as it says"),
        ("note", "loop", "a link to a folder that holds it: not followed"),
        ("note", "gone.jpg", "a link to nothing: not read"),
        ("note", "a_webp.jpg", "a WEBP named .jpg: read as what it is"),
        ("note", "a_bmp.jpg", "a BMP named .jpg: read as what it is"),
        ("note", "a_gif.jpg", "a GIF named .jpg: read as what it is"),
        ("note", "a_tiff.png", "a TIFF named .png: read as what it is"),
        ("note", "deep_colour.png", "16 bits or more: the upper 8 are taken"),
        ("DAMAGED", "hostile_avif.jpg", "not an image of a kind that can be read"),
        ("note", "hostile_tiff.jpg", "a TIFF named .jpg: read as what it is"),
        ("note", "hostile_tiff.jpg", "used, but Pillow cannot tell what is odd about it: damaged"),
        ("note", "hostile.png", "used, but Pillow cannot tell what is odd about it: not an"),
        ("note", "../bird", "holds no images"),
        ("note", "../loose.jpg", "not read: it lies in no folder of a class"),
        ("note", "../../valid", "not read: what is read are the folders train, val"),
    ):
        assert f"{kind}  {Path(os.path.normpath(folder / name))}: {text}" in output
    assert output.endswith("4 damaged, 20 notes\n")


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_inspect_says_what_is_there_and_draws_it(data, tmp_path, capsys):
    picture = tmp_path / "sheet.png"
    code, output = data("inspect", f"--output={picture}")
    assert code == 0
    assert "folder 1.0.0: 2 classes; train 16, val 16\n" in output
    assert "60 to 60 wide (median 60), 50 to 50 high (median 50)" in output
    assert counted(output, "train") == [("cat", "8", "50.00%"), ("dog", "8", "50.00%")]
    with Image.open(picture) as image:
        assert image.size == (1600, 900)
    for path, text in {
        picture: "is already there",
        tmp_path / "sheet.jpg": "the name must end in .png",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            data("inspect", f"--output={path}")
        error = capsys.readouterr().err
        assert "argument --output: " in error
        assert text in error
    assert not (tmp_path / "sheet.jpg").exists()


class SeenError(Exception):
    """Carries what the model is given."""


def seen_by_the_model(plan: Plan, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The images that a whole training step gives its model, whatever it does to them."""

    def stop(call, arguments, keywords, context):
        if context.method_name != "__call__":
            return call(*arguments, **keywords)
        raise SeenError(np.asarray(arguments[0]))

    state = TrainState(step=jnp.int32(0), params={}, batch_stats={}, opt_state={})
    with nn.intercept_methods(stop), pytest.raises(SeenError) as seen:
        plan.train_step(state, batch, plan.make_key())
    return seen.value.args[0]


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            {
                "augment.crop_padding": "4",
                "augment.erase_probability": "1",
                "augment.mixup_alpha": "1",
            },
            marks=pytest.mark.slow,
        ),
        {"augment.flip": "true", "augment.brightness": "0.4", "augment.cutmix_alpha": "1"},
    ],
    ids=("erasing and mixup", "colour and cutmix"),
)
def test_the_sheet_shows_what_the_network_sees(images, monkeypatch, tmp_path, recipe):
    """Before: the images, to the pixel; after: the model's input in a step, back to pixels."""
    shown: list[np.ndarray] = []
    monkeypatch.setattr(Axes, "imshow", lambda axes, pixels, **options: shown.append(pixels))
    texts = {
        "data.name": "folder",
        "data.source_dir": str(images),
        "data.image_size": "32",
        "data.test_split": "val",
        "data.mean": "0.5,0.4,0.3",
        "data.std": "0.5,0.25,0.2",
        "augment.flip": "false",
        "augment.crop_padding": "0",
        "batch_size": "16",
        "eval.batch_size": "8",
    }
    values = override(load(ROOT / "configs/default.py"), {**texts, **recipe}.items())
    config = parse(values, num_devices=1)
    assert command.inspect(config, picture=tmp_path / "sheet.png") == 0
    before, after = np.stack(shown[::2]), np.stack(shown[1::2])

    source = open_source("folder", "train", **source_options(config))
    index, epoch = np.arange(16, dtype=np.int32), np.zeros(16, np.int32)
    np.testing.assert_array_equal(before, source.batch(index)["image"])
    batch = {**source.batch(index, epoch), "index": index, "epoch": epoch}
    seen = seen_by_the_model(make_plan(config, devices=jax.devices()[:1]), batch)
    pixels = np.clip((seen * [0.5, 0.25, 0.2] + [0.5, 0.4, 0.3]) * 255, 0, 255)
    np.testing.assert_allclose(after, pixels, atol=0.501)
    changed = np.abs(pixels - batch["image"]).max(axis=(1, 2, 3)) > 1
    assert changed.mean() > 0.5  # so the recipe is on, beyond the random crop of every image


def test_resized_images_train_on(data, tmp_path, images):
    directory = tmp_path / "small"
    flags = ("--resize=40", f"--output={directory}")
    code, output = data("prepare", *flags)
    assert (code, f"--config.data.source_dir={directory}" in output) == (0, True)
    assert data("prepare", *flags)[0] == 0
    overrides = ("--config.data.name=records", f"--config.data.source_dir={directory}")
    code, output = data("inspect", *overrides)
    assert code == 0
    assert "48 to 48 wide (median 48), 40 to 40 high" in output
    (images / "val" / "cat" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    code, output = data("prepare", "--resize=40", f"--output={tmp_path / 'other'}")
    assert code == 1
    assert re.search(r"val/cat/0\.jpg: .*; data check names all", output)


def test_resized_images_of_one_split_take_the_same_slices(data, tmp_path, images):
    """In the manner of `configs/finetune.py`, and with a part held out."""
    one, small = images / "train", tmp_path / "small"
    flags = (f"--config.data.source_dir={one}", "--config.data.test_split=train[75%:]")
    flags = (*flags, "--config.data.train_split=train[:75%]")
    code, output = data("prepare", *flags, "--resize=50", f"--output={small}")
    assert code == 0, output
    held_out = (f"--config.data.source_dir={one}", "--config.data.holdout=25")
    assert data("prepare", *held_out, "--resize=50", f"--output={small}")[0] == 0
    for split in ("train", "train[:75%]", "train[75%:]"):
        for part in (None, Part(25, held_out=True), Part(25, held_out=False)):
            before, after = (
                open_source(kind, split, source_dir=str(source), part=part)
                for kind, source in (("folder", one), ("records", small))
            )
            everything = np.arange(len(before))
            np.testing.assert_equal(after.batch(everything), before.batch(everything))


def test_inspect_of_images_that_none_can_read(data, images):
    for path in (images / "train").rglob("*.jpg"):
        path.write_bytes(b"no image")
    code, output = data("inspect")
    assert code == 1
    assert "train: none of 16 images can be read; `data check` says why" in output
    assert "Traceback" not in output


def as_table(images: Path) -> Path:
    path = images.parent / "table.csv"
    lines = [
        f"{each.relative_to(images.parent)},{('cat', 'dog').index(each.parent.name)},"
        f"{each.parts[-3]}"
        for each in sorted(images.rglob("*.jpg"))
    ]
    path.write_text("\n".join(["path,label,split", *lines]))
    return path


def as_shards(images: Path) -> Path:
    root = images.parent / "shards"
    root.mkdir()
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            with tarfile.open(
                root / f"{split}-{label:06d}.tar", "w", format=tarfile.USTAR_FORMAT
            ) as tar:
                for image in sorted((images / split / name).iterdir()):
                    tar.add(image, f"{name}/{image.name}")
                    (images / "label").write_text(str(label))
                    tar.add(images / "label", f"{name}/{image.stem}.cls")
    return root


def as_records(images: Path) -> Path:
    directory = images.parent / "records"
    write_records(
        {split: open_source("folder", split, source_dir=str(images)) for split in ("train", "val")},
        directory,
        shorter_side=256,
        num_threads=1,
        advance=lambda count: None,
    )
    return directory


LAYOUTS = {"folder": Path, "csv": as_table, "tar": as_shards, "records": as_records}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_inspect_counts_every_label(data, images, kind):
    for number in range(3):
        (images / "train" / "dog" / f"{number}.jpg").unlink()
    source = LAYOUTS[kind](images)
    code, output = data(
        "inspect", f"--config.data.name={kind}", f"--config.data.source_dir={source}"
    )
    assert code == 0, output
    train, val = (counted(output, split) for split in ("train", "val"))
    names = ("0", "1") if kind in ("csv", "tar") else ("cat", "dog")
    assert train == [(names[0], "8", "61.54%"), (names[1], "5", "38.46%")]
    assert val == [(names[0], "8", "50.00%"), (names[1], "8", "50.00%")]


def counted(output: str, split: str) -> list[tuple[str, ...]]:
    """The rows of a split's table of classes."""
    lines = output[output.index(f"  {split}: ") :].splitlines()[2:]
    rows = itertools.takewhile(lambda line: line.endswith("%"), lines)
    return [tuple(row.split()) for row in rows]


def test_inspect_counts_what_a_sample_would_miss(data, images):
    counts = {"cat": 4002, "dog": 2, "emu": 2}
    table, path = images / "table.csv", "train/cat/0.jpg"
    rows = [f"{path},{name}" for name, count in counts.items() for _ in range(count)]
    table.write_text("\n".join(["path,label", *rows]))
    flags = ("--config.data.name=csv", f"--config.data.source_dir={table}")
    code, output = data("inspect", *flags, "--config.data.test_split=train")
    assert code == 0, output
    expected = [("cat", "4,002", "99.90%"), ("dog", "2", "0.05%"), ("emu", "2", "0.05%")]
    assert counted(output, "train") == expected


def test_inspect_tells_of_labels_that_are_none(data, images):
    source = as_records(images)
    relabel_a_record(source)
    code, output = data(
        "inspect", "--config.data.name=records", f"--config.data.source_dir={source}"
    )
    assert code == 0, output
    assert output.endswith("    1 has no class that can be read; `data check` says why\n")
    assert counted(output, "val") == [("cat", "8", "53.33%"), ("dog", "7", "46.67%")]


def test_inspect_tells_of_records_that_are_damaged(data, images):
    source = as_records(images)
    flip(source / "train-00000.array_record", b"", 500)
    code, output = data(
        "inspect", "--config.data.name=records", f"--config.data.source_dir={source}"
    )
    assert code == 0, output
    assert counted(output, "train") == [("cat", "7", "46.67%"), ("dog", "8", "53.33%")]
    assert "of 15 looked at: " in output
    assert "    1 has no class that can be read; `data check` says why\n" in output


def test_balance_of_a_thousand_classes():
    """Class k has k + 1 images: 500,500 in all."""
    lines = command._balance(np.arange(1, 1001), [f"n{k}" for k in range(1000)]).splitlines()
    assert len(lines) == 1 + 10 + 1 + 10
    assert lines[1].split() == ["n999", "1,000", "0.20%"]
    assert lines[10].split() == ["n990", "991", "0.20%"]
    assert lines[11] == "    980 classes between, of 11 to 990"
    assert lines[12].split() == ["n9", "10", "0.00%"]
    assert lines[-1].split() == ["n0", "1", "0.00%"]


def flip(path: Path, content: bytes, behind: int) -> None:
    """Flips a bit so many bytes behind where the content begins."""
    data = bytearray(path.read_bytes())
    data[data.index(content) + behind] ^= 2
    path.write_bytes(data)


def add_bomb(source: Path) -> None:
    header = struct.pack(">4sIIBBBBB", b"IHDR", 40_000, 40_000, 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    whole += struct.pack(">I", zlib.crc32(header))
    (source / "train" / "cat" / "bomb.png").write_bytes(whole)


def remove_images(source: Path) -> None:
    for path in source.rglob("*.jpg"):
        path.unlink()


def relabel_a_record(source: Path) -> None:
    path = str(source / "val-00000.array_record")
    reader = ArrayRecordReader(path)
    records = reader.read_all()
    reader.close()
    writer = ArrayRecordWriter(path, "group_size:1")
    for number, record in enumerate(records):
        writer.write(b"\x02" + record[1:] if number == 9 else record)
    writer.close()


HUFFMAN = b"\xff\xc4"

DAMAGES = {  # kind, what is done to it, the exit code and what is said
    "an image bomb": (
        "folder",
        add_bomb,
        1,
        "DAMAGED  {}/train/cat/bomb.png: 40000 x 40000 pixels: must be 1 to 100,000,000 in all",
    ),
    "a flipped bit in a JPEG": (
        "folder",
        lambda source: flip(source / "train/dog/3.jpg", HUFFMAN, 2),
        1,
        "DAMAGED  {}/train/dog/3.jpg: damaged (",
    ),
    "no images": ("folder", remove_images, 2, "{} holds no images"),
    "one class": (
        "folder",
        lambda source: [shutil.rmtree(source / split / "dog") for split in ("train", "val")],
        2,
        "{} has one class, cat; a classifier needs two",
    ),
    "a label out of range in a table": (
        "csv",
        lambda source: source.write_text(source.read_text() + "\nimages/train/cat/0.jpg,7,train"),
        2,
        "{}, row 34: label 7 is out of range; 3 different numbers must be 0 to 2",
    ),
    "an image of a table that is not there": (
        "csv",
        lambda source: source.write_text(source.read_text() + "\nnowhere.jpg,1,val"),
        1,
        "/nowhere.jpg: [Errno 2] No such file",
    ),
    "a missing shard": (
        "tar",
        lambda source: (source / "train-000000.tar").unlink(),
        2,
        "{}/train-000000.tar: of the split 'train' the shard 0 is missing",
    ),
    "a flipped bit in a shard": (
        "tar",
        lambda source: flip(source / "train-000001.tar", b"dog/3.jpg", 0),
        2,
        "{}/train-000001.tar is damaged: after dog/2.cls, at byte ",
    ),
    "a flipped bit in an image in a shard": (
        "tar",
        lambda source: flip(source / "train-000001.tar", HUFFMAN, 2),
        1,
        "DAMAGED  {}/train-000001.tar: image 0, at byte 512: damaged (",
    ),
    "a label out of range in a shard": (
        "tar",
        lambda source: flip(source / "val-000001.tar", b"dog/0.cls", 512),
        2,
        "{}/val-000001.tar: image 0, at byte 512: label 3 is out of range; 3 different numbers",
    ),
    "a missing file of records": (
        "records",
        lambda source: (source / "train-00000.array_record").unlink(),
        2,
        "{}/train-00000.array_record, shard 0 of 1, is missing",
    ),
    "a flipped bit in records": (
        "records",
        lambda source: flip(source / "train-00000.array_record", b"", 500),
        1,
        "DAMAGED  {}/train-00000.array_record: record 0: damaged record",
    ),
    "a label out of range in records": (
        "records",
        relabel_a_record,
        1,
        "DAMAGED  {}/val-00000.array_record: record 9: label 2: must be 0 to 1",
    ),
}


@pytest.mark.parametrize(("kind", "damage", "code", "message"), DAMAGES.values(), ids=DAMAGES)
def test_check_names_damage_in_every_kind(data, images, kind, damage, code, message):
    source = LAYOUTS[kind](images)
    flags = (f"--config.data.name={kind}", f"--config.data.source_dir={source}")
    damage(source)
    found, output = data("check", *flags)
    assert message.format(source) in output
    assert (found, "Traceback" in output) == (code, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("check",), "required: --config"),
        (("check", "cifar10"), "only with prepare"),
        (("prepare", "--config=configs/default.py"), "needs --resize and --output"),
        (("check", "--config=configs/default.py", "--resize=3"), "--resize: only with"),
        (("inspect", "--config=configs/default.py", "--threads=3"), "--threads: only with"),
        (("check", "--config=configs/default.py", "--output=x"), "--output: only with"),
        (("check", "--config=configs/default.py", "--data-dir=x"), "--data-dir: only with"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        main(["data", *flags])
    assert message in capsys.readouterr().err


def test_a_download_is_told_in_a_log(capsys, tmp_path, monkeypatch):
    (tmp_path / "half of it").write_bytes(bytes(3 * 2**19))
    monkeypatch.setattr(command, "LINE_EVERY", 0.01)
    said, deadline = "", time.monotonic() + 60
    with command._told(tmp_path):
        while "\n" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().out
    assert said.startswith(f"1.5 MiB in {tmp_path} after 0."), said


def test_prepare_of_what_tfds_does_not_have(capsys, tmp_path):
    assert main(["data", "prepare", "cifer10", f"--data-dir={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "TFDS has no data set 'cifer10' (did you mean 'cifar10'?)" in error


@pytest.fixture(scope="module")
def tiny_sets():
    """Builders of TFDS's registry: one that prepares, and two that fail as real ones do."""
    import tensorflow_datasets as tfds

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        FAILURE = None

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(8, 8, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples(3), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            if self.FAILURE is not None:
                raise self.FAILURE
            for number in range(count):
                yield number, {"image": self._image(number), "label": number % 2}

        def _image(self, number):
            file = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, "PNG")
            file.seek(0)
            return file

    class TinyNeedy(TinyPictures):
        def _image(self, number):
            return np.full((8, 8, 3), number, np.uint8)  # which TensorFlow encodes

    class TinyUnlucky(TinyPictures):
        FAILURE = OSError("[Errno 28] No space left on device")

    return TinyPictures, TinyNeedy, TinyUnlucky


def test_a_set_of_tfds_is_prepared_once(tiny_sets, tmp_path, capsys):
    command_line = ["data", "prepare", "tiny_pictures", f"--data-dir={tmp_path}"]
    directory = tmp_path / "tiny_pictures" / "1.0.0"
    assert main(command_line) == 0
    first = capsys.readouterr().out
    assert first.startswith(f"preparing tiny_pictures in {directory}\n")
    assert first.endswith(f"{directory}: train 3, test 2\n")
    assert list(directory.glob("*train*.array_record*"))
    assert main(command_line) == 0
    assert capsys.readouterr().out == f"{directory}: train 3, test 2\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tiny_needy",
            "tiny_needy with TensorFlow only, or needs a package (No module",
        ),
        ("tiny_unlucky", "tiny_unlucky cannot be prepared: [Errno 28] No space left on device"),
    ],
)
def test_what_keeps_tfds_from_preparing_is_told(name, message, tiny_sets, tmp_path, capsys):
    assert main(["data", "prepare", name, f"--data-dir={tmp_path}"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / name / "1.0.0").exists()  # nothing half-written
