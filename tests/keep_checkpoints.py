"""A callback for tests: keep a copy of ``last.ckpt`` for each step at which one was written."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class Keep(Callback):
    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def _keep(self, trainer: L.Trainer) -> None:
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if self.folder and last.exists():
            shutil.copy(last, Path(self.folder) / f"{trainer.global_step:06}.ckpt")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._keep(trainer)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._keep(trainer)
