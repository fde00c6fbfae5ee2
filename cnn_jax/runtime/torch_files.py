"""PyTorch's `.pth` files, read without PyTorch and without running what they contain.

Such a file is a pickle: a program for a stack machine that may import and call any function. The
machine here only builds plain containers and descriptions of tensors. A function is a name to it,
and a name that is not in the tables below ends the reading. The numbers lie outside of the pickle:
in a zip archive (torch >= 1.6), or behind it in the same stream (older files).
"""

import collections
import dataclasses
import functools
import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from cnn_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
WRAPPINGS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs keep a state dict among other things."""

_UNTYPED = "torch.storage.UntypedStorage"
_STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
    "torch.ComplexFloatStorage": np.complex64,
    "torch.ComplexDoubleStorage": np.complex128,
    _UNTYPED: np.uint8,
}
_DTYPES = {
    "torch.float64": np.float64,
    "torch.float32": np.float32,
    "torch.float16": np.float16,
    "torch.bfloat16": jnp.bfloat16,
    "torch.float8_e4m3fn": jnp.float8_e4m3fn,
    "torch.float8_e5m2": jnp.float8_e5m2,
    "torch.int64": np.int64,
    "torch.int32": np.int32,
    "torch.int16": np.int16,
    "torch.int8": np.int8,
    "torch.uint64": np.uint64,
    "torch.uint32": np.uint32,
    "torch.uint16": np.uint16,
    "torch.uint8": np.uint8,
    "torch.bool": np.bool_,
    "torch.complex64": np.complex64,
    "torch.complex128": np.complex128,
}


class RefusedError(ValueError):
    """The file asks for something other than tensors and plain containers."""


class DamagedError(ValueError):
    """The file contradicts itself."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A global of Python that the pickle names: it stands for itself and is never looked up."""

    text: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A row of numbers, not read yet.

    Attributes:
      key: its name in the file.
      dtype: of the numbers.
      file_count: how many there are in the file under this key.
      start, count: those of them that belong to this storage.
    """

    key: str
    dtype: np.dtype
    file_count: int
    start: int
    count: int

    def part(self, data: bytes) -> memoryview:
        """Returns the bytes of this storage of those under its key; DamagedError for others."""
        itemsize = self.dtype.itemsize
        if len(data) != self.file_count * itemsize:
            raise DamagedError(
                f"storage {self.key} of {self.file_count} x {self.dtype} has {len(data)} bytes"
            )
        return memoryview(data)[self.start * itemsize : (self.start + self.count) * itemsize]


Read: TypeAlias = Callable[[str], bytes]
"""Returns the bytes that the file has under the key of a storage."""


@dataclasses.dataclass(frozen=True)
class View:
    """A tensor, not read yet: numbers of a storage, `strides` apart from one another by axis."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, read: Read) -> np.ndarray:
        """Returns the tensor; raises DamagedError where it reaches beyond its storage."""
        data, itemsize = self.storage.part(read(self.storage.key)), self.dtype.itemsize
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if (last + 1) * itemsize > len(data):
            raise DamagedError(f"a tensor reaches to number {last} of {len(data) // itemsize}")
        strides = [stride * itemsize for stride in self.strides]
        return np.ndarray(self.shape, self.dtype, data, self.offset * itemsize, strides)


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict by name, read-only.

    The state dict is the whole of the file or one of its `WRAPPINGS`.

    Raises UserError where the file cannot be read, is damaged, holds anything but tensors and plain
    containers, or is no state dict. Nothing that the file contains is run, whatever it is.
    """
    try:
        data = path.read_bytes()
        contents, read = _open_zip(data) if data[:2] == b"PK" else _open_stream(data)
        return {name: view.read(read) for name, view in _state_dict(contents).items()}
    except RefusedError as error:
        raise UserError(
            f"{path} is not read: {error}. Only tensors and plain containers are, and nothing was "
            "run. In PyTorch, torch.save(model.state_dict(), ...) and "
            "safetensors.torch.save_file(model.state_dict(), ...) write nothing else"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what a damaged file makes of the many parts that read it
        reason = (
            str(error) if isinstance(error, DamagedError) else f"{type(error).__name__}: {error}"
        )
        raise UserError(
            f"{path} is damaged, cut short or no file of PyTorch ({' '.join(reason.split())[:200]})"
        ) from error


def _open_zip(data: bytes) -> tuple[Any, Read]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise DamagedError("its parts are compressed, as PyTorch's never are")
    if sum(entry.file_size for entry in entries) > len(data):
        raise DamagedError("its parts are larger than the whole")
    pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DamagedError(f"it has {len(pickles)} parts called data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        _check_byte_order(archive.read(f"{folder}byteorder") == b"little")
    contents = _Machine(io.BytesIO(archive.read(pickles[0]))).run()
    return contents, functools.cache(lambda key: archive.read(f"{folder}data/{key}"))


def _open_stream(data: bytes) -> tuple[Any, Read]:
    stream = io.BytesIO(data)
    magic, protocol, system = (_Machine(stream).run() for _ in range(3))
    if (magic, protocol) != (MAGIC, PROTOCOL):
        raise DamagedError("it does not begin as one")
    _check_byte_order(system["little_endian"])
    machine = _Machine(stream)
    contents, keys = machine.run(), _Machine(stream).run()
    positions: dict[str, slice] = {}
    start = stream.tell()
    for key in keys:
        storage = machine.storages[key]
        if struct.unpack_from("<q", data, start) != (storage.file_count,):
            raise DamagedError(f"storage {key} has another length than its tensors say")
        end = start + 8 + storage.file_count * storage.dtype.itemsize
        positions[key] = slice(start + 8, end)
        start = end

    return contents, functools.cache(lambda key: data[positions[key]])


def _check_byte_order(little_endian: bool) -> None:
    if not little_endian:
        raise DamagedError("it was written on a big-endian machine")


def _state_dict(contents: Any) -> dict[str, View]:
    """Returns the tensors by name, without the numbers and texts that may stand beside them."""
    for _ in range(len(WRAPPINGS)):
        inner = [contents[key] for key in WRAPPINGS if _is_dict(contents) and key in contents]
        contents = next(filter(_is_dict, inner), contents)
    if not _is_dict(contents):
        raise RefusedError(f"it holds a {type(contents).__name__} where a state dict should be")
    for name, value in contents.items():
        if not isinstance(value, View | int | float | str | None):
            raise RefusedError(
                f"its entry {str(name)[:80]!r} is a {type(value).__name__}, so it is no state dict "
                f"and none is under {' or '.join(map(repr, WRAPPINGS))}"
            )
        if not isinstance(name, str):
            raise RefusedError(f"its entry {str(name)[:80]} has no name as in a state dict")
    return {name: value for name, value in contents.items() if isinstance(value, View)}


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_SINCE_MARK = {"TUPLE": tuple, "LIST": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = Name("(")


class _Machine:
    """The stack machine of one pickle; `storages` are those that it has named, by key."""

    def __init__(self, stream: io.BytesIO):
        self.storages: dict[str, Storage] = {}
        self._stream = stream
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Returns what the pickle describes; the stream stands behind it."""
        for instruction, argument, _ in pickletools.genops(self._stream):
            self._step(instruction.name, argument)
        (value,) = self._stack
        return value

    def _step(self, name: str, argument: Any) -> None:
        stack, memo = self._stack, self._memo
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "GLOBAL":
                stack.append(_name(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_name(f"{module}.{attribute}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":  # the attributes of an OrderedDict: torch's own notes on its modules
                stack.pop()
                if not isinstance(stack[-1], collections.OrderedDict):
                    raise RefusedError(f"it sets the state of a {type(stack[-1]).__name__}")
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND":
                item = stack.pop()
                _of(list, stack[-1]).append(item)
            case "APPENDS":
                items = self._since_mark()
                _of(list, stack[-1]).extend(items)
            case "ADDITEMS":
                items = self._since_mark()
                _of(set, stack[-1]).update(map(_key, items))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _of(dict, stack[-1])[_key(key)] = value
            case "SETITEMS":
                items = self._since_mark()
                _of(dict, stack[-1]).update(_pairs(items))
            case "DICT":
                stack.append(_pairs(self._since_mark()))
            case _ if name in _VALUES:
                stack.append(_VALUES[name])
            case _ if name in _LITERALS:
                stack.append(argument)
            case _ if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case _ if name in _SINCE_MARK:
                stack.append(_SINCE_MARK[name](self._since_mark()))
            case _ if name in _TUPLES:
                items = [stack.pop() for _ in range(_TUPLES[name])]
                stack.append(tuple(reversed(items)))
            case _:
                raise RefusedError(f"it uses the instruction {name}")

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _storage(self, identity: Any) -> Storage:
        kind, storage_type, key, _, count, *part = _of(tuple, identity)
        if kind != "storage" or not isinstance(storage_type, Name):
            raise RefusedError("it names something other than a storage of numbers")
        if storage_type.text not in _STORAGES:
            raise RefusedError(f"it asks for {storage_type.text}")
        dtype = np.dtype(_STORAGES[storage_type.text])
        start, size = part[0][1:] if part and part[0] is not None else (0, count)
        storage = Storage(str(_key(key)), dtype, *_sizes((count, start, size)))
        self.storages[storage.key] = storage
        return storage


def _name(text: str) -> Name:
    text = text.replace("__builtin__.", "builtins.", 1)
    if not any(text in table for table in (_CALLS, _STORAGES, _DTYPES)):
        raise RefusedError(f"it asks for {text[:200]}")
    return Name(text)


def _call(function: Any, arguments: Any) -> Any:
    """Returns what a function of `_CALLS` gives; the pickle cannot call any other."""
    if not isinstance(function, Name) or function.text not in _CALLS:
        raise RefusedError(f"it calls a {type(function).__name__}")
    return _CALLS[function.text](*_of(tuple, arguments))


def _view(
    storage: Any, offset: Any, shape: Any, strides: Any, *others: Any, dtype: np.dtype | None = None
) -> View:
    storage = _of(Storage, storage)
    (offset,) = _sizes((offset,))
    return View(storage, dtype or storage.dtype, offset, _sizes(shape), _sizes(strides))


def _view_of_dtype(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    gradient: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> View:
    dtype = np.dtype(_DTYPES[_of(Name, dtype).text])
    return _view(storage, offset, shape, strides, dtype=dtype)


def _parameter(data: Any, *_: Any) -> View:
    return _of(View, data)


def _ordered_dict(items: Any = ()) -> Mapping[Any, Any]:
    return collections.OrderedDict((_key(key), value) for key, value in _of((list, tuple), items))


def _set(items: Any = ()) -> set[Any]:
    return set(map(_key, _of((list, tuple), items)))


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise DamagedError(f"a {type(value).__name__} stands in a wrong place")
    return value


def _key(value: Any) -> Any:
    """Returns a key that is quick to hash: a nest of tuples could exhaust the stack."""
    return _of((str, int, float, bytes, type(None)), value)


def _pairs(items: Sequence[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _sizes(values: Any) -> tuple[int, ...]:
    """Returns whole numbers, none negative."""
    sizes = _of((tuple, list), values)
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes):
        raise DamagedError("the sizes of a tensor are no whole numbers of 0 or more")
    return tuple(sizes)
