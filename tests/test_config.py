"""The schema: every kind of mistake, all at once, and nothing but ConfigError for any input."""

import contextlib
import copy
import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import flax.linen as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.config import ADDED, Config, ConfigError, completed, differences, override, parse
from cnn_jax.data.datasets import NAMES
from cnn_jax.errors import UserError
from cnn_jax.models import MODELS
from cnn_jax.training.optim import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def load(name: str = "default") -> dict:
    return importlib.import_module(f"configs.{name}").get_config().to_dict()


@pytest.fixture(autouse=True)
def _configs_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


def changed(values: dict, changes: dict) -> dict:
    """Returns nested `values` with each dotted key set, or deleted where the value is `...`."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        if value is ...:
            del section[leaf]
        else:
            section[leaf] = value
    return values


def problems(changes: dict, *, num_devices: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(changed(load(), changes), num_devices=num_devices)
    return list(caught.value.problems)


MISTAKES = {
    "wrong type": ({"num_epochs": "ten"}, "num_epochs = 'ten': must be an integer >= 1"),
    "bool for int": ({"seed": True}, "seed = True: must be an integer >= 0 and < 2147483648"),
    "int for bool": ({"augment.flip": 1}, "augment.flip = 1: must be true or false"),
    "float for int": ({"batch_size": 128.0}, "batch_size = 128.0: must be an integer >= 1"),
    "number for text": ({"data.data_dir": 3}, "data.data_dir = 3: must be a text"),
    "number for list": ({"data.mean": 0.5}, "data.mean = 0.5: must be a list, each a number"),
    "list for number": (
        {"optimizer.eps": [1e-8]},
        "optimizer.eps = [1e-08]: must be a number > 0",
    ),
    "item out of range": (
        {"data.std": (0.0,)},
        "data.std = (0.0,): must be a list, each a number > 0",
    ),
    "not a number": (
        {"optimizer.weight_decay": float("nan")},
        "optimizer.weight_decay = nan: must be a number >= 0",
    ),
    "infinite": (
        {"optimizer.learning_rate": float("inf")},
        "optimizer.learning_rate = inf: must be a number > 0",
    ),
    "below": ({"log.every_steps": 0}, "log.every_steps = 0: must be an integer >= 1"),
    "sooner than a step ends": (
        {"faults.nan_check_every": 2},
        "faults.nan_check_every = 2: must be an integer >= 3",
    ),
    "unknown policy": (
        {"faults.on_nan": "roll_back"},
        "faults.on_nan = 'roll_back': must be one of 'stop', 'rollback' (did you mean 'rollback'?)",
    ),
    "above": (
        {"loss.label_smoothing": 1},
        "loss.label_smoothing = 1: must be a number >= 0 and < 1",
    ),
    "inclusive bound": (
        {"schedule.end_factor": 1.5},
        "schedule.end_factor = 1.5: must be a number >= 0 and <= 1",
    ),
    "mesh size": ({"mesh.data": 0}, "mesh.data = 0: must be an integer >= -1 and != 0"),
    "unknown precision": (
        {"precision": "float23"},
        "precision = 'float23': must be one of 'float32', 'bfloat16' (did you mean 'float32'?)",
    ),
    "unknown optimizer": (
        {"optimizer.name": "adamv"},
        f"optimizer.name = 'adamv': must be one of {', '.join(map(repr, OPTIMIZERS))}"
        " (did you mean 'adamw'?)",
    ),
    "unknown schedule": (
        {"schedule.name": "polynomial"},
        f"schedule.name = 'polynomial': must be one of {', '.join(map(repr, SCHEDULES))}",
    ),
    "unknown model": (
        {"model.name": "modern_cn"},
        f"model.name = 'modern_cn': must be one of {', '.join(map(repr, MODELS))}"
        " (did you mean 'modern_cnn'?)",
    ),
    "unknown data set": (
        {"data.name": "fashion_mnst"},
        f"data.name = 'fashion_mnst': must be one of {', '.join(map(repr, NAMES))}"
        " (did you mean 'fashion_mnist'?)",
    ),
    "training what is not there": (
        {"train_only": ("head", "haed")},
        "train_only: 'haed': names no parameter (did you mean 'head'?); "
        "the parts are head, stage1_block1, stage2_block1, stage3_block1, stem",
    ),
    "missing": ({"num_epochs": ...}, "num_epochs: missing; must be an integer >= 1"),
    "unknown in a section": (
        {"optimizer.momentm": 0.9},
        "optimizer.momentm: unknown key (did you mean 'momentum'?)",
    ),
    "unknown and like none": (
        {"checkpoint.zzz": 1},
        "checkpoint.zzz: unknown key; known: every_steps, keep",
    ),
    "unknown section": (
        {"optimzer": {"name": "sgd"}},
        "optimzer.name: unknown key (did you mean 'optimizer.name'?)",
    ),
    "in the wrong place": (
        {"learning_rate": 0.1},
        "learning_rate: unknown key (did you mean 'optimizer.learning_rate'?)",
    ),
    "value for a section": (
        {"checkpoint": 3},
        "checkpoint = 3: must be a section with the keys every_steps, keep",
    ),
    "unknown model argument": (
        {"model.widht": 8},
        "model.widht: unknown key (did you mean 'width'?)",
    ),
    "model argument of a wrong type": (
        {"model.width": "wide"},
        "model.width = 'wide': must be an integer",
    ),
    "model argument of a wrong item": (
        {"model.stage_sizes": [1, 2.5]},
        "model.stage_sizes = [1, 2.5]: must be a list, each an integer",
    ),
    "classes are the data set's": (
        {"model.num_classes": 10},
        "model.num_classes: not a choice of its own; data.name gives it",
    ),
    "dtype is precision's": (
        {"model.dtype": "float32"},
        "model.dtype: not a choice of its own; precision gives it",
    ),
    "batch larger than the split": (
        {"batch_size": 10_001},
        "batch_size = 10001: must be <= 10000, the images of the split 'train'",
    ),
    "batch larger than a slice": (
        {"data.train_split": "train[:100]"},
        "batch_size = 128: must be <= 100, the images of the split 'train[:100]'",
    ),
    "channels": (
        {"data.mean": (0.5, 0.5, 0.5)},
        "data.mean = (0.5, 0.5, 0.5): must have one number for each channel of an image, 1",
    ),
    "channels of std": (
        {"data.std": ()},
        "data.std = (): must have one number for each channel of an image, 1",
    ),
    "crop": (
        {"augment.crop_padding": 28},
        "augment.crop_padding = 28: must be < 28, the pixels of an image's side",
    ),
    "longer calls than checks": (
        {"steps_per_call": 11},
        "steps_per_call = 11: must be <= 10, half of faults.nan_check_every, as two calls may be "
        "under way",
    ),
    "calls of streamed images": (
        {"steps_per_call": 2, "data.residency": "host"},
        "steps_per_call = 2: only for a data set on the device; data.residency is 'host'",
    ),
    "nothing held out": (
        {"data.holdout": 0.001},
        "data.holdout = 0.001: 0 of 10000 images are held out; must be at least 1 and leave a "
        "batch of 128",
    ),
    "all held out": (
        {"data.holdout": 99.9},
        "data.holdout = 99.9: 9990 of 10000 images are held out; must be at least 1 and leave a "
        "batch of 128",
    ),
    "sizes without epochs": (
        {"data.progressive_sizes": (16, 20), "data.progressive_epochs": (3,)},
        "data.progressive_epochs = (3.0,): must have one number for each of "
        "data.progressive_sizes, 2",
    ),
    "epochs that fall": (
        {"data.progressive_sizes": (16, 20), "data.progressive_epochs": (6, 3)},
        "data.progressive_epochs = (6.0, 3.0): must rise between 0 and 10, num_epochs",
    ),
    "a size larger than at the end": (
        {"data.progressive_sizes": (32,), "data.progressive_epochs": (3,)},
        "data.progressive_sizes = (32,): each must be > 2, augment.crop_padding, and < 28, the "
        "side of the images at the end",
    ),
    "flips": (
        {"augment.alternate_flips": True},
        "augment.flip, augment.alternate_flips: only one of them can be true",
    ),
    "half the colour circle": (
        {"augment.hue": 0.6},
        "augment.hue = 0.6: must be a number >= 0 and <= 0.5",
    ),
    "magnitude": (
        {"augment.magnitude": 31},
        "augment.magnitude = 31: must be an integer >= 0 and <= 30",
    ),
    "two ways to clip": (
        {"optimizer.clip_norm": 1.0, "optimizer.clip_ratio": 0.01},
        "optimizer.clip_norm = 1.0, optimizer.clip_ratio = 0.01: "
        "only one of them can be other than 0",
    ),
    "unknown loss": (
        {"loss.name": "cross-entropy"},
        "loss.name = 'cross-entropy': must be one of 'cross_entropy', 'binary_cross_entropy'"
        " (did you mean 'cross_entropy'?)",
    ),
    "threshold of shares": (
        {"loss.threshold": 0.2},
        "loss.threshold = 0.2: only with loss.name = 'binary_cross_entropy'",
    ),
    "no steps": (
        {"schedule.name": "step"},
        "schedule.milestones = (): schedule.name = 'step' needs the epochs of its steps",
    ),
    "steps of another schedule": (
        {"schedule.milestones": (3,)},
        "schedule.milestones = (3.0,): only with schedule.name = 'step'",
    ),
    "steps out of order": (
        {"schedule.name": "step", "schedule.milestones": (5, 3)},
        "schedule.milestones = (5.0, 3.0): must rise between 1.0, schedule.warmup_epochs, "
        "and 10, num_epochs",
    ),
    "a step within the warm-up": (
        {"schedule.name": "step", "schedule.milestones": (1,)},
        "schedule.milestones = (1.0,): must rise between 1.0, schedule.warmup_epochs, "
        "and 10, num_epochs",
    ),
    "warm-up": (
        {"schedule.warmup_epochs": 10.5},
        "schedule.warmup_epochs = 10.5: must be <= 10, num_epochs",
    ),
}


@pytest.mark.parametrize(("changes", "line"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_reported(changes, line):
    assert problems(changes) == [line]


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"model.stem": "smal"}, "model: stem='smal': must be one of "),
        (
            {"model.stem": "large", "model.stage_sizes": (1, 1, 1, 1)},
            "model: images of shape (1, 28, 28, 1): must be ",
        ),
    ],
    ids=["unknown name", "image too small"],
)
def test_what_the_model_itself_refuses_is_reported(changes, start):
    (line,) = problems(changes)
    assert line.startswith(start)


class OwnModel(nn.Module):
    """A researcher's model, with what a config may set and what it may not."""

    num_classes: int
    rate: float = 0.5
    scale: int | None = None
    act: Any = None

    @nn.compact
    def __call__(self, images, *, train: bool):
        if self.act == "raise":
            raise TypeError("act is\nno function")
        return nn.Dense(self.num_classes)(images.mean((1, 2)))


def test_arguments_of_any_model_in_the_table(monkeypatch):
    monkeypatch.setitem(MODELS, "own", OwnModel)
    own = changed(load(), {"model": {"name": "own", "rate": 1, "scale": 3, "act": ["a", None]}})
    arguments = parse(own, num_devices=1).model.arguments
    assert repr(arguments) == "{'rate': 1.0, 'scale': 3, 'act': ('a', None)}"

    assert problems({"model": {"name": "own", "act": print}}) == [
        "model.act = <built-in function print>: must be a plain value"
    ]
    assert problems({"model": {"name": "own", "act": "raise"}}) == ["model: act is no function"]
    assert problems({"model": {"name": "own", "parent": 1}}) == [
        "model.parent: unknown key; known: name, rate, scale, act"
    ]


@pytest.mark.parametrize("split", ["train_split", "test_split"])
def test_unknown_split_is_reported(split):
    (line,) = problems({f"data.{split}": "trian"})
    assert line.startswith(f"data.{split} = 'trian': ")
    assert "(did you mean 'train'?)" in line


DEVICE_MISTAKES = {
    "micro-batches": (
        {"accumulate_steps": 3},
        "accumulate_steps = 3: must divide the 16 images that each of 8 devices has of a batch",
    ),
    "groups": (
        {"batch_norm.statistics": "group:48"},
        "batch_norm.statistics = 'group:48': N must divide the 128 images of a batch",
    ),
    "groups of micro-batches": (
        {"batch_norm.statistics": "group:32", "accumulate_steps": 8},
        "batch_norm.statistics = 'group:32': N must divide the 16 images of a micro-batch",
    ),
    "groups without a number": (
        {"batch_norm.statistics": "group:0"},
        "batch_norm.statistics = 'group:0': must be a text 'global', 'device' or 'group:N' with a "
        "number of images N >= 1",
    ),
    "statistics of no BatchNorm": (
        {"batch_norm.statistics": "device", "model.name": "convnext_mini"},
        "batch_norm.statistics = 'device': only for a model with BatchNorm; the norm of this one "
        "is 'layer'",
    ),
    "statistics as an argument of the model": (
        {"model.batch_norm_group_size": 2},
        "model.batch_norm_group_size: not a choice of its own; batch_norm.statistics gives it",
    ),
    "recomputation": (
        {"remat": "blocks"},
        "remat = 'blocks': must be one of 'none', 'block', 'stage' (did you mean 'block'?)",
    ),
    "batch": (
        {"batch_size": 100},
        "batch_size = 100: must be divisible by the number of devices, 8",
    ),
    "evaluation batch": (
        {"eval.batch_size": 1},
        "eval.batch_size = 1: must be divisible by the number of devices, 8",
    ),
    "product": (
        {"mesh.data": 2, "mesh.fsdp": 2},
        "mesh.data = 2, mesh.fsdp = 2: must multiply to the number of devices, 8",
    ),
    "data": (
        {"mesh.data": 3, "mesh.fsdp": -1},
        "mesh.data = 3: must divide the number of devices, 8",
    ),
    "fsdp": ({"mesh.fsdp": 16}, "mesh.fsdp = 16: must divide the number of devices, 8"),
    "both": (
        {"mesh.fsdp": -1},
        "mesh.data = -1, mesh.fsdp = -1: only one can be -1, all remaining devices",
    ),
}


@pytest.mark.parametrize(("changes", "line"), DEVICE_MISTAKES.values(), ids=DEVICE_MISTAKES)
def test_mistake_for_the_devices_is_reported(changes, line):
    assert problems(changes, num_devices=8) == [line]


@pytest.mark.parametrize(("data", "fsdp"), [(-1, 1), (-1, 4), (2, -1), (2, 4), (8, 1)])
def test_meshes_of_eight_devices(data, fsdp):
    config = parse(changed(load(), {"mesh.data": data, "mesh.fsdp": fsdp}), num_devices=8)
    assert (config.mesh.data, config.mesh.fsdp) == (data, fsdp)


def test_all_mistakes_are_reported_at_once():
    together = [
        MISTAKES["unknown in a section"],
        MISTAKES["unknown section"],
        MISTAKES["below"],
        MISTAKES["missing"],
        MISTAKES["unknown optimizer"],
        MISTAKES["model argument of a wrong type"],
        MISTAKES["channels"],
        MISTAKES["crop"],
    ]
    changes = {key: value for mistake, _ in together for key, value in mistake.items()}
    assert sorted(problems(changes)) == sorted(line for _, line in together)


def test_error_is_a_list_under_a_count():
    error = ConfigError(["a = 1: must be 2", "b: missing"])
    assert isinstance(error, UserError)
    assert str(error) == "2 mistakes in the configuration\n  a = 1: must be 2\n  b: missing"
    assert str(ConfigError(["c"])) == "1 mistake in the configuration\n  c"


def test_an_unknown_model_says_nothing_about_its_arguments():
    assert len(problems({"model.name": "other", "model.anything": 3})) == 1


def test_a_long_value_is_cut():
    (line,) = problems({"seed": "x" * 1000})
    assert len(line) < 150


def test_values_become_exactly_the_declared_types():
    config = parse(
        changed(
            load(),
            {"data.mean": [1], "schedule.warmup_epochs": 1, "model.stage_sizes": [1, 1]},
        ),
        num_devices=1,
    )
    assert repr(config.data.mean) == "(1.0,)"
    assert repr(config.schedule.warmup_epochs) == "1.0"
    assert config.model.arguments["stage_sizes"] == (1, 1)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "finetune"])
def test_every_config_file_parses_and_survives_json(name):
    config = parse(load(name), num_devices=8)
    stored = json.loads(json.dumps(config.as_dict()))
    assert stored == config.as_dict()
    assert parse(stored, num_devices=8) == config


def test_finetuning_asks_for_the_images():
    with pytest.raises(ConfigError, match=r"needs data\.source_dir, the path of the directory"):
        parse(load("finetune"), num_devices=8)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "default"])
def test_every_config_file_records_its_experiment(name):
    header = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    for entry in (
        f"python train.py --config configs/{name}.py",
        "\nHardware: ",
        "\nTime: ",
        "\nTest accuracy: ",
    ):
        assert entry in header


def test_default_has_the_keys_of_the_dataclasses():
    values = load()
    assert set(values) == {field.name for field in dataclasses.fields(Config)}
    for section, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind) and section != "model":
            fields = {field.name for field in dataclasses.fields(kind)}
            assert set(values[section]) == fields, section
    assert "name" in values["model"]


def test_every_key_of_default_has_a_comment():
    lines = (ROOT / "configs" / "default.py").read_text().splitlines()
    keys = [line for line in lines if re.match(r"    config\.[\w.]+ = (?!ConfigDict)", line)]
    assert len(keys) > 30
    assert [line for line in keys if not re.search(r"  # \w.{10,}", line)] == []


def test_differences_name_key_old_and_new():
    old = parse(load(), num_devices=1).as_dict()
    new = changed(
        old, {"optimizer.learning_rate": 0.2, "precision": "bfloat16", "model.norm": "group"}
    )
    assert differences(old, new) == [
        "precision: 'float32' in the run, 'bfloat16' now",
        "model.norm: not set in the run, 'group' now",
        "optimizer.learning_rate: 0.1 in the run, 0.2 now",
    ]
    assert differences(new, old)[-1] == "model.norm: 'group' in the run, not set now"
    assert differences(old, copy.deepcopy(old)) == []


TEXTS = [
    ("seed", "1_000", 1000),
    ("mesh.data", "-1", -1),
    ("batch_size", "1e3", 1000.0),
    ("optimizer.learning_rate", "1e-3", 0.001),
    ("optimizer.learning_rate", "1", 1),
    ("optimizer.learning_rate", "fast", "fast"),
    ("augment.flip", "true", True),
    ("augment.flip", "False", False),
    ("augment.flip", "1", True),
    ("augment.flip", "0", False),
    ("augment.flip", "yes", "yes"),
    ("data.mean", "(0.5,0.4,0.3)", (0.5, 0.4, 0.3)),
    ("data.mean", "0.5,0.4,0.3", (0.5, 0.4, 0.3)),
    ("data.mean", "0.5", (0.5,)),
    ("data.data_dir", "123", "123"),
    ("data.train_split", "train[:50%]", "train[:50%]"),
    ("model.name", "true", "true"),
    ("model.stage_sizes", "2,2", (2, 2)),
    ("model.width", "64", 64),
    ("model.stem", "small", "small"),
    ("unknown.key", "3", 3),
    ("seed.deeper", "3", 3),
]


@pytest.mark.parametrize(("key", "text", "value"), TEXTS)
def test_text_is_read_by_the_type_of_its_key(key, text, value):
    before = load()
    after = override(before, [(key, text)])
    for name in key.split("."):
        after = after[name]
    assert repr(after) == repr(value)
    assert before == load()


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**310, max_value=10**320)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from(["sgd", "train", "train[:10]", "train[", "modern_cnn", "small", "synthetic"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = [
    *(field.name for field in dataclasses.fields(Config)),
    "model.name",
    "model.width",
    "model.stem",
    "model.stage_sizes",
    "model.norm",
    "data.name",
    "data.train_split",
    "data.mean",
    "data.std",
    "augment.crop_padding",
    "optimizer.name",
    "optimizer.eps",
    "mesh.data",
    "mesh.fsdp",
    "eval.batch_size",
]


def parses_or_raises_config_error(values: dict) -> None:
    config = None
    with contextlib.suppress(ConfigError):
        config = parse(values, num_devices=2)
    if config is not None:
        assert parse(config.as_dict(), num_devices=2) == config


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8) | st.sampled_from(KEYS) | st.integers(), JUNK))
def test_junk_is_only_ever_a_config_error(values):
    parses_or_raises_config_error(values)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([key for key in KEYS if "." in key]), JUNK, max_size=3))
def test_junk_in_a_good_config_is_only_ever_a_config_error(changes):
    parses_or_raises_config_error(changed(load(), changes))


@settings(deadline=None)
@given(st.from_regex(r"\w+(\.\w+){0,2}", fullmatch=True) | st.sampled_from(KEYS), st.text())
def test_junk_on_the_command_line_is_only_ever_a_config_error(key, text):
    parses_or_raises_config_error(override(load(), [(key, text)]))


def test_a_run_from_before_a_key_did_what_the_key_now_says():
    today = parse(load("default"), num_devices=1).as_dict()
    older = changed(today, dict.fromkeys(ADDED, ...))
    assert differences(older, today)
    assert differences(completed(older), today) == []
    parse(completed(older), num_devices=1)
    other = changed(older, {"seed": 3})
    assert differences(completed(other), today) == ["seed: 3 in the run, 0 now"]
