"""List the runs under a folder as plain records, with the help of an index file that is quick to read."""

import contextlib
import datetime
import functools
import json
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_lightning.config import CONF_DIR, Train, check, register
from mnist_lightning.rundir.atomic import LONG_LEFT, TEMPORARY, write_atomic
from mnist_lightning.rundir.find import lack_of
from mnist_lightning.rundir.outside import expand_home, is_number, read_file
from mnist_lightning.rundir.record import SETTINGS
from mnist_lightning.rundir.status import FILE, is_locked
from mnist_lightning.settings_help import WHERE, flatten
from mnist_lightning.targets import is_finite

log = logging.getLogger(__name__)

INDEX = ".runs.json"
VERSION = 1  # of the index; an index of another version is built again
MULTIRUN = "multirun.yaml"
LARGEST = 4_000_000  # bytes; larger status and settings files are not read
MANY = 300  # a bar is shown when at least this many runs are read
STATES = ("running", "completed", "failed", "interrupted", "pruned")

Record = dict[str, Any]
Stamp = list[int]  # a file's time of change in nanoseconds, size in bytes, and inode


def list_runs(under: str | Path = "logs") -> list[Record]:
    """List every run and every job of a sweep under a folder, the newest first.

    The records are plain dictionaries with the same keys, ready for ``pandas.DataFrame`` or
    ``polars.DataFrame``: "run" (its folder), "when" (its start in local time, ISO 8601), "changed" (the
    overrides that differ from the defaults), "state", "seconds", "error", "sweep" (its folder, or None), each
    number in ``metrics.json`` ("val/acc" in [0, 1]) and each setting ("model.hidden").  A value that a run
    does not have is None.

    Args:
        under: the folder to search; links in it are not followed.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    under = expand_home(under)
    if why := lack_of("folder", under):
        raise FileNotFoundError(f"{under} holds no runs: {why}")
    base, entries = update_index(under)
    defaults, choices = find_defaults()
    return complete(
        [make_record(under, place, one, base, defaults, choices) for place, one in entries.items()]
    )


def read_runs(folders: Iterable[Path]) -> list[Record]:
    """Return the records of the given runs, in the form of ``list_runs``.

    Raises:
        FileNotFoundError: a folder is not a run's, or its status can't be read.
    """
    defaults, choices = find_defaults()
    records = []
    for folder in folders:
        entry = read_entry(folder)
        if entry is None:
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {FILE} that can be read")
        entry |= {"settings": pack(entry["settings"], {}), "in_sweep": (folder.parent / MULTIRUN).is_file()}
        records.append(make_record(folder.parent, folder.name, entry, {}, defaults, choices))
    return complete(records)


def complete(records: list[Record]) -> list[Record]:
    """Give all records the same keys, and sort them, the newest first."""
    names: set[str] = set()
    for record in records:
        names |= record.keys()
    ordered = list(dict.fromkeys([*(records[0] if records else ()), *sorted(names)]))
    blank = dict.fromkeys(ordered)
    full = [record if len(record) == len(blank) else {**blank, **record} for record in records]
    return sorted(full, key=lambda record: record["when"] or "", reverse=True)


def make_record(
    under: Path,
    place: str,
    entry: Mapping[str, Any],
    base: Mapping[str, Any],
    defaults: Mapping[str, Any],
    choices: Mapping[str, Any],
) -> Record:
    state, error = entry["state"], entry["error"]
    folder = os.path.join(under, place)
    if state == "running" and not is_locked(Path(folder)):
        state, error = "interrupted", "its process is gone"
    try:
        moment = datetime.datetime.fromtimestamp(entry["started"])
        when = moment.isoformat(" ", "seconds") if entry["started"] else None
    except (ValueError, OverflowError, OSError):  # a damaged file can hold any number
        when = None
    return {
        "run": folder,
        "when": when,
        "changed": tell_changes(entry["overrides"], defaults, choices),
        "state": state,
        "seconds": entry["seconds"],
        "error": error,
        "sweep": os.path.dirname(folder) if entry["in_sweep"] else None,
        **unpack(entry["settings"], base),
        **entry["metrics"],
    }


def tell_changes(overrides: Sequence[str], defaults: Mapping[str, Any], choices: Mapping[str, Any]) -> str:
    """Return the overrides that differ from the defaults, as typed, joined by spaces."""
    told = []
    for override in overrides:
        key, sign, text = override.lstrip("+").partition("=")
        if key in WHERE or key.startswith("hydra"):
            continue
        default = choices[key] if key in choices else defaults.get(key)
        known = key in choices or key in defaults
        if not (sign and known and equals(read_value(text), default)):
            told.append(key + sign + (text.lower() if text in ("True", "False") else text))
    return " ".join(told)


@functools.lru_cache(maxsize=65_536)
def read_value(text: str) -> Any:
    """Parse a value as YAML, numbers such as 1e-3 included; return the text itself if it is not YAML."""
    if re.fullmatch(r"[A-Za-z_/][\w/-]*", text) and text.lower() not in (
        *("null", "true", "false", "yes", "no", "on", "off", "y", "n"),
    ):
        return text
    if re.fullmatch(r"[-+]?([1-9]\d*|0)", text):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text)
    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, KeyError, TypeError, RecursionError):
        return text


def equals(value: Any, other: Any) -> bool:
    """Tell whether two settings are the same; 256 equals [256], but true does not equal 1."""
    if isinstance(value, list) != isinstance(other, list):
        value, other = ([one] if not isinstance(one, list) else one for one in (value, other))
    if isinstance(value, list):
        return len(value) == len(other) and all(map(equals, value, other))
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


@functools.cache
def find_defaults() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the defaults of ``train``: each setting, and the chosen file of each config group."""
    register()
    started = contextlib.nullcontext() if GlobalHydra.instance().is_initialized() else None
    with started or initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("train", return_hydra_config=True)
    choices = {
        str(group): choice
        for group, choice in cfg.hydra.runtime.choices.items()
        if not str(group).startswith("hydra/")
    }
    return flatten(asdict(check(cfg, Train))), choices


def update_index(under: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Bring the index up to date, and return its entries.

    The index is written again if anything has changed.  If it can't be written, it is not used.

    Returns:
        the settings that most runs share, and the entry of each run by its path relative to ``under``.  The
        settings in an entry are packed, see ``pack``.
    """
    base, known = load_index(under / INDEX)
    entries: dict[str, dict[str, Any]] = {}
    missing: list[tuple[str, list[Stamp | None], bool]] = []
    for place, stamps, in_sweep in find_folders(under):
        entry = known.get(place)
        if entry is not None and entry["stamps"] == stamps and entry["in_sweep"] == in_sweep:
            entries[place] = entry
        else:
            missing.append((place, stamps, in_sweep))
    stale = bool(missing) or len(entries) != len(known)
    for place, stamps, in_sweep in watch(missing):
        content = read_entry(under / place)
        if content is None:
            log.warning("%s can't be read: the run is left out", under / place / FILE)
            continue
        base = base or content["settings"]
        content["settings"] = pack(content["settings"], base)
        entries[place] = {"stamps": stamps, "in_sweep": in_sweep, **content}
    if stale:
        save_index(under / INDEX, base, entries)
    return base, entries


def watch(missing: Sequence[Any]) -> Iterator[Any]:
    """Yield the runs to read, and show a bar on a terminal if there are many."""
    if len(missing) < MANY or not sys.stderr.isatty():
        yield from missing
        return
    from tqdm import tqdm

    yield from tqdm(missing, desc="reading runs", unit="run", leave=False, dynamic_ncols=True)


def find_folders(under: Path) -> Iterator[tuple[str, list[Stamp | None], bool]]:
    """Yield the relative path of each run, the stamps of its files, and whether it is a job of a sweep.

    The search opens no file, follows no link, and does not search within a run's folder.
    """
    open_folders = [("", False)]
    while open_folders:
        place, in_sweep = open_folders.pop()
        folder = os.path.join(under, place)
        stamp = read_stamp(os.path.join(folder, FILE)) if place else None
        if stamp is not None:
            yield place, [stamp, read_stamp(os.path.join(folder, SETTINGS))], in_sweep
            continue
        with contextlib.suppress(OSError), os.scandir(folder) as scan:
            found = list(scan)
            is_sweep = any(one.name == MULTIRUN for one in found)
            for one in found:
                if not one.name.startswith(".") and one.is_dir(follow_symlinks=False):
                    open_folders.append((os.path.join(place, one.name), is_sweep))


def read_stamp(path: str) -> Stamp | None:
    """Return a file's time of change, size and inode, or None if it is not a regular file."""
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return [found.st_mtime_ns, found.st_size, found.st_ino]


def read_entry(folder: Path) -> dict[str, Any] | None:
    """Read a run's files and return its entry, or None if its status can't be read."""
    status = read_object(folder / FILE)
    if status is None or status.get("state") not in STATES:
        return None
    saved = read_object(folder / SETTINGS) or {}
    settings = saved.get("settings") if isinstance(saved.get("settings"), dict) else None
    choices = saved.get("choices") if isinstance(saved.get("choices"), dict) else None
    overrides = status.get("overrides")
    metrics = status.get("metrics")
    entry = {
        "state": status["state"],
        "error": status["error"] if isinstance(status.get("error"), str) else None,
        "overrides": [one for one in overrides if isinstance(one, str)]
        if isinstance(overrides, list)
        else [],
        "started": read_number(status.get("started")),
        "seconds": read_number(status.get("seconds")),
        "metrics": {key: value for key, value in metrics.items() if is_number(value)}
        if isinstance(metrics, dict)
        else {},
    }
    if settings is None:  # an earlier version, which saved only the overrides, trained this run
        pairs = (one.lstrip("+").partition("=") for one in entry["overrides"])
        settings = {key: read_value(text) for key, sign, text in pairs if sign}
        choices = {}
    entry["settings"] = {**settings, **(choices or {})}  # scheduler=none leaves {} as its settings
    return entry


def read_object(path: Path, *, most: int = LARGEST) -> dict[str, Any] | None:
    """Read a JSON object, or return None if the file is a link, is too large or holds something else."""
    try:
        content = json.loads(read_file(path, most=most)) if not path.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_number(value: Any) -> float:
    return float(value) if is_finite(value) else 0.0


def load_index(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read the settings that most runs share, and the entries; both are empty if the index is missing,
    damaged, or of another version."""
    content = read_object(path, most=2**30)
    try:
        if content is not None and content["version"] == VERSION and isinstance(content["base"], dict):
            entries = content["runs"]
            if all(map(is_entry, entries.values())):
                return content["base"], entries
    except (KeyError, TypeError, AttributeError):
        pass
    return {}, {}


def is_entry(entry: Mapping[str, Any]) -> bool:
    return (
        entry["state"] in STATES
        and isinstance(entry["in_sweep"], bool)
        and isinstance(entry["stamps"], list)
        and (entry["error"] is None or isinstance(entry["error"], str))
        and isinstance(entry["started"], float)
        and isinstance(entry["seconds"], float)
        and isinstance(entry["metrics"], dict)
        and all(map(is_number, entry["metrics"].values()))
        and isinstance(entry["overrides"], list)
        and all(isinstance(one, str) for one in entry["overrides"])
        and list(map(type, entry["settings"])) == [dict, list]
        and all(isinstance(key, str) for key in entry["settings"][1])
    )


def save_index(path: Path, base: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
    content = {"version": VERSION, "base": base, "runs": entries}
    try:
        for left in path.parent.glob(f"{TEMPORARY}{path.name}-*"):  # a killed process may have left them
            if time.time() - left.lstat().st_mtime >= LONG_LEFT:
                left.unlink()
        write_atomic(path, json.dumps(content, separators=(",", ":")).encode())
    except OSError as error:
        log.info("the index can't be written: %s", error)


def pack(settings: Mapping[str, Any], base: Mapping[str, Any]) -> list[Any]:
    """Return the settings that differ from ``base``, and the keys of ``base`` that are missing."""
    others = {key: value for key, value in settings.items() if key not in base or base[key] != value}
    return [others, [key for key in base if key not in settings]]


def unpack(packed: Sequence[Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that ``pack`` was given."""
    others, gone = packed
    settings = {**base, **others}
    for key in gone:
        settings.pop(key, None)
    return settings
