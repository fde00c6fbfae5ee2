"""From a configuration to what is compiled."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cnn_jax import config
from cnn_jax.cli.config_files import load
from cnn_jax.config import override, parse
from cnn_jax.models import ModernCNN
from cnn_jax.plan import OF_THE_HOST, STEPS, decisive, make_plan
from cnn_jax.runtime import programs

pytestmark = pytest.mark.usefixtures("compile_quickly")

CONFIGS = Path(__file__).parents[1] / "configs"


def plan(*texts, devices=None):
    values = override(load(CONFIGS / "quickstart.py"), texts)
    number = len(devices or jax.devices())
    return make_plan(parse(values, num_devices=number), devices=devices)


def test_a_plan_trains_what_the_configuration_names():
    """And the optimiser keeps nothing for the rest."""
    made = plan(("train_only", "head,"))
    kept = [leaf.shape for leaf in jax.tree.leaves(made.state.opt_state)]
    assert sorted(kept) == [(), (10,), (96, 10)]
    assert len(jax.tree.leaves(plan().state.opt_state)) > 20


def test_averages_are_in_the_state_where_they_are_asked_for():
    assert plan().state.ema == {}
    made = plan(("ema.decay", "0.999"), ("eval.average_flips", "true"))
    assert jax.tree.map(lambda leaf: leaf.shape, made.state.ema["params"]) == (
        jax.tree.map(lambda leaf: leaf.shape, made.state.params)
    )
    assert made.best_by == "test/accuracy_ema"
    assert "recipe     averaged weights (decay 0.999)" in made.describe()
    assert made.lower("evaluation").as_text().count("stablehlo.convolution") == (
        2 * plan().lower("evaluation").as_text().count("stablehlo.convolution")
    )


def test_every_step_of_a_plan_lowers_for_the_devices_it_is_given():
    made = plan(("data.residency", "host"), devices=jax.devices()[:4])
    assert made.mesh.shape == {"data": 4, "fsdp": 1}
    for step in STEPS:
        lowered = made.lower(step)
        (images,) = {
            leaf.shape[0]
            for leaf in jax.tree.leaves(lowered.in_avals)
            if len(leaf.shape) == 4 and leaf.dtype == np.uint8
        }
        assert images == made.batch_size(step)


def test_growing_images_are_a_program_for_each_size():
    sizes = (("data.progressive_sizes", "(14,20)"), ("data.progressive_epochs", "(2,5)"))
    made = plan(*sizes)
    assert made.programs == ("train@14", "train@20", "train", "evaluation")
    # 10,000 images in batches of 64: 156.25 steps an epoch
    assert [made.phase_of(step).name for step in (0, 311, 312, 780, 781, 1874)] == [
        "train@14",
        "train@14",
        "train@20",
        "train@20",
        "train",
        "train",
    ]
    assert "image size 14 from step 0, 20 from step 312, 28 from step 781" in made.describe()
    lowered = made.lower("train@14").as_text()
    assert "tensor<64x14x14x1xf32>" in lowered
    assert "tensor<64x28x28x1xf32>" in made.lower("train").as_text()


def test_a_held_out_part_is_told():
    made = plan(("data.holdout", "10"))
    assert (made.train_examples, made.test_examples) == (9000, 1000)
    assert "9,000 train and 1,000 test images" in made.describe()
    assert "tested on  10 % of train, which is not trained on" in made.describe()


def test_what_is_predicted_has_a_probability_for_each_class():
    made = plan(("eval.batch_size", "16"))
    assert made.lower("prediction").out_info.shape == (16, 10)


OTHER_VALUES = {
    "checkpoint.every_steps": "7",
    "checkpoint.keep": "5",
    "data.data_dir": "elsewhere",
    "data.memory_limit_mb": "7",
    "data.num_threads": "5",
    "data.prefetch": "7",
    "data.source_dir": "elsewhere",
    "eval.every_steps": "7",
    "faults.max_skipped": "7",
    "faults.nan_check_every": "7",
    "faults.on_nan": "rollback",
    "log.every_steps": "7",
}


def test_no_program_depends_on_the_keys_of_the_host():
    """So the next start finds its programs although these have changed."""
    keys = flatten_dict(plan().config.as_dict(), sep=".")
    assert OTHER_VALUES.keys() == {key for key in keys if key.startswith(OF_THE_HOST)}
    small = (("model.width", "4"), ("model.stage_sizes", "1,"))
    one, other = plan(*small), plan(*small, *OTHER_VALUES.items())
    assert decisive(one.config) == decisive(other.config)
    assert [one.lower(step).as_text() for step in STEPS] == [
        other.lower(step).as_text() for step in STEPS
    ]
    assert jax.jit(one.init).lower({}).as_text() == jax.jit(other.init).lower({}).as_text()


def test_the_code_of_a_configuration_decides_too(monkeypatch):
    noted = []
    monkeypatch.setattr(programs, "note_config_file", noted.append)
    load(CONFIGS / "quickstart.py")
    assert noted == [(CONFIGS / name).read_bytes() for name in ("quickstart.py", "default.py")]


def test_every_other_key_decides():
    keys = flatten_dict(plan().config.as_dict(), sep=".")
    assert decisive(plan().config).keys() == keys.keys() - OTHER_VALUES.keys()


@pytest.mark.parametrize(
    "change",
    [
        ("seed", "1"),
        ("loss.label_smoothing", "0.2"),
        ("model.width", "8"),
        ("data.train_split", "train[:9000]"),
        ("mesh.fsdp", "2"),
    ],
)
def test_a_program_of_another_configuration_is_asked_for_by_another_name(change, monkeypatch):
    asked = []
    monkeypatch.setattr("cnn_jax.plan.kept", lambda name, make, **each: asked.append(each))
    for texts in ((), (), (change,)):
        plan(*texts).compile("train")
    assert asked[0] == asked[1]
    assert asked[0]["decided_by"] != asked[2]["decided_by"]


@pytest.mark.parametrize("texts", [(), (("train_only", "head,"),)])
def test_a_start_traces_the_first_variables_twice(texts, monkeypatch):
    """Once for all rules of the configuration, once for the plan and the state it makes."""
    traces = []
    stages = ModernCNN.stages

    def counted(self, images, *, train):
        traces.append(train)
        return stages(self, images, train=train)

    monkeypatch.setattr(ModernCNN, "stages", counted)
    config._abstract_variables.cache_clear()
    small = (("model.width", "4"), ("model.stage_sizes", "1,"))
    made = plan(*small, *texts, devices=jax.devices()[:1])
    made.make_state()
    assert traces == [False, False]
    plan(*small, *texts, devices=jax.devices()[:2])
    assert traces == [False, False, False], "of another topology, the rules trace nothing"
