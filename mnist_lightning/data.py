"""Load a data set into memory, split it and serve batches of it.

All images stay as uint8 in the memory of the device that trains, so that a batch is one indexing operation;
``Preprocess`` does the rest.  Usual MNIST projects decode and transform each image by itself, which takes
several times as long as the arithmetic of the net.
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

TEST_SHARE = 1 / 5  # the share of images that become the test split where a data set has none


def eval_batch_size(image_shape: Sequence[int]) -> int:
    """Number of images in a batch that needs no gradients: as many as take 6 MB as float32."""
    return max(1, 2_000 * 28 * 28 // math.prod(image_shape))


class Images(Dataset[tuple[Tensor, Tensor]]):
    """A PyTorch data set of images and labels that lie in memory.

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
        """Return a whole batch at once.  The indices lie on the images' device.

        (B,) int64 -> (B, H, W) or (B, H, W, 3) uint8, (B,) int64
        """
        # index_select copies whole images, in a sixth of the time that images[indices] takes pixel by pixel
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def to(self, device: torch.device) -> "Images":
        return Images(self.images.to(device), self.labels.to(device))


class EpochSampler(Sampler[int]):
    """Give one process its indices of each epoch, as a function of (seed, epoch, rank).

    Each process takes one of every ``world_size`` consecutive indices of the epoch's order.  So the k-th
    batches of all processes together are the k-th batch that a single process would see.  All processes
    take the same number of steps: a shuffled (training) epoch leaves out up to ``world_size - 1`` indices
    at the end of its order, which are other images in each epoch.  No image is repeated within an epoch.

    Args:
        num_samples: number of images in the data set.
        shuffle: whether each epoch has a new random order; otherwise the order is 0, 1, 2, …
        seed: seed of the random orders, in [0, 2^32).
        rank: number of this process, in [0, world_size).
        world_size: number of processes.

    Attributes:
        epoch: the epoch whose order ``iter`` gives next; Lightning calls ``set_epoch`` before each epoch.
        start: an epoch, and the number of indices that this process skips at the beginning of that epoch.
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
        """Return this process's indices of the whole epoch.  -> (len(self),) int64"""
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
        """Return the indices of ``iter`` as an int64 tensor, and go on to the next epoch."""
        epoch, start = self.start
        order = self.order()[start if self.epoch == epoch else 0 :]
        self.epoch += 1
        return order

    def __iter__(self) -> Iterator[int]:
        yield from self.take().tolist()


class BatchIndices(Sampler[Tensor]):
    """Cut a sampler's indices into batches, as tensors on a device.

    The indices are copied to the device once an epoch, so that no step waits for a copy.

    Args:
        sampler: gives the indices; Lightning looks for it here, to call its ``set_epoch``.
        batch_size: size of all batches except the last, which may be smaller.
        device: the device on which the images lie.
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
    """Hold the training, validation and test splits of MNIST or of another data set of images.

    ``split_seed`` chooses ``val_size`` of the training images for validation, the same share of each class.
    The test split is the official one; where a source has none, ``split_seed`` chooses a fifth of the images
    in the same way.

    Args:
        name: a key of ``known.KNOWN``, "folder" or "npz"; with ``source``, a name for the figures.
        data_dir: folder in torchvision's layout; ``prepare_data`` creates it and adds missing files.
        path: the folder of "folder", or the file of "npz".
        size: height and width in pixels to which pictures of "folder" are resized; None keeps their size.
        grey: whether coloured pictures of "folder" become grey.
        source: ``_target_`` and arguments of a function that gives arrays, see ``arrays.check_arrays``.
        batch_size: number of training images in a step, over all processes; a multiple of their number.
        val_size: number of validation images; 0 trains on all; None takes a tenth of the training images.
        num_folds: number of folds into which ``assign_folds`` divides the training images.  ``fold`` is then
            the validation split, and ``val_size`` is ignored.  None: no folds.
        fold: number of the validation fold, in [0, num_folds).
        train_size: number of training images to use, the first ones of ``order_stratified``; None: all that
            validation leaves.
        split_seed: seed that chooses the validation images.
        num_workers: number of worker processes of each loader.
        seed: seed of the order of the training images.

    Attributes:
        splits: "train", "val" and "test"; empty before ``setup``.
        image_shape: (C, H, W); unset before ``setup`` where ``name`` is not in ``known.KNOWN``.
        class_names: name of each label; unset before ``setup`` where ``name`` is not in ``known.KNOWN``.
        fingerprint: a text that is the same for the same images and labels; unset before ``setup``.
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
        # an absolute path, so that a checkpoint can be read from any working folder
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
        self.resume_epoch = 0  # the epoch and batch to go on from, see load_state_dict
        self.resume_batch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the batch within it and the images' fingerprint, for a checkpoint."""
        assert self.trainer is not None
        fit_loop = self.trainer.fit_loop
        batch = fit_loop.epoch_loop.batch_progress.current.ready
        epoch: int = fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        if 0 < batch < self.trainer.num_training_batches:  # within an epoch, or a limit cut it short
            epoch = fit_loop.epoch_progress.current.started - 1  # type: ignore[attr-defined]
        else:
            batch = 0
        return {
            "epoch": epoch,
            "batch": batch,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the epoch and batch of a checkpoint.

        Raises:
            DataError: the run was trained on other images.
        """
        self.check_fingerprint(state_dict)
        self.resume_epoch, self.resume_batch = state_dict["epoch"], state_dict["batch"]

    def check_fingerprint(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint's run was trained on these images.

        Args:
            state_dict: what ``state_dict`` returned for the checkpoint.

        Raises:
            DataError: the run was trained on other images.
        """
        before = state_dict.get("fingerprint", self.fingerprint)
        if before != self.fingerprint:
            raise DataError(
                f"the images of {self.name} are not those that the run was trained on: their fingerprint is"
                f" {self.fingerprint}, and was {before}"
            )

    def prepare_data(self) -> None:
        """Add the files of the data set that are missing, from the package or from the network.

        Raises:
            OSError: the folder can't be created or written, or a download failed.
        """
        self.source.make_whole()

    def setup(self, stage: str) -> None:
        """Read the images and split them, whatever ``stage`` is; a second call does nothing.

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
        """Return each channel's mean and standard deviation over the training images.

        Both are lists of C numbers, for pixels scaled to [0, 1] and rounded to six decimals.  A channel whose
        pixels are all equal gets the standard deviation 1.

        Raises:
            DataError: all pixels of all channels are equal.
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
            stds.append(round(std, 6) or 1.0)  # a constant channel has nothing to learn from
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
        if not self.splits:  # Lightning calls these two, a plain training loop does not
            self.prepare_data()
            self.setup("fit")
        images = self.splits[split]
        trainer = self.trainer
        overfit = getattr(trainer, "overfit_batches", 0) > 0  # then each epoch has the same few batches
        sampler = EpochSampler(
            len(images),
            shuffle=split == "train" and not overfit,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        device = torch.device("cpu")
        if trainer is not None and self.num_workers == 0:  # workers pass images through CPU memory
            device = trainer.strategy.root_device
        return DataLoader(
            images.to(device),
            batch_sampler=BatchIndices(sampler, batch_size or eval_batch_size(self.image_shape), device),  # type: ignore[arg-type]  # gives tensors, not lists
            num_workers=self.num_workers,
            collate_fn=_identity,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # else each epoch draws from the global random state
        )


def _identity(batch: Any) -> Any:
    return batch


def load_mnist(
    data_dir: str | Path = "~/.pytorch/MNIST_data/", batch_size: int = 64
) -> tuple[DataLoader[tuple[Tensor, Tensor]], DataLoader[tuple[Tensor, Tensor]]]:
    """Load MNIST for a plain training loop, as PyTorch's tutorials do.

    The second loader has the official test images.  If you compare settings on them, no images are left to
    say how good the best setting is; ``MNISTDataModule`` has a validation split for this.

    Args:
        data_dir: folder in torchvision's layout; missing files of MNIST are written there.
        batch_size: size of all batches except the last, which may be smaller.

    Returns:
        Loaders of the 60,000 training and of the 10,000 test images.  Each pass has a new random order.
        Batches are images (B, 1, 28, 28) float32 in [-1, 1] and labels (B,) int64.

    Raises:
        OSError: the folder can't be created or written.
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
    """Scale pixels from [0, 255] to [-1, 1].  (B, 28, 28) uint8 -> (B, 1, 28, 28) float32"""
    images, labels = batch
    return (images.unsqueeze(1).float() / 255 - 0.5) / 0.5, labels


def split(labels: Tensor, val_size: int, split_seed: int) -> tuple[Tensor, Tensor]:
    """Choose validation images at random, the same share of each class.

    Shares that are no whole numbers are rounded by the largest-remainder method.

    Args:
        labels: (N,) int64, the labels of the images to split.
        val_size: number of validation images, in [0, N).
        split_seed: seed of the choice.

    Returns:
        Indices of the validation images, (val_size,) int64, and of the training images,
        (N - val_size,) int64, both in ascending order.
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
    """Order images at random, so that the first n contain each class's share within one image, for every n.

    Args:
        labels: (N,) int64.
        split_seed: seed of the order.

    Returns:
        Indices of the images in this order, (N,) int64.
    """
    generator = torch.Generator().manual_seed(split_seed)
    places = torch.empty(len(labels), dtype=torch.float64)
    for members in members_of_classes(labels):
        shuffled = members[torch.randperm(len(members), generator=generator)]
        # the k-th image of n of its class comes after a share of (k + 1/2) / n of all
        places[shuffled] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return torch.argsort(places, stable=True)


def assign_folds(labels: Tensor, num_folds: int, split_seed: int) -> Tensor:
    """Assign each image to a fold at random.

    The sizes of two folds differ by at most one image, and so do their counts of each class.

    Args:
        labels: (N,) int64, the labels of the training images.
        num_folds: number of folds.
        split_seed: seed of the assignment.

    Returns:
        The fold of each image, (N,) int64 in [0, num_folds).
    """
    generator = torch.Generator().manual_seed(split_seed)
    parts = [
        members[torch.randperm(len(members), generator=generator)] for members in members_of_classes(labels)
    ]
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[torch.cat(parts)] = torch.arange(len(labels)) % num_folds  # dealt out like cards, class by class
    return folds


def members_of_classes(labels: Tensor) -> list[Tensor]:
    """Return the indices of each class's images in ascending order, one (n,) int64 tensor for each label."""
    return [(labels == label).nonzero().squeeze(1) for label in range(int(labels.max()) + 1)]


@functools.lru_cache(maxsize=1)  # the jobs of a sweep share these tensors; nothing writes to them
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
    """Read a data set and split it; the last result is kept for the next call with the same arguments.

    Args:
        source: where the images come from.
        val_size, split_seed, num_folds, fold, train_size: see ``MNISTDataModule``.
        state: what ``source.stamp()`` returns; another state means that files have changed.

    Returns:
        The splits "train", "val" and "test", the name of each label, and the fingerprint of the images.

    Raises:
        OSError: the images can't be read.
        DataError: they can't be used, or are too few for these sizes.
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
