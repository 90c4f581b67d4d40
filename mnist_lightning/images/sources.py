"""Find, download or unpack, and read the data set that the settings name.

Only reading the images imports torch.
"""

import functools
import gzip
import hashlib
import json
import logging
import math
import os
import socket
import tempfile
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mnist_lightning.images.known import KNOWN, OF_A_PATH
from mnist_lightning.rundir.atomic import LONG_LEFT, remove_leftovers, replace, write_atomic
from mnist_lightning.rundir.outside import open_file, read_file

if TYPE_CHECKING:
    from torch import Tensor
    from torchvision.datasets import VisionDataset

    from mnist_lightning.images.arrays import ImageSet

log = logging.getLogger(__name__)

PACKAGED = Path(__file__).parent.parent / "datasets" / "mnist"
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # first four bytes of an IDX file of uint8, 3-d and 1-d
# IDX file -> magic number, number of items, SHA-256 of MNIST's file (CPUs compute it faster than MD5)
RAW_FILES = {
    "train-images-idx3-ubyte": (
        IMAGES_MAGIC,
        60_000,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        LABELS_MAGIC,
        60_000,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        IMAGES_MAGIC,
        10_000,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        LABELS_MAGIC,
        10_000,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
LARGEST = 2**30  # most bytes of such a file; EMNIST's largest has half as many
DOWNLOAD_TIMEOUT = 10.0  # seconds without a byte after which a download fails
DOWNLOADS = {  # sizes of large downloads, logged before they begin
    "emnist_letters": "some 560 MB, with all of EMNIST",
    "emnist_balanced": "some 560 MB, with all of EMNIST",
    "cifar10": "some 170 MB",
}


class Source(Protocol):
    """A source of images: it makes a data set's files complete, and reads them."""

    def __hash__(self) -> int: ...

    def make_whole(self) -> None:
        """Download or unpack the files that ``read`` needs and that are missing.

        Raises:
            OSError: the download failed, or the folder can't be written.
        """

    def is_whole(self) -> bool:
        """Whether all files that ``read`` needs exist; writes nothing."""

    def stamp(self) -> Hashable:
        """Return a value that changes whenever the result of ``read`` may have changed."""

    def read(self) -> "ImageSet":
        """Read the images, labels and class names.

        Raises:
            OSError: they can't be read or used.
        """


def find_source(
    name: str,
    data_dir: Path,
    *,
    path: Path | None = None,
    size: int | None = None,
    grey: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Source:
    """Find the source that the settings of ``data=`` name.

    Args:
        name: a key of ``KNOWN``, "folder" or "npz"; with ``source``, any name.
        data_dir: folder for downloaded, unpacked or decoded files.
        path: the folder of "folder", or the file of "npz".
        size: height and width in pixels to which pictures of "folder" are resized; None keeps their size.
        grey: whether coloured pictures of "folder" become grey.
        source: ``_target_`` and arguments of a user's function.

    Raises:
        ValueError: there is no such data set, or it needs a path.
    """
    if source is not None:
        return Own(json.dumps(dict(source)))
    if name in OF_A_PATH:
        if path is None:
            raise ValueError(f"name={name!r} needs a path")
        return Npz(path) if name == "npz" else Folder(path.absolute(), size, grey, data_dir)
    if name not in KNOWN:
        raise ValueError(f"name must be one of {', '.join((*KNOWN, *OF_A_PATH))}, got {name!r}")
    return Cifar10(data_dir) if name == "cifar10" else Idx(name, data_dir)


def stamp(*paths: Path) -> tuple[tuple[int, int, int] | None, ...]:
    """Return inode, time and size of each file, which change if one is written, replaced or removed."""
    stats: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            stats.append(None)
        else:
            stats.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(stats)


@dataclass(frozen=True)
class Idx:
    """MNIST, or a data set in its format: four IDX files in torchvision's layout."""

    name: str
    data_dir: Path

    @property
    def raw(self) -> Path:
        return self.data_dir / KNOWN[self.name].folder / "raw"

    @property
    def files(self) -> tuple[Path, Path, Path, Path]:
        """The files of training images and labels, and of test images and labels."""
        family, _, split = self.name.partition("_")
        names = list(RAW_FILES)
        if family == "emnist":
            names = [f"emnist-{split}-{name.replace('t10k', 'test')}" for name in names]
        first, second, third, fourth = (self.raw / name for name in names)
        return first, second, third, fourth

    def make_whole(self) -> None:
        _make_whole(self, self.stamp())

    def is_whole(self) -> bool:
        try:
            if self.name == "mnist":
                return all(find_fault(self.raw / file, sha) is None for file, (*_, sha) in RAW_FILES.items())
            return self.has_right_files(self.raw)
        except OSError:
            return False

    def has_right_files(self, folder: Path) -> bool:
        """Whether a folder holds 28x28 images and as many labels, for training and for test."""
        known, first = KNOWN[self.name], int(self.starts_at_one)
        allowed = range(first, first + len(known.class_names))
        train, train_labels, test, test_labels = (folder / path.name for path in self.files)
        num_test = 10_000 if known.num_train else None
        for images, labels, count in (
            (train, train_labels, known.num_train),
            (test, test_labels, num_test),
        ):
            count = read_count(images) if count is None else count
            if not (is_idx(images, IMAGES_MAGIC, count) and is_idx(labels, LABELS_MAGIC, count, allowed)):
                return False
        return True

    @property
    def starts_at_one(self) -> bool:
        """Whether the labels in the files begin at 1, as those of EMNIST's letters do."""
        return self.name == "emnist_letters"

    def stamp(self) -> Hashable:
        return stamp(*self.files)

    def read(self) -> "ImageSet":
        from mnist_lightning.images.arrays import ImageSet, take_fingerprint

        def get(images: Path, labels: Path) -> "tuple[Tensor, Tensor]":
            pixels = read_idx(images)
            if self.name.startswith("emnist"):
                pixels = pixels.transpose(1, 2).contiguous()  # its files hold them transposed
            return pixels, read_idx(labels).long() - int(self.starts_at_one)

        parts = {"train": get(*self.files[:2]), "test": get(*self.files[2:])}
        names = list(KNOWN[self.name].class_names)
        return ImageSet(parts, names, take_fingerprint(parts, names))


@functools.lru_cache(maxsize=1)  # the jobs of a sweep check the same files once
def _make_whole(source: Idx, state: Hashable) -> None:
    if source.name == "mnist":
        unpack(source.data_dir)
    elif not source.has_right_files(source.raw):
        download(source)


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10 in torchvision's layout: pickle files, which are opened only if their checksums are right."""

    data_dir: Path

    @property
    def files(self) -> list[Path]:
        dataset: Any = find_class("cifar10")
        names = [file for file, _ in (*dataset.train_list, *dataset.test_list)]
        return [self.data_dir / dataset.base_folder / name for name in (*names, dataset.meta["filename"])]

    def make_whole(self) -> None:
        if not self.is_whole():
            download(self)

    def is_whole(self) -> bool:
        return self.has_right_files(self.data_dir / KNOWN["cifar10"].folder)

    def has_right_files(self, folder: Path) -> bool:
        dataset: Any = find_class("cifar10")
        checksums = dict((*dataset.train_list, *dataset.test_list))
        checksums[dataset.meta["filename"]] = dataset.meta["md5"]
        try:
            return all(find_fault(folder / file, md5) is None for file, md5 in checksums.items())
        except OSError:
            return False

    def stamp(self) -> Hashable:
        return stamp(*self.files)

    def read(self) -> "ImageSet":
        import torch

        from mnist_lightning.images.arrays import ImageSet, take_fingerprint

        parts = {}
        for part in ("train", "test"):
            dataset: Any = find_class("cifar10")(str(self.data_dir), train=part == "train")
            parts[part] = (torch.from_numpy(dataset.data).contiguous(), torch.tensor(dataset.targets))
        names = list(KNOWN["cifar10"].class_names)
        return ImageSet(parts, names, take_fingerprint(parts, names))


@dataclass(frozen=True)
class Folder:
    """Pictures in folders, one for each class (``folder.list_pictures``)."""

    path: Path
    size: int | None
    grey: bool
    data_dir: Path

    @property
    def cache(self) -> Path:
        key = hashlib.sha256(f"{self.path} {self.size} {self.grey}".encode(errors="surrogateescape"))
        return self.data_dir / "folders" / f"{key.hexdigest()[:16]}.npz"

    def make_whole(self) -> None:
        from mnist_lightning.images.folder import keep_folder

        keep_folder(self.path, size=self.size, grey=self.grey, cache=self.cache)

    def is_whole(self) -> bool:
        return self.path.is_dir()

    def stamp(self) -> Hashable:
        from mnist_lightning.images.folder import list_pictures, take_state

        return take_state(list_pictures(self.path)[0])

    def read(self) -> "ImageSet":
        from mnist_lightning.images.folder import read_folder

        return read_folder(self.path, size=self.size, grey=self.grey, cache=self.cache)


@dataclass(frozen=True)
class Npz:
    """Arrays in an npz file (``arrays.check_arrays``)."""

    path: Path

    def make_whole(self) -> None:
        pass  # the file is the user's

    def is_whole(self) -> bool:
        return self.path.is_file()

    def stamp(self) -> Hashable:
        return stamp(self.path)

    def read(self) -> "ImageSet":
        from mnist_lightning.images.arrays import read_npz

        return read_npz(self.path)


@dataclass(frozen=True)
class Own:
    """A user's function that returns the arrays that ``arrays.check_arrays`` takes.

    Args:
        recipe: ``_target_`` and arguments of the function, as JSON.
    """

    recipe: str

    def make_whole(self) -> None:
        pass  # the function reads or makes its data itself

    def is_whole(self) -> bool:
        return True

    def stamp(self) -> Hashable:
        return time.monotonic_ns()  # nobody knows what the function reads, so it is called each time

    def read(self) -> "ImageSet":
        from mnist_lightning.images.arrays import DataError, check_arrays
        from mnist_lightning.targets import TARGET, make

        recipe = json.loads(self.recipe)
        content = make(recipe, "data.source")
        if not isinstance(content, Mapping):
            raise DataError(
                f"data.source: {recipe[TARGET]} must return a dict of arrays, got {type(content).__name__}"
            )
        return check_arrays(content, f"data.source: {recipe[TARGET]}")


def find_class(name: str) -> "type[VisionDataset]":
    """Import torchvision's class for a data set."""
    from torchvision import datasets

    classes = {"EMNIST": "EMNIST", "cifar-10-batches-py": "CIFAR10"}
    folder = KNOWN[name].folder
    dataset: type[VisionDataset] = getattr(datasets, classes.get(folder, folder))
    return dataset


def unpack(data_dir: Path) -> None:
    """Put MNIST's four raw files into ``data_dir``, in torchvision's layout.

    Missing files are unpacked from the package.  Wrong files are replaced, with a warning.  Right files stay.

    Raises:
        OSError: the folder or a file can't be created, read or replaced.
    """
    raw = data_dir / KNOWN["mnist"].folder / "raw"
    make_raw_folder(raw)
    remove_leftovers(raw, age=LONG_LEFT)
    for file, (_, _, sha256) in RAW_FILES.items():
        path = raw / file
        if os.path.lexists(path):
            fault = find_fault(path, sha256)
            if fault is None:
                continue
            log.warning("%s %s: replaced by the copy in this package", path, fault)
            if path.is_dir() and not path.is_symlink():
                path.rename(f"{path}.aside")  # it may be the user's
        with gzip.open(PACKAGED / f"{file}.gz") as packed:
            write_atomic(path, packed.read())


def download(source: Idx | Cifar10) -> None:
    """Download a data set with torchvision.

    The files go to a temporary folder first, so that a failed or interrupted download leaves nothing behind.

    Raises:
        OSError: there is no network, the server did not send the files, or ``data_dir`` can't be written.
    """
    name = source.name if isinstance(source, Idx) else "cifar10"
    dataset: Any = find_class(name)
    files = source.files
    make_raw_folder(files[0].parent)
    if name in DOWNLOADS:
        log.info("downloading %s, only once: %s", name, DOWNLOADS[name])
    timeout = socket.getdefaulttimeout()
    more = {"split": name.partition("_")[2]} if name.startswith("emnist") else {}
    with tempfile.TemporaryDirectory(dir=source.data_dir, prefix=f".{name}-") as temporary:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            dataset(temporary, train=True, download=True, **more)
        except Exception as error:  # urllib, zlib and torchvision raise many kinds
            raise OSError(
                f"data={name} could not be downloaded ({type(error).__name__}: {error});"
                f" put its {len(files)} files into {files[0].parent} by hand, or use data=mnist, which needs"
                " no network"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
        fetched = Path(temporary) / files[0].parent.relative_to(source.data_dir)
        if not source.has_right_files(fetched):
            raise OSError(f"data={name}: the server sent files that are not {name}'s")
        for file in files:
            replace(fetched / file.name, file)


def make_raw_folder(raw: Path) -> None:
    """Create torchvision's folder for a data set's files, unless it exists.

    Raises:
        OSError: the folder can't be created.
    """
    try:
        raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"data.data_dir: can't create the folder {raw}: {error.strerror}") from error


def find_fault(path: Path, checksum: str) -> str | None:
    """Say what is wrong with a file ("is a folder", …); None if its content is right.

    Args:
        path: the file.
        checksum: SHA-256 or, as in torchvision, MD5 of the right content, in hexadecimal.
    """
    if path.is_dir():
        return "is a folder"
    try:
        content = read_file(path, most=LARGEST)
    except FileNotFoundError:
        return "is a dangling link"
    except OSError:
        return "can't be read"
    kind = "md5" if len(checksum) == 32 else "sha256"
    if hashlib.new(kind, content, usedforsecurity=False).hexdigest() == checksum:
        return None
    return f"is not MNIST's file ({len(content):,} bytes, another checksum)"


def is_idx(path: Path, magic: int, count: int, allowed: range = range(256)) -> bool:
    """Whether a file is an IDX file of so many 28x28 images, or of so many labels.

    The format is described at http://yann.lecun.com/exdb/mnist/, "File formats for the MNIST database".

    Args:
        path: the file.
        magic: ``IMAGES_MAGIC`` or ``LABELS_MAGIC``.
        count: number of images or labels.
        allowed: the labels that may occur.
    """
    try:
        content = read_file(path, most=LARGEST)
    except OSError:
        return False
    shape = (count, 28, 28) if magic == IMAGES_MAGIC else (count,)
    header = b"".join(number.to_bytes(4, "big") for number in (magic, *shape))
    body = content[len(header) :]
    if not content.startswith(header) or len(body) != math.prod(shape):
        return False
    return magic == IMAGES_MAGIC or (count > 0 and min(body) in allowed and max(body) in allowed)


def read_idx(path: Path) -> "Tensor":
    """Read an IDX file of uint8.  -> (N, H, W) or (N,) uint8

    torchvision's reader copies the data twice more.

    Raises:
        OSError: the file can't be read.
    """
    import numpy as np
    import torch

    content = np.fromfile(path, dtype=np.uint8)
    start = 4 + 4 * int(content[3])  # the last byte of the magic number is the number of dimensions
    return torch.from_numpy(content[start:].reshape(content[4:start].view(">i4").tolist()))


def read_count(path: Path) -> int:
    """Read the number of items in an IDX file's header; 0 if the file can't be read."""
    try:
        with open_file(path) as file:
            return int.from_bytes(file.read(8)[4:], "big")
    except OSError:
        return 0
