"""Write a run's checkpoints."""

import errno
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from mnist_lightning import workarounds
from mnist_lightning.rundir import signals
from mnist_lightning.rundir.atomic import TEMPORARY, remove_leftovers, replace
from mnist_lightning.rundir.checkpoint import BEST, LAST, PREVIOUS
from mnist_lightning.rundir.find import as_typed
from mnist_lightning.rundir.outside import as_word

log = logging.getLogger(__name__)

KEPT: dict[str, type | UnionType] = {  # attributes saved in a checkpoint, and their types
    "best_score": float,
    "best_epoch": int | None,
    "metrics": dict,
    "train_seconds": float,
    "stopped": list | None,
}


class Checkpoints(Checkpoint):
    """Write ``last.ckpt``, and ``best.ckpt`` when the net is the best so far.

    This happens at the end of each epoch.  Within an epoch, ``last.ckpt`` is written when a save is due, and
    both files after a validation that is the best so far.  The replaced ``last.ckpt`` is kept as
    ``previous.ckpt``.  Until the first validation, the last checkpoint is also the best.  When a signal asks
    the run to stop (see ``signals``), the callback finishes the step, saves it and ends the process; several
    processes end at the same step.

    A run that ended within an epoch, early or at a limit, continues there when new settings allow it.

    Lightning's own ModelCheckpoint adds numbers to the file names of a second run, loses rows that the plain
    loggers have not written yet, and saves the last step of an epoch before its validation; a run resumed
    from there would skip the end of that epoch.

    Args:
        dirpath: the folder; it is made when needed.
        monitor: the metric that chooses the best checkpoint; None: the last is the best.
        mode: "max" or "min": whether a large or a small ``monitor`` is good.
        every_n_steps: write ``last.ckpt`` every this many optimizer steps; None: not within an epoch.
        every_n_seconds: write ``last.ckpt`` once the last save is this many seconds old; None: never.
        stops: the settings that can stop a run early.  A stopped run trains no further until they change.

    Attributes:
        best_epoch: the epoch of ``best.ckpt``, counted from 1.
        best_score: the monitored metric of ``best.ckpt``, times -1 when ``mode`` is "min"; -inf before the
            first validation.
        metrics: the metrics of the last finished epoch.
        train_seconds: training time until the last save, summed over all resumptions.
    """

    def __init__(
        self,
        *,
        dirpath: str,
        monitor: str | None,
        mode: str,
        every_n_steps: int | None,
        every_n_seconds: float | None,
        stops: Sequence[str] = (),
    ) -> None:
        self.folder = Path(dirpath)
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.stops = list(stops)
        self.stopped: list[str] | None = None  # the settings that stopped the run early
        self.best_score = -math.inf
        self.best_epoch: int | None = None
        self.metrics: dict[str, float] = {}
        self.train_seconds = 0.0
        self._validated_at = -1  # the batch of the last validation, counted over all epochs
        self._clock = time.monotonic()
        self._saved_step = 0
        self._saved_at = self._clock

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the attributes that ``state_dict`` saved.

        Raises:
            TypeError: a value does not have the type in ``KEPT``.
        """
        for name, kind in KEPT.items():  # the file may come from a stranger: set no other attribute
            value = state_dict.get(name, getattr(self, name))
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r}")
            setattr(self, name, value)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark an epoch that was cut short as unfinished when the run may continue, and give EarlyStopping
        the patience of the current settings instead of the saved one."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        for callback in trainer.early_stopping_callbacks:
            if callback.state_key in checkpoint["callbacks"]:
                checkpoint["callbacks"][callback.state_key]["patience"] = callback.patience
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
        was_cut = epochs["current"]["processed"] == epochs["current"]["started"]
        was_cut = was_cut and not batches["is_last_batch"]
        at_limit = 0 <= trainer.max_steps <= checkpoint["global_step"]
        saved = checkpoint["callbacks"].get(self.state_key, {})
        if was_cut and not at_limit and saved.get("stopped") != self.stops:
            for count in (epochs["current"], epochs["total"]):
                count["processed"] -= 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = self._saved_at = time.monotonic()
        self._saved_step = trainer.global_step
        if self.stopped == self.stops:
            trainer.should_stop = True
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        signals.install()  # again: Lightning has replaced our handler with its own
        signals.defer()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            return  # on_train_epoch_end saves this step, after validation
        if self._is_due(trainer) and not workarounds.is_validation_due(trainer):
            self._save_and_stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._validated_at = trainer.fit_loop.epoch_loop.total_batch_idx
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == trainer.num_training_batches:
            return
        if self.monitor and self._is_best(trainer, pl_module):
            self._save(trainer, BEST)
        if self._is_due(trainer):
            self._save_and_stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics = dict(pl_module.measured)  # type: ignore[arg-type]
        self.stopped = self.stops if trainer.should_stop else None
        self._save(trainer, BEST if self._is_best(trainer, pl_module) else LAST)
        self._stop_if_asked(trainer)

    def _is_best(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Tell whether the weights of this step are the best so far; call it once for each validation."""
        measured: dict[str, float] = pl_module.measured  # type: ignore[assignment]
        score = -math.inf
        if self._validated_at == trainer.fit_loop.epoch_loop.total_batch_idx and self.monitor in measured:
            score = self.sign * measured[self.monitor]
        self._validated_at = -1
        is_best = score > self.best_score or self.best_score == -math.inf
        if is_best:
            self.best_score, self.best_epoch = max(self.best_score, score), trainer.current_epoch + 1
        return is_best

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Tell whether to save or stop now; all processes get the same answer."""
        due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if self.every_n_seconds is not None and trainer.is_global_zero:
            due = due or time.monotonic() - self._saved_at >= self.every_n_seconds
        return self._does_any(trainer, due or signals.received())

    def _does_any(self, trainer: L.Trainer, answer: bool) -> bool:
        if trainer.world_size == 1:
            return answer
        return trainer.strategy.reduce_boolean_decision(answer, all=False)

    def _save_and_stop(self, trainer: L.Trainer) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer, LAST)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if not self._does_any(trainer, signals.received()):
            return
        signals.ask()  # the signal may have reached another process only
        if trainer.is_global_zero:
            if (bar := trainer.progress_bar_callback) is not None:
                bar.disable()  # so that the next message starts on a line of its own
            told = f"interrupted, saved at step {trainer.global_step}"
            if not (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
                folder = as_word(str(as_typed(self.folder.parent)))
                told += f"; continue with\n  python -m mnist_lightning.train resume={folder}"
            log.warning("%s", told)  # a sweep prints its own command to resume
        else:
            signals.wait_for_parent()
        signals.stop_if_asked()

    def _save(self, trainer: L.Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.folder.is_dir():
            raise OSError(errno.ENOENT, "the folder has vanished", str(self.folder))
        now = time.monotonic()
        self.train_seconds += now - self._clock
        self._clock = now
        self._saved_step = trainer.global_step
        for logger in trainer.loggers:  # the curves must reach at least as far as the checkpoint
            logger.save()
        next_last = self.folder / f"{TEMPORARY}{LAST}"
        if name == BEST:
            trainer.save_checkpoint(self.folder / BEST, storage_options={"copy": next_last})
        else:
            trainer.save_checkpoint(next_last)
        if trainer.is_global_zero:
            last = self.folder / LAST
            if last.exists():
                replace(last, self.folder / PREVIOUS)
            replace(next_last, last)
        self._saved_at = time.monotonic()  # else a slow disk would leave no time for training
