"""Things that go wrong in a job, as a user's own callback (``+callbacks.fault._target_=faults.Fault``)."""

import os
import signal
import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class Fault(Callback):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.kind == "raise":
            raise RuntimeError("something broke")
        if self.kind == "exit":
            sys.exit(0)
        if self.kind == "diverge":
            for parameter in pl_module.parameters():
                parameter.data.fill_(float("nan"))
        if self.kind == "disk":
            with open("/dev/full", "w") as file:
                file.write("the kernel says that this disk is full")
        if self.kind == "memory":
            torch.empty(10**15)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
