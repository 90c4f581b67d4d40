"""An Optuna study and where a trial's folder says that it belongs to it; without torch."""

from typing import Any

TRIAL = "trial.json"  # what a search leaves in a trial's folder: its storage, study and id


def open_storage(name: str) -> Any:
    """An Optuna storage: of the URL of a database, or of a journal file."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in name:
        return optuna.storages.RDBStorage(name)
    return optuna.storages.JournalStorage(JournalFileBackend(name))
