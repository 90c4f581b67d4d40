"""The net: pixels in, ten logits out."""

import itertools
import math

import torch
from torch import Tensor, nn

from mnist_lightning.images.deform import upright

IMAGE_SHAPE = (28, 28)
NUM_PIXELS = math.prod(IMAGE_SHAPE)
NUM_CLASSES = 10

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}
NORMS: dict[str, type[nn.Module] | None] = {
    "none": None,
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
}


class GaussianNoise(nn.Module):
    """Adds normal noise while training; nothing in eval mode.

    Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization"; in batch-normalised
    layers: Rasmus et al. 2015, arXiv 1507.02672, whose baseline with it errs on 0.80 % of MNIST.

    Args:
        std: of the noise, > 0.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, values: Tensor) -> Tensor:
        return values + self.std * torch.randn_like(values) if self.training else values

    def extra_repr(self) -> str:
        return f"std={self.std}"


class FeedForward(nn.Module):
    """A fully connected net that takes raw pixels and normalises them itself.

    Each hidden layer is linear -> norm -> noise -> activation -> dropout; the last layer is linear.
    The normalisation constants are buffers: they move with the net to its device and into its
    checkpoint, so that a checkpoint alone is enough to predict.

    Args:
        hidden: units of each hidden layer; ``[]`` gives a linear classifier.
        activation: a key of ``ACTIVATIONS``.
        dropout: probability in [0, 1) of zeroing a hidden unit while training.
        norm: a key of ``NORMS``.
        mean: of the training pixels, scaled to [0, 1].
        std: of the training pixels, scaled to [0, 1]; > 0.
        input_noise: standard deviation of noise that training adds to the normalised pixels; >= 0.
        noise: standard deviation of noise that training adds before each activation; >= 0.
        deskew: whether each image is first set upright (``deform.upright``), in eval mode alone: training
            images are given upright, so that deformations act on upright digits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        hidden: list[int],
        activation: str,
        dropout: float,
        norm: str,
        mean: float,
        std: float,
        input_noise: float = 0.0,
        noise: float = 0.0,
        deskew: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(255 * mean))
        self.register_buffer("std", torch.tensor(255 * std))
        self.deskew = deskew
        layers: list[nn.Module] = [nn.Flatten()]
        if input_noise > 0:
            layers.append(GaussianNoise(input_noise))
        sizes = [NUM_PIXELS, *hidden]
        for num_in, num_out in itertools.pairwise(sizes):
            layers.append(nn.Linear(num_in, num_out))
            if (make_norm := NORMS[norm]) is not None:
                layers.append(make_norm(num_out))
            if noise > 0:
                layers.append(GaussianNoise(noise))
            layers.append(ACTIVATIONS[activation]())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(sizes[-1], NUM_CLASSES))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits for a batch.  (B, 28, 28) uint8 or float, in [0, 255] -> (B, 10) float."""
        pixels = images.float()
        if self.deskew and not self.training:
            pixels = upright(pixels)
        logits: Tensor = self.layers((pixels - self.mean) / self.std)
        return logits
