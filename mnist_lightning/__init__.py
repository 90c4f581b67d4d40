"""Feed-forward neural networks on MNIST, with PyTorch Lightning, Hydra and TensorBoard."""

import importlib
import os
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


def _is_own_command() -> bool:
    """Whether this process is one of the commands, not another package or program that imports this one."""
    if sys.argv[:1] == ["-m"]:  # python -m …, before its module has begun
        return any(f"{__name__}." in word for word in sys.orig_argv)
    start, _, name = os.path.basename("".join(sys.argv[:1])).removesuffix(".exe").partition("-")
    return start == "mnist" and os.path.isfile(os.path.join(os.path.dirname(__file__), f"{name}.py"))


if _is_own_command():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports leaves no traceback


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, because importing torch takes seconds."""
    if name == "train":  # this module can be called
        return importlib.import_module(f"{__name__}.train")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
