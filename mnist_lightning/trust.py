"""Decide which code a checkpoint or saved settings may import, and where they may write.

Settings that the user types or keeps in ``conf/`` or in ``--config-dir`` are trusted.  Checkpoints and saved
settings may come from anywhere.  Each of their settings may name only classes of its kind (nets, losses, …)
in this project and its libraries, and modules that the user trusts by ``trust=my_nets`` or the environment
variable ``MNIST_LIGHTNING_TRUST``.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_lightning.cli import retype
from mnist_lightning.config import RUN_DIR
from mnist_lightning.rundir.outside import expand_home
from mnist_lightning.settings_help import flatten
from mnist_lightning.targets import KINDS, TARGET, find_targets

VARIABLE = "MNIST_LIGHTNING_TRUST"
KEY = "trust="
# Arguments that name a file or folder to write, in loggers, callbacks and profilers of Lightning and ours
PLACES = (
    "dirpath",
    "save_dir",
    "default_root_dir",
    "log_dir",
    "root_dir",
    "output_dir",
    "run_dir",
    "path",
    "filename",
)
WRITERS = ("trainer", "callbacks", "logger")  # groups whose classes write files
ELSEWHERE = r"\$\{(data(\.data_dir)?|resume)\}"  # paths that may be anywhere, because they are only read
PROCESSES = ("data.num_workers", "trainer.devices")  # settings that start processes on this machine
OURS = r"\$\{(run_dir:|single_run:|[A-Za-z_][\w.]*)\}"  # interpolations that stay within the settings


class TrustError(CompactHydraException):
    """A file names code or a path that is not trusted; Hydra prints the message without a traceback."""


def read_trust(trust: Any) -> tuple[str, ...]:
    """Return the modules that the user trusts, by the setting and by the environment variable.

    Args:
        trust: the setting: None, a module or a list of modules.

    Raises:
        TrustError: the setting or the variable holds something else.
    """
    names = [] if trust is None else trust if isinstance(trust, list) else [trust]
    names = [*names, *re.split(r"[\s,]+", os.environ.get(VARIABLE, ""))]
    for name in names:
        if not isinstance(name, str) or (name and not re.fullmatch(r"\w+(\.\w+)*", name)):
            raise TrustError(
                f"trust must be a module or a list of modules, as in trust=my_nets, got {name!r}"
            )
    return tuple(name for name in names if name)


def typed_trust(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the modules that ``trust=…`` on a command line and the environment variable name."""
    values = [one.lstrip("+").removeprefix(KEY) for one in arguments if one.lstrip("+").startswith(KEY)]
    typed = values[-1].strip("[]'\"") if values else ""
    return read_trust([name.strip(" '\"") for name in typed.split(",") if name and name != "null"])


def check_recipe(recipe: Mapping[str, Any], source: Path, trust: Collection[str]) -> None:
    """Check that the settings in a checkpoint name only trusted code.

    Args:
        recipe: settings in a checkpoint, by group.
        source: the checkpoint's file, for messages.
        trust: modules that the user trusts.

    Raises:
        TrustError: the settings name code that is not trusted, or hold an interpolation ``${…}``.
    """
    for key, text in find_texts(recipe):
        if "${" in text:
            raise TrustError(f"{source} is refused: its {key} is {text}, which only a settings file may hold")
    check_targets(recipe, source, trust)


def check_settings(
    config: Mapping[str, Any], folder: Path, trust: Collection[str], *, typed: Collection[str] = ()
) -> None:
    """Check the settings that are saved in a run's folder before the run is resumed.

    Args:
        config: the saved settings, not resolved.
        folder: the run's folder.
        trust: modules that the user trusts.
        typed: keys on the command line, whose saved values are not used.

    Raises:
        TrustError: the settings name code that is not trusted, look up values outside the settings, or name
            a path outside the folder.
    """
    for key, text in find_texts(config):
        if key in typed:
            continue
        builds = key.split(".")[0] in KINDS
        if "${" in re.sub(OURS, "", text) or (builds and re.search(ELSEWHERE, text)):
            raise TrustError(
                f"{folder}: its saved {key}={text} looks up a value outside the run's settings; {say(key)}"
            )
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise TrustError(f"{folder}: its settings can't be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    for key, text in find_texts(resolved):
        if key.split(".")[0] in KINDS and key not in typed and not stays_inside(key, text, folder):
            raise TrustError(f"{folder}: its saved {key}={text} is a path outside that folder; {say(key)}")
    flat, processors = flatten(resolved), os.cpu_count() or 1
    for key in (key for key in PROCESSES if key not in typed):
        if re.fullmatch(r"\d+", f"{flat.get(key)}") and int(flat[key]) > processors:
            raise TrustError(
                f"{folder}: {key}={flat[key]} is saved there, and this machine has {processors} processors;"
                f" {say(key)}"
            )
    check_targets({str(key): value for key, value in resolved.items()}, folder, trust, typed=typed)


def say(key: str) -> str:
    return f"if it is right, type it: {retype(f'{key}=…')}"


def stays_inside(key: str, text: str, folder: Path) -> bool:
    """Whether a saved value names no path outside the run's folder.

    Args:
        key: the setting.
        text: its value, resolved or with ``${run_dir:}``.
        folder: the run's folder.
    """
    text = text.replace("${run_dir:}", RUN_DIR)
    parts = re.split(r"[/\\]", text)
    if parts[0] == RUN_DIR:
        place = os.path.realpath(folder.joinpath(*parts[1:]))  # follows a link in the folder
        return ".." not in parts and Path(place).is_relative_to(os.path.realpath(folder))
    if key.split(".")[0] in WRITERS and ("._args_[" in key or "$" in text):
        return False  # it may be a path: an argument without a name, or one that the library expands
    is_path = len(parts) > 1 and (parts[0] in ("", "~", ".", "..") or parts[0].endswith(":") or ".." in parts)
    if "://" in text or text.startswith("~") or is_path or text == "..":
        try:
            place = os.path.realpath(expand_home(text))
        except OSError:
            return False
        return "://" not in text and Path(place).is_relative_to(os.path.realpath(folder))
    name = key.rpartition(".")[2]
    return name not in PLACES or (name == "filename" and len(parts) == 1)


def check_targets(
    config: Mapping[str, Any], source: Path, trust: Collection[str], *, typed: Collection[str] = ()
) -> None:
    """Check each ``_target_`` in settings.

    Args:
        config: settings by group.
        source: where they are saved, for messages.
        trust: modules that the user trusts.
        typed: keys on the command line, which are trusted.

    Raises:
        TrustError: a ``_target_`` is neither trusted nor of the kind that its setting needs.
    """
    strangers = {
        name: key
        for key, name, known in find_targets(config)
        if not (known or f"{key}.{TARGET}" in typed or is_trusted(name, trust))
    }
    if strangers:
        named = ", ".join(f"{name} ({key})" for name, key in strangers.items())
        modules = [name.rpartition(".")[0] or name for name in strangers]
        raise TrustError(
            f"{source} names {named}, which may be anybody's code; if you trust it:"
            f" {retype(write_trust([*trust, *modules]))}"
        )


def is_trusted(name: str, trust: Collection[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in trust)


def write_trust(modules: Collection[str]) -> str:
    """Format ``trust=…`` as the user would type it."""
    names = list(dict.fromkeys(modules))
    return KEY + (names[0] if len(names) == 1 else f"[{','.join(names)}]")


def find_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all texts in nested settings by dotted key, including keys that hold an interpolation."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(name, str) and "${" in name:
                yield key, name
            yield from find_texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from find_texts(inner, f"{key}[{position}]")
    elif isinstance(value, str):
        yield key, value
