"""What happens between composing a run's config and running it: check, then claim a folder."""

import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from mnist_lightning.cli import CommandError, quote
from mnist_lightning.config import ConfigError, Train, check
from mnist_lightning.rundir.outside import as_word, check_run, check_sweep
from mnist_lightning.rundir.resume import check_place, check_resumption
from mnist_lightning.rundir.status import hold, is_main_process

ROOM = 20_000  # bytes: where Hydra's record of the settings finds no place, Hydra prints a traceback


class Prepare(Callback):
    """Hydra's hook for both.

    Hydra would make the run's folder, and its log file, before the settings are looked at, and
    would give one folder to two runs that start in the same second.  It turns an ``Exception``
    raised here into a warning, but lets ``SystemExit`` pass.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with told():
            prepare(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with told():
            prepare(config, "sweep")


@contextmanager
def told() -> Iterator[None]:
    """
    Raises:
        SystemExit: with the line of what ``prepare`` raises.
    """
    try:
        yield
    except (ConfigError, CommandError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        sys.exit(str(error))


def prepare(config: DictConfig, kind: str) -> None:
    """Check a composed config (of a single run: a sweep's jobs are checked by its sweeper), and
    point ``hydra.run.dir`` or ``hydra.sweep.dir`` at a folder that is this process's own.

    A folder that the user (or the parent process of a DDP run) named is held from here on, so that of two
    processes one is refused before it has written anything; a new run takes none that an earlier one has
    used.

    Raises:
        ConfigError: the settings are wrong, or the folder can't be made.
        CommandError: the folder is taken.
        SystemExit: with code 0; the run that is to go on has finished.
    """
    folder: Path | None = None
    typed: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)  # ${hydra.job.num} is a job's
    try:
        resumed = False
        if kind == "run":
            settings = check(config, Train)
            resumed = settings.resume is not None
            if resumed:
                check_resumption(settings, typed["task"])
            elif settings.reproduce is not None:
                check_place(settings, Path(settings.reproduce), typed["task"])
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
                if kind == "sweep":  # its jobs' configs are composed anew from these
                    config.hydra.overrides.hydra.append(f"{key}={quote(str(folder))}")
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied", str(folder))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
        if kind == "run" and is_main_process():
            hold(folder)
    except OSError as error:
        if error.strerror is None:  # one of our own
            raise ConfigError(str(error)) from error
        place = error.filename or folder
        raise ConfigError(f"can't write to the run's folder {place}: {error.strerror}") from error


def check_unused(folder: Path) -> None:
    """
    Raises:
        CommandError: an earlier run has left there what a resumption, a logger or a reader would take for
            the new run's.
    """
    for pattern in ("checkpoints/*.ckpt", "metrics.json", "csv/metrics.csv", "tensorboard/events.*"):
        for path in folder.glob(pattern):
            raise CommandError(
                f"{folder} holds an earlier run ({path.relative_to(folder)}):"
                f" resume={as_word(str(folder))} goes on with it, and a new run needs another"
                " hydra.run.dir"
            )


def claim(folder: Path) -> Path:
    """Make a folder that did not exist before: this one, or the first free of ``<name>-2``, ``<name>-3``, …

    Raises:
        OSError: it can't be made.
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
