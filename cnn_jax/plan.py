"""From a checked configuration to the objects of a run, without reading data or making weights.

What trains, what a dry run prints and what is compiled ahead of time are this one plan.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnn_jax.config import Config, abstract_variables
from cnn_jax.data.bad_records import open_without_bad_records
from cnn_jax.data.datasets import DatasetInfo
from cnn_jax.data.pipeline import batches_ahead, steps_at_epoch_end
from cnn_jax.data.sources import Crops, Source, open_source
from cnn_jax.data.stages import Stages
from cnn_jax.models import create_model
from cnn_jax.models.geometry import grouped, layers, table
from cnn_jax.runtime.compiler import CompilerSettings, compile_program, compiler_settings
from cnn_jax.runtime.executables import conditions
from cnn_jax.runtime.platform import describe_devices
from cnn_jax.runtime.programs import kept
from cnn_jax.runtime.residency import fits, steps_per_call
from cnn_jax.runtime.sharding import (
    batch_sharding,
    describe_mesh,
    make_mesh,
    replicated,
    shard_rows,
    shard_state,
)
from cnn_jax.training.augment import Augment, make_augment, normalize
from cnn_jax.training.averaging import moving_average
from cnn_jax.training.flip_averaging import FlipAveraged
from cnn_jax.training.freezing import freeze_updates, train_only
from cnn_jax.training.losses import Loss, binary_cross_entropy, cross_entropy
from cnn_jax.training.mixing import Mix, make_mix
from cnn_jax.training.optim import make_optimizer, make_schedule
from cnn_jax.training.resident import resident
from cnn_jax.training.resizing import resized_first
from cnn_jax.training.state import TrainState, init_state
from cnn_jax.training.statistics import pool_statistics, spread_statistics
from cnn_jax.training.steps import (
    EvalStep,
    Normalize,
    PredictStep,
    TrainStep,
    make_eval_step,
    make_predict_step,
    make_train_step,
)

STEPS = ("train", "evaluation", "prediction")

OF_THE_HOST = (
    "checkpoint.",
    "data.data_dir",
    "data.memory_limit_mb",
    "data.num_threads",
    "data.prefetch",
    "data.source_dir",
    "eval.every_steps",
    "faults.",
    "log.",
)
"""How keys begin that no program depends on; any that is not here is taken to change them all."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of a run whose images are of one size, and so whose program is one.

    Attributes:
      name: of the program: "train", or "train@SIDE" before the images have their whole size.
      first_step: how many steps are done when it begins.
      image_shape: of what enters the model. Images that are all of one size are made smaller in
        the step, others come so.
      step: the pure function that takes one step.
    """

    name: str
    first_step: int
    image_shape: tuple[int, int, int]
    step: TrainStep


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
      config: what was asked for.
      dataset: what is known of the data set.
      train_examples, test_examples: images in the two splits.
      total_steps: optimiser steps from the first to the last.
      model: the linen module.
      tx, schedule: the optimiser, and its learning rate by step.
      mesh: the devices.
      compiler: what the steps are compiled with.
      phases: how it trains, in order: the last on images of their whole size.
      resident: whether the training images lie on the devices.
      steps_per_call: optimiser steps that a call of the training program takes, at most.
      eval_step, predict_step: the pure functions that are compiled.
      init: makes the state at step 0 from the variables that do not start at random.
      state: the abstract train state, with the sharding of every array.
    """

    config: Config
    dataset: DatasetInfo
    train_examples: int
    test_examples: int
    total_steps: int
    model: Any
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    compiler: CompilerSettings
    phases: tuple[Phase, ...]
    resident: bool
    steps_per_call: int
    eval_step: EvalStep
    predict_step: PredictStep
    init: Callable[[Any], TrainState]
    state: TrainState

    def make_state(self) -> TrainState:
        """Returns the state at step 0, on the devices; of the seed and the file to start from.

        Raises UserError where that file does not fit.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        init, weights = jax.jit(self.init, out_shardings=shardings), self._weights()
        if weights:
            return init(weights)
        return self._kept(
            "state", lambda: compile_program(init.lower({}), name="state"), {"weights": {}}
        )({})

    def make_key(self) -> jax.Array:
        """Returns the root of all randomness in the steps, on the devices."""
        make = jax.jit(lambda: training_key(self.config), out_shardings=replicated(self.mesh))
        return make()

    def compile(
        self, step: str, *, log: Callable[[str], None] = lambda text: None
    ) -> jax.stages.Compiled:
        """Returns the program of one of `STEPS`; says to `log` if no earlier start has kept it."""

        def make() -> jax.stages.Compiled:
            log(f"compiling the {step} step")
            return compile_program(self.lower(step), self.compiler.options, name=step)

        return self._kept(step, make, self.arguments(step))

    def _kept(
        self, name: str, make: Callable[[], jax.stages.Compiled], arguments: dict[str, Any]
    ) -> jax.stages.Compiled:
        decided_by = {
            **decisive(self.config),
            "images": self.dataset.image_shape,
            "classes": self.dataset.num_classes,
            "train examples": self.train_examples,
            "steps": self.total_steps,
            "mesh": describe_mesh(self.mesh),
        }
        return kept(
            name,
            make,
            arguments=arguments,
            devices=list(self.mesh.devices.flat),
            options=self.compiler.options,
            decided_by=decided_by,
        )

    def lower(self, step: str) -> jax.stages.Lowered:
        """Returns one of `STEPS`, or the one of a phase by name, ready to compile."""
        return {
            **{
                phase.name: functools.partial(self.lower_train_step, phase) for phase in self.phases
            },
            "evaluation": self.lower_eval_step,
            "prediction": self.lower_predict_step,
        }[step]()

    @property
    def programs(self) -> tuple[str, ...]:
        """Returns the names, for `lower`, of all that a training takes."""
        return (*(phase.name for phase in self.phases), "evaluation")

    @property
    def train_step(self) -> TrainStep:
        """Returns the pure function that takes a step on images of their whole size."""
        return self.phases[-1].step

    def phase_of(self, step: int) -> Phase:
        """Returns the phase of the step that follows `step` steps."""
        return [phase for phase in self.phases if phase.first_step <= step][-1]

    def batch_size(self, step: str) -> int:
        """Returns the images in one of `STEPS`, over all devices together."""
        return self.config.batch_size if is_training(step) else self.config.eval.batch_size

    def image_shape(self, step: str) -> tuple[int, int, int]:
        """Returns the height, width and channels of an image in one of the steps."""
        shapes = {phase.name: phase.image_shape for phase in self.phases}
        return shapes.get(step, self.dataset.image_shape)

    def arguments(self, step: str) -> dict[str, Any]:
        """Returns the abstract arguments of one of `STEPS` by name, with their shardings."""
        batch_size = self.batch_size(step)
        if is_training(step):
            key = jax.eval_shape(lambda: jax.random.key(0))
            key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(self.mesh))
            if self.resident:
                return {"state": self.state, "batch": self._resident_batch(), "key": key}
            shape = self.image_shape(step)
            if self.dataset.has_one_size:
                shape = self.dataset.image_shape
            batch = self._batch(batch_size, shape, index=jnp.int32, epoch=jnp.int32)
            return {"state": self.state, "batch": batch, "key": key}
        batch = self._batch(batch_size, self.dataset.image_shape, mask=jnp.float32)
        if step == "prediction":
            batch = {"image": batch["image"]}
        return {"state": self.state, "batch": batch}

    def conditions(self, step: str, lowered: jax.stages.Lowered) -> dict[str, str]:
        """Returns what a program of one of `STEPS` holds for, to keep beside it and compare."""
        return conditions(
            lowered,
            self.arguments(step),
            mesh=self.mesh,
            options=self.compiler.options,
            config=flatten_dict(self.config.as_dict(), sep="."),
        )

    def lower_train_step(self, phase: Phase | None = None) -> jax.stages.Lowered:
        """Returns the train step of a phase, by default the last, ready to compile.

        What it returns takes the place of the state it is given.
        """
        phase = phase or self.phases[-1]
        shardings = (jax.tree.map(lambda leaf: leaf.sharding, self.state), replicated(self.mesh))
        step = phase.step
        if self.resident:
            step = resident(step, steps_per_call=self.steps_per_call)
        step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
        return step.lower(*self.arguments(phase.name).values())

    def lower_eval_step(self) -> jax.stages.Lowered:
        """Returns the evaluation step, ready to compile."""
        step = jax.jit(self.eval_step, out_shardings=replicated(self.mesh))
        return step.lower(*self.arguments("evaluation").values())

    def lower_predict_step(self) -> jax.stages.Lowered:
        """Returns the prediction step, ready to compile."""
        step = jax.jit(self.predict_step, out_shardings=batch_sharding(self.mesh))
        return step.lower(*self.arguments("prediction").values())

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of the step that follows `step` steps."""
        with jax.transfer_guard("allow"):
            return float(jax.device_get(jax.jit(self.schedule)(step)))  # one program, not ten

    def epoch(self, step: int) -> float:
        """Returns how many epochs have passed after `step` steps."""
        return step * self.config.batch_size / self.train_examples

    @property
    def best_by(self) -> str:
        """Returns the metric by which a checkpoint is the best: of the averages, if there are."""
        return "test/accuracy_ema" if self.config.ema.decay else "test/accuracy"

    def evaluates_after(self, step: int) -> bool:
        """Returns whether the test split is evaluated when `step` steps are done."""
        every = self.config.eval.every_steps
        return step >= self.total_steps or self._is_due(step, every)

    def saves_after(self, step: int) -> bool:
        """Returns whether a checkpoint is written when `step` steps are done."""
        every = self.config.checkpoint.every_steps
        return self.evaluates_after(step) or (every > 0 and self._is_due(step, every))

    def stops_after(self, step: int) -> bool:
        """Returns whether anything is due when `step` steps are done: a report or one of these."""
        return step % self.config.log.every_steps == 0 or self.saves_after(step)

    def describe(self) -> str:
        """Returns the plan as lines that a person reads before the run."""
        config, data = self.config, self.dataset
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        arguments = ", ".join(f"{k}={v}" for k, v in config.model.arguments.items())
        height, width, channels = data.image_shape
        lines = {
            "model": f"{config.model.name}({arguments}): {parameters:,} parameters",
            "data": f"{data.name}: {self.train_examples:,} train and {self.test_examples:,} test "
            f"images, {height} x {width} x {channels}, {data.num_classes} classes",
            **_held_out(config),
            "feeding": self._feeding(),
            "devices": f"{describe_devices()}; mesh {describe_mesh(self.mesh)}",
            **_origin(config),
            "compiler": self.compiler.describe(),
            "precision": config.precision,
            **_choices_line(config),
            "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate} "
            f"({config.schedule.name}, {config.schedule.warmup_epochs:g} epochs of warm-up)",
            **_recipe(config),
            **self._sizes(),
            "steps": f"{self.total_steps:,} of {config.batch_size} images: "
            f"{config.num_epochs} epochs, seed {config.seed}",
        }
        return "\n".join(f"{name:<10} {text}" for name, text in lines.items())

    def _feeding(self) -> str:
        """Returns how training images come to the devices."""
        if not self.resident:
            data = self.config.data
            ahead = batches_ahead(num_threads=data.num_threads, prefetch=data.prefetch)
            threads = "1 thread" if data.num_threads == 1 else f"{data.num_threads} threads"
            return f"streamed, {ahead} batches ahead by {threads}"
        size = self.train_examples * math.prod(self.dataset.image_shape)
        calls = "1 step" if self.steps_per_call == 1 else f"up to {self.steps_per_call} steps"
        return f"resident, {size / 2**20:,.1f} MiB on each device; {calls} a call"

    def _sizes(self) -> dict[str, str]:
        """Returns the sides of the images and the steps at which they begin, if they grow."""
        if len(self.phases) == 1:
            return {}
        said = (f"{phase.image_shape[0]} from step {phase.first_step:,}" for phase in self.phases)
        return {"image size": ", ".join(said)}

    def tabulate(self) -> str:
        """Returns a table of the model's parts in order: output, receptive field and costs."""
        dtype = jnp.dtype(self.config.precision)
        return table(grouped(layers(self.model, self.dataset.image_shape, dtype=dtype), depth=1))

    def _weights(self) -> dict[str, Any]:
        """Returns the variables to start from, without the parts that stay random."""
        if not self.config.init_from:
            return {}
        from cnn_jax.weights import load_weights  # only here: it loads orbax

        statistics = jax.eval_shape(pool_statistics, self.state.batch_stats)
        like = {"params": self.state.params, "batch_stats": statistics}
        loaded = load_weights(self.config.init_from, like, ignore=self.config.init_ignore)
        wanted: Any = flatten_dict(like)
        leaves: Any = flatten_dict(loaded)
        return unflatten_dict(
            {
                path: leaf.astype(wanted[path].dtype)
                for path, leaf in leaves.items()
                if leaf is not wanted[path]
            }
        )

    def _is_due(self, step: int, every: int) -> bool:
        if every:
            return step > 0 and step % every == 0
        batch_size, examples = self.config.batch_size, self.train_examples
        epochs = ((step + 1) * batch_size - 1) // examples  # ended before the next step does
        return step > 0 and step == steps_at_epoch_end(
            epochs, num_examples=examples, batch_size=batch_size
        )

    def _resident_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns all the examples, a copy on each device, and which of them the steps take."""
        order: tuple[int, ...] = (self.config.batch_size,)
        divided, everywhere = batch_sharding(self.mesh), replicated(self.mesh)
        if self.steps_per_call > 1:
            order = (self.steps_per_call, *order)
            divided = NamedSharding(self.mesh, PartitionSpec(None, *divided.spec))
        images = (self.train_examples, *self.dataset.image_shape)
        arrays = {
            "images": (images, jnp.uint8, everywhere),
            "labels": (images[:1], jnp.int32, everywhere),
            "index": (order, jnp.int32, divided),
            "epoch": (order, jnp.int32, divided),
        }
        if self.steps_per_call > 1:
            arrays["count"] = ((), jnp.int32, everywhere)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype, sharding) in arrays.items()
        }

    def _batch(
        self, size: int, image_shape: tuple[int, int, int], **others: Any
    ) -> dict[str, jax.ShapeDtypeStruct]:
        sharding = batch_sharding(self.mesh)
        arrays = {
            "image": ((size, *image_shape), jnp.uint8),
            "label": ((size,), jnp.int32),
            **{name: ((size,), dtype) for name, dtype in others.items()},
        }
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype) in arrays.items()
        }


def is_training(step: str) -> bool:
    """Returns whether it is the step of a phase, of all that `Plan.lower` takes."""
    return step.partition("@")[0] == "train"


def phase_name(image_size: int) -> str:
    """Returns the name of the training step on images that are smaller than at the end."""
    return f"train@{image_size}"


def _held_out(config: Config) -> dict[str, str]:
    """Returns what is tested on where that is a part of the training split."""
    if not config.data.holdout:
        return {}
    test = config.data.parts()["test"]
    return {"tested on": f"{test['part'].name(test['split'])}, which is not trained on"}


def _origin(config: Config) -> dict[str, str]:
    """Returns where the weights at step 0 come from, if from anywhere."""
    if not config.init_from:
        return {}
    random = f", {', '.join(config.init_ignore)} at random" if config.init_ignore else ""
    return {"weights": f"start from {config.init_from}{random}"}


def choices(config: Config) -> dict[str, Any]:
    """Returns, by key, how the train step is taken where that is not the default."""
    values = {
        "accumulate_steps": (config.accumulate_steps, 1),
        "remat": (config.remat, "none"),
        "batch_norm.statistics": (config.batch_norm.statistics, "global"),
    }
    return {key: value for key, (value, default) in values.items() if value != default}


def _choices_line(config: Config) -> dict[str, str]:
    chosen = ", ".join(f"{key} {value}" for key, value in choices(config).items())
    return {"step": chosen} if chosen else {}


def _recipe(config: Config) -> dict[str, str]:
    """Returns what regularises the run, beside crops and flips, if anything."""
    augment = config.augment
    said = {
        "RandAugment": augment.random_operations,
        "colour jitter": any(
            (augment.brightness, augment.contrast, augment.saturation, augment.hue)
        ),
        "random erasing": augment.erase_probability,
        "mixup": augment.mixup_alpha,
        "cutmix": augment.cutmix_alpha,
        f"averaged weights (decay {config.ema.decay})": config.ema.decay,
    }
    names = [name for name, on in said.items() if on]
    return {"recipe": ", ".join(names)} if names else {}


def _own_device(mesh: Mesh) -> Any:
    """Returns a device of this process, or None: for another's it cannot compile what it tries."""
    devices = mesh.devices.flat
    return next((each for each in devices if each.process_index == jax.process_index()), None)


def _loss(config: Config) -> Loss:
    loss = config.loss
    if loss.name == "cross_entropy":
        return functools.partial(cross_entropy, label_smoothing=loss.label_smoothing)
    return functools.partial(
        binary_cross_entropy,
        label_smoothing=loss.label_smoothing,
        threshold=loss.threshold or None,
    )


def training_key(config: Config) -> jax.Array:
    """Returns the root of all randomness in the steps."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)


def augmentation(config: Config) -> Augment:
    """Returns what changes training images before they are normalised."""
    augment = config.augment
    return make_augment(
        crop_padding=augment.crop_padding,
        flip=augment.flip,
        alternate_flips=augment.alternate_flips,
        random_operations=augment.random_operations,
        magnitude=augment.magnitude,
        brightness=augment.brightness,
        contrast=augment.contrast,
        saturation=augment.saturation,
        hue=augment.hue,
    )


def normalization(config: Config, *, dtype: Any) -> Normalize:
    """Returns what makes of pixels the images that the model takes."""
    return functools.partial(normalize, mean=config.data.mean, std=config.data.std, dtype=dtype)


def mixing(config: Config, num_classes: int) -> Mix | None:
    """Returns what changes normalised images; None without, and labels stay labels."""
    augment = config.augment
    if not (augment.erase_probability or augment.mixup_alpha or augment.cutmix_alpha):
        return None
    return make_mix(
        num_classes=num_classes,
        erase_probability=augment.erase_probability,
        mixup_alpha=augment.mixup_alpha,
        cutmix_alpha=augment.cutmix_alpha,
    )


def source_options(config: Config) -> dict[str, Any]:
    """Returns where the images of a run come from and how they are cropped, for `open_source`."""
    data = config.data
    return {
        "data_dir": data.data_dir,
        "source_dir": data.source_dir,
        "memory_limit_mb": data.memory_limit_mb,
        "crops": Crops(
            image_size=data.image_size,
            seed=config.seed,
            min_area=data.crop_min_area,
            eval_fraction=data.eval_fraction,
        ),
    }


def open_part(
    config: Config,
    part: Mapping[str, Any],
    *,
    log: Callable[[str], None],
    stages: Stages | None = None,
) -> Source:
    """Returns a part of a run's data set, such as those of `DataConfig.parts`, as `open_source`.

    Damaged records are skipped where the configuration says so.
    """
    opened = open_without_bad_records if config.data.on_bad_record == "skip" else open_source
    return opened(config.data.name, log=log, stages=stages, **part, **source_options(config))


def decisive(config: Config) -> dict[str, Any]:
    """Returns the values, by key, that a program may depend on."""
    values: dict[str, Any] = flatten_dict(config.as_dict(), sep=".")
    return {key: value for key, value in values.items() if not key.startswith(OF_THE_HOST)}


def make_model(
    config: Config, dataset: DatasetInfo, *, batch_norm_group_size: int | None = None
) -> Any:
    """Returns the linen module that `config` describes, for the classes of its data set."""
    return create_model(
        config.model.name,
        num_classes=dataset.num_classes,
        dtype=jnp.dtype(config.precision),
        remat=config.remat,
        batch_norm_group_size=batch_norm_group_size,
        **config.model.arguments,
    )


def as_evaluated(model: Any, config: Config) -> Any:
    """Returns the model, or the mean over an image and its mirror image where `config` has that."""
    return FlipAveraged(model) if config.eval.average_flips else model


def make_plan(config: Config, *, devices: Sequence[Any] | None = None) -> Plan:
    """Returns the plan of the run that `config` describes.

    It is on this machine's devices, or on `devices`, which may be those of a described topology.
    """
    dataset = config.data.dataset()
    train_examples, test_examples = config.data.num_examples(dataset)
    total_steps = steps_at_epoch_end(
        config.num_epochs, num_examples=train_examples, batch_size=config.batch_size
    )

    def steps_of(epochs: float) -> int:
        return round(epochs * train_examples / config.batch_size)

    dtype = jnp.dtype(config.precision)
    mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, devices=devices)
    micro_batch = config.batch_size // config.accumulate_steps
    group_size = config.batch_norm.group_size(micro_batch, mesh.size)
    model = make_model(config, dataset, batch_norm_group_size=group_size)
    schedule = make_schedule(
        config.schedule.name,
        peak=config.optimizer.learning_rate,
        total_steps=total_steps,
        warmup_steps=steps_of(config.schedule.warmup_epochs),
        end_factor=config.schedule.end_factor,
        milestones=tuple(map(steps_of, config.schedule.milestones)),
        step_factor=config.schedule.step_factor,
    )
    optimizer = config.optimizer
    tx = make_optimizer(
        optimizer.name,
        schedule,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.clip_norm,
        clip_ratio=optimizer.clip_ratio,
    )
    prepare = normalization(config, dtype=dtype)
    frozen = None
    if config.train_only:
        variables = abstract_variables(config.model.name, config.model.arguments, dataset)
        frozen = train_only(config.train_only, variables["params"])
        tx = freeze_updates(tx, frozen)
    decay = config.ema.decay
    rows = mesh.size if group_size and micro_batch // mesh.size % group_size == 0 else 1

    def init(weights: Any) -> TrainState:
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        image = jnp.zeros((1, *dataset.image_shape), jnp.float32)
        state = init_state(model, tx, image, key, weights=weights, ema=decay > 0)
        if rows == 1:
            return state
        return state.map_statistics(lambda each: spread_statistics(each, rows, frozen=frozen))

    # JAX keeps this trace of `init` for `make_state`, unless weights come from a file.
    state = shard_state(mesh, jax.eval_shape(init, {}))
    if rows > 1:
        state = state.map_statistics(lambda each: shard_rows(mesh, each))
    shape = dataset.image_shape
    lies_there = config.data.residency == "device" or (
        config.data.residency == "auto"
        and dataset.has_one_size
        and fits(train_examples * math.prod(shape), mesh)
    )
    checked = config.faults.nan_check_every

    def step_on(side: int | None) -> TrainStep:
        augment = augmentation(config)
        return make_train_step(
            model,
            tx,
            loss=_loss(config),
            normalize=prepare,
            # Images of many sizes come in the size of the phase already.
            augment=resized_first(augment, side) if side and dataset.has_one_size else augment,
            mix=mixing(config, dataset.num_classes),
            average=moving_average(decay) if decay else lambda state: state,
            frozen=frozen,
            accumulate_steps=config.accumulate_steps,
        )

    phases = []
    first_step = 0
    growing = zip(config.data.progressive_sizes, config.data.progressive_epochs, strict=True)
    for side, epochs in growing:
        smaller = (side, side, shape[-1])
        phases.append(Phase(phase_name(side), first_step, smaller, step_on(side)))
        first_step = steps_of(epochs)
    phases.append(Phase("train", first_step, shape, step_on(None)))
    evaluated = as_evaluated(model, config)
    return Plan(
        config=config,
        dataset=dataset,
        train_examples=train_examples,
        test_examples=test_examples,
        total_steps=total_steps,
        model=model,
        tx=tx,
        schedule=schedule,
        mesh=mesh,
        compiler=compiler_settings(device=_own_device(mesh)),
        phases=tuple(phases),
        resident=lies_there,
        steps_per_call=steps_per_call(config.steps_per_call, mesh, at_most=checked // 2)
        if lies_there
        else 1,
        eval_step=make_eval_step(evaluated, normalize=prepare),
        predict_step=make_predict_step(evaluated, normalize=prepare),
        init=init,
        state=state,
    )
