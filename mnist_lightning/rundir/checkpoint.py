"""Checkpoints that can be trusted: how they are written, kept and read.

A checkpoint is torch's own zip file with a comment, the SHA-256 of all before it; ``torch.load``
still reads it.  The checksum tells damage, not malice: against hostile files stand
``weights_only=True`` and the refusal of anything compressed or remote.
"""

import hashlib
import io
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from mnist_lightning.images.known import KNOWN
from mnist_lightning.rundir.atomic import write_atomic

log = logging.getLogger(__name__)

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
LABEL = b"sha256:"
COMMENT_SIZE = len(LABEL) + 64  # the digest in hexadecimal
# A zip file ends with the length of its comment, in two bytes, and the comment (PKWARE's APPNOTE, 4.3.16).
LENGTH = COMMENT_SIZE.to_bytes(2, "little")


def serialize(checkpoint: dict[str, Any]) -> bytes:
    """A checkpoint as the content of a file, with its checksum at the end."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getbuffer()[:-2]  # without the length of the comment, which is 0
    return bytes(content) + LENGTH + LABEL + hashlib.sha256(content).hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU: tensors and plain data only, nothing of it executed.

    ``hyper_parameters`` tell how its net, loss and metrics are made (``DigitClassifier``),
    ``datamodule_hyper_parameters`` are the arguments of ``MNISTDataModule``.  A checkpoint of the first
    edition is given in today's form.

    Raises:
        OSError: there is no such file, or it is damaged, or no checkpoint of this project.
    """
    if "://" in str(path) or ":/" in str(path):  # a Path has folded the second slash
        raise OSError(f"{path}: checkpoints are read from local files only")
    content = path.read_bytes()
    comment = content[-COMMENT_SIZE:]
    body = memoryview(content)[: -COMMENT_SIZE - 2]
    if not comment.startswith(LABEL) or content[-COMMENT_SIZE - 2 : -COMMENT_SIZE] != LENGTH:
        raise OSError(f"{path} is cut off, or no checkpoint of mnist_lightning: its checksum is missing")
    if hashlib.sha256(body).hexdigest().encode() != comment[len(LABEL) :]:
        raise OSError(f"{path} is damaged: its checksum does not fit its content")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise OSError(f"{path} is refused: it holds compressed data, which torch never writes")
            if sum(member.file_size for member in members) > len(content):  # parts that overlap
                raise OSError(f"{path} is refused: its parts claim to be more than the file holds")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, KeyError, EOFError, …
        cause = str(error).splitlines()[0][:200]
        raise OSError(f"{path} is refused: it holds more than tensors and plain data ({cause})") from error
    if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in find_tensors(checkpoint)):
        raise OSError(f"{path} is refused: it holds a tensor that claims to be larger than its content")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("hyper_parameters"), dict):
        raise OSError(f"{path} is no checkpoint of mnist_lightning: it has no hyper_parameters")
    try:
        return convert(checkpoint) if "hidden" in checkpoint["hyper_parameters"] else checkpoint
    except (KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} is no checkpoint of mnist_lightning: it lacks {error}") from error


def convert(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the first edition, whose net normalised and set upright by itself, in today's form."""
    old, data = checkpoint["hyper_parameters"], dict(checkpoint.get("datamodule_hyper_parameters") or {})
    data.pop("deskew", None)
    augment = data.pop("augment", None)
    names = ("hidden", "activation", "dropout", "norm", "input_noise", "noise")
    metric = {"num_classes": 10, "average": "micro", "validate_args": False}
    recipe = {
        "model": {
            "_target_": "mnist_lightning.network.FeedForward",
            **{name: old[name] for name in names if name in old},
        },
        "loss": {
            "_target_": "mnist_lightning.losses.CrossEntropy",
            "label_smoothing": old["label_smoothing"],
        },
        "metrics": {"acc": {"_target_": "torchmetrics.classification.MulticlassAccuracy", **metric}},
        "preprocess": {
            **{"mean": old["mean"], "std": old["std"]},
            **{"deskew": old.get("deskew", False), "augment": augment},
        },
        "image_shape": [1, 28, 28],
        "class_names": list(KNOWN[data["name"]].class_names),
    }
    weights = {
        name: value for name, value in checkpoint["state_dict"].items() if name not in ("net.mean", "net.std")
    }
    return checkpoint | {
        "hyper_parameters": recipe,
        "datamodule_hyper_parameters": data,
        "state_dict": weights,
    }


def find_tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from find_tensors(inner)


def find_newest(folder: Path, *, told: bool = True) -> tuple[Path, dict[str, Any]]:
    """The valid checkpoint in a folder that has seen the most steps, and its content.

    Args:
        told: name damaged ones in a warning.

    Raises:
        OSError: there is none.
    """
    valid: list[tuple[int, Path, dict[str, Any]]] = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            checkpoint = load(path)
        except OSError as error:
            if told:
                log.warning("%s; an older checkpoint is used if there is one", error)
        else:
            valid.append((int(checkpoint["global_step"]), path, checkpoint))
    if not valid:
        raise OSError(f"{folder} has no valid checkpoint")
    _, path, checkpoint = max(valid, key=lambda item: item[0])
    return path, checkpoint


class LocalCheckpointIO(CheckpointIO):
    """Lightning's way to ``serialize`` and ``load``: local files, written whole, checked when read."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """``storage_options`` may name a copy to be written as well: ``{"copy": path}``."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = serialize(checkpoint)
        for target in (path, *(storage_options or {}).values()):
            write_atomic(Path(target), content)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
