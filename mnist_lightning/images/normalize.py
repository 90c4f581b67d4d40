"""Make an image like MNIST's from the ink of a digit, with MNIST's size, stroke width and position.

MNIST's digits were "size normalized to fit in a 20x20 pixel box while preserving their aspect ratio",
grey from anti-aliasing, and "centered in a 28x28 image by computing the center of mass of the pixels, and
translating the image so as to position this point at the center" (LeCun, Cortes, Burges,
http://yann.lecun.com/exdb/mnist/).  Most of their strokes are 2 to 3 pixels wide; pens write thinner.

All steps are averages over areas, bilinear interpolation, sums and maxima in float64, with halves rounded up,
so that the page's JavaScript can compute the same without a library.
"""

import math

import numpy as np
from numpy.typing import NDArray

SIDE = 28
BOX = 20
CENTER = 14.0  # pixel index of MNIST's centres of mass, within half a pixel
WORK_BOX = 160  # longer side, in pixels, at which strokes are measured and widened
STROKE = 2.4  # stroke width in pixels of the box; half of MNIST's digits have wider strokes
THRESHOLD = 0.1  # smaller values are no ink

Floats = NDArray[np.floating]


class NoDigit(ValueError):
    """Nothing in a picture stands out that could be a digit."""


def normalize(ink: Floats) -> NDArray[np.uint8]:
    """Make an image like MNIST's of a digit.  (H, W) in [0, 1] -> (28, 28) uint8, ink is high

    Args:
        ink: how much each pixel is ink of the digit; any size and position.

    Raises:
        NoDigit: there is no ink.
    """
    cropped = crop(ink)
    large = fit(cropped, WORK_BOX)
    width = stroke_width(large)
    # choose the radius such that (width + 2 radius) / (WORK_BOX + 2 radius) = STROKE / BOX
    share = STROKE / BOX
    radius = (share * WORK_BOX - width) / (2 * (1 - share))
    boxed = fit(crop(dilate(large, radius)) if radius >= 1 else cropped, BOX)
    return center(boxed / boxed.max())


def crop(ink: Floats) -> Floats:
    """Crop to the smallest rectangle that holds all ink.  (H, W) -> (h, w)

    Raises:
        NoDigit: there is no ink.
    """
    is_ink = ink > THRESHOLD
    if not is_ink.any():
        raise NoDigit("blank: nothing stands out from the background")
    rows, columns = (np.flatnonzero(is_ink.any(axis=axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)


def fit(ink: Floats, box: int) -> Floats:
    """Scale so that the longer side has ``box`` pixels, keeping the aspect ratio.  (H, W) -> (h, w)"""
    scale = box / max(ink.shape)
    height, width = (max(1, _round(size * scale)) for size in ink.shape)
    return np.asarray(_weights(ink.shape[0], height) @ ink @ _weights(ink.shape[1], width).T)


def stroke_width(ink: Floats) -> float:
    """Measure the mean width of strokes in pixels: twice their area divided by the length of their edges.

    The length of the edges is the sum of the gradient's absolute values at all corners where four pixels
    meet; each component of the gradient is the mean of two differences.  (H, W) in [0, 1] -> float
    """
    padded = np.pad(ink, 1)
    down, right = np.diff(padded, axis=0), np.diff(padded, axis=1)
    edges = np.hypot((down[:, 1:] + down[:, :-1]) / 2, (right[1:] + right[:-1]) / 2)
    return 2 * float(ink.sum()) / float(edges.sum())


def dilate(ink: Floats, radius: float) -> Floats:
    """Take the maximum over a disc around each pixel.  (H, W) -> (H + 2 r, W + 2 r), r = ceil(radius)"""
    reach = math.ceil(radius)
    height, width = ink.shape[0] + 2 * reach, ink.shape[1] + 2 * reach
    around = np.pad(ink, 2 * reach)
    widest = np.zeros((height, width))
    for y in range(-reach, reach + 1):
        for x in range(-reach, reach + 1):
            if x * x + y * y <= radius * radius:
                shifted = around[reach + y : reach + y + height, reach + x : reach + x + width]
                np.maximum(widest, shifted, out=widest)
    return widest


def center(digit: Floats) -> NDArray[np.uint8]:
    """Move the centre of mass to the middle.  (h, w) in [0, 1], at most 20x20 -> (28, 28) uint8"""
    image = np.zeros((SIDE, SIDE))
    corner = []
    for axis in (0, 1):
        profile = digit.sum(axis=1 - axis)
        mass = float((profile * np.arange(len(profile))).sum() / profile.sum())
        corner.append(min(max(_round(CENTER - mass), 0), SIDE - digit.shape[axis]))
    top, left = corner
    image[top : top + digit.shape[0], left : left + digit.shape[1]] = digit
    return np.floor(255 * image + 0.5).astype(np.uint8)


def _round(value: float) -> int:
    """Round to the nearest whole number, halves up, even if rounding errors made a half slightly smaller."""
    return math.floor(value + 0.5 + 1e-9)


def _weights(size: int, new_size: int) -> Floats:
    """Compute the weights of old pixels in new pixels along an axis.  -> (new_size, size), rows sum to 1

    With fewer pixels, each new one is the mean of the old ones that it covers.  With more, each new one is
    interpolated between the two nearest centres; outside the outer centres it has their value.
    """
    step = size / new_size
    old, new = np.arange(size), np.arange(new_size)[:, None]
    if new_size < size:
        covered = np.minimum((new + 1) * step, old + 1) - np.maximum(new * step, old)
        return np.asarray(np.maximum(covered, 0) / step)
    place = np.clip((new + 0.5) * step - 0.5, 0, size - 1)
    return np.asarray(np.maximum(1 - np.abs(place - old), 0))
