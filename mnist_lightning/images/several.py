"""Find the digits of a picture that holds several, in reading order."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mnist_lightning.images.handwriting import Separated, separate_ink
from mnist_lightning.images.normalize import Floats, NoDigit
from mnist_lightning.images.parts import Ints, Mask, find_foreign, find_parts

LARGE_SIDE = 1024  # longer side, in pixels, to which a picture is reduced before finding several digits
LEAST_HEIGHT = 0.35  # least height of a digit, as a share of the usual height in the picture
MIN_SIDE = 8  # least longer side of a digit among several, in pixels
WIDE_PAIR = 1.35  # width of two touching digits, at least, as a share of the height
NARROW_PAIR = 1.1  # the same, if a single stroke joins them, and the picture is known to hold several digits
MOST_PARTS = 500  # number of parts of ink to consider, the largest ones


@dataclass(frozen=True)
class Found:
    """A digit in a picture of several.

    Attributes:
        ink: (H, W) in [0, 1], how much each pixel of its box is ink of this digit.
        box: left, top, right and bottom in the picture's pixels, the last two exclusive.
        row: number of its line, from 0.
    """

    ink: Floats
    box: tuple[int, int, int, int]
    row: int


def find_digits(picture: Image.Image) -> list[Found]:
    """Find the digits of a picture, line by line and from left to right.

    A part of ink is a digit if it is about as high as the others.  Strokes that are close above each other
    are one digit.  A part that is much wider than high is split where its ink is thinnest.

    Args:
        picture: RGB, any size.

    Raises:
        NoDigit: nothing as large as a digit stands out from the background.
    """
    return _find_digits(separate_ink(picture, LARGE_SIDE), gap=2, pair=NARROW_PAIR)


def _find_digits(separated: Separated, *, gap: int, pair: float) -> list[Found]:
    """Find the digits among the parts of ink, see ``find_digits``.

    Args:
        separated: the ink.
        gap: see ``find_parts``.
        pair: least width, as a share of the height, of two digits that a single stroke joins.
    """
    ink, scale = separated.ink, separated.scale
    parts = find_parts(ink, gap=gap)
    kept = np.flatnonzero(~find_foreign(parts) & (parts.amounts > 3))
    if not len(kept):
        raise NoDigit("blank: nothing as large as a digit stands out from the background")
    kept = np.sort(kept[np.argsort(-parts.amounts[kept], kind="stable")[:MOST_PARTS]])
    heights = (parts.boxes[:, 2] - parts.boxes[:, 0])[kept]
    usual = float(np.median(heights[heights >= 0.4 * np.quantile(heights, 0.95)]))
    groups = _merge(parts.boxes[kept], usual)
    digits: list[tuple[Ints, Mask]] = []
    for group in range(int(groups.max()) + 1):
        members = kept[groups == group]
        box = _enclose(parts.boxes[members])
        top, left, bottom, right = box
        if bottom - top < LEAST_HEIGHT * usual or max(bottom - top, right - left) < MIN_SIDE:
            continue  # dashes and pieces of printed lines are wide, but low
        mask = np.isin(parts.labels[top:bottom, left:right], members)
        digits += _split(box, mask, ink[top:bottom, left:right], usual, pair)
    if not digits:
        raise NoDigit("blank: nothing as large as a digit stands out from the background")
    lines = _find_lines([box for box, _ in digits])
    found = []
    for (box, mask), line in zip(digits, lines, strict=True):
        top, left, bottom, right = (int(edge) for edge in box)
        own = ink[top:bottom, left:right] * mask
        in_picture = (round(left / scale), round(top / scale), round(right / scale), round(bottom / scale))
        found.append(Found(own, in_picture, line))
    return sorted(found, key=lambda digit: (digit.row, digit.box[0]))


def holds_several(separated: Separated) -> bool:
    """Whether a picture holds more than one digit: at least two parts of similar height and ink.

    Args:
        separated: the ink of the picture, reduced to ``WORK_SIDE``.
    """
    try:
        digits = _find_digits(separated, gap=1, pair=WIDE_PAIR)
    except NoDigit:  # nothing is as large as a digit among several; a single one may be small
        return False
    heights = np.array([digit.ink.shape[0] for digit in digits])
    amounts = np.array([digit.ink.sum() for digit in digits])
    if len(digits) < 2 or len(digits) > 400:
        return False
    alike = (heights >= 0.6 * heights.max()) & (amounts >= 0.15 * amounts.max())
    return int(alike.sum()) >= 2 and bool(alike.mean() >= 0.5)


def _merge(boxes: Ints, usual: float) -> Ints:
    """Number the digits to which boxes belong, from 0.  (N, 4) -> (N,) int64"""
    names = np.arange(len(boxes))
    order = np.argsort(-(boxes[:, 2] - boxes[:, 0]), kind="stable")
    whole = {int(i): boxes[i].copy() for i in range(len(boxes))}
    changed = True
    while changed:
        changed = False
        for i in order:
            for j in order:
                a, b = int(names[i]), int(names[j])
                if a == b or not _are_one(whole[a], whole[b], usual):
                    continue
                names[names == b] = a
                whole[a] = _enclose(np.stack([whole[a], whole.pop(b)]))
                changed = True
    numbers: Ints = np.unique(names, return_inverse=True)[1]
    return numbers


def _are_one(a: Ints, b: Ints, usual: float) -> bool:
    """Whether two boxes are of one digit.

    They are if one is small, they overlap or nearly touch, and together they are no higher than a digit.
    """
    overlap = min(a[3], b[3]) - max(a[1], b[1])  # number of common columns
    above = max(a[0], b[0]) - min(a[2], b[2])  # number of rows between them, negative if they overlap
    narrow = min(a[3] - a[1], b[3] - b[1])
    height = max(a[2], b[2]) - min(a[0], b[0])
    low = min(a[2] - a[0], b[2] - b[0])
    if height > 1.35 * max(usual, float(max(a[2] - a[0], b[2] - b[0]))):
        return False
    if above < 0 and overlap >= 0.6 * narrow:  # one lies within the other, or nearly
        return True
    if low >= 0.6 * usual:
        return False
    return bool(overlap >= 0.3 * narrow and above <= 0.25 * usual) or bool(
        overlap >= -0.08 * usual and above <= 0.08 * usual
    )


def _split(box: Ints, mask: Mask, ink: Floats, usual: float, pair: float) -> list[tuple[Ints, Mask]]:
    """Split touching digits at the columns with the least ink."""
    top, left, bottom, right = (int(edge) for edge in box)
    height, width = bottom - top, right - left
    profile = (ink * mask).sum(axis=0)
    inner = slice(int(0.35 * width), int(0.65 * width) + 1)
    crossings = np.diff(np.pad(mask[:, inner], ((1, 0), (0, 0))).astype(np.int8), axis=0) == 1
    joined = bool((crossings.sum(axis=0) <= 1).any())  # two strokes or more cross the middle of most digits
    if width < (pair if joined else WIDE_PAIR) * max(height, 0.8 * usual):
        return [(box, mask)]
    count = max(2, round(width / (0.65 * height)))
    cuts = [0]
    for number in range(1, count):
        middle = number * width / count
        reach = 0.3 * width / count
        low, high = int(middle - reach), int(middle + reach) + 1
        cuts.append(low + int(profile[low:high].argmin()))
    pieces = []
    for start, end in zip(cuts, [*cuts[1:], width], strict=True):
        piece = mask[:, start:end]
        rows = np.flatnonzero(piece.any(axis=1))
        if len(rows):
            low, high = int(rows[0]), int(rows[-1]) + 1
            pieces.append((np.array([top + low, left + start, top + high, left + end]), piece[low:high]))
    return pieces


def _find_lines(boxes: list[Ints]) -> list[int]:
    """Number the line of each box from the top: the line whose height includes the middle of the box."""
    lines: list[list[int]] = []
    for i in sorted(range(len(boxes)), key=lambda i: int(boxes[i][0] + boxes[i][2])):
        middle = (boxes[i][0] + boxes[i][2]) / 2
        if lines:
            last = np.array([boxes[j] for j in lines[-1]])
            if middle <= np.median(last[:, 2]) - 0.15 * np.median(last[:, 2] - last[:, 0]):
                lines[-1].append(i)
                continue
        lines.append([i])
    numbers = [0] * len(boxes)
    for number, line in enumerate(lines):
        for i in line:
            numbers[i] = number
    return numbers


def _enclose(boxes: Ints) -> Ints:
    whole: Ints = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    return whole
