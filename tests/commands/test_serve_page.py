"""The page of `serve`, used by a real browser as a person uses it."""

import asyncio
import base64
import io
import json

import numpy as np
import pytest
from browser import CHROMIUM, browser
from PIL import Image

from cnn_jax.commands.predict import predict
from cnn_jax.data.sources import open_source
from cnn_jax.trained import open_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(start_server, reference):
    return start_server(f"--workdir={reference}", "--max-body=1", "--max-batch=1")


@pytest.fixture(scope="module")
def photos(reference, tmp_path_factory):
    data_dir = open_run(reference).config.data.data_dir
    source = open_source("fashion_mnist_10k", "test[:2]", data_dir=data_dir)
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in zip("ab", source.batch(np.arange(2))["image"][..., 0], strict=True):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "text.png").write_text("no image")
    (folder / "large.png").write_bytes(bytes(2**20 + 1))
    return folder


def says(selector):
    return f"document.querySelector('{selector}').textContent"


def shown(selector):
    return f"document.querySelector('{selector}').checkVisibility()"


SHOWN = (
    "JSON.stringify([...document.querySelectorAll('#classes li')].map((row) =>"
    " [row.querySelector('.track').innerText, row.querySelector('.share').innerText]))"
)
PIXELS = """(() => {
  const image = document.querySelector("#preview"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL().split(",")[1];
})()"""


async def shows(page, path, reference):
    """Waits until the page shows what `predict` says of the file."""
    (expected,) = predict(reference, [str(path)], batch_size=1)
    rows = [[name, f"{100 * share:.1f} %"] for name, share in expected.classes]
    await page.until(f"{says('#image-title')} == '{path.name}'")
    await page.until("!document.querySelector('#result').classList.contains('busy')")
    assert json.loads(await page.evaluate(SHOWN)) == rows
    said = await page.evaluate(says("#status"))  # to who does not see the page
    assert said.startswith(f"{rows[0][0]}, {rows[0][1]}.")
    return expected.classes[0][0]


def test_a_person_drops_an_image_and_sees_classes_and_evidence(server, photos, reference):
    async def use():
        async with browser() as page:
            await page.open(server.address)
            await page.until("document.querySelector('#class').length == 10")
            about = await page.evaluate(says("#about"))
            assert about.endswith("(step 24); sees 28 x 28 pixels, grey; 10 classes")
            assert not await page.evaluate(shown("#result"))

            await page.drop(photos / "a.png")
            top = await shows(page, photos / "a.png", reference)
            assert await page.evaluate("document.querySelector('#preview').naturalWidth") == 28

            # the overlay, for the predicted class and for a chosen one, by the keyboard
            assert await page.evaluate("document.querySelector('#class').value") == top
            await page.evaluate("document.querySelector('#file').focus()")
            await page.press("Tab", 9)
            await page.press(" ", 32, " ")
            await page.until("document.querySelector('#preview').naturalWidth == 448")
            assert await drawn(page) == await explained(server, photos / "a.png", top)
            other = "Bag" if top != "Bag" else "Coat"
            await page.press("Tab", 9)
            assert await page.evaluate("document.activeElement.id") == "class"
            await page.press(other[0], ord(other[0]), other[0])
            await page.until(f"document.querySelector('#preview').alt.includes('for {other},')")
            assert await drawn(page) == await explained(server, photos / "a.png", other)

            # it stays on for the next image
            await page.choose(photos / "b.png")
            top = await shows(page, photos / "b.png", reference)
            await page.until(f"document.querySelector('#preview').alt.includes('for {top},')")
            assert await drawn(page) == await explained(server, photos / "b.png", top)
            assert page.complaints == []

            await page.choose(photos / "text.png")
            await page.until(shown("#alarm"))
            text = "text.png: the file cannot be read: not an image of a kind that can be read."
            assert await page.evaluate(says("#alarm")) == text
            assert not await page.evaluate(shown("#result"))
            await page.choose(photos / "large.png")
            await page.until(f"{says('#alarm')} == 'large.png is larger than 1 MiB.'")
            await page.choose(photos / "b.png")
            await page.until(shown("#result"))
            assert not await page.evaluate(shown("#alarm"))

            for width in (1200, 360, 320):
                for dark in (False, True):
                    with Image.open(io.BytesIO(await page.look(width=width, dark=dark))) as look:
                        corner = np.asarray(look.convert("L"))[2, 2]
                    assert (corner < 64) == dark
                    room = "document.documentElement.scrollWidth - innerWidth"
                    assert await page.evaluate(room) <= 0  # nothing hangs over the edge

    asyncio.run(use())


async def drawn(page):
    return pixels_of(base64.b64decode(await page.evaluate(PIXELS)))


async def explained(server, path, chosen):
    answer = await asyncio.to_thread(
        server.ask,
        "POST",
        f"/v1/explain?class={chosen.replace(' ', '%20')}",
        path.read_bytes(),
        {"Content-Type": "image/png"},
    )
    assert answer.status == 200
    return pixels_of(answer.body)


def pixels_of(png):
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB").tobytes()
