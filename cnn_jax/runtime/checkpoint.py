"""Checkpoints of one run: written in the background, whole or not at all, and verified when read.

orbax writes each step into a directory of its own. A manifest with the SHA-256 of every file is
among them, so that one that was cut or altered later is found before anything is read.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

from cnn_jax.errors import UserError
from cnn_jax.runtime.distributed import from_first, is_first
from cnn_jax.runtime.object_storage import COMMITTED, prepare_for
from cnn_jax.storage import absolute, digests, files_below, is_remote, move, write_atomically
from cnn_jax.training.state import TrainState
from cnn_jax.training.statistics import fit_statistics

MANIFEST = "manifest.json"
ITEMS = ("state/", "record/", "metrics/")


def _digests(step_directory: Path) -> dict[str, str]:
    files = files_below(step_directory)
    return digests(step_directory, [name for name in files if name.startswith(ITEMS)])


def find_damage(step_directory: Path) -> str | None:
    """Returns what is wrong with a checkpoint, naming the file; None where it is whole."""
    try:
        expected = json.loads((step_directory / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"it was not finished (no readable {MANIFEST})"
    actual = _digests(step_directory)
    for name, digest in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name] != digest:
            return f"{name} is truncated or altered (its SHA-256 has changed)"
    return None


def write_manifest(step_directory: Path) -> None:
    """Writes what `find_damage` reads, for a checkpoint that is complete but for this."""
    write_atomically(step_directory / MANIFEST, json.dumps(_digests(step_directory), indent=1))


def quieten_orbax() -> None:
    """orbax and tensorstore narrate every save, and print pages for a file they cannot read."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and the one with the best accuracy."""

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        log: Callable[[str], None],
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        """`confirm` is called before each save, and raises where the directory has been lost."""
        quieten_orbax()
        prepare_for(directory)
        self._directory = absolute(directory)
        self._log = log
        self._confirm = confirm
        self._saving: int | None = None
        if is_first():
            if not is_remote(directory):
                self._directory.mkdir(parents=True, exist_ok=True)
            self._set_damaged_aside()
        from_first("whole checkpoints", lambda: None)
        processes = jax.process_count()
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("state", "record"),
            options=ocp.CheckpointManagerOptions(
                create=False,
                # Named, they meet without a collective of the devices, which could overtake a step.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=set(range(processes)) if processes > 1 else None
                ),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(keep),
                        checkpoint_managers.BestN(
                            get_metric_fn=lambda metrics: metrics["accuracy"],
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                best_fn=lambda metrics: metrics["accuracy"],  # or no metrics are written
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest good checkpoint; None where there is none."""
        return self._manager.latest_step()

    def record(self) -> Mapping[str, Any]:
        """Returns the JSON values saved beside the newest good checkpoint."""
        restored = self._manager.restore(
            self._manager.latest_step(), args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )
        return restored["record"]

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Returns the newest good state, laid out as `abstract_state` says.

        Running statistics of another number of devices are pooled, and spread again.

        Raises UserError where the checkpoint holds other arrays than the model of this run has.
        """
        step = self._manager.latest_step()
        # Asked first: orbax finds out while it reads, and leaves tasks that complain at length.
        with ocp.PyTreeCheckpointer() as reader:
            metadata = reader.metadata(self._directory / str(step) / "state")
        saved = _shapes(metadata.item_metadata.tree)
        as_saved = _with_rows(abstract_state, saved)
        asked = _shapes(as_saved)
        for name in sorted(saved.keys() | asked.keys()):
            if saved.get(name) != asked.get(name):
                raise UserError(
                    f"{self._directory / str(step)} holds other arrays than this configuration's "
                    f"model and optimizer: {name} is {saved.get(name, 'missing')} there and "
                    f"{asked.get(name, 'missing')} here. Choose another --workdir"
                )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_tree(as_saved)))
        )
        state = dataclasses.replace(abstract_state, **restored["state"])
        if as_saved is abstract_state:
            return state
        return state.map_statistics(fit_statistics, abstract_state)

    def save(
        self, state: TrainState, *, record: Mapping[str, Any], accuracy: float | None = None
    ) -> None:
        """Copies the state to the host and writes it in the background.

        A step that is saved already is left alone, unless this gives it the accuracy that it lacks
        and an earlier checkpoint would survive a kill meanwhile.

        Raises UserError where this or an earlier checkpoint could not be written.
        """
        step = int(jax.device_get(state.step))
        self._confirm()
        self.wait()
        self._saving = step
        with self._clear_errors():
            if step == self._manager.latest_step():
                alone = len(self._manager.all_steps()) == 1
                if accuracy is None or self._manager.metrics(step) or alone:
                    return
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_tree(state)),
                    record=ocp.args.JsonSave(dict(record)),
                ),
                metrics=None if accuracy is None else {"accuracy": accuracy},
            )

    def wait(self) -> None:
        """Returns when every checkpoint is on disk; raises UserError where one could not be."""
        with self._clear_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees orbax's threads."""
        with self._clear_errors():
            self._manager.close()

    def _write_manifest(self) -> None:
        # orbax calls this before it renames the directory, so the manifest is part of the commit.
        if is_remote(self._directory):  # it commits by a last object instead
            step_directory = self._directory / str(self._saving)
        else:
            (step_directory,) = self._directory.glob(f"{self._saving}.*")
        write_manifest(step_directory)

    def _set_damaged_aside(self) -> None:
        """Moves damaged checkpoints out of orbax's sight."""
        steps = [p for p in self._directory.glob("[0-9]*") if p.name.isdigit() and p.is_dir()]
        for step_directory in sorted(steps, key=lambda path: int(path.name), reverse=True):
            if is_remote(step_directory) and not (step_directory / COMMITTED).exists():
                continue  # a save that was cut short; orbax clears it away
            damage = find_damage(step_directory)
            if damage is None:
                continue
            aside = self._directory.with_name("damaged") / step_directory.name
            while aside.exists():
                aside = aside.with_name(aside.name + "-again")
            move(step_directory, to=aside)
            self._log(f"checkpoint {step_directory} is skipped: {damage}; moved to {aside}")

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            self._confirm()
            raise UserError(
                f"checkpoint {self._directory / str(self._saving)} could not be written: "
                f"{_first_line(error)}. Earlier checkpoints are untouched; make room or choose "
                "another --workdir, and start the same command again"
            ) from error


def _with_rows(state: TrainState, saved: dict[str, tuple[int, ...]]) -> TrainState:
    """Returns the abstract state with the rows of running statistics that are `saved`.

    Where they are as many it is the state itself. The shapes of all else are left for comparison.
    """

    def saved_rows(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape: tuple[int, ...] = saved.get(f"batch_stats/{name}") or leaf.shape
        if shape == leaf.shape or shape[-1:] != leaf.shape[-1:] or max(len(shape), leaf.ndim) > 2:
            return leaf
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=everywhere)

    found = state.map_statistics(lambda each: jax.tree.map_with_path(saved_rows, each))
    return state if _shapes(found) == _shapes(state) else found


def _tree(state: TrainState) -> dict[str, Any]:
    """Returns what is saved: no averages where there are none, as before there were any."""
    return {name: part for name, part in vars(state).items() if name != "ema" or part}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    line = lines[0].partition(" [")[0]
    return line if len(line) <= 600 else f"{line[:200]} ... {line[-400:]}"
