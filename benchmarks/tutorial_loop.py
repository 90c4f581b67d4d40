"""Train as a usual MNIST tutorial for beginners does, decoding and transforming one image at a time.

The net is 784-128-64-10 with ReLU and log-softmax; the loss is the negative log-likelihood, the optimizer SGD
with momentum.  Batches of 64 come from torchvision's MNIST through ``ToTensor`` and ``Normalize``; the loss
of each step is read.  As a script, it trains for 15 epochs and evaluates the test images after each:

    python -m benchmarks.tutorial_loop
"""

import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.contestant import append, parse_arguments

BATCH_SIZE = 64


def make_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
        nn.LogSoftmax(dim=1),
    )


def make_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.003, momentum=0.9)


def read_data(data_dir: Path, *, train: bool) -> "Dataset[tuple[Tensor, int]]":
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    return datasets.MNIST(str(data_dir), train=train, transform=transform)  # type: ignore[no-any-return]


def make_loader(
    dataset: "Dataset[tuple[Tensor, int]]", sampler: "Sampler[int] | list[int] | None" = None
) -> "DataLoader[tuple[Tensor, Tensor]]":
    """Make a loader of shuffled images, or of images in the sampler's order."""
    return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=sampler is None, sampler=sampler)  # type: ignore[arg-type]


def train_epoch(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer
) -> float:
    """Train for one epoch, and return the mean of the steps' losses."""
    criterion = nn.NLLLoss()
    total, steps = 0.0, 0
    for images, labels in batches:
        images = images.view(images.shape[0], -1)
        optimizer.zero_grad()
        loss = criterion(net(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
        steps += 1
    return total / steps


def accuracy(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    right = total = 0
    with torch.no_grad():
        for images, labels in batches:
            predictions = net(images.view(images.shape[0], -1)).argmax(dim=1)
            right += int((predictions == labels).sum())
            total += len(labels)
    return right / total


def main() -> None:
    arguments = parse_arguments(__doc__, epochs=15)
    train, test = (make_loader(read_data(arguments.data_dir, train=is_train)) for is_train in (True, False))
    torch.manual_seed(1)
    net = make_net()
    optimizer = make_optimizer(net)
    start = time.monotonic()
    for epoch in range(1, arguments.epochs + 1):
        loss = train_epoch(net, itertools.islice(train, arguments.steps), optimizer)
        reached = accuracy(net, test)
        append(arguments.log, reached)
        print(
            f"epoch {epoch}   loss {loss:.4f}   test acc {100 * reached:.2f} %"
            f"   {time.monotonic() - start:.1f} s"
        )


if __name__ == "__main__":
    main()
