"""The table of weak scaling, against numbers worked out by hand."""

import pytest

from benchmarks import weak_scaling
from cnn_jax.runtime.topologies import parse_topology


def row(name, *, images, sent, seconds, rate):
    """A row whose estimate has the other parts and the time of the links, in seconds."""
    devices = parse_topology(name).num_devices
    return {
        "topology": name,
        "batch": images * devices,
        "devices": devices,
        "collectives": [{"count": 3, "sent_bytes": sent}],
        "estimate": {"seconds": {"compute": seconds[0], "links": seconds[1]}},
        "link_bytes_per_second": rate,
    }


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("v5e:2x2", 2 * 50e9),  # each chip is in a corner
        ("v5e:4x4", 2 * 50e9),  # no links around: no ring is faster than the corners
        ("v5e:8x8", 2 * 50e9),
        ("v5e:16x16", 4 * 50e9),  # around both axes, both ways
        ("h200:8", 18 * 25e9),
        ("h200:64", 8 * 50e9),  # eight network cards of 400 Gb/s, less than NVLink's 450 GB/s
    ],
)
def test_the_rate_is_that_of_the_links_that_a_collective_can_use(name, rate):
    assert weak_scaling.link_rate(parse_topology(name)) == rate


def test_a_line_of_the_table():
    """80 MB: 0.8 ms at 100 GB/s; estimated for 200 GB/s at 80 %: 0.5 ms, which become 1."""
    first = row("v5e:2x2", images=128, sent=60e6, seconds=(0.049, 60e6 / 80e9), rate=100e9)
    assert weak_scaling.step_seconds(first) == pytest.approx(0.04975)
    other = row("v5e:4x4", images=128, sent=80e6, seconds=(0.049, 0.0005), rate=200e9)
    assert weak_scaling.step_seconds(other) == pytest.approx(0.050)
    efficiency = 0.04975 / 0.050
    assert weak_scaling.line(other, first) == (
        f"| v5e:4x4 | 4 | 2,048 | 3 | 80.0 | 0.80 | 50.0 | 40,960 | 2,560 | {efficiency:.1%} |\n"
    )


def test_between_hosts_the_network_is_slower_than_the_links_of_the_estimate():
    """1 ms at 450 GB/s is 1.125 ms at 400."""
    found = row("h200:16", images=256, sent=1, seconds=(0.02, 0.001), rate=450e9)
    assert weak_scaling.step_seconds(found) == pytest.approx(0.021125)
