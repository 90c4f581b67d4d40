"""Give up trials of a search that are behind the others."""

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import Callback

from mnist_lightning.rundir.outside import read_json
from mnist_lightning.rundir.status import Pruned
from mnist_lightning.sweeps.study import TRIAL, find_storage, open_storage

if TYPE_CHECKING:
    import optuna


class Pruning(Callback):
    """Reports each epoch's metric to the study, and ends the run when its pruner says so.

    A run that belongs to no search is left alone, as is one of a trial's folds.

    Args:
        run_dir: the run's folder.
        monitor: the metric.
        pruner: of Optuna.
    """

    def __init__(self, *, run_dir: str, monitor: str, pruner: "optuna.pruners.BasePruner") -> None:
        self.file = Path(run_dir) / TRIAL
        self.monitor = monitor
        self.pruner = pruner
        self.trial: optuna.Trial | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.file.is_file():
            return
        import optuna

        saved = read_json(self.file)
        if saved.get("folds"):
            return
        storage = find_storage(saved["storage"], self.file.parent.parent)
        study = optuna.load_study(
            study_name=saved["study_name"], storage=open_storage(storage), pruner=self.pruner
        )
        self.trial = optuna.Trial(study, saved["id"])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """
        Raises:
            Pruned: at this epoch the others were better.
        """
        if self.trial is None:
            return
        measured: dict[str, float] = pl_module.measured  # type: ignore[assignment]
        if self.monitor not in measured:
            return
        value = measured[self.monitor]
        self.trial.report(value, step=trainer.current_epoch)
        if self.trial.should_prune():
            raise Pruned(f"{self.monitor} {value:.4f} after epoch {trainer.current_epoch + 1}")
