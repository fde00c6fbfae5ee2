"""A run on a folder of images, with averaged weights, used while the folder is away."""

import json
import shutil

import numpy as np
import pytest
from driver import read_metrics, read_state
from flax.traverse_util import unflatten_dict
from PIL import Image

from cnn_jax.__main__ import main
from cnn_jax.data.sources import open_source
from cnn_jax.serving.network import network_of_file, network_of_run
from cnn_jax.trained import open_run

CLASSES = ("cat", "dog", "eel")
FLAGS = (
    "--config.data.name=folder",
    "--config.data.train_split=train",
    "--config.data.test_split=test",
    "--config.data.image_size=16",
    "--config.data.eval_fraction=0.75",
    "--config.data.mean=(0.5,0.4,0.3)",
    "--config.data.std=(0.2,0.2,0.2)",
    "--config.augment.crop_padding=0",
    "--config.batch_size=8",
    "--config.num_epochs=2",
    "--config.ema.decay=0.8",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of three classes, 8 images to train and 3 to test each, some to be turned."""
    root, random = tmp_path_factory.mktemp("animals") / "animals", np.random.default_rng(0)
    for split, count in {"train": 8, "test": 3}.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (24, 40, 3), np.uint8)
                pixels[..., label] //= 2
                exif = Image.Exif()
                exif[0x0112] = (1, 6, 4)[number % 3]
                Image.fromarray(pixels).save(root / split / name / f"{number}.png", exif=exif)
    return root


@pytest.fixture(scope="module")
def run(trainer, images, tmp_path_factory):
    """The directory of a run on them; not to be written to."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    code, output = trainer.run(workdir, *FLAGS, f"--config.data.source_dir={images}")
    assert code == 0, output
    return workdir


@pytest.fixture
def away(images):
    """Where the images are while they are not where the run had them."""
    elsewhere = images.rename(images.with_name("elsewhere"))
    yield elsewhere
    elsewhere.rename(images)


def expected_logits(run, pixels, part):
    """By flax alone, of arrays that orbax alone has read."""
    state = read_state(run / "checkpoints" / "6")
    paths = {tuple(name.strip("[]'").split("']['")): array for name, array in state.items()}
    chosen = {path[len(part) :]: x for path, x in paths.items() if path[: len(part)] == part}
    variables = {k: v for k, v in unflatten_dict(chosen).items() if k in ("params", "batch_stats")}
    normalized = (pixels.astype(np.float32) / 255 - [0.5, 0.4, 0.3]) / np.float32(0.2)
    logits = open_run(run).model.apply(variables, normalized.astype(np.float32), train=False)
    return np.asarray(logits, np.float64)


@pytest.mark.parametrize("ema", [False, True])
def test_evaluate_takes_the_weights_or_their_averages(run, images, tmp_path, ema):
    path = tmp_path / "scores.json"
    assert main(["evaluate", f"--workdir={run}", f"--json={path}", *["--ema"] * ema]) == 0
    found = json.loads(path.read_text())
    test = open_source("folder", "test", source_dir=str(images), crops=crops()).batch(np.arange(9))
    logits = expected_logits(run, test["image"], ("ema",) if ema else ())
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(9), test["label"]]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert (found["ema"], found["step"]) == (ema, 6)
    trained = read_metrics(run)[-1]  # what the trainer said, by another program
    assert found["loss"] == pytest.approx(trained["test/loss" + "_ema" * ema], rel=1e-5)
    assert trained["test/loss"] != pytest.approx(trained["test/loss_ema"], rel=1e-3)


def test_a_run_evaluated_on_mirror_images_too_is_used_on_them_too(run, images, tmp_path):
    copy, model = shutil.copytree(run, tmp_path / "run"), tmp_path / "model.zip"
    config = json.loads((copy / "config.json").read_text())
    config["eval"]["average_flips"] = True
    (copy / "config.json").write_text(json.dumps(config))
    test = open_source("folder", "test", source_dir=str(images), crops=crops()).batch(np.arange(4))
    there, back = (
        expected_logits(run, each, ()) for each in (test["image"], test["image"][:, :, ::-1])
    )
    assert np.abs(there - back).max() > 1e-3
    powers = np.exp((there + back) / 2)
    expected = powers / powers.sum(axis=1, keepdims=True)
    assert main(["export", f"--workdir={copy}", f"--to={model}"]) == 0
    for network in (network_of_run(copy, checkpoint="last"), network_of_file(model)):
        found = np.asarray(network.compile(4)(test["image"]))
        np.testing.assert_allclose(found, expected, rtol=2e-5)
        assert network.eval_fraction == network.about["preprocessing"]["eval_fraction"] == 0.75


def test_averages_are_served(run, images):
    test = open_source("folder", "test", source_dir=str(images), crops=crops()).batch(np.arange(4))
    network = network_of_run(run, checkpoint="last", ema=True)
    assert (network.about["ema"], network.about["step"]) == (True, 6)
    powers = np.exp(expected_logits(run, test["image"], ("ema",)))
    found = np.asarray(network.compile(4)(test["image"]))
    np.testing.assert_allclose(found, powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)


def crops():
    from cnn_jax.data.sources import Crops

    return Crops(image_size=16, eval_fraction=0.75)


def test_other_classes_are_refused(run, images, tmp_path, capsys):
    copy, more = shutil.copytree(run, tmp_path / "run"), tmp_path / "more"
    shutil.copytree(images, more)
    for split in ("train", "test"):
        (more / split / "dog").rename(more / split / "yak")
    config = json.loads((copy / "config.json").read_text())
    config["data"]["source_dir"] = str(more)
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", f"--workdir={copy}"]) == 1
    assert capsys.readouterr().err == (
        f"{more}: has other classes than {copy} was trained on; not in both: dog, yak\n"
    )


def test_the_best_is_that_of_the_averages(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    rows = [{"step": 3, "test/accuracy": 0.1, "test/accuracy_ema": 0.9}]
    rows.append({"step": 6, "test/accuracy": 0.8, "test/accuracy_ema": 0.2})
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_run(copy, checkpoint="best").step == 3


def test_no_average_is_one_message(reference, capsys):
    assert main(["evaluate", f"--workdir={reference}", "--ema"]) == 1
    assert capsys.readouterr().err == (
        f"{reference}/checkpoints/24 has no averaged weights: a run keeps them with ema.decay "
        "above 0\n"
    )


def test_the_checkpoint_knows_the_data_that_are_away(run, images, away, tmp_path, capsys):
    image = away / "test" / "dog" / "1.png"
    assert main(["predict", f"--workdir={run}", "--format=jsonl", "--top=3", str(image)]) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]
    test = open_source("folder", "test[4:5]", source_dir=str(away), crops=crops())
    assert test.name(0) == str(image)
    logits = expected_logits(run, test.batch(np.arange(1))["image"], ())[0]
    shares = np.exp(logits) / np.exp(logits).sum()
    assert {each["class"]: each["probability"] for each in classes} == pytest.approx(
        dict(zip(CLASSES, shares, strict=True)), abs=1e-6
    )
    pictures = f"--pictures={tmp_path / 'pictures'}"
    assert main(["inspect", f"--workdir={run}", "--ema", pictures, f"--image={image}"]) == 0
    assert main(["export", f"--workdir={run}", f"--to={tmp_path / 'a.zip'}"]) == 0
    assert "uint8 batch x 16 x 16 x 3 to probabilities of 3 classes" in capsys.readouterr().out

    assert main(["evaluate", f"--workdir={run}"]) == 1
    error = capsys.readouterr().err
    assert str(images) in error
    assert error.count("\n") == 1
