"""Find connected parts of ink, and decide which of them are no digit."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mnist_lightning.images.normalize import Floats

IS_INK = 0.3  # threshold, in [0, 1], above which a pixel belongs to a part
NEAR = 0.06  # parts within this share of the digit's longer side belong to it, however small they are
FAR = 0.6  # parts beyond this share do not, however large they are

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]
Box = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Parts:
    """The connected parts of ink in an image, numbered from 0; diagonal neighbours are connected, too.

    Attributes:
        labels: (H, W) int64, the number of each pixel's part; -1 where there is no ink.
        amounts: (N,) float, sum of the ink of each part.
        boxes: (N, 4) int64, top, left, bottom and right of each part in pixels, the last two exclusive.
    """

    labels: Ints
    amounts: Floats
    boxes: Ints

    def __len__(self) -> int:
        return len(self.amounts)

    @property
    def sides(self) -> Ints:
        """The longer side of each part's box, in pixels.  -> (N,) int64"""
        sides: Ints = (self.boxes[:, 2:] - self.boxes[:, :2]).max(axis=1)
        return sides


def find_parts(ink: Floats, *, gap: int = 0) -> Parts:
    """Find the connected parts of ink.

    Args:
        ink: (H, W) in [0, 1].
        gap: pieces that are at most so many pixels apart, along rows and columns, are one part.
    """
    is_ink = ink > IS_INK
    labels = label(widen(is_ink, gap))
    labels[~is_ink] = -1
    names, labels[is_ink] = np.unique(labels[is_ink], return_inverse=True)
    count = len(names)
    rows, columns = np.nonzero(is_ink)
    numbers = labels[is_ink]
    boxes = np.zeros((count, 4), dtype=np.int64)
    for axis, places in enumerate((rows, columns)):
        lowest = np.full(count, max(ink.shape))
        np.minimum.at(lowest, numbers, places)
        boxes[:, axis] = lowest
        np.maximum.at(boxes[:, axis + 2], numbers, places + 1)
    amounts = np.bincount(numbers, weights=ink[is_ink], minlength=count).astype(float)
    return Parts(labels, amounts, boxes)


def label(mask: Mask) -> Ints:
    """Number the connected parts of a mask.  (H, W) -> (H, W) int64, -1 outside the mask

    Runs of pixels in a row are joined with the runs that they touch in the next row, until nothing changes.
    """
    rows, starts, ends = find_runs(mask)
    span = mask.shape[1] + 2  # wide enough that runs of other rows can't touch
    first = np.searchsorted(rows * span + ends, (rows + 1) * span + starts, side="left")
    last = np.searchsorted(rows * span + starts, (rows + 1) * span + ends, side="right")
    counts = np.maximum(last - first, 0)
    above = np.repeat(np.arange(len(rows)), counts)
    below = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
    names = np.arange(len(rows))
    while True:
        least = np.minimum(names[above], names[below])
        new = names.copy()
        np.minimum.at(new, names[above], least)
        np.minimum.at(new, names[below], least)
        new = new[new]
        if np.array_equal(new, names):
            break
        names = new
    labels = np.full(mask.shape, -1, dtype=np.int64)
    labels[mask] = np.repeat(names, ends - starts)
    return labels


def find_runs(mask: Mask) -> tuple[Ints, Ints, Ints]:
    """Find the runs of a mask's rows in reading order: their rows, starts and exclusive ends, (R,) each."""
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    return rows, starts, np.nonzero(steps == -1)[1]


def widen(mask: Mask, reach: int) -> Mask:
    """Widen a mask by so many pixels along rows and columns.  (H, W) -> (H, W)"""
    for _ in range(2):  # along columns, then rows
        done = 0
        while done < reach:
            step = min(2 * done + 1, reach - done)  # longer steps would leave gaps
            wide = mask.copy(order="K")
            wide[step:] |= mask[:-step]
            wide[:-step] |= mask[step:]
            mask, done = wide, done + step
        mask = mask.T
    return mask


def find_lines(parts: Parts) -> Mask:
    """Find the parts that are thin and straight along rows or columns: frames, axes, ruled lines.  -> (N,)

    At least 60 % of such a part lies in runs of at least 40 % of its longer side, and its thickness is at
    most a twelfth of that side.
    """
    is_ink = parts.labels >= 0
    sizes = _count(parts, is_ink)
    straight = np.zeros(is_ink.shape, dtype=bool)
    inner = is_ink.copy()
    for axis in (0, 1):
        labels = parts.labels if axis == 0 else parts.labels.T
        rows, starts, ends = find_runs(labels >= 0)
        long = ends - starts >= np.maximum(0.4 * parts.sides[labels[rows, starts]], 2)
        steps = np.zeros((labels.shape[0], labels.shape[1] + 1), dtype=np.int64)
        np.add.at(steps, (rows[long], starts[long]), 1)
        np.add.at(steps, (rows[long], ends[long]), -1)
        found = np.cumsum(steps, axis=1)[:, :-1] > 0
        straight |= found if axis == 0 else found.T
        inside = np.pad(labels >= 0, ((0, 0), (1, 1)))
        inside = inside[:, :-2] & inside[:, 2:]
        inner &= inside if axis == 0 else inside.T
    edge = sizes - _count(parts, inner)  # number of pixels that touch paper, on both sides of a stroke
    thickness = 2 * sizes / np.maximum(edge, 1)
    return np.asarray((_count(parts, is_ink & straight) >= 0.6 * sizes) & (thickness <= parts.sides / 12))


def _count(parts: Parts, mask: Mask) -> Ints:
    """Count the pixels of each part in a mask of ink.  -> (N,) int64"""
    return np.bincount(parts.labels[mask], minlength=len(parts))


def find_foreign(parts: Parts) -> Mask:
    """Find the parts that are no digit, such as frames and edges of the paper.  -> (N,)

    Frames and lines are straight, and lie around the digit or across most of the picture.  Edges of the
    paper, sides of a box and strokes of a neighbour lie along the picture's border.  They count as foreign
    only if another part is large enough to be a digit, because a digit that fills its picture also touches
    the border.
    """
    height, width = parts.labels.shape
    top, left, bottom, right = parts.boxes.T
    tall, wide = bottom - top, right - left
    lines = find_lines(parts)
    edges = find_edges(parts)
    spans = (tall >= 0.8 * height) | (wide >= 0.8 * width)
    large = parts.sides >= 0.2 * max(height, width)
    foreign = np.zeros(len(parts), dtype=bool)
    for suspects in (lines & ~edges, edges):
        free = ~suspects & ~edges & ~foreign
        free |= lines & ~spans & ~edges  # a line may be a 1
        for part in np.flatnonzero(suspects):
            within = (top > top[part]) & (bottom < bottom[part]) & (left > left[part]) & (right < right[part])
            held = free & within & (parts.sides >= 0.2 * parts.sides[part])
            foreign[part] = bool(held.any() or ((edges | spans)[part] and (free & large).any()))
    return foreign


def find_edges(parts: Parts) -> Mask:
    """Find the parts that lie along the picture's border.  -> (N,)"""
    height, width = parts.labels.shape
    reach_y, reach_x = max(1, round(0.1 * height)), max(1, round(0.1 * width))
    ring = np.ones((height, width), dtype=bool)
    ring[reach_y:-reach_y, reach_x:-reach_x] = False
    is_ink = parts.labels >= 0
    hugging = _count(parts, is_ink & ring) >= 0.7 * _count(parts, is_ink)
    along = np.zeros(len(parts))
    touching = np.zeros(len(parts), dtype=bool)
    for side in (parts.labels[0], parts.labels[-1], parts.labels[:, 0], parts.labels[:, -1]):
        contact = np.bincount(side[side >= 0], minlength=len(parts))
        touching |= contact > 0
        along = np.maximum(along, contact / len(side))
    return np.asarray(touching & (hugging | (along >= 0.5)))


def choose_digit(ink: Floats) -> Mask:
    """Find the ink of a picture's single digit.  (H, W) in [0, 1] -> (H, W) bool

    The digit is the largest part that is not foreign, with all parts near it: other strokes, dashes, even
    specks.  A part farther away belongs to it only if it has a twentieth of its ink, and not beyond ``FAR``.
    """
    parts = find_parts(ink, gap=max(1, round(max(ink.shape) / 128)))
    if not len(parts):
        return np.zeros(ink.shape, dtype=bool)
    kept = ~find_foreign(parts)
    amounts = np.where(kept, parts.amounts, 0)
    main = int(amounts.argmax())
    side = max(int(parts.sides[main]), 0.1 * max(ink.shape))
    top, left, bottom, right = parts.boxes.T
    away = np.maximum(
        np.maximum(top - bottom[main], top[main] - bottom), np.maximum(left - right[main], left[main] - right)
    )
    near = (away <= NEAR * side) | ((amounts >= amounts[main] / 20) & (away <= FAR * side))
    kept &= near
    kept[main] = True
    # the pixels around a stroke hold its faint edges
    reach = max(1, round(max(ink.shape) / 64))
    own = widen(kept[parts.labels] & (parts.labels >= 0), reach)
    others = ~kept[parts.labels] & (parts.labels >= 0)
    return np.asarray(own & ~widen(others, 1) | (kept[parts.labels] & (parts.labels >= 0)))


def find_solid(ink: Floats) -> Box | None:
    """Find a rectangle whose edges and most of whose inside are ink, such as a picture on a page.

    Ink that sticks out of it, such as the ticks of an axis, does not matter.

    Args:
        ink: (H, W) in [0, 1].

    Returns:
        Its rows and columns; None if there is no such rectangle.
    """
    is_ink = ink > IS_INK
    rows, columns = slice(0, ink.shape[0]), slice(0, ink.shape[1])
    for _ in range(2):  # rows are measured within the columns, and columns within the rows
        full = np.flatnonzero(is_ink[:, columns].mean(axis=1) >= 0.5)
        if not len(full):
            return None
        rows = slice(int(full[0]), int(full[-1]) + 1)
        full = np.flatnonzero(is_ink[rows].mean(axis=0) >= 0.5)
        if not len(full):
            return None
        columns = slice(int(full[0]), int(full[-1]) + 1)
    inside = is_ink[rows, columns]
    sides = (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:])
    solid = min(side.mean() for side in sides) >= 0.9 and inside.mean() >= 0.5
    return (rows, columns) if solid else None
