"""Feed-forward neural networks on MNIST, with PyTorch Lightning, Hydra and TensorBoard."""

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_lightning.classifier import DigitClassifier
    from mnist_lightning.data import MNISTDataModule, load_mnist
    from mnist_lightning.network import FeedForward
    from mnist_lightning.python import compose, load
    from mnist_lightning.rundir.index import list_runs
    from mnist_lightning.train import train_here as train

__version__ = "0.1.0"
__all__ = [
    "DigitClassifier",
    "FeedForward",
    "MNISTDataModule",
    "compose",
    "list_runs",
    "load",
    "load_mnist",
    "train",
]

HOMES = {
    "compose": "python",
    "load": "python",
    "DigitClassifier": "classifier",
    "FeedForward": "network",
    "MNISTDataModule": "data",
    "list_runs": "rundir.index",
    "load_mnist": "data",
}

if sys.argv[:1] == ["-m"] and any(f"{__name__}." in word for word in sys.orig_argv):
    # python -m mnist_lightning.…, not another package that imports this one: Ctrl-C leaves no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, because importing torch takes seconds."""
    if name == "train":  # this module can be called
        return importlib.import_module(f"{__name__}.train")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
