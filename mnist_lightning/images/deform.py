"""Changes of an image's shape that leave it what it is, a whole batch at once.

``Deformation`` draws one anew for each image, ``upright`` takes a writer's slant away.  Each says from where
in an image a pixel's value comes, and both together are one resampling: two would blur twice.

The deformations are those of Simard, Steinkraus and Platt 2003, "Best Practices for Convolutional Neural
Networks Applied to Visual Document Analysis", section 2, and Ciresan et al. 2010, arXiv 1003.0358, section
2.2.  Beside them ``add_flags`` draws what is missing in MNIST: people elsewhere write their 1s with a flag.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FLAGS = 0xF1A6  # keeps the key of the flags apart from that of the deformations


class Tables(NamedTuple):
    """What depends on the size of the images and the device alone."""

    limits: Tensor  # (6, 1)
    places: Tensor  # (3, H * W): x, y and 1 of each pixel
    smoothing_x: Tensor  # (W, knots)
    smoothing_y: Tensor  # (H, knots)


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
        flags: share of the digits 1 that get a flag, see ``add_flags``; in [0, 1].
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
        flags: float = 0.0,
    ) -> None:
        self.limits = [math.radians(rotation), math.radians(shear), scale, scale, shift, shift]
        self.elastic = elastic
        self.smoothness = smoothness
        self.flags = flags
        self._tables: dict[tuple[int, int, torch.device], Tables] = {}

    def __call__(self, images: Tensor, *key: int) -> Tensor:
        """The images, deformed.  (B, C, H, W) float, >= 0 -> (B, C, H, W) float, in the range of the images

        Args:
            key: whole numbers, say seed, step and rank, that alone decide what is drawn.
        """
        return resample(images, self.draw(images, *key))

    def draw(self, images: Tensor, *key: int) -> Tensor:
        """Where each pixel's value comes from, x and y in pixels from the centre.  -> (B, 2, H, W)

        Args:
            images: (B, C, H, W); their shape and device count.
            key: see ``__call__``.
        """
        count, (height, width), device = len(images), images.shape[2:], images.device
        limits, places, smoothing_x, smoothing_y = self._make_tables(height, width, device)
        generator = make_generator(device, *key)
        drawn = torch.rand(6, count, generator=generator, device=device)
        angle, lean, wider, taller, right, down = (2 * drawn - 1) * limits
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
            return (matrix @ places).view(count, 2, height, width)
        knots = smoothing_y.shape[1], smoothing_x.shape[1]
        noise = torch.randn(count, 2, *knots, generator=generator, device=device)
        bends = (self.elastic * smoothing_y) @ (noise @ smoothing_x.T)
        moved = torch.baddbmm(bends.view(count, 2, -1), matrix, places.expand(count, -1, -1))
        return moved.view(count, 2, height, width)

    def _make_tables(self, height: int, width: int, device: torch.device) -> Tables:
        key = height, width, device
        if key not in self._tables:
            x, y = from_center(width, device), from_center(height, device)
            self._tables[key] = Tables(
                torch.tensor(self.limits, device=device)[:, None],
                torch.stack(
                    [x.repeat(height), y.repeat_interleave(width), torch.ones(height * width, device=device)]
                ),
                self._smoothing(x),
                self._smoothing(y),
            )
        return self._tables[key]

    def _smoothing(self, place: Tensor) -> Tensor:
        """From random numbers to smooth displacements along an axis.  (size,) -> (size, knots)

        The Gaussian hides what is finer than itself: noise on knots that are a standard deviation apart,
        one of them outside on each side, does for noise on every pixel.
        """
        num_knots = math.ceil((len(place) - 1) / self.smoothness) + 3
        numbers = torch.arange(num_knots, device=place.device)
        knots = (numbers - (num_knots - 1) / 2) * self.smoothness
        smoothing = torch.exp(-0.5 * ((place[:, None] - knots) / self.smoothness) ** 2)
        # rows of length 1: a smoothed displacement varies as much as one before it
        return F.normalize(smoothing, dim=1)


def add_flags(images: Tensor, labels: Tensor, share: float, *key: int) -> Tensor:
    """Draws a flag at the top of some of the digits 1, and a foot under some of these.

    Nearly all of MNIST's 1s are a bare stroke.  A flag goes back from the stroke's upper end, to the left of
    it, at 25 to 65 degrees, 0.2 to 0.8 of the stroke long; three in ten get a foot across the lower end, too,
    0.3 to 0.9 of the stroke wide.  Both are as thick as the stroke; the centre of mass is put where it was,
    to a pixel.

    Args:
        images: (B, 1, H, W) float, in [0, 255]; left as they are.
        labels: (B,) int64, of the digits 0 to 9.
        share: of the 1s, in [0, 1].
        key: whole numbers that alone decide what is drawn.

    Returns:
        (B, 1, H, W) float, in [0, 255]
    """
    generator = make_generator(images.device, *key, FLAGS)
    drawn = torch.rand(6, len(images), generator=generator, device=images.device)
    chosen = ((labels == 1) & (drawn[0] < share)).nonzero()[:, 0]
    if not len(chosen):
        return images
    ones, (angle, length, with_foot, left, right) = images[chosen, 0], drawn[1:, chosen]
    x, y = (from_center(size, images.device) for size in (images.shape[3], images.shape[2]))
    ink = ones.sum(dim=(1, 2)).clamp(min=1e-6)
    has_ink = ones.amax(dim=2) > 127  # (b, H)
    top = has_ink.float().argmax(dim=1)
    bottom = has_ink.shape[1] - 1 - has_ink.flip(1).float().argmax(dim=1)
    rows, columns = ones.sum(dim=2).clamp(min=1e-6), (ones * x).sum(dim=2)
    middles = columns / rows  # where a row's ink lies
    # the stroke's ends, half its width within the ink
    run = torch.stack([middles.gather(1, end[:, None])[:, 0] for end in (top, bottom)])
    ends = torch.stack([run, torch.stack([y[top], y[bottom]])], dim=2)  # (2, b, 2)
    along = ends[1] - ends[0]
    height = along.norm(dim=1).clamp(min=1)
    half = (ink / 255 / height / 2).clamp(0.5, 3)
    along = along / height[:, None]
    across = torch.stack([along[:, 1], -along[:, 0]], dim=1)  # to the right of who looks down
    angle = torch.deg2rad(25 + 40 * angle)[:, None]
    start = ends[0] + half[:, None] * along
    flag = start + (0.2 + 0.6 * length)[:, None] * height[:, None] * (
        angle.cos() * along - angle.sin() * across
    )
    level = torch.tensor([1.0, 0.0], device=images.device)
    feet = ends[1] - half[:, None] * along
    reach = (0.15 + 0.3 * torch.stack([left, right]))[:, :, None] * height[None, :, None]
    points = torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], dim=1)  # (H * W, 2)
    strokes = [_draw_stroke(points, start, flag, half)]
    foot = _draw_stroke(points, feet - reach[0] * level, feet + reach[1] * level, half)
    strokes.append(foot * (with_foot < 0.3)[:, None])
    painted = torch.stack([ones.flatten(1), *(255 * stroke for stroke in strokes)]).amax(dim=0).view_as(ones)
    amount = painted.sum(dim=(1, 2))
    moved = torch.stack(
        [
            (painted.sum(dim=axis) * place).sum(dim=1) / amount
            - (ones.sum(dim=axis) * place).sum(dim=1) / ink
            for axis, place in ((1, x), (2, y))
        ],
        dim=1,
    ).round()
    places = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))])
    flagged = images.clone()
    flagged[chosen] = resample(painted[:, None], places + moved[:, :, None, None]).clamp(0, 255)
    return flagged


def _draw_stroke(points: Tensor, start: Tensor, end: Tensor, half: Tensor) -> Tensor:
    """A straight stroke with round ends.  (P, 2), (b, 2), (b, 2), half its width (b,) -> (b, P) in [0, 1]"""
    line = end - start
    away = points - start[:, None]
    along = (away * line[:, None]).sum(dim=2) / (line**2).sum(dim=1, keepdim=True).clamp(min=1e-6)
    distance = (away - along.clamp(0, 1)[:, :, None] * line[:, None]).norm(dim=2)
    stroke: Tensor = (half[:, None] - distance + 0.5).clamp(0, 1)
    return stroke


def make_generator(device: torch.device, *key: int) -> torch.Generator:
    """Random numbers that these whole numbers alone decide."""
    # torch's generator on the CPU heeds 32 bits of a seed
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))


def upright(images: Tensor, sources: Tensor | None = None) -> Tensor:
    """Slants each image so that its ink stands upright, its centre of mass in the image's middle.

    The lines are shifted sideways in proportion to their height, until the ink's columns and rows are
    uncorrelated: LeCun, Bottou, Bengio and Haffner 1998, "Gradient-Based Learning Applied to Document
    Recognition", section III-A, where it is called deslanting.  Bilinear, so that only rounding can leave
    the range of the pixels; an image without ink stays as it is.

    (B, 1, H, W) float, ink high on 0 -> (B, 1, H, W) float

    Args:
        sources: from where in an upright image each pixel's value is then taken, see
            ``Deformation.draw``; None: from its own place.  Written to.
    """
    height, width = images.shape[2:]
    x, y = from_center(width, images.device), from_center(height, images.device)
    rows, moments = (
        images[:, 0].sum(dim=2),
        (images[:, 0] * x).sum(dim=2),
    )  # (B, H): a row's ink, that times x
    ink = rows.sum(dim=1).clamp(min=1e-6)
    right, down = moments.sum(dim=1) / ink, (rows * y).sum(dim=1) / ink  # the centre of mass
    covariance = (moments * y).sum(dim=1) / ink - right * down
    variance = (rows * y**2).sum(dim=1) / ink - down**2
    lean = covariance / variance.clamp(min=1e-6)
    right, down, lean = right[:, None, None], down[:, None, None], lean[:, None, None]
    # no matrix product, which autocast would round to bfloat16
    if sources is None:
        y = y[:, None]
        sources = torch.stack([lean * y + right + x, (y + down).expand(-1, -1, width)], dim=1)
    else:
        sources[:, 0] += lean * sources[:, 1] + right
        sources[:, 1] += down
    return resample(images, sources)


def from_center(size: int, device: torch.device) -> Tensor:
    """The places of an axis's pixels, in pixels from the middle.  -> (size,) float32"""
    return torch.arange(size, device=device) - (size - 1) / 2


def resample(images: Tensor, sources: Tensor) -> Tensor:
    """Takes each pixel's value from elsewhere.  (B, C, H, W), (B, 2, H, W) -> (B, C, H, W)

    Bilinear: between four pixels, 0 outside.

    Args:
        sources: x and y in pixels from the centre.
    """
    height, width = images.shape[2:]
    if height == width:
        grid = sources / (width / 2)  # grid_sample's unit
    else:
        grid = torch.stack([sources[:, 0] / (width / 2), sources[:, 1] / (height / 2)], dim=1)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), align_corners=False)
