"""Signals, and what is said of the machine."""

import os
import platform as host
import resource
import signal
import subprocess
import sys

import pytest

from cnn_jax.runtime import platform
from cnn_jax.runtime.platform import (
    Interrupted,
    StopSignals,
    advice_on_pages,
    describe_devices,
    versions,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_before_anything_is_to_be_saved_a_signal_stops_at_once(signum):
    with StopSignals(), pytest.raises(Interrupted, match=signum.name) as caught:
        send(signum)
    assert caught.value.signum == signum


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_deferred_signal_waits_for_check(signum):
    with StopSignals() as stop:
        stop.defer()
        stop.check()
        send(signum)
        with pytest.raises(Interrupted, match=signum.name):
            stop.check()


def test_the_second_ctrl_c_does_not_wait(capfd):
    with StopSignals() as stop:
        stop.defer()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert "saving after this step, then stopping" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_the_former_handlers_come_back():
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with StopSignals():
        assert all(
            signal.getsignal(signum) != handler
            for signum, handler in zip(SIGNALS, before, strict=True)
        )
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_versions_and_devices_are_named():
    found = versions()
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= found.keys()
    assert describe_devices() == f"8 x cpu (cpu), jax {found['jax']}"


def initialize_a_compiled_module(signum=None):
    """Turns whatever it meets into its own error, as such initialisers do."""
    try:
        if signum is not None:
            send(signum)
    except BaseException as error:
        raise ImportError("initialization failed") from error
    raise ImportError("no such thing")


def test_what_other_code_makes_of_an_interruption_is_one_all_the_same():
    with pytest.raises(Interrupted, match="SIGTERM") as caught, StopSignals():
        initialize_a_compiled_module(signal.SIGTERM)
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize("signum", [None, signal.SIGTERM])
def test_other_errors_stay_what_they_are(signum):
    """A signal that is kept for `check` has not caused them."""
    stop = StopSignals()
    stop.defer()
    with pytest.raises(ImportError, match="no such thing"), stop:
        initialize_a_compiled_module(signum)


@pytest.fixture
def offering(monkeypatch, tmp_path):
    """A machine that offers huge pages on request, with a glibc that can ask for them."""
    monkeypatch.setattr(platform, "OFFERED", tmp_path / "enabled")
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(host, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return tmp_path / "enabled"


def test_large_temporaries_are_better_off_with_huge_pages(offering, monkeypatch):
    advice = advice_on_pages(3 * 2**29)
    assert advice.startswith("GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the command would ")
    assert " 1,536 MiB of temporary memory" in advice
    assert advice_on_pages(2**24) == ""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert "GLIBC_TUNABLES=glibc.malloc.check=1:glibc.malloc.hugetlb=1 " in advice_on_pages(2**30)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert advice_on_pages(2**30) == ""


@pytest.mark.parametrize("library", [("glibc", "2.31"), ("", "")])
def test_no_advice_that_a_libc_does_not_know(offering, monkeypatch, library):
    monkeypatch.setattr(host, "libc_ver", lambda: library)
    assert advice_on_pages(2**30) == ""


def test_no_advice_where_the_kernel_decides_by_itself(offering):
    for offered in ("[always] madvise never", "always madvise [never]"):
        offering.write_text(offered)
        assert advice_on_pages(2**30) == ""
    offering.unlink()
    assert advice_on_pages(2**30) == ""


FILLED = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not advice_on_pages(2**30), reason="huge pages are not there on request")
def test_what_is_advised_saves_page_faults():
    plain, advised = (
        int(
            subprocess.run(
                [sys.executable, "-c", FILLED],
                env=os.environ | {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={each}"},
                capture_output=True,
                check=True,
            ).stdout
        )
        for each in (0, 1)
    )
    if plain < 3 * 2**26 / resource.getpagesize() / 2:
        pytest.skip("this kernel does not count the faults of small pages")
    assert advised < plain / 2
