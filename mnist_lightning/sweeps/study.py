"""An Optuna study and where a trial's folder says that it belongs to it; without torch."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override

from mnist_lightning.rundir.atomic import write_atomic

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

JOURNAL = "optuna.journal"  # a search's own study, in its folder
TRIAL = "trial.json"  # what a search leaves in a trial's folder: its storage, study and id


def find_storage(storage: str | None, sweep_dir: Path) -> str:
    """Where the study of a search lies.

    Args:
        storage: a journal file, or the URL of a database; None: in the search's folder, wherever that lies
            now.
    """
    return str(sweep_dir.absolute() / JOURNAL) if storage is None else storage


def mend_journal(sweep_dir: Path) -> None:
    """Undo what a kill, or a full disk, can leave of a search's own journal: a last line without its end, and
    a lock that no process holds.  The sweep's folder is locked: no other process writes there.

    Raises:
        OSError: it can't be read or written.
    """
    journal = sweep_dir / JOURNAL
    lock = journal.with_name(f"{JOURNAL}.lock")
    if os.path.lexists(lock):  # Optuna waits half a minute for it
        with contextlib.suppress(OSError):
            lock.unlink()
    if not journal.is_file():
        return
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomic(journal, whole)


def open_storage(name: str) -> Any:
    """An Optuna storage: of the URL of a database, or of a journal file."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in name:
        return optuna.storages.RDBStorage(name)
    # Optuna's other lock is a symbolic link, which not every system and disk has; they have one name and so
    # respect each other
    return optuna.storages.JournalStorage(JournalFileBackend(name, JournalFileOpenLock(name)))


def to_distribution(override: Override) -> "BaseDistribution":
    """Optuna's distribution for a swept value of Hydra's grammar.

    ``choice(a, b)`` and ``a,b`` are categories; ``range`` and ``interval`` numbers, whole ones for
    ``range(1, 5)`` and ``int(interval(1, 5))``; ``tag(log, interval(…))`` is uniform in the logarithm.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if override.is_interval_sweep():
        kind = IntDistribution if isinstance(sweep.start, int) else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)
    texts = list(override.sweep_string_iterator())
    if override.is_range_sweep():
        if all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step)):
            return IntDistribution(int(min(texts, key=int)), int(max(texts, key=int)), step=abs(sweep.step))
        numbers = [float(text) for text in texts]
        return FloatDistribution(min(numbers), max(numbers), step=abs(sweep.step))
    return CategoricalDistribution(texts)
