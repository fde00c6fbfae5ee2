"""Many processes of one run: how they join, agree, stop together, and end when one is gone.

A run of one process never joins, and everything here then answers for it at once. Joined processes
speak through the key-value store of JAX's coordination service, which needs no device: an agreement
never waits for a step, and may be made by any thread.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src import cloud_tpu_init, clusters
from jax._src import distributed as jax_distributed

from cnn_jax.errors import UsageError, UserError
from cnn_jax.runtime.platform import RESTART, Interrupted, StopSignals

CONFIG: Any = jax.config  # a type checker does not know its attributes

FLAGS = ("--coordinator", "--num-processes", "--process-id")

PERIOD = 1.0
"""Seconds between two signs of life of a process."""

PEER_TIMEOUT = 60
"""Seconds without a sign of life after which a process is taken to be gone."""

JOIN_TIMEOUT = 300
"""Seconds after the start of a process in which all must have joined."""

FOR_EVER = 7 * 24 * 3600 * 1000
"""Milliseconds: a wait for another process ends with it, see `_Peers`, and not by itself."""


AGAIN = "All processes end; start all of them again, and they go on from the last checkpoint"


@dataclasses.dataclass(frozen=True)
class Launcher:
    """The environment variables by which a launcher tells each process its place."""

    name: str
    mark: str
    count: str
    index: str


LAUNCHERS = (
    Launcher("Slurm", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
    Launcher("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)

ADDRESSES = ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri")
"""What JAX derives the address of process 0 from; Open MPI 5 no longer sets its variable."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Gives a step that fails inside time to be explained: the watch says which process is gone.

    It ends this one too, so that the error of a collective is seen only where all are alive.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:
        if _peers is not None:
            time.sleep(_peers.timeout + 3 * PERIOD)
        raise


class _Peers:
    """This process's tie to the others of the run.

    A thread gives a sign of life every `PERIOD`; process 0 reads all of them, and the first that
    stays away for longer than `timeout` ends the run: a notice in the store that every process
    reads, prints and obeys. JAX's own heartbeat stands behind it, with a longer patience.
    """

    def __init__(self, client: Any, index: int, count: int, timeout: float) -> None:
        self.client = client
        self.index = index
        self.count = count
        self.stop_asked: int | None = None
        self.on_stop: Callable[[], None] | None = None
        self.stops_together = False
        self.timeout = timeout
        self._names: Counter[str] = Counter()
        self._leaving = threading.Event()
        self._hearing = threading.Lock()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def unique(self, name: str) -> str:
        """Returns the key of the next use of `name`, the same in all processes."""
        self._names[name] += 1
        return f"cnn_jax/{name}/{self._names[name]}"

    def publish(self, key: str, value: Any) -> None:
        self.client.key_value_set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """Returns a value when it has been published."""
        return json.loads(self.client.blocking_key_value_get(key, FOR_EVER))

    def gather(self, key: str) -> list[Any]:
        """Returns what the processes have published under `key`, in their order."""
        return [self.read(f"{key}/{index}") for index in range(self.count)]

    @explained()
    def ask_to_stop(self, signum: int) -> None:
        """Tells all processes to stop; the signal of the first that asks holds."""
        self._give_notice("stop", signum)
        self._hear_stop(self.read("cnn_jax/notice/stop"))

    def _give_notice(self, name: str, value: Any) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first notice of a name holds
            self.publish(f"cnn_jax/notice/{name}", value)

    def _hear_stop(self, signum: int) -> None:
        with self._hearing:
            heard, self.on_stop = self.on_stop, None
            self.stop_asked = signum
        if heard:
            threading.Thread(target=heard, name="stop", daemon=True).start()

    def end_all(self, code: int, text: str) -> None:
        """Makes every other process print the text and end with the exit code."""
        self._leaving.set()
        self._give_notice("end", [code, text])
        self._let_others_end()

    @explained()
    def leave(self) -> None:
        """Parts from the others, when all of them do; the service ends with the last."""
        self.client.wait_at_barrier("cnn_jax/leaving", FOR_EVER)
        self._leaving.set()
        jax.distributed.shutdown()

    def _let_others_end(self) -> None:
        """Keeps process 0 until the others have ended: without it JAX aborts them mid-sentence."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.publish(f"cnn_jax/ended/{self.index}", True)
            deadline = time.monotonic() + 4 * PERIOD
            while self.index == 0 and time.monotonic() < deadline:
                if len(self.client.key_value_dir_get("cnn_jax/ended/")) >= self.count:
                    break
                time.sleep(PERIOD / 10)

    def _watch(self) -> None:
        joined = time.monotonic()
        signs: dict[str, tuple[str, float]] = {}
        numbers = itertools.count()
        while not self._leaving.wait(PERIOD):
            try:
                number = str(next(numbers))
                self.client.key_value_set(
                    f"cnn_jax/alive/{self.index}", number, allow_overwrite=True
                )
                if self.index == 0:
                    self._look_for_the_silent(joined, signs)
                notices = dict(self.client.key_value_dir_get("cnn_jax/notice/"))
            except jax.errors.JaxRuntimeError as error:
                if not self._leaving.is_set():
                    reason = str(error).partition("\n")[0]
                    self._end(RESTART, f"process 0 of {self.count} is gone ({reason}). {AGAIN}")
                return
            if "cnn_jax/notice/stop" in notices:
                self._hear_stop(json.loads(notices["cnn_jax/notice/stop"]))
            if "cnn_jax/notice/end" in notices:
                self._end(*json.loads(notices["cnn_jax/notice/end"]))

    def _look_for_the_silent(self, joined: float, signs: dict[str, tuple[str, float]]) -> None:
        now = time.monotonic()
        for key, sign in self.client.key_value_dir_get("cnn_jax/alive/"):
            if signs.get(key, ("", 0.0))[0] != sign:
                signs[key] = sign, now
        for index in range(1, self.count):
            _, last = signs.get(f"cnn_jax/alive/{index}", ("", joined))
            if now - last > self.timeout:
                text = (
                    f"process {index} of {self.count} is gone: no sign of life for "
                    f"{self.timeout:g} s. {AGAIN}"
                )
                self._give_notice("end", [RESTART, text])
                return

    def _end(self, code: int, text: str) -> None:
        print(f"{text}\n", end="", file=sys.stderr, flush=True)
        self._let_others_end()
        os._exit(code)


_peers: _Peers | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run; JAX's cluster detection finds what is None."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    detected: bool


IN_CLOUD_TPU = Place(None, None, None, detected=True)
"""Of a machine whose environment, or Google's metadata server, knows the others of its slice."""


def find_place(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """Returns the place of this process; None if it is alone, or told to be (`num_processes` 1).

    What is not given comes from Slurm, Open MPI or Cloud TPU. Raises UsageError where something is
    missing or wrong. Nothing is waited for, and no network is asked.
    """
    if num_processes == 1:
        return None
    launcher = next((each for each in LAUNCHERS if each.mark in os.environ), None)
    if launcher and num_processes is None and process_id is None:
        num_processes = int(os.environ[launcher.count])
        process_id = int(os.environ[launcher.index])
        if num_processes == 1 and coordinator is None:
            return None
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    values = (coordinator, num_processes, process_id)
    missing = [flag for flag, value in zip(FLAGS, values, strict=True) if value is None]
    if len(missing) == len(FLAGS):
        on_tpu = cloud_tpu_init.running_in_cloud_tpu_vm
        return IN_CLOUD_TPU if on_tpu else None
    has_address = any(variable in os.environ for variable in ADDRESSES)
    if missing and not (launcher and has_address and missing == ["--coordinator"]):
        told = f"{launcher.name} does not say where process 0 is. " if launcher else ""
        raise UsageError(
            f"{' and '.join(missing)}: missing. {told}Several processes need "
            f"{FLAGS[0]}=HOST:PORT of process 0, {FLAGS[1]} and {FLAGS[2]}; one alone needs none"
        )
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UsageError(f"{FLAGS[0]} {coordinator}: must be HOST:PORT of process 0")
    if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise UsageError(
            f"{FLAGS[2]} {process_id}: must be from 0 to one below {FLAGS[1]}, {num_processes}"
        )
    return Place(coordinator, num_processes, process_id, detected=launcher is not None)


def join(
    place: Place | None, *, timeout: float = JOIN_TIMEOUT, peer_timeout: float = PEER_TIMEOUT
) -> None:
    """Joins the processes of this run, before JAX touches a device.

    Where not all of them come within `timeout` seconds, this one says so and ends with the exit
    code `RESTART`. A Cloud TPU machine that is in no cluster stays alone.

    Raises UserError where this one cannot join.
    """
    global _peers
    if place is None:
        return
    # JAX would take SIGTERM for itself; `StopTogether` does what it does, for SIGINT too.
    CONFIG.update("jax_enable_preemption_service", False)
    state = jax_distributed.global_state
    # JAX's own patience ends with a stack trace in C++, and it does not say who is missing.
    impatience = threading.Timer(timeout, _give_up, [place, timeout])
    impatience.daemon = True
    impatience.start()
    try:
        if place == IN_CLOUD_TPU and not _in_cluster():
            return
        jax.distributed.initialize(
            coordinator_address=place.coordinator,
            num_processes=place.num_processes,
            process_id=place.process_id,
            cluster_detection_method=None if place.detected else "deactivate",
            initialization_timeout=int(timeout + 60),
            heartbeat_timeout_seconds=int(2 * peer_timeout + 10),
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        who, where = "this process", ""
        if place.process_id is not None:
            who = f"process {place.process_id} of {place.num_processes}"
        if address := state.coordinator_address or place.coordinator:
            where = f" at {address}"
        raise UserError(
            f"{who} cannot join the others{where}: {reason}. All processes must start within "
            f"{timeout:g} s, each with its own number, and reach the address of process 0"
        ) from error
    finally:
        impatience.cancel()
    if state.num_processes > 1:
        _peers = _Peers(state.client, state.process_id, state.num_processes, peer_timeout)


def _in_cluster() -> bool:
    """Returns whether JAX finds the cluster of this machine; it may ask a metadata server."""
    kinds: list[Any] = clusters.ClusterEnv._cluster_types
    return any(each.is_env_present() for each in kinds if not each.opt_in_only_method)


def _give_up(place: Place, timeout: float) -> None:
    state = jax_distributed.global_state
    index, count = state.process_id, state.num_processes
    if place.process_id is not None and place.num_processes is not None:
        index, count = place.process_id, place.num_processes
    address = state.coordinator_address or place.coordinator
    print(
        f"process {index} of {count} is at {address}, but not all {count} have come within "
        f"{timeout:g} s (--join-timeout). Those that are there say this, each on its own standard "
        "error; JAX does not say which are missing. Each must have been started, have a number of "
        "its own, and reach that address, which is process 0's. Start all of them again",
        file=sys.stderr,
        flush=True,
    )
    os._exit(RESTART)


def leave(code: int, why: str = "") -> None:
    """Ends the tie to the other processes, which end too where this one has failed."""
    global _peers
    if _peers is None:
        return
    try:
        if code == 0 or _peers.stops_together:
            _peers.leave()
        else:
            reason = f": {why}" if why else f" with exit code {code}"
            _peers.end_all(code, f"process {_peers.index} of {_peers.count} has ended{reason}")
    finally:
        _peers = None


def is_first() -> bool:
    """Returns whether this process writes and speaks for all."""
    return _peers is None or _peers.index == 0


def is_alone() -> bool:
    """Returns whether this process is the only one of its run."""
    return _peers is None


def who() -> str:
    """Returns `process 1 of 2: `, to put before an error; nothing for a process that is alone."""
    return "" if _peers is None else f"process {_peers.index} of {_peers.count}: "


@explained()
def together(name: str, value: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """Returns what process 0 decides from the JSON values of all processes, in their order.

    All processes call it in the same order for one `name`.
    """
    if _peers is None:
        return decide([value])
    key = _peers.unique(name)
    _peers.publish(f"{key}/{_peers.index}", value)
    if _peers.index == 0:
        _peers.publish(f"{key}/decided", decide(_peers.gather(key)))
    return _peers.read(f"{key}/decided")


def from_first(name: str, make: Callable[[], Any]) -> Any:
    """Returns the JSON value that process 0 makes, in all processes."""
    return together(name, make() if is_first() else None, lambda values: values[0])


def any_of(name: str, value: bool) -> bool:
    """Returns whether the value is true in any process."""
    return together(name, value, any)


def is_shared(directory: str) -> bool:
    """Returns whether all processes find in their `directory`, or URL, what process 0 has there."""
    mark = from_first("a mark to see", lambda: _mark(directory))
    if "://" in directory:
        return not any_of("another place", mark != directory)
    path = os.path.join(directory, mark)
    seen = bool(directory and mark) and os.path.exists(path)
    shared = not any_of("another place", not seen)
    if is_first() and mark:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return shared


def _mark(directory: str) -> str:
    """Returns the name of a new file there, the URL that it is, or "" where none can be."""
    if not directory or "://" in directory:
        return directory
    name = f".mark-{secrets.token_hex(8)}"
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, name).touch()
    except OSError:
        return ""
    return name


def agree(what: str, facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raises UserError, in all processes, where one has other facts than process 0 has.

    A process that is alone is not asked for them.
    """
    if _peers is None:
        return
    lines = together(what, dict(facts()), _differences)
    if lines:
        raise UserError(f"the processes of this run differ in {what}:\n  " + "\n  ".join(lines))


def _differences(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each fact in which a process differs from process 0."""
    first = values[0]
    return [
        f"{name}: {_shown(first, name)} in process 0, {_shown(other, name)} in process {index}"
        for index, other in enumerate(values)
        for name in {**first, **other}
        if first.get(name) != other.get(name)
    ]


def _shown(facts: Mapping[str, Any], name: str) -> str:
    return repr(facts[name]) if name in facts else "not set"


def source_digest() -> str:
    """Returns the SHA-256 of the package's own source."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class StopTogether(StopSignals):
    """`StopSignals` for a process among others: a signal to one stops all, at the same `check`.

    All processes make the same calls of `check`. When one is asked to stop, a thread in each tells
    the others how many it has made, and holds the next until all have: the one after the highest
    number is where they stop. Whatever a process waits for on the way there, the others have
    already sent to their devices. Nothing is exchanged until a signal comes, but a last word.
    """

    def __init__(self, peers: _Peers) -> None:
        super().__init__()
        self._peers = peers
        self._checks = 0
        self._stop_at: int | None = None
        self._turn = threading.Lock()
        peers.on_stop = self._find_where_to_stop

    def check(self) -> None:
        self._ask()
        with self._turn:
            self._checks += 1
            last = self._stop_at
        if self._checks == last:
            self._stop(self._asked())

    @explained()
    def finish(self) -> None:
        self._ask()
        key = "cnn_jax/finish"
        self._peers.publish(f"{key}/{self._peers.index}", self._asked())
        signum = max(self._peers.gather(key))
        if signum:
            self._stop(signum)

    def _ask(self) -> None:
        if self.received is not None and not self._asked():
            self._peers.ask_to_stop(self.received)

    def _asked(self) -> int:
        """Returns the signal that asks all to stop; 0 while there is none."""
        return self._peers.stop_asked or 0

    @explained()
    def _find_where_to_stop(self) -> None:
        key = "cnn_jax/stop"
        with self._turn:
            self._peers.publish(f"{key}/{self._peers.index}", self._checks)
            self._stop_at = max(self._peers.gather(key)) + 1

    def _stop(self, signum: int) -> None:
        self._peers.stops_together = True
        raise Interrupted(signum)


def stop_signals() -> StopSignals:
    """Returns what turns signals into a wish to stop, of this process or of all."""
    return StopSignals() if _peers is None else StopTogether(_peers)
