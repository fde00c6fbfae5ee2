"""The estimate of a step's time, by hand."""

import pytest

from cnn_jax.runtime.hlo import Collective, Flops, Kernel, Traffic
from cnn_jax.runtime.roofline import Assumptions, Rates, estimate, kernel_seconds

RATES = Rates({"bf16": 1000.0, "f32": 100.0}, 10.0, 5.0, 0.25)
IDEAL = Assumptions(matrix_efficiency=1, memory_efficiency=1, link_efficiency=1)
HALF = Assumptions(matrix_efficiency=0.5, memory_efficiency=0.5, link_efficiency=0.5)


def kernel(*, flops=0, dtype="", read=0, written=0, times=1, collective=None):
    traffic = Traffic(read, written, on_chip=10**9, host=10**9)
    work = Flops(matrix=flops, elementwise=10**9, transcendental=10**9)
    return Kernel("k", "fusion", "", (), times, traffic, work, dtype, collective)


def gather(size, *, asynchronous):
    """Of two devices: each sends half of the bytes."""
    return kernel(collective=Collective("all-gather", 1, size, 2, asynchronous))


@pytest.mark.parametrize(
    ("one", "part", "seconds"),
    [
        (kernel(flops=3000, dtype="bf16", read=10), "compute", 3.0),
        (kernel(flops=3000, dtype="f32", read=10), "compute", 30.0),
        (kernel(flops=3000, dtype="f64", read=10), "compute", 30.0),
        (kernel(flops=3000, dtype="bf16", read=30, written=10), "memory", 4.0),
        (gather(20, asynchronous=False), "links", 2.0),
    ],
)
def test_a_kernel_takes_as_long_as_what_it_needs_most(one, part, seconds):
    result = estimate([one], RATES, images=1, assumptions=IDEAL)
    rest = dict.fromkeys(["compute", "memory", "links"], 0.0)
    assert result.seconds == {**rest, part: seconds, "launches": 0.25}
    assert result.bound == part
    assert result.step_seconds == seconds + 0.25
    assert max(kernel_seconds(one, RATES, IDEAL).values()) == seconds
    halved = estimate([one], RATES, images=1, assumptions=HALF)
    assert halved.seconds == {**rest, part: 2 * seconds, "launches": 0.25}


def test_kernels_run_one_after_the_other():
    kernels = [kernel(flops=3000, dtype="bf16", times=2), kernel(read=40, times=3)]
    result = estimate(kernels, RATES, images=24, devices=4, assumptions=IDEAL)
    assert result.seconds == {"compute": 6.0, "memory": 12.0, "links": 0.0, "launches": 1.25}
    assert result.images_per_second == 24 / 19.25
    assert result.images_per_second_per_device == 6 / 19.25
    assert result.bound == "memory"


@pytest.mark.parametrize(("size", "links"), [(10, 0.0), (45, 0.0), (60, 1.5), (100, 5.5)])
def test_asynchronous_collectives_hide_behind_kernels(size, links):
    kernels = [kernel(read=40), gather(size, asynchronous=True)]
    result = estimate(kernels, RATES, images=1, assumptions=IDEAL)
    assert result.seconds["links"] == links
    assert result.step_seconds == 4.5 + links


def test_many_small_kernels_are_bound_by_their_launches():
    assert estimate([kernel(read=1, times=9)], RATES, images=1).bound == "launches"


def test_memory_bound_training_follows_the_formula():
    """`images/s = 1 / (M / (e BW) + launches tau / B)` with M bytes an image."""
    rates = Rates({"bf16": 989e12}, 4.8e12, 450e9, 2e-6)
    images, per_image, launches = 256, 399_000_000, 1166
    one = kernel(read=per_image * images)
    rest = kernel(times=launches - 1)
    result = estimate([one, rest], rates, images=images)
    expected = 1 / (per_image / (0.88 * 4.8e12) + launches * 2e-6 / images)
    assert result.images_per_second == pytest.approx(expected)
    assert result.assumptions.memory_efficiency == 0.88


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: estimate([], RATES, images=1), "kernels is empty"),
        (lambda: estimate([kernel()], RATES, images=0), "images must be positive, got 0"),
        (
            lambda: estimate([kernel()], RATES, images=1, devices=0),
            "devices must be positive, got 0",
        ),
        (lambda: Rates({}, 1, 1, 0), "flops_per_second must name at least one dtype"),
        (lambda: Rates({"f32": 0}, 1, 1, 0), r"flops_per_second\['f32'\] must be positive, got 0"),
        (lambda: Rates({"f32": 1}, -1, 1, 0), "memory_bytes_per_second must be positive, got -1"),
        (lambda: Rates({"f32": 1}, 1, 0, 0), "link_bytes_per_second must be positive, got 0"),
        (lambda: Rates({"f32": 1}, 1, 1, -1), "seconds_per_launch must not be negative, got -1"),
        (lambda: Assumptions(matrix_efficiency=0), "matrix_efficiency must be above 0 and at most"),
        (lambda: Assumptions(memory_efficiency=1.1), "memory_efficiency .* got 1.1"),
    ],
)
def test_what_cannot_be_estimated(make, message):
    with pytest.raises(ValueError, match=message):
        make()
