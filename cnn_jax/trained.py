"""A finished or stopped run, read back: its configuration, its model and its weights."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax.config import Config, ConfigError, completed, parse
from cnn_jax.data.datasets import DatasetInfo
from cnn_jax.data.sources import Source
from cnn_jax.errors import UserError
from cnn_jax.models.folding import fold_batch_norms
from cnn_jax.models.torch_weights import from_variables
from cnn_jax.plan import as_evaluated, decisive, make_model, normalization, open_part
from cnn_jax.runtime.checkpoint import find_damage
from cnn_jax.runtime.compiler import compile_program, compiler_settings, wanted_options
from cnn_jax.runtime.programs import kept
from cnn_jax.runtime.report import METRICS, read_rows
from cnn_jax.runtime.weight_files import read_directory
from cnn_jax.runtime.workdir import CONFIG, has_checkpoint, read_config
from cnn_jax.storage import place
from cnn_jax.typing import Images, RawImages

if TYPE_CHECKING:
    from cnn_jax.data.reading_ahead import FileBatch

CHECKPOINTS = ("last", "best")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has learned.

    Attributes:
      directory: of the run.
      step: optimiser steps behind these weights.
      config: of the run.
      dataset: what is known of its data set.
      model: the linen module.
      variables: its parameters and running statistics.
      ema: whether these are the moving averages.
    """

    directory: Path
    step: int
    config: Config
    dataset: DatasetInfo
    model: Any
    variables: Mapping[str, Any]
    ema: bool

    @property
    def described(self) -> str:
        """Which weights these are, for a person."""
        weights = ", averaged weights," if self.ema else ""
        return f"step {self.step:,}{weights} of {self.directory}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers where the data set gives no names."""
        return self.dataset.shown_names

    @property
    def eval_fraction(self) -> float:
        """The share of an image's sides that is evaluated: 1 where all images have one size."""
        return 1.0 if self.dataset.has_one_size else self.config.data.eval_fraction

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to an image before the network and inside it, for another program."""
        return {
            "before": "turned as the EXIF tag says; grey or RGB by channels; cut to its middle,"
            " eval_fraction of the sides of the largest part in the proportions of height x width;"
            " resized to that: bilinear, or where that halves it or more the mean of pixels",
            "eval_fraction": self.eval_fraction,
            "inside": "(pixels / 255 - mean) / std",
            "mean": list(self.config.data.mean),
            "std": list(self.config.data.std),
        }

    def normalize(self, images: RawImages) -> Images:
        """Returns what the network takes, of pixels, as in training."""
        return normalization(self.config, dtype=jnp.dtype(self.config.precision))(images)

    def open_split(self, split: str | None, *, log: Callable[[str], None]) -> Source:
        """Returns the examples of a split of the run's data set, by default what it was tested on.

        Damaged records are skipped where the run skipped them. Raises UserError where the examples
        are not there, or have other classes than the run.
        """
        data = self.config.data
        part = {"split": split} if split else data.parts()["test"]
        source = open_part(self.config, part, log=log)
        names = self.dataset.class_names
        if names and source.info.class_names != names:
            other = set(source.info.class_names) ^ set(names)
            raise UserError(
                f"{data.source_dir or data.name}: has other classes than {self.directory} was "
                f"trained on; not in both: {', '.join(sorted(other)) or 'none, but in other order'}"
            )
        return source

    def read_files(
        self, paths: Iterable[str], *, batch_size: int, num_threads: int
    ) -> Generator["FileBatch", None, None]:
        """Gives the images that `paths` name as those of the run's data set are evaluated.

        See `reading_ahead.read_batches`.
        """
        from cnn_jax.data.reading_ahead import read_batches  # only here: it loads decoders

        return read_batches(
            paths,
            self.dataset.image_shape,
            fraction=self.eval_fraction,
            batch_size=batch_size,
            num_threads=num_threads,
        )

    @functools.cached_property
    def without_batch_norms(self) -> "Trained":
        """The same network with fewer operations, or itself; see `models.folding`."""
        images = jax.ShapeDtypeStruct((1, *self.dataset.image_shape), self.config.precision)
        model, variables = fold_batch_norms(self.model, self.variables, images)
        return dataclasses.replace(self, model=model, variables=variables)

    def compile_logits(self, batch_size: int) -> Callable[[RawImages], jax.Array]:
        """Returns a compiled function of `batch_size` uint8 images: float32 logits [b, k].

        They are those that the run's test figures are of, but for rounding: BatchNorms are folded
        where that is float32's.
        """
        exact = self.config.precision == "float32"
        run = self.without_batch_norms if exact else self
        model = as_evaluated(run.model, run.config)

        def logits(variables: Any, images: Images) -> jax.Array:
            return model.apply(variables, images, train=False)

        return run.compile("logits", logits, batch_size)

    def compile(
        self,
        name: str,
        function: Callable[..., Any],
        batch_size: int,
        *others: jax.ShapeDtypeStruct,
        **decided_by: Any,
    ) -> Callable[..., Any]:
        """Returns a compiled function of `batch_size` uint8 images, and of arrays like `others`.

        It gives what `function` makes of the variables, the normalised images and those arrays. The
        program is kept between starts under its `name` and all that decides it beside the
        configuration.
        """

        def of_pixels(variables: Any, images: RawImages, *others: jax.Array) -> Any:
            return function(variables, self.normalize(images), *others)

        images = jax.ShapeDtypeStruct((batch_size, *self.dataset.image_shape), jnp.uint8)
        variables = jax.device_put(dict(self.variables))

        def make() -> jax.stages.Compiled:
            lowered = jax.jit(of_pixels).lower(variables, images, *others)
            return compile_program(lowered, compiler_settings().options)

        program = kept(
            name,
            make,
            arguments={"variables": variables, "images": images, "others": others},
            devices=jax.local_devices()[:1],
            options=wanted_options(),
            decided_by={**decisive(self.config), **decided_by},
        )
        return functools.partial(program, variables)


def most_probable(
    probabilities: np.ndarray, class_names: tuple[str, ...], top: int
) -> tuple[tuple[str, float], ...]:
    """Returns the `top` classes of one image's `probabilities` [k] with theirs, the first first."""
    best = np.argsort(-probabilities, kind="stable")[:top]
    return tuple((class_names[k], float(probabilities[k])) for k in best.tolist())


def open_run(
    directory: str | Path,
    *,
    checkpoint: str = "last",
    ema: bool = False,
    log: Callable[[str], None] = print,
) -> Trained:
    """Returns what the run in `directory` has learned, at its `checkpoint`.

    That is "last", "best" (of the test accuracy in its metrics) or the number of a step. A damaged
    checkpoint is named to `log` and the next one is taken, unless it was asked for by number. With
    `ema` it is the moving averages of parameters and statistics. The data need not be there: the
    checkpoint holds what is known of them.

    Raises UserError where there is no run, no good checkpoint, no average, or one of another model.
    """
    directory = place(directory)
    if not directory.is_dir():
        raise UserError(f"--workdir {directory}: there is no such directory")
    values = read_config(directory)
    if values is None and not has_checkpoint(directory):
        raise UserError(f"--workdir {directory}: holds no run (it has no {CONFIG})")
    path = _find_checkpoint(directory, checkpoint, log)
    saved, record = read_directory(path, averaged=ema)
    known = _recorded(record)
    values = {**completed(values or record["config"]), "mesh": {"data": -1, "fsdp": 1}}
    try:  # a run of many devices may be looked at on one
        config = parse(values, num_devices=1, dataset=known)
    except ConfigError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error
    dataset = known or config.data.dataset()
    model = make_model(config, dataset)
    image = jax.ShapeDtypeStruct((1, *dataset.image_shape), jnp.float32)
    abstract = jax.eval_shape(
        lambda image: model.init(jax.random.key(0), image, train=False), image
    )
    variables = from_variables(saved, abstract)
    return Trained(directory, int(path.name), config, dataset, model, variables, ema)


def _recorded(record: Mapping[str, Any]) -> DatasetInfo | None:
    """Returns what a checkpoint says of its data set; None for one of an earlier version."""
    if "dataset" not in record:
        return None
    facts: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record["dataset"].items()
    }
    return DatasetInfo(**facts)


def _find_checkpoint(directory: Path, which: str, log: Callable[[str], None]) -> Path:
    paths = [path for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
    steps = {int(path.name): path for path in paths}
    if which.isdecimal():
        if int(which) not in steps:
            raise UserError(
                f"checkpoint {which}: {directory} has none of that step; it has those of "
                f"{', '.join(map(str, sorted(steps))) or 'no step'}"
            )
        damage = find_damage(steps[int(which)])
        if damage is not None:
            raise UserError(f"{steps[int(which)]} cannot be used: {damage}")
        return steps[int(which)]
    if which not in CHECKPOINTS:
        raise UserError(f"checkpoint {which!r}: must be {', '.join(CHECKPOINTS)} or a step")
    for step in _ordered(directory, which, steps):
        damage = find_damage(steps[step])
        if damage is None:
            return steps[step]
        log(f"checkpoint {steps[step]} is skipped: {damage}")
    raise UserError(f"{directory} holds no good checkpoint")


def _ordered(directory: Path, which: str, steps: Iterable[int]) -> list[int]:
    """Returns the steps to try, the first first: the newest, or the one with the best accuracy.

    It is that of the averages where a run has them, as for the checkpoint that it keeps.
    """
    if which == "last":
        return sorted(steps, reverse=True)
    rows = read_rows(directory / METRICS)
    accuracy = {
        row["step"]: row.get("test/accuracy_ema", row["test/accuracy"])
        for row in rows
        if "test/accuracy" in row
    }
    return sorted(steps, key=lambda step: (accuracy.get(step, -1.0), step), reverse=True)
