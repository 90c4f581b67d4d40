"""When a run's checkpoints are written."""

import errno
import logging
import math
import shlex
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from mnist_lightning.rundir import signals
from mnist_lightning.rundir.atomic import TEMPORARY, remove_leftovers
from mnist_lightning.rundir.checkpoint import BEST, LAST, PREVIOUS

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Writes ``best.ckpt`` and ``last.ckpt`` at the end of each epoch, ``last.ckpt`` also within it.

    The ``last.ckpt`` that is replaced stays as ``previous.ckpt``.  When a signal asks the run to
    stop (see ``signals``), the step is finished and saved, and the process ends.

    Lightning's own ModelCheckpoint numbers the files of a second run, loses what the plain
    loggers have not yet written, and saves before validation what it calls the epoch's last step;
    from there a resumed run would leave out that epoch's end.

    Args:
        dirpath: the folder, made when needed.
        monitor: the metric that chooses the best; None takes the last for the best.
        mode: "max" or "min" of ``monitor``.
        every_n_steps: write ``last.ckpt`` each so many optimizer steps; None: not within an epoch.
        every_n_seconds: write it when so many seconds have passed; None: not within an epoch.
    """

    def __init__(
        self,
        *,
        dirpath: str,
        monitor: str | None,
        mode: str,
        every_n_steps: int | None,
        every_n_seconds: float | None,
    ) -> None:
        self.folder = Path(dirpath)
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.best_score = -math.inf  # times sign: the greater, the better
        self.best_epoch: int | None = None  # from 1
        self.metrics: dict[str, float] = {}  # of the last finished epoch
        self.train_seconds = 0.0  # up to the last save, over all resumptions
        self._clock = time.monotonic()
        self._saved_step = 0
        self._saved_at = self._clock

    def state_dict(self) -> dict[str, Any]:
        names = ("best_score", "best_epoch", "metrics", "train_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = self._saved_at = time.monotonic()
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        if trainer.world_size == 1:
            signals.install()  # Lightning has put its own handler before ours

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the epoch's end, which comes after validation, saves more
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if self.every_n_seconds is not None:
            due = due or time.monotonic() - self._saved_at >= self.every_n_seconds
        if (due or signals.received()) and step != self._saved_step:
            self._save(trainer, LAST)
        self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        epoch = trainer.current_epoch + 1
        score = self.sign * self.metrics[self.monitor] if self.monitor else float(epoch)
        if score > self.best_score:
            self.best_score, self.best_epoch = score, epoch
            self._save(trainer, BEST)
        else:
            self._save(trainer, LAST)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if signals.received():
            log.warning(
                "stopped by a signal, saved at step %d; to go on: python -m mnist_lightning.train resume=%s",
                trainer.global_step,
                shlex.quote(str(self.folder.parent)),
            )
        signals.stop_if_asked()

    def _save(self, trainer: L.Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.folder.is_dir():
            raise OSError(errno.ENOENT, "the folder has vanished", str(self.folder))
        now = time.monotonic()
        self.train_seconds += now - self._clock
        self._clock = self._saved_at = now
        self._saved_step = trainer.global_step
        for logger in trainer.loggers:  # a checkpoint must not be ahead of its curves
            logger.save()
        next_last = self.folder / f"{TEMPORARY}{LAST}"
        if name == BEST:
            trainer.save_checkpoint(self.folder / BEST, storage_options={"copy": next_last})
        else:
            trainer.save_checkpoint(next_last)
        if trainer.is_global_zero:
            last = self.folder / LAST
            if last.exists():
                last.replace(self.folder / PREVIOUS)
            next_last.replace(last)
