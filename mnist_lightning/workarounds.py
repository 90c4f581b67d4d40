"""Collect every place that changes a library for the whole process or uses one of its private names.

Each says why, and for which release.  Commands install the changes; importing this package changes nothing.
"""

import difflib
import importlib.util
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, read_write

from mnist_lightning.settings_help import flatten
from mnist_lightning.targets import as_literal

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
    from optuna import Trial
    from optuna.trial import FrozenTrial
    from torch.utils.tensorboard import SummaryWriter

SET_EACH_STEP = "_current_fx_name"
"""Lightning 2.6 sets this attribute about 40 times a step; ``DigitClassifier`` makes that cheap."""


def share_config_store() -> None:
    """Keep Hydra 1.3 from copying its store of schemas a hundred times for a --help, which takes 1.1 s.

    The store is a singleton and returns copies of its contents, so it can serve as its own copy.
    """
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


def keep_names_literal() -> None:
    """Keep Hydra 1.3 from resolving interpolations in the names of a job's output and working folders.

    Hydra saves both folders as settings, and would look up the seed for a folder named ``${seed}``.
    """
    plain = HydraConfig.set_config
    if plain.__module__ == __name__:
        return

    def set_config(config: HydraConfig, cfg: DictConfig) -> None:
        runtime: Any = OmegaConf.to_container(cfg.hydra.runtime, resolve=False)
        for key in ("output_dir", "cwd"):
            name = str(runtime.get(key))
            if "${" in name and "\\${" not in name:
                with read_write(cfg.hydra.runtime):
                    cfg.hydra.runtime[key] = as_literal(name)
        plain(config, cfg)

    HydraConfig.set_config = set_config  # type: ignore[assignment, method-assign]


def read_yaml_by_libyaml() -> None:
    """Let OmegaConf 2.3 read YAML with PyYAML's parser in C, if PyYAML was built with it.

    The parser in Python takes a fifth of the time of composing settings; both give the same values.
    """
    if hasattr(yaml, "CSafeLoader"):
        yaml.SafeLoader = yaml.CSafeLoader


def tell_settings_in_a_line() -> None:
    """Print Hydra 1.3's errors about settings in one line that names the nearest key or the choices.

    Hydra advises "+key" for each unknown key, even a misspelt one, in several lines, and ends in a traceback
    for a group that is null.
    """
    load, apply = ConfigLoaderImpl.load_configuration, ConfigLoaderImpl._apply_overrides_to_config

    def load_telling(
        self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        try:
            composed = load(self, config_name, overrides, *args, **kwargs)
            told = (composed.get("hydra") or {"verbose": False})["verbose"]
            if not isinstance(told, (bool, str, ListConfig)):
                raise ValueError(
                    f"hydra.verbose must be true, false, a logger or a list of loggers, got {told}"
                )
            return composed
        except (ConfigCompositionException, ValueError) as error:
            line = " ".join(str(error).partition("Config search path")[0].split())
            if line.startswith("Error merging override") and error.__cause__ is not None:
                line += f": {str(error.__cause__).splitlines()[0]}"
        pairs = [one.lstrip("+~").partition("=")[::2] for one in overrides]
        match = re.match(r"Could not override '(\w+)\.(\w+)\.[^']+': (?=no YAML)", line)
        if match and match[2] in self.get_group_options(match[1]):
            line = f"{match[0]}it comes with {match[1]}={match[2]}, which is not chosen"
        for key, value in pairs:
            choices = self.get_group_options(key)
            if choices and value not in choices and "Config group override" in line:
                line = f"{key}={value} chooses nothing: {key} must be one of {', '.join(choices)}"
            elif choices and f"Could not override '{key}'" in line and "resume" in dict(pairs):
                line = (
                    f"{key}={value} can't be chosen with resume=, which uses the run's own {key}:"
                    f" give single settings of it, {key}.…=…"
                )
        sys.exit(line)

    def apply_telling(overrides: list[Any], cfg: DictConfig) -> None:
        for one in overrides:
            if one.is_add() or one.is_force_add():
                _, name, closed = find_home(one.key_or_group, cfg)
                if name and closed is not None:
                    advice = advise(one.key_or_group, cfg)
                    raise ConfigCompositionException(f"Could not add '{one.key_or_group}': {advice}")
        try:
            apply(overrides, cfg)
        except ConfigCompositionException as error:
            match = re.match(r"Could not override '(.+)'", str(error))
            if match is None:
                raise
            key, inner = match[1], str(getattr(error.__cause__, "full_key", ""))
            key = inner if inner.startswith(f"{key}.") else key  # of key={inner: 1}
            raise ConfigCompositionException(f"Could not override '{key}': {advise(key, cfg)}") from error

    if load.__module__ != __name__:
        ConfigLoaderImpl.load_configuration = load_telling  # type: ignore[method-assign]
        ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply_telling)  # type: ignore[method-assign]


def find_home(key: str, cfg: DictConfig) -> tuple[str, str, list[str] | None]:
    """Find where a key leaves the settings that exist.

    Returns:
        the innermost part that exists, "" for all settings; the first name that it lacks, "" for a key that
        exists; and the names that it has if it can take no others, else None.
    """
    node: Any = cfg
    names = key.split(".")
    for place, name in enumerate(names):
        has = list(node) if isinstance(node, DictConfig) and not node._is_none() else None
        if has is None or name not in has:
            closed = has is not None and is_dataclass(OmegaConf.get_type(node))
            return ".".join(names[:place]), name, has if closed else None
        node = node._get_node(name)
    return key, "", None


def advise(key: str, cfg: DictConfig) -> str:
    """Say which key a key that the settings lack may stand for, or which there are, or how to add it."""
    near = find_near(key, OmegaConf.to_container(cfg))
    meant = f"did you mean {near}?" if near else ""
    home, name, closed = find_home(key, cfg)
    if closed is not None:
        there_is = (
            f"{home} has no {name}: it has {', '.join(closed)}" if home else f"there is no {name}: see --help"
        )
        return meant or there_is
    adding = f"+{key}=… adds it"
    if not home or key != f"{home}.{name}":
        return meant or f"no YAML file has it; {adding}"
    # it may be an argument of the class that the parent names
    return f"{meant} Otherwise, {adding}" if meant else f"{home} has no {name}; {adding}"


def find_near(key: str, settings: Any) -> str | None:
    """The key that may have been meant: one that is spelt alike at the first place where there is no such
    name, or the only one elsewhere whose last name is the same or spelt alike."""
    inner, names = settings, key.split(".")
    for place, name in enumerate(names):
        if not isinstance(inner, dict):
            return None
        if name not in inner:
            near = difflib.get_close_matches(name, map(str, inner), n=1, cutoff=0.7)
            if near:
                return ".".join([*names[:place], near[0], *names[place + 1 :]])
            break
        inner = inner[name]
    elsewhere: dict[str, list[str]] = {}
    for leaf in flatten(settings):
        elsewhere.setdefault(leaf.rpartition(".")[2], []).append(leaf)
    alike = difflib.get_close_matches(names[-1], elsewhere, n=1, cutoff=0.8)
    meant = elsewhere[alike[0]] if alike and len(names) <= 2 else []
    return meant[0] if len(meant) == 1 else None


def compose_once() -> None:
    """Keep Hydra 1.3 from composing all settings twice, the first time only to read their ``hydra.mode``.

    The first result, settings or an error, is returned when Hydra composes again with the same arguments and
    the one override that it has added.
    """
    from hydra._internal.hydra import Hydra

    plain = Hydra.get_mode
    if plain.__module__ == __name__:
        return

    def get_mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
        mode = RunMode.RUN if {"-m", "--multirun"}.isdisjoint(sys.argv) else RunMode.MULTIRUN
        wanted: dict[str, Any] = {"config_name": config_name, "run_mode": mode}
        wanted |= {"from_shell": True, "validate_sweep_overrides": True}
        loader: Any = hydra.config_loader
        compose, typed = loader.load_configuration, list(overrides)
        first: DictConfig | Exception
        said: RunMode | None
        try:
            settings: DictConfig = compose(overrides=overrides, **wanted)
            first, said = settings, settings.hydra.mode
        except Exception as error:
            first, said = error, plain(hydra, config_name, overrides)

        def give_first(overrides: list[str], **arguments: Any) -> DictConfig:
            del loader.load_configuration  # it replaces a single call
            added = overrides[len(typed) :]
            if arguments != wanted or overrides[: len(typed)] != typed or added not in ([], [word]):
                composed: DictConfig = compose(overrides=overrides, **arguments)
                return composed
            if isinstance(first, Exception):
                raise first
            first.hydra.overrides.hydra.extend(added)
            first.hydra.mode = mode
            return first

        word = f"hydra.mode={mode.name}"
        if said in (None, mode):
            loader.load_configuration = give_first
        return said

    Hydra.get_mode = get_mode  # type: ignore[assignment, method-assign]


def start_others_as(module: str) -> None:
    """Let Lightning 2.6 start the other processes of a run as ``python -m module``.

    It matters if Python can't run the file that was started: a console script on Windows is an .exe.
    """
    main: Any = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    can_run = os.path.isfile(sys.argv[0]) if spec is None else spec.name != "__main__"
    if not can_run:
        main.__spec__ = importlib.util.find_spec(module)


def quiet_tensorboard() -> None:
    """Silence the traceback of TensorBoard's writing thread; the next write raises the error anyway."""
    others = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if "_AsyncWriterThread" not in type(told.thread).__name__:
            others(told)

    if getattr(others, "__module__", None) != __name__:
        threading.excepthook = hook


def quiet_matplotlib() -> None:
    """Silence matplotlib 3.11's messages about its list of fonts, which it prints if there is none yet."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def quiet_lightning() -> None:
    """Silence Lightning's advice about settings that are chosen on purpose."""
    logging.getLogger("lightning").handlers.clear()  # Hydra's console handler prints them already
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).handlers.clear()
        logging.getLogger(package).setLevel(logging.WARNING)  # devices, tips, "fit stopped"
    for message in (
        r".*does not have many workers",  # the images are in memory
        r".*is smaller than the logging interval",  # the end of an epoch is always logged
        r".*your dataloader is not resumable",  # its sampler is
        r"GPU available but not used",  # accelerator=cpu, and auto on a Mac
        r".*isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.15
    ):
        warnings.filterwarnings("ignore", message)


def skip_device_probe() -> None:
    """Keep torch from looking for a GPU in every optimizer step if there is none.

    Importing Lightning sets this variable, so that torch's optimizers load NVIDIA's library in each step.
    With torch 2.15 this takes 0.13 ms, a tenth of a small net's step.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def is_validation_due(trainer: "Trainer") -> bool:
    """Whether Lightning 2.6 validates after the training batch that ends now."""
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """Restore a user's process, such as a notebook's, after the block.

    Lightning and ``quiet_lightning`` change the environment, the warning filters, loggers, the random states
    of Python, NumPy and torch, and whether torch uses deterministic algorithms.
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
    """Use Hydra 1.3 within an application that uses Hydra too.

    Its version base, job name and config are restored after the block.
    """
    from hydra import version
    from hydra.core.singleton import Singleton
    from hydra.core.utils import JobRuntime, setup_globals

    names = (HydraConfig, JobRuntime, version.VersionBase)
    kept: dict[Any, Any] = {name: Singleton._instances.pop(name, None) for name in names}
    version.setbase("1.3")
    setup_globals()
    JobRuntime.instance().set("name", "train")
    loading, applying = ConfigLoaderImpl.load_configuration, ConfigLoaderImpl._apply_overrides_to_config
    tell_settings_in_a_line()
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = loading  # type: ignore[method-assign]
        ConfigLoaderImpl._apply_overrides_to_config = staticmethod(applying)  # type: ignore[method-assign]
        for name in names:
            Singleton._instances.pop(name, None)
        Singleton._instances.update({name: one for name, one in kept.items() if one is not None})


@contextmanager
def usual_torch() -> Iterator[None]:
    """Use torch's own defaults within the block (float32, CPU, gradients), then restore the user's."""
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


def operation_tools() -> tuple[Any, Any, Any]:
    """Return ``TorchDispatchMode``, which sees each operation of torch, and two functions on its arguments.

    torch 2.14 documents the first, and has public names for none of them.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    return TorchDispatchMode, tree_leaves, tree_map_only


def compiler_failure() -> type[Exception]:
    """Return the exception of torch.compile if its backend fails; torch 2.14 has no public name for it."""
    from torch._dynamo.exc import BackendCompilerFailed

    return BackendCompilerFailed


def trial_id(trial: "Trial | FrozenTrial") -> int:
    """Return a trial's number in its storage, which ``optuna.Trial`` takes; in Optuna 4 it is private."""
    return trial._trial_id


def drop_from(logger: "TensorBoardLogger", step: int) -> None:
    """Make the SummaryWriter that Lightning 2.6 will create hide what was logged from this step on."""
    logger._kwargs["purge_step"] = step


def add_summary(writer: "SummaryWriter", summary: Any) -> None:
    """Write hyper-parameters to a run's own event file; torch 2.14's ``add_hparams`` starts another one."""
    writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
