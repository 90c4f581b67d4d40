"""Open Optuna studies and turn swept values into Optuna's distributions, without importing torch."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override

from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.sweeps.results import count_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

JOURNAL = "optuna.journal"  # the file of a search's own study, in the search's folder
TRIAL = "trial.json"  # a file in a trial's folder that names its storage, study and id


def find_storage(storage: str | None, sweep_dir: Path) -> str:
    """Return the path or the URL of a search's study.

    Args:
        storage: a journal file, or the URL of a database; None: the journal in the search's folder.
        sweep_dir: the search's current folder.
    """
    return str(sweep_dir.absolute() / JOURNAL) if storage is None else storage


def mend_journal(sweep_dir: Path) -> None:
    """Repair a search's own journal after a kill or a full disk: remove an incomplete last line and a lock
    that no process holds.  The caller must have locked the sweep's folder.

    Raises:
        OSError: the journal can't be read or written.
    """
    journal = sweep_dir / JOURNAL
    lock = journal.with_name(f"{JOURNAL}.lock")
    if os.path.lexists(lock):  # otherwise Optuna would wait half a minute for it
        with contextlib.suppress(OSError):
            lock.unlink()
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomic(journal, whole)


def open_storage(name: str) -> Any:
    """Open an Optuna storage by the URL of a database or the path of a journal file."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in name:
        return optuna.storages.RDBStorage(name)
    # Optuna's default lock is a symbolic link, which some systems and disks do not support.  Both locks use
    # the same file name, so they exclude each other.
    return optuna.storages.JournalStorage(JournalFileBackend(name, JournalFileOpenLock(name)))


def to_distribution(override: Override) -> "BaseDistribution":
    """Return Optuna's distribution for a swept value in Hydra's grammar.

    ``choice(a, b)`` and ``a,b`` become categories; ``range`` and ``interval`` become numbers, integers for
    ``range(1, 5)`` and ``int(interval(1, 5))``; ``tag(log, interval(…))`` is uniform in the logarithm.

    Raises:
        ValueError: there are too many values to list.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if override.is_interval_sweep():
        kind = IntDistribution if isinstance(sweep.start, int) else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)
    count_values(override)  # they can be listed
    texts = list(override.sweep_string_iterator())
    if override.is_range_sweep():
        if all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step)):
            return IntDistribution(int(min(texts, key=int)), int(max(texts, key=int)), step=abs(sweep.step))
        numbers = [float(text) for text in texts]
        return FloatDistribution(min(numbers), max(numbers), step=abs(sweep.step))
    return CategoricalDistribution(texts)
