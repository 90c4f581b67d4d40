"""A user's own nets, losses and metrics."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric


class ConvNet(nn.Module):
    def __init__(self, channels: int, image_shape: list[int], num_classes: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], channels, kernel_size=5, stride=3),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.LazyLinear(num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # type: ignore[no-any-return]


class Linear(nn.Module):
    """A linear net that accepts and ignores any argument."""

    def __init__(self, **kwargs: float) -> None:
        super().__init__()
        self.scale = kwargs.pop("scale", 1.0)
        assert not kwargs, kwargs
        self.linear = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.linear(images.flatten(1))  # type: ignore[no-any-return]


class Regression(nn.Module):
    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(784, outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))  # type: ignore[no-any-return]


def squared_error(outputs: Tensor, labels: Tensor, factor: float = 1.0) -> Tensor:
    return factor * (outputs.squeeze(1) - labels).square().mean()


def focal(gamma: float) -> nn.Module:
    return Focal(gamma)


class Focal(nn.Module):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002) with a learnt parameter."""

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits / self.temperature, labels, reduction="none")
        return ((1 - torch.exp(-losses)) ** self.gamma * losses).mean()


class Lost(nn.CrossEntropyLoss):
    """A loss whose addition in training is no number."""

    def penalize_net(self, net: nn.Module, images: Tensor, outputs: Tensor) -> Tensor:
        return net(images) - outputs


def per_image(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


class AbsoluteError(Metric):
    """Mean absolute error of (B, 1) predictions and (B,) targets."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        assert outputs.shape == (len(labels), 1)
        self.total += (outputs.squeeze(1) - labels).abs().sum()
        self.count += len(labels)

    def compute(self) -> Tensor:
        return self.total / self.count


class Shy(AbsoluteError):
    """A metric that does not say whether a large value is good."""

    higher_is_better = None  # type: ignore[assignment]


class Each(AbsoluteError):
    """A metric with two values instead of one."""

    def compute(self) -> Tensor:
        return torch.stack([self.total, self.total])
