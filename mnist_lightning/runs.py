"""The folders that runs leave under ``logs/``."""

from pathlib import Path


def find_run(name: str, *, logs: Path = Path("logs")) -> Path:
    """The folder of a run that has a checkpoint.

    Args:
        name: a run folder, or "latest": the newest with a checkpoint, wherever it lies under ``logs``.

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
    if not checkpoints:
        raise FileNotFoundError(
            f"latest: no run under {logs.absolute()} has a checkpoint yet; python -m mnist_lightning.train"
            " makes one"
        )
    return checkpoints[-1].parent.parent
