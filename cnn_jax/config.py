"""The configuration of a run, typed and checked: behind this door no code sees a ConfigDict.

`configs/default.py` says what every key means; the dataclasses here have the same keys and say what
each may be. A key is written with dots: `optimizer.learning_rate`.
"""

import ast
import collections.abc
import contextlib
import dataclasses
import itertools
import json
import math
import numbers
import operator
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp

from cnn_jax.data.datasets import NAMES, DatasetInfo, dataset_info, split_range
from cnn_jax.data.holdout import Part
from cnn_jax.errors import UserError, nearest
from cnn_jax.models import MODELS, create_model, model_class
from cnn_jax.models.classifier import REMATS
from cnn_jax.models.normalization import BATCH_NORMS, NORMS
from cnn_jax.models.torch_weights import WeightsError
from cnn_jax.runtime.residency import RESIDENCIES
from cnn_jax.training.freezing import train_only
from cnn_jax.training.losses import LOSSES
from cnn_jax.training.optim import OPTIMIZERS, SCHEDULES
from cnn_jax.training.random_operations import STRONGEST


class ConfigError(UserError):
    """Every mistake of a configuration, one line each in `problems`."""

    def __init__(self, problems: Sequence[str]):
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n  ".join([f"{count} in the configuration", *problems]))
        self.problems = tuple(problems)


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "!=": operator.ne,
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """The numbers that compare so with `limit`: `Bound(">=", 1)`."""

    comparison: str
    limit: float

    def __contains__(self, number: float) -> bool:
        return _COMPARISONS[self.comparison](number, self.limit)

    def __str__(self) -> str:
        return f"{self.comparison} {self.limit}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The names of a table."""

    names: Collection[str]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.names))}"


@dataclasses.dataclass(frozen=True)
class OneOfStatistics:
    """Whose images are normalised together: "global", "device", or "group:N" of N images."""

    def __contains__(self, text: str) -> bool:
        return text in ("global", "device") or re.fullmatch("group:[1-9][0-9]*", text) is not None

    def __str__(self) -> str:
        return "'global', 'device' or 'group:N' with a number of images N >= 1"


AtLeastZero = Annotated[int, Bound(">=", 0)]
AtLeastOne = Annotated[int, Bound(">=", 1)]
NotNegative = Annotated[float, Bound(">=", 0)]
Positive = Annotated[float, Bound(">", 0)]
BelowOne = Annotated[float, Bound(">=", 0), Bound("<", 1)]
Fraction = Annotated[float, Bound(">=", 0), Bound("<=", 1)]
MeshSize = Annotated[int, Bound(">=", -1), Bound("!=", 0)]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """`arguments` are the keys beside `name`, any that the model's class takes."""

    name: Annotated[str, OneOf(MODELS)]
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: Annotated[str, OneOf(NAMES)]
    train_split: str
    test_split: str
    data_dir: str
    source_dir: str
    image_size: AtLeastZero
    crop_min_area: Annotated[float, Bound(">", 0), Bound("<=", 1)]
    eval_fraction: Annotated[float, Bound(">", 0), Bound("<=", 1)]
    holdout: Annotated[float, Bound(">=", 0), Bound("<", 100)]
    progressive_sizes: tuple[AtLeastOne, ...]
    progressive_epochs: tuple[Positive, ...]
    residency: Annotated[str, OneOf(RESIDENCIES)]
    memory_limit_mb: AtLeastZero
    num_threads: AtLeastOne
    prefetch: AtLeastOne
    on_bad_record: Annotated[str, OneOf(("raise", "skip"))]
    mean: tuple[float, ...]
    std: tuple[Positive, ...]

    def parts(self) -> dict[str, dict[str, Any]]:
        """Returns what a run trains on, "train", and is tested on, "test", for `open_source`."""
        if not self.holdout:
            return {"train": {"split": self.train_split}, "test": {"split": self.test_split}}
        return {
            name: {"split": self.train_split, "part": Part(self.holdout, held_out=name == "test")}
            for name in ("train", "test")
        }

    def num_examples(self, dataset: DatasetInfo) -> tuple[int, int]:
        """Returns how many of its examples a run trains on, and how many it is tested on."""
        size, size_of_test = (
            len(split_range(dataset, part["split"])[1]) for part in self.parts().values()
        )
        if not self.holdout:
            return size, size_of_test
        held_out = Part(self.holdout, held_out=True).size(size)
        return size - held_out, held_out

    def dataset(self) -> DatasetInfo:
        """Returns what is known of the data set; raises UserError where it must be found first."""
        return dataset_info(
            self.name,
            data_dir=self.data_dir,
            source_dir=self.source_dir,
            image_size=self.image_size,
        )


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    crop_padding: AtLeastZero
    flip: bool
    alternate_flips: bool
    random_operations: AtLeastZero
    magnitude: Annotated[int, Bound(">=", 0), Bound("<=", STRONGEST)]
    brightness: NotNegative
    contrast: NotNegative
    saturation: NotNegative
    hue: Annotated[float, Bound(">=", 0), Bound("<=", 0.5)]
    erase_probability: Fraction
    mixup_alpha: NotNegative
    cutmix_alpha: NotNegative


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Annotated[str, OneOf(OPTIMIZERS)]
    learning_rate: Positive
    momentum: BelowOne
    nesterov: bool
    b1: BelowOne
    b2: BelowOne
    eps: Positive
    weight_decay: NotNegative
    clip_norm: NotNegative
    clip_ratio: NotNegative


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    name: Annotated[str, OneOf(SCHEDULES)]
    warmup_epochs: NotNegative
    end_factor: Fraction
    milestones: tuple[Positive, ...]
    step_factor: Annotated[float, Bound(">", 0), Bound("<=", 1)]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    name: Annotated[str, OneOf(LOSSES)]
    label_smoothing: BelowOne
    threshold: BelowOne


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    decay: BelowOne


@dataclasses.dataclass(frozen=True)
class BatchNormConfig:
    statistics: Annotated[str, OneOfStatistics()]

    def group_size(self, batch_size: int, num_devices: int) -> int | None:
        """Returns the images normalised together out of a batch; None: all of them."""
        if self.statistics == "global":
            return None
        if self.statistics == "device":
            return batch_size // num_devices
        return int(self.statistics.removeprefix("group:"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: MeshSize
    fsdp: MeshSize


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    batch_size: AtLeastOne
    average_flips: bool
    every_steps: AtLeastZero


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: AtLeastZero
    keep: AtLeastOne


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    nan_check_every: Annotated[int, Bound(">=", 3)]  # two steps are always under way
    on_nan: Annotated[str, OneOf(("stop", "rollback"))]
    max_skipped: AtLeastOne


@dataclasses.dataclass(frozen=True)
class LogConfig:
    every_steps: AtLeastOne


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole and checked configuration, as `parse` returns it."""

    seed: Annotated[int, Bound(">=", 0), Bound("<", 2**31)]
    batch_size: AtLeastOne
    accumulate_steps: AtLeastOne
    steps_per_call: AtLeastZero
    remat: Annotated[str, OneOf(REMATS)]
    num_epochs: AtLeastOne
    precision: Annotated[str, OneOf(("float32", "bfloat16"))]
    init_from: str
    init_ignore: tuple[str, ...]
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    train_only: tuple[str, ...]
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    loss: LossConfig
    batch_norm: BatchNormConfig
    ema: EmaConfig
    mesh: MeshConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    faults: FaultsConfig
    log: LogConfig

    def as_dict(self) -> dict[str, Any]:
        """Returns nested plain values, equal to what JSON gives back; `parse` takes them."""
        values = dataclasses.asdict(self)
        values["model"] |= values["model"].pop("arguments")
        return json.loads(json.dumps(values))


def parse(
    values: Mapping[str, Any],
    *,
    num_devices: int,
    check_weights: bool = False,
    dataset: DatasetInfo | None = None,
) -> Config:
    """Returns the configuration that the nested `values` spell, for a run on `num_devices`.

    With `check_weights` it reads the weights of `init_from`, which a run does not need again once
    it has a checkpoint. A `dataset` that is known is not looked for.

    Raises ConfigError with every mistake there is: unknown and missing keys, wrong types, values
    out of range, unknown names, and values that do not go together.
    """
    given = _flatten(values)
    schema = _SCHEMA | _model_schema(given)
    problems = [_unknown(key, given[key], schema) for key in given if key not in schema]
    good: dict[str, Any] = {}
    for key, annotation in schema.items():
        if key in given:
            if _allows(annotation, given[key]):
                good[key] = _typed(annotation, given[key])
            else:
                problems.append(_wrong(key, given[key], annotation))
        elif key in _SCHEMA and key.partition(".")[0] not in given:
            problems.append(f"{key}: missing; must be {_describe(annotation)}")

    arguments = [key for key in given if key.startswith("model.") and key != "model.name"]
    if all(key in good for key in arguments):
        good["model.arguments"] = {key.removeprefix("model."): good[key] for key in arguments}
    if dataset is not None:
        good["dataset"] = dataset
    elif all(key in good for key in _DATASET_KEYS):
        name, *where = (good[key] for key in _DATASET_KEYS)
        try:
            good["dataset"] = dataset_info(name, **dict(zip(_DATASET_WHERE, where, strict=True)))
        except UserError as error:
            problems.append(f"data.name = {name!r}: {error}")
    good["num_devices"] = num_devices
    if check_weights and good.get("init_from"):
        good["check_weights"] = True
    for needed, rule in _RULES:
        if all(fact in good for fact in needed):
            problems.extend(rule(*(good[fact] for fact in needed)))

    if problems:
        raise ConfigError(problems)
    return _build(Config, good)


ADDED = {
    "accumulate_steps": 1,
    "steps_per_call": 0,
    "remat": "none",
    "data.holdout": 0.0,
    "data.progressive_sizes": [],
    "data.progressive_epochs": [],
    "data.residency": "auto",  # of equal results
    "data.image_size": 0,
    "data.crop_min_area": 0.08,
    "data.eval_fraction": 0.875,
    "data.on_bad_record": "raise",
    "augment.alternate_flips": False,
    "augment.random_operations": 0,
    "augment.magnitude": 9,
    "augment.brightness": 0.0,
    "augment.contrast": 0.0,
    "augment.saturation": 0.0,
    "augment.hue": 0.0,
    "augment.erase_probability": 0.0,
    "augment.mixup_alpha": 0.0,
    "augment.cutmix_alpha": 0.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.clip_ratio": 0.0,
    "schedule.milestones": [],
    "schedule.step_factor": 0.1,
    "loss.name": "cross_entropy",
    "loss.threshold": 0.0,
    "ema.decay": 0.0,
    "batch_norm.statistics": "global",
    "eval.average_flips": False,
    "faults.nan_check_every": 20,
    "faults.on_nan": "stop",
    "faults.max_skipped": 10,
}
"""Keys that came after runs had been made without them, with what those runs did."""


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested `values` of a run, perhaps of an earlier version, with every key."""
    values, given = _copy(values), _flatten(values)
    for key, value in ADDED.items():
        if key not in given:
            *sections, leaf = key.split(".")
            section = values
            for name in sections:
                section = section.setdefault(name, {})
            section[leaf] = value
    return values


def override(values: Mapping[str, Any], texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Returns nested `values` with each (key, text) set, the text read by the key's type.

    A text that cannot be read stays a text, and `parse` says what is wrong with it.
    """
    changed = _copy(values)
    for key, text in texts:
        *sections, leaf = key.split(".")
        section = changed
        for name in sections:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[leaf] = _read(text, _SCHEMA.get(key))
    return changed


def model_arguments(name: str, texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Returns the arguments of the named model that each (key, text) gives, read by its type.

    Raises ConfigError with every mistake.
    """
    schema = _model_schema({"model.name": name})
    given = {f"model.{key}": _read(text, schema.get(f"model.{key}")) for key, text in texts}
    problems = [_unknown(key, value, schema) for key, value in given.items() if key not in schema]
    for key, value in given.items():
        if key in schema and not _allows(schema[key], value):
            problems.append(_wrong(key, value, schema[key]))
    if problems:
        raise ConfigError(problems)
    return {key.removeprefix("model."): _typed(schema[key], given[key]) for key in given}


def sweep(
    values: Mapping[str, Any], texts: Iterable[tuple[str, str]]
) -> dict[str, list[tuple[str, str]]]:
    """Returns every combination of overrides, where a text may list several values of its key.

    `("batch_size", "256,512")` makes "batch_size=256" and "batch_size=512"; the values of a key
    that is a list are one. A combination is named by the keys that have several values, "" where
    none has; of a key that comes twice the last text holds.
    """
    given = dict(texts)
    schema = _SCHEMA | _model_schema(_flatten(override(values, given.items())))

    def choices(key: str) -> list[str]:
        kind, _, _ = _parts(schema.get(key))
        several = kind in (int, float, str, bool)
        return list(dict.fromkeys(given[key].split(","))) if several else [given[key]]

    swept = {key: choices(key) for key in given}
    return {
        ",".join(f"{k}={t}" for k, t in zip(swept, each, strict=True) if len(swept[k]) > 1): list(
            zip(swept, each, strict=True)
        )
        for each in itertools.product(*swept.values())
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns a line for every key that has another value in `old`, the run's, than in `new`.

    Both are what `Config.as_dict` gave, `old` perhaps of a version with other keys.
    """
    before, now = _flatten(old), _flatten(new)

    def shown(values: Mapping[str, Any], key: str) -> str:
        return repr(values[key]) if key in values else "not set"

    return [
        f"{key}: {shown(before, key)} in the run, {shown(now, key)} now"
        for key in now | before
        if shown(before, key) != shown(now, key)
    ]


def _mesh_covers_devices(data: int, fsdp: int, num_devices: int) -> Iterator[str]:
    fixed = math.prod(size for size in (data, fsdp) if size != -1)
    if data == fsdp == -1:
        yield "mesh.data = -1, mesh.fsdp = -1: only one can be -1, all remaining devices"
    elif -1 not in (data, fsdp) and fixed != num_devices:
        yield (
            f"mesh.data = {data}, mesh.fsdp = {fsdp}: "
            f"must multiply to the number of devices, {num_devices}"
        )
    elif num_devices % fixed:
        key = "mesh.fsdp" if data == -1 else "mesh.data"
        yield f"{key} = {fixed}: must divide the number of devices, {num_devices}"


def _devices_share_alike(key: str, batch_size: int, num_devices: int) -> Iterator[str]:
    if batch_size % num_devices:
        yield f"{key} = {batch_size}: must be divisible by the number of devices, {num_devices}"


def _micro_batches_share_alike(
    accumulate_steps: int, batch_size: int, num_devices: int
) -> Iterator[str]:
    if batch_size % num_devices == 0 and batch_size // num_devices % accumulate_steps:
        yield (
            f"accumulate_steps = {accumulate_steps}: must divide the {batch_size // num_devices} "
            f"images that each of {num_devices} devices has of a batch"
        )


def _groups_fill_a_batch(statistics: str, accumulate_steps: int, batch_size: int) -> Iterator[str]:
    size, rest = divmod(batch_size, accumulate_steps)
    group = BatchNormConfig(statistics).group_size(size, 1)
    if group and not rest and size % group:
        which = "a batch" if accumulate_steps == 1 else "a micro-batch"
        yield f"batch_norm.statistics = {statistics!r}: N must divide the {size} images of {which}"


def _statistics_are_of_batch_norm(
    statistics: str, name: str, arguments: Mapping[str, Any]
) -> Iterator[str]:
    if statistics == "global":
        return
    norm = arguments.get("norm", create_model(name).norm)
    if norm in NORMS and norm not in BATCH_NORMS:
        yield (
            f"batch_norm.statistics = {statistics!r}: only for a model with BatchNorm; the norm of "
            f"this one is {norm!r}"
        )


def _test_split_exists(split: str, holdout: float, dataset: DatasetInfo) -> Iterator[str]:
    if not holdout:
        yield from _split_exists("data.test_split", split, dataset)


def _holds_out_some(
    holdout: float, batch_size: int, split: str, dataset: DatasetInfo
) -> Iterator[str]:
    with contextlib.suppress(UserError):  # an unknown split is reported by its own rule
        size = len(split_range(dataset, split)[1])
        count = Part(holdout, held_out=True).size(size)
        if holdout and not 0 < count <= size - batch_size:
            yield (
                f"data.holdout = {holdout}: {count} of {size} images are held out; must be at "
                f"least 1 and leave a batch of {batch_size}"
            )


def _split_exists(key: str, split: str, dataset: DatasetInfo) -> Iterator[str]:
    try:
        split_range(dataset, split)
    except UserError as error:
        yield f"{key} = {split!r}: {error}"


def _images_fill_a_batch(batch_size: int, split: str, dataset: DatasetInfo) -> Iterator[str]:
    with contextlib.suppress(UserError):  # an unknown split is reported by its own rule
        _, examples = split_range(dataset, split)
        if batch_size > len(examples):
            yield (
                f"batch_size = {batch_size}: "
                f"must be <= {len(examples)}, the images of the split {split!r}"
            )


def _can_be_resident(residency: str, dataset: DatasetInfo) -> Iterator[str]:
    if residency == "device" and not dataset.has_one_size:
        yield (
            "data.residency = 'device': only for images that are all of one size; others are "
            "decoded and cropped anew in every epoch, on the host"
        )


def _calls_are_short(steps_per_call: int, residency: str, nan_check_every: int) -> Iterator[str]:
    if steps_per_call > 1 and residency == "host":
        yield (
            f"steps_per_call = {steps_per_call}: only for a data set on the device; "
            "data.residency is 'host'"
        )
    if steps_per_call > 1 and 2 * steps_per_call > nan_check_every:
        yield (
            f"steps_per_call = {steps_per_call}: must be <= {nan_check_every // 2}, half of "
            "faults.nan_check_every, as two calls may be under way"
        )


def _sizes_follow_each_other(
    sizes: Sequence[int], epochs: Sequence[float], num_epochs: int
) -> Iterator[str]:
    if len(sizes) != len(epochs):
        yield (
            f"data.progressive_epochs = {epochs}: must have one number for each of "
            f"data.progressive_sizes, {len(sizes)}"
        )
    if any(a >= b for a, b in itertools.pairwise((0, *epochs, num_epochs))):
        yield (
            f"data.progressive_epochs = {epochs}: must rise between 0 and {num_epochs}, num_epochs"
        )


def _sizes_suit(
    sizes: Sequence[int],
    padding: int,
    name: str,
    arguments: Mapping[str, Any],
    dataset: DatasetInfo,
) -> Iterator[str]:
    height, width, channels = dataset.image_shape
    key = f"data.progressive_sizes = {sizes}"
    if sizes and height != width:
        yield f"{key}: only for square images; these are of {height} x {width} pixels"
        return
    try:
        wanted = _shapes(abstract_variables(name, arguments, dataset))
    except (ValueError, TypeError, ArithmeticError):  # has a rule of its own
        return
    for size in sizes:
        if not padding < size < height:
            yield (
                f"{key}: each must be > {padding}, augment.crop_padding, and < {height}, "
                "the side of the images at the end"
            )
            return
        smaller = dataclasses.replace(dataset, image_shape=(size, size, channels))
        try:
            found = _shapes(abstract_variables(name, arguments, smaller))
        except (ValueError, TypeError, ArithmeticError) as error:
            yield f"{key}: the model does not take {size}: {' '.join(str(error).split())}"
            continue
        if found != wanted:
            yield f"{key}: at {size} the model has weights of other shapes"


def _shapes(variables: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape, variables)


def _one_for_each_channel(
    key: str, numbers: Sequence[float], dataset: DatasetInfo
) -> Iterator[str]:
    channels = dataset.image_shape[-1]
    if len(numbers) != channels:
        yield f"{key} = {numbers}: must have one number for each channel of an image, {channels}"


def _crop_is_smaller_than_image(padding: int, dataset: DatasetInfo) -> Iterator[str]:
    side = min(dataset.image_shape[:2])
    if padding >= side:
        yield f"augment.crop_padding = {padding}: must be < {side}, the pixels of an image's side"


def _warmup_ends(warmup_epochs: float, num_epochs: int) -> Iterator[str]:
    if warmup_epochs > num_epochs:
        yield f"schedule.warmup_epochs = {warmup_epochs}: must be <= {num_epochs}, num_epochs"


def _falls_in_order(
    name: str, milestones: Sequence[float], warmup_epochs: float, num_epochs: int
) -> Iterator[str]:
    ends = (warmup_epochs, *milestones, num_epochs)
    if name == "step" and not milestones:
        yield "schedule.milestones = (): schedule.name = 'step' needs the epochs of its steps"
    elif name != "step" and milestones:
        yield f"schedule.milestones = {milestones}: only with schedule.name = 'step'"
    elif milestones and any(a >= b for a, b in itertools.pairwise(ends)):
        yield (
            f"schedule.milestones = {milestones}: must rise between {warmup_epochs}, "
            f"schedule.warmup_epochs, and {num_epochs}, num_epochs"
        )


def _flips_one_way(flip: bool, alternate_flips: bool) -> Iterator[str]:
    if flip and alternate_flips:
        yield "augment.flip, augment.alternate_flips: only one of them can be true"


def _colors_need_one_channel_or_three(operations: int, *jitters_and_dataset: Any) -> Iterator[str]:
    *jitters, dataset = jitters_and_dataset
    channels = dataset.image_shape[-1]
    if channels not in (1, 3) and (operations or any(jitters)):
        yield f"augment: changes of colour and RandAugment need 1 or 3 channels, not {channels}"


def _clips_one_way(clip_norm: float, clip_ratio: float) -> Iterator[str]:
    if clip_norm and clip_ratio:
        yield (
            f"optimizer.clip_norm = {clip_norm}, optimizer.clip_ratio = {clip_ratio}: "
            "only one of them can be other than 0"
        )


def _threshold_of_binary(threshold: float, name: str) -> Iterator[str]:
    if threshold and name != "binary_cross_entropy":
        yield f"loss.threshold = {threshold}: only with loss.name = 'binary_cross_entropy'"


def _model_takes_images(
    name: str, arguments: Mapping[str, Any], dataset: DatasetInfo
) -> Iterator[str]:
    try:
        abstract_variables(name, arguments, dataset)
    except (ValueError, TypeError, ArithmeticError) as error:
        yield f"model: {' '.join(str(error).split())}"


def _patterns_name_parameters(
    patterns: Sequence[str], name: str, arguments: Mapping[str, Any], dataset: DatasetInfo
) -> Iterator[str]:
    if not patterns:
        return
    with contextlib.suppress(ValueError, TypeError, ArithmeticError):  # has a rule of its own
        params = abstract_variables(name, arguments, dataset)["params"]
        try:
            train_only(patterns, params)
        except UserError as error:
            yield f"train_only: {error}"


def _ignored_of_a_file(init_ignore: Sequence[str], init_from: str) -> Iterator[str]:
    if init_ignore and not init_from:
        yield f"init_ignore = {init_ignore!r}: only with init_from; all weights are random without"


def _weights_fit(
    path: str,
    ignore: Sequence[str],
    name: str,
    arguments: Mapping[str, Any],
    dataset: DatasetInfo,
    _: bool,
) -> Iterator[str]:
    from cnn_jax.weights import load_weights  # only here: it loads orbax

    try:
        like = abstract_variables(name, arguments, dataset)
    except (ValueError, TypeError, ArithmeticError):  # has a rule of its own
        return
    try:
        load_weights(path, like, ignore=ignore)
    except WeightsError as error:
        yield from (f"init_from = {path!r}: {problem}" for problem in error.problems)
    except UserError as error:
        yield f"init_from = {path!r}: {error}"


def abstract_variables(name: str, arguments: Mapping[str, Any], dataset: DatasetInfo) -> Any:
    """Returns the shapes of the variables; raises what the model raises at wrong arguments."""
    given = {**arguments, "num_classes": dataset.num_classes}
    return _abstract_variables(MODELS[name], tuple(sorted(given.items())), dataset.image_shape)


@lru_cache(maxsize=16)
def _abstract_variables(
    make: Callable[..., Any],
    arguments: tuple[tuple[str, Any], ...],
    image_shape: tuple[int, int, int],
) -> Any:
    """The rules of one configuration, and the topologies of a sweep, trace the model once."""

    def init() -> Any:
        model = make(**dict(arguments))
        return model.init(jax.random.key(0), jnp.zeros((1, *image_shape)), train=False)

    return jax.eval_shape(init)


_RULES: Sequence[tuple[Sequence[str], Callable[..., Iterable[str]]]] = (
    (("mesh.data", "mesh.fsdp", "num_devices"), _mesh_covers_devices),
    (("batch_size", "num_devices"), partial(_devices_share_alike, "batch_size")),
    (("eval.batch_size", "num_devices"), partial(_devices_share_alike, "eval.batch_size")),
    (("accumulate_steps", "batch_size", "num_devices"), _micro_batches_share_alike),
    (("batch_norm.statistics", "accumulate_steps", "batch_size"), _groups_fill_a_batch),
    (
        ("batch_norm.statistics", "model.name", "model.arguments"),
        _statistics_are_of_batch_norm,
    ),
    (("data.train_split", "dataset"), partial(_split_exists, "data.train_split")),
    (("data.test_split", "data.holdout", "dataset"), _test_split_exists),
    (("data.holdout", "batch_size", "data.train_split", "dataset"), _holds_out_some),
    (("batch_size", "data.train_split", "dataset"), _images_fill_a_batch),
    (("data.mean", "dataset"), partial(_one_for_each_channel, "data.mean")),
    (("data.std", "dataset"), partial(_one_for_each_channel, "data.std")),
    (("data.residency", "dataset"), _can_be_resident),
    (("steps_per_call", "data.residency", "faults.nan_check_every"), _calls_are_short),
    (
        ("data.progressive_sizes", "data.progressive_epochs", "num_epochs"),
        _sizes_follow_each_other,
    ),
    (
        (
            "data.progressive_sizes",
            "augment.crop_padding",
            "model.name",
            "model.arguments",
            "dataset",
        ),
        _sizes_suit,
    ),
    (("augment.crop_padding", "dataset"), _crop_is_smaller_than_image),
    (("schedule.warmup_epochs", "num_epochs"), _warmup_ends),
    (
        ("schedule.name", "schedule.milestones", "schedule.warmup_epochs", "num_epochs"),
        _falls_in_order,
    ),
    (("augment.flip", "augment.alternate_flips"), _flips_one_way),
    (
        (
            "augment.random_operations",
            "augment.brightness",
            "augment.contrast",
            "augment.saturation",
            "augment.hue",
            "dataset",
        ),
        _colors_need_one_channel_or_three,
    ),
    (("optimizer.clip_norm", "optimizer.clip_ratio"), _clips_one_way),
    (("loss.threshold", "loss.name"), _threshold_of_binary),
    (("model.name", "model.arguments", "dataset"), _model_takes_images),
    (("train_only", "model.name", "model.arguments", "dataset"), _patterns_name_parameters),
    (("init_ignore", "init_from"), _ignored_of_a_file),
    (
        ("init_from", "init_ignore", "model.name", "model.arguments", "dataset", "check_weights"),
        _weights_fit,
    ),
)
"""Each rule between values, behind the values that it needs: it is silent while one is wrong."""

_DATASET_WHERE = ("data_dir", "source_dir", "image_size")
_DATASET_KEYS = ("data.name", *(f"data.{key}" for key in _DATASET_WHERE))

_LISTS = (tuple, list, collections.abc.Sequence)
_CLASSES = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}
_PLAIN = (bool, int, float, str, type(None))
_DESCRIPTIONS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def _parts(annotation: Any) -> tuple[Any, Any, list[Any]]:
    """Returns the bare type, the type of its items if it is a list, and what narrows it."""
    base, *bounds = get_args(annotation) if get_origin(annotation) is Annotated else [annotation]
    kind = get_origin(base) or base
    items = get_args(base) if kind in _LISTS else ()
    return kind, items[0] if items else Any, bounds


def _allows(annotation: Any, value: Any) -> bool:
    """Returns whether the value is of the annotated type; a type not known here is any plain one.

    A list may stand for a tuple and an integer for a number, but a bool is not an integer.
    """
    kind, item, bounds = _parts(annotation)
    if isinstance(value, list | tuple):
        return kind not in _CLASSES and all(_allows(item, part) for part in value)
    if kind in _LISTS or (kind in (int, float) and isinstance(value, bool)):
        return False
    if isinstance(value, numbers.Real) and not abs(cast(float, value)) <= sys.float_info.max:
        return False
    return isinstance(value, _CLASSES.get(kind, _PLAIN)) and all(value in each for each in bounds)


def _typed(annotation: Any, value: Any) -> Any:
    """Returns a value that the type allows as exactly that type, lists as tuples."""
    kind, item, _ = _parts(annotation)
    if isinstance(value, list | tuple):
        return tuple(_typed(item, part) for part in value)
    return kind(value) if kind in (int, float) else value


def _describe(annotation: Any) -> str:
    """Returns what the annotation allows, to be put behind "must be"."""
    kind, item, bounds = _parts(annotation)
    if kind in _LISTS:
        return f"a list, each {_describe(item)}"
    if bounds and isinstance(bounds[0], OneOf):
        return str(bounds[0])
    description = _DESCRIPTIONS.get(kind, "a plain value")
    return " ".join([description, " and ".join(map(str, bounds))]).rstrip()


def _wrong(key: str, value: Any, annotation: Any) -> str:
    _, _, bounds = _parts(annotation)
    names = [name for each in bounds if isinstance(each, OneOf) for name in each.names]
    hint = nearest(value, names) if isinstance(value, str) else ""
    return f"{key} = {_shown(value)}: must be {_describe(annotation)}{hint}"


_GIVEN_BY = {
    "model.num_classes": "data.name",
    "model.dtype": "precision",
    "model.remat": "remat",
    "model.batch_norm_group_size": "batch_norm.statistics",
}


def _unknown(key: str, value: Any, schema: Collection[str]) -> str:
    section, _, leaf = key.rpartition(".")
    if key in _GIVEN_BY:
        return f"{key}: not a choice of its own; {_GIVEN_BY[key]} gives it"
    if members := _members(key, schema):
        return f"{key} = {_shown(value)}: must be a section with the keys {', '.join(members)}"
    if siblings := _members(section, schema):
        return f"{key}: unknown key{nearest(leaf, siblings) or '; known: ' + ', '.join(siblings)}"
    return f"{key}: unknown key{nearest(key, schema)}"


def _members(section: str, schema: Collection[str]) -> list[str]:
    return [key.removeprefix(f"{section}.") for key in schema if key.startswith(f"{section}.")]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read(text: str, annotation: Any) -> Any:
    """Returns the value that a text on the command line means for a key of this type."""
    kind, item, _ = _parts(annotation)
    words = {"true": True, "false": False} | ({"1": True, "0": False} if kind is bool else {})
    if kind is str:
        return text
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        bare = kind in _LISTS and item is str  # head,stem for ("head", "stem")
        return tuple(filter(None, text.split(","))) if bare else text
    return (value,) if kind is tuple and not isinstance(value, list | tuple) else value


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }


def _flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested `values` by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat_schema(section: type, prefix: str = "") -> dict[str, Any]:
    """Returns the annotation of every key of a dataclass, by dotted key."""
    schema: dict[str, Any] = {}
    for name, annotation in get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(annotation):
            schema |= _flat_schema(cast(type, annotation), f"{prefix}{name}.")
        else:
            schema[f"{prefix}{name}"] = annotation
    return schema


def _model_schema(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the annotation of every argument of the given model.

    Without a known model nothing can be said of its arguments: those given are all allowed.
    """
    name: Any = given.get("model.name")
    if not _allows(_SCHEMA["model.name"], name):
        return {key: Any for key in given if key.startswith("model.") and key != "model.name"}
    model = model_class(name)
    hints = get_type_hints(model, include_extras=True)
    names = {field.name for field in dataclasses.fields(model)}
    names -= {"name", "parent", "features_only"}
    names -= {key.removeprefix("model.") for key in _GIVEN_BY}
    return {f"model.{name}": hints[name] for name in hints if name in names}


def _build(section: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Returns the dataclass with its values from among those given by dotted key."""
    hints = get_type_hints(section)
    return section(
        **{
            name: _build(cast(type, kind), values, f"{prefix}{name}.")
            if dataclasses.is_dataclass(kind)
            else values[f"{prefix}{name}"]
            for name, kind in hints.items()
        }
    )


_SCHEMA = _flat_schema(Config)
del _SCHEMA["model.arguments"]  # in a config they are keys beside `model.name`
