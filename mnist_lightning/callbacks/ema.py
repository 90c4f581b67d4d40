"""Average a net's weights over training steps."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


class ExponentialMovingAverage(Callback):
    """Keep an exponential moving average of the weights and of batch norm's statistics.

    The average is updated after each step.  Validation during training uses the average, ``state_dict`` in
    checkpoints holds it, and the net has it when training ends.  The optimizer continues with the weights
    of the last step, which a checkpoint holds as ``current_weights``.

    Averaged weights usually make fewer errors than those of a single step: Polyak and Juditsky 1992,
    "Acceleration of Stochastic Approximation by Averaging".  The decay grows with the number of steps, so
    that the first weights are soon forgotten: min(decay, (1 + steps) / (10 + steps)), as in TensorFlow's
    ExponentialMovingAverage.

    Lightning's EMAWeightAveraging tests the last step's weights after ``fit`` even when it is given a
    checkpoint of the average, and it averages one tensor at a time.

    Args:
        decay: the share of the average that each step keeps, in (0, 1).
    """

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.step = 0  # the last step whose weights are in the average

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        saved = self.averages  # from the checkpoint, when the run is resumed
        self.averages = {
            name: saved[name].to(weight.device) if saved else weight.clone()
            for name, weight in _weights(pl_module).items()
        }
        self.step = trainer.global_step
        self._into = list(self.averages.values())
        self._from = list(_weights(pl_module).values())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.step:
            return  # gradients are being accumulated
        self.step = step
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._into, self._from, 1 - decay)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap(trainer)

    def _swap(self, trainer: L.Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        for average, weight in zip(self._into, self._from, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for average, weight in zip(self._into, self._from, strict=True):
            weight.copy_(average)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["current_weights"] = {name: weights[name] for name in self.averages}
        checkpoint["state_dict"] = weights | self.averages

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        current = checkpoint["current_weights"]
        self.averages = {name: checkpoint["state_dict"][name].clone() for name in current}
        pl_module.load_state_dict(checkpoint["state_dict"] | current)


def _weights(pl_module: L.LightningModule) -> dict[str, Tensor]:
    """Return the tensors to average: parameters and batch norm's statistics, without its batch count."""
    prefix = "net."
    state = pl_module.net.state_dict(prefix=prefix)  # type: ignore[union-attr]
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
