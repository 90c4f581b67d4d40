"""Read and write ``status.json``, a run's state, in its folder."""

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
GONE = "its process is gone"  # of a run that was killed, or could not write its end
LATEST = 2**34  # seconds since 1970, in the year 2514
GLANCE = 0.02  # seconds that a look at a lock may hold it
_held: dict[Path, "FileLock"] = {}  # see hold
Metrics = dict[str, float]


class Pruned(Exception):
    """A search has given this run up: others were better at the same epoch."""


@dataclass
class Status:
    """What ``status.json`` holds.

    Attributes:
        state: "running", "completed", "failed", "interrupted" (Ctrl-C, SIGTERM) or "pruned".
        error: in one line; None where there is none.
        overrides: of the run's command line, in Hydra's syntax.
        started: seconds since 1970-01-01 UTC.
        seconds: from start to end, without those that a sweep's job has waited for free cores.
        metrics: the numbers of ``metrics.json``.
        monitor, mode: the metric that chose the best epoch, and whether it was to become "max" or "min"; None
            until the run has completed.
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
    """A metric's value; accuracies in percent."""
    scale, digits = (100, 2) if metric.endswith("acc") else (1, 4)
    spread = "" if math.isnan(std) else f" ± {scale * std:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def show_with_unit(metric: str, value: float) -> str:
    """A metric's value where no heading tells that accuracies are percentages."""
    return show_value(metric, value) + (" %" if metric.endswith("acc") else "")


def read(run_dir: Path) -> Status | None:
    """A run's status, or None where it has left none; of one that is damaged, that it is.

    A run that says "running" while no process holds its folder was killed: it is "interrupted".
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
        TypeError: it says what no run does.
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
    """Keep ``status.json`` while a run goes on, and hold the run's folder against a second process.

    Args:
        run_dir: exists.
        overrides: of the run's command line.
        resumed: whether the run goes on with what lies in its folder: then its first command line stays.
        in_sweep: whatever ends the run early is raised as a ``CommandError`` of one line, so that
            the other jobs go on; but an interruption ends the sweep too.  Hydra keeps the exception:
            the frames of its causes, with the run's tensors, are let go.

    Yields:
        The status, for its metrics to be filled in.
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
        # A disk that is full or read-only stops the training itself, with an error that says more.
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
    """Drop the frames of an exception and of those before it, and with them their tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def describe(error: BaseException) -> tuple[str, str]:
    """State and error line of a run that ended with this exception."""
    # submitit has queued its job again: on SLURM, and where it plays the cluster itself
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
    """False in the processes that ``trainer=ddp`` adds to a run."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder, at most until this process ends: the system then releases it.

    A forked child (a sweep's worker, a loader's) does not inherit it: filelock closes the child's copies, so
    that a folder is free as soon as the process that held it is gone.

    Raises:
        CommandError: another process holds it.
        OSError: what is to hold it is a link that leads elsewhere.
    """
    hold(folder)
    mutex = _held.pop(folder.absolute(), None)  # so that no other thread of this process has it too
    try:
        yield
    finally:
        if mutex is not None:
            mutex.release()


def hold(folder: Path) -> None:
    """Hold a folder until a ``lock`` of it ends, or this process does.

    Raises:
        CommandError: another process holds it.
    """
    from filelock import FileLock, Timeout

    if folder.absolute() in _held:
        return
    check_inside(folder, [LOCK])
    mutex = FileLock(folder / LOCK, timeout=GLANCE * 10, poll_interval=GLANCE, thread_local=False)
    try:
        mutex.acquire()
    except Timeout as error:
        raise CommandError(f"another process is at work in {folder}") from error
    except OSError:  # a full disk: see track
        return
    _held[folder.absolute()] = mutex


def let_go(folder: Path) -> None:
    """End what ``hold`` has begun, where no ``lock`` has taken it over."""
    mutex = _held.pop(folder.absolute(), None)
    if mutex is not None:
        mutex.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds a folder; False also where that can't be found out."""
    if not (folder / LOCK).is_file() or (folder / LOCK).is_symlink():
        return False
    from filelock import FileLock, Timeout

    try:  # another process may look in the same moment
        with FileLock(folder / LOCK, timeout=GLANCE, poll_interval=GLANCE / 4, thread_local=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False
