"""The table of accelerators against what their vendors print."""

import dataclasses

import pytest

from cnn_jax.runtime.accelerators import ACCELERATORS, GIB, gpu_target_config

GPUS = {name: entry for name, entry in ACCELERATORS.items() if entry.platform == "cuda"}
TPUS = {name: entry for name, entry in ACCELERATORS.items() if entry.platform == "tpu"}

SOLD_GIB = {  # a chip; NVIDIA's 141 GB and 180 GB are nearer to GiB than to 10**9 bytes
    "a100-40gb": 40,
    "a100-80gb": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "l4": 24,
    "t4": 16,
    "v3": 32,
    "v4": 32,
    "v5e": 16,
    "v5p": 96,
    "v6e": 32,
    "tpu7x": 192,
}
RIDGE = {  # bfloat16 operations a byte, of the rounded numbers on the vendors' pages
    "a100-40gb": 312 / 1.555,
    "a100-80gb": 312 / 2.039,
    "h100": 990 / 3.35,
    "h200": 990 / 4.8,
    "b200": 2250 / 7.7,
    "l4": 242 / 2 / 0.3,
    "t4": 8.1 / 0.32,
    "v3": 123 / 0.9,
    "v4": 275 / 1.2,
    "v5e": 197 / 0.819,
    "v5p": 459 / 2.765,
    "v6e": 918 / 1.64,
    "tpu7x": 2307 / 7.38,
}
LINKS_GB = {  # GB/s of a chip in both directions together, as it is advertised
    "a100-40gb": 600,
    "a100-80gb": 600,
    "h100": 900,
    "h200": 900,
    "b200": 1800,
    "l4": 64,
    "t4": 32,
    "v3": 4 * 2 * 70,
    "v4": 6 * 2 * 50,
    "v5e": 400,
    "v5p": 1200,
    "v6e": 800,
    "tpu7x": 1200,
}
FLOAT32_TFLOPS = {  # of the ordinary units, not the matrix units
    "a100-40gb": 19.5,
    "a100-80gb": 19.5,
    "h100": 66.9,
    "h200": 66.9,
    "b200": 75,
    "l4": 30.3,
    "t4": 8.1,
}


def devices_per_chip(entry):
    return entry.tpu.devices_per_chip if entry.tpu else 1


def test_the_oracles_cover_the_table():
    names = ACCELERATORS.keys() - {"cpu"}
    assert SOLD_GIB.keys() == RIDGE.keys() == LINKS_GB.keys() == names
    assert FLOAT32_TFLOPS.keys() == GPUS.keys()


@pytest.mark.parametrize("name", SOLD_GIB)
def test_every_entry_is_whole_and_cites_its_sources(name):
    entry = ACCELERATORS[name]
    missing = {key for key, value in dataclasses.asdict(entry).items() if value is None}
    assert missing == ({"tpu"} if name in GPUS else {"gpu", "float16_rate"})
    assert any("https://" in source for source in entry.sources)


def test_of_a_cpu_nothing_is_claimed():
    known = {key for key, value in dataclasses.asdict(ACCELERATORS["cpu"]).items() if value}
    assert known == {"kind", "platform"}


def test_no_two_entries_are_the_same_device():
    kinds = [entry.kind for entry in ACCELERATORS.values()]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize(("name", "sold"), SOLD_GIB.items())
def test_programs_can_have_nearly_all_the_memory_that_is_sold(name, sold):
    entry = ACCELERATORS[name]
    assert 0.9 < entry.memory * devices_per_chip(entry) / (sold * GIB) <= 1


@pytest.mark.parametrize(("name", "operations_a_byte"), RIDGE.items())
def test_ridge_points(name, operations_a_byte):
    entry = ACCELERATORS[name]
    ridge = entry.bfloat16_rate / entry.memory_bandwidth
    assert ridge == pytest.approx(operations_a_byte, rel=0.01)


@pytest.mark.parametrize(("name", "gigabytes"), LINKS_GB.items())
def test_links_of_a_chip(name, gigabytes):
    entry = ACCELERATORS[name]
    both_ways = 2 * entry.links * entry.link_bandwidth * devices_per_chip(entry)
    assert both_ways == pytest.approx(gigabytes * 1e9)


@pytest.mark.parametrize("name", TPUS)
def test_a_tpu_has_two_links_for_each_axis(name):
    assert ACCELERATORS[name].links == 2 * ACCELERATORS[name].tpu.axes


@pytest.mark.parametrize(("name", "tera"), FLOAT32_TFLOPS.items())
def test_clock_and_units_of_a_gpu_give_its_float32_rate(name, tera):
    gpu = ACCELERATORS[name].gpu
    rate = 2 * gpu.multiprocessors * gpu.fpus_per_multiprocessor * gpu.clock_ghz * 1e9
    assert rate == pytest.approx(tera * 1e12, rel=0.01)


@pytest.mark.parametrize("name", SOLD_GIB)
def test_float32_runs_at_half_rate_on_gpus_and_as_bfloat16_on_tpus(name):
    entry = ACCELERATORS[name]
    ratio = entry.float32_rate / entry.bfloat16_rate
    assert ratio == pytest.approx(0.5 if name in GPUS and name != "t4" else 1, rel=0.03)


@pytest.mark.parametrize("name", GPUS)
def test_limits_of_a_multiprocessor(name):
    gpu = ACCELERATORS[name].gpu
    assert gpu.threads_per_multiprocessor % 32 == 0
    # CUDA keeps 1 KiB for itself of every block's shared memory since Ampere.
    kept = 0 if gpu.compute_capability < (8, 0) else 1024
    assert gpu.shared_memory_per_block == gpu.shared_memory_per_multiprocessor - kept


def test_target_config_describes_the_card():
    text = gpu_target_config(ACCELERATORS["h200"])
    for line in (
        "core_count: 132",
        "memory_bandwidth: 4800000000000",
        "shared_memory_per_block_optin: 232448",
        "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }",
        'device_description_str: "NVIDIA H200"',
    ):
        assert line in text
    assert "ACCELERATED_FEATURES" not in gpu_target_config(ACCELERATORS["a100-80gb"])


def test_target_config_is_of_gpus_only():
    with pytest.raises(ValueError, match="TPU v4: must be a GPU"):
        gpu_target_config(ACCELERATORS["v4"])
