"""What a server does about a network that fails or hangs; the rest is in tests/commands."""

import asyncio
import io
import threading

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from cnn_jax.serving import application
from cnn_jax.serving.application import Service
from cnn_jax.serving.limits import Limits
from cnn_jax.serving.network import Network

PNG = {"Content-Type": "image/png"}


class Device:
    """A network that says "dark" or "bright" of one pixel, unless it `fails` or waits at a gate."""

    def __init__(self):
        self.gate, self.began = threading.Event(), threading.Event()
        self.gate.set()
        self.fails = False

    def compile(self, size):
        def program(images):
            assert len(images) == size
            self.began.set()
            assert self.gate.wait(60)
            if self.fails:
                raise RuntimeError("the device is gone")
            bright = images[:, 0, 0, 0] / 255
            return np.stack([1 - bright, bright], axis=1)

        return program

    def compile_evidence(self):
        def evidence(pixels, chosen):
            self.began.set()
            assert self.gate.wait(60)
            return np.ones((1, 1))

        return evidence


def with_service(use, **limits):
    device = Device()
    about, names, shape = {"model": "played"}, ("dark", "bright"), (1, 1, 1)
    network = Network(about, names, shape, 1.0, device.compile, device.compile_evidence)

    async def main():
        service = Service(network, Limits(**limits), num_threads=1)
        async with TestClient(TestServer(service.application())) as client, asyncio.timeout(60):
            await use(service, client, device)

    asyncio.run(main())


def png(value):
    file = io.BytesIO()
    Image.new("L", (1, 1), value).save(file, "PNG")
    return file.getvalue()


async def status(client, path):
    async with client.get(path) as answer:
        return answer.status


async def predict(client, value):
    async with client.post("/v1/predict", data=png(value), headers=PNG) as answer:
        return answer.status, await answer.json()


BRIGHT = [{"class": "bright", "probability": 1.0}, {"class": "dark", "probability": 0.0}]


def test_it_is_ready_when_all_is_compiled_and_no_more_when_it_stops():
    async def use(service, client, device):
        assert await status(client, "/healthz") == 200
        assert await status(client, "/readyz") == 503
        assert await predict(client, 255) == (503, {"error": "the server is starting"})
        await service.warm_up()
        assert await status(client, "/readyz") == 200
        assert await predict(client, 255) == (200, {"predictions": [{"classes": BRIGHT}]})
        await service.stop(0)
        assert await status(client, "/healthz") == 200
        assert await status(client, "/readyz") == 503
        assert await predict(client, 255) == (503, {"error": "the server is stopping"})

    with_service(use, max_batch=2)


def test_a_stop_while_compiling_compiles_no_more():
    async def use(service, client, device):
        device.gate.clear()
        warming = asyncio.create_task(service.warm_up())
        await asyncio.to_thread(device.began.wait, 60)
        await service.stop(0)
        device.began.clear()
        device.gate.set()
        await warming
        assert not service.ready
        assert not device.began.is_set()

    with_service(use, max_batch=8)


def test_a_computation_that_fails_is_an_answer_and_the_next_is_another(capsys):
    async def use(service, client, device):
        await service.warm_up()
        device.fails = True
        sentence = "the computation has failed; the server's log says why"
        assert await predict(client, 255) == (500, {"error": sentence})
        device.fails = False
        assert (await predict(client, 255))[0] == 200
        assert await status(client, "/healthz") == 200

    with_service(use, max_batch=1)
    assert "RuntimeError: the device is gone" in capsys.readouterr().err


async def explain(client, value):
    async with client.post("/v1/explain?class=dark", data=png(value), headers=PNG) as answer:
        return answer.status, await answer.read()


@pytest.mark.parametrize("ask", [predict, explain])
def test_a_computation_that_hangs_is_unwell(ask, monkeypatch):
    async def use(service, client, device):
        await service.warm_up()
        device.began.clear()
        device.gate.clear()
        asked = asyncio.create_task(ask(client, 0))
        await asyncio.to_thread(device.began.wait, 60)
        assert await status(client, "/healthz") == 200
        monkeypatch.setattr(application, "STUCK", 0.0)
        assert await status(client, "/healthz") == 500
        device.gate.set()
        assert (await asked)[0] == 200
        assert await status(client, "/healthz") == 200

    with_service(use, max_batch=1)


def test_bodies_together_hold_no_more_than_their_share(monkeypatch):
    monkeypatch.setattr(application, "BODIES", 1)
    image = png(255)

    async def use(service, client, device):
        await service.warm_up()
        gate = asyncio.Event()

        async def slow():
            yield image[:50]
            await gate.wait()
            yield image[50:]

        asked = asyncio.create_task(client.post("/v1/predict", data=slow(), headers=PNG))
        while not service._held:
            await asyncio.sleep(0.001)
        assert await predict(client, 0) == (
            429,
            {"error": "too many requests are under way; try again in 1 s"},
        )
        gate.set()
        async with await asked as answer:
            assert answer.status == 200
        assert (await predict(client, 0))[0] == 200

    with_service(use, max_batch=1, max_body=len(image) + 10)
