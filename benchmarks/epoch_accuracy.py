"""Measure the project's test accuracy after each epoch, and the time at which it is known.

The project by itself never uses the test images during training.
"""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.contestant import append


class EpochAccuracy(Callback):
    """Write the test accuracy after each epoch; add it by ``+callbacks.epoch_accuracy._target_=…``."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)  # Lightning gives a callback a `log` of its own

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        digits = trainer.datamodule.splits["test"]  # type: ignore[attr-defined]
        pl_module.eval()
        with torch.inference_mode():
            predictions = pl_module(digits.images.to(pl_module.device)).argmax(1).cpu()
        pl_module.train()
        append(self.path, (predictions == digits.labels.cpu()).float().mean().item())
