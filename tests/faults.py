"""Faults in a job, as callbacks of a user (``+callbacks.fault._target_=faults.Fault``)."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

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
        if self.kind in ("hang", "hang, deaf to SIGTERM"):
            handler = signal.SIG_IGN if "deaf" in self.kind else signal.SIG_DFL
            signal.signal(signal.SIGTERM, handler)
            while True:
                time.sleep(1)


class KillAt(Callback):
    """Send SIGKILL in the first call of a hook after ``last.ckpt`` was written; without a hook, never."""

    def __init__(self, hook: str | None = None) -> None:
        if hook is not None:
            setattr(self, hook, self.kill)

    def kill(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if (Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt").exists():
            os.kill(os.getpid(), signal.SIGKILL)


class Witness(Callback):
    """Write to a file when a job has computed, on how many threads, and which GPU it sees."""

    def __init__(self, file: str, rest: float = 0.0) -> None:
        self.file = Path(file)
        self.rest = rest
        self.begun = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = time.monotonic()
        time.sleep(self.rest)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seen = {
            "begun": self.begun,
            "ended": time.monotonic(),
            "threads": torch.get_num_threads(),
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "process": os.getpid(),
        }
        self.file.write_text(json.dumps(seen))


class StepTimer(Callback):
    """A limit like that of Lightning's Timer, reached at a given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step == self.step


class SlowSaves(Callback):
    """Let a clock of its own, ``seconds``, count 1 for each step and 10 for each checkpoint."""

    seconds = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        SlowSaves.seconds += 1

    def on_save_checkpoint(self, *_: Any) -> None:
        SlowSaves.seconds += 10
