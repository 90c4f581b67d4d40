"""Train in a plain torch loop with the project's net, images in memory, optimizer and schedule.

As a script, it trains the project's default net and evaluates it on the test images after each epoch:

    python -m benchmarks.bare_loop
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from benchmarks.contestant import append, parse_arguments


def train_epoch(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    batch_size: int,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    steps: int | None = None,
) -> None:
    """Train for one epoch.

    Args:
        net: (B, 28, 28) uint8 -> (B, 10) logits.
        images: (N, 28, 28) uint8, on the net's device.
        labels: (N,) int64, on the same device.
        order: (M,) int64, the indices of the images in the order of training.
        batch_size: the number of images in a step.
        optimizer: updates the net's parameters.
        scheduler: changes the learning rate after each step; None: it is constant.
        steps: the largest number of steps; None: all.
    """
    for batch in order.to(images.device).split(batch_size)[:steps]:
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def accuracy(net: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return (net(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train with the settings of the default run, written out."""
    from mnist_lightning.images.preprocess import Preprocess
    from mnist_lightning.network import FeedForward

    arguments = parse_arguments(__doc__, epochs=8)

    from torchvision.datasets import MNIST

    train, test = (MNIST(str(arguments.data_dir), train=is_train) for is_train in (True, False))
    images, labels = train.data[:55_000], train.targets[:55_000]
    torch.manual_seed(1)
    net = nn.Sequential(Preprocess(), FeedForward([256]))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.004, weight_decay=0.01, fused=True)
    steps = arguments.epochs * -(-len(images) // 256)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    start = time.monotonic()
    for epoch in range(1, arguments.epochs + 1):
        order = torch.randperm(len(images))
        train_epoch(net, images, labels, order, 256, optimizer, scheduler, arguments.steps)
        reached = accuracy(net, test.data, test.targets)
        append(arguments.log, reached)
        print(f"epoch {epoch}   test acc {100 * reached:.2f} %   {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
