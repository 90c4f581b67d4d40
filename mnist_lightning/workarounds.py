"""Where this project goes behind a library's public names: what changes it for the whole process, and what
uses a name that it does not promise to keep.  Why, and for which release.

Commands install what changes a library; importing this package changes nothing.
"""

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.config_store import ConfigStore

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
    from optuna import Trial
    from torch.utils.tensorboard import SummaryWriter

SET_EACH_STEP = "_current_fx_name"
"""Lightning 2.6 sets this attribute some 40 times a step; ``DigitClassifier`` makes it cheap."""


def share_config_store() -> None:
    """Keep Hydra 1.3 from copying its store of schemas a hundred times for a --help, which takes 1.1 s.

    The store is a singleton that hands out copies of what it holds, so that it can stand for its copy.
    """
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def read_yaml_by_libyaml() -> None:
    """OmegaConf 2.3 reads YAML by PyYAML's parser in Python, a fifth of the time of composing settings.

    The same parser in C, where PyYAML was built with it, gives the same values.
    """
    if hasattr(yaml, "CSafeLoader"):
        yaml.SafeLoader = yaml.CSafeLoader


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


def is_validation_due(trainer: "Trainer") -> bool:
    """Whether Lightning 2.6 validates after the training batch that ends now."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """A stretch after which a process that is somebody else's, a notebook's, is as it was before.

    Lightning and ``quiet_lightning`` change the environment, the filters of warnings, loggers, the random
    states of Python, NumPy and torch, and whether torch wants deterministic algorithms.
    """
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng

    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    loggers.append(logging.getLogger("lightning"))
    told = [(one, one.level, one.propagate, one.handlers[:]) for one in loggers]
    environ, hook, raises = dict(os.environ), threading.excepthook, logging.raiseExceptions
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(isolate_rng())
        stack.enter_context(usual_torch())
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            threading.excepthook, logging.raiseExceptions = hook, raises
            for name in os.environ.keys() - environ.keys():
                del os.environ[name]
            os.environ.update(environ)
            for one, level, propagate, handlers in told:
                one.level, one.propagate, one.handlers[:] = level, propagate, handlers


@contextmanager
def hydra_as_it_was() -> Iterator[None]:
    """A stretch in which Hydra 1.3 is used beside an application that uses it too: its version base, name of
    the job and config come back."""
    from hydra import version
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.singleton import Singleton
    from hydra.core.utils import JobRuntime, setup_globals

    names = (HydraConfig, JobRuntime, version.VersionBase)
    kept: dict[Any, Any] = {name: Singleton._instances.pop(name, None) for name in names}
    version.setbase("1.3")
    setup_globals()
    JobRuntime.instance().set("name", "train")
    try:
        yield
    finally:
        for name in names:
            Singleton._instances.pop(name, None)
        Singleton._instances.update({name: one for name, one in kept.items() if one is not None})


@contextmanager
def usual_torch() -> Iterator[None]:
    """A stretch with torch's own defaults: float32, the CPU, gradients; the user's come back behind it."""
    import torch

    dtype, device, grad = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    moved = device.type != "cpu"
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if moved:
        torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if moved:
            torch.set_default_device(device)


def compiler_failure() -> type[Exception]:
    """What torch.compile raises where its backend can't work; torch 2.14 has no public name for it."""
    from torch._dynamo.exc import BackendCompilerFailed

    return BackendCompilerFailed


def trial_id(trial: "Trial") -> int:
    """The number by which a storage knows a trial, as ``optuna.Trial`` is made from; Optuna 4 hides it."""
    return trial._trial_id


def drop_from(logger: "TensorBoardLogger", step: int) -> None:
    """Let the SummaryWriter that Lightning 2.6 is about to make hide what was logged from this step on."""
    logger._kwargs["purge_step"] = step


def add_summary(writer: "SummaryWriter", summary: Any) -> None:
    """Write hyper-parameters into a run's own event file: torch 2.14's ``add_hparams`` begins another one."""
    writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
