"""The folders that runs leave under ``logs/``."""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd

from mnist_lightning.rundir.outside import as_word, expand_home
from mnist_lightning.rundir.status import FILE

log = logging.getLogger(__name__)

MULTIRUN = "multirun.yaml"  # Hydra's own record of a sweep


def is_job(folder: Path) -> bool:
    """Whether a run belongs to a sweep, which compares its jobs before one of them is tested."""
    return any((parent / MULTIRUN).is_file() for parent in folder.absolute().parents)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, and not one in which a run has something else write its checkpoints."""
    return (folder / FILE).is_file() or (folder / ".hydra").is_dir()


def as_typed(folder: Path) -> Path:
    """A folder as a person would type it in the folder where the command was typed."""
    moved = HydraConfig.initialized() and HydraConfig.get().job.chdir
    here = Path(get_original_cwd()) if moved else Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def find_run(name: str, *, logs: Path = Path("logs"), jobs: bool = True) -> Path:
    """The folder of a run that has a checkpoint.

    Args:
        name: a run folder, or "latest": the newest with a valid checkpoint, wherever it lies under
            ``logs``, the jobs of multiruns among them.
        jobs: False: "latest" passes over these.

    Raises:
        FileNotFoundError: there is none.
    """
    if name != "latest":
        folder = expand_home(name)
        if not folder.is_dir():
            raise FileNotFoundError(f"{name} is not a run folder: there is no such folder")
        if not any((folder / "checkpoints").glob("*.ckpt")):
            raise FileNotFoundError(f"{name} is not a run folder: it has no checkpoints/*.ckpt")
        return folder
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
            log.warning("latest: passing over a checkpoint that can't be read: %s", error)
        else:
            return path.parent.parent
    if passed is not None:
        sweep = next(parent for parent in passed.parents if (parent / MULTIRUN).is_file())
        raise FileNotFoundError(
            f"latest: there are only jobs of sweeps under {logs.absolute()}: python -m"
            f" mnist_lightning.train -m resume={as_word(str(sweep))} goes on with the latest"
        )
    raise FileNotFoundError(
        f"latest: no run under {logs.absolute()} has a checkpoint yet; python -m mnist_lightning.train"
        " makes one"
    )


def find_checkpoint(run: str, checkpoint: str | None = None) -> Path:
    """The file to read: the best checkpoint of a run, the newest where none is best, or a file itself.

    Args:
        run: a run folder, "latest", or a checkpoint file.
        checkpoint: a file, which goes before ``run``.

    Raises:
        FileNotFoundError: there is none.
    """
    path = expand_home(checkpoint or run)
    if path.is_file():
        return path
    if checkpoint is not None:
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: there is no such file")
    folder = find_run(run) / "checkpoints"
    best = folder / "best.ckpt"
    if best.exists():
        return best
    for path in newest_first(folder.glob("*.ckpt")):
        log.warning("%s has no best.ckpt yet: reading %s", folder, path.name)
        return path
    raise FileNotFoundError(f"{folder} has no checkpoint that can be read")


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Files by the time of their last change; what has vanished, or is a link to nothing, is left out."""
    changed = {}
    for path in paths:
        with contextlib.suppress(OSError):
            changed[path] = path.stat().st_mtime_ns
    return sorted(changed, key=changed.__getitem__, reverse=True)
