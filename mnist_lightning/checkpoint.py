"""Checkpoints that can be trusted: how they are written, kept and read.

A checkpoint is torch's own zip file with a comment, the SHA-256 of all before it; ``torch.load``
still reads it.  The checksum tells damage, not malice: against hostile files stand
``weights_only=True`` and the refusal of anything compressed or remote.
"""

import errno
import hashlib
import io
import logging
import math
import shlex
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from mnist_lightning import signals
from mnist_lightning.files import TEMPORARY, remove_leftovers, write_atomic

log = logging.getLogger(__name__)

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
LABEL = b"sha256:"
COMMENT_SIZE = len(LABEL) + 64  # the digest in hexadecimal
# A zip file ends with the length of its comment, in two bytes, and the comment (PKWARE's APPNOTE, 4.3.16).
LENGTH = COMMENT_SIZE.to_bytes(2, "little")


def serialize(checkpoint: dict[str, Any]) -> bytes:
    """A checkpoint as the content of a file, with its checksum at the end."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getbuffer()[:-2]  # without the length of the comment, which is 0
    return bytes(content) + LENGTH + LABEL + hashlib.sha256(content).hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU: tensors and plain data only, nothing of it executed.

    ``hyper_parameters`` are the arguments of ``DigitClassifier``, ``datamodule_hyper_parameters``
    those of ``MNISTDataModule``.

    Raises:
        OSError: there is no such file, or it is damaged, or no checkpoint of this project.
    """
    if "://" in str(path) or ":/" in str(path):  # a Path has folded the second slash
        raise OSError(f"{path}: checkpoints are read from local files only")
    content = path.read_bytes()
    comment = content[-COMMENT_SIZE:]
    body = memoryview(content)[: -COMMENT_SIZE - 2]
    if not comment.startswith(LABEL) or content[-COMMENT_SIZE - 2 : -COMMENT_SIZE] != LENGTH:
        raise OSError(f"{path} is cut off, or no checkpoint of mnist_lightning: its checksum is missing")
    if hashlib.sha256(body).hexdigest().encode() != comment[len(LABEL) :]:
        raise OSError(f"{path} is damaged: its checksum does not fit its content")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise OSError(f"{path} is refused: it holds compressed data, which torch never writes")
            if sum(member.file_size for member in members) > len(content):  # parts that overlap
                raise OSError(f"{path} is refused: its parts claim to be more than the file holds")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, KeyError, EOFError, …
        cause = str(error).splitlines()[0][:200]
        raise OSError(f"{path} is refused: it holds more than tensors and plain data ({cause})") from error
    if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in find_tensors(checkpoint)):
        raise OSError(f"{path} is refused: it holds a tensor that claims to be larger than its content")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("hyper_parameters"), dict):
        raise OSError(f"{path} is no checkpoint of mnist_lightning: it has no hyper_parameters")
    return checkpoint


def find_tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from find_tensors(inner)


def find_newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The valid checkpoint in a folder that has seen the most steps, and its content.

    Damaged ones are named in a warning.

    Raises:
        OSError: there is none.
    """
    valid: list[tuple[int, Path, dict[str, Any]]] = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            checkpoint = load(path)
        except OSError as error:
            log.warning("%s; an older checkpoint is used if there is one", error)
        else:
            valid.append((int(checkpoint["global_step"]), path, checkpoint))
    if not valid:
        raise OSError(f"{folder} has no valid checkpoint")
    _, path, checkpoint = max(valid, key=lambda item: item[0])
    return path, checkpoint


class LocalCheckpointIO(CheckpointIO):
    """Lightning's way to ``serialize`` and ``load``: local files, written whole, checked when read."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """``storage_options`` may name a copy to be written as well: ``{"copy": path}``."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = serialize(checkpoint)
        for target in (path, *(storage_options or {}).values()):
            write_atomic(Path(target), content)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Writes ``best.ckpt`` and ``last.ckpt`` at the end of each epoch, ``last.ckpt`` also within it.

    The ``last.ckpt`` that is replaced stays as ``previous.ckpt``.  When a signal asks the run to
    stop (see ``signals``), the step is finished and saved, and the process ends.

    Lightning's own ModelCheckpoint numbers the files of a second run, loses what the plain
    loggers have not yet written, and saves before validation what it calls the epoch's last step;
    from there a resumed run would leave out that epoch's end.

    Args:
        dirpath: the folder, made when needed.
        monitor: the metric that chooses the best; None takes the last for the best.
        mode: "max" or "min" of ``monitor``.
        every_n_steps: write ``last.ckpt`` each so many optimizer steps; None: not within an epoch.
        every_n_seconds: write it when so many seconds have passed; None: not within an epoch.
    """

    def __init__(
        self,
        *,
        dirpath: str,
        monitor: str | None,
        mode: str,
        every_n_steps: int | None,
        every_n_seconds: float | None,
    ) -> None:
        self.folder = Path(dirpath)
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self.best_score = -math.inf  # times sign: the greater, the better
        self.best_epoch: int | None = None  # from 1
        self.metrics: dict[str, float] = {}  # of the last finished epoch
        self.train_seconds = 0.0  # up to the last save, over all resumptions
        self._clock = time.monotonic()
        self._saved_step = 0
        self._saved_at = self._clock

    def state_dict(self) -> dict[str, Any]:
        names = ("best_score", "best_epoch", "metrics", "train_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = self._saved_at = time.monotonic()
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
        if trainer.world_size == 1:
            signals.install()  # Lightning has put its own handler before ours

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the epoch's end, which comes after validation, saves more
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if self.every_n_seconds is not None:
            due = due or time.monotonic() - self._saved_at >= self.every_n_seconds
        if (due or signals.received()) and step != self._saved_step:
            self._save(trainer, LAST)
        self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        epoch = trainer.current_epoch + 1
        score = self.sign * self.metrics[self.monitor] if self.monitor else float(epoch)
        if score > self.best_score:
            self.best_score, self.best_epoch = score, epoch
            self._save(trainer, BEST)
        else:
            self._save(trainer, LAST)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if signals.received():
            log.warning(
                "stopped by a signal, saved at step %d; to go on: python -m mnist_lightning.train resume=%s",
                trainer.global_step,
                shlex.quote(str(self.folder.parent)),
            )
        signals.stop_if_asked()

    def _save(self, trainer: L.Trainer, name: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.folder.is_dir():
            raise OSError(errno.ENOENT, "the folder has vanished", str(self.folder))
        now = time.monotonic()
        self.train_seconds += now - self._clock
        self._clock = self._saved_at = now
        self._saved_step = trainer.global_step
        for logger in trainer.loggers:  # a checkpoint must not be ahead of its curves
            logger.save()
        next_last = self.folder / f"{TEMPORARY}{LAST}"
        if name == BEST:
            trainer.save_checkpoint(self.folder / BEST, storage_options={"copy": next_last})
        else:
            trainer.save_checkpoint(next_last)
        if trainer.is_global_zero:
            last = self.folder / LAST
            if last.exists():
                last.replace(self.folder / PREVIOUS)
            next_last.replace(last)
