"""``resume=<run folder>``: go on with a run where its newest checkpoint stands.

It is resolved before Hydra composes: the settings that the run left are the base, keys on the
command line win.  The run's own ``.hydra/config.yaml`` is not touched; each resumption leaves its
config beside it, in ``.hydra/resume-<number>/``.

The folder may be a stranger's.  Hydra never looks into it: what its settings ask for is checked
(``trust``), and then given to Hydra as a config of this process.
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
BASE = "resumed"  # the name under which Hydra finds the settings
# What decides the weights: a run can't go on with another value of these.
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
# What an attempt that is begun anew would take for its own
LEFT = (
    *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/previous.ckpt", "metrics.json"),
    *("csv/metrics.csv", "tensorboard/**/events.out.tfevents.*", "val_correct.npy", "test_correct.npy"),
)
FREE = ("data.data_dir", "data.path", "data.num_workers")
# Of Trainer's arguments, those that end a run, and those that decide no weight but in its last bits; all
# others are fixed too.
STOPPING = ("max_time", "min_epochs", "min_steps")
LIMITS = ("max_epochs", "max_steps", *STOPPING)
TRAINER_FREE = (
    *("accelerator", "strategy", "devices", "num_nodes", "use_distributed_sampler", "plugins"),
    *("limit_test_batches", "limit_predict_batches", "num_sanity_val_steps", "log_every_n_steps"),
    *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams"),
    *("logger", "profiler", "default_root_dir", "model_registry", "barebones"),
    *("deterministic", "benchmark", "inference_mode", "detect_anomaly"),
)
# Lightning's callbacks that decide the weights; those that only end a run do not.
DECIDING = ("GradientAccumulationScheduler", "BaseFinetuning", "BackboneFinetuning", "ModelPruning")


def resume_run(name: str, arguments: list[str]) -> list[str]:
    """The arguments that make Hydra compose from the settings that a run left.

    Raises:
        OSError: there is no such run, or it has no checkpoint.
        ConfigError: an earlier version has trained it, or its settings can't be read.
        TrustError: its settings ask for more than they are trusted with.
    """
    folder = find_run(name, jobs=False).absolute()
    check_run(folder)
    check_links(folder)
    number = max([0, *(int(path.name.partition("-")[2]) for path in find_resumptions(folder))]) + 1
    typed = [argument for argument in arguments if not argument.startswith((KEY, trust.KEY))]
    trusted = trust.typed_trust(arguments)
    load_settings(folder, typed, trusted)
    if is_job(folder) and not any(argument.startswith("test=") for argument in typed):
        typed.append("test=false")  # as its sweep would
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
    """Give Hydra the settings that a run left, once they are checked.

    Args:
        others: of this project, in place of the saved ones.

    Raises:
        OSError, ConfigError, TrustError: see ``resume_run``.
    """
    first = folder / ".hydra" / "config.yaml"
    # Hydra writes overrides.yaml last: without it, a process was killed over its settings
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
    """The settings files of a run's resumptions, in their order."""
    found = [path for path in folder.glob(".hydra/resume-*") if re.fullmatch(r"resume-\d{1,9}", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


@contextmanager
def on_trial(folder: Path, *, resumed: bool) -> Iterator[None]:
    """Remove a resumption's settings if it fails before it has saved anything: they would be the base of
    the next one."""
    before = stamp(folder)
    try:
        yield
    except Exception:
        if resumed and is_main_process() and stamp(folder) == before:
            for path in find_resumptions(folder)[-1:]:
                (path / "overrides.yaml").unlink(missing_ok=True)
        raise


def stamp(folder: Path) -> dict[str, int]:
    """The times at which a run's checkpoints were written."""
    with contextlib.suppress(OSError):
        return {path.name: path.stat().st_mtime_ns for path in (folder / "checkpoints").glob("*.ckpt")}
    return {}


def read_settings(path: Path) -> dict[str, Any]:
    """A run's saved settings, not resolved.

    Raises:
        ConfigError: they can't be read, or hold what no run of this project saves.
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
    """Names in saved settings that an earlier version knew and this one does not."""
    model = settings.get("model")
    if isinstance(model, dict) and TARGET not in model:
        return "model without a _target_"
    names = [name for _, name, _ in find_targets(settings) if name.startswith("mnist_lightning.")]
    return next((name for name in names if not is_module(name.rpartition(".")[0])), None)


def is_default(data_dir: str) -> bool:
    """Whether a path is the data folder of ``conf/``."""
    default = OmegaConf.load(Path(CONF_DIR) / "data" / "mnist.yaml")
    return bool(OmegaConf.select(default, "data_dir") == data_dir)


def is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # nor is the package that it would lie in
        return False
    return spec is not None and spec.submodule_search_locations is None  # our packages hold no classes


def find_stops(settings: Train) -> list[str]:
    """The settings by which a run may be stopped early, each as key=value."""
    limits = {f"trainer.{name}": settings.trainer.get(name) for name in STOPPING}
    for name, config in settings.callbacks.items():
        if config and str(config.get(TARGET)).endswith(("EarlyStopping", "Timer")):
            limits |= flatten(config, f"callbacks.{name}.")
    return [f"{key}={value}" for key, value in sorted(limits.items()) if value is not None]


def resume_job(job_dir: Path) -> str | None:
    """Find what a job of a sweep resumes from: its own folder where it was interrupted or requeued and has
    a checkpoint, else nothing, and what an earlier attempt has written is removed, but its log."""
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
    """Whether the run can go on with these settings, told before torch is imported.

    Args:
        overrides: of the command line.

    Raises:
        ConfigError: they differ from the run's own in what decides its weights.
        SystemExit: with code 0; the run has finished, there is nothing to do.
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
                f" ({settings.scheduler['_target_']}) is laid out for {old} {name}; start a new run"
            )
    report, status = folder / "metrics.json", read(folder)
    if report.is_file() and (status is None or status.state == "completed"):
        done = read_json(report)
        if (
            not all(isinstance(done.get(name, 0), int) for name in ("epochs", "steps"))
            or "epochs" not in done
        ):
            raise ConfigError(f"{report} is damaged: it tells no epochs")
        if not may_go_on(saved, settings, done):
            print(f"{folder} has finished: {done['epochs']} epochs; nothing to do")
            sys.exit(0)


def check_place(settings: Train, folder: Path, overrides: Sequence[str]) -> None:
    """Whether the data lies where a run's folder says, or where the command line says.

    Raises:
        ConfigError: it does not, and would be put where a file says that may be a stranger's.
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
        # a folder's word that may be a stranger's: what it names is read, never written
        raise ConfigError(
            f"{folder} says that its data lies in {place}, where it is not, or not whole: data.{key}=… says"
            " where it lies, or is to be put"
        )


def is_fixed(key: str) -> bool:
    """Whether a run can go on with no other value of this key."""
    group, _, name = key.partition(".")
    if group == "trainer":
        return name.split(".")[0] not in (*LIMITS, *TRAINER_FREE)
    return group in FIXED and key not in FREE


def decides(key: str, *runs: Train) -> bool:
    """Whether a key belongs to a callback that decides the weights, before or now."""
    group, _, name = key.partition(".")
    configs = [(run.callbacks.get(name.split(".")[0]) or {}) for run in runs]
    return group == "callbacks" and any(str(one.get(TARGET)).endswith(DECIDING) for one in configs)


def may_go_on(saved: Train, settings: Train, done: dict[str, Any]) -> bool:
    """Whether a finished run is given a limit that allows more than it has done.

    Args:
        done: what its ``metrics.json`` holds.
    """
    limits = [[run.trainer.get(f"max_{name}") for name in ("epochs", "steps")] for run in (saved, settings)]
    if limits[0] == limits[1] and find_stops(saved) == find_stops(settings):
        return False
    counts = done["epochs"], done.get("steps", -1)
    reached = [
        limit not in (None, -1) and limit <= count for limit, count in zip(limits[1], counts, strict=True)
    ]
    return not any(reached)
