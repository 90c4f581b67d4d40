"""Check a user's data set, given as arrays of images and labels, and read one from an npz file."""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnist_lightning.threads import free_memory

KEYS = "train_images, train_labels, test_images and test_labels, or images and labels"
PARTS = {"train": "train_", "test": "test_", "all": ""}


class DataError(OSError):
    """Images or labels can't be used; the message says why."""


class ImageSet(NamedTuple):
    """The images, labels and class names that a source returns.

    Attributes:
        parts: either "train" and "test", or "all", which still has to be split.  Each has images, (N, H, W)
            or (N, H, W, 3) uint8, and labels, (N,) int64 in [0, len(class_names)).
        class_names: name of each class, at least two.
        fingerprint: a text that differs between different data sets.
    """

    parts: dict[str, tuple[Tensor, Tensor]]
    class_names: list[str]
    fingerprint: str


def check_arrays(content: Mapping[str, Any], source: str) -> ImageSet:
    """Check arrays of NumPy or torch, and make a data set of them.

    Args:
        content: "train_images", "train_labels", "test_images" and "test_labels", or "images" and "labels";
            optionally "class_names" and "fingerprint".
        source: where the arrays come from, for messages.

    Raises:
        DataError: an array is missing, has another type or shape, or holds labels that are not allowed.
    """
    found = [part for part, prefix in PARTS.items() if f"{prefix}images" in content]
    if found not in (["train", "test"], ["all"]):
        raise DataError(f"{source} must hold {KEYS}, and holds {', '.join(map(str, content)) or 'nothing'}")
    parts = {part: check_part(content, PARTS[part], source) for part in found}
    names = check_names(content.get("class_names"), parts, source)
    counts = torch.bincount(parts[found[0]][1], minlength=len(names)).tolist()
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        raise DataError(f"{source} holds no image of class {', '.join(empty[:5])} to train on")
    for images, _ in parts.values():
        if images.shape[1:] != parts[found[0]][0].shape[1:]:
            raise DataError(
                f"{source}: its train and test images have different shapes,"
                f" {tuple(parts['train'][0].shape[1:])} and {tuple(images.shape[1:])}"
            )
    fingerprint = content.get("fingerprint")
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise DataError(f"{source}: fingerprint must be a text, got {type(fingerprint).__name__}")
    return ImageSet(parts, names, fingerprint or take_fingerprint(parts, names))


def check_part(content: Mapping[str, Any], prefix: str, source: str) -> tuple[Tensor, Tensor]:
    """Check one part's images and labels.

    Returns:
        Images, (N, H, W) or (N, H, W, 3) uint8, and labels, (N,) int64.

    Raises:
        DataError: they can't be used.
    """
    if f"{prefix}labels" not in content:
        raise DataError(f"{source} holds {prefix}images and no {prefix}labels")
    images, labels = to_array(content[f"{prefix}images"]), to_array(content[f"{prefix}labels"])
    name = f"{source}: {prefix}images"
    if images.dtype != np.uint8:
        raise DataError(f"{name} must be uint8, in [0, 255], got {images.dtype}")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(f"{name} must be (N, H, W), or (N, H, W, 3) in colour, got {images.shape}")
    if 0 in images.shape:
        raise DataError(f"{name} holds no image: its shape is {images.shape}")
    name = f"{source}: {prefix}labels"
    if labels.dtype.kind not in "iu":
        raise DataError(f"{name} must be whole numbers, got {labels.dtype}")
    if labels.shape != (len(images),):
        raise DataError(f"{name} must be one for each of {len(images)} images, got the shape {labels.shape}")
    if int(labels.min()) < 0:
        raise DataError(f"{name} must be 0, 1, 2 …, got {labels.min()}")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    return torch.tensor(images), torch.tensor(labels.astype(np.int64))


def to_array(value: Any) -> np.ndarray[Any, np.dtype[Any]]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def check_names(names: Any, parts: Mapping[str, tuple[Tensor, Tensor]], source: str) -> list[str]:
    """Check the names of the classes; None gives "0", "1", ….

    Raises:
        DataError: names or labels can't be used.
    """
    highest = max(int(labels.max()) for _, labels in parts.values())
    if names is None and highest >= 10_000:
        raise DataError(f"{source}: its labels must be 0, 1, 2 …, got {highest}")
    array = to_array([str(number) for number in range(highest + 1)] if names is None else names)
    if array.ndim != 1 or array.dtype.kind not in "US":
        raise DataError(f"{source}: class_names must be a list of texts")
    texts = [str(name) for name in array.astype(str)]
    if len(texts) < 2:
        raise DataError(f"{source} has a single class, and a net needs at least two")
    if highest >= len(texts):
        raise DataError(f"{source}: its labels must be in [0, {len(texts)}), got {highest}")
    if len(set(texts)) < len(texts):
        raise DataError(f"{source}: two of its class_names are equal")
    return texts


def take_fingerprint(parts: Mapping[str, tuple[Tensor, Tensor]], class_names: Sequence[str]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of all images, labels and class names."""
    digest = hashlib.sha256("\n".join(class_names).encode())
    for part, tensors in parts.items():
        for tensor in tensors:
            digest.update(f"{part} {tuple(tensor.shape)}".encode())
            digest.update(memoryview(tensor.contiguous().numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


def read_npz(path: Path) -> ImageSet:
    """Read a data set from an npz file (``numpy.savez``); see ``check_arrays`` for its arrays.

    Raises:
        DataError: the file can't be read, or is no npz file of images and labels.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"data.path={path} is no file")
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"data.path={path} is a single array: it must be an npz file of {KEYS}")
        with file:
            size = sum(member.file_size for member in (file.zip.infolist() if file.zip else ()))
            if size > free_memory():
                raise DataError(f"data.path={path}: its {size / 1e9:.1f} GB are more than the free memory")
            content = {name: file[name] for name in file.files}
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"data.path={path}: {error.strerror or error}") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, MemoryError, zipfile.LargeZipFile) as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        if "allow_pickle" in cause or "Object arrays" in cause:
            cause = "it holds objects, and only arrays of numbers are read"
        raise DataError(f"data.path={path} can't be read as an npz file: {cause}") from error
    except Exception as error:  # zlib's and struct's, of damaged files
        raise DataError(f"data.path={path} is damaged: {error}") from error
    return check_arrays(content, f"data.path={path}")
