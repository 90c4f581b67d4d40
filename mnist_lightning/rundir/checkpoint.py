"""Checkpoints that can be trusted: how they are written, kept and read.

A checkpoint is torch's own zip file with a comment, the SHA-256 of all before it; ``torch.load``
still reads it.  The checksum tells damage, not malice: against hostile files stand
``weights_only=True`` and the refusal of anything compressed or remote.
"""

import hashlib
import io
import logging
import os
import traceback
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from mnist_lightning.images.known import KNOWN
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.outside import as_text, open_file
from mnist_lightning.threads import free_memory

log = logging.getLogger(__name__)

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
LABEL = b"sha256:"
COMMENT_SIZE = len(LABEL) + 64  # the digest in hexadecimal
# A zip file ends with the length of its comment, in two bytes, and the comment (PKWARE's APPNOTE, 4.3.16).
LENGTH = COMMENT_SIZE.to_bytes(2, "little")
MAGIC = b"PK\x03\x04"  # what it begins with; torch takes other files for a format of its own, an old one
MOST_PLAIN = 2**22  # bytes of plain data: a net's take some thousands
DEEPEST = 100  # levels of lists in lists
STATE = (  # of a run, beside its net
    *("callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch", "environment", "MNISTDataModule"),
)
TAKEN_UP = (  # where a checkpoint's state becomes a run's: a module, a function
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "mnist_lightning.classifier.on_train_start",
)
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def serialize(checkpoint: dict[str, Any]) -> bytes:
    """A checkpoint as the content of a file, with its checksum at the end."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getbuffer()[:-2]  # without the length of the comment, which is 0
    return bytes(content) + LENGTH + LABEL + hashlib.sha256(content).hexdigest().encode()


def check_readable(content: bytes, checkpoint: dict[str, Any]) -> None:
    """Whether ``load`` will take what is about to be written.

    Args:
        content: of the file.
        checkpoint: what it holds.

    Raises:
        OSError: ``load`` would refuse it, for example for the state of a user's callback.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        plain = count_plain(archive.infolist())
    fault = f"{plain:,} bytes beside its tensors" if plain > MOST_PLAIN else find_fault(checkpoint, plain)
    if fault:
        raise OSError(f"no checkpoint is written that could not be read again: it would hold {fault}")


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
    with open_file(path) as file:
        size = check_whole(file, path)
        try:
            with zipfile.ZipFile(file) as archive:
                size_of_plain = check_members(archive.infolist(), size, path)
            file.seek(0)
            if file.read(len(MAGIC)) != MAGIC:
                raise OSError(f"{path} is refused: it does not begin as torch's files do")
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch raises UnpicklingError, RuntimeError, KeyError, EOFError, …
            cause = as_text(f"{error}\n".splitlines()[0])[:200]
            raise OSError(
                f"{path} is refused: it holds more than tensors and plain data ({cause})"
            ) from error
    if fault := find_fault(checkpoint, size_of_plain):
        raise OSError(f"{path} is refused: it holds {fault}")
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("hyper_parameters"), dict):
        raise OSError(f"{path} is no checkpoint of mnist_lightning: it has no hyper_parameters")
    weights, step = checkpoint.get("state_dict"), checkpoint.get("global_step")
    if not isinstance(weights, dict) or not all(isinstance(one, torch.Tensor) for one in weights.values()):
        raise OSError(f"{path} is no checkpoint of mnist_lightning: its state_dict holds no weights")
    if not isinstance(step, int) or step < 0:
        raise OSError(f"{path} is no checkpoint of mnist_lightning: its global_step is no number of steps")
    try:
        return convert(checkpoint) if "hidden" in checkpoint["hyper_parameters"] else checkpoint
    except (KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} is no checkpoint of mnist_lightning: it lacks {error}") from error


def check_whole(file: BinaryIO, path: Path) -> int:
    """Whether a file is what was written: its checksum, after what costs no time.

    Returns:
        Its size in bytes.

    Raises:
        OSError: it is not, or there is no memory for it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - COMMENT_SIZE - 2))
    length, comment = file.read(2), file.read(COMMENT_SIZE)
    if length != LENGTH or not comment.startswith(LABEL):
        raise OSError(f"{path} is cut off, or no checkpoint of mnist_lightning: its checksum is missing")
    if size > free_memory():
        raise OSError(f"{path} is refused: its {size / 1e9:.1f} GB are more than the memory that is free")
    digest = hashlib.sha256()
    file.seek(0)
    left = size - COMMENT_SIZE - 2
    while left and (part := file.read(min(left, 2**20))):
        digest.update(part)
        left -= len(part)
    if digest.hexdigest().encode() != comment[len(LABEL) :]:
        raise OSError(f"{path} is damaged: its checksum does not fit its content")
    return size


def check_members(members: Sequence[zipfile.ZipInfo], size: int, path: Path) -> int:
    """Whether the parts of a checkpoint's zip file are such as torch writes.

    Returns:
        The bytes of the part that holds all but the tensors' content.

    Raises:
        OSError: they are compressed, or too large.
    """
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise OSError(f"{path} is refused: it holds compressed data, which torch never writes")
    if sum(member.file_size for member in members) > size:  # parts that overlap
        raise OSError(f"{path} is refused: its parts claim to be more than the file holds")
    plain = count_plain(members)
    if plain > MOST_PLAIN:
        raise OSError(
            f"{path} is refused: it holds {plain:,} bytes beside its tensors, and {MOST_PLAIN:,} are read"
        )
    return plain


def count_plain(members: Iterable[zipfile.ZipInfo]) -> int:
    """The bytes of a checkpoint that hold all but the content of its tensors."""
    return sum(member.file_size for member in members if member.filename.endswith(".pkl"))


def find_fault(checkpoint: Any, most: int) -> str | None:
    """What in a checkpoint is neither a tensor of numbers nor plain data, or would keep whoever walks through
    it busy for ever: lists within themselves, or lists of the same lists over and over.

    Args:
        most: values that it can hold, each of which takes a byte of its file at least.
    """
    left, count = [(checkpoint, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > DEEPEST:
            return "lists in lists without end"
        if count > most:
            return "the same lists over and over"
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized:
                return "a tensor of a kind that no net of this project has"
            if value.nbytes > value.untyped_storage().nbytes():
                return "a tensor that claims to be larger than its content"
        elif isinstance(value, dict):
            if not all(isinstance(key, PLAIN) for key in value):
                return "a dict whose keys are no names"
            left += [(one, depth + 1) for one in value.values()]
        elif isinstance(value, (list, tuple, set)):
            left += [(one, depth + 1) for one in value]
        elif not isinstance(value, PLAIN):
            return f"a {type(value).__name__}"
    return None


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
            valid.append((checkpoint["global_step"], path, checkpoint))
    if not valid:
        raise OSError(f"{folder} has no valid checkpoint")
    _, path, checkpoint = max(valid, key=lambda item: item[0])
    return path, checkpoint


def check_resumable(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """
    Raises:
        OSError: the checkpoint holds a net, but not all that a run needs to go on.
    """
    missing = [name for name in STATE if name not in checkpoint]
    if missing:
        raise OSError(f"{path} can't be gone on with: it has no {missing[0]}")


@contextmanager
def taking_up(path: Path | None) -> Iterator[None]:
    """Let a run go on from a checkpoint, or from none, within the block.

    Raises:
        OSError: what a whole file holds, a stranger's, say, is not the state of this run.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        places = {*frames, *(f"{place}.{name}" for place, name in zip(frames, names, strict=True))}
        if path is None or not (places & set(TAKEN_UP) or frames[-1].startswith("torch.optim.")):
            raise
        cause = as_text(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
        raise OSError(f"{path} can't be gone on with: it does not hold this run's state ({cause})") from error


class LocalCheckpointIO(CheckpointIO):
    """Lightning's way to ``serialize`` and ``load``: local files, written whole, checked when read.

    Args:
        folder: the run's; of what is not in it nothing is removed, but for what this object has written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """``storage_options`` may name a copy to be written as well: ``{"copy": path}``."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = serialize(checkpoint)
        check_readable(content, checkpoint)
        for target in (path, *(storage_options or {}).values()):
            write_atomic(Path(target), content)
        self.written.add(Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove what a callback has written; by the word of a checkpoint, it may be any file."""
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))
        if inside or Path(path) in self.written:
            Path(path).unlink(missing_ok=True)
