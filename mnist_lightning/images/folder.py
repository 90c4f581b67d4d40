"""Pictures in folders, one for each class, as arrays.

Decoding is slow, so it happens once: the arrays are kept in ``data.data_dir``, and are made anew when a file
was added, removed or changed.
"""

import functools
import hashlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mnist_lightning.images.arrays import DataError, ImageSet, check_arrays
from mnist_lightning.images.pictures import SUFFIXES, is_grey, read_picture
from mnist_lightning.rundir.atomic import write_atomic

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Picture(NamedTuple):
    """A picture's file in the folder."""

    part: str  # "train", "test" or "all"
    label: int
    path: str
    size: int  # bytes
    changed: int  # nanoseconds


def list_pictures(folder: Path) -> tuple[list[Picture], list[str]]:
    """The pictures of a folder by class, and the classes' names.

    ``train/<class>/*.png`` and ``test/<class>/*.png``, or ``<class>/*.png``.

    Raises:
        DataError: the folder is laid out otherwise, or a class has no picture.
    """
    if not folder.is_dir():
        raise DataError(
            f"data.path={folder} is no folder" if folder.exists() else f"data.path={folder} is missing"
        )
    classes = {part: list_folders(folder / part) for part in ("train", "test")}
    if not any(classes.values()):
        classes = {"all": list_folders(folder)}
    if not all(classes.values()):
        here, missing = ("train", "test") if classes["train"] else ("test", "train")
        raise DataError(f"data.path={folder} has {here}/<class>/ and no {missing}/<class>/")
    names = list(dict.fromkeys(name for part in classes.values() for name in part))
    for part, its in classes.items():
        lacking = [name for name in names if name not in its]
        if lacking:
            raise DataError(f"data.path={folder}: class {lacking[0]} is missing in {part}/")
    pictures = []
    for part in classes:
        for label, name in enumerate(names):
            place = folder / name if part == "all" else folder / part / name
            files = [
                file
                for file in os.scandir(place)
                if file.name.lower().endswith(SUFFIXES) and file.name[0] != "." and file.is_file()
            ]
            if not files:
                raise DataError(f"data.path: no picture lies in {place} ({', '.join(SUFFIXES)})")
            for file in sorted(files, key=lambda file: file.name):
                stat = file.stat()
                pictures.append(Picture(part, label, file.path, stat.st_size, stat.st_mtime_ns))
    return pictures, names


def list_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]
    return sorted(names, key=int if all(name.isdecimal() for name in names) else str)


def decode(pictures: Sequence[Picture], *, size: int | None, grey: bool) -> dict[str, NDArray[np.uint8]]:
    """All pictures, ``<part>_images`` and ``<part>_labels`` as ``check_arrays`` takes them.

    Raises:
        DataError: one can't be read, or has another size than the first.
    """
    from tqdm import tqdm

    wanted = None if size is None else (size, size)
    # grey pictures among coloured ones become coloured
    all_grey = grey or all(ask(is_grey, picture) for picture in pictures)
    arrays: dict[str, NDArray[np.uint8]] = {}
    for part in dict.fromkeys(picture.part for picture in pictures):
        its = [picture for picture in pictures if picture.part == part]
        images: NDArray[np.uint8] | None = None
        bar = tqdm(
            its, desc=f"reading {part}", unit=" pictures", leave=False, disable=not sys.stderr.isatty()
        )
        for number, picture in enumerate(bar):
            pixels = ask(functools.partial(read_picture, size=wanted, grey=all_grey), picture)
            if images is None:
                images = np.empty((len(its), *pixels.shape), dtype=np.uint8)
            if pixels.shape != images.shape[1:]:
                raise DataError(
                    f"data.path: {its[0].path} has {show(images.shape[1:])} pixels and {picture.path}"
                    f" {show(pixels.shape)}: data.size=28, say, resizes them all"
                )
            images[number] = pixels
        assert images is not None
        prefix = "" if part == "all" else f"{part}_"
        arrays[f"{prefix}images"] = images
        arrays[f"{prefix}labels"] = np.array([picture.label for picture in its])
    return arrays


def ask(look: Callable[[Path], Answer], picture: Picture) -> Answer:
    """
    Raises:
        DataError: the picture can't be read, told with its name.
    """
    try:
        return look(Path(picture.path))
    except OSError as error:
        raise DataError(f"data.path: {picture.path}: {error.strerror or error}") from error


def show(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]}"


def keep_folder(folder: Path, *, size: int | None, grey: bool, cache: Path) -> None:
    """Decode the pictures of a folder into a file, where it does not hold them already.

    Args:
        folder: see ``list_pictures``.
        size: pixels of both sides to resize to; None: as they are.
        grey: whether coloured pictures become grey.
        cache: the file.

    Raises:
        OSError: the folder or a picture can't be read, or does not fit the others.
    """
    pictures, _ = list_pictures(folder)
    state = take_state(pictures)
    if read_state(cache) == state:
        return
    buffer = io.BytesIO()
    arrays = decode(pictures, size=size, grey=grey)
    np.savez(buffer, state=np.array(state), **arrays)  # type: ignore[arg-type]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, buffer.getvalue())
    except OSError as error:
        log.warning("the pictures will be decoded again next time: %s", error)


def read_folder(folder: Path, *, size: int | None, grey: bool, cache: Path) -> ImageSet:
    """The pictures of a folder, from the file in which ``keep_folder`` has put them or from their own.

    Args, Raises: see ``keep_folder``.
    """
    pictures, names = list_pictures(folder)
    arrays = read_cache(cache, take_state(pictures))
    if arrays is None:
        arrays = decode(pictures, size=size, grey=grey)
    return check_arrays({**arrays, "class_names": names}, f"data.path={folder}")


def take_state(pictures: Sequence[Picture]) -> str:
    return hashlib.sha256(json.dumps(pictures).encode()).hexdigest()


def read_state(path: Path) -> str | None:
    """The state of the pictures whose arrays ``keep_folder`` has kept; None where there are none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str(file["state"])
    except Exception:  # missing, cut, or another's file
        return None


def read_cache(path: Path, state: str) -> dict[str, NDArray[np.uint8]] | None:
    """Arrays that ``keep_folder`` has kept; None where there are none, or the pictures have changed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["state"]) != state:
                return None
            return {name: file[name] for name in file.files if name != "state"}
    except Exception:  # missing, cut, or another's file: they are made anew
        return None
