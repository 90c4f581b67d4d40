"""Read a data set from pictures in folders, one folder for each class.

Decoding pictures is slow, so the arrays are saved in ``data.data_dir``, and made again only after a file was
added, removed or changed.
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

from mnist_lightning import threads
from mnist_lightning.images.arrays import DataError, ImageSet, check_arrays
from mnist_lightning.images.pictures import MAX_PIXELS, SUFFIXES, is_grey, read_picture
from mnist_lightning.rundir.atomic import write_atomic

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Picture(NamedTuple):
    """A picture's file, with its part and label."""

    part: str  # "train", "test" or "all"
    label: int
    path: str
    size: int  # bytes
    changed: int  # nanoseconds


def list_pictures(folder: Path) -> tuple[list[Picture], list[str]]:
    """List the pictures of a folder, and the names of the classes.

    The folder holds ``train/<class>/*.png`` and ``test/<class>/*.png``, or ``<class>/*.png``.

    Raises:
        DataError: the folder has another layout, or a class has no picture.
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
                raise DataError(f"data.path: {place} has no picture ({', '.join(SUFFIXES)})")
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
    """Decode pictures to the arrays that ``check_arrays`` takes.

    Args:
        pictures: see ``list_pictures``.
        size: height and width in pixels to resize to; None keeps their size.
        grey: whether coloured pictures become grey.

    Raises:
        DataError: a picture can't be read, or has another size than the first one, or ``size`` is too large.
    """
    from tqdm import tqdm

    if size is not None and size**2 > MAX_PIXELS:
        raise DataError(f"data.size={size} makes {size**2:,} pixels of a picture, at most {MAX_PIXELS:,}")
    if lack := threads.tell_lack(len(pictures) * (size or 0) ** 2):
        raise DataError(f"data.size={size}: {len(pictures):,} pictures take {lack}")
    wanted = None if size is None else (size, size)
    # if any picture is coloured, all arrays have colours
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
                    f" {show(pixels.shape)}: resize all of them, for example with data.size=28"
                )
            images[number] = pixels
        assert images is not None
        prefix = "" if part == "all" else f"{part}_"
        arrays[f"{prefix}images"] = images
        arrays[f"{prefix}labels"] = np.array([picture.label for picture in its])
    return arrays


def ask(look: Callable[[Path], Answer], picture: Picture) -> Answer:
    """Call a function on a picture's path, and name the picture in an error.

    Raises:
        DataError: the picture can't be read.
    """
    try:
        return look(Path(picture.path))
    except OSError as error:
        raise DataError(f"data.path: {picture.path}: {error.strerror or error}") from error


def show(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]}"


def keep_folder(folder: Path, *, size: int | None, grey: bool, cache: Path) -> None:
    """Decode the pictures of a folder into a file, unless the file is up to date.

    Args:
        folder: see ``list_pictures``.
        size: height and width in pixels to resize to; None keeps their size.
        grey: whether coloured pictures become grey.
        cache: the file.

    Raises:
        OSError: the folder or a picture can't be read, or a picture has another size than the others.
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
    """Read the pictures of a folder, from the file of ``keep_folder`` if it is up to date.

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
    """Return the state of the pictures that ``keep_folder`` has decoded; None if there is no such file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str(file["state"])
    except Exception:  # missing, damaged, or another kind of file
        return None


def read_cache(path: Path, state: str) -> dict[str, NDArray[np.uint8]] | None:
    """Read the arrays of ``keep_folder``; None if there are none, or if the pictures have changed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["state"]) != state:
                return None
            return {name: file[name] for name in file.files if name != "state"}
    except Exception:  # missing, damaged, or another kind of file: decode the pictures again
        return None
