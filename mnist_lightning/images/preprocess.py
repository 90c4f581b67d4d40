"""From images as they are stored to what a net sees."""

import torch
from torch import Tensor, nn

from mnist_lightning.images.deform import upright


class Preprocess(nn.Module):
    """Sets images upright where that is asked for, and normalises them.

    It stands in front of the net and does the same to each image, in training, evaluation, prediction and
    export.  Deformations come before it: a deformed image is an image like any other.

    Args:
        mean: of the training pixels, scaled to [0, 1].
        std: of the training pixels, scaled to [0, 1]; > 0.
        deskew: whether each image is set upright (``deform.upright``).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, mean: float = 0.1307, std: float = 0.3081, deskew: bool = False) -> None:
        super().__init__()
        self.arguments = {"mean": mean, "std": std, "deskew": deskew}
        self.register_buffer("mean", torch.tensor(255 * mean), persistent=False)
        self.register_buffer("std", torch.tensor(255 * std), persistent=False)
        self.deskew = deskew

    def to_pixels(self, images: Tensor) -> Tensor:
        """Images before they are normalised.

        (B, H, W) or (B, H, W, C) uint8 or float, in [0, 255] -> (B, C, H, W) float32, in [0, 255]
        """
        pixels = images.float()
        if self.deskew:
            pixels = upright(pixels)
        return pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, H, W) or (B, H, W, C) uint8 or float, in [0, 255] -> (B, C, H, W) float32, normalised"""
        normalised: Tensor = (self.to_pixels(images) - self.mean) / self.std
        return normalised

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())
