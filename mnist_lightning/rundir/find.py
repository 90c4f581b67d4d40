"""The folders that runs leave under ``logs/``."""

import logging
from pathlib import Path

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
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"{name} is not a run folder: there is no such folder")
        if not any((folder / "checkpoints").glob("*.ckpt")):
            raise FileNotFoundError(f"{name} is not a run folder: it has no checkpoints/*.ckpt")
        return folder
    checkpoints = sorted(logs.glob("**/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    for path in reversed(checkpoints):
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
    path = Path(checkpoint or run).expanduser()
    if path.is_file():
        return path
    if checkpoint is not None:
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: there is no such file")
    folder = find_run(run) / "checkpoints"
    best = folder / "best.ckpt"
    if best.exists():
        return best
    newest = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    log.warning("%s has no best.ckpt yet: reading %s", folder, newest.name)
    return newest
