"""A data set in memory: the three splits, the loaders.

All images stay as uint8 in the memory of the device that trains, and a batch is one indexing operation
there; ``Preprocess`` does the rest.  Decoding and transforming image by image is what makes a usual MNIST
project several times slower than its arithmetic.
"""

import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mnist_lightning.images.arrays import DataError
from mnist_lightning.images.known import KNOWN, check_sizes
from mnist_lightning.images.sources import Source, find_source
from mnist_lightning.rundir.outside import expand_home

TEST_SHARE = 1 / 5  # of a data set that has no test images of its own


def eval_batch_size(image_shape: Sequence[int]) -> int:
    """How many images are shown to a net at once where no gradient is needed: 6 MB as float."""
    return max(1, 2_000 * 28 * 28 // math.prod(image_shape))


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory.

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8.
        labels: (N,) int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """A whole batch at once, its indices on the images' device.

        (B,) int64 -> (B, H, W) or (B, H, W, 3) uint8, (B,) int64
        """
        # which copies whole images, in a sixth of the time that images[indices] takes pixel by pixel
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


class EpochSampler(Sampler[int]):
    """The indices of one epoch for one process, as a function of (seed, epoch, rank).

    Of every ``world_size`` consecutive indices of the epoch's order a process takes one, so that
    the processes' k-th batches together are the k-th batch that a single process would see.
    Shuffled (training) epochs leave out the up to ``world_size - 1`` last indices of their order,
    others of them each epoch, so that all processes take the same number of steps; nothing is ever
    repeated.

    Args:
        num_samples: size of the data set.
        shuffle: a new order each epoch; otherwise 0, 1, 2, …
        seed: in [0, 2^32).
        rank: of this process, in [0, world_size).
        world_size: number of processes.

    Attributes:
        epoch: whose order ``iter`` gives; Lightning calls ``set_epoch`` before each.
        start: an epoch, and how many of this process's indices ``iter`` leaves out at its beginning.
    """

    def __init__(self, num_samples: int, *, shuffle: bool, seed: int, rank: int, world_size: int) -> None:
        self.num_samples = num_samples
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> Tensor:
        """This process's indices of the whole epoch.  -> (len(self),) int64"""
        if not self.shuffle:
            return torch.arange(self.rank, self.num_samples, self.world_size)
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        return order[: len(self) * self.world_size][self.rank :: self.world_size]

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_samples // self.world_size
        return len(range(self.rank, self.num_samples, self.world_size))

    def take(self) -> Tensor:
        """The indices of ``iter``, as a tensor; without ``set_epoch``, each call takes the next epoch."""
        epoch, start = self.start
        order = self.order()[start if self.epoch == epoch else 0 :]
        self.epoch += 1
        return order

    def __iter__(self) -> Iterator[int]:
        yield from self.take().tolist()


class BatchIndices(Sampler[Tensor]):
    """A sampler's indices in batches, as tensors on a device: they go there once an epoch, so that no step
    waits for a copy.

    Args:
        sampler: of an epoch's indices; Lightning looks for it here to call its ``set_epoch``.
        batch_size: of all batches but the last, which may be smaller.
        device: of the images.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, device: torch.device) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.device = device

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.sampler.take().to(self.device).split(self.batch_size)  # type: ignore[no-untyped-call]


class MNISTDataModule(L.LightningDataModule):
    """Train, validation and test splits of MNIST, or of another data set of images.

    The validation images are ``val_size`` of the training images, stratified by label and chosen by
    ``split_seed`` alone.  The test split is the official one; where a source has none, it is a fifth of
    the images, chosen likewise.

    Args:
        name: a key of ``known.KNOWN``, "folder" or "npz"; with ``source``, a name for the figures.
        data_dir: folder in torchvision's layout; made and filled where something is missing.
        path: of "folder" and "npz".
        size: pixels of both sides that pictures of "folder" are resized to; None: as they are.
        grey: whether coloured pictures of "folder" become grey.
        source: ``_target_`` and arguments of a function that gives arrays, see ``arrays.check_arrays``.
        batch_size: of training, over all processes together; divisible by their number.
        val_size: number of validation images; 0 trains on all; None: a tenth of the training images.
        num_folds: parts of the training images, see ``assign_folds``, of which ``fold`` is the validation
            split, whatever ``val_size`` is; None: no folds.
        fold: in [0, num_folds).
        train_size: of what is left for training, how many images are used: the first so many of
            ``order_stratified``; None: all.
        split_seed: chooses the validation images.
        num_workers: of each loader.
        seed: of the order of the training images.

    Attributes:
        splits: "train", "val" and "test", once ``setup`` has run.
        image_shape: (C, H, W); of a data set that is not known by its name, once ``setup`` has run.
        class_names: by label; the same.
        fingerprint: tells whether two data sets are the same, once ``setup`` has run.
    """

    image_shape: tuple[int, int, int]
    class_names: list[str]
    fingerprint: str

    def __init__(
        self,
        *,
        name: str = "mnist",
        data_dir: str | Path = "~/.pytorch/MNIST_data/",
        path: str | Path | None = None,
        size: int | None = None,
        grey: bool = False,
        source: Mapping[str, Any] | None = None,
        batch_size: int = 256,
        val_size: int | None = 5000,
        num_folds: int | None = None,
        fold: int | None = None,
        train_size: int | None = None,
        split_seed: int = 0,
        num_workers: int = 0,
        seed: int = 1,
    ) -> None:
        super().__init__()
        # absolute, so that a checkpoint tells where it lies, wherever it is read
        place = None if path is None else expand_home(path).absolute()
        self.save_hyperparameters(
            {
                **{"name": name, "data_dir": str(data_dir), "path": None if place is None else str(place)},
                **{"size": size, "grey": grey, "source": None if source is None else dict(source)},
                **{"batch_size": batch_size, "val_size": val_size, "split_seed": split_seed},
                **{"num_folds": num_folds, "fold": fold, "train_size": train_size},
                **{"num_workers": num_workers, "seed": seed},
            }
        )
        self.name = name
        self.source = find_source(
            name,
            expand_home(data_dir),
            path=place,
            size=size,
            grey=grey,
            source=source,
        )
        self.batch_size = batch_size
        if (num_folds is None) != (fold is None):
            raise ValueError(f"num_folds and fold go together, got {num_folds} and {fold}")
        self.val_size = val_size
        self.num_folds = num_folds
        self.fold = fold
        self.train_size = train_size
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.seed = seed
        self.splits: dict[str, Images] = {}
        self.is_known = name in KNOWN and source is None
        if self.is_known:
            self.image_shape, self.class_names = KNOWN[name].image_shape, list(KNOWN[name].class_names)
        self.resume_epoch = 0  # where the training order goes on, see load_state_dict
        self.resume_batch = 0

    def state_dict(self) -> dict[str, Any]:
        """Where in the order of the training images a checkpoint stands: epoch, and batch in it; and which
        images they are."""
        assert self.trainer is not None
        fit_loop = self.trainer.fit_loop
        batch = fit_loop.epoch_loop.batch_progress.current.ready
        epoch: int = fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        if 0 < batch < self.trainer.num_training_batches:  # within it, or where a limit has cut it short
            epoch = fit_loop.epoch_progress.current.started - 1  # type: ignore[attr-defined]
        else:
            batch = 0
        return {
            "epoch": epoch,
            "batch": batch,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            DataError: the run was trained on other images.
        """
        self.check_fingerprint(state_dict)
        self.resume_epoch, self.resume_batch = state_dict["epoch"], state_dict["batch"]

    def check_fingerprint(self, state_dict: Mapping[str, Any]) -> None:
        """
        Args:
            state_dict: of a checkpoint, whose images are to be these.

        Raises:
            DataError: they are others.
        """
        before = state_dict.get("fingerprint", self.fingerprint)
        if before != self.fingerprint:
            raise DataError(
                f"the images of {self.name} are not those that the run was trained on: their fingerprint is"
                f" {self.fingerprint}, and was {before}"
            )

    def prepare_data(self) -> None:
        """Make the data set whole where it will be read.

        Raises:
            OSError: the folder can't be made or written, or a download failed.
        """
        self.source.make_whole()

    def setup(self, stage: str) -> None:
        """
        Raises:
            OSError: the images can't be read.
            DataError: they can't be used, or are too few for ``val_size`` and ``batch_size``.
        """
        if self.splits:
            return
        state = self.source.stamp()
        folds = {"num_folds": self.num_folds, "fold": self.fold, "train_size": self.train_size}
        splits, names, self.fingerprint = read_splits(
            self.source, self.val_size, self.split_seed, state, **folds
        )
        if self.batch_size > len(splits["train"]):
            sizes = {
                "train_size": self.train_size,
                "num_folds": self.num_folds,
                "val_size": len(splits["val"]),
            }
            key, value = next((key, value) for key, value in sizes.items() if value is not None)
            raise DataError(
                f"data.batch_size must be at most the {len(splits['train'])} training images that"
                f" data.{key}={value} leaves, got {self.batch_size}"
            )
        self.splits, self.class_names = splits, list(names)
        height, width, *channels = self.splits["train"].images.shape[1:]
        self.image_shape = (channels[0] if channels else 1, height, width)

    def measure_pixels(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the training images' pixels, scaled to [0, 1], of each channel.

        Raises:
            DataError: all pixels are equal.
        """
        pixels = self.splits["train"].images.reshape(len(self.splits["train"]), -1, self.image_shape[0])
        levels = torch.arange(256, dtype=torch.float64) / 255
        means, stds, blank = [], [], True
        for channel in range(self.image_shape[0]):
            counts = torch.zeros(256, dtype=torch.float64)
            for part in torch.split(pixels[:, :, channel], 1_000):
                counts += torch.bincount(part.flatten(), minlength=256)
            shares = counts / counts.sum()
            mean = float(shares @ levels)
            std = float(shares @ (levels - mean) ** 2) ** 0.5
            means.append(round(mean, 6))
            stds.append(round(std, 6) or 1.0)  # of a channel that is always the same nothing can be learned
            blank = blank and std == 0
        if blank:
            raise DataError(f"the training images of {self.name} are blank: all pixels are equal")
        return means, stds

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        world_size = self.trainer.world_size if self.trainer else 1
        if self.batch_size % world_size:
            raise MisconfigurationException(
                f"data.batch_size must be divisible by the {world_size} processes that share it,"
                f" got {self.batch_size}"
            )
        loader = self._loader("train", self.batch_size // world_size)
        sampler = loader.batch_sampler.sampler  # type: ignore[union-attr]
        assert isinstance(sampler, EpochSampler)
        begun = self.trainer.fit_loop.epoch_progress.current.processed if self.trainer else 0  # type: ignore[attr-defined]
        sampler.epoch = max(self.resume_epoch, begun)
        sampler.start = self.resume_epoch, self.resume_batch * (self.batch_size // world_size)
        return loader

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self.test_dataloader()

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("test")

    def _loader(self, split: str, batch_size: int | None = None) -> DataLoader[tuple[Tensor, Tensor]]:
        if not self.splits:  # a plain loop does not call them
            self.prepare_data()
            self.setup("fit")
        images = self.splits[split]
        trainer = self.trainer
        overfit = getattr(trainer, "overfit_batches", 0) > 0  # the same few batches each epoch
        sampler = EpochSampler(
            len(images),
            shuffle=split == "train" and not overfit,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        device = torch.device("cpu")
        if trainer is not None and self.num_workers == 0:  # worker processes hand over through the host
            device = trainer.strategy.root_device
        return DataLoader(
            images.to(device),
            batch_sampler=BatchIndices(sampler, batch_size or eval_batch_size(self.image_shape), device),  # type: ignore[arg-type]  # a tensor, no list
            num_workers=self.num_workers,
            collate_fn=_identity,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # else each epoch would draw from the global random state
        )


def _identity(batch: Any) -> Any:
    return batch


def load_mnist(
    data_dir: str | Path = "~/.pytorch/MNIST_data/", batch_size: int = 64
) -> tuple[DataLoader[tuple[Tensor, Tensor]], DataLoader[tuple[Tensor, Tensor]]]:
    """The tutorial's loaders, for a plain training loop.

    The second one has the official test images: who compares settings by them has no images left to say how
    good the best one is.  ``MNISTDataModule`` has three splits.

    Args:
        data_dir: folder in torchvision's layout; MNIST is put there where it is missing.
        batch_size: of all batches but the last, which may be smaller.

    Returns:
        Loaders of the 60,000 training and of the 10,000 test images, each shuffled anew at every pass:
        (B, 1, 28, 28) float32 in [-1, 1], and labels (B,) int64.

    Raises:
        OSError: the folder can't be made or written.
    """
    source = find_source("mnist", expand_home(data_dir))
    source.make_whole()
    parts = source.read().parts
    seed = int(torch.randint(2**32, (), dtype=torch.int64))  # torch.manual_seed decides the order
    loaders = []
    for part in ("train", "test"):
        images = Images(*parts[part])
        sampler = EpochSampler(len(images), shuffle=True, seed=seed, rank=0, world_size=1)
        batches: Any = BatchIndices(sampler, batch_size, torch.device("cpu"))
        unit: Any = _to_unit
        loaders.append(DataLoader(images, batch_sampler=batches, collate_fn=unit))
    return loaders[0], loaders[1]


def _to_unit(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """From 0 … 255 to -1 … 1: mean 0.5 and standard deviation 0.5 of pixels in [0, 1]."""
    images, labels = batch
    return (images.unsqueeze(1).float() / 255 - 0.5) / 0.5, labels


def split(labels: Tensor, val_size: int, split_seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the validation and of the training images, both in ascending order.

    Each class gives its share of the validation images, rounded by largest remainder.

    Args:
        labels: (N,) int64 of the images to share out.
        val_size: in [0, N).

    Returns:
        (val_size,) int64 and (N - val_size,) int64
    """
    generator = torch.Generator().manual_seed(split_seed)
    counts = torch.bincount(labels)
    shares = counts * val_size / len(labels)
    quotas = shares.long()
    largest = torch.argsort(shares - quotas, descending=True, stable=True)
    quotas[largest[: val_size - int(quotas.sum())]] += 1
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        members = (labels == label).nonzero().squeeze(1)
        chosen = torch.randperm(len(members), generator=generator)[:quota]
        is_val[members[chosen]] = True
    return is_val.nonzero().squeeze(1), (~is_val).nonzero().squeeze(1)


def order_stratified(labels: Tensor, split_seed: int) -> Tensor:
    """An order of images of which every beginning is stratified: each class has its share, within one image.

    Args:
        labels: (N,) int64.

    Returns:
        (N,) int64, indices.
    """
    generator = torch.Generator().manual_seed(split_seed)
    places = torch.empty(len(labels), dtype=torch.float64)
    for members in members_of_classes(labels):
        shuffled = members[torch.randperm(len(members), generator=generator)]
        # the k-th image of n of its class comes after a share of (k + 1/2) / n of all
        places[shuffled] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return torch.argsort(places, stable=True)


def assign_folds(labels: Tensor, num_folds: int, split_seed: int) -> Tensor:
    """Each image's fold.  Folds differ by one image at most, in all and in each class.

    Args:
        labels: (N,) int64 of the training images.

    Returns:
        (N,) int64 in [0, num_folds).
    """
    generator = torch.Generator().manual_seed(split_seed)
    parts = [
        members[torch.randperm(len(members), generator=generator)] for members in members_of_classes(labels)
    ]
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[torch.cat(parts)] = torch.arange(len(labels)) % num_folds  # dealt out like cards, class by class
    return folds


def members_of_classes(labels: Tensor) -> list[Tensor]:
    """The indices of each class's images, in ascending order."""
    return [(labels == label).nonzero().squeeze(1) for label in range(int(labels.max()) + 1)]


@functools.lru_cache(maxsize=1)  # the next job of a sweep uses the same tensors, which are never written to
def read_splits(
    source: Source,
    val_size: int | None,
    split_seed: int,
    state: Hashable,
    *,
    num_folds: int | None = None,
    fold: int | None = None,
    train_size: int | None = None,
) -> tuple[dict[str, Images], tuple[str, ...], str]:
    """The three splits, the classes' names and the fingerprint of a data set.

    Args:
        state: see ``Source.stamp``.
    """
    parts, names, fingerprint = source.read()
    if "all" in parts:
        whole = Images(*parts["all"])
        test_indices, rest = split(whole.labels, round(len(whole) * TEST_SHARE), split_seed)
        test, parts = Images(*whole.__getitems__(test_indices)), {"train": whole.__getitems__(rest)}
    else:
        test = Images(*parts["test"])
    whole = Images(*parts["train"])
    try:
        num_val = check_sizes(
            len(whole), batch_size=1, val_size=val_size, num_folds=num_folds, train_size=train_size
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    if num_folds is None:
        val_indices, train_indices = split(whole.labels, num_val, split_seed)
    else:
        is_val = assign_folds(whole.labels, num_folds, split_seed).eq(int(fold or 0))
        val_indices, train_indices = is_val.nonzero().squeeze(1), (~is_val).nonzero().squeeze(1)
    if train_size is not None:
        first = order_stratified(whole.labels[train_indices], split_seed)[:train_size]
        train_indices = train_indices[first.sort().values]
    train = Images(*whole.__getitems__(train_indices))
    counts = torch.bincount(train.labels, minlength=len(names)).tolist()
    if 0 in counts:
        raise DataError(
            f"no image of class {names[counts.index(0)]} is left to train on: data.val_size={num_val} and the"
            " test images take all"
            if train_size is None
            else f"no image of class {names[counts.index(0)]} is among data.train_size={train_size}"
        )
    val = Images(*whole.__getitems__(val_indices))
    return {"train": train, "val": val, "test": test}, tuple(names), fingerprint
