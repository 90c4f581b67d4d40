"""The film of a run: what a net was like at some sixty moments of its training."""

import base64
import io
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.outside import expand_home

NAME = "film.npz"
MOST_BYTES = 50_000_000  # unpacked; ours have less than 2 MB

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass
class Film:
    """M moments of a training, U units of the first layer, N images.

    Attributes:
        steps: (M,) int64, optimizer steps that were done, ascending.
        epochs: (M,) float32, the same in epochs.
        weights: (M, U, H, W) uint8: 128 is 0, and 1 and 255 the moment's limit on either side.
        limits: (M,) float32.
        images: (N, H, W) uint8.
        labels: (N,) int64.
        probabilities: (M, N, C) uint8, 255 for 1.
        activations: (M, N, U) uint8, of these units for these images; 255 is the moment's largest.
        train_loss, val_loss: (M,) float32, of some fixed images; val's are NaN where there are none.
        train_acc, val_acc: (M,) float32, of the same.
        batch_loss: (M,) float32, of the last batch; NaN before the first.
    """

    steps: NDArray[np.int64]
    epochs: Floats
    weights: Bytes
    limits: Floats
    images: Bytes
    labels: NDArray[np.int64]
    probabilities: Bytes
    activations: Bytes
    train_loss: Floats
    val_loss: Floats
    train_acc: Floats
    val_acc: Floats
    batch_loss: Floats

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: the arrays do not fit each other.
        """
        moments, units = self.weights.shape[:2]
        count, height, width = self.images.shape
        classes = self.probabilities.shape[2]
        wanted = {"weights": (moments, units, height, width), "images": (count, height, width)}
        wanted |= {"labels": (count,), "probabilities": (moments, count, classes)}
        wanted |= {"activations": (moments, count, units)}
        for field in fields(self):
            array = getattr(self, field.name)
            kind = "u" if field.name in wanted and field.name != "labels" else "if"
            if array.shape != wanted.get(field.name, (moments,)) or array.dtype.kind not in kind:
                raise ValueError(f"{field.name} is {array.dtype} {array.shape}")
        if not (
            moments and count and len(self.labels) and 0 <= self.labels.min() <= self.labels.max() < classes
        ):
            raise ValueError("it shows nothing")


def find_film(name: str, *, logs: Path = Path("logs")) -> Path:
    """The folder of a run that keeps a film.

    Args:
        name: a run folder, or "latest": the newest with a film, wherever it lies under ``logs``.

    Raises:
        FileNotFoundError: there is none.
    """
    if name != "latest":
        return expand_home(name)
    films = sorted(logs.glob(f"**/{NAME}"), key=lambda path: path.stat().st_mtime)
    if not films:
        raise FileNotFoundError(f"latest: no run under {logs.absolute()} has a {NAME} yet")
    return films[-1].parent


def write_film(path: Path, film: Film) -> None:
    """
    Raises:
        OSError: the file can't be written.
    """
    content = io.BytesIO()
    np.savez(content, **asdict(film))
    write_atomic(path, content.getvalue())


def read_film(folder: Path) -> Film:
    """The film that lies in a run's folder.

    Raises:
        OSError: there is none, or it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {NAME}: a single run of train keeps one (callbacks.film.enabled=true) of a"
            " FeedForward net of grey images"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MOST_BYTES:
                raise ValueError("it is too large")
        with np.load(path, allow_pickle=False) as arrays:
            return Film(**{field.name: arrays[field.name] for field in fields(Film)})
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        raise OSError(f"{path} is no film that can be read: {' '.join(str(error).split())[:200]}") from error


def pack_film(film: Film) -> dict[str, Any]:
    """The film as the page has it: arrays of bytes in base64, numbers as lists."""

    def encode(array: Bytes) -> str:
        return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()

    def numbers(array: Floats) -> list[float]:
        return [round(float(value), 4) for value in array] if np.isfinite(array[-1]) else []

    batches = np.nan_to_num(film.batch_loss, nan=film.train_loss[0])
    return {
        "steps": film.steps.tolist(),
        "epochs": numbers(film.epochs),
        "units": film.weights.shape[1],
        "weights": encode(film.weights),
        "images": encode(film.images),
        "labels": film.labels.tolist(),
        "probabilities": encode(film.probabilities),
        "activations": encode(film.activations),
        "losses": {
            "train": numbers(film.train_loss),
            "val": numbers(film.val_loss),
            "batch": numbers(batches),
        },
    }
