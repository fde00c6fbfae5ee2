"""Programs of earlier starts, found by what decides them, before anything is traced.

To ask JAX's compilation cache for a program, a step has to be traced and lowered, which takes
longer than to read the answer. Here it is found by everything that tracing it would depend on: the
configuration, the abstract arguments, the source of this package, the versions of the others, the
devices, and what JAX and the compilers are told. Where something else could have a say, such as
code that is not this package's, programs are traced as ever.

The processes of a run use what they made at the same time, or all make it again: compiled at two
times, a program may order its collectives in two ways (https://github.com/openxla/xla/issues/7716),
and on GPUs a process that compiles waits for the others to try their part of its kernels.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import site
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from cnn_jax.errors import UserError
from cnn_jax.runtime import executables
from cnn_jax.runtime.compiler import KEPT, NOT_KEPT, TRACED, Options
from cnn_jax.runtime.distributed import from_first, source_digest, together

CONFIG: Any = jax.config  # a type checker does not know its attributes

BYTES = 2**30

PACKAGES = ("numpy", "ml_dtypes", "jaxtyping", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
"""Packages that have a say in a program, beside those of `executables`."""

VARIABLES = ("XLA_", "LIBTPU_", "TPU_", "TF_", "CUDNN_", "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "FLAX_")
"""How environment variables begin that have a say in a program; JAX's own are in its config."""

MADE = "made"
"""A file beside a program: what it says is the same for those that processes made together."""

NO_SAY = re.compile("cache|_log")
"""What the names have in common of those of JAX's settings that have no say in a program."""

PACKAGE = Path(__file__).parents[1]


class KeptPrograms:
    """Programs in a directory, each in one of its own, named by a digest of what decides it."""

    def __init__(self, directory: Path, log: Callable[[str], None]) -> None:
        """Takes the package's source as it is now for that which makes the programs."""
        self._directory = directory
        self._log = log
        self._source = source_digest()
        self._config_files = hashlib.sha256()

    def note_config_file(self, contents: bytes) -> None:
        """Makes the code of a configuration decide, and not only the values it returns."""
        self._config_files.update(hashlib.sha256(contents).digest())

    def get(
        self,
        name: str,
        make: Callable[[], jax.stages.Compiled],
        decided_by: Mapping[str, str],
        devices: Sequence[Any],
    ) -> jax.stages.Compiled:
        """Returns the program that an earlier start has kept, or what `make` returns, and keeps it.

        Whatever is wrong with a kept one, or with keeping one, costs the time of making it.
        """
        entries = {
            **decided_by,
            "source of cnn_jax": self._source,
            "source of the configuration": self._config_files.hexdigest(),
        }
        digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
        place = self._directory / f"{name}-{digest[:32]}"
        program, made = self._find(place, name, entries, devices)
        if together(f"kept {name}", made, _made_together) and program is not None:
            with contextlib.suppress(OSError):
                os.utime(place)
            jax.monitoring.record_event(KEPT)
            return program
        shutil.rmtree(place, ignore_errors=True)
        program = make()
        made = from_first(f"made {name}", lambda: secrets.token_hex(8))
        why_not = self._keep(place, name, program, entries, made)
        if why_not:
            jax.monitoring.record_event(NOT_KEPT, why=why_not)
        else:
            jax.monitoring.record_event(TRACED)
        return program

    def _find(
        self, place: Path, name: str, entries: Mapping[str, str], devices: Sequence[Any]
    ) -> tuple[jax.stages.Compiled | None, str]:
        """Returns the program that is kept there and what it is `MADE`; None, "" for none."""
        if not place.exists():
            return None, ""
        try:
            made = (place / MADE).read_text(errors="replace")
            return executables.load(place, name, entries, devices), made
        except (executables.UnusableError, OSError) as error:
            self._log(f"the kept program '{name}' is made again: {error}")
            return None, ""

    def _keep(
        self,
        place: Path,
        name: str,
        program: jax.stages.Compiled,
        entries: Mapping[str, str],
        made: str,
    ) -> str:
        """Returns why the program is not kept; an empty string where it is."""
        if source_digest() != self._source:
            return "the source of cnn_jax has changed since the start"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=self._directory))
            try:
                executables.save(unfinished, name, program, entries)
                (unfinished / MADE).write_text(made)
                unfinished.rename(place)  # fails where another start was faster
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            self._make_room()
        except (OSError, UserError) as error:
            return "" if place.exists() else str(error)
        return ""

    def _make_room(self) -> None:
        """Deletes what was used longest ago, of more than BYTES for each process of a run."""
        found = []
        for place in self._directory.iterdir():
            with contextlib.suppress(OSError):  # another start has deleted it
                size = sum(file.stat().st_size for file in place.iterdir())
                found.append((place.stat().st_mtime, place, size))
        excess = sum(size for _, _, size in found) - BYTES * jax.process_count()
        for _, place, size in sorted(found):
            if excess <= 0:
                break
            shutil.rmtree(place, ignore_errors=True)
            excess -= size


def _made_together(each: Sequence[str]) -> bool:
    """Returns whether all have a program, made by the same start."""
    return bool(each[0]) and len(set(each)) == 1


_programs: KeptPrograms | None = None


def start(cache: str | None, log: Callable[[str], None]) -> None:
    """Keeps programs within the directory of JAX's compilation cache, if there is a local one."""
    global _programs
    if cache is None or "://" in cache:
        _programs = None
    else:
        _programs = KeptPrograms(Path(cache, "programs"), log)


def note_config_file(contents: bytes) -> None:
    """Makes the code of a configuration decide, and not only the values it returns."""
    if _programs is not None:
        _programs.note_config_file(contents)


def obstacle() -> str:
    """Returns why no program of this process is kept; an empty string where they are."""
    if _programs is None:
        return "there is no compilation cache in a local directory"
    stranger = foreign_module()
    return f"{stranger} could have a say in them" if stranger else ""


def kept(
    name: str,
    make: Callable[[], jax.stages.Compiled],
    *,
    arguments: Mapping[str, Any],
    devices: Sequence[Any],
    options: Options,
    decided_by: Mapping[str, Any],
) -> jax.stages.Compiled:
    """Returns the program that `make` returns, where possible as an earlier start has kept it.

    Args:
      name: of the program, for people.
      make: traces and compiles it.
      arguments: its abstract arguments by name, with their shardings.
      devices: what it runs on.
      options: what it is compiled with.
      decided_by: whatever else `make` looks at, such as the configuration.
    """
    why_not = together(f"keeping {name}", obstacle(), lambda each: next(filter(None, each), ""))
    if _programs is None or why_not:
        jax.monitoring.record_event(NOT_KEPT, why=why_not)
        return make()
    entries = {
        **executables.circumstances(arguments, devices=devices, options=options),
        **_surroundings(devices),
        **{f"decided by {key}": str(value) for key, value in decided_by.items()},
    }
    return _programs.get(name, make, entries, devices)


def _surroundings(devices: Sequence[Any]) -> dict[str, str]:
    """Returns what has a say in every program of this process, by name."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        **versions,
        "process": f"{jax.process_index()} of {jax.process_count()}",
        "topology": ", ".join(map(repr, devices)),
        "version of the platform": devices[0].client.platform_version,
        **{name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        **{name: str(each) for name, each in CONFIG.values.items() if not NO_SAY.search(name)},
    }


def foreign_module() -> str:
    """Returns a module whose code nothing here stands for; an empty string where there is none.

    The package's own code has a digest, that of installed packages a version; any other could
    have changed how a step is traced. A program that is not one of the package's counts as such.
    """
    modules = sys.modules.copy()  # other threads may import meanwhile
    files = {name: getattr(module, "__file__", None) for name, module in modules.items()}
    main = files["__main__"] or "a session"
    started = Path(main).resolve()
    if started.parent != PACKAGE.resolve() and started not in _starters():
        return main
    known = (main, f"{PACKAGE}{os.sep}", *_installed())
    places = ((name, file) for name, file in files.items() if file and os.path.isabs(file))
    return next((name for name, file in places if not file.startswith(known)), "")


def _starters() -> set[Path]:
    """Returns where the programs may lie that start the package's commands."""
    scripts = (sysconfig.get_path("scripts"), sysconfig.get_path("scripts", f"{os.name}_user"))
    paths = (PACKAGE.parent / "train.py", *(Path(place, "cnn-jax") for place in scripts))
    return {path.resolve() for path in paths}


@functools.cache
def _installed() -> tuple[str, ...]:
    """Returns where Python's own modules lie, and those of installed packages."""
    paths = sysconfig.get_paths()
    own = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places = (*own, *site.getsitepackages(), site.getusersitepackages())
    return tuple(f"{place}{os.sep}" for place in places)
