"""`.pth` files: real ones read exactly, malicious ones refused before anything runs.

`torch_files/zip.pth` and `stream.pth` were written by torch 2.13.0, with torch.save of one dict;
the second with `_use_new_zipfile_serialization=False`, the format of torch < 1.6.
"""

import collections
import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax.errors import UserError
from cnn_jax.runtime.torch_files import MAGIC, PROTOCOL, read_torch_file

FOLDER = Path(__file__).with_name("torch_files")
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
FIRST_SIX = np.arange(6, dtype=np.float32).tobytes()
SIX = np.arange(6).reshape(2, 3) / 4
CONTENTS = {
    "whole": BASE,
    "transposed": BASE.T,
    "part": BASE[1:3, ::2],
    "half": SIX.astype(np.float16),
    "brain": SIX.astype(jnp.bfloat16),
    "double": np.arange(3) / 3,
    "empty": np.empty((0, 3), np.float32),
    "count": np.array(7),
}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name
        assert not actual[name].flags.writeable or not array.size


def op(value) -> bytes:
    """The instructions that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def name(text: str) -> bytes:
    module, _, attribute = text.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(key="0", count=6, kind="torch.FloatStorage", tag="storage", more=b"") -> bytes:
    return b"(" + op(tag) + name(kind) + op(key) + op("cpu") + op(count) + more + b"tQ"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), stored=None) -> bytes:
    arguments = op(offset) + op(shape) + op(strides) + op(False) + op(None)
    of = storage() if stored is None else stored
    return name("torch._utils._rebuild_tensor_v2") + b"(" + of + arguments + b"tR"


def program(*entries: bytes) -> bytes:
    """A pickle of a dict with these entries, called w0, w1, ..."""
    items = b"".join(op(f"w{number}") + entry for number, entry in enumerate(entries))
    return b"\x80\x02}(" + items + b"u."


def zip_file(pickled: bytes, numbers=FIRST_SIX, **options) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", **options) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", numbers)
    return archive.getvalue()


def stream_file(pickled: bytes, *, little_endian=True) -> bytes:
    head = [pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, {"little_endian": little_endian})]
    keys = ["0"] if b"Storage" in pickled else []
    data = struct.pack("<q", 6) + FIRST_SIX
    return b"".join([*head, pickled, pickle.dumps(keys, 2), data])


@pytest.fixture
def read(tmp_path):
    """Returns a function that reads bytes as a file: a dict of tensors, or the UserError's text."""

    def read(data: bytes):
        path = tmp_path / "weights.pth"
        path.write_bytes(data)
        try:
            return read_torch_file(path)
        except UserError as error:
            text = str(error)
        assert text.startswith(f"{path} ")
        return text.removeprefix(f"{path} ")

    return read


@pytest.mark.parametrize("file", ["zip.pth", "stream.pth"])
def test_both_formats_of_torch_are_read(file):
    assert_same(read_torch_file(FOLDER / file), CONTENTS)


@pytest.mark.parametrize("form", [zip_file, stream_file])
def test_handmade_files_are_read(form, read):
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    parameter = name("torch._utils._rebuild_parameter") + b"(" + tensor() + op(True) + b"N" + b"tR"
    turned = tensor(1, (2, 2), (1, 3))
    tensors = read(form(program(tensor(), parameter, turned)))
    assert_same(tensors, {"w0": expected, "w1": expected, "w2": expected.T[1:]})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_beside_a_state_dict_are_understood(protocol, read):
    plain = {
        "text": "ä",
        "numbers": [1, -(2**40), 2**80, 0.5, True, None],
        "tuple": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "set": {1, 2},
        "ordered": collections.OrderedDict([(1, "a"), (2, "b")]),
        3: [[], {}],
    }
    inner = pickle.dumps(plain, protocol)
    body = inner[11 if protocol >= 4 else 2 : -1]  # behind PROTO and FRAME
    data = b"\x80\x05}(" + op("epoch") + body + op("model") + program(tensor())[2:-1] + b"u."
    assert list(read(zip_file(data))) == ["w0"]


@pytest.mark.parametrize("wrapping", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_among_other_things_is_found(wrapping, read):
    data = b"\x80\x02}(" + op("epoch") + op(3) + op(wrapping) + program(tensor())[2:-1] + b"u."
    assert list(read(zip_file(data))) == ["w0"]


def test_notes_of_torch_on_its_modules_are_passed_over(read):
    ordered = name("collections.OrderedDict") + b")R"
    data = b"\x80\x02" + ordered + op("w") + tensor() + b"s" + op({"_metadata": 1}) + b"b."
    assert list(read(zip_file(data))) == ["w"]


def test_a_part_of_a_storage_is_one_in_old_files(read):
    part = b"(" + op("view") + op(2) + op(3) + b"t"
    stored = storage(more=part)
    tensors = read(stream_file(program(tensor(0, (3,), (1,), stored))))
    assert_same(tensors, {"w0": np.arange(2, 5, dtype=np.float32)})
    assert "a tensor reaches to number 3 of 3" in read(
        stream_file(program(tensor(1, (3,), (1,), stored)))
    )


def touch(marker: Path) -> str:
    return f"touch '{marker}'"


class Evil:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


CALLS = {
    "os.system": lambda marker: Evil(os.system, touch(marker)),
    "eval": lambda marker: Evil(eval, write(marker)),
    "exec": lambda marker: Evil(exec, write(marker)),
    "subprocess": lambda marker: Evil(subprocess.getoutput, touch(marker)),
    "nested": lambda marker: [{"a": (1, Evil(eval, write(marker)))}],
    "pickle in pickle": lambda marker: Evil(pickle.loads, pickle.dumps(Evil(eval, write(marker)))),
}


@pytest.mark.parametrize("form", [zip_file, stream_file])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", CALLS)
def test_no_function_is_called(call, protocol, form, read, tmp_path):
    marker = tmp_path / "it ran"
    evil = pickle.dumps(CALLS[call](marker), protocol)
    pickle.loads(evil)
    assert marker.exists(), "this payload does nothing, so it proves nothing"
    marker.unlink()
    answer = read(form(evil))
    assert re.match(r"is not read: it asks for \w+\.\w+\. Only", answer)
    assert "nothing was run" in answer
    assert not marker.exists()


MODULE = "module_with_an_effect"
TRICKS = {
    "a name that is only imported": name(f"{MODULE}.x") + b".",
    "a name in two strings": op(MODULE) + op("x") + b"\x93.",
    "a name in a persistent id": storage(kind=f"{MODULE}.Storage") + b".",
    "a class that is built": f"(i{MODULE}\nx\n.".encode(),
    "an object that is built": b"(" + name(f"{MODULE}.x") + b"o.",
    "a class that is called by __new__": name(f"{MODULE}.x") + b")\x81.",
    "a path through an allowed module": name("torch._utils._rebuild_tensor_v2.__globals__") + b".",
    "a path in two strings": op("torch._utils") + op("_rebuild_tensor_v2.__globals__") + b"\x93.",
    "an allowed class by __new__": name("collections.OrderedDict") + b")\x81.",
    "getattr": name("builtins.getattr") + b"(" + op("x") + op("__class__") + b"tR.",
    "getattr of Python 2": name("__builtin__.getattr") + b".",
    "torch.load": name("torch.load") + b"(" + op("other.pth") + b"tR.",
    "torch.hub.load": name("torch.hub.load") + b".",
    "a tensor subclass": name("torch._tensor._rebuild_from_type_v2") + b".",
    "a value that is called": op({}) + b")R.",
    "a tensor that is called": tensor() + b")R.",
    "a storage that is called": name("torch.FloatStorage") + b")R.",
    "attributes of a tensor": program(tensor() + op({"x": 1}) + b"b"),
    "attributes of a function": program(name("torch.Size") + op({"x": 1}) + b"b0" + tensor()),
    "an extension code": b"\x82\x01.",
    "a persistent id in text": b"Pstorage\n.",
    "a persistent id of a module": program(tensor(stored=storage(tag="module"))),
    "a persistent id of a dtype": program(tensor(stored=storage(kind="torch.float32"))),
    "a buffer out of band": b"\x97.",
    "a list where a state dict should be": op([1]) + b".",
    "a list in a state dict": program(op([1])),
    "a key that is a number": b"}" + op(3) + tensor() + b"s.",
}


@pytest.mark.parametrize("form", [zip_file, stream_file])
@pytest.mark.parametrize("trick", TRICKS)
def test_anything_but_tensors_and_containers_is_refused(trick, form, read, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{MODULE}.py").write_text("raise SystemExit('imported')")
    before = set(sys.modules)
    answer = read(form(TRICKS[trick]))
    assert isinstance(answer, str)
    assert answer.startswith("is not read: it")
    assert set(sys.modules) == before


LIES = {
    "an offset beyond the end": tensor(offset=1),
    "a shape that is too large": tensor(shape=(3, 3)),
    "a stride that is too large": tensor(strides=(4, 1)),
    "a negative offset": tensor(offset=-1),
    "a negative stride": tensor(2, (3,), (-1,)),
    "a negative size": tensor(shape=(-2, 3)),
    "sizes that overflow": tensor(shape=(2**62, 2**62), strides=(2**62, 1)),
    "endless repetition": tensor(shape=(2**62, 2**62), strides=(0, 0)),
    "a size that is no number": tensor(shape=("2", 3)),
    "a size with a fraction": tensor(shape=(2.0, 3)),
    "more sizes than strides": tensor(shape=(2, 3, 1)),
    "hundreds of axes": tensor(shape=(1,) * 300, strides=(1,) * 300),
    "a shape that is no tuple": tensor(shape=7),
    "a storage that is longer": tensor(stored=storage(count=7)),
    "a storage that is shorter": tensor(stored=storage(count=5)),
    "a storage of negative length": tensor(stored=storage(count=-6)),
    "another type of number": tensor(stored=storage(kind="torch.DoubleStorage")),
    "a storage that is not there": tensor(stored=storage(key="1")),
    "a storage elsewhere": tensor(stored=storage(key="../../secret")),
    "a tensor instead of a storage": tensor(stored=tensor()),
    "a number instead of a storage": tensor(stored=op(3)),
    "a tuple that is too short": tensor(stored=b"(" + op("storage") + b"tQ"),
    "a key that is a nest of tuples": b")" + b"\x85" * 100_000 + b"}" + b"\x85" + b"0" + op(1),
    "a stack that is empty": b"00000",
    "no mark": b"t",
    "a memo that is empty": b"h\x05",
    "a value instead of a list": op(1) + op(2) + b"a",
    "half a pair": b"}(" + op(1) + b"u",
}


@pytest.mark.parametrize("form", [zip_file, stream_file])
@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_contradicts_itself_is_damaged(lie, form, read):
    answer = read(form(program(LIES[lie])))
    assert isinstance(answer, str), answer
    assert answer.startswith("is damaged, cut short or no file of PyTorch (")
    assert "\n" not in answer


def test_a_storage_of_another_length_than_its_tensors_say(read):
    data = stream_file(program(tensor()))
    shorter = data.replace(struct.pack("<q", 6) + FIRST_SIX, struct.pack("<q", 5) + FIRST_SIX)
    assert "storage 0 has another length than its tensors say" in read(shorter)


def test_a_deep_nest_of_tuples_is_no_key(read):
    nest = b")" + b"\x85" * 200_000
    for data in (b"\x80\x02}" + nest + op(1) + b"s.", b"\x80\x04\x8f(" + nest + b"\x90."):
        assert "a tuple stands in a wrong place" in read(zip_file(data))


def test_a_container_that_holds_itself_is_no_endless_search(read):
    itself = b"\x80\x02}q\x09" + op("model") + b"h\x09s."
    assert read(zip_file(itself)).startswith("is not read: its entry 'model' is a dict")


def test_archives_that_grow_are_refused(read):
    bomb = zip_file(program(tensor()), bytes(10**7), compression=zipfile.ZIP_DEFLATED)
    assert "its parts are compressed" in read(bomb)

    archive = bytearray(zip_file(program(tensor())))
    entry = archive.rindex(b"PK\x01\x02")  # the storage's, in the directory at the end
    archive[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    assert "its parts are larger than the whole" in read(bytes(archive))


def test_other_archives_are_none_of_torch(read):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("notes.txt", "hello")
    assert "it has 0 parts called data.pkl" in read(archive.getvalue())


def test_big_endian_files_are_refused(read):
    assert "big-endian" in read(stream_file(program(tensor()), little_endian=False))


@pytest.mark.parametrize("file", ["zip.pth", "stream.pth"])
def test_a_file_cut_anywhere_is_one_message(file, read):
    data = (FOLDER / file).read_bytes()
    for length in [*range(0, len(data), 41), len(data) - 1]:
        answer = read(data[:length])
        assert isinstance(answer, str), length
        assert answer.startswith("is damaged, cut short or no file of PyTorch (")


@pytest.mark.parametrize("file", ["zip.pth", "stream.pth"])
def test_altered_bytes_never_do_more_than_give_other_numbers(file, read):
    chance = random.Random(0)
    data = (FOLDER / file).read_bytes()
    for _ in range(500):
        altered = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            altered[chance.randrange(len(data))] = chance.randrange(256)
        answer = read(bytes(altered))
        if isinstance(answer, dict):
            assert sum(array.nbytes for array in answer.values()) <= 4 * len(data)


def test_what_is_not_there_or_no_file_is_one_message(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read: (No such file|Is a directory)"):
            read_torch_file(path)


class TestWithTorch:
    """Files that torch writes here and now, where it is installed."""

    DTYPES = (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
        *("bool", "complex64", "complex128"),
    )
    NEWER = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("protocol", [2, 4])
    def test_every_kind_of_tensor_comes_back(self, zipped, protocol, tmp_path):
        torch = pytest.importorskip("torch")
        base = torch.randn(4, 6)
        tensors = {
            "base": base,
            "strided": base[1:, ::2].t(),
            "repeated": base[:1].expand(3, 6),
            "scalar": torch.tensor(1.5),
            "parameter": torch.nn.Parameter(torch.randn(3)),
        }
        for dtype in self.DTYPES + (self.NEWER if zipped else ()):
            tensors[dtype] = torch.randint(0, 2, (2, 3)).to(getattr(torch, dtype))
        path = tmp_path / "weights.pth"
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        found = read_torch_file(path)
        assert list(found) == list(tensors)
        for key, value in tensors.items():
            whole = value.detach().contiguous().reshape(-1)
            assert found[key].shape == tuple(value.shape)
            assert found[key].dtype.name == str(value.dtype).removeprefix("torch.")
            assert found[key].tobytes() == whole.view(torch.uint8).numpy().tobytes(), key

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_checkpoint_of_a_training_program_is_read(self, zipped, tmp_path):
        torch = pytest.importorskip("torch")
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        tx = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        tx.step()
        path = tmp_path / "checkpoint.pth.tar"
        checkpoint = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": tx.state_dict()}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
        expected = {key: value.numpy() for key, value in model.state_dict().items()}
        found = read_torch_file(path)
        assert list(found) == list(expected)
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)

    def test_a_whole_module_is_refused_by_its_name(self, tmp_path):
        torch = pytest.importorskip("torch")
        path = tmp_path / "module.pth"
        torch.save(torch.nn.Linear(2, 2), path)
        with pytest.raises(UserError, match=r"it asks for torch\.nn\.modules\.linear\.Linear"):
            read_torch_file(path)
