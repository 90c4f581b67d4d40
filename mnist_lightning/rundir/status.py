"""Read and write ``status.json``, which holds a run's state, and lock a run's folder."""

import contextlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_lightning import threads
from mnist_lightning.cli import CommandError
from mnist_lightning.rundir import signals
from mnist_lightning.rundir.atomic import remove_leftovers, write_atomic
from mnist_lightning.rundir.outside import as_text, check_inside, is_number, read_json

if TYPE_CHECKING:
    from filelock import FileLock

FILE, LOCK = "status.json", ".lock"
STATES = ("running", "completed", "failed", "interrupted", "pruned")
GONE = "its process is gone"  # the run was killed, or could not write its last status
LATEST = 2**34  # seconds since 1970, in the year 2514
GLANCE = 0.02  # seconds for which checking a lock may hold it
_held: dict[Path, "FileLock"] = {}  # locks from ``hold`` that no ``lock`` has taken over
Metrics = dict[str, float]


class Pruned(Exception):
    """A search has stopped this run, because others were better at the same epoch."""


@dataclass
class Status:
    """The content of ``status.json``.

    Attributes:
        state: "running", "completed", "failed", "interrupted" (Ctrl-C, SIGTERM) or "pruned".
        error: why the run did not complete, in one line; None without an error.
        overrides: the overrides of the run's command line, in Hydra's syntax.
        started: the start in seconds since 1970-01-01 UTC.
        seconds: from start to end, without the time that a sweep's job has waited for free cores.
        metrics: the numbers of ``metrics.json``.
        monitor: the metric that chose the best epoch; like ``mode``, None until the run has completed.
        mode: "max" or "min": whether a large or a small ``monitor`` is good.
    """

    state: str = "running"
    error: str | None = None
    overrides: list[str] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    monitor: str | None = None
    mode: str | None = None

    def write(self, run_dir: Path) -> None:
        """Write atomically: readers see the old file or the new one.

        Raises:
            OSError: the folder can't be written.
        """
        write_atomic(run_dir / FILE, (json.dumps(asdict(self), indent=2) + "\n").encode())


def show_value(metric: str, mean: float, std: float = math.nan) -> str:
    """Format a metric's value, and its standard deviation if given; accuracies become percentages."""
    scale, digits = (100, 2) if metric.endswith("acc") else (1, 4)
    spread = "" if math.isnan(std) else f" ± {scale * std:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def show_with_unit(metric: str, value: float) -> str:
    """Format a metric's value, with " %" after an accuracy."""
    return show_value(metric, value) + (" %" if metric.endswith("acc") else "")


def read(run_dir: Path) -> Status | None:
    """Read a run's status, or return None if the run has written none.

    A status that says "running" while no process holds the folder becomes "interrupted", because the run was
    killed.  A damaged status becomes "interrupted" with an error that says so.
    """
    if not os.path.lexists(run_dir / FILE):
        return None
    try:
        status = parse(read_json(run_dir / FILE))
    except (OSError, TypeError):
        status = Status("interrupted", f"its {FILE} is damaged")
    if status.state == "running" and not is_locked(run_dir):
        status.state, status.error = "interrupted", GONE
    return status


def parse(saved: dict[str, Any]) -> Status:
    """Parse a ``status.json``; control characters in its texts are escaped.

    Raises:
        TypeError: a key or a value is not one that a run writes.
    """
    status = Status(**saved)
    overrides, metrics = status.overrides, status.metrics
    if (
        status.state not in STATES
        or not all(one is None or isinstance(one, str) for one in (status.error, status.monitor, status.mode))
        or not (isinstance(overrides, list) and all(isinstance(one, str) for one in overrides))
        or not (isinstance(metrics, dict) and all(map(is_number, metrics.values())))
        or not all(is_number(one) and 0 <= one < LATEST for one in (status.started, status.seconds))
    ):
        raise TypeError("values of other types")
    status.error = None if status.error is None else as_text(status.error)
    status.overrides = [as_text(one) for one in overrides]
    status.metrics = {as_text(name): value for name, value in metrics.items()}
    return status


@contextmanager
def track(
    run_dir: Path, overrides: Sequence[str], *, in_sweep: bool, resumed: bool = False
) -> Iterator[Status]:
    """Keep ``status.json`` up to date while a run goes on, and lock the run's folder.

    Args:
        run_dir: the run's folder, which must exist.
        overrides: the overrides of the run's command line.
        in_sweep: whether the run is a job of a sweep.  Then an error is raised as a ``CommandError`` of one
            line, so that the other jobs continue; an interruption still ends the sweep.  Hydra keeps the
            exception, so the frames of its causes are dropped, and the run's tensors with them.
        resumed: whether the run is resumed; its status then keeps the overrides of the first command line.

    Yields:
        the status, whose metrics the caller fills in.

    Raises:
        CommandError: another process holds the folder, or a sweep's job has failed or was pruned.
    """
    if not is_main_process():
        yield Status()
        return
    before = read(run_dir) if resumed and not in_sweep else None
    status = Status(overrides=before.overrides if before else list(overrides))  # not "resume="
    status.started = time.time()
    start = time.monotonic() - threads.waited
    with lock(run_dir):
        remove_leftovers(run_dir)
        # Ignore a disk that is full or read-only: training itself stops with an error that says more.
        with contextlib.suppress(OSError):
            status.write(run_dir)
        try:
            yield status
            status.state = "completed"
        except BaseException as error:
            status.state, status.error = describe(error)
            if not in_sweep or status.state == "interrupted":
                raise
            if isinstance(error, SystemExit):
                with (
                    contextlib.suppress(OSError),
                    (run_dir / "train.log").open("a", encoding="utf-8") as file,
                ):
                    traceback.print_exc(file=file)
            forget(error)
        finally:
            status.seconds = round(time.monotonic() - threads.waited - start, 3)
            with contextlib.suppress(OSError):
                status.write(run_dir)
    if in_sweep and status.error is not None:
        raise CommandError(status.error)


def forget(error: BaseException | None) -> None:
    """Drop the frames of an exception and of its causes, which keep the run's tensors in memory."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def describe(error: BaseException) -> tuple[str, str]:
    """Return the state and the error line of a run that ended with this exception."""
    # the codes with which submitit exits after queueing the job again, on SLURM and on its local cluster
    requeued = "submitit" in sys.modules and isinstance(error, SystemExit) and error.code in (-1, 144)
    if signals.received() or requeued:
        return "interrupted", f"interrupted by {signals.name_received() or 'its cluster'}"
    if isinstance(error, Pruned):
        return "pruned", str(error)
    line = " ".join(str(error).split())
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        return "failed", f"something called sys.exit({'' if error.code is None else error.code})"
    if isinstance(error, (CommandError, SystemExit)):
        return "failed", line
    return "failed", f"{type(error).__name__}: {line}"


def is_main_process() -> bool:
    """Return False in the processes that ``trainer=ddp`` adds to a run, otherwise True."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a folder within the block; the system releases the lock if the process ends earlier.

    A forked child (a worker of a sweep or of a data loader) does not inherit the lock, because filelock
    closes the child's copies.  The folder is therefore free as soon as the process that locked it is gone.

    Raises:
        CommandError: another process holds the folder.
        OSError: the lock file is a link out of the folder.
    """
    hold(folder)
    mutex = _held.pop(folder.absolute(), None)  # so that no other thread of this process has the lock
    try:
        yield
    finally:
        if mutex is not None:
            mutex.release()


def hold(folder: Path) -> None:
    """Lock a folder until the next block of ``lock`` for it ends, or the process does.

    Raises:
        CommandError: another process holds the folder.
        OSError: the lock file is a link out of the folder.
    """
    from filelock import FileLock, Timeout

    if folder.absolute() in _held:
        return
    check_inside(folder, [LOCK])
    mutex = FileLock(folder / LOCK, timeout=GLANCE * 10, poll_interval=GLANCE, thread_local=False)
    try:
        mutex.acquire()
    except Timeout as error:
        raise CommandError(f"another process is using {folder}") from error
    except OSError:  # the disk is full, see ``track``
        return
    _held[folder.absolute()] = mutex


def let_go(folder: Path) -> None:
    """Release a lock from ``hold`` that no ``lock`` has taken over."""
    mutex = _held.pop(folder.absolute(), None)
    if mutex is not None:
        mutex.release()


def is_locked(folder: Path) -> bool:
    """Tell whether a process holds a folder; return False if that is unknown."""
    if not (folder / LOCK).is_file() or (folder / LOCK).is_symlink():
        return False
    from filelock import FileLock, Timeout

    try:  # with patience: another process may check the lock at the same moment
        with FileLock(folder / LOCK, timeout=GLANCE, poll_interval=GLANCE / 4, thread_local=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False
