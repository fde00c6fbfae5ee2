"""Training: from a configuration to a model, its curves and a checkpoint that resumes exactly."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from cnn_jax.commands.evaluate import STEPS_IN_FLIGHT, mean_metrics
from cnn_jax.config import Config, completed, differences
from cnn_jax.data.bad_records import SkipBadRecords
from cnn_jax.data.sources import fingerprint
from cnn_jax.data.stages import Stages, limit
from cnn_jax.errors import UserError
from cnn_jax.feeding import Feeding, make_feeding
from cnn_jax.plan import Plan, make_plan, open_part
from cnn_jax.runtime import distributed, executables
from cnn_jax.runtime.checkpoint import Checkpoints
from cnn_jax.runtime.compiler import (
    CompilationCounter,
    told_by_environment,
    use_cache_together,
)
from cnn_jax.runtime.platform import Interrupted, StopSignals, advice_on_pages, versions
from cnn_jax.runtime.report import (
    METRICS,
    Clock,
    MetricsLog,
    Progress,
    duration,
    plot_curves,
    read_rows,
)
from cnn_jax.runtime.watchdog import Watchdog
from cnn_jax.runtime.workdir import (
    claim,
    has_checkpoint,
    read_config,
    read_skipped,
    write_config,
    write_skipped,
)
from cnn_jax.storage import place, write_atomically
from cnn_jax.training.diagnosis import first_not_finite
from cnn_jax.training.metrics import mean
from cnn_jax.training.resident import gathered, rows_of
from cnn_jax.training.state import TrainState, all_finite, skip_step
from cnn_jax.typing import Batch, Metrics

BATCH_KEYS = ("seed", "batch_size", "data.name", "data.train_split", "data.holdout")
"""What decides which examples a step trains on; the fingerprint of the data says the rest."""


def train(
    config: Config,
    workdir: str | Path,
    *,
    compiled: Path | None = None,
    step_timeout: float = 0,
    dry_run: bool = False,
    accept_config_changes: bool = False,
) -> int:
    """Trains until the last step of `config`, going on where the run in `workdir` had come to.

    Returns 0 when the run is complete, and 128 plus the signal's number when SIGINT or SIGTERM
    stopped it; what was trained by then is saved. With `dry_run` it prints the plan only. The steps
    are those saved in `compiled`, if they fit the run. Where no step ends for `step_timeout`
    seconds, unless that is 0, the process ends with the exit code `platform.RESTART`.

    Raises:
      UserError: the directory holds another run or cannot be written, the data cannot be had, or
        the loss is no longer a finite number.
    """
    clock = Clock()
    directory = place(workdir)
    distributed.agree(
        "code, configuration or devices",
        lambda: {
            **versions(),
            "source of cnn_jax": distributed.source_digest(),
            "devices": jax.local_device_count(),
            "--workdir": str(directory),
            "--accept-config-changes": accept_config_changes,
            "--compiled": compiled is not None,
            "--dry-run": dry_run,
            **told_by_environment(),
            **flatten_dict(config.as_dict(), sep="."),
        },
    )
    use_cache_together()
    plan = make_plan(config)
    distributed.agree("compilers", lambda: {"settings": plan.compiler.describe()})
    _say(f"{plan.describe()}\nworkdir    {directory}")
    if dry_run:
        if directory.exists() and not directory.is_dir():
            raise UserError(f"--workdir {directory}: is no directory")
        _config_before(directory, config.as_dict(), accept_config_changes)
        for step in plan.programs:
            _saved_program(plan, step, plan.lower(step), compiled)
        _say(plan.tabulate())
        _say("dry run: the configuration is good and its steps can be built; nothing was written")
        return 0
    try:
        with (
            distributed.stop_signals() as stop,
            claim(directory) as confirm,
            distributed.explained(),
            Watchdog(step_timeout) as watchdog,
        ):
            return _train_in(
                directory, confirm, plan, clock, stop, watchdog, compiled, accept_config_changes
            )
    except Interrupted as interrupted:
        _say("stopped before training began; the same command starts again")
        code = 128 + interrupted.signum
        distributed.leave(code, f"stopped by {interrupted} before training began")
        return code
    except OSError as error:
        raise UserError(
            f"cannot write to {directory}: {error}. Make room or choose another --workdir, and "
            "start the same command again"
        ) from error


def _train_in(
    directory: Path,
    confirm: Callable[[], None],
    plan: Plan,
    clock: Clock,
    stop: StopSignals,
    watchdog: Watchdog,
    compiled: Path | None,
    accept_config_changes: bool,
) -> int:
    config = plan.config.as_dict()
    before = _config_before(directory, config, accept_config_changes)
    confirm()
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            contextlib.closing(
                Checkpoints(
                    directory / "checkpoints",
                    keep=plan.config.checkpoint.keep,
                    log=_say,
                    confirm=confirm,
                )
            )
        )
        step = checkpoints.latest_step() or 0
        distributed.agree(f"the contents of {directory}", lambda: {"newest checkpoint": step})
        if before and not step:
            _say(f"{directory} holds no good checkpoint: training starts from the beginning")
        metrics = stack.enter_context(
            contextlib.closing(MetricsLog(directory, resume_step=step, confirm=confirm))
        )
        if step:
            changes = differences(completed(checkpoints.record()["config"]), config)
            if not before and not accept_config_changes:
                _refuse_changes(changes, directory)
            _refuse_other_batches(_of_batches(changes), directory)
        if step >= plan.total_steps and _is_evaluated(metrics, step):
            _say(f"{directory}: this run is complete, at step {step} of {plan.total_steps}")
            faults = checkpoints.record().get("faults", {})
            _summarize(directory, metrics, plan.best_by, faults, None)
            return 0
        training = _Training(plan, directory, checkpoints, metrics, clock, stop, watchdog, compiled)
        if config != before:
            write_config(directory, config)
        return training.run()


def _config_before(
    directory: Path, config: Mapping[str, Any], accept_config_changes: bool
) -> dict[str, Any] | None:
    """Returns the configuration of the run in the directory, if there is one; refuses another."""
    before = distributed.from_first("the run's configuration", lambda: _config_of(directory))
    if before and not accept_config_changes:
        _refuse_changes(differences(completed(before), config), directory)
    return before


def _refuse_changes(changes: Sequence[str], directory: Path) -> None:
    if not changes:
        return
    way_on = ", or go on with the new values: --accept-config-changes"
    raise UserError(
        f"{directory} holds a run with another configuration:\n  "
        + "\n  ".join(changes)
        + "\nChoose another --workdir"
        + ("" if _of_batches(changes) else way_on)
    )


def _config_of(directory: Path) -> dict[str, Any] | None:
    """Returns the configuration of the run in the directory; None where there is no run yet."""
    config = read_config(directory)
    if config is None and read_rows(directory / METRICS) and not has_checkpoint(directory):
        raise UserError(
            f"{directory} holds a {METRICS} but no configuration, so it is not a run of this "
            "program. Choose another --workdir"
        )
    return config


class NotFiniteError(Exception):
    """Somewhere up to the step that was reached, a number was not finite."""


class _Training:
    """One start of a run, from compiling to the summary."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        checkpoints: Checkpoints,
        metrics: MetricsLog,
        clock: Clock,
        stop: StopSignals,
        watchdog: Watchdog,
        compiled: Path | None,
    ) -> None:
        """Compiles, opens the data, and takes the newest good state or makes the first."""
        self.plan = plan
        self.directory = directory
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.stop = stop
        self.watchdog = watchdog
        self.clock = clock
        self.compilations = CompilationCounter()
        self.stages = Stages()
        self.window: list[tuple[range, Metrics]] = []  # steps of a call, and their sums
        self.window_start = 0.0
        self.skipped = read_skipped(directory)
        self.watched_until = 0
        self.unexplained: NotFiniteError | None = None
        self.calls_in_flight = STEPS_IN_FLIGHT if plan.steps_per_call == 1 else 1
        # A check sees the steps that have ended, which are all but those under way.
        self.nan_check_every = plan.config.faults.nan_check_every - STEPS_IN_FLIGHT
        with self.clock.measure("starting"):
            # The data come first: while tensorflow_datasets is imported it replaces Python's import
            # for the whole process, and a compiler that imports in another thread would fail.
            parts = plan.config.data.parts()
            self.train_source = open_part(plan.config, parts["train"], log=_say, stages=self.stages)
            self.test_source = open_part(plan.config, parts["test"], log=_say)
            self.record = {
                "config": plan.config.as_dict(),
                "data": fingerprint(
                    self.train_source, batch_size=plan.config.batch_size, seed=plan.config.seed
                ),
                "dataset": dataclasses.asdict(self.train_source.info),
            }
            distributed.agree("data", lambda: self.record["data"])
            wait = _compile_together(plan, compiled)
            self.feed = make_feeding(plan, self.train_source, self.stages)
            self.step = checkpoints.latest_step() or 0
            self.state = self._restore() if self.step else plan.make_state()
            self.key = plan.make_key()
            if self.step:
                self._remember(checkpoints.record().get("faults", {}))
            self.feeding = self.feed(self.step)  # while the programs are compiled
            try:
                self.programs, self.clock.seconds["compiling"] = wait()
            except BaseException:
                self.feeding.close()
                raise
            if plan.compiler.platform == "cpu" and (advice := advice_on_pages(self._temporaries())):
                _say(f"memory     {advice}")
            self.eval_step = self.programs["evaluation"]
            self.stages.clear()  # of what the fingerprint has read
        self.progress = Progress(plan.total_steps, first_step=self.step)

    def _temporaries(self) -> int:
        """Returns the bytes of temporary memory that the largest training step takes."""
        found = (self.programs[phase.name].memory_analysis() for phase in self.plan.phases)
        return max((each.temp_size_in_bytes for each in found if each is not None), default=0)

    def run(self) -> int:
        """Trains to the last step; returns the exit code."""
        self.stop.defer()
        try:
            with self.watchdog.watching(), self.clock.measure("training"):
                self._train()
            self.clock.seconds["training"] -= sum(
                self.clock.seconds[part] for part in ("evaluating", "saving")
            )
        except Interrupted as interrupted:
            return self._stopped(interrupted)
        finally:
            self.progress.close()
        _summarize(
            self.directory,
            self.metrics,
            self.plan.best_by,
            self._faults(),
            self.clock,
            self.compilations,
            self._limit(),
        )
        return 0

    def _limit(self) -> str:
        """Returns the stage that limits the training, the step or one of the data's."""
        seconds = self.clock.seconds
        return limit(
            self.stages.seconds(),
            waiting=seconds["waiting for data"],
            training=seconds["training"],
            num_threads=self.plan.config.data.num_threads,
        )

    def _stopped(self, interrupted: Interrupted) -> int:
        """Saves for a restart; returns the exit code."""
        with contextlib.suppress(NotFiniteError):  # the restart finds the cause
            self._save()
        self.checkpoints.wait()
        saved = self.checkpoints.latest_step() or 0
        self.progress.say(
            f"stopped by {interrupted}: saved at step {saved} of {self.plan.total_steps}; "
            "the same command again goes on from there"
        )
        return 128 + interrupted.signum

    def _train(self) -> None:
        """Trains to the last step, from the last good state again when a number is not finite."""
        while True:
            try:
                self._train_from_here()
            except NotFiniteError as error:
                self._rewind(error)
            else:
                break
        self.stop.finish()
        self.checkpoints.wait()

    def _train_from_here(self) -> None:
        plan = self.plan
        self.window_start = time.perf_counter()
        with contextlib.closing(self.feeding) as feeding:
            if plan.evaluates_after(self.step) and not _is_evaluated(self.metrics, self.step):
                self._evaluate()
                self._save()
            while self.step < plan.total_steps:
                count = self._steps_of_call()
                self._call(self._fetch(feeding, count), count)
                self.step += count
                self._look_back()
                self.progress.advance(self.step)
                if self.step % plan.config.log.every_steps == 0:
                    self._report()
                if plan.evaluates_after(self.step):
                    self._evaluate()
                if plan.saves_after(self.step):
                    self._save()
                self._go_on()

    def _go_on(self) -> None:
        """Tells the watchdog; raises `Interrupted` if a signal has come."""
        self.watchdog.beat()
        self.stop.check()

    def _steps_of_call(self) -> int:
        """Returns how many steps to take until something else is due, at most a call's."""
        plan, skipped = self.plan, self.skipped
        if self.step < self.watched_until:
            return 1
        for step in range(self.step + 1, self.step + plan.steps_per_call):
            if (
                plan.stops_after(step)
                or (step in skipped or step + 1 in skipped)
                or plan.phase_of(step) is not plan.phase_of(step - 1)
            ):
                return step - self.step
        return plan.steps_per_call

    def _call(self, batch: Batch, count: int) -> None:
        """Takes the next steps, or skips one."""
        step = self.step + 1
        if step in self.skipped:
            self.state = skip_step(self.state)
        elif step <= self.watched_until:
            self._watched_step(step, batch)
        else:
            self.state, sums = self._train_step(batch)
            self.window.append((range(step, step + count), sums))

    def _train_step(self, batch: Batch) -> tuple[TrainState, Metrics]:
        program = self.programs[self.plan.phase_of(self.step).name]
        return program(self.state, batch, self.key)

    def _look_back(self) -> None:
        """Waits for all calls but those under way, and now and then looks at what they made."""
        under_way = self.calls_in_flight
        if len(self.window) > under_way:
            jax.block_until_ready(self.window[-1 - under_way][1])
        if self.plan.steps_per_call > 1:
            _refuse_not_finite(self.window[-1 - under_way : -under_way])
        elif self.step % self.nan_check_every == 0:
            _refuse_not_finite(self.window[:-under_way][-self.nan_check_every :])

    def _watched_step(self, step: int, batch: Batch) -> None:
        """Takes a step, or says where its first number appears that is not finite, and skips it."""
        before = jax.tree.map(jnp.copy, self.state)
        self.state, sums = self._train_step(batch)
        finite, all_of_state = jax.device_get([sums["finite"], all_finite(self.state)])
        if np.ravel(finite)[0] and all_of_state:
            self.window.append((range(step, step + 1), sums))
            if self.unexplained and step == self.watched_until:
                raise UserError(
                    f"{self.unexplained}, but computed again every number is finite: this machine "
                    "does not compute the same twice. Look for a fault of the device or its "
                    "memory; the same command goes on from the newest checkpoint"
                )
            return
        self.unexplained = None
        faults = self.plan.config.faults
        with self.watchdog.watching(False):  # it compiles
            step_alone = self.plan.phase_of(self.step).step
            batch = gathered(batch) if self.plan.resident else batch
            place = first_not_finite(
                step_alone, before, batch, self.key, of_all_processes=_seen_by_any
            )
        cause = f"step {step}: {place}"
        if faults.on_nan == "stop" or not jax.device_get(all_finite(before)):
            raise self._diverged(cause)
        if len(self.skipped) == faults.max_skipped:
            raise self._diverged(f"{cause}, after {len(self.skipped)} steps that were skipped")
        self.state = skip_step(before)
        self.skipped[step] = cause
        write_skipped(self.directory, self.skipped)
        self.progress.say(f"{cause}; the step is skipped")

    def _rewind(self, error: NotFiniteError) -> None:
        """Goes back to the last good state, to go on from it with every step watched."""
        self.checkpoints.wait()
        good = self.checkpoints.latest_step() or 0
        self.progress.say(f"{error}: going back to step {good} to find where it begins")
        self.watched_until, self.unexplained = self.step, error
        self.step = good
        with self.watchdog.watching(False):
            restore, make = self.checkpoints.restore, self.plan.make_state
            self.state = restore(self.plan.state) if good else make()
        self.metrics.rewind(good)
        self.window.clear()
        self.feeding = self.feed(good)

    def _fetch(self, feeding: Feeding, count: int) -> Batch:
        """Returns the next batch, on the devices; its time counts while they have nothing to do."""
        start = time.perf_counter()
        batch = feeding.fetch(self.step, count)
        last: Any = self.window[-1][1]["loss"] if self.window else None
        if last is None or last.is_ready():  # nothing is under way
            self.clock.seconds["waiting for data"] += time.perf_counter() - start
        return batch

    def _restore(self) -> TrainState:
        changes = differences(self.checkpoints.record()["data"], self.record["data"])
        _refuse_other_batches(changes, self.directory)
        _say(f"going on from step {self.step} of {self.plan.total_steps}")
        return self.checkpoints.restore(self.plan.state)

    def _report(self) -> None:
        """Writes the metrics since the last report; raises where one is not finite."""
        if not self.window:
            return
        _refuse_not_finite(self.window)
        sums = [values for _, values in _by_step(self.window)]
        seconds = time.perf_counter() - self.window_start
        self.window.clear()
        means = mean(sums)
        row = {
            "epoch": self.plan.epoch(self.step),
            "train/loss": means["loss"],
            "train/accuracy": means["accuracy"],
            "train/grad_norm": float(sums[-1]["grad_norm"]),
            "learning_rate": self.plan.learning_rate(self._updates() - 1),
            "images_per_second": len(sums) * self.plan.config.batch_size / seconds,
        }
        self.metrics.write(self.step, row)
        self.progress.show(self.step, row)
        self.window_start = time.perf_counter()

    def _evaluate(self) -> None:
        self._report()
        row = {"epoch": self.plan.epoch(self.step)}
        said = f"epoch {row['epoch']:.2f}"
        for state, suffix, of in self._evaluated_states():
            with self.clock.measure("evaluating"):
                means = mean_metrics(
                    self.plan, self.eval_step, state, self.test_source, check=self._go_on
                )
            if not math.isfinite(means["loss"]):
                self._refuse_bad_state()
                raise self._diverged(f"the test loss after step {self.step} is {means['loss']}")
            row |= {f"test/{name}{suffix}": value for name, value in means.items()}
            said += f"  {of}test loss {means['loss']:.4f}  test accuracy {means['accuracy']:.4f}"
        self.metrics.write(self.step, row)
        self.progress.say(f"{said}  over {len(self.test_source):,} images")
        self.window_start = time.perf_counter()

    def _evaluated_states(self) -> Iterator[tuple[TrainState, str, str]]:
        """Yields each state to evaluate, how its metrics end, and what is said of it."""
        yield self.state, "", ""
        if self.state.ema:
            yield self.state.averaged(), "_ema", "averaged weights: "

    def _save(self) -> None:
        """Writes a checkpoint in the background; a state that is not finite never becomes one."""
        self._report()
        with self.clock.measure("saving"):
            self._refuse_bad_state()
            self.metrics.sync()
            self.checkpoints.save(
                self.state,
                record={**self.record, "faults": self._faults()},
                accuracy=self.metrics.at(self.step, self.plan.best_by),
            )
        self.window_start = time.perf_counter()

    def _refuse_bad_state(self) -> None:
        if not jax.device_get(all_finite(self.state)):
            raise NotFiniteError(f"the weights after step {self.step} are not finite numbers")

    def _faults(self) -> dict[str, Any]:
        """Returns the steps and records that were skipped, each with its reason, for JSON.

        The records are those of all processes, which all call this after the same step.
        """
        skipping = self._skipping()
        news = {name: source.news() for name, source in skipping.items()}
        for each in distributed.together("bad records", news, list) if skipping else ():
            for name, records in each.items():
                skipping[name].learn(records)
        return {
            "skipped_steps": {str(step): why for step, why in sorted(self.skipped.items())},
            "bad_records": {
                name: {str(number): source.bad[number] for number in sorted(source.known)}
                for name, source in skipping.items()
            },
        }

    def _remember(self, faults: Mapping[str, Any]) -> None:
        """Takes up what `_faults` gave an earlier start."""
        self.skipped |= {int(step): why for step, why in faults.get("skipped_steps", {}).items()}
        skipping = self._skipping()
        for name, bad in faults.get("bad_records", {}).items():
            if name in skipping:
                skipping[name].remember(bad)

    def _skipping(self) -> dict[str, SkipBadRecords]:
        """Returns the sources that pass over damaged records, by what the run uses them for."""
        sources = {"train": self.train_source, "test": self.test_source}
        return {name: each for name, each in sources.items() if isinstance(each, SkipBadRecords)}

    def _updates(self) -> int:
        """Returns how often the optimiser has moved the weights."""
        return self.step - sum(step <= self.step for step in self.skipped)

    def _diverged(self, what: str) -> UserError:
        self.checkpoints.wait()
        good = self.checkpoints.latest_step()
        return UserError(
            f"training has diverged: {what}. "
            + (f"The newest checkpoint, step {good}, is good. " if good else "")
            + "Lower optimizer.learning_rate or lengthen schedule.warmup_epochs, in another "
            "--workdir or with --accept-config-changes; or skip single bad steps: "
            "faults.on_nan=rollback"
        )


def _by_step(
    window: Sequence[tuple[range, Metrics]],
) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
    """Yields each step of the calls and its sums, on the host; waits for those under way."""
    for (steps, _), sums in zip(window, jax.device_get([sums for _, sums in window]), strict=True):
        yield from zip(steps, rows_of(sums, len(steps)), strict=True)


def _refuse_not_finite(window: Sequence[tuple[range, Metrics]]) -> None:
    """Raises for the first step whose loss or gradient is not finite; waits for those under way."""
    for step, values in _by_step(window):
        if not values["finite"]:
            raise NotFiniteError(
                f"at step {step} the loss is {values['loss'] / values['count']:.4g} and the norm "
                f"of its gradient {values['grad_norm']:.4g}"
            )


def _seen_by_any(places: set[str]) -> set[str]:
    """Returns the union of what the processes have seen."""
    return set(
        distributed.together("places", sorted(places), lambda each: sorted(set().union(*each)))
    )


def _compile_together(
    plan: Plan, saved: Path | None
) -> Callable[[], tuple[dict[str, jax.stages.Compiled], float]]:
    """Starts making all programs of a training at once; returns a function that waits for them.

    It returns the programs and the seconds from the start to the last. The waiting thread stays
    open to signals, which a compiler would hold up for minutes.
    """
    start = time.perf_counter()
    executor = ThreadPoolExecutor(len(plan.programs))

    def timed(step: str) -> tuple[jax.stages.Compiled, float]:
        program = saved and _saved_program(plan, step, plan.lower(step), saved)
        return program or plan.compile(step, log=_say), time.perf_counter() - start

    futures = [executor.submit(timed, step) for step in plan.programs]
    executor.shutdown(wait=False)

    def wait() -> tuple[dict[str, jax.stages.Compiled], float]:
        programs, seconds = zip(*(future.result() for future in futures), strict=True)
        return dict(zip(plan.programs, programs, strict=True)), max(seconds)

    return wait


def _saved_program(
    plan: Plan, step: str, lowered: jax.stages.Lowered, directory: Path | None
) -> jax.stages.Compiled | None:
    """Returns the program that `compile --save` left there; None, saying why, if it does not fit.

    None without a directory.
    """
    if directory is None:
        return None
    here = plan.conditions(step, lowered)
    try:
        if jax.process_count() > 1:
            raise executables.UnusableError("saved programs are for runs of one process")
        program = executables.load(directory, step, here, list(plan.mesh.devices.flat))
    except executables.UnusableError as error:
        reasons = str(error).replace("\n", "\n  ")
        said = f"the {step} step is compiled, as the one in {directory} is not for this run:"
        _say(f"{said}\n  {reasons}")
        return None
    _say(f"the {step} step is the one in {directory}: nothing to compile")
    return program


def _of_batches(changes: Sequence[str]) -> list[str]:
    return [line for line in changes if line.partition(":")[0] in BATCH_KEYS]


def _refuse_other_batches(changes: Sequence[str], directory: Path) -> None:
    if changes:
        raise UserError(
            f"{directory} was trained on other batches and cannot go on exactly:\n  "
            + "\n  ".join(changes)
            + "\nSet these back, or choose another --workdir"
        )


def _is_evaluated(metrics: MetricsLog, step: int) -> bool:
    return metrics.at(step, "test/accuracy") is not None


def _summarize(
    directory: Path,
    metrics: MetricsLog,
    best_by: str,
    faults: Mapping[str, Any],
    clock: Clock | None,
    compilations: CompilationCounter | None = None,
    limited_by: str = "",
) -> None:
    """Prints how the run ended and where things are; draws the curves. Safe to do again."""
    if not distributed.is_first():
        return
    tested = [row for row in metrics.rows if "test/accuracy" in row]
    final, best = tested[-1], max(tested, key=lambda row: (row[best_by], row["step"]))
    path = directory / "summary.json"
    if clock is not None or not path.exists():
        seconds = {} if clock is None else {**clock.seconds, "total": clock.total()}
        summary = {
            **{name: value for name, value in final.items() if name != "epoch"},
            "best": {"step": best["step"], best_by: best[best_by]},
            "skipped_steps": [int(step) for step in faults.get("skipped_steps", {})],
            "bad_records": {name: len(bad) for name, bad in faults.get("bad_records", {}).items()},
            "seconds": seconds,
            "limited_by": limited_by,
            "programs": compilations.as_dict() if compilations else {},
            "versions": versions(),
        }
        write_atomically(path, json.dumps(summary, indent=2) + "\n")
    if clock is not None or not (directory / "curves.png").exists():
        plot_curves(metrics.rows, directory / "curves.png")

    averaged = f" ({final[best_by]:.4f} with averaged weights)" if "ema" in best_by else ""
    _say(
        f"test accuracy {final['test/accuracy']:.4f}{averaged}, loss {final['test/loss']:.4f} at "
        f"the last step, {final['step']}; best {best[best_by]:.4f} at step {best['step']}"
    )
    if clock is not None:
        seconds = clock.seconds
        kept = compilations.describe() if compilations else ""
        compiling = "; ".join(filter(None, [duration(seconds["compiling"]), kept]))
        training, waiting = seconds["training"], seconds["waiting for data"]
        _say(
            f"{duration(clock.total())} in all: starting {duration(seconds['starting'])} "
            f"(compiling {compiling}), training {duration(training)} "
            f"(waiting for data {duration(waiting)}, {waiting / max(training, 1e-9):.1%}; "
            f"{limited_by} limits), "
            f"evaluating {duration(seconds['evaluating'])}, saving {duration(seconds['saving'])}"
        )
    _say(
        f"written to {directory}: metrics.jsonl, summary.json, curves.png, tensorboard/, "
        "checkpoints/ (the last state and the best among them)"
    )


def _say(text: str) -> None:
    if distributed.is_first():
        print(f"{text}\n", end="", flush=True)  # in one piece: two threads may speak
