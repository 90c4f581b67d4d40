"""Changes of a digit's shape that leave it what it is, a whole batch at once.

``Deformation`` draws one anew for each image, ``upright`` takes a writer's slant away.

The deformations are those of Simard, Steinkraus and Platt 2003, "Best Practices for Convolutional Neural
Networks Applied to Visual Document Analysis", section 2, and Ciresan et al. 2010, arXiv 1003.0358, section
2.2, with all of them in one resampling: two would blur twice.
"""

import hashlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 28
CENTER = (SIZE - 1) / 2  # in pixels, from the middle of the first one


class Deformation:
    """Rotates, scales, slants, shifts and bends the images of a batch, each in its own way.

    Every amount is drawn uniformly from 0 on both sides up to the one that is given; lines that
    ``grid_sample`` takes from beyond the image are background, 0.

    Args:
        rotation: degrees about the image's centre.
        scale: share by which width and height grow or shrink, each on its own; in [0, 1).
        shear: degrees by which upright lines lean.
        shift: pixels, to the side and up or down.
        elastic: pixels, the standard deviation of the elastic displacement of each point along each
            axis.  Simard's alpha 34 with sigma 4 is 1.4 pixels here, Ciresan's 36 with 6 is 1.0.
        smoothness: pixels, the standard deviation of the Gaussian that smooths the field of random
            displacements; > 0.
        device: where the images are.
    """

    def __init__(
        self,
        *,
        rotation: float,
        scale: float,
        shear: float,
        shift: float,
        elastic: float,
        smoothness: float,
        device: torch.device | str = "cpu",
    ) -> None:
        limits = [math.radians(rotation), math.radians(shear), scale, scale, shift, shift]
        self.limits = torch.tensor(limits, device=device)[:, None]
        self.elastic = elastic
        place = torch.arange(SIZE, device=device) - CENTER
        self.places = torch.stack(  # x, y and 1 of each pixel
            [place.repeat(SIZE), place.repeat_interleave(SIZE), torch.ones(SIZE**2, device=device)]
        )
        # The Gaussian hides what is finer than itself: noise on knots that are a standard deviation
        # apart, one of them outside on each side, does for noise on every pixel.
        num_knots = math.ceil((SIZE - 1) / smoothness) + 3
        knots = (torch.arange(num_knots, device=device) - (num_knots - 1) / 2) * smoothness
        smoothing = torch.exp(-0.5 * ((place[:, None] - knots) / smoothness) ** 2)
        # rows of length 1: a smoothed displacement varies as much as one before it
        self.smoothing = F.normalize(smoothing, dim=1)
        self.generator = torch.Generator(device)

    def __call__(self, images: Tensor, *key: int) -> Tensor:
        """The images, deformed.  (B, 28, 28) uint8 or float, in [0, 255] -> (B, 28, 28) float, in [0, 255]

        Bilinear, so that only rounding can leave that range.

        Args:
            key: whole numbers, say seed, step and rank, that alone decide what is drawn.
        """
        # torch's generator on the CPU heeds 32 bits of a seed
        digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
        self.generator.manual_seed(int.from_bytes(digest))
        pixels = images[:, None].float()
        grid = self._sources(len(images)).div_(SIZE / 2).permute(0, 2, 3, 1)
        return F.grid_sample(pixels, grid, align_corners=False)[:, 0]

    def _sources(self, count: int) -> Tensor:
        """Where each pixel's value comes from, x and y in pixels from the centre.  -> (count, 2, 28, 28)"""
        device = self.limits.device
        drawn = torch.rand(6, count, generator=self.generator, device=device)
        angle, lean, wider, taller, right, down = (2 * drawn - 1) * self.limits
        cos, sin, slant = angle.cos(), angle.sin(), lean.tan()
        wider, taller = 1 / (1 + wider), 1 / (1 + taller)  # what is drawn larger is sampled more densely
        matrix = torch.stack(
            [
                *(cos * wider, (sin + cos * slant) * wider, -right),
                *(-sin * taller, (cos - sin * slant) * taller, -down),
            ],
            dim=1,
        ).view(count, 2, 3)
        if self.elastic == 0:
            return (matrix @ self.places).view(count, 2, SIZE, SIZE)
        num_knots = self.smoothing.shape[1]
        noise = torch.randn(count, 2, num_knots, num_knots, generator=self.generator, device=device)
        bends = (self.elastic * self.smoothing) @ (noise @ self.smoothing.T)
        places = self.places.expand(count, -1, -1)
        return torch.baddbmm(bends.view(count, 2, -1), matrix, places).view(count, 2, SIZE, SIZE)


def upright(images: Tensor) -> Tensor:
    """Slants each image so that its ink stands upright, its centre of mass in the image's middle.

    The lines are shifted sideways in proportion to their height, until the ink's columns and rows are
    uncorrelated: LeCun, Bottou, Bengio and Haffner 1998, "Gradient-Based Learning Applied to Document
    Recognition", section III-A, where it is called deslanting.  Bilinear, so that only rounding can leave
    the range of the pixels; an image without ink stays as it is.

    (B, 28, 28) float, ink high on 0 -> (B, 28, 28) float
    """
    x = y = torch.arange(SIZE, device=images.device) - CENTER  # in pixels from the middle
    rows, moments = images.sum(dim=2), (images * x).sum(dim=2)  # (B, 28): a row's ink, and that times x
    ink = rows.sum(dim=1).clamp(min=1e-6)
    right, down = moments.sum(dim=1) / ink, (rows * y).sum(dim=1) / ink  # the centre of mass
    covariance = (moments * y).sum(dim=1) / ink - right * down
    variance = (rows * y**2).sum(dim=1) / ink - down**2
    lean = covariance / variance.clamp(min=1e-6)
    half = SIZE / 2  # grid_sample's unit
    # no matrix product, which autocast would round to bfloat16
    sources_x = ((lean[:, None] * y + right[:, None]) / half)[:, :, None] + x / half
    sources_y = ((y + down[:, None]) / half)[:, :, None].expand_as(sources_x)
    grid = torch.stack([sources_x, sources_y], dim=1).permute(0, 2, 3, 1)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
