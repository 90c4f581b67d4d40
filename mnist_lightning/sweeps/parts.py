"""Are a sweep's nets, losses and metrics what their settings say?  Asked of a process of its own.

The sweep's process starts workers by forking and so must not import torch.  What ``conf/`` names is known to
be right; all else is imported and held against its signature once, whatever the number of jobs.
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

# "settings": key -> settings with a _target_; "monitor": of the job, where the metric is to be asked
Parts = dict[str, Any]


def find_parts(settings: Train) -> Parts:
    """The parts of a job's settings that have to be imported to be checked."""
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
        },  # names alone: jobs that differ in a number need not be checked one by one
        "monitor": asdict(settings.monitor) if asked else None,
    }


@functools.cache
def known() -> dict[str, set[str]]:
    """The targets that ``conf/`` names, with the arguments given there."""
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
        "max" or "min", what the monitored metric says of itself, if it was asked.

    Raises:
        ConfigError: it can't, or does not.
    """
    if not parts["settings"]:
        return None
    log.info("looking at %s …", ", ".join(str(one["_target_"]) for one in parts["settings"].values()))
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
        mode, error = None, f"{keys}: the process that looks at them has left with code {process.exitcode}"
    process.join()
    if error:
        raise ConfigError(error)
    return None if mode is None else str(mode)


def answer(parts: Parts, connection: Connection) -> None:
    """In the child process: send the mode of the monitored metric and what is wrong, or None."""
    from mnist_lightning.targets import check_arguments, choose_mode, make

    mode: str | None = None
    try:
        for key, settings in parts["settings"].items():
            check_arguments(settings, key)
        if parts["monitor"]:
            monitor = parts["monitor"]
            key = f"metrics.{monitor['metric'].removeprefix('val/')}"
            metric = make(parts["settings"][key], key, num_classes=2)  # of any number: it is only asked
            mode = choose_mode(monitor["metric"], monitor["mode"], metric.higher_is_better)
    except BaseException as error:  # whatever a user's module does when it is imported
        told = " ".join(str(error).split())
        ours = isinstance(error, CompactHydraException)
        connection.send((None, told if ours else f"{type(error).__name__}: {told}"))
    else:
        connection.send((mode, None))
