"""The folders that runs leave under ``logs/``."""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from mnist_lightning.rundir.outside import expand_home

log = logging.getLogger(__name__)


def find_run(name: str, *, logs: Path = Path("logs")) -> Path:
    """The folder of a run that has a checkpoint.

    Args:
        name: a run folder, or "latest": the newest with a valid checkpoint, wherever it lies under
            ``logs``, the jobs of multiruns among them.

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
    for path in newest_first(logs.glob("**/checkpoints/*.ckpt")):
        from mnist_lightning.rundir.checkpoint import load  # torch: only when there is something to read

        try:
            load(path)
        except OSError as error:
            log.warning("latest: passing over a checkpoint that can't be read: %s", error)
        else:
            return path.parent.parent
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
