"""Stop the trials of a search that do worse than the others."""

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
    """Report the metric of each epoch to the study, and end the run when the pruner says so.

    The callback does nothing in a run outside a search, and in a run that trains one fold of a trial.

    Args:
        run_dir: the run's folder.
        monitor: the name of the metric.
        pruner: an Optuna pruner.
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
        """Report the epoch's metric to the study.

        Raises:
            Pruned: the pruner gives up this trial.
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
