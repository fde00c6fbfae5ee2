"""Encoded images where they lie: in a folder of class folders, a table of paths, tar shards.

Each becomes `Found`: class names, and for each split its images by number.
"""

import contextlib
import csv
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cnn_jax.errors import UserError
from cnn_jax.storage import files_below as objects_below
from cnn_jax.storage import is_remote, read_bytes, write_atomically

MAX_CLASSES = 1_000_000
"""A label in a shard that is not below is a mistake."""

SPLITS = ("train", "validation", "val", "test")
"""Folders of these names, side by side, are splits and hold the class folders."""


class EncodedImages(Protocol):
    """The encoded images of one split by number; safe to use from many threads."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns where the image is, for a person to find it."""
        ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns the encoded image and its class; raises OSError or ValueError for damage."""
        ...

    def classes(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the classes, int [n], without the images where they lie apart; -1 of damage."""
        ...


@dataclass(frozen=True)
class Found:
    """What is there: the names of the classes in order, and the images of each split.

    `passed_over` has the path of each thing that is read for no image, and why.
    """

    class_names: tuple[str, ...]
    splits: Mapping[str, EncodedImages]
    passed_over: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class ImageFiles:
    """One file an image."""

    root: Path
    paths: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return f"{self.root}/{self.paths[index]}"

    def read(self, index: int) -> tuple[bytes, int]:
        return read_bytes(self.name(index)), int(self.labels[index])

    def classes(self, numbers: np.ndarray) -> np.ndarray:
        return self.labels[numbers]


class TarImages:
    """Members of tar files, read at their offsets."""

    def __init__(self, shards: Sequence[Path], index: Sequence[np.ndarray]):
        """`index` has for each shard the rows (offset, size, class), int64 [n 3]."""
        self._shards = shards
        self._rows = np.concatenate(index)
        self._ends = list(itertools.accumulate(len(rows) for rows in index))
        self._files = [os.open(shard, os.O_RDONLY) for shard in shards]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray:
        return self._rows[:, 2]

    def name(self, index: int) -> str:
        shard = bisect_right(self._ends, index)
        number = index - (self._ends[shard - 1] if shard else 0)
        return f"{self._shards[shard]}: image {number}, at byte {self._rows[index, 0]}"

    def read(self, index: int) -> tuple[bytes, int]:
        offset, size, label = self._rows[index].tolist()
        data = os.pread(self._files[bisect_right(self._ends, index)], size, offset)
        return data, label

    def classes(self, numbers: np.ndarray) -> np.ndarray:
        return self.labels[numbers]


@functools.lru_cache(maxsize=8)
def find_images(kind: str, source: Path, index_dir: Path, known_as: str) -> Found:
    """Returns the images in `source`: a "folder" of class folders, a "csv" or a folder of "tar".

    What tar files hold is noted in `index_dir`, so that they are read through once only, and which
    there are of the source `known_as`, so that one that goes is missed. A process looks once.

    Raises:
      UserError: there is nothing of the kind, one class only, or a shard missing or damaged; or
        what is there cannot be read.
    """
    try:
        if kind == "tar":
            found = _in_tars(source, index_dir, known_as)
        else:
            found = _in_folder(source) if kind == "folder" else _in_table(source)
    except OSError as error:
        told = error.strerror or error
        raise UserError(f"{error.filename or source} cannot be read: {told}") from error
    if len(found.class_names) < 2:
        raise UserError(
            f"{source} has one class, {', '.join(found.class_names)}; a classifier needs two"
        )
    return found


def files_below(root: Path) -> Iterator[tuple[str, str]]:
    """Yields the path from `root` of every file below it, sorted, and why it is no image, or "".

    A folder is read once: under its own path if that is below `root`, else under that of the first
    link to it. Other links to it, and links to a folder that holds them, are yielded as no images.
    Names with a dot before them are passed over. Raises OSError where a folder cannot be read.
    """
    from cnn_jax.data.images import EXTENSIONS

    def judged(path: str) -> tuple[str, str]:
        if path.lower().endswith(EXTENSIONS):
            return path, ""
        return path, f"not read: its name must end with one of {', '.join(EXTENSIONS)}"

    if is_remote(root):
        yield from (judged(path) for path in objects_below(root) if "/." not in f"/{path}")
        return
    top = os.path.realpath(root)
    linked: set[str] = set()

    def why_not(folder: str, below: str, path: str) -> str:
        """Returns why the real `folder`, at `path` in the real folder `below`, is not read."""
        if folder == os.path.join(top, path):
            return ""
        if _holds(folder, below) or _holds(folder, top):
            return "a link to a folder that holds it: not followed"
        if folder in linked or (_holds(top, folder) and "/." not in folder[len(top) :]):
            return "a folder that is read under another path: not read again"
        linked.add(folder)
        return ""

    def visit(directory: str) -> Iterator[tuple[str, str]]:
        real = os.path.realpath(root / directory)
        for entry in sorted(os.scandir(real), key=lambda entry: entry.name):
            path = os.path.join(directory, entry.name)
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                is_folder = is_file = False
            if is_folder and (why := why_not(os.path.realpath(entry.path), real, path)):
                yield path, why
            elif is_folder:
                yield from visit(path)
            elif is_file:
                yield judged(path)
            else:
                yield path, f"{'a link to nothing' if entry.is_symlink() else 'no file'}: not read"

    yield from visit("")


def _holds(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def _in_folder(root: Path) -> Found:
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: it should hold a folder of images each class")
    inner = [name for name in SPLITS if (root / name).is_dir()]
    splits = {name: root / name for name in inner} or {"train": root}
    notes = {} if is_remote(root) or not inner else dict(_beside(root, inner))
    listed = {split: _by_class(folder, notes) for split, folder in splits.items()}
    names = sorted({name for classes in listed.values() for name in classes})
    if not names:
        raise UserError(
            f"{root} holds no images: they are expected as CLASS/IMAGE.jpg, or as "
            "train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return Found(
        tuple(names),
        {
            split: _files(
                splits[split],
                [(path, numbers[name]) for name, paths in classes.items() for path in paths],
                shuffle=not inner,
            )
            for split, classes in listed.items()
            if classes
        },
        tuple(notes.items()),
    )


def _beside(root: Path, splits: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields what lies in `root` beside the folders of its splits."""
    for path in sorted(root.iterdir()):
        if path.name not in splits and not path.name.startswith("."):
            yield str(path), f"not read: what is read are the folders {', '.join(splits)}"


def _by_class(folder: Path, notes: dict[str, str]) -> dict[str, list[str]]:
    """Returns the images of each class folder, as paths below `folder`; notes what is none."""
    classes: dict[str, list[str]] = {}
    for path, why in files_below(folder):
        name, is_deeper, _ = path.partition("/")
        if why or not is_deeper:
            notes[str(folder / path)] = why or "not read: it lies in no folder of a class"
        else:
            classes.setdefault(name, []).append(path)
    if not is_remote(folder):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and path.name not in classes and not path.name.startswith("."):
                notes.setdefault(str(path), "holds no images")
    return classes


def _files(root: Path, examples: Sequence[tuple[str, int]], *, shuffle: bool) -> ImageFiles:
    """Returns the examples, (path, class), as files.

    `shuffle` orders them by the hash of their paths, so that a slice holds of every class.
    """
    if shuffle:
        examples = sorted(examples, key=lambda each: hashlib.sha256(each[0].encode()).digest())
    labels = np.array([label for _, label in examples], np.int32)
    return ImageFiles(root, [path for path, _ in examples], labels)


def _in_table(path: Path) -> Found:
    try:
        text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        table = csv.DictReader(text)
        columns = table.fieldnames or ()
        rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the table {path}: {error}") from error
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(map(repr, missing))}; the first line must name the "
            f"columns path, label and, if there are several, split. It has {', '.join(columns)}"
        )
    for line, row in enumerate(rows, start=2):
        if not row["path"] or not row["label"]:
            raise UserError(f"{path}, row {line}: its path or its label is empty")
    rows_of = {row["label"]: f"{path}, row {line}" for line, row in enumerate(rows, start=2)}
    if not rows_of:
        raise UserError(f"{path} lists no images")
    names = _class_names(rows_of)
    numbers = {name: number for number, name in enumerate(names)}
    examples: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for row in rows:
        examples[row.get("split") or "train"].append((row["path"], numbers[row["label"]]))
    shuffle = len(examples) == 1
    return Found(
        names,
        {split: _files(path.parent, part, shuffle=shuffle) for split, part in examples.items()},
    )


def _class_names(places: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the class of each number: labels that are numbers are those numbers themselves.

    `places` has for each label where one like it is, to be named if it is out of range.
    """
    if not all(re.fullmatch(r"-?\d+", label) for label in places):
        return tuple(sorted(places))
    names = tuple(map(str, range(len(places))))
    if wrong := sorted(places.keys() - set(names), key=int):
        raise UserError(
            f"{places[wrong[0]]}: label {wrong[0]} is out of range; {len(places)} different "
            f"numbers must be 0 to {len(places) - 1}"
        )
    return names


_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d+)(-of-(?P<count>\d+))?\.tar")


def _in_tars(root: Path, index_dir: Path, known_as: str) -> Found:
    shards: dict[str, dict[int, Path]] = defaultdict(dict)
    counts: dict[str, set[int]] = defaultdict(set)
    passed_over = []
    for path in sorted(root.glob("*.tar")):
        if match := _SHARD.fullmatch(path.name):
            shards[match["split"]][int(match["number"])] = path
            counts[match["split"]].add(int(match["count"] or 0))
        else:
            passed_over.append((str(path), "not read: its name is not such as train-000000.tar"))
    if not shards:
        raise UserError(f"{root} holds no shards: files such as train-000000.tar are expected")
    for split, numbered in shards.items():
        _refuse_gaps(split, numbered, counts[split])
    names = sorted(path.name for numbered in shards.values() for path in numbered.values())
    note = index_dir / f"{_digest(known_as)}.json"
    _refuse_fewer(root, names, note)
    splits = {
        split: TarImages(
            [path for _, path in sorted(numbered.items())],
            [_index_of(path, index_dir) for _, path in sorted(numbered.items())],
        )
        for split, numbered in shards.items()
    }
    places: dict[str, str] = {}
    for images in splits.values():
        for label, first in zip(*np.unique(images.labels, return_index=True), strict=True):
            places.setdefault(str(label), images.name(int(first)))
    if not places:
        raise UserError(f"{root}: its shards hold no images with a .cls beside them")
    found = Found(_class_names(places), splits, passed_over)
    _keep(note, json.dumps(names).encode())
    return found


def _refuse_gaps(split: str, numbered: Mapping[int, Path], counts: set[int]) -> None:
    """Raises UserError where a shard is missing; `counts` has what the names say, 0 for nothing."""
    last = max(numbered)
    if len(counts) > 1 or 0 < max(counts) <= last:
        raise UserError(
            f"{numbered[last]}: the shards of {split!r} are of several sets, as their names tell "
            "different numbers of them"
        )
    if absent := set(range(max(counts) or last + 1)) - set(numbered):
        first = min(absent)
        there = numbered[last].name.removeprefix(f"{split}-")
        name = re.sub(r"\d+", lambda old: f"{first:0{len(old[0])}d}", there, count=1)
        path = numbered[last].with_name(f"{split}-{name}")
        raise UserError(f"{path}: of the split {split!r} the shard {first} is missing")


def _refuse_fewer(root: Path, names: Sequence[str], note: Path) -> None:
    """Raises UserError where one of the shards that the note tells of is not there any more."""
    try:
        gone = sorted(set(json.loads(note.read_bytes())) - set(names))
    except (OSError, ValueError, TypeError):  # no note, or a damaged one
        return
    if gone:
        raise UserError(
            f"{root / gone[0]} is missing: it was there before. If it is not part of the data set "
            f"any more, delete {note}"
        )


def _index_of(shard: Path, index_dir: Path) -> np.ndarray:
    """Returns the rows (offset, size, class) of a shard's images, from a note of them if any."""
    status = shard.stat()
    whole = "read to its end"  # what older notes do not tell
    told = f"{shard.resolve()} {status.st_size} {status.st_mtime_ns} {whole}"
    note = index_dir / f"{_digest(told)}.npy"
    try:
        return np.load(note)
    except (OSError, ValueError, EOFError):  # no note, or a damaged one
        rows = _read_index(shard)
    contents = io.BytesIO()
    np.save(contents, rows)
    _keep(note, contents.getvalue())
    return rows


def _digest(told: str) -> str:
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _keep(note: Path, contents: bytes) -> None:
    with contextlib.suppress(OSError):  # without a note the shard is read again
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(note, contents)


def _read_index(shard: Path) -> np.ndarray:
    from cnn_jax.data.images import EXTENSIONS

    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    after = "its start"
    end = 0
    try:
        with tarfile.open(shard, "r:") as members:
            for member in members:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key = f"{folder}/{stem}"
                after, end = member.name, member.offset_data + member.size
                if f".{suffix.lower()}" in EXTENSIONS:
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls" and (content := members.extractfile(member)):
                    classes[key] = int(content.read(32))
            end = members.offset
        _require_end(shard, end)
    except Exception as error:  # tarfile raises whatever the bytes led it into
        raise UserError(f"{shard} is damaged: after {after}, at byte {end}: {error}") from error
    for key in images:
        if not 0 <= classes.get(key, -1) < MAX_CLASSES:
            raise UserError(
                f"{shard}: {key.lstrip('/')} has no class: beside it must lie a file .cls with a "
                f"number from 0 to {MAX_CLASSES - 1:,}"
            )
    rows = [(*images[key], classes[key]) for key in images]
    return np.array(rows, np.int64).reshape(-1, 3)


def _require_end(shard: Path, end: int) -> None:
    """Raises ValueError where the shard does not end at that byte, with zeros.

    tarfile takes a damaged header for the end, without a word.
    """
    with shard.open("rb") as file:
        file.seek(end)
        zeros = file.read(1024)
        if len(zeros) < 1024:
            raise ValueError("no end is marked, so it is cut")
        if any(zeros) or any(any(more) for more in iter(lambda: file.read(2**20), b"")):
            raise ValueError("there is neither a file's header nor the end")
