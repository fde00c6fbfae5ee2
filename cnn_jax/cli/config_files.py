"""Configurations from files and from `--config.KEY=VALUE`: ConfigDict stops here."""

import re
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnn_jax.errors import UserError


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the arguments without any `--config.KEY=VALUE` or `--config.KEY VALUE`, and those.

    One without a value stays, for argparse to refuse.
    """
    flags: list[str] = []
    overrides: list[tuple[str, str]] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        key = re.fullmatch(r"--config\.(\w+(?:\.\w+)*)", flag)
        if key and equals:
            overrides.append((key[1], value))
        elif key and remaining and not remaining[0].startswith("--"):
            overrides.append((key[1], remaining.pop(0)))
        else:
            flags.append(argument)
    return flags, overrides


def parsed(path: Path, overrides: Sequence[tuple[str, str]], *, check_weights: bool = False) -> Any:
    """Returns the checked configuration of the file; raises ConfigError with all mistakes."""
    from cnn_jax.config import override, parse

    values = override(load(path), overrides)
    return parse(values, num_devices=_num_devices(), check_weights=check_weights)


def _num_devices() -> int:
    import jax

    try:
        return jax.device_count()
    except RuntimeError as error:
        raise UserError(f"JAX finds no device: {error}") from error


def load(path: Path) -> Mapping[str, Any]:
    """Returns the values that the file's `get_config()` returns.

    Files in a folder `configs` may import each other wherever the command is started. Raises
    ConfigError, with file and line, for whatever the file raises.
    """
    from ml_collections import ConfigDict

    from cnn_jax.config import ConfigError
    from cnn_jax.runtime import programs

    folders = [folder.parent for folder in path.resolve().parents if folder.name == "configs"]
    search_before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in (*folders, Path.cwd())]
    # All folders `configs` are one package, also where an installed package has taken the name.
    package = types.ModuleType("configs")
    package.__path__ = [
        str(found) for place in sys.path if (found := Path(place, "configs")).is_dir()
    ]
    package.__file__ = None
    sys.modules["configs"] = package
    try:
        names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        source = path.read_bytes()
        programs.note_config_file(source)
        exec(compile(source, path, "exec"), names)
        config = names["get_config"]() if "get_config" in names else None
        values = config.to_dict() if isinstance(config, ConfigDict) else config
    except Exception as error:
        raise ConfigError([_located(error, path)]) from error
    finally:
        sys.path[:] = search_before
        for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
            file = sys.modules.pop(name).__file__
            if file:
                programs.note_config_file(Path(file).read_bytes())
    if not isinstance(values, Mapping):
        raise ConfigError([f"{path}: must define get_config() that returns a ConfigDict"])
    return values


def _located(error: Exception, path: Path) -> str:
    """Returns the text of the error behind the place in a config file that it comes from."""
    folder = path.resolve().parent
    places = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().parent == folder
    ]
    if isinstance(error, SyntaxError):
        places.append((error.filename or str(path), error.lineno))
    text = str(error)
    if error.args and isinstance(error.args[0], KeyError):  # what ConfigDict raises, hint and all
        text = str(error.args[0].args[0])
    place = ":".join(map(str, places[-1])) if places else str(path)
    return f"{place}: {type(error).__name__}: {' '.join(text.split())}"
