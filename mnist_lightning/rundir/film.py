"""Write and read the film of a run: snapshots of a net at up to 60 moments of its training."""

import base64
import io
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.find import newest_first
from mnist_lightning.rundir.outside import expand_home

NAME = "film.npz"
MOST_BYTES = 50_000_000  # of the unpacked arrays that are read; films of ours have less than 2 MB

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass
class Film:
    """Snapshots at M moments of training: U units of the first layer, N images of H x W pixels, C classes.

    Attributes:
        steps: (M,) int64, optimizer steps done so far, ascending.
        epochs: (M,) float32, the same in epochs.
        weights: (M, U, H, W) uint8, weights in units of the moment's limit: 1 is -1, 128 is 0, 255 is 1.
        limits: (M,) float32, the largest absolute weight of each moment.
        images: (N, H, W) uint8.
        labels: (N,) int64.
        probabilities: (M, N, C) uint8, from 0 to 255 for probability 1.
        activations: (M, N, U) uint8, of the U units for the N images; 255 is the moment's largest value.
        train_loss: (M,) float32, the mean loss of some fixed training images.
        val_loss: (M,) float32, the mean loss of some fixed validation images; NaN without a validation split.
        train_acc: (M,) float32, the accuracy of the same training images, in [0, 1].
        val_acc: (M,) float32, the accuracy of the same validation images, in [0, 1] or NaN.
        batch_loss: (M,) float32, the training loss of the last batch; NaN before the first batch.

    Raises:
        ValueError: the shapes or dtypes of the arrays do not fit each other.
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
        """Check the arrays' shapes and dtypes."""
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
            raise ValueError("it has no moments, no images or wrong labels")


def find_film(name: str, *, logs: Path = Path("logs")) -> Path:
    """Find the folder of a run that has a film.

    Args:
        name: a run folder, or "latest": the newest run under ``logs`` that has a film.
        logs: the folder of all runs.

    Raises:
        FileNotFoundError: "latest" was asked for, and no run has a film.
    """
    if name != "latest":
        return expand_home(name)
    films = newest_first(logs.glob(f"**/{NAME}"))
    if not films:
        raise FileNotFoundError(f"latest: no run under {logs.absolute()} has a {NAME} yet")
    return films[0].parent


def write_film(path: Path, film: Film) -> None:
    """Write a film atomically.

    Raises:
        OSError: the file can't be written.
    """
    content = io.BytesIO()
    np.savez(content, **asdict(film))
    write_atomic(path, content.getvalue())


def read_film(folder: Path) -> Film:
    """Read the film in a run's folder.

    Raises:
        OSError: the folder has no film, or the film is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {NAME}: a single run of train writes one (callbacks.film.enabled=true) for a"
            " FeedForward net of grey images"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MOST_BYTES:
                raise ValueError("it is too large")
        with np.load(path, allow_pickle=False) as arrays:
            return Film(**{field.name: arrays[field.name] for field in fields(Film)})
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        raise OSError(f"{path} is not a readable film: {' '.join(str(error).split())[:200]}") from error


def pack_film(film: Film) -> dict[str, Any]:
    """Return a film as JSON values for the page: arrays of bytes in base64, other arrays as lists."""

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
