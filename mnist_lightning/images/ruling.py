"""The printed lines of ruled and squared paper, found and taken away without the strokes that cross them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mnist_lightning.images.normalize import Floats
from mnist_lightning.images.parts import Mask, find_runs, label

MIN_SIDE = 64  # pixels of the shorter side: in smaller pictures strokes are as thin as lines
MOST_SLOPE = 0.16  # 9 degrees
THICKEST = 0.035  # of the longer side
COVERED = 0.55  # of a line's length that has to be seen; strokes hide the rest
COVERED_IF_RULED = 0.3  # the same in a part of ruled paper that a digit fills
SHORTEST = 0.25  # of the picture: leaning lines are cut off at its corners
PARALLEL = 0.05  # by which slopes of lines may differ
NEAR = 1.5  # pixels by which a line's middle may be off
ALONE = 0.25  # of a line no stroke lies on: so many of its runs have its own thickness
MOST_LINES = 100  # in each direction
MOST_RUNS = 60_000  # of thin ink; more is texture


@dataclass(frozen=True)
class Line:
    """A printed line that runs down a picture, from border to border.

    Attributes:
        rows, starts, ends: (N,) int, the runs of ink along rows in which it lies and nothing else.
        middles: (H,) where its middle is in each row.
        thickness: pixels, where it is alone.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    middles: Floats
    thickness: float


def find_ruling(strength: Floats, least: float, *, ruled: bool) -> Mask | None:
    """Find where nothing but printed lines is: straight, thin, from border to border, level or upright to
    9 degrees.

    Where ink is thicker or much darker than the line is elsewhere, a stroke crosses it or lies on it.

    A stroke of a digit that fills its picture may run from border to border, too.  So a single line goes only
    where all that touches the border are lines, and none goes where nothing as large as a digit is left.

    Args:
        strength: (H, W) how far each pixel is from the paper, towards the ink.
        least: of ``strength``, what counts as ink.
        ruled: whether the paper is known to have lines, so that a single one is one of them.

    Returns:
        (H, W); None: no lines.
    """
    if min(strength.shape) < MIN_SIDE:
        return None
    is_ink = strength > least
    down, across = (_find_lines(a, b, ruled=ruled) for a, b in ((strength, is_ink), (strength.T, is_ink.T)))
    if not down and not across:
        return None
    erased = _paint(down, is_ink.shape) | _paint(across, is_ink.T.shape).T
    near = _paint(down, is_ink.shape, whole=True) | _paint(across, is_ink.T.shape, whole=True).T
    rest = is_ink & ~erased
    if not rest.any():
        return None
    # where two lines cross, and stumps of lines between strokes
    parts = label(rest)
    sizes, outside = np.bincount(parts[rest]), np.bincount(parts[rest & ~near], minlength=parts.max() + 1)
    crossings = rest & (outside <= 0.1 * sizes)[parts]
    rest &= ~crossings
    rows, columns = np.nonzero(rest)
    if not len(rows) or max(np.ptp(rows), np.ptp(columns)) < 0.06 * max(rest.shape):
        return None
    on_border = rest[0].any() or rest[-1].any() or rest[:, 0].any() or rest[:, -1].any()
    if max(len(down), len(across)) < 2 and not ruled and on_border:
        return None
    return erased | crossings


def _find_lines(strength: Floats, is_ink: Mask, *, ruled: bool) -> list[Line]:
    """Lines that run down, parallel to the most visible one.

    A Hough transform (Duda and Hart 1972, "Use of the Hough Transformation to Detect Lines and Curves in
    Pictures", Communications of the ACM 15(1)) of the middles of short runs along rows.
    """
    height, width = is_ink.shape
    covered = COVERED_IF_RULED if ruled else COVERED
    rows, starts, ends = find_runs(is_ink)
    thin = (ends - starts <= max(3, THICKEST * max(height, width))) & (starts > 0) & (ends < width)
    rows, starts, ends = rows[thin], starts[thin], ends[thin]
    if not covered * height <= len(rows) <= MOST_RUNS:
        return []
    middles, lengths = (starts + ends - 1) / 2, ends - starts
    slopes = np.arange(-MOST_SLOPE, MOST_SLOPE, 2 / height)
    aside = int(MOST_SLOPE * height / 2) + 2  # beyond the borders
    span = width + 2 * aside
    places = np.round(middles - slopes[:, None] * (rows - height / 2)).astype(np.int64) + aside
    keys = places + span * np.arange(len(slopes))[:, None]
    counts = np.bincount(keys.ravel(), minlength=len(slopes) * span).reshape(len(slopes), span)
    # in how many rows each line lies within the picture, between the rows where it meets its sides
    lean = np.where(np.abs(slopes) < 1e-6, 1e-6, slopes)[:, None]
    sides = np.stack([aside - np.arange(span), aside + width - np.arange(span)])[:, None] / lean
    first, last = np.clip(sides, -height / 2, height / 2)
    visible = np.abs(last - first)
    wanted = np.where(visible >= SHORTEST * height, covered * visible, np.inf)[:, 1:-1]
    free = np.ones(len(rows), dtype=bool)
    found: list[Line] = []
    for _ in range(MOST_LINES):
        votes = counts[:, :-2] + counts[:, 1:-1] + counts[:, 2:]
        votes = np.where(votes >= wanted, votes, 0)
        best, place = np.unravel_index(votes.argmax(), votes.shape)
        if not votes[best, place]:
            break
        members = free & (np.abs(places[best] - place - 1) <= 1)
        alone = members & (lengths <= np.quantile(lengths[members], ALONE) + 1)
        bend = np.polynomial.Polynomial.fit(rows[alone], middles[alone], 2)
        own = free & (np.abs(middles - bend(rows)) <= NEAR)
        gone = members | own
        free &= ~gone
        counts -= np.bincount(keys[:, gone].ravel(), minlength=counts.size).reshape(counts.shape)
        course = bend(np.arange(height))
        has_run = np.zeros(height, dtype=bool)
        has_run[rows[own]] = True
        seen = has_run[(course >= 0) & (course < width)]
        edge = max(1, len(seen) // 10)
        if not len(seen) or seen.mean() < covered:
            continue
        ends_seen = seen[:edge].mean(), seen[-edge:].mean()
        if (max(ends_seen) if ruled or found else min(ends_seen)) < 0.5:  # a stroke may hide one
            continue
        if not found:
            wanted[np.abs(slopes - slopes[best]) > PARALLEL] = np.inf
        thickness = float(np.quantile(lengths[own], ALONE))
        levels = strength[rows[own], middles[own].astype(np.int64)]
        bare = lengths[own] <= thickness + max(1, 0.5 * thickness)
        bare &= levels <= 1.4 * np.median(levels[bare])  # a stroke may hide most of the line
        line = rows[own][bare], starts[own][bare], ends[own][bare]
        found.append(Line(*line, middles=course, thickness=thickness))
    return found


def _paint(lines: list[Line], shape: tuple[int, ...], *, whole: bool = False) -> Mask:
    """Where lines are, to a pixel: alone, or their whole length.  -> (H, W)"""
    height, width = shape
    steps = np.zeros((height, width + 1), dtype=np.int64)
    for line in lines:
        rows, starts, ends = line.rows, line.starts, line.ends
        if whole:
            rows, half = np.arange(height), line.thickness / 2
            starts = np.round(line.middles - half).astype(np.int64)
            ends = np.round(line.middles + half).astype(np.int64) + 1
        np.add.at(steps, (rows, np.clip(starts - 1, 0, width)), 1)
        np.add.at(steps, (rows, np.clip(ends + 1, 0, width)), -1)
    return np.asarray(np.cumsum(steps, axis=1)[:, :-1] > 0)
