"""Histograms of a net's weights and gradients, for TensorBoard."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from mnist_lightning.rundir.loggers import writing


class Histograms(Callback):
    """Histograms of all weights and of their gradients, at the last step of each epoch.

    A callback of its own: validation clears the gradients, so that it must be called in every step,
    which runs without histograms need not pay for.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 != trainer.num_training_batches:
            return
        with writing(trainer) as writer:
            if writer is None:
                return
            for name, parameter in pl_module.named_parameters():
                for kind, values in (("weights", parameter), ("gradients", parameter.grad)):
                    writer.add_histogram(f"{kind}/{name}", values, trainer.global_step)
