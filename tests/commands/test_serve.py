"""`serve`: a real process on a real socket, asked well and asked badly."""

import asyncio
import io
import json
import re
import runpy
import shutil
import signal
import socket
import struct
import sys
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import matplotlib
import numpy as np
import pytest
import yaml
from driver import ROOT
from PIL import Image
from server import multipart, read_all

from cnn_jax.__main__ import _parser, main
from cnn_jax.commands.predict import predict
from cnn_jax.data.image_files import read_image
from cnn_jax.data.sources import open_source
from cnn_jax.storage import place
from cnn_jax.trained import open_run

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


@pytest.fixture(scope="module")
def server(start_server, reference):
    return start_server(
        f"--workdir={reference}",
        "--max-batch=4",
        "--max-body=1",
        "--max-pixels=1",
        "--timeout=1",
        "--max-connections=40",
    )


@pytest.fixture(scope="module")
def photos(reference, tmp_path_factory):
    """Files of distinct images, of the network's size, and of others in several formats."""
    data_dir = open_run(reference).config.data.data_dir
    source = open_source("fashion_mnist_10k", "test[:24]", data_dir=data_dir)
    folder = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(source.batch(np.arange(24))["image"][..., 0]):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rng = np.random.default_rng(0)
    colours = cv2.resize(rng.integers(0, 256, (9, 13, 4), np.uint8), (300, 200))
    image = Image.fromarray(colours)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.convert("RGB").save(folder / "turned.jpg", exif=exif)
    image.save(folder / "transparent.png")
    image.convert("RGB").save(folder / "photo.webp")
    image.convert("P").save(folder / "moving.gif", save_all=True, append_images=[image])
    image.convert("CMYK").save(folder / "print.jpg")
    for name in ("scan.tif", "plain.bmp", "plain.ppm"):
        image.convert("RGB").save(folder / name)
    return folder


@pytest.fixture(scope="module")
def expected(reference, photos):
    """What the command `predict` says of each file: all classes with their probabilities."""
    found = predict(reference, [str(photos)], top=10, batch_size=1)
    return {each.path.name: each.classes for each in found}


@pytest.fixture(scope="module")
def good(photos):
    return (photos / "0.png").read_bytes()


def classes_of(prediction):
    return tuple((each["class"], each["probability"]) for each in prediction["classes"])


def assert_close(found, expected):
    """The same but for rounding: a batch of another size is another program."""
    assert dict(found) == pytest.approx(dict(expected), abs=1e-6)


def assert_refused(answer, status, text):
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert list(answer.json) == ["error"]
    assert text in answer.json["error"]


def status_of(received: bytes) -> int:
    return int(received.split(b" ", 2)[1])


def test_every_format_is_answered_as_predict_answers(server, photos, expected):
    assert len(expected) == 32
    for name, classes in expected.items():
        answer = server.predict(photos / name, "?top=10")
        assert answer.status == 200
        (prediction,) = answer.json["predictions"]
        assert classes_of(prediction) == classes, name  # bit for bit
    (few,) = server.predict(photos / "0.png", "?top=2").json["predictions"]
    assert classes_of(few) == expected["0.png"][:2]
    (default,) = server.predict(photos / "0.png").json["predictions"]
    assert classes_of(default) == expected["0.png"][:5]


def test_clients_at_the_same_time_get_their_own_answers(server, photos, expected):
    before = server.metrics()
    names = [f"{number % 24}.png" for number in range(96)]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda name: server.predict(photos / name, "?top=10"), names))
    for name, answer in zip(names, answers, strict=True):
        assert answer.status == 200
        assert_close(classes_of(answer.json["predictions"][0]), expected[name])
    risen = server.rises(before)
    assert risen["cnn_jax_requests_total{/v1/predict,200}"] == 96
    assert risen["cnn_jax_batch_images_sum"] == 96
    assert risen["cnn_jax_request_seconds_count{/v1/predict}"] == 96
    assert risen["cnn_jax_confidence_count"] == 96
    classes = [expected[name][0][0] for name in names]
    assert risen[f"cnn_jax_predicted_total{{{classes[0]}}}"] == classes.count(classes[0])


def test_several_files_in_one_request(server, photos, expected):
    names = [f"{number}.png" for number in range(11)]
    body, kind = multipart({name: (photos / name).read_bytes() for name in names})
    answer = server.ask("POST", "/v1/predict?top=10", body, {"Content-Type": kind})
    predictions = answer.json["predictions"]
    assert [each["file"] for each in predictions] == names
    for name, prediction in zip(names, predictions, strict=True):
        assert_close(classes_of(prediction), expected[name])

    body, kind = multipart({"good.png": (photos / "0.png").read_bytes(), "bad.png": b"bad"})
    answer = server.ask("POST", "/v1/predict", body, {"Content-Type": kind})
    assert_refused(answer, 400, "bad.png: cannot be read: not an image of a kind that can be read")


def test_what_is_served(server, reference):
    said = server.ask("GET", "/v1/model").json
    run = open_run(reference)
    assert said["class_names"] == list(run.class_names)
    assert said["image"] == {"height": 28, "width": 28, "channels": 1}
    assert said["preprocessing"]["mean"] == [0.2860]
    assert (said["step"], said["ema"], said["explains"]) == (24, False, True)
    assert len(said["digest"]) == 64
    assert said["limits"]["max_body"] == 2**20
    assert server.ask("GET", "/healthz").json == {"status": "alive"}
    assert server.ask("GET", "/readyz").json == {"status": "ready"}
    page = server.ask("GET", "/")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_the_evidence_for_a_class_is_drawn(server, reference, photos, good, expected):
    run = open_run(reference)
    with Image.open(photos / "0.png") as image:
        pixels = np.asarray(image)
    # behind a mean over the pixels and one dense layer, the gradient is the layer's weights
    model = run.model.clone(features_only=True)
    normalized = run.normalize(pixels[None, ..., None])
    (stage,) = model.apply(run.variables, normalized, train=False)
    weights = np.asarray(run.variables["params"]["head"]["kernel"], np.float64)
    for chosen in ("Bag", "Sandal"):
        answer = server.ask(
            "POST", f"/v1/explain?class={chosen}", good, {"Content-Type": "image/png"}
        )
        assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png")
        index = run.class_names.index(chosen)
        assert answer.headers["X-Class-Index"] == str(index)
        evidence = np.maximum(np.asarray(stage[0], np.float64) @ weights[:, index], 0)
        share = cv2.resize(evidence / evidence.max(), (448, 448), interpolation=cv2.INTER_CUBIC)
        share = np.clip(share, 0, 1)
        heat = 255 * matplotlib.colormaps["inferno"](share)[..., :3]
        opacity = 0.75 * share[..., None]
        image = cv2.resize(pixels, (448, 448))[..., None]
        with Image.open(io.BytesIO(answer.body)) as drawn:
            colours = np.asarray(drawn, float)
        blended = image * (1 - opacity) + heat * opacity
        np.testing.assert_allclose(colours, blended, rtol=0, atol=5)  # of 8 bits, twice
    answer = server.ask("POST", "/v1/explain", good, {"Content-Type": "image/png"})
    assert run.class_names[int(answer.headers["X-Class-Index"])] == expected["0.png"][0][0]
    answer = server.ask("POST", "/v1/explain?class=Bags", good, {"Content-Type": "image/png"})
    assert_refused(answer, 400, "class='Bags': /v1/model has the names")


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose header claims a size, with these chunks alone."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    written = [
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def bodies(photos) -> dict[str, tuple[bytes, int, str]]:
    jpeg = (photos / "turned.jpg").read_bytes()
    image = (photos / "0.png").read_bytes()
    rows = zlib.compress(bytes(1501 * 1000))
    return {
        "a JPEG cut short": (jpeg[: len(jpeg) // 2], 400, "the file cannot be read: "),
        "a PNG cut short": (image[:90], 400, "the file cannot be read: "),
        "nothing": (b"", 400, "cannot be read: not an image"),
        "text": (b"This is no image." * 99, 400, "cannot be read: not an image"),
        "noise": (np.random.default_rng(0).bytes(99_999), 400, "cannot be read: not an image"),
        "more pixels than the limit": (
            png(1500, 1000, (b"IDAT", rows)),
            422,
            "is 1500 x 1000 pixels: must be 1 to 1,000,000 in all",
        ),
        "a bomb": (png(50_000, 50_000, (b"IDAT", rows)), 422, "must be 1 to 1,000,000"),
        "pixels that are not there": (png(28, 28), 400, "the file cannot be read: "),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400, "not an image"),
        "more bytes than the limit": (image + bytes(2**20), 413, "larger than 1 MiB"),
    }


def test_bad_images_have_one_sentence(server, photos, good, expected):
    before = server.metrics()
    for name, (body, status, text) in bodies(photos).items():
        assert (name, server.predict(body).status) == (name, status)
        assert_refused(server.predict(body), status, text)
        answer = server.predict(good, "?top=10")
        assert classes_of(answer.json["predictions"][0]) == expected["0.png"]
    risen = server.rises(before)
    assert risen["cnn_jax_refused_total{no_image}"] == 2 * 7
    assert risen["cnn_jax_refused_total{pixels}"] == 2 * 2
    assert risen["cnn_jax_refused_total{bytes}"] == 2
    assert risen["cnn_jax_requests_total{/v1/predict,422}"] == 4


def test_bad_images_among_good_ones_change_nothing_for_them(server, photos, expected):
    bad = [(body, status) for body, status, _ in bodies(photos).values()]
    good = [((photos / f"{number}.png").read_bytes(), f"{number}.png") for number in range(24)]
    mixed = [*bad, *good] * 6
    np.random.default_rng(0).shuffle(mixed)
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda each: server.predict(each[0], "?top=10"), mixed))
    for (_, wanted), answer in zip(mixed, answers, strict=True):
        if isinstance(wanted, int):
            assert answer.status == wanted
        else:
            assert answer.status == 200
            assert_close(classes_of(answer.json["predictions"][0]), expected[wanted])


def test_bad_requests_have_one_sentence(server, good):
    def refused(status, text, method="POST", path="/v1/predict", body=good, **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named = {"Content-Type": "image/png"} | named
        assert_refused(server.ask(method, path, body, named), status, text)

    refused(404, "GET /../../etc/passwd: Not Found", "GET", "/../../etc/passwd")
    refused(404, "Not Found", "GET", "/%2e%2e/%2e%2e/etc/passwd")
    refused(404, "Not Found", "GET", "/v1/predict/../../page.html")
    refused(405, "GET /v1/predict: Method Not Allowed", "GET")
    for top in ("0", "-1", "many", "%C2%B2", "9" * 99, ""):
        refused(400, "must be an integer >= 1", path=f"/v1/predict?top={top}")
    refused(400, "'topp': there is no such parameter; top is one", path="/v1/predict?topp=1")
    refused(400, "top: is there 2 times", path="/v1/predict?top=1&top=2")
    refused(400, "'top': there is no such parameter; class is one", path="/v1/explain?top=1")
    refused(415, "must be image/", Content_Type="application/json")
    refused(415, "multipart/form-data", Content_Type="application/x-www-form-urlencoded")
    refused(415, "must not be compressed", Content_Encoding="gzip")
    form = "multipart/form-data; boundary=b"
    refused(400, "boundary", Content_Type="multipart/form-data")
    refused(400, "it must begin and end with its boundary", Content_Type=form)
    refused(400, "it has no file", body=b"--b--\r\n", Content_Type=form)
    field = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n--b--\r\n'
    refused(400, "each part must be a file", body=field, Content_Type=form)
    nested = (
        b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\n--c--\r\n--b--\r\n"
    )
    refused(400, "each part must be a file", body=nested, Content_Type=form)
    body, _ = multipart({f"{n}.png": b"" for n in range(300)}, "b")
    refused(413, "300 files: at most 256", body=body, Content_Type=form)
    cut, _ = multipart({"a.png": good}, "b")
    refused(400, "the form cannot be read", body=cut[:-20], Content_Type=form)
    body, kind = multipart({"a.png": good, "b.png": good})
    refused(
        400, "2 images: an explanation is of one", path="/v1/explain", body=body, Content_Type=kind
    )


def test_hostile_sockets_do_not_take_it_down(server, good, expected):
    length = b"Content-Length: %d\r\n\r\n" % len(good)
    # More than is allowed is refused unread: a gigabyte by its name, an endless body at the limit.
    assert status_of(server.send(HEAD + b"Content-Length: 1000000000\r\n\r\n")) == 413
    with server.connect() as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        sent, chunk = 0, b"%x\r\n%s\r\n" % (2**16, bytes(2**16))
        connection.settimeout(0.0)
        while True:
            try:
                received = connection.recv(65536)
                break
            except BlockingIOError:
                assert sent < 2**30, "the server reads on"
            try:
                sent += connection.send(chunk[sent % len(chunk) :])
            except BlockingIOError:
                time.sleep(0.001)
    assert status_of(received) == 413
    # What is not HTTP is answered by closing, after what came before it.
    assert status_of(server.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")) == 400
    assert status_of(server.send(b"GET / HTTP/9.9\r\n\r\n")) == 400
    assert status_of(server.send(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n")) == 400
    assert status_of(server.send(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9999 + b"\r\n")) == 400
    assert status_of(server.send(HEAD + b"Content-Length: -1\r\n\r\n")) == 400
    assert status_of(server.send(HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n")) == 400
    received = server.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n")
    assert status_of(received) == 400
    with server.connect() as connection:
        connection.sendall(HEAD + length + good)
        received = connection.recv(65536)
        assert status_of(received) == 200
        connection.sendall(b"\x00junk\x00\r\n\r\n")
        assert status_of(read_all(connection)) == 400
    assert status_of(server.send(HEAD + length + good + b"\x00junk\x00\r\n\r\n")) == 400
    # Two requests on one connection, sent at once, are answered in their order.
    received = server.send(HEAD + length + good + HEAD + b"Connection: close\r\n" + length + good)
    assert received.count(b"HTTP/1.1 200") == 2
    # Clients that leave, in the middle and rudely.
    for part in (HEAD, HEAD + length, HEAD + length + good[:50]):
        with server.connect() as connection:
            connection.sendall(part)
        with server.connect() as connection:
            connection.sendall(part)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    answer = server.predict(good, "?top=10")
    assert classes_of(answer.json["predictions"][0]) == expected["0.png"]
    assert server.process.lines[1].startswith("ready: ")
    lines = [line for line in server.process.lines[2:] if not line.startswith("libpng error: ")]
    assert lines == []  # no traceback, whatever came


def test_slow_clients_are_dropped_and_hold_up_nobody(server, good, expected):
    slow = [
        server.connect(),  # says nothing
        server.connect(),  # does not end its header
        server.connect(),  # does not end its body
        server.connect(),  # nor this, of many files
    ]
    slow[1].sendall(HEAD)
    slow[2].sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + good[:50])
    body, kind = multipart({"a.png": good}, "b")
    head = HEAD.replace(b"image/png", kind.encode())
    slow[3].sendall(head + b"Content-Length: 1000\r\n\r\n" + body[:-20])
    answer = server.predict(good, "?top=10")
    assert classes_of(answer.json["predictions"][0]) == expected["0.png"]
    received = [read_all(each) for each in slow]
    assert received[:2] == [b"", b""]
    for each in received[2:]:
        assert status_of(each) == 408
        assert b"the body was not there in 1 seconds" in each
    for each in slow:
        each.close()


def test_more_connections_than_there_may_be(server, good):
    before = server.metrics()
    open_ones = [server.connect() for _ in range(40)]
    server.process.wait_for(lambda: status_of(server.send(b"GET / HTTP/1.0\r\n\r\n")) == 503)
    refused = server.send(b"GET / HTTP/1.0\r\n\r\n")
    assert refused.endswith(b'{"error": "too many connections are open"}')
    for each in open_ones:
        each.close()
    server.process.wait_for(lambda: status_of(server.send(b"GET / HTTP/1.0\r\n\r\n")) == 200)
    assert server.predict(good).status == 200
    assert server.rises(before)["cnn_jax_refused_total{connections}"] >= 2


def test_a_full_queue_refuses_a_full_batch_is_computed_and_a_stop_answers_all(
    start_server, reference, photos, good, expected
):
    # An image waits an hour for others, so that what is under way stays so.
    server = start_server(
        f"--workdir={reference}", "--max-batch=6", "--max-waiting=6", "--max-delay=3600000"
    )
    names = [f"{number}.png" for number in range(6)]
    gauge = "cnn_jax_requests_under_way"

    def under_way(count):
        server.process.wait_for(lambda: server.metrics()[gauge] == count)

    def ask(clients, names):
        return [clients.submit(server.predict, photos / name, "?top=10") for name in names]

    with ThreadPoolExecutor(6) as clients:
        asked = ask(clients, names[:5])
        under_way(5)
        body, kind = multipart({"a.png": good, "b.png": good})
        answer = server.ask("POST", "/v1/predict", body, {"Content-Type": kind})
        assert_refused(answer, 429, "too many requests are under way; try again in 1 s")
        assert answer.headers["Retry-After"] == "1"
        asked += ask(clients, names[5:])
        for name, each in zip(names, asked, strict=True):
            assert_close(classes_of(each.result().json["predictions"][0]), expected[name])
        metrics = server.metrics()
        assert metrics["cnn_jax_batch_images_count"] == 1
        assert metrics["cnn_jax_batch_images_sum"] == 6
        assert metrics["cnn_jax_batch_images_bucket{4.0}"] == 0
        assert metrics["cnn_jax_refused_total{full_queue}"] == 1

        asked = ask(clients, names[:4])
        under_way(4)
        idle = server.connect()
        server.process.send(signal.SIGTERM)
        for name, each in zip(names, asked, strict=False):
            answer = each.result()
            assert answer.headers["Connection"] == "close"
            assert_close(classes_of(answer.json["predictions"][0]), expected[name])
    assert server.process.end() == 0
    assert server.process.lines[2:] == ["stopping", "stopped"]
    assert read_all(idle) == b""
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_a_stop_before_it_is_ready_does_not_wait_for_the_compiler(start_server, reference):
    server = start_server(f"--workdir={reference}", "--max-batch=256", until="listening at ")
    assert_refused(server.ask("GET", "/readyz"), 503, "the server is starting")
    assert server.ask("GET", "/healthz").status == 200
    server.process.send(signal.SIGTERM)
    assert server.process.end() == 143
    assert server.process.lines[1:] == ["stopping", "stopped"]


@pytest.fixture(scope="module")
def artefact(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "clothes.zip"
    assert main(["export", f"--workdir={reference}", f"--to={path}"]) == 0
    return path


def test_an_exported_file_answers_alike_without_evidence(
    start_server, reference, artefact, photos, good, expected
):
    server = start_server(f"--model={artefact}", "--stop-timeout=1")
    for name, classes in expected.items():
        (prediction,) = server.predict(photos / name, "?top=10").json["predictions"]
        assert dict(classes_of(prediction)) == pytest.approx(dict(classes), abs=1e-5)
    said = server.ask("GET", "/v1/model").json
    assert said["explains"] is False
    assert said["class_names"] == list(open_run(reference).class_names)
    answer = server.ask("POST", "/v1/explain", good, {"Content-Type": "image/png"})
    assert_refused(answer, 404, "Grad-CAM needs the network of a run (--workdir)")

    # Who has not sent all of it holds up a stop no longer than --stop-timeout.
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + good[:50])
        gauge = "cnn_jax_requests_under_way"
        server.process.wait_for(lambda: server.metrics()[gauge] == 1)
        server.process.send(signal.SIGINT)
        assert server.process.end() == 0
    assert server.process.lines[2:] == ["stopping", "stopped"]


def test_recipes_for_kubernetes_say_what_the_server_understands(server):
    for name in ("serve.yaml", "kserve.yaml"):
        text = (ROOT / "launch" / name).read_text()
        spec = next(yaml.safe_load_all(text))["spec"]
        (container,) = (spec.get("predictor") or spec["template"]["spec"])["containers"]
        assert container["command"] == ["python", "-m", "cnn_jax", "serve"]
        options = _parser().parse_args(["serve", *container["args"]])
        assert options.host == "0.0.0.0"
        assert [each["containerPort"] for each in container["ports"]] == [options.port]
        probes = [value["httpGet"] for key, value in container.items() if key.endswith("Probe")]
        assert {"path": "/readyz", "port": options.port} in probes
        for probe in probes:
            assert probe["port"] == options.port
            assert server.ask("GET", probe["path"]).status == 200


def test_the_recipe_for_triton_gives_each_request_its_own_rows(
    artefact, photos, expected, tmp_path, monkeypatch
):
    # Triton itself is played: what it hands over, and what it takes.
    played = types.SimpleNamespace(
        get_input_tensor_by_name=lambda request, name: request[name],
        Tensor=lambda name, array: (name, array),
        InferenceResponse=lambda tensors: dict(tensors),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", played)
    shutil.copy(artefact, tmp_path / "model.zip")
    shutil.copy(ROOT / "launch" / "triton" / "clothes" / "1" / "model.py", tmp_path)
    model = runpy.run_path(str(tmp_path / "model.py"))["TritonPythonModel"]()
    model.initialize({"model_config": json.dumps({"max_batch_size": 6})})

    def tensor(names):
        images = np.stack([read_image(photos / name, (28, 28, 1), fraction=1.0) for name in names])
        return types.SimpleNamespace(as_numpy=lambda: images)

    asked = [["0.png"], ["1.png", "2.png", "3.png"], ["4.png"]]
    answers = model.execute([{"images": tensor(names)} for names in asked])
    for names, answer in zip(asked, answers, strict=True):
        for name, row in zip(names, answer["probabilities"], strict=True):
            assert sorted(row, reverse=True) == pytest.approx(
                [share for _, share in expected[name]], abs=1e-5
            )


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run"])
def test_a_run_on_object_storage_is_taken_where_it_is(url, monkeypatch):
    pytest.importorskip("gcsfs")
    pytest.importorskip("s3fs")
    monkeypatch.setattr(type(place(url)), "is_dir", lambda path: True)
    assert str(_parser().parse_args(["serve", "--workdir", url]).workdir) == url


def test_the_configuration_for_triton_is_that_of_the_file(artefact):
    text = (ROOT / "launch" / "triton" / "clothes" / "config.pbtxt").read_text()
    with zipfile.ZipFile(artefact) as file:
        about = json.loads(file.read("model.json"))
    triton = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
    for side, name in (("input", "images"), ("output", "probabilities")):
        pattern = rf'^{side} \[ {{ name: "(\w+)", data_type: (\w+), dims: \[ ([\d, ]+) \] }} \]$'
        ((found, kind, dims),) = re.findall(pattern, text, re.MULTILINE)
        assert found == name
        assert kind == triton[about[side]["dtype"]]
        batch, *shape = about[side]["shape"]
        assert (batch, shape) == ("batch", [int(size) for size in dims.split(",")])


def test_the_recipe_for_ray_answers_as_predict_does(artefact, photos, expected, monkeypatch):
    # Ray and starlette are played: what they hand over, and what they take.
    def deployment(**options):
        return lambda network: types.SimpleNamespace(bind=lambda path: network(path))

    def batch(**options):
        def alone(compute):
            async def call(self, image):
                (row,) = await compute(self, [image])
                return row

            return call

        return alone

    def answer(content, status_code=200):
        return status_code, content

    played = {
        "ray": {"serve": types.SimpleNamespace(deployment=deployment, batch=batch)},
        "starlette": {},
        "starlette.requests": {"Request": object},
        "starlette.responses": {"JSONResponse": answer},
    }
    for name, contents in played.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**contents))
    monkeypatch.setenv("MODEL", str(artefact))
    application = runpy.run_path(str(ROOT / "launch" / "ray_serve.py"))["application"]

    def ask(contents):
        async def body():
            return contents

        return asyncio.run(application(types.SimpleNamespace(body=body)))

    for name in ("0.png", "1.png"):
        status, found = ask((photos / name).read_bytes())
        assert status == 200
        for row, (label, share) in zip(found["classes"], expected[name], strict=False):
            assert row["class"] == label
            assert row["probability"] == pytest.approx(share, abs=1e-5)
    assert ask(b"no image")[0] == 400


def test_mistakes_have_one_message(reference, tmp_path, capsys, monkeypatch):
    run = f"--workdir={reference}"

    def refused(code, *arguments):
        try:
            found = main(["serve", *arguments])
        except SystemExit as end:
            found = end.code
        assert found == code
        return capsys.readouterr().err.splitlines()[-1]

    assert "one of the arguments --workdir --model is required" in refused(2)
    assert "not allowed with" in refused(2, run, "--model=x")
    assert "--checkpoint: only with --workdir" in refused(2, "--model=x", "--checkpoint=best")
    assert "--ema: only with --workdir" in refused(2, "--model=x", "--ema")
    assert "must be an integer from 0 to 65535" in refused(2, run, "--port=70000")
    assert "from 1 to 89" in refused(2, run, "--max-pixels=90")
    assert "--max-waiting 3: must be at least --max-batch 32" in refused(2, run, "--max-waiting=3")
    assert "the run has its configuration" in refused(2, run, "--config.batch_size=3")
    assert "none.zip: cannot be read: No such file" in refused(1, f"--model={tmp_path}/none.zip")
    (tmp_path / "text.zip").write_text("text")
    assert "is no StableHLO file that export has written" in refused(
        1, f"--model={tmp_path}/text.zip"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        message = f"cannot listen at --host 127.0.0.1 --port {port}: "
        assert message in refused(1, run, f"--port={port}")
    for name in ("server", "application"):
        monkeypatch.delitem(sys.modules, f"cnn_jax.serving.{name}")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert refused(1, run) == (
        'serve needs aiohttp, which is not installed: pip install "cnn_jax[serve]"'
    )
