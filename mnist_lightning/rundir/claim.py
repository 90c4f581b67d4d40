"""Check a composed config and claim a folder, before the run starts."""

import itertools
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from mnist_lightning import threads
from mnist_lightning.cli import CommandError, quote
from mnist_lightning.config import ConfigError, Train, check
from mnist_lightning.rundir.outside import as_word, check_run, check_sweep
from mnist_lightning.rundir.resume import check_place, check_resumption
from mnist_lightning.rundir.status import hold, is_main_process
from mnist_lightning.trust import TrustError, read_trust

# Bytes of memory to have for another process of a run, and for another worker of its loaders.  On Linux they
# take 0.2e9 and 0.01e9 of their own, to which the images, the net and its gradients come.
PROCESS, WORKER = 0.5e9, 0.02e9
ROOM = 20_000  # free bytes that the folder needs: without room for its records, Hydra prints a traceback


class Prepare(Callback):
    """Call ``prepare`` before Hydra starts a run or a sweep.

    Without it, Hydra would make the run's folder and its log file before the settings are checked, and would
    give the same folder to two runs that start in the same second.  Hydra turns an ``Exception`` raised here
    into a warning, but lets ``SystemExit`` pass.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with told():
            prepare(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with told():
            prepare(config, "sweep")


@contextmanager
def told() -> Iterator[None]:
    """Turn an error of ``prepare`` into one line.

    Raises:
        SystemExit: with that line.
    """
    try:
        yield
    except (ConfigError, CommandError, TrustError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        sys.exit(str(error))


def prepare(config: DictConfig, kind: str) -> None:
    """Check a composed config, and claim a folder for its run or sweep.

    A single run's settings are checked here; a sweep's jobs are checked by the sweeper.  ``hydra.run.dir`` or
    ``hydra.sweep.dir`` is changed to a new folder, unless the user (or the parent process of a DDP run) named
    one.  A run locks its folder from here on, so that a second process is refused before it writes anything.
    A new run refuses a folder that an earlier run has used.

    Args:
        kind: "run" or "sweep".

    Raises:
        ConfigError: the settings are wrong, or the folder can't be made or written.
        TrustError: ``trust`` names no module.
        CommandError: another process or an earlier run uses the folder.
        SystemExit: with code 0; the run to resume has already finished.
    """
    folder: Path | None = None
    typed: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)  # ${hydra.job.num} is a job's
    try:
        resumed = False
        if kind == "run":
            settings = check(config, Train)
            read_trust(settings.trust)
            if is_main_process():
                check_processes(settings)
            resumed = settings.resume is not None
            if resumed:
                check_resumption(settings, typed["task"])
            elif settings.reproduce is not None:
                check_place(settings, Path(settings.reproduce), typed["task"])
        check_hydra(config, kind)
        key = f"hydra.{kind}.dir"
        folder = Path(OmegaConf.select(config, key))
        named = any(str(override).startswith(f"{key}=") for override in typed["hydra"])
        if named:
            folder.mkdir(parents=True, exist_ok=True)
            (check_run if kind == "run" else check_sweep)(folder)
            if kind == "run" and not resumed and is_main_process():
                check_unused(folder)
        else:
            folder = claim(folder)
            with read_write(config), open_dict(config):
                OmegaConf.update(config, key, str(folder))
                if kind == "sweep":  # Hydra composes the config of each job from these overrides
                    config.hydra.overrides.hydra.append(f"{key}={quote(str(folder))}")
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied", str(folder))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
        if kind == "run" and is_main_process():
            hold(folder)
    except OSError as error:
        if error.strerror is None:  # our own code raised it
            raise ConfigError(str(error)) from error
        place = error.filename or folder
        raise ConfigError(f"can't write to the run's folder {place}: {error.strerror}") from error


def check_hydra(config: DictConfig, kind: str) -> None:
    """Check those of Hydra's own settings that end in a traceback, in an old folder, or in no way to resume.

    Raises:
        ConfigError: one can't be used.
    """
    for plugin in ("sweeper", "launcher") if kind == "sweep" else ():
        target = str(OmegaConf.select(config, f"hydra.{plugin}._target_"))
        if not target.startswith(("hydra_plugins.", "hydra._internal.")):
            raise ConfigError(f"hydra.{plugin}._target_={target} is no plugin of Hydra")
    if not str(OmegaConf.select(config, f"hydra.{kind}.dir")):
        raise ConfigError(f"hydra.{kind}.dir must not be empty")
    kept = config.hydra.output_subdir
    if is_main_process() and str(kept).partition("/")[0] != ".hydra":  # Lightning's other processes keep none
        raise ConfigError(
            f"hydra.output_subdir must be .hydra, from where a run's settings are read again, got {kept}"
        )


def check_processes(settings: Train) -> None:
    """Check that the processes that a run would start fit into the memory of this machine.

    Raises:
        ConfigError: there are too many.
    """
    devices, workers = str(settings.trainer.get("devices")), settings.data.num_workers
    processes = int(devices) if re.fullmatch(r"[1-9]\d{0,99}", devices) else 1  # others are not for CPUs
    if lack := threads.tell_lack(PROCESS * (processes - 1) + WORKER * 2 * workers * processes):
        raise ConfigError(
            f"trainer.devices={devices} with data.num_workers={workers} starts processes that take {lack}"
        )


def check_unused(folder: Path) -> None:
    """Check that no earlier run has left files in a folder that could be mistaken for the new run's.

    Raises:
        CommandError: there are such files.
    """
    for pattern in ("checkpoints/*.ckpt", "metrics.json", "csv/metrics.csv", "tensorboard/events.*"):
        for path in folder.glob(pattern):
            raise CommandError(
                f"{folder} holds an earlier run ({path.relative_to(folder)}):"
                f" resume={as_word(str(folder))} continues it, and a new run needs another"
                " hydra.run.dir"
            )


def claim(folder: Path) -> Path:
    """Make a new folder and return its path: ``folder``, or the first free of ``<name>-2``, ``<name>-3``, …

    Raises:
        OSError: the folder can't be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable")
