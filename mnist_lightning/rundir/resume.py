"""``resume=<run folder>``: continue a run from its newest checkpoint.

The argument is replaced before Hydra composes the config: the run's saved settings are the base, and keys on
the command line override them.  The run's own ``.hydra/config.yaml`` does not change; each resumption saves
its config beside it, in ``.hydra/resume-<number>/``.

The folder may come from a stranger.  Hydra never reads it: ``trust`` checks the saved settings, and Hydra
gets them as a config made in this process.
"""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mnist_lightning import trust
from mnist_lightning.cli import quote
from mnist_lightning.config import CONF_DIR, ConfigError, Train, check
from mnist_lightning.images.sources import find_source
from mnist_lightning.rundir.find import find_run, is_job
from mnist_lightning.rundir.outside import check_links, check_run, expand_home, read_json, read_yaml
from mnist_lightning.rundir.status import is_main_process, read
from mnist_lightning.settings_help import flatten
from mnist_lightning.targets import TARGET, find_targets

KEY = "resume="
BASE = "resumed"  # the config name under which Hydra finds the settings
# Settings that influence the weights: a resumed run must keep their values.
FIXED = (
    "seed",
    "decay_biases",
    "ema_decay",
    "monitor",
    "data",
    "model",
    "loss",
    "metrics",
    "optimizer",
    "scheduler",
)
# Files of an earlier attempt that a new attempt in the same folder would mistake for its own
LEFT = (
    *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/previous.ckpt", "metrics.json"),
    *("csv/metrics.csv", "tensorboard/**/events.out.tfevents.*", "val_correct.npy", "test_correct.npy"),
)
FREE = ("data.data_dir", "data.path", "data.num_workers")
# Trainer's arguments that end a run, and those that change weights by rounding at most; a resumed run must
# keep all others.
STOPPING = ("max_time", "min_epochs", "min_steps")
LIMITS = ("max_epochs", "max_steps", *STOPPING)
TRAINER_FREE = (
    *("accelerator", "strategy", "devices", "num_nodes", "use_distributed_sampler", "plugins"),
    *("limit_test_batches", "limit_predict_batches", "num_sanity_val_steps", "log_every_n_steps"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams"),
    *("logger", "profiler", "default_root_dir", "model_registry", "barebones"),
    *("deterministic", "benchmark", "inference_mode", "detect_anomaly"),
)
# Lightning's callbacks that influence the weights other than by ending the run.
DECIDING = ("GradientAccumulationScheduler", "BaseFinetuning", "BackboneFinetuning", "ModelPruning")


def resume_run(name: str, arguments: list[str]) -> list[str]:
    """Return the arguments that make Hydra compose a config from the saved settings of a run.

    Args:
        name: a run folder, or "latest".
        arguments: all arguments of the command line.

    Raises:
        OSError: the run does not exist, or has no checkpoint.
        ConfigError: an incompatible earlier version trained the run, or its settings can't be read.
        TrustError: the run's settings name code that is not trusted.
    """
    folder = find_run(name, jobs=False).absolute()
    check_run(folder)
    check_links(folder)
    number = max([0, *(int(path.name.partition("-")[2]) for path in find_resumptions(folder))]) + 1
    typed = [argument for argument in arguments if not argument.startswith((KEY, trust.KEY))]
    trusted = trust.typed_trust(arguments)
    load_settings(folder, typed, trusted)
    if is_job(folder) and not any(argument.startswith("test=") for argument in typed):
        typed.append("test=false")  # a sweep's jobs do not test
    if trusted:
        os.environ[trust.VARIABLE] = ",".join(trusted)  # for the processes that trainer=ddp adds
    return [
        *("--config-name", BASE),
        *typed,
        KEY + quote(str(folder)),
        f"hydra.run.dir={quote(str(folder))}",
        f"hydra.output_subdir=.hydra/resume-{number}",
        "hydra/job_logging=train",
        "+hydra.callbacks.prepare._target_=mnist_lightning.rundir.claim.Prepare",
    ]


def load_settings(
    folder: Path,
    typed: list[str],
    trusted: tuple[str, ...],
    *,
    others: Mapping[str, Any] | None = None,
) -> None:
    """Check the saved settings of a run, and give them to Hydra.

    Args:
        folder: the run's folder.
        typed: arguments of the command line that override saved settings.
        trusted: the modules that the user trusts.
        others: settings that replace the saved ones.

    Raises:
        OSError, ConfigError, TrustError: see ``resume_run``.
    """
    first = folder / ".hydra" / "config.yaml"
    # Hydra writes overrides.yaml last: without it, the process was killed before the config was complete
    whole = [path for path in find_resumptions(folder) if (path / "overrides.yaml").is_file()]
    last = whole[-1] / "config.yaml" if whole else first
    keys = [argument.partition("=")[0].lstrip("+~") for argument in typed]
    settings: dict[str, Any] = {}
    for path in (first, last):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} can't be resumed: it has no {path.relative_to(folder)}")
        settings = read_settings(path)
        gone = find_gone(settings)
        if gone:
            raise ConfigError(
                f"{folder} can't be resumed: it was trained by an earlier version of mnist_lightning, whose"
                f" {gone} is gone; evaluate, predict, compare and export still read it"
            )
        trust.check_settings(settings, folder, trusted, typed=keys)
    settings |= others or {}
    trainer = settings.get("trainer")
    if isinstance(trainer, dict) and not trainer.get("default_root_dir"):
        trainer["default_root_dir"] = "${run_dir:}"  # else Lightning would write where the command is typed
    ConfigStore.instance().store(name=BASE, node=settings, provider="mnist_lightning")


def find_resumptions(folder: Path) -> list[Path]:
    """Return the folders with the settings of a run's resumptions, in their order."""
    found = [path for path in folder.glob(".hydra/resume-*") if re.fullmatch(r"resume-\d{1,9}", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


@contextmanager
def on_trial(folder: Path, *, resumed: bool) -> Iterator[None]:
    """Remove the settings of a resumption that fails within the block before it saves a checkpoint, because
    the next resumption would start from them."""
    before = stamp(folder)
    try:
        yield
    except Exception:
        if resumed and is_main_process() and stamp(folder) == before:
            for path in find_resumptions(folder)[-1:]:
                (path / "overrides.yaml").unlink(missing_ok=True)
        raise


def stamp(folder: Path) -> dict[str, int]:
    """Return the times in nanoseconds at which a run's checkpoints were written, by file name."""
    with contextlib.suppress(OSError):
        return {path.name: path.stat().st_mtime_ns for path in (folder / "checkpoints").glob("*.ckpt")}
    return {}


def read_settings(path: Path) -> dict[str, Any]:
    """Read a run's saved settings without resolving interpolations.

    Raises:
        ConfigError: the file can't be read, or holds something that no run of this project saves.
    """
    try:
        saved = OmegaConf.to_container(OmegaConf.create(read_yaml(path)), resolve=False)
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(saved, dict) or not all(isinstance(key, str) for key in saved):
        raise ConfigError(f"{path} holds no settings")
    settings = {str(key): value for key, value in saved.items()}
    for key in ("hydra", "defaults"):
        if key in settings:
            raise ConfigError(f"{path} is refused: it has a {key}: node, which no run saves")
    return settings


def find_gone(settings: dict[str, Any]) -> str | None:
    """Return the first name in saved settings that this version no longer knows; None if there is none."""
    model = settings.get("model")
    if isinstance(model, dict) and TARGET not in model:
        return "model without a _target_"
    names = [name for _, name, _ in find_targets(settings) if name.startswith("mnist_lightning.")]
    return next((name for name in names if not is_module(name.rpartition(".")[0])), None)


def is_default(data_dir: str) -> bool:
    """Tell whether a path is the default data folder in ``conf/``."""
    default = OmegaConf.load(Path(CONF_DIR) / "data" / "mnist.yaml")
    return bool(OmegaConf.select(default, "data_dir") == data_dir)


def is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the parent package is missing, too
        return False
    return spec is not None and spec.submodule_search_locations is None  # our packages hold no classes


def find_stops(settings: Train) -> list[str]:
    """Return the settings that can stop a run early, each as "key=value"."""
    limits = {f"trainer.{name}": settings.trainer.get(name) for name in STOPPING}
    for name, config in settings.callbacks.items():
        if config and str(config.get(TARGET)).endswith(("EarlyStopping", "Timer")):
            limits |= flatten(config, f"callbacks.{name}.")
    return [f"{key}={value}" for key, value in sorted(limits.items()) if value is not None]


def resume_job(job_dir: Path) -> str | None:
    """Return the folder from which a job of a sweep resumes: its own, if the job was interrupted or requeued
    and has a checkpoint.  Otherwise remove the files of an earlier attempt, except its log, and return None.
    """
    status = read(job_dir)
    checkpoints = job_dir / "checkpoints"
    if status is not None and status.state == "interrupted" and any(checkpoints.glob("*.ckpt")):
        return str(job_dir)
    for name in LEFT:
        for path in job_dir.glob(name):
            with contextlib.suppress(OSError):
                path.unlink()
    return None


def check_resumption(settings: Train, overrides: Sequence[str]) -> None:
    """Check, before torch is imported, that a run can continue with these settings.

    Args:
        settings: the settings with which to resume.
        overrides: the overrides of the command line.

    Raises:
        ConfigError: a setting that influences the weights has changed.
        SystemExit: with code 0; the run has already finished.
    """
    folder = Path(str(settings.resume))
    saved = check(OmegaConf.load(folder / ".hydra" / "config.yaml"), Train)  # type: ignore[arg-type]
    before, now = flatten(asdict(saved)), flatten(asdict(settings))
    changed = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (is_fixed(key) or decides(key, saved, settings))
    ]
    if changed:
        raise ConfigError(f"{folder} can't be resumed with other settings ({'; '.join(changed)})")
    check_place(settings, folder, overrides)
    for name in ("epochs", "steps"):
        key = f"max_{name}"
        old, new = saved.trainer.get(key), settings.trainer.get(key)
        if old != new and "total_steps" in settings.scheduler.values():
            raise ConfigError(
                f"trainer.{key}={new} can't be resumed: the run's schedule"
                f" ({settings.scheduler['_target_']}) is planned for {old} {name}; start a new run"
            )
    report, status = folder / "metrics.json", read(folder)
    if report.is_file() and (status is None or status.state == "completed"):
        done = read_json(report)
        if (
            not all(isinstance(done.get(name, 0), int) for name in ("epochs", "steps"))
            or "epochs" not in done
        ):
            raise ConfigError(f"{report} is damaged: it has no number of epochs")
        if not may_go_on(saved, settings, done):
            print(f"{folder} has finished: {done['epochs']} epochs; nothing to do")
            sys.exit(0)


def check_place(settings: Train, folder: Path, overrides: Sequence[str]) -> None:
    """Check that data is never downloaded to a place that only a run's folder names.

    The folder may come from a stranger.  Data is written only where the command line or ``conf/`` says.

    Raises:
        ConfigError: the data is not complete in the place that the run's settings name.
    """
    data = settings.data
    key, place = ("data_dir", data.data_dir) if data.path is None else ("path", data.path)
    told = any(override.startswith(f"data.{key}=") for override in overrides)
    source = find_source(
        data.name,
        expand_home(data.data_dir),
        path=None if data.path is None else expand_home(data.path),
        size=data.size,
        grey=data.grey,
        source=data.source,
    )
    if not (told or (key == "data_dir" and is_default(place)) or source.is_whole()):
        raise ConfigError(
            f"{folder} says that its data lies in {place}, where it is missing or incomplete: data.{key}=…"
            " sets the place to read it from, or to download it to"
        )


def is_fixed(key: str) -> bool:
    """Tell whether a resumed run must keep the value of this setting."""
    group, _, name = key.partition(".")
    if group == "trainer":
        return name.split(".")[0] not in (*LIMITS, *TRAINER_FREE)
    return group in FIXED and key not in FREE


def decides(key: str, *runs: Train) -> bool:
    """Tell whether a key belongs to a callback that influences the weights in any of these runs."""
    group, _, name = key.partition(".")
    configs = [(run.callbacks.get(name.split(".")[0]) or {}) for run in runs]
    return group == "callbacks" and any(str(one.get(TARGET)).endswith(DECIDING) for one in configs)


def may_go_on(saved: Train, settings: Train, done: dict[str, Any]) -> bool:
    """Tell whether the new settings let a finished run train further.

    Args:
        saved: the settings of the finished run.
        settings: the settings with which to resume.
        done: the content of the run's ``metrics.json``.
    """
    limits = [[run.trainer.get(f"max_{name}") for name in ("epochs", "steps")] for run in (saved, settings)]
    if limits[0] == limits[1] and find_stops(saved) == find_stops(settings):
        return False
    counts = done["epochs"], done.get("steps", -1)
    reached = [
        limit not in (None, -1) and limit <= count for limit, count in zip(limits[1], counts, strict=True)
    ]
    return not any(reached)
