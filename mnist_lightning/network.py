"""Define the net: it takes normalised pixels and gives a logit for each class."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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


EDGE_WIDTH = 0.7  # standard deviation of the Gaussian that smooths an image before its gradient, in pixels
POOL_WIDTH = 0.6  # that of the Gaussian that smooths a map, in units of the spacing
MAPS_MEAN, MAPS_STD = 0.2, 0.2  # of the maps of MNIST's training images, before they are standardised


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


class DirectionMaps(nn.Module):
    """Describe an image by where its brightness rises in each of several directions.  It learns nothing.

    The gradient of each pixel is projected on directions that share the circle equally.  Only positive
    projections are kept, so that the two edges of a stroke go to opposite maps.  Each map is smoothed and
    read at places ``spacing`` pixels apart, and the square root makes faint edges count more.  An edge that
    moves by a pixel or two changes these numbers little, while it changes pixels entirely.  Liu, Nakashima,
    Sako and Fujisawa 2003, "Handwritten digit recognition: benchmarking of state-of-the-art techniques",
    Pattern Recognition 36, compare such features.

    Args:
        directions: number of directions, >= 1.
        spacing: distance of the places at which a map is read, in pixels, from 1 to the image's shorter side.
        image_shape: (C, H, W) of the images.

    Attributes:
        shape: (C * directions, H // spacing, W // spacing), the shape of what it gives for one image.
    """

    axes: Tensor
    blur_x: Tensor
    blur_y: Tensor
    slope_x: Tensor
    slope_y: Tensor
    pool_x: Tensor
    pool_y: Tensor

    def __init__(self, directions: int, spacing: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.directions, self.spacing = directions, spacing
        channels, height, width = image_shape
        if not 1 <= spacing <= min(height, width):
            raise ValueError(f"spacing must be 1 to {min(height, width)} pixels, got {spacing}")
        self.shape = (channels * directions, height // spacing, width // spacing)
        # on the CPU: a trained net is rebuilt on torch's meta device, then filled from a file without these
        angles = torch.arange(directions, device="cpu") * (2 * math.pi / directions)
        matrices = {"axes": torch.stack([angles.cos(), angles.sin()], dim=1)}  # (directions, 2)
        for axis, size in (("x", width), ("y", height)):
            places = torch.arange(size, dtype=torch.float32, device="cpu")
            count = size // spacing
            read = (torch.arange(count, device="cpu") - (count - 1) / 2) * spacing + (size - 1) / 2
            matrices[f"blur_{axis}"] = blur = make_smoothing(places, places, EDGE_WIDTH)
            padded = torch.cat([blur[:1], blur, blur[-1:]])  # a border is no edge
            matrices[f"slope_{axis}"] = (padded[2:] - padded[:-2]) / 2
            matrices[f"pool_{axis}"] = make_smoothing(read, places, POOL_WIDTH * spacing)
        for name, matrix in matrices.items():
            self.register_buffer(name, matrix, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the maps.

        (B, C, H, W) float, normalised -> (B, C * directions, H // spacing, W // spacing) float; on MNIST they
        have mean 0 and standard deviation 1.
        """
        gradient = torch.stack(
            [self.blur_y @ images @ self.slope_x.T, self.slope_y @ images @ self.blur_x.T], dim=2
        )  # (B, C, 2, H, W)
        rises = (self.axes @ gradient.flatten(3)).relu()
        rises = rises.view(*images.shape[:2], self.directions, *images.shape[2:])
        maps = (self.pool_y @ rises @ self.pool_x.T).flatten(1, 2)
        # the addend keeps the root's slope finite where there is no edge
        standardised: Tensor = ((maps + 3e-4).sqrt() - MAPS_MEAN) / MAPS_STD
        return standardised

    def extra_repr(self) -> str:
        return f"directions={self.directions}, spacing={self.spacing}"


def make_smoothing(to: Tensor, places: Tensor, width: float) -> Tensor:
    """Make the matrix that smooths by a Gaussian.  (N,), (M,), width in pixels -> (N, M), rows of sum 1"""
    distances = (to[:, None] - places).abs() / width
    smoothing = torch.exp(-0.5 * distances**2) * (distances < 5)  # no denormal numbers, which are slow
    return smoothing / smoothing.sum(dim=1, keepdim=True)


class PixelsAndMaps(nn.Module):
    """Put ``DirectionMaps`` beside the pixels.  (B, C, H, W) float -> (B, pixels + numbers of the maps)"""

    def __init__(self, maps: DirectionMaps) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images.flatten(1), self.maps(images).flatten(1)], dim=1)


class DirectionNet(FeedForward):
    """A fully connected net that sees ``DirectionMaps`` beside the pixels.

    Args:
        hidden, activation, dropout, norm, noise: see ``FeedForward``.
        directions: number of directions in which brightness may rise, >= 1.
        spacing: distance of the places at which a map is read, in pixels, from 1 to the image's shorter side.
        input_noise: the same, on pixels and maps.
        image_shape: (C, H, W) of the images.
        num_classes: number of classes, each of which gets a logit.

    Raises:
        ValueError: the activation or the norm is unknown, or the spacing is larger than an image.
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = (256,),
        *,
        directions: int = 8,
        spacing: int = 3,
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str = "none",
        input_noise: float = 0.0,
        noise: float = 0.0,
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
    ) -> None:
        maps = DirectionMaps(directions, spacing, image_shape)
        arguments: dict[str, Any] = {
            "hidden": [hidden] if isinstance(hidden, int) else list(hidden),
            "activation": activation,
            "dropout": dropout,
            "norm": norm,
            "input_noise": input_noise,
            "noise": noise,
            "num_classes": num_classes,
        }
        super().__init__(image_shape=[math.prod(image_shape) + math.prod(maps.shape)], **arguments)
        self.layers[0] = PixelsAndMaps(maps)
        if type(self) is DirectionNet:
            self.recipe = {
                "_target_": "mnist_lightning.network.DirectionNet",
                "directions": directions,
                "spacing": spacing,
                "image_shape": list(image_shape),
                **arguments,
            }


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
