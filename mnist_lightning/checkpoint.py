"""Checkpoints that can be trusted: where they may come from and how they are read."""

from pathlib import Path
from typing import Any

import torch


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU: tensors and plain data only, nothing of it executed.

    ``hyper_parameters`` are the arguments of ``DigitClassifier``, ``datamodule_hyper_parameters``
    those of ``MNISTDataModule``.

    Raises:
        OSError: there is no such file, or it holds no checkpoint of this project.
    """
    if "://" in str(path):
        raise OSError(f"{path}: checkpoints are read from local files only")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, …
        raise OSError(f"{path} is no checkpoint that can be loaded safely") from error
    if not isinstance(checkpoint, dict) or "hyper_parameters" not in checkpoint:
        raise OSError(f"{path} is no checkpoint of mnist_lightning")
    return checkpoint
