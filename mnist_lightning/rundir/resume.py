"""``resume=<run folder>``: go on with a run where its newest checkpoint stands.

It is resolved before Hydra composes: the settings that the run left are the base, keys on the
command line win.  The run's own ``.hydra/config.yaml`` is not touched; each resumption leaves its
config beside it, in ``.hydra/resume-<number>/``.
"""

import importlib.util
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from mnist_lightning.cli import quote
from mnist_lightning.config import CONF_DIR, ConfigError, Train, check
from mnist_lightning.rundir.find import find_run
from mnist_lightning.rundir.status import read
from mnist_lightning.settings_help import flatten

KEY = "resume="
# What decides the weights: a run can't go on with another value of these.
FIXED = ("seed", "label_smoothing", "ema_decay", "monitor", "data", "model", "optimizer", "scheduler")
FREE = ("data.data_dir", "data.num_workers")


def resume_run(name: str, arguments: list[str]) -> list[str]:
    """The arguments that make Hydra compose from the settings that a run left.

    Raises:
        OSError: there is no such run, or it has no checkpoint.
    """
    folder = find_run(name).absolute()
    number = len(list(folder.glob(".hydra/resume-*"))) + 1
    base = folder / ".hydra" / (f"resume-{number - 1}" if number > 1 else "")
    if not (base / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} can't be resumed: it has no .hydra/config.yaml")
    gone = find_gone((base / "config.yaml").read_text(encoding="utf-8"))
    if gone:
        raise ConfigError(
            f"{folder} can't be resumed: it was trained by an earlier version of mnist_lightning, whose"
            f" {gone[0]} is gone; evaluate, predict, compare and export still read it"
        )
    return [
        *("--config-path", str(base), "--config-name", "config"),
        *(argument for argument in arguments if not argument.startswith(KEY)),
        KEY + quote(str(folder)),
        f"hydra.run.dir={quote(str(folder))}",
        f"hydra.output_subdir=.hydra/resume-{number}",
        f"hydra.searchpath=[{quote('file://' + CONF_DIR)}]",
        "hydra/job_logging=train",
        "+hydra.callbacks.prepare._target_=mnist_lightning.rundir.claim.Prepare",
    ]


def find_gone(config: str) -> list[str]:
    """The classes of this project that a saved config names and that are no longer where they were."""
    names = re.findall(r"_target_: (mnist_lightning\.[\w.]+)$", config, re.M)
    return [name for name in names if not is_module(name.rpartition(".")[0])]


def is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # nor is the package that it would lie in
        return False
    return spec is not None and spec.submodule_search_locations is None  # our packages hold no classes


def resume_job(job_dir: Path) -> str | None:
    """What a job of a sweep goes on with: its own folder where it was interrupted or requeued and has
    a checkpoint, else nothing, and all that an earlier attempt has left but its log is removed."""
    status = read(job_dir)
    checkpoints = job_dir / "checkpoints"
    if status is not None and status.state == "interrupted" and any(checkpoints.glob("*.ckpt")):
        return str(job_dir)
    for folder in (checkpoints, job_dir / "csv", job_dir / "tensorboard"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in ("metrics.json", "val_correct.npy", "test_correct.npy"):
        (job_dir / file).unlink(missing_ok=True)
    return None


def check_resumption(settings: Train) -> None:
    """Whether the run can go on with these settings, told before torch is imported.

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
        if key.split(".")[0] in FIXED and key not in FREE and before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(f"{folder} can't be resumed with other settings ({'; '.join(changed)})")
    old_epochs, epochs = saved.trainer.get("max_epochs"), settings.trainer.get("max_epochs")
    if epochs != old_epochs and "total_steps" in settings.scheduler.values():
        raise ConfigError(
            f"trainer.max_epochs={epochs} can't be resumed: the run's schedule"
            f" ({settings.scheduler['_target_']}) is laid out for {old_epochs} epochs; start a new run"
        )
    report = folder / "metrics.json"
    if report.is_file():
        done = json.loads(report.read_text(encoding="utf-8"))["epochs"]
        if epochs == old_epochs or (epochs != -1 and epochs <= done):
            print(f"{folder} has finished: {done} epochs; nothing to do")
            sys.exit(0)
