"""From the ink of a digit to an image like MNIST's own: its size, its stroke width and its place.

MNIST's digits were "size normalized to fit in a 20x20 pixel box while preserving their aspect ratio",
grey from anti-aliasing, and "centered in a 28x28 image by computing the center of mass of the pixels, and
translating the image so as to position this point at the center" (LeCun, Cortes, Burges,
http://yann.lecun.com/exdb/mnist/).  Most of their strokes are 2 to 3 pixels wide; pens write thinner.

All of it is averages over areas, bilinear interpolation, sums and maxima in float64, so that another language
can restate it: halves are rounded up, and nothing depends on a library.
"""

import math

import numpy as np
from numpy.typing import NDArray

SIDE = 28
BOX = 20
CENTER = 14.0  # pixel index where MNIST's centres of mass lie, to half a pixel
WORK_BOX = 160  # pixels of the longer side at which strokes are measured and widened
STROKE = 2.4  # pixels of the box: half of MNIST's digits have wider strokes
THRESHOLD = 0.1  # what is less is no ink

Floats = NDArray[np.floating]


class NoDigit(ValueError):
    """A picture in which nothing stands out that could be a digit."""


def normalize(ink: Floats) -> NDArray[np.uint8]:
    """An image like MNIST's of a digit.  (H, W) in [0, 1] -> (28, 28) uint8, ink is high

    Args:
        ink: how much each pixel is ink, of one digit and nothing else; any size and place.

    Raises:
        NoDigit: there is no ink.
    """
    cropped = crop(ink)
    large = fit(cropped, WORK_BOX)
    width = stroke_width(large)
    # (width + 2 radius) of (WORK_BOX + 2 radius) is to be STROKE of BOX
    share = STROKE / BOX
    radius = (share * WORK_BOX - width) / (2 * (1 - share))
    boxed = fit(crop(dilate(large, radius)) if radius >= 1 else cropped, BOX)
    return center(boxed / boxed.max())


def crop(ink: Floats) -> Floats:
    """The smallest rectangle that holds all ink.  (H, W) -> (h, w)

    Raises:
        NoDigit: there is none.
    """
    is_ink = ink > THRESHOLD
    if not is_ink.any():
        raise NoDigit("blank: nothing stands out from the background")
    rows, columns = (np.flatnonzero(is_ink.any(axis=axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)


def fit(ink: Floats, box: int) -> Floats:
    """Scale so that the longer side is ``box``, with the aspect kept.  (H, W) -> (h, w)"""
    scale = box / max(ink.shape)
    height, width = (max(1, _round(size * scale)) for size in ink.shape)
    return np.asarray(_weights(ink.shape[0], height) @ ink @ _weights(ink.shape[1], width).T)


def stroke_width(ink: Floats) -> float:
    """The mean width of strokes in pixels: twice their area by the length of their edges.

    That length is the sum of the gradient's lengths, one at each corner where four pixels meet, with paper
    on all sides; each of its parts is the mean of two differences.  (H, W) in [0, 1]
    """
    padded = np.pad(ink, 1)
    down, right = np.diff(padded, axis=0), np.diff(padded, axis=1)
    edges = np.hypot((down[:, 1:] + down[:, :-1]) / 2, (right[1:] + right[:-1]) / 2)
    return 2 * float(ink.sum()) / float(edges.sum())


def dilate(ink: Floats, radius: float) -> Floats:
    """The maximum of each pixel's surroundings, a disc.  (H, W) -> (H + 2 r, W + 2 r), r = ceil(radius)"""
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
    """Put the centre of mass into the middle.  (h, w) in [0, 1], at most 20x20 -> (28, 28) uint8"""
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
    """To the nearest whole number, halves up, and what misses a half by a sum's rounding is one."""
    return math.floor(value + 0.5 + 1e-9)


def _weights(size: int, new_size: int) -> Floats:
    """The weights of the old pixels in the new ones, along an axis.  -> (new_size, size), rows sum to 1

    Fewer pixels: each new one is the mean of what it covers.  More: linear between the two nearest centres,
    and beyond the last centre its value.
    """
    step = size / new_size
    old, new = np.arange(size), np.arange(new_size)[:, None]
    if new_size < size:
        covered = np.minimum((new + 1) * step, old + 1) - np.maximum(new * step, old)
        return np.asarray(np.maximum(covered, 0) / step)
    place = np.clip((new + 0.5) * step - 0.5, 0, size - 1)
    return np.asarray(np.maximum(1 - np.abs(place - old), 0))
