"""Decoding and cropping against Pillow, NumPy and torchvision's published rule."""

import functools
import io
import math
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, features

from cnn_jax.data import images
from cnn_jax.data.images import (
    MAX_PIXELS,
    Box,
    ImageError,
    central_box,
    crop,
    crop_center,
    decode,
    decoders,
    random_box,
    shrink,
    size_of,
)
from cnn_jax.data.orientation import orientation_of


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without hard edges, so that decoders and resizers agree closely."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 37 + k) + np.cos(y / 29 + 2 * k) for k in range(3)]
    return np.uint8(127.5 + 60 * np.stack(waves, axis=-1))


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def worst(left: np.ndarray, right: np.ndarray) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_kinds_come_back_exactly(kind):
    pixels = smooth(40, 60)
    np.testing.assert_array_equal(decode(encoded(pixels, kind)), pixels)


def test_jpeg_is_what_pillow_decodes():
    data = encoded(smooth(120, 90), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as image:
        assert worst(decode(data), np.asarray(image)) <= 1


def test_everything_becomes_rgb_of_8_bits():
    pixels = smooth(30, 50)
    grey = pixels[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encoded(grey, "PNG")), as_rgb)
    assert worst(decode(encoded(grey, "JPEG", quality=100)), as_rgb) <= 3
    np.testing.assert_array_equal(decode(encoded(grey.astype(np.uint16) * 256, "PNG")), as_rgb)
    alpha = np.dstack([pixels, np.full((30, 50), 7, np.uint8)])
    np.testing.assert_array_equal(decode(encoded(alpha, "PNG")), pixels)
    cmyk = Image.fromarray(pixels).convert("CMYK")
    assert worst(decode(encoded(cmyk, "JPEG", quality=100)), pixels) <= 12
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    webp = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert worst(decode(webp), pixels) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_decoder_turns_an_image_as_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x010E] = "a picture"  # a tag before it
    exif[0x0112] = orientation
    data = encoded(smooth(30, 50), kind, exif=exif, quality=100)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert size_of(data) == expected.shape[:2]
    assert worst(decode(data), expected) <= 8
    assert decode(data).flags.c_contiguous


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_centre_is_pillows_of_the_turned_image(orientation, mode):
    """Also where the JPEG is decoded at a half, a quarter or an eighth."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(smooth(600, 800)).convert(mode)
    data = encoded(picture, "JPEG", exif=exif, quality=95)
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    left, top = (image.width - 480) // 2, (image.height - 480) // 2
    part = image.crop((left, top, left + 480, top + 480))
    for side in (100, 224, 500):
        out = np.empty((side, side, 3), np.uint8)
        crop_center(data, out, fraction=0.8)
        assert worst(out, np.asarray(part.resize((side, side), Image.Resampling.BILINEAR))) <= 6
        grey = np.empty((side, side, 1), np.uint8)
        crop_center(data, grey, fraction=0.8)
        assert worst(grey[..., 0], out @ [0.299, 0.587, 0.114]) <= 2


@pytest.mark.parametrize("size", [(500, 900), (900, 500)])
def test_an_image_on_its_side_is_made_as_small_as_the_upright_one(size):
    """Its detail shows the size that it was decoded at."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 5  # rows and columns exchanged
    upright = encoded(pixels, "JPEG", quality=100, subsampling=0)
    sideways = encoded(pixels.swapaxes(0, 1), "JPEG", exif=exif, quality=100, subsampling=0)
    out = np.empty((2, 224, 400, 3), np.uint8)
    for each, data in zip(out, (upright, sideways), strict=True):
        crop_center(data, each, fraction=1.0)
    assert worst(*out) <= 8


def tiff(order, *entries, counted=None):
    """EXIF's directory of entries (tag, type, value), of which it may count fewer."""
    sign = {"II": "<", "MM": ">"}[order]
    head = struct.pack(f"{sign}HIH", 42, 8, len(entries) if counted is None else counted)
    rows = [struct.pack(f"{sign}HHIHH", tag, kind, 1, value, 0) for tag, kind, value in entries]
    return order.encode() + head + b"".join(rows) + bytes(4)


def jpeg_of(*segments):
    """The head of a JPEG, of segments (marker, contents)."""
    parts = [marker + struct.pack(">H", len(data) + 2) + data for marker, data in segments]
    return b"\xff\xd8" + b"".join(b"\xff" + part for part in parts) + b"\xff\xd9"


def webp_of(*chunks):
    parts = [
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    ]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


SHORT, LONG = 3, 4
OTHER, TURNED = (0x010E, SHORT, 3), (0x0112, SHORT, 6)
EXIF, APP1, SCAN = b"Exif\0\0", b"\xe1", b"\xda"


XMP = b"http://ns.adobe.com/xap/1.0/\0"
ORIENTED = {
    "big first": (jpeg_of((APP1, EXIF + tiff("MM", OTHER, TURNED))), 6),
    "little first": (jpeg_of((APP1, EXIF + tiff("II", OTHER, TURNED))), 6),
    "of another type": (jpeg_of((APP1, EXIF + tiff("II", (0x0112, LONG, 6)))), 1),
    "uncounted": (jpeg_of((APP1, EXIF + tiff("MM", OTHER, TURNED, counted=1))), 1),
    "behind XMP": (jpeg_of((APP1, XMP), (APP1, EXIF + tiff("MM", TURNED))), 6),
    "among the pixels": (jpeg_of((SCAN, bytes(10)), (APP1, EXIF + tiff("MM", TURNED))), 1),
    "behind an odd chunk": (webp_of((b"ICCP", bytes(3)), (b"EXIF", tiff("II", TURNED))), 6),
}


@pytest.mark.parametrize(("data", "orientation"), ORIENTED.values(), ids=ORIENTED)
def test_where_and_how_exif_may_stand(data, orientation):
    assert orientation_of(data) == orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_turns_nothing(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(smooth(30, 50), kind, exif=exif)
    place = whole.index(b"MM\0*")
    random = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in random.integers(place - 12, place + 22, 2):
            damaged[at] = random.integers(256)
        assert orientation_of(bytes(damaged)) in range(1, 9)
    for end in range(len(whole)):
        assert orientation_of(whole[:end]) in (1, 6)
    wrong = whole[: place + 18] + b"\0\x09" + whole[place + 20 :]
    assert orientation_of(whole) == 6
    assert (orientation_of(wrong), orientation_of(whole.replace(b"MM\0*", b"MM\0+"))) == (1, 1)


def chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def test_image_bomb_is_refused_by_its_header():
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match=f"40000 x 40000 pixels: must be 1 to {MAX_PIXELS:,}"):
        decode(bomb)


def test_a_bomb_in_a_comment_is_passed_over():
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 * 2**20)))
    data = encoded(smooth(30, 50), "PNG")
    np.testing.assert_array_equal(decode(data[:33] + bomb + data[33:]), smooth(30, 50))


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image(data):
    with pytest.raises(ImageError):
        decode(data)


def test_whatever_a_decoder_raises_is_damage():
    with pytest.raises(ImageError, match=r"damaged \(no such item\)"), decoders():
        raise RuntimeError("no such  item")
    if features.check("avif"):  # Pillow raises RuntimeError for it
        hostile = encoded(smooth(20, 20), "AVIF").replace(b"iloc", b"free")
        with pytest.raises(RuntimeError, match="Missing or empty image item"):
            Image.open(io.BytesIO(hostile))
        with pytest.raises(ImageError, match="not an image of a kind that can be read"):
            size_of(hostile)


def test_lack_of_memory_is_not_damage():
    with pytest.raises(MemoryError), decoders():
        bytearray(2**62)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_image(kind):
    data = encoded(smooth(300, 200), kind)
    with pytest.raises(ImageError):
        decode(data[: len(data) // 2])


def test_flipped_bytes_in_a_jpeg_are_often_seen():
    """The others leave a valid JPEG, which has no checksum: Pillow and OpenCV see none of them."""
    data = encoded(smooth(375, 500), "JPEG", quality=90)
    rng = np.random.default_rng(0)
    seen = 0
    for place in rng.integers(700, len(data) - 2, 60):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        try:
            decode(bytes(damaged))
        except ImageError:
            seen += 1
    assert seen >= 10


def test_crop_of_the_same_size_is_a_copy():
    pixels = smooth(50, 70)
    out = np.empty((20, 30, 3), np.uint8)
    crop(encoded(pixels, "PNG"), lambda h, w: Box(11, 23, 20, 30), out)
    np.testing.assert_array_equal(out, pixels[11:31, 23:53])


@pytest.mark.parametrize(
    ("least", "size"),
    [
        ((300, 400), (0, 0)),
        ((188, 251), (0, 0)),
        ((188, 250), (188, 250)),
        ((95, 60), (188, 250)),
        ((94, 125), (94, 125)),
        ((1, 63), (47, 63)),
        ((0, 10), (0, 0)),
    ],
)
def test_a_jpeg_is_decoded_at_halves_alone(least, size):
    """Other eighths take libjpeg longer than the next of these; (0, 0) stands for the full size."""
    assert images._reduced(images._Head(375, 500, 1, True), least) == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [32, 100, 224, 500])
def test_crop_equals_pillows_resize_of_the_box(kind, side):
    """Also where the JPEG is decoded at a half, a quarter or an eighth."""
    data = encoded(smooth(600, 800), kind, quality=95)
    out = np.empty((side, side, 3), np.uint8)
    crop(data, lambda h, w: Box(80, 160, 400, 480), out)
    with Image.open(io.BytesIO(data)) as image:
        part = image.convert("RGB").crop((160, 80, 640, 480))
        assert worst(out, np.asarray(part.resize((side, side), Image.Resampling.BILINEAR))) <= 6


def test_central_box():
    assert central_box(256, 320, fraction=0.875) == Box(16, 48, 224, 224)
    assert central_box(1, 9, fraction=0.1) == Box(0, 4, 1, 1)


def test_a_central_box_of_other_proportions():
    assert central_box(100, 300, fraction=0.5, ratio=2.0) == Box(25, 100, 50, 100)
    assert central_box(20, 28, fraction=1.0, ratio=28 / 20) == Box(0, 0, 20, 28)


def boxes(height: int, width: int, count: int, min_area: float = 0.08) -> list[Box]:
    make = functools.partial(random_box, height, width, seed=3, epoch=5, min_area=min_area)
    return [make(index=index) for index in range(count)]


def test_random_boxes_have_the_published_distribution():
    found = boxes(1000, 1000, 3000)
    areas = np.array([box.height * box.width / 1e6 for box in found])
    ratios = np.array([math.log(box.width / box.height) for box in found])
    assert 0.079 <= areas.min() < 0.09
    assert areas.max() <= 1
    assert math.log(3 / 4) - 0.01 <= ratios.min() < math.log(3 / 4) + 0.02
    # Small areas always fit, so there the distribution is the uniform one.
    small = areas[areas < 0.5]
    assert abs(small.mean() - 0.29) < 0.01
    assert abs(ratios[areas < 0.5].mean()) < 0.015
    tops = np.array([box.top / max(1, 1000 - box.height) for box in found])
    assert abs(tops.mean() - 0.5) < 0.02
    assert tops.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (300, 2), (375, 500), (7, 7)])
def test_random_boxes_are_inside(height, width):
    for box in boxes(height, width, 300):
        assert 0 <= box.top <= height - box.height < height
        assert 0 <= box.left <= width - box.width < width


def test_where_no_box_fits_it_is_the_central_one():
    assert set(boxes(100, 1000, 50, min_area=1.0)) == {Box(0, 433, 100, 133)}


def test_random_boxes_are_pinned():
    """A change here would make every interrupted run resume with other crops."""
    made = [
        random_box(375, 500, seed=0, epoch=e, index=i, min_area=0.08)
        for e, i in ((0, 0), (1, 0), (0, 1))
    ]
    assert made == [
        Box(9, 141, 266, 278),
        Box(3, 141, 353, 296),
        Box(111, 293, 217, 177),
    ]


def test_shrink():
    data = encoded(smooth(400, 300), "PNG")
    smaller = shrink(data, 60, quality=95)
    assert size_of(smaller) == (80, 60)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.resize((60, 80), Image.Resampling.BOX))
    assert worst(simplejpeg.decode_jpeg(smaller), expected) <= 8
    assert shrink(data, 300, quality=95) is data


def test_shrink_turns():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(smooth(400, 300), "JPEG", exif=exif, quality=95)
    smaller = shrink(data, 60, quality=95)
    assert size_of(smaller) == (60, 80)
    assert orientation_of(smaller) == 1
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    expected = np.asarray(upright.resize((80, 60), Image.Resampling.BOX))
    assert worst(decode(smaller), expected) <= 8
