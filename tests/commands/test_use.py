"""Commands that read a run: `evaluate`, `predict` and `plot`."""

import csv
import functools
import io
import json
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from driver import ROOT, Child, read_metrics, read_state
from PIL import Image

import cnn_jax
from cnn_jax.__main__ import main
from cnn_jax.commands import evaluate as command_evaluate
from cnn_jax.commands import inspect as command_inspect
from cnn_jax.data.sources import open_source
from cnn_jax.trained import Trained, open_run


@pytest.fixture
def use(capsys):
    """Returns a function that types a command: (exit code, output, errors)."""

    def run(*arguments: object) -> tuple[object, str, str]:
        try:
            code: object = main([str(each) for each in arguments])
        except SystemExit as end:
            code = end.code
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def watched(command, monkeypatch, *names):
    """Returns what these functions of a command are given to draw, by the picture's name."""
    drawn = {}

    def watch(draw, path, *arrays):
        drawn[path.name] = arrays
        draw(path, *arrays)

    for name in names:
        monkeypatch.setattr(command, name, functools.partial(watch, vars(command)[name]))
    return drawn


@pytest.fixture(scope="module")
def test_set(reference):
    config = open_run(reference).config
    source = open_source("fashion_mnist_10k", "test[:300]", data_dir=config.data.data_dir)
    return source.batch(np.arange(300))


@pytest.fixture(scope="module")
def probabilities(reference, test_set):
    """Of all test images at once, by flax alone, from arrays that orbax alone has read."""
    run = open_run(reference)
    pixels = test_set["image"].astype(np.float32) / 255
    logits = run.model.apply(run.variables, (pixels - 0.2860) / 0.3530, train=False)
    exponents = np.exp(np.asarray(logits, np.float64))
    return exponents / exponents.sum(axis=1, keepdims=True)


def test_the_weights_are_those_of_the_checkpoint(reference):
    saved = read_state(reference / "checkpoints" / "24")
    stem = open_run(reference).variables["params"]["stem"]["conv"]["kernel"]
    np.testing.assert_array_equal(stem, saved["['params']['stem']['conv']['kernel']"])


@pytest.mark.parametrize(("which", "folded"), [("reference", True), ("in_bfloat16", False)])
def test_batch_norms_are_folded_where_rounding_is_that_of_float32(
    which, folded, test_set, probabilities, monkeypatch, request
):
    compiled = []
    compile_of = Trained.compile
    monkeypatch.setattr(
        Trained, "compile", lambda run, *args: compiled.append(run) or compile_of(run, *args)
    )
    images = test_set["image"]
    logits = open_run(request.getfixturevalue(which)).compile_logits(len(images))(images)
    (run,) = compiled
    assert (run.model.norm == "none") is folded
    assert ("batch_stats" not in run.variables) is folded
    tolerance = 1e-6 if folded else 1e-2
    np.testing.assert_allclose(jax.nn.softmax(logits), probabilities, rtol=0, atol=tolerance)


def test_evaluate_scores_every_example_once(
    use, reference, probabilities, test_set, tmp_path, monkeypatch
):
    path, pictures = tmp_path / "scores.json", tmp_path / "pictures"
    drawn = watched(
        command_evaluate, monkeypatch, "draw_confusion", "draw_reliability", "draw_contact_sheet"
    )
    code, output, error = use(
        "evaluate", f"--workdir={reference}", f"--json={path}", f"--pictures={pictures}"
    )
    assert (code, error) == (0, "")
    found, labels = json.loads(path.read_text()), test_set["label"]
    right = probabilities.argmax(axis=1) == labels
    assert found["examples"] == 300
    assert found["top1"] == right.mean()
    loss = -np.log(probabilities[np.arange(300), labels]).mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    trained = read_metrics(reference)[-1]  # what the trainer said, by another program
    assert found["top1"] == pytest.approx(trained["test/accuracy"], abs=1e-9)
    assert found["loss"] == pytest.approx(trained["test/loss"], rel=1e-5)
    assert f"top-1 {found['top1']:.4f}" in output
    assert_scores_of(found, probabilities, labels, open_run(reference).class_names)
    confusion, names = drawn["confusion.png"]
    assert confusion.tolist() == found["confusion"]
    assert names == open_run(reference).class_names
    (calibration,) = drawn["reliability.png"]
    assert calibration.error == found["calibration_error"]
    images, captions = drawn["mistakes.png"]
    taken = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(~right)
    worst = wrong[np.argsort(probabilities[wrong, labels[wrong]])][:40]
    np.testing.assert_array_equal(images, test_set["image"][worst])
    for caption, n in zip(captions, worst, strict=True):
        words = f"{names[labels[n]]}\ntaken for {names[taken[n]]}\n(PERCENT%), number {n}"
        found = re.fullmatch(re.escape(words).replace("PERCENT", r"(\d+\.\d)"), caption)
        assert found, caption
        assert float(found[1]) == pytest.approx(100 * probabilities[n, taken[n]], abs=0.051)
    for name in ("confusion", "reliability", "mistakes"):
        with Image.open(pictures / f"{name}.png") as picture:
            assert min(picture.size) > 400

    number = int(np.flatnonzero(right)[0])  # of which there is no mistake
    one = f"--split=test[{number}:{number + 1}]"
    code, _, error = use("evaluate", f"--workdir={reference}", one, f"--pictures={pictures}")
    assert (code, error) == (0, "")
    with Image.open(pictures / "mistakes.png") as picture:  # not that of before
        assert max(picture.size) < 400
    code, output, error = use("evaluate", f"--workdir={reference}", f"--pictures={path}")
    assert (code, output) == (1, "")
    assert error == f"--pictures {path}: cannot be made a directory: File exists\n"

    code, output, _ = use("evaluate", f"--workdir={reference}", "--split=test[:10]")
    assert "on 10 images" in output
    code, output, error = use("evaluate", f"--workdir={reference}", "--split=tset")
    assert code == 1
    assert error.startswith("fashion_mnist_10k has no split 'tset' (did you mean 'test'?)")


def test_evaluate_leaves_out_what_its_run_would_skip(
    use, complete, probabilities, test_set, tmp_path, monkeypatch
):
    """Scores, and the numbers of the mistakes, are those of the examples that can be read."""
    path = complete / "config.json"
    config = json.loads(path.read_text())
    data_dir = shutil.copytree(config["data"]["data_dir"], tmp_path / "data")
    (file,) = data_dir.rglob("*-test.array_record*")
    content = bytearray(file.read_bytes())
    content[20_000] ^= 0x40
    file.write_bytes(content)
    config["data"] |= {"data_dir": str(data_dir), "memory_limit_mb": 0}
    path.write_text(json.dumps(config))
    code, _, error = use("evaluate", f"--workdir={complete}")
    assert code == 1
    damaged = int(re.search(r"test.* is damaged: record (\d+) cannot be read", error)[1])

    config["data"]["on_bad_record"] = "skip"
    path.write_text(json.dumps(config))
    drawn = []
    monkeypatch.setattr(
        command_evaluate, "draw_contact_sheet", lambda *arguments: drawn.append(arguments)
    )
    scores = tmp_path / "scores.json"
    flags = (f"--workdir={complete}", f"--json={scores}", f"--pictures={tmp_path / 'pictures'}")
    code, output, error = use("evaluate", *flags)
    assert (code, error) == (0, "")
    assert f"record {damaged} cannot be read" in output
    assert "1 damaged image left out" in output
    found = json.loads(scores.read_text())
    assert (found["examples"], found["bad_records"]) == (299, 1)
    right = np.delete(probabilities.argmax(axis=1) == test_set["label"], damaged)
    assert found["top1"] == right.mean()
    ((_, images, captions),) = drawn
    numbers = [int(caption.rpartition(" ")[2]) for caption in captions]
    assert min(numbers) < damaged < max(numbers)
    np.testing.assert_array_equal(images, test_set["image"][numbers])


def assert_scores_of(found, probabilities, labels, class_names):
    """By comparing every example with every class, and every edge of a bin."""
    better = (probabilities > probabilities[range(len(labels)), labels][:, None]).sum(axis=1)
    assert found["top5"] == (better < 5).mean()
    assert found["top1"] < found["top5"] < 1
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    f1 = []
    for number, (row, name) in enumerate(zip(found["classes"], class_names, strict=True)):
        of_class, taken_for = labels == number, predicted == number
        both = int((of_class & taken_for).sum())
        precision = both / taken_for.sum() if taken_for.any() else 0.0
        recall = both / of_class.sum()
        f1.append(2 * precision * recall / (precision + recall) if both else 0.0)
        assert (row["name"], row["support"]) == (name, of_class.sum())
        assert row["precision"] == pytest.approx(precision, rel=1e-12)
        assert row["recall"] == pytest.approx(recall, rel=1e-12)
        assert row["f1"] == pytest.approx(f1[-1], rel=1e-12)
        assert found["confusion"][number] == [
            int((of_class & (predicted == other)).sum()) for other in range(len(class_names))
        ]
    assert found["macro_f1"] == pytest.approx(np.mean(f1), rel=1e-12)
    error = 0.0
    for number, row in enumerate(found["calibration"]):
        assert [row["from"], row["to"]] == pytest.approx([number / 15, (number + 1) / 15])
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        assert row["count"] == inside.sum()
        if not inside.any():
            assert row["accuracy"] is row["confidence"] is None
            continue
        right = (predicted == labels)[inside].mean()
        assert row["accuracy"] == pytest.approx(right, rel=1e-12)
        assert row["confidence"] == pytest.approx(confidence[inside].mean(), abs=1e-6)
        error += inside.mean() * abs(right - confidence[inside].mean())
    assert found["calibration_error"] == pytest.approx(error, abs=1e-6)
    assert len(found["calibration"]) == 15


def test_which_checkpoint(use, complete, reference):
    rows = [row for row in read_metrics(reference) if "test/accuracy" in row]
    best = max(rows, key=lambda row: (row["test/accuracy"], row["step"]))["step"]
    assert open_run(reference, checkpoint="best").step == best
    for path in (complete / "checkpoints" / "24" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
            break
    said = []
    assert open_run(complete, log=said.append).step < 24
    assert "checkpoints/24 is skipped: state/" in said[0]
    code, _, error = use("evaluate", f"--workdir={complete}", "--checkpoint=24")
    assert code == 1
    assert "cannot be used: state/" in error
    _, _, error = use("evaluate", f"--workdir={complete}", "--checkpoint=5")
    assert "checkpoint 5: " in error
    _, _, error = use("evaluate", f"--workdir={complete}", "--checkpoint=newest")
    assert error == "checkpoint 'newest': must be last, best or a step\n"
    shutil.rmtree(complete / "checkpoints")
    _, _, error = use("evaluate", f"--workdir={complete}")
    assert error == f"{complete} holds no good checkpoint\n"
    (complete / "config.json").unlink()
    _, _, error = use("evaluate", f"--workdir={complete}")
    assert error == f"--workdir {complete}: holds no run (it has no config.json)\n"


@pytest.fixture(scope="module")
def photos(test_set, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(7):
        Image.fromarray(test_set["image"][number, ..., 0]).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:90])
    return folder


def test_predict_goes_on_after_a_bad_file(use, reference, photos, probabilities):
    flags = (f"--workdir={reference}", "--format=jsonl", "--top=10", "--batch-size=4")
    code, output, error = use("predict", *flags, photos)
    assert code == 1
    assert f"{photos}/3.png: cannot be read: " in error
    assert error.endswith("1 of 7 files could not be read\n")
    rows = [json.loads(line) for line in output.splitlines()]
    assert [row["file"] for row in rows] == [f"{photos}/{n}.png" for n in (0, 1, 2, 4, 5, 6)]
    names = open_run(reference).class_names
    for row, number in zip(rows, (0, 1, 2, 4, 5, 6), strict=True):
        found = {each["class"]: each["probability"] for each in row["classes"]}
        expected = dict(zip(names, probabilities[number], strict=True))
        assert found == pytest.approx(expected, abs=1e-6)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_predict_as_csv_and_from_a_list(use, reference, photos, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos}/5.png\n\n{photos}/[01].png\n"))
    code, output, error = use(
        "predict", f"--workdir={reference}", "--format=csv", "--top=2", "-", photos / "6.png"
    )
    assert (code, error) == (0, "")
    rows = list(csv.DictReader(io.StringIO(output)))
    assert [row["file"][-5:] for row in rows[::2]] == ["5.png", "0.png", "1.png", "6.png"]
    assert [row["rank"] for row in rows] == ["1", "2"] * 4

    code, table, _ = use("predict", f"--workdir={reference}", "--top=1", photos / "6.png")
    share = float(rows[6]["probability"])
    assert table == f"{photos}/6.png  {rows[6]['class']} {share:.2%}\n"

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{photos}/5.png\r\n"))  # of Windows
    assert use("predict", f"--workdir={reference}", "-")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert use("predict", f"--workdir={reference}", "-") == (1, "", "no file was named\n")


def test_predict_without_an_image_is_exit_code_1(use, reference, tmp_path):
    code, output, error = use("predict", f"--workdir={reference}", tmp_path / "gone.png")
    assert (code, output) == (1, "")
    assert error.startswith(f"{tmp_path}/gone.png: there is no such file\n")


def test_output_that_nobody_reads_is_a_quiet_end(trainer, reference, photos):
    flags = [f"--workdir={reference}", "--format=csv", "--top=10", "--batch-size=1"]
    paths = [str(photos / "0.png")] * 400  # more than a pipe holds
    with subprocess.Popen(
        [sys.executable, "-m", "cnn_jax", "predict", *flags, *paths],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=trainer.environment,
        cwd=ROOT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "file,rank,class,probability\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_each_command_is_a_function_of_its_name(
    trainer, reference, photos, probabilities, tmp_path
):
    run, image = str(reference), photos / "2.png"
    scores = cnn_jax.evaluate(run)
    labels = scores.labels
    np.testing.assert_allclose(scores.losses, -np.log(probabilities[range(300), labels]), atol=1e-4)
    (prediction,) = cnn_jax.predict(run, [str(image)])
    assert prediction.classes[0][1] == pytest.approx(probabilities[2].max(), abs=1e-6)

    found = cnn_jax.inspect(run, image=image, class_name="Bag")
    assert [row.path for row in found.layers] == ["stem", "stage1_block1", "head"]
    assert found.filters.shape == (3, 3, 1, 4)
    assert cnn_jax.inspect(run).of_image is None
    seen = found.of_image
    assert list(seen.probabilities.values()) == pytest.approx(probabilities[2], abs=1e-6)
    assert (seen.class_name, seen.evidence.shape) == ("Bag", (14, 14))
    assert [field.strength.shape for field in seen.fields] == [(28, 28)]
    assert {name: each.shape for name, each in seen.stages.items()} == {"stage 1": (14, 14, 4)}

    cnn_jax.plot([run], tmp_path / "plot.png")
    assert cnn_jax.export(run, tmp_path / "clothes.zip", platforms=["cpu"])["step"] == 24
    arrays = cnn_jax.features(run, tmp_path / "features.npz", paths=[str(image)])
    head = open_run(reference).variables["params"]["head"]
    logits = np.float64(arrays["stage1_block1"] @ head["kernel"] + head["bias"])
    shares = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(shares[0], probabilities[2], atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {
        "plot.png",
        "clothes.zip",
        "features.npz",
    }

    serve = "import sys, cnn_jax; print('ended with', cnn_jax.serve(workdir=sys.argv[1], port=0))"
    server = Child([sys.executable, "-c", serve, run], trainer.environment)
    server.wait_for("ready: ")
    server.send(signal.SIGTERM)
    assert server.end() == 0
    assert server.lines[-1] == "ended with 0"


def test_a_configuration_that_is_damaged_or_gone_is_in_the_checkpoints_too(
    use, train_here, complete, photos
):
    command = ("predict", f"--workdir={complete}", photos / "0.png")
    expected = use(*command)
    path = complete / "config.json"
    written = path.read_text()
    path.write_text(written[:40])
    told = f"{path} is damaged; delete it: the checkpoints beside it hold the same values\n"
    assert use(*command) == (1, "", told)
    path.unlink()
    assert use(*command) == expected
    code, output = train_here(complete, "--config.optimizer.learning_rate=0.2")
    assert code == 1
    assert f"{complete} holds a run with another configuration:" in output
    assert not path.exists()
    code, output = train_here(complete, "--config.num_epochs=4", "--accept-config-changes")
    assert code == 0, output
    assert "going on from step 24 of 32" in output
    assert json.loads(path.read_text()) == {**json.loads(written), "num_epochs": 4}


def test_plot_several_runs(use, reference, complete, tmp_path):
    path = tmp_path / "plot.png"
    code, output, _ = use("plot", reference, complete, "--to", path)
    assert (code, output) == (0, f"drawn in {path}\n")
    with Image.open(path) as picture:
        assert picture.size == (1560, 1080)
    code, _, error = use("plot", reference, "--to", path)
    assert code == 2
    assert "is already there" in error
    code, _, error = use("plot", reference, "--to", tmp_path / "plot.pdf")
    assert (code, (tmp_path / "plot.pdf").exists()) == (2, False)
    assert "the name must end in .png" in error
    code, _, error = use("plot", tmp_path, "--to", tmp_path / "b.png")
    assert (code, error) == (
        1,
        f"{tmp_path}: has no metrics.jsonl with a row, so there is nothing to plot\n",
    )
    with (complete / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25}\n')
    code, _, error = use("plot", complete, "--to", tmp_path / "b.png")
    assert (code, error) == (1, f"{complete}/metrics.jsonl: has a row without step or epoch\n")
    code, _, error = use("plot", reference, "--smooth=1")
    assert code == 2
    assert "'1': must be a number >= 0 and < 1" in error


def test_inspect_draws_what_was_learned(
    use, reference, photos, probabilities, test_set, tmp_path, monkeypatch
):
    drawn = watched(
        command_inspect,
        monkeypatch,
        "draw_filters",
        "draw_feature_maps",
        "draw_receptive_fields",
        "draw_evidence",
    )
    flags = (f"--workdir={reference}", f"--pictures={tmp_path / 'new' / 'pictures'}")
    code, output, error = use("inspect", *flags, f"--image={photos / '2.png'}", "--class=Bag")
    assert (code, error) == (0, "")
    assert "stage1_block1" in output
    assert output.endswith(f"drawn in {tmp_path}/new/pictures\n")
    for name in ("filters", "stages", "receptive_fields", "evidence"):
        with Image.open(tmp_path / "new" / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 200

    run = open_run(reference)
    (kernel,) = drawn["filters.png"]
    np.testing.assert_array_equal(kernel, run.variables["params"]["stem"]["conv"]["kernel"])
    (stages,) = drawn["stages.png"]
    assert {name: x.shape for name, x in stages.items()} == {"stage 1": (14, 14, 4)}
    head = run.variables["params"]["head"]
    logits = stages["stage 1"].mean((0, 1)) @ head["kernel"] + head["bias"]
    exponents = np.exp(np.float64(logits))
    np.testing.assert_allclose(exponents / exponents.sum(), probabilities[2], atol=1e-6)
    pixels, evidence, caption, method = drawn["evidence.png"]
    assert method == "Grad-CAM"
    np.testing.assert_array_equal(pixels, test_set["image"][2])
    bag = run.class_names.index("Bag")
    # behind a mean over the pixels and one dense layer, the gradient is the layer's weights
    weights = np.float64(head["kernel"][:, bag]) / 14**2
    np.testing.assert_allclose(evidence, np.maximum(stages["stage 1"] @ weights, 0), atol=1e-7)
    assert evidence.max() > 1e-5
    assert caption.startswith(f"Bag ({probabilities[2, bag]:.1%}); predicted: ")
    pixels, (field,) = drawn["receptive_fields.png"]
    assert field.title == "stage1_block1\nstride 2 x 2\nfield 11 x 11"
    assert field.box == (9, 9, 11, 11)  # about pixel 14, which the stem strides to
    seen = np.argwhere(field.strength)
    assert (seen.min(axis=0).tolist(), seen.max(axis=0).tolist()) == ([9, 9], [19, 19])

    arguments = (f"--image={photos / '2.png'}", "--class=Bag", "--method=grad_cam++")
    assert use("inspect", *flags, *arguments)[0] == 0
    _, evidence, _, method = drawn["evidence.png"]
    assert method == "Grad-CAM++"
    assert evidence.shape == (14, 14)

    code, _, error = use("inspect", *flags, f"--image={photos / '2.png'}", "--class=Bags")
    assert code == 1
    assert error == "class 'Bags': is not one of the run's classes (did you mean 'Bag'?)\n"
    code, _, error = use("inspect", *flags, f"--image={photos / 'none.png'}")
    assert (code, error) == (1, f"{photos}/none.png: there is no such file\n")


def test_features_of_a_split_are_the_models_own(use, reference, test_set, tmp_path):
    path = tmp_path / "features.npz"
    layers = ("--layer=stage1_block1", "--layer=stem/conv", "--pool=none")
    flags = (f"--workdir={reference}", f"--to={path}", "--split=test[:70]", *layers)
    code, output, error = use("features", *flags)
    assert (code, error) == (0, "")
    assert "  stage1_block1  70 x 14 x 14 x 4  float32\n" in output
    run, found = open_run(reference), np.load(path)
    pixels = (test_set["image"][:70].astype(np.float32) / 255 - 0.2860) / 0.3530
    _, kept = run.model.apply(
        run.variables, pixels, train=False, capture_intermediates=True, mutable="intermediates"
    )
    kept = kept["intermediates"]
    stage, stem = kept["stage1_block1"], kept["stem"]["conv"]
    np.testing.assert_allclose(found["stage1_block1"], stage["__call__"][0], atol=1e-5)
    np.testing.assert_allclose(found["stem/conv"], stem["__call__"][0], atol=1e-5)
    np.testing.assert_array_equal(found["label"], test_set["label"][:70])
    assert tuple(found["class_names"]) == run.class_names


def test_features_of_files_have_their_names(use, reference, photos, test_set, tmp_path):
    path = tmp_path / "features.npz"
    run, batch = f"--workdir={reference}", "--batch-size=2"
    code, _, error = use("features", run, f"--to={path}", batch, photos)
    assert code == 0
    assert error.startswith(f"{photos}/3.png: cannot be read: ")
    found, good = np.load(path), [0, 1, 2, 4, 5, 6]
    assert found["path"].tolist() == [f"{photos}/{number}.png" for number in good]
    whole = tmp_path / "whole.npz"
    assert use("features", run, f"--to={whole}", "--pool=none", "--split=test[:7]")[0] == 0
    maps = np.load(whole)["stage1_block1"]
    means = np.float64(maps[good]).mean((1, 2))
    np.testing.assert_allclose(found["stage1_block1"], means, atol=1e-6)

    assert "is already there" in use("features", run, f"--to={path}", photos)[2]
    other = f"--to={tmp_path / 'other.npz'}"
    code, _, error = use("features", run, other, "--layer=stage1_blok1")
    assert code == 1
    assert error.startswith("layer 'stage1_blok1': the network has none with a feature map of that")
    assert "(did you mean 'stage1_block1'?)" in error
    assert "--split: only without PATH" in use("features", run, other, "--split=test", photos)[2]
    code, _, error = use("features", run, other, photos / "3.png")
    assert (code, error.splitlines()[1]) == (1, "features: there is no image that can be read")
    assert not (tmp_path / "other.npz").exists()
