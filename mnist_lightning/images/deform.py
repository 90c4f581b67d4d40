"""Deform images without changing what they show, a whole batch at once.

``Deformation`` draws a random deformation for each image; ``upright`` removes a writer's slant.  Both compute
for each pixel the place in the image where its new value comes from.  Together they need one resampling,
because two would blur twice.

The deformations are those of Simard, Steinkraus and Platt 2003, "Best Practices for Convolutional Neural
Networks Applied to Visual Document Analysis", section 2, and Ciresan et al. 2010, arXiv 1003.0358, section
2.2.  ``add_flags`` adds strokes that MNIST lacks: many people write their 1s with a flag and a foot.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FLAGS = 0xF1A6  # makes the random numbers of the flags differ from those of the deformations


class Tables(NamedTuple):
    """Tensors that depend only on the size of the images and the device."""

    limits: Tensor  # (6, 1)
    places: Tensor  # (3, H * W): x, y and 1 of each pixel
    smoothing_x: Tensor  # (W, knots)
    smoothing_y: Tensor  # (H, knots)


class Deformation:
    """Rotate, scale, slant, shift and bend each image of a batch at random.

    Rotation, scale, shear and shift are drawn uniformly between minus and plus the given amount.  Pixels that
    come from outside the image become 0, the background.

    Args:
        rotation: largest angle about the image's centre, in degrees.
        scale: largest share by which width and height grow or shrink, independently; in [0, 1).
        shear: largest angle by which upright lines lean, in degrees.
        shift: largest shift sideways and up or down, in pixels.
        elastic: standard deviation of the elastic displacement of each point along each axis, in pixels.
            Simard's alpha 34 with sigma 4 is 1.4 pixels here, Ciresan's 36 with 6 is 1.0.
        smoothness: standard deviation of the Gaussian that smooths the random displacements, in pixels; > 0.
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
        """Deform images.  (B, C, H, W) float, >= 0 -> (B, C, H, W) float, in the range of the images

        Args:
            images: the images; they are not changed.
            key: whole numbers, such as seed, step and rank, that decide all random numbers.
        """
        return resample(images, self.draw(images, *key))

    def draw(self, images: Tensor, *key: int) -> Tensor:
        """Draw the place where each pixel's value comes from, x and y in pixels from the image's centre.

        Args:
            images: (B, C, H, W); only their shape and device matter.
            key: see ``__call__``.

        Returns:
            (B, 2, H, W) float32
        """
        count, (height, width), device = len(images), images.shape[2:], images.device
        limits, places, smoothing_x, smoothing_y = self._make_tables(height, width, device)
        generator = make_generator(device, *key)
        drawn = torch.rand(6, count, generator=generator, device=device)
        angle, lean, wider, taller, right, down = (2 * drawn - 1) * limits
        cos, sin, slant = angle.cos(), angle.sin(), lean.tan()
        wider, taller = 1 / (1 + wider), 1 / (1 + taller)  # to enlarge an image is to sample it more densely
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
        """Make the matrix that turns random numbers into smooth displacements.  (size,) -> (size, knots)

        A Gaussian removes details that are finer than itself.  So random numbers on knots that are a standard
        deviation apart, with one knot outside on each side, are as good as one on every pixel.
        """
        num_knots = math.ceil((len(place) - 1) / self.smoothness) + 3
        numbers = torch.arange(num_knots, device=place.device)
        knots = (numbers - (num_knots - 1) / 2) * self.smoothness
        smoothing = torch.exp(-0.5 * ((place[:, None] - knots) / self.smoothness) ** 2)
        # with rows of length 1, smoothing keeps the variance of a displacement
        return F.normalize(smoothing, dim=1)


def add_flags(images: Tensor, labels: Tensor, share: float, *key: int) -> Tensor:
    """Draw a flag at the top of some of the digits 1, and a foot under some of these.

    Nearly all of MNIST's 1s are a single stroke.  A flag goes from the stroke's upper end down to its left,
    at an angle of 25 to 65 degrees, with 0.2 to 0.8 of the stroke's length.  Three in ten of these 1s also
    get a foot across the lower end, with 0.3 to 0.9 of the stroke's length.  Both are as thick as the stroke.
    The centre of mass stays in its place, within a pixel.

    Args:
        images: (B, 1, H, W) float, in [0, 255]; they are not changed.
        labels: (B,) int64, the digits 0 to 9.
        share: share of the 1s that get a flag, in [0, 1].
        key: whole numbers that decide all random numbers.

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
    middles = columns / rows  # the mean x of each row's ink
    # the middles of the ink's first and last rows
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
    """Make a random generator whose seed is a hash of these whole numbers."""
    # torch's generator on the CPU uses 32 bits of a seed
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest))


def upright(images: Tensor, sources: Tensor | None = None) -> Tensor:
    """Slant each image so that its ink stands upright, and move its centre of mass to the middle.

    Each row is shifted sideways in proportion to its height, until the ink's columns and rows are
    uncorrelated.  LeCun, Bottou, Bengio and Haffner 1998, "Gradient-Based Learning Applied to Document
    Recognition", section III-A, call it deslanting.  Interpolation is bilinear, so that pixels stay in their
    range except for rounding.  An image without ink stays as it is.

    Args:
        images: (B, 1, H, W) float; the background is 0.
        sources: a deformation of the upright images that is applied in the same resampling, see
            ``Deformation.draw``; it is overwritten.  None: no deformation.

    Returns:
        (B, 1, H, W) float
    """
    height, width = images.shape[2:]
    x, y = from_center(width, images.device), from_center(height, images.device)
    rows, moments = (
        images[:, 0].sum(dim=2),
        (images[:, 0] * x).sum(dim=2),
    )  # (B, H): the ink of each row, and its ink times x
    ink = rows.sum(dim=1).clamp(min=1e-6)
    right, down = moments.sum(dim=1) / ink, (rows * y).sum(dim=1) / ink  # the centre of mass
    covariance = (moments * y).sum(dim=1) / ink - right * down
    variance = (rows * y**2).sum(dim=1) / ink - down**2
    lean = covariance / variance.clamp(min=1e-6)
    right, down, lean = right[:, None, None], down[:, None, None], lean[:, None, None]
    # avoid a matrix product, which autocast would round to bfloat16
    if sources is None:
        y = y[:, None]
        sources = torch.stack([lean * y + right + x, (y + down).expand(-1, -1, width)], dim=1)
    else:
        sources[:, 0] += lean * sources[:, 1] + right
        sources[:, 1] += down
    return resample(images, sources)


def from_center(size: int, device: torch.device) -> Tensor:
    """Return the distances of an axis's pixels from its middle, in pixels.  -> (size,) float32"""
    return torch.arange(size, device=device) - (size - 1) / 2


def resample(images: Tensor, sources: Tensor) -> Tensor:
    """Take each pixel's value from another place, by bilinear interpolation; outside the image it is 0.

    Args:
        images: (B, C, H, W) float.
        sources: (B, 2, H, W), the place for each pixel, x and y in pixels from the centre.

    Returns:
        (B, C, H, W) float
    """
    height, width = images.shape[2:]
    if height == width:
        grid = sources / (width / 2)  # grid_sample's unit
    else:
        grid = torch.stack([sources[:, 0] / (width / 2), sources[:, 1] / (height / 2)], dim=1)
    return F.grid_sample(images, grid.permute(0, 2, 3, 1), align_corners=False)
