"""What changes a library for the whole process: why, and for which release.

Commands install these; importing this package changes nothing.
"""

import logging
import os
import threading
import warnings

from hydra.core.config_store import ConfigStore


def share_config_store() -> None:
    """Keep Hydra 1.3 from copying its store of schemas a hundred times for a --help, which takes 1.1 s.

    The store is a singleton that hands out copies of what it holds, so that it can stand for its copy.
    """
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def quiet_tensorboard() -> None:
    """TensorBoard's writing thread prints a traceback, and gives the error to the next write as well."""
    others = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if "_AsyncWriterThread" not in type(told.thread).__name__:
            others(told)

    if getattr(others, "__module__", None) != __name__:
        threading.excepthook = hook


def quiet_lightning() -> None:
    """Silence what Lightning says of things that are meant to be as they are."""
    logging.getLogger("lightning").handlers.clear()  # Hydra's console handler prints them already
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).handlers.clear()
        logging.getLogger(package).setLevel(logging.WARNING)  # devices, tips, "fit stopped"
    for message in (
        r".*does not have many workers",  # the images are in memory
        r".*is smaller than the logging interval",  # epoch ends are logged whatever the interval
        r".*your dataloader is not resumable",  # its sampler is
        r".*isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.15
    ):
        warnings.filterwarnings("ignore", message)


def skip_device_probe() -> None:
    """Without a GPU, keep torch from looking for one in every optimizer step.

    Importing Lightning sets this variable, and torch's optimizers then load NVIDIA's library anew
    each time they step: 0.13 ms with torch 2.15, a tenth of a small net's step.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
