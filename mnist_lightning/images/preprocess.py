"""Turn stored images into a net's input."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnist_lightning.images.deform import Deformation, add_flags, resample, upright


class Preprocess(nn.Module):
    """Set images upright (optional), deform them if a key is given, and normalise them.

    The module stands in front of the net in training, evaluation, averaging over deformations, prediction and
    export, and works in the same way in each.  It sets images upright before it deforms them: in the other
    order a net sees less of the deformations and makes more mistakes (docs/records.md).

    Args:
        mean: mean of the training pixels, scaled to [0, 1]; one number, or one for each channel.
        std: their standard deviation, > 0, in the same form.
        deskew: whether to set each image upright (``deform.upright``); for images of one channel.
        augment: the arguments of ``Deformation``; None: no deformations.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        mean: float | Sequence[float] = 0.1307,
        std: float | Sequence[float] = 0.3081,
        deskew: bool = False,
        augment: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            **{"mean": mean, "std": std, "deskew": deskew},
            "augment": None if augment is None else dict(augment),
        }
        for name, value in (("mean", mean), ("std", std)):
            each = [value] if isinstance(value, float | int) else value
            scaled = torch.tensor([255 * number for number in each])
            self.register_buffer(name, scaled.view(-1, 1, 1), persistent=False)
        self.deskew = deskew
        self.deform = None if augment is None else Deformation(**augment)

    def to_pixels(
        self, images: Tensor, key: tuple[int, ...] | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Do all except normalising; see ``forward``.  -> (B, C, H, W) float32, in [0, 255]"""
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
            raise ValueError(
                f"images must be (B, H, W), or (B, H, W, 3) in colour, got {tuple(images.shape)}: use"
                " MNISTDataModule, because load_mnist has normalised its images already"
            )
        pixels = images.float()
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        if key is not None and labels is not None and self.deform is not None and self.deform.flags:
            pixels = add_flags(pixels, labels, self.deform.flags, *key)
        sources = None if key is None or self.deform is None else self.deform.draw(pixels, *key)
        if self.deskew:
            return upright(pixels, sources)
        return pixels if sources is None else resample(pixels, sources)

    def forward(
        self, images: Tensor, key: tuple[int, ...] | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Prepare images for the net.

        (B, H, W) or (B, H, W, C) uint8 or float, in [0, 255] -> (B, C, H, W) float32, normalised

        Args:
            images: images as the data set stores them.
            key: whole numbers that decide the random deformations; None: do not deform.
            labels: (B,) int64, for deformations that depend on the class; None: leave these out.

        Raises:
            ValueError: the images have another shape.
        """
        normalised: Tensor = (self.to_pixels(images, key, labels) - self.mean) / self.std
        return normalised

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())
