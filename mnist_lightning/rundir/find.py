"""Find the run folders and checkpoints under ``logs/``."""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd

from mnist_lightning.rundir.outside import as_word, expand_home
from mnist_lightning.rundir.status import FILE

log = logging.getLogger(__name__)

MULTIRUN = "multirun.yaml"  # Hydra's record of a sweep


def is_job(folder: Path) -> bool:
    """Tell whether a run is a job of a sweep."""
    return any((parent / MULTIRUN).is_file() for parent in folder.absolute().parents)


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's own folder, not another one with checkpoints below it."""
    return (folder / FILE).is_file() or (folder / ".hydra").is_dir()


def as_typed(folder: Path) -> Path:
    """Return a folder's path as the user would type it: relative, if it is below the working folder."""
    moved = HydraConfig.initialized() and HydraConfig.get().job.chdir
    here = Path(get_original_cwd()) if moved else Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def find_run(name: str, *, logs: Path = Path("logs"), jobs: bool = True) -> Path:
    """Find the folder of a run that has a checkpoint.

    Args:
        name: a run folder, or "latest": the newest run anywhere under ``logs`` with a valid checkpoint.
        logs: the folder of all runs.
        jobs: whether "latest" may be a job of a sweep.

    Raises:
        FileNotFoundError: there is no such run.
    """
    if name != "latest":
        folder = expand_home(name)
        if any((folder / "checkpoints").glob("*.ckpt")):
            return folder
        raise FileNotFoundError(f"{name} is not a run folder: {_tell_fault(folder)}")
    passed: Path | None = None
    for path in newest_first(logs.glob("**/checkpoints/*.ckpt")):
        if not is_run(path.parent.parent):
            continue
        if not jobs and is_job(path.parent.parent):
            passed = passed or path.parent.parent
            continue
        from mnist_lightning.rundir.checkpoint import load  # torch: only when there is something to read

        try:
            load(path)
        except OSError as error:
            log.warning("latest: skipping a checkpoint that can't be read: %s", error)
        else:
            return path.parent.parent
    if passed is not None:
        sweep = next(parent for parent in passed.parents if (parent / MULTIRUN).is_file())
        raise FileNotFoundError(
            f"latest: there are only jobs of sweeps under {logs.absolute()}: python -m"
            f" mnist_lightning.train -m resume={as_word(str(sweep))} continues the latest"
        )
    raise FileNotFoundError(
        f"latest: no run under {logs.absolute()} has a checkpoint yet; python -m mnist_lightning.train"
        " makes one"
    )


def find_checkpoint(run: str, checkpoint: str | None = None) -> Path:
    """Find the checkpoint to read: a run's ``best.ckpt``, or its newest checkpoint if it has no best one.

    Args:
        run: a run folder, "latest", or a checkpoint file.
        checkpoint: a checkpoint file; if given, ``run`` is ignored.

    Raises:
        FileNotFoundError: there is no such file or run.
    """
    path = expand_home(checkpoint or run)
    if path.is_file():
        return path
    if checkpoint is not None:
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: {lack_of('file', path)}")
    folder = find_run(run) / "checkpoints"
    best = folder / "best.ckpt"
    if best.exists():
        return best
    for path in newest_first(folder.glob("*.ckpt")):
        log.warning("%s has no best.ckpt yet: reading %s", folder, path.name)
        return path
    raise FileNotFoundError(f"{folder} has no checkpoint that can be read")


def lack_of(kind: str, path: Path) -> str | None:
    """Say why a path can't be used where a "folder" or a "file" is wanted; None if it is one."""
    if not path.exists():
        return f"there is no such {kind}"
    if path.is_dir() if kind == "folder" else path.is_file():
        return None
    return f"it is a {'folder' if path.is_dir() else 'file' if path.is_file() else 'pipe or a device'}"


def _tell_fault(path: Path) -> str:
    """Say why a path is not the folder of a run with a checkpoint."""
    owner = next((parent for parent in path.parents if is_run(parent)), None)
    if owner is not None and path.exists() and not is_run(path):
        return f"it belongs to the run {owner}"
    return lack_of("folder", path) or "it has no checkpoints/*.ckpt"


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort files by the time of their last change, the newest first; skip files that no longer exist."""
    changed = {}
    for path in paths:
        with contextlib.suppress(OSError):
            changed[path] = path.stat().st_mtime_ns
    return sorted(changed, key=changed.__getitem__, reverse=True)
