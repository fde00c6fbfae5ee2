"""Files out of forms, as an independent writer makes them, and out of what only looks like one."""

import asyncio

import pytest
from aiohttp import FormData
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.serving.multipart import TooManyFilesError, files_of


def written(files):
    """Returns Content-Type and body, as aiohttp's client writes them."""
    form = FormData(quote_fields=False)
    for name, content in files:
        form.add_field("image", content, filename=name, content_type="image/png")

    class Sink:
        def __init__(self):
            self.data = b""

        async def write(self, data):
            self.data += data

    payload, sink = form(), Sink()
    asyncio.run(payload.write(sink))
    return payload.headers["Content-Type"], sink.data


pieces = st.sampled_from([b"\r\n", b"--", b"\r\n--", b"b", b"\r", b"\n", b"\x00", b": ", b"\xff"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(pieces).map(b"".join), min_size=1, max_size=4))
def test_contents_come_out_as_they_went_in(contents):
    files = [(f"{number}.png", content) for number, content in enumerate(contents)]
    kind, body = written(files)
    assert files_of(kind, body, max_files=4) == files


def test_names_may_have_any_letters():
    files = [("Schuh ä.png", b"1"), ("靴.png", b"2"), ("a;b.png", b"3")]
    assert files_of(*written(files), max_files=3) == files


def test_more_files_than_are_allowed():
    kind, body = written([(f"{n}.png", b"") for n in range(5)])
    assert len(files_of(kind, body, max_files=5)) == 5
    with pytest.raises(TooManyFilesError, match="5 files: at most 4 in one request"):
        files_of(kind, body, max_files=4)


FILE = b'--b\r\nContent-Disposition: form-data; name="i"; filename="a"\r\n\r\n1\r\n--b--\r\n'
FORM = "multipart/form-data; boundary=b"
EDGE = "it must begin and end with its boundary"
BAD = {
    "no boundary": ("multipart/form-data", FILE, "must have a boundary"),
    "a long boundary": (f"multipart/form-data; boundary={'b' * 71}", FILE, "1 to 70 characters"),
    "another boundary": ("multipart/form-data; boundary=c", FILE, EDGE),
    "nothing": (FORM, b"", EDGE),
    "no end": (FORM, FILE[:-6], EDGE),
    "text before": (FORM, b"text\r\n" + FILE, EDGE),
    "lines before": (FORM, b"\n" * 2**20, EDGE),
    "no file": (FORM, b"--b--\r\n", "it has no file"),
    "no header": (FORM, b"--b\r\n\r\n1\r\n--b--\r\n", "each part must be a file"),
    "no name": (FORM, FILE.replace(b"filename", b"other"), "each part must be a file"),
    "a long header": (FORM, FILE.replace(b'"a"', b'"' + b"a" * 9999 + b'"'), "at most 8,192 bytes"),
    "another header": (FORM, FILE.replace(b"Disposition", b"Type"), "each part must be a file"),
}


@pytest.mark.parametrize(("kind", "body", "text"), BAD.values(), ids=BAD)
def test_what_is_no_form_is_named(kind, body, text):
    assert files_of(FORM, FILE, max_files=1) == [("a", b"1")]
    with pytest.raises(ValueError, match=text):
        files_of(kind, body, max_files=1)
