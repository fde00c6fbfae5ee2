"""Resident images give what streamed ones give, whatever the mesh and the length of a call."""

import contextlib
import dataclasses
import itertools
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg

from cnn_jax.cli.config_files import load
from cnn_jax.config import override, parse
from cnn_jax.data.datasets import DATASETS
from cnn_jax.data.sources import ImageSource, MemorySource, open_source
from cnn_jax.feeding import make_feeding
from cnn_jax.plan import make_plan, source_options
from cnn_jax.runtime.compiler import compile_program
from cnn_jax.runtime.residency import CPU_BYTES, fits, steps_per_call
from cnn_jax.runtime.sharding import make_mesh
from cnn_jax.training.resident import resident, rows_of
from cnn_jax.training.state import TrainState

CONFIG = Path(__file__).parents[1] / "configs/quickstart.py"
TINY = (
    ("model.width", "4"),
    ("model.stage_sizes", "(1,)"),
    ("batch_size", "16"),
    ("eval.batch_size", "16"),
    ("data.train_split", "train[:52]"),
    ("num_epochs", "3"),
    ("log.every_steps", "4"),
)
SHARDED = (
    ("mesh.fsdp", "2"),
    ("accumulate_steps", "2"),
    ("batch_norm.statistics", "device"),
)
MIXED = (("augment.mixup_alpha", "0.2"), ("ema.decay", "0.9"))


def plan(*texts, devices=1):
    values = override(load(CONFIG), (*TINY, *texts))
    return make_plan(parse(values, num_devices=devices), devices=jax.devices()[:devices])


def source():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(52, 28, 28, 1)).astype(np.uint8)
    labels = rng.integers(10, size=52, dtype=np.int32)
    return MemorySource(DATASETS["fashion_mnist_10k"], "train[:52]", images, labels)


def trained(made, calls):
    """The state and the metrics of each step, after calls of these lengths."""
    programs = {
        phase.name: compile_program(made.lower(phase.name), made.compiler.options)
        for phase in made.phases
    }
    state, key, rows, step = made.make_state(), made.make_key(), [], 0
    feeding = make_feeding(made, source())(0)
    for count in calls:
        program = programs[made.phase_of(step).name]
        state, sums = program(state, feeding.fetch(step, count), key)
        rows += rows_of(jax.device_get(sums), count)
        step += count
    feeding.close()
    return jax.device_get(state), rows


def assert_equal(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


@pytest.mark.parametrize(
    ("devices", "texts"),
    [
        (1, MIXED),
        pytest.param(8, (), marks=pytest.mark.slow),
        pytest.param(4, SHARDED, marks=pytest.mark.slow),
    ],
)
def test_resident_and_streamed_training_are_equal_bit_for_bit(devices, texts):
    """Over the ends of two epochs: 52 images in batches of 16."""
    streamed = trained(plan(("data.residency", "host"), *texts, devices=devices), [1] * 7)
    found = trained(plan(("data.residency", "device"), *texts, devices=devices), [1] * 7)
    assert_equal(found, streamed, rtol=0, atol=0)


def test_calls_of_many_steps_do_not_depend_on_where_they_are_cut():
    """And are equal to single steps but for rounding, since XLA makes another program of them."""
    made = plan(("steps_per_call", "3"), ("optimizer.learning_rate", "0.01"), devices=2)
    whole, cut = trained(made, [3, 3, 1]), trained(made, [1, 2, 1, 3])
    assert_equal(cut, whole, rtol=0, atol=0)
    streamed = trained(
        plan(("data.residency", "host"), ("optimizer.learning_rate", "0.01"), devices=2), [1] * 7
    )
    assert_equal(whole, streamed, rtol=2e-4, atol=2e-5)
    assert [row["count"] for row in whole[1]] == [16] * 7


def test_gathering_sends_nothing_between_devices():
    def collectives(*texts):
        text = plan(*texts, devices=4).lower("train").compile().as_text()
        return sorted(
            kind
            for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
            for _ in range(text.count(f" {kind}("))
        )

    assert collectives(("data.residency", "device")) == collectives(("data.residency", "host"))


def test_images_of_many_sizes_are_decoded_to_the_size_of_the_phase(tmp_path):
    rng = np.random.default_rng(0)
    for split, name, number in itertools.product(("train", "val"), ("cat", "dog"), range(8)):
        path = tmp_path / "images" / split / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            simplejpeg.encode_jpeg(rng.integers(255, size=(50, 60, 3), dtype=np.uint8))
        )
    texts = {
        "data.name": "folder",
        "data.source_dir": str(tmp_path / "images"),
        "data.data_dir": str(tmp_path),
        "data.train_split": "train",
        "data.test_split": "val",
        "data.image_size": "32",
        "data.mean": "0.5,0.5,0.5",
        "data.std": "0.5,0.5,0.5",
        "data.progressive_sizes": "16,24",
        "data.progressive_epochs": "1,2",
    }
    made = plan(*texts.items())
    opened = open_source("folder", "train", **source_options(made.config))
    assert isinstance(opened, ImageSource)
    assert not made.resident
    for start in (0, 1):
        with contextlib.closing(make_feeding(made, opened)(start)) as feeding:
            for step in range(start, 3):
                batch, side = feeding.fetch(step, 1), (16, 24, 32)[step]
                assert batch["image"].shape == (16, side, side, 3)
                index, epoch = np.asarray(batch["index"]), np.asarray(batch["epoch"])
                expected = opened.resized(side).batch(index, epoch)["image"]
                np.testing.assert_array_equal(batch["image"], expected)
                abstract = made.arguments(made.phase_of(step).name)["batch"]["image"]
                assert abstract.shape == batch["image"].shape


def test_a_call_takes_as_many_steps_as_it_is_told():
    """A step that adds up what it is given, against NumPy."""

    def step(state, batch, key):
        del key
        total = jnp.sum(batch["image"].astype(jnp.float32)) + batch["label"][0]
        sums = {"count": jnp.float32(len(batch["label"])), "total": total}
        return dataclasses.replace(state, step=2 * state.step + total), sums

    images = np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1)
    labels = np.array([5, 4, 3, 2, 1, 0], np.int32)
    index = np.array([[0, 5], [3, 3], [1, 2]], np.int32)
    batch = {"images": images, "labels": labels, "index": index, "epoch": np.zeros_like(index)}
    totals = [float(images[i].sum() + labels[i[0]]) for i in index]
    for count in range(4):
        state, sums = jax.jit(resident(step, steps_per_call=3))(
            TrainState(step=jnp.float32(1), params={}, batch_stats={}, opt_state={}),
            {**batch, "count": np.int32(count)},
            jax.random.key(0),
        )
        expected = 1.0
        for total in totals[:count]:
            expected = expected * 2 + total
        assert float(state.step) == expected
        assert np.asarray(sums["total"]).tolist() == totals[:count] + [0.0] * (3 - count)


@pytest.mark.parametrize(("devices", "number", "fitting"), [(1, 1, True), (1, 2, False), (8, 1, 0)])
def test_on_cpus_all_copies_together_are_bounded(devices, number, fitting):
    mesh = make_mesh(devices=jax.devices()[:devices])
    assert fits(number * CPU_BYTES, mesh) == bool(fitting)
    assert fits(CPU_BYTES // 8, mesh)


@pytest.mark.parametrize(
    ("platform", "asked", "at_most", "expected"),
    [("cpu", 0, 10, 1), ("gpu", 0, 10, 1), ("tpu", 0, 10, 10), ("tpu", 0, 4, 4), ("gpu", 7, 10, 7)],
)
def test_the_steps_of_a_call_by_platform(platform, asked, at_most, expected):
    devices = np.array([types.SimpleNamespace(platform=platform)])
    mesh = types.SimpleNamespace(devices=devices)
    assert steps_per_call(asked, mesh, at_most=at_most) == expected


def test_the_plan_says_how_images_come():
    assert "feeding    resident, 0.0 MiB on each device; 1 step a call" in plan().describe()
    assert "up to 5 steps a call" in plan(("steps_per_call", "5")).describe()
    streamed = plan(("data.residency", "host")).describe()
    assert "feeding    streamed, 4 batches ahead by 2 threads" in streamed
    least = (("data.residency", "host"), ("data.num_threads", "1"), ("data.prefetch", "1"))
    assert "feeding    streamed, 2 batches ahead by 1 thread\n" in plan(*least).describe()


def test_streamed_batches_are_made_before_they_are_asked_for(monkeypatch):
    """While the programs are compiled."""
    asked = threading.Event()
    batch_of = MemorySource.batch

    def batch(self, *arguments):
        asked.set()
        return batch_of(self, *arguments)

    monkeypatch.setattr(MemorySource, "batch", batch)
    with contextlib.closing(make_feeding(plan(("data.residency", "host")), source())(0)):
        assert asked.wait(30)
