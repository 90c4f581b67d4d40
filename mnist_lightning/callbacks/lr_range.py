"""Find a good learning rate with a range test."""

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

SMOOTHING = 0.9  # share of the moving mean that each step keeps
EXPLODED = 4.0  # the test ends when the smoothed loss is this many times its lowest value
DIVISOR = 4.0  # suggest the rate of the lowest smoothed loss divided by this: Smith 2017, section 3.3
FALLS = 0.9  # the loss has fallen when it is below this share of the first steps' loss
FEWEST = 20  # steps that the test needs


class LearningRateRange(Callback):
    """Raise the learning rate by the same factor at every step, and suggest a learning rate.

    Smith 2017, "Cyclical Learning Rates for Training Neural Networks", IEEE Winter Conference on Applications
    of Computer Vision, pages 464 to 472, section 3.3: train a net for a while with a rising rate.  The rate
    at which the loss stops falling is the largest useful one; a third or a quarter of it is a good choice.
    In the paper the rate rises by equal amounts and a person reads the curve.  Here the rate rises by equal
    factors, and the largest useful rate is the one with the lowest smoothed loss.

    No schedule may change the learning rate during the test.  Do not use the weights afterwards.

    Args:
        path: the file of the figure.
        min_lr: the learning rate of the first step.
        max_lr: the learning rate of the last step, ``trainer.max_steps``.  If an optimizer has several
            parameter groups, these are the rates of the first group; the others keep their ratio to it.

    Attributes:
        suggestion: the suggested learning rate; None when the loss does not fall.

    Raises:
        ValueError: not 0 < ``min_lr`` < ``max_lr`` < inf.
    """

    def __init__(self, *, path: str, min_lr: float, max_lr: float) -> None:
        if not 0 < min_lr < max_lr < math.inf:
            raise ValueError(f"min_lr and max_lr must be 0 < min_lr < max_lr, got {min_lr} and {max_lr}")
        self.path = Path(path)
        self.min_lr, self.max_lr = min_lr, max_lr
        self.suggestion: float | None = None
        self._rates: list[float] = []
        self._losses: list[float] = []  # one for each step
        self._parts: list[float] = []  # losses of the current step's batches
        self._mean = self._lowest = math.inf
        self._ratios: list[list[float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the number of steps, and remember the ratios of the parameter groups' learning rates.

        Raises:
            MisconfigurationException: ``trainer.max_steps`` is not set, or is less than 20.
        """
        if trainer.max_steps < FEWEST:
            raise MisconfigurationException(
                f"debug=lr_range raises the rate at every step and needs trainer.max_steps >= {FEWEST}, got"
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
    """Return the exponential moving mean, corrected for its start at 0 (Kingma and Ba 2015, "Adam", sec. 3).

    (steps,) -> (steps,), infinite from the first loss that is not finite.
    """
    means, mean = [], 0.0
    for step, loss in enumerate(losses.tolist(), start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * (loss if math.isfinite(loss) else math.inf)
        means.append(mean / (1 - SMOOTHING**step))
    return np.array(means)


def suggest(rates: NDArray[np.float64], smooth: NDArray[np.float64]) -> tuple[float | None, str]:
    """Suggest a learning rate, and say why in words.

    Args:
        rates: (steps,) the learning rates, rising.
        smooth: (steps,) the smoothed loss at each rate.

    Returns:
        the learning rate with two significant digits, or None when the loss does not fall; and the reason.
    """
    lowest = int(smooth.argmin())
    start = float(smooth[: FEWEST // 2].mean())
    if smooth[lowest] > FALLS * start:
        return None, "the loss falls at none of these rates"
    suggestion = float(f"{rates[lowest] / DIVISOR:.1e}")
    told = f"the loss is lowest at {rates[lowest]:.1e}"
    if lowest == len(rates) - 1:
        told += ", the largest rate tried: callbacks.lr_range.max_lr=… tries larger ones"
    return suggestion, f"{told}; a quarter of that is suggested, {suggestion:g}"
