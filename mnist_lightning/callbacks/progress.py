"""Show a run's progress."""

import logging
import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from mnist_lightning.rundir.notebook import NotebookBar, in_notebook
from mnist_lightning.rundir.status import show_with_unit

log = logging.getLogger(__name__)

BAR = "{desc}: {percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}{postfix}"
SETTLED = 2.0  # seconds before the first estimate of the time left: the first steps are slower


class Progress(ProgressBar):
    """Print one line for each epoch, and show a bar while the epoch runs on a terminal or in a notebook.

    The bar shows the loss and accuracy of the latest steps, and the time left for the whole run.  tqdm draws
    it at most ten times a second, whatever the number of steps.  In a notebook, one display in the same place
    holds both the bar and the lines.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm[Any] | NotebookBar | None = None
        self._epoch_start = 0.0
        self._train_start, self._first_step = 0.0, 0
        self._latest = ""  # loss and accuracy
        self._line: NotebookBar | None = None
        self._ended = ""  # the last epoch's line, with %s in place of its metrics

    def disable(self) -> None:
        self._enabled = False
        self._close()

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._train_start, self._first_step = time.monotonic(), trainer.global_step
        self._begin(trainer)  # a run resumed within an epoch does not call on_train_epoch_start for it

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer)
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        self._close()
        self._epoch_start = time.monotonic()
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready % int(trainer.num_training_batches)
        if self._enabled and in_notebook():
            self._line = self._line or NotebookBar()
            self._line.start(_name_epoch(trainer), total=int(trainer.num_training_batches), done=done)
            self._bar = self._line
        elif self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=int(trainer.num_training_batches),
                initial=done,
                desc=_name_epoch(trainer),
                unit="step",
                leave=False,
                dynamic_ncols=True,
                bar_format=BAR,
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None and self._bar.update():
            self._latest = _tell(pl_module.glance()) or self._latest  # type: ignore[operator]
            told = f"{self._latest}  {self._tell_time_left(trainer)}"
            self._bar.set_postfix_str(told.strip(), refresh=False)

    def _tell_time_left(self, trainer: L.Trainer) -> str:
        """Estimate the time left from the mean time of a step, validation included; "" if unknown."""
        passed, done = time.monotonic() - self._train_start, trainer.global_step - self._first_step
        rest = trainer.estimated_stepping_batches - trainer.global_step
        if passed < SETTLED or done < 1 or not math.isfinite(rest):
            return ""
        return f"{tqdm.format_interval(math.ceil(passed / done * rest))} left"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        self._ended = f"{_name_epoch(trainer)}%s   {time.monotonic() - self._epoch_start:.1f} s"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer)

    def _tell(self, trainer: L.Trainer) -> None:
        """Log the finished epoch's line, late, because its metrics are complete only after all hooks."""
        if self._enabled and self._ended:
            told = "".join(_tell_stage(trainer, stage) for stage in ("train", "val"))
            log.info(self._ended, told)
            if self._line is not None:
                self._line.tell(self._ended % told)
        self._ended = ""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _tell_stage(trainer: L.Trainer, stage: str) -> str:
    """Write a stage's loss and metrics: "   train loss 0.3042 acc 91.52 %"; "" without any."""
    values = {
        name.removeprefix(f"{stage}/"): value
        for name, value in trainer.lightning_module.measured.items()  # type: ignore[operator, union-attr]
        if name.startswith(f"{stage}/")
    }
    return f"   {stage} {_tell(values)}" if values else ""


def _tell(values: dict[str, float]) -> str:
    names = sorted(values, key=lambda name: name != "loss")
    return " ".join(f"{name} {show_with_unit(name, values[name])}" for name in names)


def _name_epoch(trainer: L.Trainer) -> str:
    last = trainer.max_epochs
    return f"epoch {trainer.current_epoch + 1:>{len(str(last))}}" + (f"/{last}" if last and last > 0 else "")
