"""Where images come from: MNIST out of this package, Fashion-MNIST and KMNIST by torchvision's download.

What can be asked without reading the images needs no torch.
"""

import functools
import gzip
import hashlib
import logging
import math
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_lightning.rundir.atomic import LONG_LEFT, remove_leftovers, write_atomic

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.datasets import MNIST

log = logging.getLogger(__name__)

FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's classes
IMAGE_SHAPE = (1, 28, 28)  # of all of them
PACKAGED = Path(__file__).parent.parent / "datasets" / "mnist"
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # first four bytes of an IDX file of bytes, 3-d and 1-d
# IDX file -> magic number, number of items, MD5 of MNIST's own file
RAW_FILES = {
    "train-images-idx3-ubyte": (IMAGES_MAGIC, 60_000, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (LABELS_MAGIC, 60_000, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (IMAGES_MAGIC, 10_000, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (LABELS_MAGIC, 10_000, "27ae3e4e09519cfbb04c329615203637"),
}
DOWNLOAD_TIMEOUT = 10.0  # seconds without a byte before a download is given up


def find_class(name: str) -> "type[MNIST]":
    """torchvision's class of a data set."""
    from torchvision import datasets

    dataset: type[MNIST] = getattr(datasets, FOLDERS[name])
    return dataset


def class_names(name: str) -> list[str]:
    """The ten classes of a data set, for tables and figures: "0" … "9" for digits."""
    if name == "mnist":
        return [str(digit) for digit in range(10)]
    return [str(label) for label in find_class(name).classes]


def read_images(name: str, data_dir: Path, *, train: bool) -> "tuple[Tensor, Tensor]":
    """A part of a data set that is whole.  -> images (N, 28, 28) uint8, labels (N,) int64"""
    dataset = find_class(name)(str(data_dir), train=train)
    return dataset.data, dataset.targets


Stamp = tuple[tuple[int, int, int] | None, ...]


def stamp(name: str, data_dir: Path) -> Stamp:
    """Changes when a raw file is written, replaced or removed: inode, time and size of each."""
    stats: list[tuple[int, int, int] | None] = []
    for file in RAW_FILES:
        try:
            stat = (data_dir / FOLDERS[name] / "raw" / file).stat()
        except OSError:
            stats.append(None)
        else:
            stats.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(stats)


@functools.lru_cache(maxsize=1)  # the next job of a sweep need not check the same files again
def make_whole(name: str, data_dir: Path, state: Stamp) -> None:
    if name == "mnist":
        unpack(data_dir)
    else:
        download(name, data_dir)


def unpack(data_dir: Path) -> None:
    """Put MNIST's four raw files into ``data_dir``, where torchvision reads them.

    What is there and right is left alone; what is missing is unpacked from the package; what is
    there and wrong is named in a warning and replaced.

    Raises:
        OSError: the folder or a file can't be made, read or replaced.
    """
    raw = make_raw_folder(data_dir, FOLDERS["mnist"])
    remove_leftovers(raw, age=LONG_LEFT)
    for file, (_, _, md5) in RAW_FILES.items():
        path = raw / file
        if os.path.lexists(path):
            fault = find_fault(path, md5)
            if fault is None:
                continue
            log.warning("%s %s: replaced by the copy in this package", path, fault)
        with gzip.open(PACKAGED / f"{file}.gz") as packed:
            write_atomic(path, packed.read())


def download(name: str, data_dir: Path) -> None:
    """Fetch what is missing of a data set with torchvision's own download.

    It goes into a temporary folder first: a broken or interrupted download leaves nothing behind.

    Raises:
        OSError: no network, or the server did not give the files; or ``data_dir`` can't be written.
    """
    dataset = find_class(name)
    raw = make_raw_folder(data_dir, FOLDERS[name])
    if all(is_idx(raw / file, magic, count) for file, (magic, count, _) in RAW_FILES.items()):
        return
    timeout = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{name}-") as temporary:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            dataset(temporary, train=True, download=True)
        except Exception as error:  # urllib, zlib and torchvision raise many kinds
            raise OSError(
                f"data={name} could not be downloaded ({type(error).__name__}: {error});"
                f" put its four IDX files into {raw} by hand, or use data=mnist, which needs no network"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
        fetched = Path(temporary) / FOLDERS[name] / "raw"
        for file, (magic, count, _) in RAW_FILES.items():
            if not is_idx(fetched / file, magic, count):
                raise OSError(f"data={name}: the server gave a {file} that is no IDX file of {count}")
            os.replace(fetched / file, raw / file)


def make_raw_folder(data_dir: Path, dataset: str) -> Path:
    """torchvision's folder for a data set's IDX files, made where it is missing."""
    raw = data_dir / dataset / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"data.data_dir: can't make the folder {raw}: {error.strerror}") from error
    return raw


def is_whole(name: str, data_dir: Path) -> bool:
    """Whether all four files of a data set are there and right; nothing is written."""
    raw = data_dir / FOLDERS[name] / "raw"
    try:
        return all(
            find_fault(raw / file, md5) is None if name == "mnist" else is_idx(raw / file, magic, count)
            for file, (magic, count, md5) in RAW_FILES.items()
        )
    except OSError:
        return False


def find_fault(path: Path, md5: str) -> str | None:
    """What is wrong with a file, as a predicate ("is …"), or None where its content is right."""
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        return "is a folder"
    except FileNotFoundError:
        return "is a dangling link"
    except PermissionError:
        return "can't be read"
    if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
        return None
    return f"is not MNIST's file ({len(content):,} bytes, another checksum)"


def is_idx(path: Path, magic: int, count: int) -> bool:
    """Whether a file is an IDX file of bytes with this many 28x28 images, or labels below 10.

    The format: http://yann.lecun.com/exdb/mnist/, "File formats for the MNIST database".
    """
    try:
        content = path.read_bytes()
    except OSError:
        return False
    shape = (count, 28, 28) if magic == IMAGES_MAGIC else (count,)
    header = b"".join(number.to_bytes(4, "big") for number in (magic, *shape))
    body = content[len(header) :]
    if not content.startswith(header) or len(body) != math.prod(shape):
        return False
    return magic == IMAGES_MAGIC or max(body) < 10
