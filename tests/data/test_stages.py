"""What the stages of the data take, and which is named."""

import time

import numpy as np
import pytest

from cnn_jax.data import stages as module
from cnn_jax.data.pipeline import train_batches
from cnn_jax.data.sources import open_source
from cnn_jax.data.stages import (
    BATCHING,
    COPYING,
    DECODING,
    HOST,
    READING,
    STEP,
    Stages,
    limit,
    slowest,
)


def test_seconds_of_a_batch_are_without_those_of_its_parts(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    stages = Stages()
    for _ in range(2):
        with stages.measure(BATCHING):
            for stage, seconds in ((READING, 1.0), (DECODING, 5.0)):
                with stages.measure(stage):
                    now += seconds
            now += 0.5
    assert stages.seconds() == {READING: 2.0, DECODING: 10.0, BATCHING: 1.0}
    stages.clear()
    assert stages.seconds() == {}


def test_the_slowest_stage_is_by_the_threads_that_share_it():
    seconds = {READING: 1.0, DECODING: 9.0, COPYING: 4.0}
    assert slowest(seconds, num_threads=2) == DECODING
    assert slowest(seconds, num_threads=4) == COPYING


def test_the_step_limits_unless_the_device_waits():
    seconds = {DECODING: 90.0, COPYING: 1.0}
    assert limit(seconds, waiting=4.9, training=100.0, num_threads=2) == STEP
    assert limit(seconds, waiting=5.1, training=100.0, num_threads=2) == DECODING
    assert limit({}, waiting=4.9, training=100.0, num_threads=2) == STEP
    assert limit({}, waiting=5.1, training=100.0, num_threads=2) == HOST
    assert limit({}, waiting=0.0, training=0.0, num_threads=2) == STEP


@pytest.fixture
def folder(tmp_path):
    simplejpeg = pytest.importorskip("simplejpeg")
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((40, 50, 3), 20 * number, np.uint8)
            path = tmp_path / "train" / name / f"{number}.jpg"
            path.write_bytes(simplejpeg.encode_jpeg(pixels))
    return tmp_path


def test_a_slow_decoder_is_found(folder, monkeypatch):
    from cnn_jax.data import images

    decode = images._decode

    def slow(*arguments, **keywords):
        time.sleep(0.05)
        return decode(*arguments, **keywords)

    monkeypatch.setattr(images, "_decode", slow)
    stages = Stages()
    source = open_source("folder", "train", source_dir=str(folder), stages=stages)
    for _ in train_batches(
        source, batch_size=4, seed=0, start_step=0, stop_step=3, num_threads=2, stages=stages
    ):
        pass
    seconds = stages.seconds()
    assert seconds.keys() == {READING, DECODING, BATCHING}
    assert seconds[DECODING] >= 12 * 0.05
    assert slowest(seconds, num_threads=2) == DECODING


def test_records_on_disk_are_read_and_decoded(prepared_dir):
    stages = Stages()
    options = {"data_dir": str(prepared_dir), "stages": stages}
    in_memory = open_source("fashion_mnist_10k", "test[:64]", **options)
    in_memory.batch(np.arange(64))
    assert stages.seconds() == {}
    on_disk = open_source("fashion_mnist_10k", "test[:64]", memory_limit_mb=0, **options)
    on_disk.batch(np.arange(64))
    assert stages.seconds().keys() == {READING, DECODING}
