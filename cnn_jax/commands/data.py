"""Data sets: made ready, looked at, and checked image by image."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cnn_jax import storage
from cnn_jax.config import Config
from cnn_jax.data.datasets import DATASETS, directory_of_sets
from cnn_jax.data.finding import passed_over
from cnn_jax.data.sources import OWN_BUILDERS, ImageSource, Source, open_source
from cnn_jax.errors import UserError, nearest
from cnn_jax.plan import (
    augmentation,
    mixing,
    normalization,
    source_options,
    training_key,
)
from cnn_jax.runtime.files import refuse_existing
from cnn_jax.runtime.report import LINE_EVERY, Progress, duration

EXAMPLES = 16
"""Images on a contact sheet."""

SIZED = 1000
"""Images, evenly spread over a split, whose sizes are looked at."""

SHOWN = 20
"""Classes at most whose counts are shown; of more, the largest and the smallest."""

WITH_TENSORFLOW = """\
TFDS prepares {name} with TensorFlow only, or needs a package ({error}). An environment of its own
does it once; reading needs neither:
  python -m venv tf && tf/bin/pip install tensorflow tensorflow-datasets
  tf/bin/python -c "import tensorflow_datasets as tfds; tfds.builder('{name}', \
data_dir='{root}', file_format='array_record').download_and_prepare()\""""


def prepare_named(name: str, *, data_dir: str) -> int:
    """Downloads and prepares a data set of TFDS as array_record; returns 0.

    Raises UserError, saying what to do, where there is none, it cannot be had, or TFDS needs
    TensorFlow to prepare it.
    """
    root = directory_of_sets(data_dir)
    if name in OWN_BUILDERS:
        for split in DATASETS[name].splits:
            source = open_source(name, split, data_dir=data_dir)
            print(f"{name}: {split} {len(source):,}")
        return 0
    if storage.is_remote(root):
        raise UserError(f"{root}: prepare it in a directory (--data-dir) and copy that there")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
    except DatasetNotFoundError as error:
        raise UserError(f"TFDS has no data set {name!r}{nearest(name, DATASETS)}") from error
    except ImportError as error:
        raise _without_tensorflow(name, root, error) from error
    directory = Path(builder.data_path)
    if not builder.is_prepared():
        print(f"preparing {name} in {directory}", flush=True)
        try:
            with _told(root):
                builder.download_and_prepare()
        except ImportError as error:
            raise _without_tensorflow(name, root, error) from error
        except Exception as error:  # of the network, the disk, or files that must be got by hand
            raise UserError(f"{name} cannot be prepared: {error}") from error
    sizes = ", ".join(f"{key} {part.num_examples:,}" for key, part in builder.info.splits.items())
    print(f"{directory}: {sizes}")
    return 0


def _without_tensorflow(name: str, root: Path, error: ImportError) -> UserError:
    what = str(error).rpartition("\n")[2]  # behind the example that TFDS may have put before it
    return UserError(WITH_TENSORFLOW.format(name=name, error=what, root=root))


@contextlib.contextmanager
def _told(root: Path) -> Iterator[None]:
    """Says in a log, every `LINE_EVERY` seconds, how much is on the disk; a terminal has bars."""
    import tensorflow_datasets as tfds

    if sys.stdout.isatty():
        yield
        return
    tfds.disable_progress_bar()
    ended, start = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not ended.wait(LINE_EVERY):
            size = 0
            for path in root.rglob("*"):
                with contextlib.suppress(OSError):  # gone meanwhile
                    size += path.stat().st_size
            seconds = duration(time.perf_counter() - start)
            print(f"{size / 2**20:,.1f} MiB in {root} after {seconds}", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def prepare_resized(config: Config, directory: Path, *, shorter_side: int, num_threads: int) -> int:
    """Writes the splits of `config`, their images made smaller, into `directory`; returns 0.

    They are written whole and in order, so that slices and `data.holdout` take the same of them.

    Raises UserError where an image is damaged or the directory holds something else.
    """
    from cnn_jax.data.resized_records import write_records  # only here: it loads decoders

    sources = {}
    for part in config.data.parts().values():
        split = part["split"].partition("[")[0]
        source = _open(config, {"split": split})
        if not isinstance(source, ImageSource):
            raise UserError(f"the images of {config.data.name} are all of one size already")
        sources[split] = source
    progress = Progress(sum(map(len, sources.values())), first_step=0)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress.count(done, "images")

    try:
        write_records(
            sources, directory, shorter_side=shorter_side, num_threads=num_threads, advance=advance
        )
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error}. Make room, and the same command goes on"
        ) from error
    finally:
        progress.close()
    print(
        f"{directory}: use it with --config.data.name=records --config.data.source_dir={directory}"
    )
    return 0


def inspect(config: Config, *, picture: Path | None) -> int:
    """Prints splits, classes and image sizes; draws examples into `picture` if given; returns 0."""
    if picture:
        refuse_existing(picture)
    info = config.data.dataset()
    sizes = ", ".join(f"{split} {count:,}" for split, count in info.splits.items())
    print(f"{info.name} {info.version}: {info.num_classes} classes; {sizes}")
    for name, part in config.data.parts().items():
        source = _open(config, part)
        _print_split(source)
        if name == "train" and picture:
            _draw(config, source, picture)
            print(f"  drawn in {picture}")
    return 0


def check(config: Config, *, num_threads: int) -> int:
    """Reads every image of both splits; prints each that is damaged or odd, with its path and why.

    Returns 1 where one is damaged, else 0.
    """
    damaged = odd = 0
    data = config.data
    for path, why in passed_over(data.name, source_dir=data.source_dir, data_dir=data.data_dir):
        odd += 1
        print(f"note  {path}: {why}")
    for split in dict.fromkeys(part["split"] for part in data.parts().values()):
        source = _open(config, {"split": split})
        progress = Progress(len(source), first_step=0)
        with contextlib.closing(progress), ThreadPoolExecutor(num_threads) as pool:
            for start in range(0, len(source), 1024):
                part = range(start, min(start + 1024, len(source)))
                for found in pool.map(lambda index, source=source: _look(source, index), part):
                    for is_damage, text in found:
                        damaged, odd = damaged + is_damage, odd + (not is_damage)
                        progress.say(f"{'DAMAGED' if is_damage else 'note'}  {text}")
                progress.count(part.stop, "images")
        print(f"{split}: {len(source):,} images read")
    print(f"{damaged} damaged, {odd} notes")
    return 1 if damaged else 0


def _open(config: Config, part: dict[str, Any]) -> Source:
    """Returns the examples on disk, each read when it is asked for."""
    options: dict[str, Any] = {**source_options(config), "memory_limit_mb": 0}
    return open_source(config.data.name, **part, **options)


def _look(source: Source, index: int) -> list[tuple[bool, str]]:
    """Returns what is wrong with an image, and whether it is damage."""
    if not isinstance(source, ImageSource):
        try:
            source.batch(np.array([index]))
        except UserError as error:
            return [(True, str(error))]
        return []
    from cnn_jax.data.checking import damage_of, oddities

    name = source.name(index)
    try:
        data, _ = source.read(index)
    except (OSError, ValueError) as error:
        return [(True, f"{name}: {error}")]
    if damage := damage_of(data):
        return [(True, f"{name}: {damage}")]
    return [(False, f"{name}: {text}") for text in oddities(data, name)]


def _print_split(source: Source) -> None:
    """Prints the sizes of some of a split's images, and how many there are of each class."""
    shown = " x ".join(map(str, source.info.image_shape))
    if isinstance(source, ImageSource):
        shown = _sizes(source)
    print(f"  {source.split}: {len(source):,} images; {shown}")
    counts, unknown = _counted(source)
    print(_balance(counts, source.info.shown_names))
    if unknown:
        have = "has" if unknown == 1 else "have"
        print(f"    {unknown:,} {have} no class that can be read; `data check` says why")


def _sizes(source: ImageSource) -> str:
    from cnn_jax.data.images import size_of

    spread = np.unique(np.linspace(0, len(source) - 1, SIZED).astype(np.int64))
    sizes = []
    for index in spread:
        with contextlib.suppress(OSError, ValueError):
            data, _ = source.read(int(index))
            sizes.append(size_of(data))
    if not sizes:
        raise UserError(
            f"{source.split}: none of {len(spread):,} images can be read; `data check` says why"
        )
    heights, widths = zip(*sizes, strict=True)
    return (
        f"of {len(sizes):,} looked at: "
        f"{min(widths)} to {max(widths)} wide (median {int(np.median(widths))}), "
        f"{min(heights)} to {max(heights)} high (median {int(np.median(heights))})"
    )


def _counted(source: Source) -> tuple[np.ndarray, int]:
    """Returns how many examples of each class there are, and of how many it cannot be told."""
    counts = np.zeros(source.info.num_classes, np.int64)
    progress = Progress(len(source), first_step=0)
    with contextlib.closing(progress):
        for start in range(0, len(source), 1024):
            stop = min(start + 1024, len(source))
            found = source.classes(np.arange(start, stop))
            counts += np.bincount(
                found[(found >= 0) & (found < len(counts))], minlength=len(counts)
            )
            progress.count(stop, "labels")
    return counts, len(source) - int(counts.sum())


def _balance(counts: np.ndarray, names: Sequence[str]) -> str:
    """Returns a table: every class in order or, of many, the largest and the smallest."""
    order, half = np.arange(len(counts)), SHOWN // 2
    middle = order[:0]
    if len(counts) > SHOWN:
        order = np.argsort(-counts, kind="stable")
        order, middle = np.concatenate([order[:half], order[-half:]]), order[half:-half]
    width = max(len("class"), *(len(names[k]) for k in order.tolist()))
    total = max(1, counts.sum())
    lines = [f"    {'class':<{width}}  {'images':>11}  {'share':>8}"]
    lines += [
        f"    {names[k]:<{width}}  {counts[k]:>11,}  {counts[k] / total:>8.2%}"
        for k in order.tolist()
    ]
    if len(middle):
        least, most = counts[middle[-1]], counts[middle[0]]
        lines.insert(1 + half, f"    {len(middle):,} classes between, of {least:,} to {most:,}")
    return "\n".join(lines)


def _draw(config: Config, source: Source, path: Path) -> None:
    """Draws training images in pairs: as evaluation would see them, and as training does."""
    from matplotlib.figure import Figure  # where used: it is slow to import

    index = np.linspace(0, len(source) - 1, min(EXAMPLES, len(source))).astype(np.int32)
    before, (after, shares) = source.batch(index), _as_trained(config, source, index)
    names = source.info.shown_names
    figure = Figure(figsize=(16, 9), layout="constrained")
    figure.suptitle(f"{config.data.name}, {source.split}: each image before and after augmentation")
    axes: Any = figure.subplots(4, EXAMPLES // 2)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, label in enumerate(before["label"]):
        row, column = divmod(place, EXAMPLES // 2)
        mixed = [
            names[k] + f" {shares[place, k]:.0%}" for k in np.flatnonzero(shares[place]).tolist()
        ]
        for below, (pixels, title) in enumerate(
            ((before["image"][place], names[label]), (after[place], "\n".join(mixed)))
        ):
            axis = axes[2 * row + below, column]
            axis.set_title(title, fontsize=9)
            axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
    figure.savefig(path, dpi=100)


def _as_trained(config: Config, source: Source, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a step makes of the examples as one batch of the first epoch.

    They are images, uint8, and the shares of the classes, [n, k]; of labels as they are, [n, 0].
    """
    epoch, key = np.zeros_like(index), training_key(config)
    batch = source.batch(index, epoch)
    images = augmentation(config)(batch["image"], key, epoch, index)
    images = normalization(config, dtype=jnp.float32)(images)
    shares: Any = np.empty((len(index), 0))
    if mix := mixing(config, source.info.num_classes):
        images, shares = mix(images, batch["label"], key, epoch, index)
    mean, std = map(np.array, (config.data.mean, config.data.std))
    pixels = np.rint(255 * (np.asarray(images) * std + mean))
    return np.clip(pixels, 0, 255).astype(np.uint8), np.asarray(shares)
