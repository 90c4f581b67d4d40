"""Write histograms of a net's weights and gradients for TensorBoard."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from mnist_lightning.rundir.loggers import writing


class Histograms(Callback):
    """Write histograms of all weights and their gradients after the last step of each epoch.

    Validation clears the gradients, so the histograms need a hook that Lightning calls after every step.
    They have a callback of their own, so that only runs with histograms call that hook.
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
