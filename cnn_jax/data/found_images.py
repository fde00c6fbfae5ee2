"""Encoded images where they lie: in a folder of class folders, a table of paths, tar shards.

Each becomes `Found`: class names, and for each split its images by number.
"""

import csv
import functools
import hashlib
import io
import itertools
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
from cnn_jax.storage import is_remote, read_bytes

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


@dataclass(frozen=True)
class Found:
    """What is there: the images of each split, and the names of the classes in order."""

    class_names: tuple[str, ...]
    splits: Mapping[str, EncodedImages]


@dataclass(frozen=True)
class ImageFiles:
    """One file an image."""

    root: Path
    paths: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def read(self, index: int) -> tuple[bytes, int]:
        return read_bytes(self.name(index)), int(self.labels[index])


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

    def name(self, index: int) -> str:
        shard = bisect_right(self._ends, index)
        number = index - (self._ends[shard - 1] if shard else 0)
        return f"{self._shards[shard]}: image {number}, at byte {self._rows[index, 0]}"

    def read(self, index: int) -> tuple[bytes, int]:
        offset, size, label = self._rows[index].tolist()
        data = os.pread(self._files[bisect_right(self._ends, index)], size, offset)
        return data, label


@functools.lru_cache(maxsize=8)
def find_images(kind: str, source: Path, index_dir: Path) -> Found:
    """Returns the images in `source`: a "folder" of class folders, a "csv" or a folder of "tar".

    What tar files hold is noted in `index_dir`, so that they are read through once only. A process
    looks once.

    Raises:
      UserError: there is nothing of the kind, one class only, or a shard missing or damaged.
    """
    if kind == "tar":
        found = _in_tars(source, index_dir)
    else:
        found = _in_folder(source) if kind == "folder" else _in_table(source)
    if len(found.class_names) < 2:
        raise UserError(
            f"{source} has one class, {', '.join(found.class_names)}; a classifier needs two"
        )
    return found


def image_paths(root: Path) -> Iterator[str]:
    """Yields the image files below `root`, sorted, as relative paths; follows links, not loops."""
    from cnn_jax.data.images import EXTENSIONS

    for path in files_below(root):
        if path.lower().endswith(EXTENSIONS):
            yield path


def files_below(root: Path) -> Iterator[str]:
    """Yields every file below `root`, sorted, as relative paths.

    Links are followed, but not to a folder that holds them, and names with a dot before them are
    passed over.
    """
    if is_remote(root):
        found = objects_below(root)
        yield from (path for path in found if "/." not in f"/{path}")
        return

    def visit(directory: str, above: frozenset[str]) -> Iterator[str]:
        real = os.path.realpath(root / directory)
        if real in above:
            return
        for entry in sorted(os.scandir(root / directory), key=lambda entry: entry.name):
            path = os.path.join(directory, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from visit(path, above | {real})
            elif entry.is_file():
                yield path

    yield from visit("", frozenset(map(str, Path(os.path.realpath(root)).parents)))


def _in_folder(root: Path) -> Found:
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: it should hold a folder of images each class")
    inner = [name for name in SPLITS if (root / name).is_dir()]
    splits = {name: root / name for name in inner} or {"train": root}
    listed = {split: _by_class(folder) for split, folder in splits.items()}
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
    )


def _by_class(folder: Path) -> dict[str, list[str]]:
    """Returns the images of each class folder, as paths below `folder`."""
    classes: dict[str, list[str]] = {}
    if is_remote(folder):
        for path in image_paths(folder):
            if "/" in path:
                classes.setdefault(path.partition("/")[0], []).append(path)
        return classes
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            paths = [os.path.join(entry.name, path) for path in image_paths(Path(entry.path))]
            if paths:
                classes[entry.name] = paths
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
    names = _class_names([row["label"] for row in rows], path)
    numbers = {name: number for number, name in enumerate(names)}
    examples: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for row in rows:
        examples[row.get("split") or "train"].append((row["path"], numbers[row["label"]]))
    shuffle = len(examples) == 1
    return Found(
        names,
        {split: _files(path.parent, part, shuffle=shuffle) for split, part in examples.items()},
    )


def _class_names(labels: Sequence[str], path: Path) -> tuple[str, ...]:
    """Returns the class of each number: labels that are numbers are those numbers themselves."""
    distinct = set(labels)
    if not distinct:
        raise UserError(f"{path} lists no images")
    if not all(re.fullmatch(r"-?\d+", label) for label in distinct):
        return tuple(sorted(distinct))
    names = tuple(map(str, range(len(distinct))))
    if distinct != set(names):
        wrong = min(distinct - set(names), key=int)
        raise UserError(
            f"{path}: label {wrong} is out of range; {len(distinct)} different numbers must be "
            f"0 to {len(distinct) - 1}"
        )
    return names


_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d+)\.tar")


def _in_tars(root: Path, index_dir: Path) -> Found:
    shards: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(root.glob("*.tar")):
        if match := _SHARD.fullmatch(path.name):
            shards[match["split"]][int(match["number"])] = path
    if not shards:
        raise UserError(f"{root} holds no shards: files such as train-000000.tar are expected")
    for split, numbered in shards.items():
        absent = sorted(set(range(max(numbered) + 1)) - set(numbered))
        if absent:
            raise UserError(f"{root}: of the split {split!r} the shard {absent[0]} is missing")
    index = {
        split: [_index_of(numbered[number], index_dir) for number in sorted(numbered)]
        for split, numbered in shards.items()
    }
    labels = [rows[:, 2] for parts in index.values() for rows in parts]
    num_classes = int(max((part.max() for part in labels if len(part)), default=-1)) + 1
    if not num_classes:
        raise UserError(f"{root}: its shards hold no images with a .cls beside them")
    return Found(
        tuple(map(str, range(num_classes))),
        {
            split: TarImages([numbered[number] for number in sorted(numbered)], index[split])
            for split, numbered in shards.items()
        },
    )


def _index_of(shard: Path, index_dir: Path) -> np.ndarray:
    """Returns the rows (offset, size, class) of a shard's images, from a note of them if any."""
    status = shard.stat()
    told = f"{shard.resolve()} {status.st_size} {status.st_mtime_ns}"
    note = index_dir / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npy"
    if note.exists():
        return np.load(note)
    rows = _read_index(shard)
    try:
        index_dir.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.save(file, rows)
        unfinished.replace(note)
    except OSError:  # without a note the shard is read again
        pass
    return rows


def _read_index(shard: Path) -> np.ndarray:
    from cnn_jax.data.images import EXTENSIONS

    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as members:
            for member in members:
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                key = f"{folder}/{stem}"
                end = member.offset_data + member.size
                if f".{suffix.lower()}" in EXTENSIONS:
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls" and (content := members.extractfile(member)):
                    classes[key] = int(content.read())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{shard} is damaged: after byte {end}: {error}") from error
    if -(-end // 512) * 512 + 1024 > shard.stat().st_size:
        raise UserError(f"{shard} is damaged: no end is marked after byte {end}, so it is cut")
    for key in images:
        if classes.get(key, -1) < 0:
            raise UserError(
                f"{shard}: {key.lstrip('/')} has no class: beside it must lie a file .cls with a "
                "number >= 0"
            )
    rows = [(*images[key], classes[key]) for key in images]
    return np.array(rows, np.int64).reshape(-1, 3)
