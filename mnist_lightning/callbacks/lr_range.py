"""The learning-rate range test."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from mnist_lightning import figures
from mnist_lightning.rundir.find import as_typed

log = logging.getLogger(__name__)

SMOOTHING = 0.9  # share of the mean that a step keeps
EXPLODED = 4.0  # times the lowest smoothed loss at which the test ends
DIVISOR = 4.0  # of the rate where the smoothed loss is lowest: Smith 2017, section 3.3
FALLS = 0.9  # share of the first steps' loss below which the loss counts as fallen
FEWEST = 20  # steps


class LearningRateRange(Callback):
    """Lets the learning rate rise geometrically from step to step, and suggests one.

    Smith 2017, "Cyclical Learning Rates for Training Neural Networks", IEEE Winter Conference on Applications
    of Computer Vision, pages 464 to 472, section 3.3: a net is trained for a while with a rising rate; where
    the loss no longer falls, the rate is the largest of use, and a third or a quarter of it a good one.
    There the rate rises by equal amounts and a person reads the curve; here it rises by equal factors, and
    the largest is the one with the lowest smoothed loss.

    No schedule may change the rate beside it.  The weights are of no use afterwards.

    Args:
        path: of the figure.
        min_lr, max_lr: of the first and of the last step; ``trainer.max_steps`` says how many there are.
            Where parts of a net have rates of their own, it is the first's; the others keep their ratio.

    Attributes:
        suggestion: a learning rate; None where the loss falls at no rate.
    """

    def __init__(self, *, path: str, min_lr: float, max_lr: float) -> None:
        if not 0 < min_lr < max_lr < math.inf:
            raise ValueError(f"min_lr and max_lr must be 0 < min_lr < max_lr, got {min_lr} and {max_lr}")
        self.path = Path(path)
        self.min_lr, self.max_lr = min_lr, max_lr
        self.suggestion: float | None = None
        self._rates: list[float] = []
        self._losses: list[float] = []  # of each step
        self._parts: list[float] = []  # of the batches of the step under way
        self._mean = self._lowest = math.inf
        self._ratios: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """
        Raises:
            MisconfigurationException: the run has no such number of steps.
        """
        if trainer.max_steps < FEWEST:
            raise MisconfigurationException(
                f"debug=lr_range wants trainer.max_steps >= {FEWEST}, the steps in which the rate rises, got"
                f" {trainer.max_steps}"
            )
        pl_module.may_diverge = True  # type: ignore[assignment]
        first = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
        self._ratios = [
            [group["lr"] / rate for group in optimizer.param_groups]
            for optimizer, rate in zip(trainer.optimizers, first, strict=True)
        ]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        share = trainer.global_step / (trainer.max_steps - 1)
        rate = self.min_lr * (self.max_lr / self.min_lr) ** share
        for optimizer, ratios in zip(trainer.optimizers, self._ratios, strict=True):
            for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                group["lr"] = rate * ratio

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self._parts.append(float(loss) * trainer.accumulate_grad_batches)
        if trainer.global_step == len(self._losses):
            return  # gradients are being accumulated
        loss, self._parts = sum(self._parts) / len(self._parts), []
        self._losses.append(loss)
        self._rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
        old = self._mean if math.isfinite(self._mean) else loss
        self._mean = SMOOTHING * old + (1 - SMOOTHING) * loss
        self._lowest = min(self._lowest, self._mean)
        if not math.isfinite(loss) or self._mean > EXPLODED * self._lowest:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or len(self._losses) < FEWEST:
            return
        rates, losses = np.array(self._rates), np.array(self._losses)
        smooth = smoothen(losses)
        self.suggestion, why = suggest(rates, smooth)
        drawing = figures.learning_rates(rates, losses, smooth, self.suggestion, title=why)
        figures.save({self.path.stem: drawing}, self.path.parent)
        log.info("learning rates from %.1e to %.1e: %s", rates[0], rates[-1], why)
        log.info("the curve is in %s", as_typed(self.path))


def smoothen(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The exponential moving mean, without the pull of its start: Kingma and Ba 2015, "Adam", section 3.

    (steps,) -> (steps,); from where a loss is not finite on, infinite
    """
    means, mean = [], 0.0
    for step, loss in enumerate(losses.tolist(), start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * (loss if math.isfinite(loss) else math.inf)
        means.append(mean / (1 - SMOOTHING**step))
    return np.array(means)


def suggest(rates: NDArray[np.float64], smooth: NDArray[np.float64]) -> tuple[float | None, str]:
    """A learning rate with two digits, or None, and what the curve says, in words.

    Args:
        rates: (steps,) rising.
        smooth: (steps,) the smoothed loss.
    """
    lowest = int(smooth.argmin())
    start = float(smooth[: FEWEST // 2].mean())
    if smooth[lowest] > FALLS * start:
        return None, "the loss falls at none of them"
    suggestion = float(f"{rates[lowest] / DIVISOR:.1e}")
    told = f"the loss is lowest at {rates[lowest]:.1e}"
    if lowest == len(rates) - 1:
        told += ", the largest: callbacks.lr_range.max_lr=… goes further"
    return suggestion, f"{told}; a quarter of that is suggested, {suggestion:g}"
