"""An Optuna study and where a trial's folder says that it belongs to it; without torch."""

import contextlib
from pathlib import Path
from typing import Any

from mnist_lightning.rundir.atomic import write_atomic

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
    a lock that nobody holds.  The sweep's folder is locked: no other process writes there.

    Raises:
        OSError: it can't be read or written.
    """
    journal = sweep_dir / JOURNAL
    lock = journal.with_name(f"{JOURNAL}.lock")
    if lock.is_symlink():  # Optuna waits for ever for one that names a place where nothing is
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
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in name:
        return optuna.storages.RDBStorage(name)
    return optuna.storages.JournalStorage(JournalFileBackend(name))
