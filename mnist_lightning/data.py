"""The digits: where they come from, the three splits, the loaders.

All images stay as uint8 in the memory of the device that trains, and a batch is one indexing operation
there; ``Preprocess`` does the rest.  Decoding and transforming image by image is what makes a usual MNIST
project several times slower than its arithmetic.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mnist_lightning.images.sources import IMAGE_SHAPE, Stamp, class_names, make_whole, read_images, stamp

EVAL_BATCH_SIZE = 2_000  # images at once where no gradient is needed: 6 MB as float


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory.

    Args:
        images: (N, 28, 28) uint8.
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
        """A whole batch at once.  (B,) int64 on the images' device -> (B, 28, 28) uint8, (B,) int64"""
        return self.images[indices], self.labels[indices]

    def to(self, device: torch.device) -> "Digits":
        return Digits(self.images.to(device), self.labels.to(device))


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
        start: how many of this process's indices ``iter`` leaves out at the beginning, once: the
            next epoch starts at its beginning again.
    """

    def __init__(self, num_samples: int, *, shuffle: bool, seed: int, rank: int, world_size: int) -> None:
        self.num_samples = num_samples
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

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
        """What ``iter`` gives, as a tensor."""
        start, self.start = self.start, 0
        return self.order()[start:]

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
    """Train, validation and test splits of MNIST or of a data set in its format.

    The validation images are ``val_size`` of the 60,000 training images, stratified by label and
    chosen by ``split_seed`` alone; the test split is the official one.

    Args:
        name: a key of ``sources.FOLDERS``.
        data_dir: folder in torchvision's layout; made and filled where something is missing.
        batch_size: of training, over all processes together; divisible by their number.
        val_size: number of validation images; 0 trains on all 60,000.
        split_seed: chooses the validation images.
        num_workers: of each loader.
        seed: of the order of the training images.
    """

    def __init__(
        self,
        *,
        name: str,
        data_dir: str,
        batch_size: int,
        val_size: int,
        split_seed: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.dataset = name
        self.data_dir = Path(data_dir).expanduser()
        self.batch_size = batch_size
        self.val_size = val_size
        self.split_seed = split_seed
        self.num_workers = num_workers
        self.seed = seed
        self.splits: dict[str, Digits] = {}
        self.resume_epoch = 0  # where the training order goes on, see load_state_dict
        self.resume_batch = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        return IMAGE_SHAPE

    @property
    def class_names(self) -> list[str]:
        return class_names(self.dataset)

    def state_dict(self) -> dict[str, int]:
        """Where in the order of the training images a checkpoint stands: epoch, and batch in it."""
        assert self.trainer is not None
        fit_loop = self.trainer.fit_loop
        batch = fit_loop.epoch_loop.batch_progress.current.ready
        return {
            "epoch": fit_loop.epoch_progress.current.processed,  # type: ignore[attr-defined]
            "batch": batch if batch < self.trainer.num_training_batches else 0,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.resume_epoch, self.resume_batch = state_dict["epoch"], state_dict["batch"]

    def prepare_data(self) -> None:
        """Make ``data_dir`` whole.

        Raises:
            OSError: the folder can't be made or written, or a download failed.
        """
        make_whole(self.dataset, self.data_dir, stamp(self.dataset, self.data_dir))

    def setup(self, stage: str) -> None:
        if self.splits:
            return
        state = stamp(self.dataset, self.data_dir)
        self.splits = read_splits(self.dataset, self.data_dir, self.val_size, self.split_seed, state)

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
        sampler.epoch = self.resume_epoch
        sampler.start = self.resume_batch * (self.batch_size // world_size)
        return loader

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("val", EVAL_BATCH_SIZE)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader("test", EVAL_BATCH_SIZE)

    def _loader(self, split: str, batch_size: int) -> DataLoader[tuple[Tensor, Tensor]]:
        digits = self.splits[split]
        trainer = self.trainer
        overfit = getattr(trainer, "overfit_batches", 0) > 0  # the same few batches each epoch
        sampler = EpochSampler(
            len(digits),
            shuffle=split == "train" and not overfit,
            seed=self.seed,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        device = torch.device("cpu")
        if trainer is not None and self.num_workers == 0:  # worker processes hand over through the host
            device = trainer.strategy.root_device
        return DataLoader(
            digits.to(device),
            batch_sampler=BatchIndices(sampler, batch_size, device),  # type: ignore[arg-type]  # a tensor, no list
            num_workers=self.num_workers,
            collate_fn=_identity,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # else each epoch would draw from the global random state
        )


def _identity(batch: Any) -> Any:
    return batch


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


@functools.lru_cache(maxsize=1)  # the next job of a sweep uses the same tensors, which nobody writes to
def read_splits(name: str, data_dir: Path, val_size: int, split_seed: int, state: Stamp) -> dict[str, Digits]:
    images, labels = read_images(name, data_dir, train=True)
    val_indices, train_indices = split(labels, val_size, split_seed)
    return {
        "train": Digits(images[train_indices], labels[train_indices]),
        "val": Digits(images[val_indices], labels[val_indices]),
        "test": Digits(*read_images(name, data_dir, train=False)),
    }
