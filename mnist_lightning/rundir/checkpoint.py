"""Write, check and read checkpoints.

A checkpoint is torch's own zip file with a comment that holds the SHA-256 of everything before it;
``torch.load`` still reads it.  The checksum detects damage, not malice: ``weights_only=True``, and refusing
compressed and remote files, protects against hostile files.
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
MAGIC = b"PK\x03\x04"  # the first bytes of a zip file; torch reads files without them in an older format
MOST_PLAIN = 2**22  # bytes of plain data; a checkpoint of ours has some thousands
DEEPEST = 100  # levels of nested lists
STATE = (  # keys that a checkpoint needs for resuming, besides the net
    *("callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch", "environment", "MNISTDataModule"),
)
TAKEN_UP = (  # the module and the function that load a checkpoint's state into a run
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "mnist_lightning.classifier.on_train_start",
)
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def serialize(checkpoint: dict[str, Any]) -> bytes:
    """Return a checkpoint as the bytes of a file, with its checksum at the end."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    content = buffer.getbuffer()[:-2]  # without the comment's length, which is 0 so far
    return bytes(content) + LENGTH + LABEL + hashlib.sha256(content).hexdigest().encode()


def check_readable(content: bytes, checkpoint: dict[str, Any]) -> None:
    """Check that ``load`` will accept a checkpoint that is about to be written.

    Args:
        content: the bytes of the file.
        checkpoint: the same as an object.

    Raises:
        OSError: ``load`` would refuse the file, for example because of the state of a user's callback.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        plain = count_plain(archive.infolist())
    fault = f"{plain:,} bytes besides its tensors" if plain > MOST_PLAIN else find_fault(checkpoint, plain)
    if fault:
        raise OSError(f"the checkpoint is not written, because it could not be read again: it holds {fault}")


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors on the CPU, and plain data.  No code in it is executed.

    "hyper_parameters" holds the recipe of the net, the loss and the metrics (see ``DigitClassifier``),
    "datamodule_hyper_parameters" the arguments of ``MNISTDataModule``.  A checkpoint written by the first
    edition is converted to the current form.

    Raises:
        OSError: the file does not exist, is damaged, or is not a checkpoint of this project.
    """
    if "://" in str(path) or ":/" in str(path):  # a Path turns "//" into "/"
        raise OSError(f"{path}: checkpoints are read from local files only")
    with open_file(path) as file:
        size = check_whole(file, path)
        try:
            with zipfile.ZipFile(file) as archive:
                size_of_plain = check_members(archive.infolist(), size, path)
            file.seek(0)
            if file.read(len(MAGIC)) != MAGIC:
                raise OSError(f"{path} is refused: it does not begin like a file of torch")
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
        raise OSError(f"{path} is not a checkpoint of mnist_lightning: it has no hyper_parameters")
    weights, step = checkpoint.get("state_dict"), checkpoint.get("global_step")
    if not isinstance(weights, dict) or not all(isinstance(one, torch.Tensor) for one in weights.values()):
        raise OSError(f"{path} is not a checkpoint of mnist_lightning: its state_dict holds no weights")
    if not isinstance(step, int) or step < 0:
        raise OSError(
            f"{path} is not a checkpoint of mnist_lightning: its global_step is not a number of steps"
        )
    try:
        return convert(checkpoint) if "hidden" in checkpoint["hyper_parameters"] else checkpoint
    except (KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{path} is not a checkpoint of mnist_lightning: it lacks {error}") from error


def check_whole(file: BinaryIO, path: Path) -> int:
    """Check that a file is complete and unchanged; compute its checksum last, because that takes longest.

    Returns:
        The file's size in bytes.

    Raises:
        OSError: the file is incomplete or damaged, or larger than the free memory.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - COMMENT_SIZE - 2))
    length, comment = file.read(2), file.read(COMMENT_SIZE)
    if length != LENGTH or not comment.startswith(LABEL):
        raise OSError(f"{path} is cut off, or not a checkpoint of mnist_lightning: its checksum is missing")
    if size > free_memory():
        raise OSError(f"{path} is refused: it has {size / 1e9:.1f} GB, more than the free memory")
    digest = hashlib.sha256()
    file.seek(0)
    left = size - COMMENT_SIZE - 2
    while left and (part := file.read(min(left, 2**20))):
        digest.update(part)
        left -= len(part)
    if digest.hexdigest().encode() != comment[len(LABEL) :]:
        raise OSError(f"{path} is damaged: its checksum does not match its content")
    return size


def check_members(members: Sequence[zipfile.ZipInfo], size: int, path: Path) -> int:
    """Check that the members of a checkpoint's zip file look like those that torch writes.

    Returns:
        The size in bytes of the plain data: everything except the numbers in tensors.

    Raises:
        OSError: members are compressed, overlap, or hold too much plain data.
    """
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise OSError(f"{path} is refused: it holds compressed data, which torch never writes")
    if sum(member.file_size for member in members) > size:  # members that overlap
        raise OSError(f"{path} is refused: its parts claim to be larger than the file")
    plain = count_plain(members)
    if plain > MOST_PLAIN:
        raise OSError(
            f"{path} is refused: it holds {plain:,} bytes besides its tensors, at most {MOST_PLAIN:,}"
            " are read"
        )
    return plain


def count_plain(members: Iterable[zipfile.ZipInfo]) -> int:
    """Return the size in bytes of a checkpoint's plain data: everything except the numbers in tensors."""
    return sum(member.file_size for member in members if member.filename.endswith(".pkl"))


def find_fault(checkpoint: Any, most: int) -> str | None:
    """Find a value in a checkpoint that is neither a tensor of numbers nor plain data, or that is nested
    without end, such as a list that contains itself.

    Args:
        most: the largest possible number of values; each takes at least one byte of the file.

    Returns:
        a description of the first such value; None if there is none.
    """
    left, count = [(checkpoint, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > DEEPEST:
            return "lists nested too deeply"
        if count > most:
            return "the same lists again and again"
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized:
                return "a sparse, quantized or meta tensor"
            if value.nbytes > value.untyped_storage().nbytes():
                return "a tensor that claims to be larger than its content"
        elif isinstance(value, dict):
            if not all(isinstance(key, PLAIN) for key in value):
                return "a dict with a key that is not plain data"
            left += [(one, depth + 1) for one in value.values()]
        elif isinstance(value, (list, tuple, set)):
            left += [(one, depth + 1) for one in value]
        elif not isinstance(value, PLAIN):
            return f"a {type(value).__name__}"
    return None


def convert(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint of the first edition, whose net did its own preprocessing, to the current form."""
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
    """Find the valid checkpoint with the most steps in a folder; return its path and its content.

    Args:
        folder: the folder of the checkpoints.
        told: whether to log a warning for each damaged checkpoint.

    Raises:
        OSError: the folder has no valid checkpoint.
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
    """Check that a checkpoint holds everything that a run needs to resume.

    Raises:
        OSError: something is missing.
    """
    missing = [name for name in STATE if name not in checkpoint]
    if missing:
        raise OSError(f"{path} can't be resumed: it has no {missing[0]}")


@contextmanager
def taking_up(path: Path | None) -> Iterator[None]:
    """Report, in one line, that a checkpoint does not fit the run that is resumed within the block.

    Args:
        path: the checkpoint; None: the run starts from the beginning.

    Raises:
        OSError: the file is complete, but does not hold the state of this run.
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
        raise OSError(f"{path} can't be resumed: it does not hold this run's state ({cause})") from error


class LocalCheckpointIO(CheckpointIO):
    """Let Lightning write and read checkpoints by ``serialize`` and ``load``: local files with a checksum.

    Args:
        folder: the run's folder.  Outside it, only files that this object has written are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: set[Path] = set()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, and a copy of it if ``storage_options`` is ``{"copy": path}``.

        Raises:
            OSError: the checkpoint could not be read again, or the file can't be written.
        """
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
        """Remove a checkpoint in the run's folder, or one that this object has written.

        Other paths are ignored: a stranger's checkpoint may name any file as a callback's old checkpoint.
        """
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))
        if inside or Path(path) in self.written:
            Path(path).unlink(missing_ok=True)
