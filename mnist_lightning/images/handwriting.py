"""Find the ink of a handwritten digit in a picture; ``normalize`` then makes an image like MNIST's of it.

A net that was trained on MNIST misreads images that were made in another way, however clear they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnist_lightning.images.normalize import Floats, NoDigit, normalize
from mnist_lightning.images.parts import Mask, choose_digit, find_solid, widen
from mnist_lightning.images.pictures import open_picture, read_picture
from mnist_lightning.images.ruling import find_ruling

WORK_SIDE = 256  # longer side, in pixels, to which a picture is reduced before finding its ink
FIT_SIDE = 128  # longer side, in pixels, of the grid on which the background is fitted
SETTLED = 0.002  # share of pixels that change between ink and paper, below which the fit is finished
FIT_PIXELS = 2_000  # number of pixels for a fit; more make the surface no better, only slower
MIN_CONTRAST = 4.0  # least difference between ink and paper, in grey levels of 255
MIN_PICTURE = 64  # least shorter side, in pixels, of a picture on a page; smaller ones are thick strokes


def read_image(path: Path) -> Image.Image:
    """Read a picture's first frame as upright RGB.

    A transparent picture gets a white background, or a black one if its ink is light.

    Raises:
        OSError: see ``pictures.open_picture``.
    """
    return _to_rgb(open_picture(path))


def read_pixels(
    file: Path, image_shape: Sequence[int], *, as_mnist: bool
) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Read a picture, and prepare it for a net.

    Args:
        file: the picture's file.
        image_shape: (C, H, W) of the net's images.
        as_mnist: whether to find the ink and centre it, as for MNIST's images; otherwise the picture is
            resized, as ``data=folder`` does.

    Returns:
        The picture, RGB, and the net's image, (H, W) or (H, W, 3) uint8.

    Raises:
        OSError: the file can't be read.
        NoDigit: nothing stands out from the background.
    """
    picture = read_image(file)
    if as_mnist:
        return picture, to_mnist(picture)
    channels, height, width = image_shape
    return picture, read_picture(file, size=(height, width), grey=channels == 1)


@dataclass(frozen=True)
class Separated:
    """The ink of a picture, whether it is a digit or not, and none of its background.

    Attributes:
        ink: (H, W) in [0, 1].
        scale: the factor by which the picture was scaled, at most 1.
        contrast: difference between ink and paper, in grey levels.
        ruled: whether printed lines were erased.
    """

    ink: Floats
    scale: float
    contrast: float
    ruled: bool


def to_mnist(picture: Image.Image, separated: Separated | None = None) -> NDArray[np.uint8]:
    """Make an image like MNIST's of a picture's digit.  RGB, any size -> (28, 28) uint8, ink is high

    Args:
        picture: see ``find_ink``.
        separated: see ``find_ink``.

    Raises:
        NoDigit: nothing stands out from the background.
    """
    return normalize(find_ink(picture, separated))


def find_ink(picture: Image.Image, separated: Separated | None = None) -> Floats:
    """Compute how much each pixel is ink of the picture's digit.

    Background of any colour, shade and noise is 0, and so is everything else on the paper.  If the digit is
    small, or if a picture of it lies on a page, the function crops the picture and looks again.

    Args:
        picture: RGB, any size.
        separated: the result of ``separate_ink`` for it, if known.

    Returns:
        (H, W) in [0, 1]; no side is longer than ``WORK_SIDE``.

    Raises:
        NoDigit: nothing stands out from the background.
    """
    return _choose(picture, separated or separate_ink(picture), looks=3)[0]


def separate_ink(picture: Image.Image, side: int = WORK_SIDE, *, ruled: bool = False) -> Separated:
    """Separate all ink of a picture from its background.

    Args:
        picture: RGB, any size.
        side: longest side of the result, in pixels.
        ruled: whether the picture is known to be a part of ruled paper.

    Raises:
        NoDigit: nothing stands out from the background.
    """
    small = _shrink(picture, side)
    ink, contrast, ruled = _separate(np.asarray(small, dtype=np.float32), ruled=ruled)
    return Separated(ink, max(small.size) / max(picture.size), contrast, ruled)


def _choose(picture: Image.Image, separated: Separated, *, looks: int) -> tuple[Floats, float]:
    """Choose the ink of the digit, and return it with its contrast in grey levels.

    Args:
        picture: RGB, any size.
        separated: all of its ink.
        looks: how often ink may be separated, including crops of the picture.
    """
    ink, contrast = separated.ink, separated.contrast
    ink = ink * choose_digit(ink)
    rows, columns = _box(ink)
    scale_x, scale_y = picture.width / ink.shape[1], picture.height / ink.shape[0]

    def look(rows: slice, columns: slice, margin: float) -> tuple[Floats, float]:
        surroundings = (
            max(0, int((columns.start - margin) * scale_x)),
            max(0, int((rows.start - margin) * scale_y)),
            min(picture.width, int((columns.stop + margin) * scale_x)),
            min(picture.height, int((rows.stop + margin) * scale_y)),
        )
        part = picture.crop(surroundings)
        return _choose(part, separate_ink(part, ruled=separated.ruled), looks=looks - 1)

    solid = find_solid(ink[rows, columns]) if looks > 1 else None
    if solid is not None:
        down, right = (
            slice(a.start + b.start, a.start + b.stop) for a, b in zip((rows, columns), solid, strict=True)
        )
        height, width = (down.stop - down.start) * scale_y, (right.stop - right.start) * scale_x
        if min(height, width) >= MIN_PICTURE:
            try:
                inside, inner_contrast = look(down, right, -max(1, 0.02 * (down.stop - down.start)))
            except NoDigit:
                pass  # it was a solid bar, not a picture
            else:
                if inner_contrast >= 0.4 * contrast:
                    return inside, inner_contrast
    largest = max(rows.stop - rows.start, columns.stop - columns.start)
    if looks > 1 and separated.scale < 1 and largest < WORK_SIDE / 2:
        return look(rows, columns, max(4, largest // 3))
    return ink, contrast


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, of unknown range
        values = np.nan_to_num(np.asarray(picture, dtype=float), posinf=0.0, neginf=0.0)
        span = max(float(np.ptp(values)), 1.0)
        return Image.fromarray((255 * (values - values.min()) / span).astype(np.uint8)).convert("RGB")
    if "A" not in picture.mode and "a" not in picture.mode and "transparency" not in picture.info:
        return picture.convert("RGB")
    layered = picture.convert("RGBA")
    if layered.getchannel("A").getextrema()[0] == 255:  # opaque everywhere
        return layered.convert("RGB")
    pixels = np.asarray(layered)
    opacity = pixels[..., 3] / 255
    brightness = float((pixels[..., :3].mean(axis=2) * opacity).sum() / max(float(opacity.sum()), 1e-6))
    all_opaque = bool((opacity > 0.99).all())
    paper = (255, 255, 255, 255) if all_opaque or brightness < 128 else (0, 0, 0, 255)
    return Image.alpha_composite(Image.new("RGBA", layered.size, paper), layered).convert("RGB")


def _shrink(picture: Image.Image, side: int) -> Image.Image:
    """Reduce a picture so that its longer side has at most ``side`` pixels."""
    scale = side / max(picture.size)
    if scale >= 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BOX)


def _separate(pixels: Floats, *, ruled: bool = False) -> tuple[Floats, float, bool]:
    """Separate ink from the background and from printed lines.

    Args:
        pixels: (H, W, 3) in [0, 255].
        ruled: whether the paper is known to have printed lines.

    Returns:
        The ink, (H, W) in [0, 1]; its contrast in grey levels; and whether the paper has printed lines.
    """
    residual, is_paper = _subtract_background(pixels)
    strength, level, noise = _measure(residual, is_paper)
    ruling = find_ruling(strength, max(3 * noise, 0.1 * level), ruled=ruled)
    if ruling is not None:
        residual[ruling] = 0
        strength, level, noise = _measure(residual, is_paper)
    if level / np.sqrt(3) < max(MIN_CONTRAST, 4 * noise / np.sqrt(3)):
        raise NoDigit("blank: nothing stands out clearly from the background")
    floor = min(max(3 * noise, 0.02 * level), 0.4 * level)
    ink = np.clip((strength - floor) / (level - floor), 0.0, 1.0)
    return ink, level / np.sqrt(3), ruled or ruling is not None


def _measure(residual: Floats, is_paper: Mask) -> tuple[Floats, float, float]:
    """Measure how far each pixel is from the paper, in the direction of the ink's colour.

    The distances are signed, so that noise cancels where pixels are averaged.  A noisy picture is blurred.

    Args:
        residual: (H, W, 3), the picture without its background.
        is_paper: (H, W), the pixels that are known to be paper.

    Returns:
        The distances, (H, W); the distance of ink; and the standard deviation of the paper's noise.
    """
    distance = _length(residual)
    is_ink = distance > _otsu(distance)
    if not is_ink.any():
        raise NoDigit("blank: nothing stands out from the background")
    direction = residual[is_ink].mean(axis=0)
    length = float(np.linalg.norm(direction))
    strength = residual @ (direction / max(length, 1e-6))
    level = float(np.quantile(strength[is_ink], 0.7))
    noise = 1.4826 * float(np.median(np.abs(strength[is_paper]))) if is_paper.any() else 0.0
    if noise > 0.08 * level:
        strength = _blur(strength)
        noise /= 2.5  # averaging 9 pixels divides independent noise by 3
    return strength, level, noise


def _subtract_background(pixels: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Subtract a smooth background from a picture, (H, W, 3) in [0, 255].

    If most of the border has nearly one colour, the background is its median colour.  Otherwise it is a
    quadratic surface for each channel, fitted to some of the pixels: first a plane to the border, then the
    surface to all pixels without ink.

    Returns:
        The signed residual, (H, W, 3), and which pixels are paper, (H, W).
    """
    height, width, _ = pixels.shape
    ring = max(1, round(0.04 * min(height, width)))
    on_border = np.ones((height, width), dtype=bool)
    on_border[ring:-ring, ring:-ring] = False
    flat = np.median(pixels[on_border], axis=0)
    if np.mean(_length(pixels[on_border] - flat) <= 2) > 0.6:
        residual = pixels - flat
        return residual, _length(residual) <= 2
    step = -(-max(height, width) // FIT_SIDE)
    down, right = (np.linspace(-1, 1, size, dtype=pixels.dtype) for size in (height, width))
    y, x = np.meshgrid(down[::step], right[::step], indexing="ij")
    grid, is_paper = pixels[::step, ::step], on_border[::step, ::step]
    powers = ((0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0))  # of y and x
    basis = np.stack([y**i * x**j for i, j in powers], axis=-1)
    count = 3  # a plane
    for _ in range(5):
        coefficients = _fit_robustly(basis[..., :count], grid, is_paper)
        distance = _length(grid - basis[..., :count] @ coefficients)
        is_ink = distance > _otsu(distance)
        near_ink = widen(is_ink, -(-2 // step))
        last, is_paper = is_paper, ~near_ink if np.mean(~near_ink) > 0.1 else ~is_ink
        if is_paper.sum() < len(powers) or np.mean(is_paper != last) < SETTLED:
            break
        count = len(powers)
    fitted = np.zeros((3, 3, 3), dtype=pixels.dtype)  # by the channel and the powers of y and x
    for power, coefficient in zip(powers, coefficients, strict=False):
        fitted[:, *power] = coefficient
    by_y, by_x = (np.stack([place**0, place, place**2], axis=1) for place in (down, right))
    trend = np.stack([by_y @ one @ by_x.T for one in fitted], axis=-1)
    return pixels - trend, is_paper.repeat(step, axis=0).repeat(step, axis=1)[:height, :width]


def _length(residual: Floats) -> Floats:
    """Compute the root of the mean square over the channels.  (..., 3) -> (...)"""
    return np.asarray(np.sqrt(np.einsum("...c,...c->...", residual, residual) / residual.shape[-1]))


def _fit_robustly(basis: Floats, values: Floats, where: Mask) -> Floats:
    """Fit least absolute deviations by reweighting.  (H, W, K), (H, W, C), (H, W) -> (K, C)"""
    places = np.nonzero(where)
    every = -(-len(places[0]) // FIT_PIXELS)
    chosen = places[0][::every], places[1][::every]
    basis, values = basis[chosen], values[chosen]
    weights = np.ones(len(values))
    for _ in range(5):
        weighted = basis * weights[:, None]
        coefficients = np.linalg.lstsq(weighted.T @ basis, weighted.T @ values, rcond=None)[0]
        weights = 1 / np.maximum(np.abs(values - basis @ coefficients).mean(axis=1), 1.0)
    return np.asarray(coefficients)


def _otsu(values: Floats) -> float:
    """Choose the threshold that separates two classes of values best.

    Otsu 1979, "A Threshold Selection Method from Gray-Level Histograms", IEEE Transactions on Systems, Man,
    and Cybernetics 9(1).
    """
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high, 257)
    numbers = ((values - low) * (256 / max(high - low, 1e-9))).astype(np.int64)  # np.histogram, but fast
    counts = np.bincount(numbers.ravel().clip(max=255), minlength=256)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][int(np.nanargmax(np.nan_to_num(between)))])


def _blur(values: Floats) -> Floats:
    """Average each pixel with its eight neighbours.  (H, W) -> (H, W)"""
    around = np.pad(values, 1, mode="edge")
    height, width = values.shape
    shifted = [around[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.asarray(np.mean(shifted, axis=0))


def _box(ink: Floats) -> tuple[slice, slice]:
    """Return the rows and columns that hold the ink."""
    is_ink = ink > 0.1
    if not is_ink.any():
        raise NoDigit("blank: nothing stands out from the background")
    bounds = [np.flatnonzero(is_ink.any(axis=axis)) for axis in (1, 0)]
    rows, columns = (slice(int(indices[0]), int(indices[-1]) + 1) for indices in bounds)
    return rows, columns
