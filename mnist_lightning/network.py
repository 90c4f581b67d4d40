"""Define the net: it takes normalised pixels and gives a logit for each class."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
    """Add normal noise to all values in training mode, and none in eval mode.

    The method is of Bishop 1995, "Training with Noise is Equivalent to Tikhonov Regularization".  Rasmus
    et al. 2015, arXiv 1507.02672, use it in layers with batch normalisation; their baseline with noise
    misreads 0.80 % of MNIST's test images.

    Args:
        std: standard deviation of the noise, > 0.
    """

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, values: Tensor) -> Tensor:
        return values + self.std * torch.randn_like(values) if self.training else values

    def extra_repr(self) -> str:
        return f"std={self.std}"


class FeedForward(nn.Module):
    """A fully connected net.

    Each hidden layer is linear -> norm -> noise -> activation -> dropout; the last layer is linear.

    Args:
        hidden: units of each hidden layer; a number is one layer, ``[]`` gives a linear classifier.
        activation: a key of ``ACTIVATIONS``.
        dropout: probability of setting a hidden unit to zero in a training step, in [0, 1).
        norm: a key of ``NORMS``.
        input_noise: standard deviation of noise that training adds to the normalised pixels, >= 0.
        noise: standard deviation of noise that training adds before each activation, >= 0.
        image_shape: (C, H, W) of the images.
        num_classes: number of classes, each of which gets a logit.

    Raises:
        ValueError: the activation or the norm is unknown.
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = (256,),
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str = "none",
        input_noise: float = 0.0,
        noise: float = 0.0,
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        for name, value, known in (("activation", activation, ACTIVATIONS), ("norm", norm, NORMS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
        hidden = [hidden] if isinstance(hidden, int) else list(hidden)
        if type(self) is FeedForward:  # a subclass may take other arguments
            self.recipe = {
                "_target_": "mnist_lightning.network.FeedForward",
                "hidden": hidden,
                "activation": activation,
                "dropout": dropout,
                "norm": norm,
                "input_noise": input_noise,
                "noise": noise,
                "image_shape": list(image_shape),
                "num_classes": num_classes,
            }
        layers: list[nn.Module] = [nn.Flatten()]
        if input_noise > 0:
            layers.append(GaussianNoise(input_noise))
        sizes = [math.prod(image_shape), *hidden]
        for num_in, num_out in itertools.pairwise(sizes):
            layers.append(nn.Linear(num_in, num_out))
            if (make_norm := NORMS[norm]) is not None:
                layers.append(make_norm(num_out))
            if noise > 0:
                layers.append(GaussianNoise(noise))
            layers.append(ACTIVATIONS[activation]())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(sizes[-1], num_classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits of a batch.  (B, C, H, W) float32, normalised -> (B, num_classes) float32"""
        logits: Tensor = self.layers(images)
        return logits


@contextmanager
def on_trial(module: nn.Module) -> Iterator[None]:
    """Use a net within the block in eval mode and without gradients.

    Afterwards each of its parts is in training mode again if it was before, and torch's random state is
    restored.
    """
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
