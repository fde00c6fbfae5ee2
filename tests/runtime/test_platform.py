"""Signals, and what is said of the machine."""

import os
import signal

import pytest

from cnn_jax.runtime.platform import Interrupted, StopSignals, describe_devices, versions

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
