"""`data`: what it says of good and of bad images, what it writes, what it refuses."""

import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from driver import ROOT
from PIL import Image

from cnn_jax.__main__ import main
from cnn_jax.commands import data as command


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
        ("note", "turned.jpg", "EXIF orientation 6: ignored"),
        ("note", "loop", "a link to a folder that holds it: not followed"),
        ("note", "gone.jpg", "a link to nothing: not read"),
    ):
        assert f"{kind}  {folder / name}: {text}" in output
    assert output.endswith("3 damaged, 9 notes\n")


def test_inspect_says_what_is_there_and_draws_it(data, tmp_path):
    picture = tmp_path / "sheet.png"
    code, output = data("inspect", f"--output={picture}")
    assert code == 0
    assert "folder 1.0.0: 2 classes; train 16, val 16\n" in output
    assert "60 to 60 wide (median 60), 50 to 50 high (median 50)" in output
    assert "50.0%" in output
    with Image.open(picture) as image:
        assert image.size == (1600, 900)
    code, output = data("inspect", f"--output={picture}")
    assert code == 1
    assert "is already there" in output


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
