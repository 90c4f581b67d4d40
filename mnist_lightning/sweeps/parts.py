"""Check a sweep's nets, losses and other parts in a separate process.

The sweep's own process forks its workers, and must therefore not import torch.  Targets and arguments that
``conf/`` uses are known to be right.  All others are imported once, and their arguments are compared with the
signature, whatever the number of jobs.
"""

import functools
import logging
import multiprocessing
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import CompactHydraException

from mnist_lightning.config import CONF_DIR, ConfigError, Train
from mnist_lightning.sweeps.processes import FORKS

log = logging.getLogger(__name__)

# "settings": the settings with a _target_ by key; "monitor": the job's, or None if its mode is known
Parts = dict[str, Any]


def find_parts(settings: Train) -> Parts:
    """Return the parts of a job's settings that must be imported to be checked."""
    everything = asdict(settings)
    named = {group: everything[group] for group in ("model", "loss", "optimizer", "scheduler")}
    named["data.source"] = everything["data"]["source"]
    for group in ("metrics", "callbacks", "logger"):
        named |= {f"{group}.{name}": value for name, value in everything[group].items()}
    strange = {key: value for key, value in named.items() if value and not is_ours(value)}
    monitored = f"metrics.{settings.monitor.metric.removeprefix('val/')}"
    asked = settings.monitor.mode is None or monitored in strange
    if asked:
        strange[monitored] = named[monitored]
    return {
        "settings": {
            key: value
            if key == monitored
            else {name: one if name[0] == "_" else None for name, one in value.items()}
            for key, value in strange.items()
        },  # arguments without values: jobs that differ only in numbers need one check
        "monitor": asdict(settings.monitor) if asked else None,
    }


@functools.cache
def known() -> dict[str, set[str]]:
    """Return the targets that ``conf/`` uses, with the names of the arguments given there."""
    found: dict[str, set[str]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "_target_" in value:
                found.setdefault(value["_target_"], set()).update(value)
            for inner in value.values():
                walk(inner)

    for path in Path(CONF_DIR).rglob("*.yaml"):
        walk(yaml.safe_load(path.read_text(encoding="utf-8")))
    return found


def is_ours(settings: dict[str, Any]) -> bool:
    return set(settings) <= known().get(str(settings.get("_target_")), set())


def check_parts(parts: Parts) -> str | None:
    """Check that the named targets can be imported and take the given arguments.

    Returns:
        "max" or "min", the mode of the monitored metric; None if ``parts`` does not ask for it.

    Raises:
        ConfigError: a target can't be imported, or does not take its arguments.
    """
    if not parts["settings"]:
        return None
    log.info("checking %s …", ", ".join(str(one["_target_"]) for one in parts["settings"].values()))
    context = multiprocessing.get_context("fork") if FORKS else multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(parts, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        mode, error = ours.recv()
    except EOFError:
        process.join()
        keys = ", ".join(parts["settings"])
        mode, error = None, f"{keys}: the process that checks them has exited with code {process.exitcode}"
    process.join()
    if error:
        raise ConfigError(error)
    return None if mode is None else str(mode)


def answer(parts: Parts, connection: Connection) -> None:
    """Check parts in the child process, and send the monitored metric's mode and an error, or None."""
    from mnist_lightning.targets import check_arguments, choose_mode, make

    mode: str | None = None
    try:
        for key, settings in parts["settings"].items():
            check_arguments(settings, key)
        if parts["monitor"]:
            monitor = parts["monitor"]
            key = f"metrics.{monitor['metric'].removeprefix('val/')}"
            metric = make(parts["settings"][key], key, num_classes=2)  # any number: nothing is computed
            mode = choose_mode(monitor["metric"], monitor["mode"], metric.higher_is_better)
    except BaseException as error:  # a user's module may raise anything when it is imported
        told = " ".join(str(error).split())
        ours = isinstance(error, CompactHydraException)
        connection.send((None, told if ours else f"{type(error).__name__}: {told}"))
    else:
        connection.send((mode, None))
