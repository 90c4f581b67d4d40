"""Draw sheets of images, and single images with a net's answer."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from mnist_lightning.figures.style import (
    BLUE,
    GREY,
    PAPER,
    VERMILION,
    WIDTH,
    Array,
    Picture,
    escape,
    percent,
    redraw,
    retitle,
    shorten,
    styled,
)

LINE = "\n"
LINE_HEIGHT, LETTER_WIDTH = 0.13, 0.068  # of captions with 8 points, in inches
MOST_BARS = 10  # most classes whose probabilities are drawn


@styled
def images(images: Array, labels: Sequence[str], *, title: str, columns: int = 10) -> Figure:
    """Draw a grid of images, each with its label; grey images are dark on white.

    Args:
        images: (N, H, W) or (N, H, W, 3) in [0, 255].
        labels: N texts.
        title: the figure's title.
        columns: number of images in a row.
    """
    return draw_sheet(images, labels, title=title, columns=columns, limits=(0, 255))[0]


@styled
def mean_images(means: Array, class_names: Sequence[str], *, title: str) -> Figure:
    """Draw the mean image of each class.

    Args:
        means: (C, H, W) or (C, H, W, 3) in [0, 255].
        class_names: name of each class.
        title: the figure's title.
    """
    columns = min(10, max(5, math.ceil(len(means) / 2)))
    return draw_sheet(means, class_names, title=title, columns=columns, limits=(0, 255))[0]


@styled
def mistakes(
    images: Array,
    labels: Sequence[str],
    predictions: Sequence[str],
    probabilities: Array,
    *,
    title: str,
    columns: int = 8,
) -> Figure:
    """Draw a sheet of misread images, each with its label, the prediction and its probability.

    Args:
        images: (N, H, W) or (N, H, W, 3) in [0, 255]; N may be 0.
        labels, predictions: N names of classes each.
        probabilities: (N,), probability of each prediction, in [0, 1].
        title: the figure's title.
        columns: number of images in a row.
    """
    if len(images) == 0:
        figure = Picture(figsize=(WIDTH, 1.4))
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_title(title)
        axes.text(0.5, 0.5, "no mistakes", ha="center", va="center", transform=axes.transAxes)
        return figure
    short = all(len(one) <= 3 for one in (*labels, *predictions))
    captions = [
        f"{label}{' ' if short else LINE}read as {prediction}\n{percent(probability)}"
        for label, prediction, probability in zip(labels, predictions, probabilities, strict=True)
    ]
    return draw_sheet(images, captions, title=title, columns=columns, limits=(0, 255))[0]


@styled
def first_layer(weights: Array, *, title: str, columns: int = 10) -> Figure:
    """Draw the weights of each unit of the first layer as an image; positive ones are blue, others red.

    For coloured images, grey stands for 0, and a positive weight for more of its colour.

    Args:
        weights: (U, H, W) or (U, H, W, 3).
        title: the figure's title.
        columns: number of units in a row.
    """
    limit = float(np.quantile(np.abs(weights), 0.999)) or 1.0
    figure, axes, picture = draw_sheet(
        weights, None, title=title, columns=columns, limits=(-limit, limit), cmap="RdBu"
    )
    if weights.ndim == 3:
        figure.colorbar(picture, ax=axes, label="weight", shrink=0.5, aspect=30)
    return figure


def first_layers(weights: Sequence[Array], *, titles: Sequence[str], columns: int = 10) -> Iterator[Array]:
    """Draw the first layer at several moments, with the colour scale of the last one.

    Args:
        weights: (U, H, W) or (U, H, W, 3) each.
        titles: the title of each picture.
        columns: number of units in a row.

    Returns:
        Pictures of one size, (H, W, 3) uint8 each.
    """
    figure = first_layer(weights[-1], title=titles[-1], columns=columns)
    axes = figure.axes[0]
    (picture,) = axes.images
    limit = float(np.quantile(np.abs(weights[-1]), 0.999)) or 1.0

    def change(moment: Array, title: str) -> None:
        picture.set_data(tile(moment, columns, limits=(-limit, limit)))
        retitle(axes, escape(title))

    changes = [partial(change, *moment) for moment in zip(weights, titles, strict=True)]
    yield from redraw(figure, axes, changes)


@styled
def prediction(
    given: Array, seen: Array, probabilities: Array, class_names: Sequence[str], *, title: str
) -> Figure:
    """Draw a user's picture, the net's input, and the probabilities of at most ten classes.

    Args:
        given: the picture, (H, W, 3) uint8.
        seen: the net's input, (H, W) or (H, W, 3) in [0, 255].
        probabilities: (C,) in [0, 1].
        class_names: name of each class.
        title: the figure's title.
    """
    figure = Picture(figsize=(WIDTH, 3.1))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    left.imshow(given)
    left.set_title("given")
    middle.imshow(seen, cmap=PAPER, vmin=0, vmax=255)
    middle.set_title(f"what the net sees, {seen.shape[1]}×{seen.shape[0]}")
    for axes in (left, middle):
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set(visible=True, color=GREY)
    chosen = np.arange(len(probabilities))
    if len(chosen) > MOST_BARS:
        chosen = np.argsort(-probabilities, kind="stable")[:MOST_BARS]
        right.set_title(f"the most probable of {len(probabilities)}", fontsize=9)
    best = int(np.argmax(probabilities))
    colors = [VERMILION if index == best else BLUE for index in chosen]
    bars = right.barh(range(len(chosen)), probabilities[chosen], color=colors)
    right.bar_label(bars, labels=[percent(p) for p in probabilities[chosen]], fontsize=8, padding=2)
    right.set_yticks(range(len(chosen)), [shorten(class_names[int(index)], 20) for index in chosen])
    right.invert_yaxis()
    right.set_xlim(0, 1.25)
    right.set_xticks([0, 0.5, 1])
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_xlabel("probability")
    right.grid(axis="y", visible=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def several(
    given: Array, boxes: Sequence[tuple[int, int, int, int]], captions: Sequence[str], *, title: str
) -> Figure:
    """Draw a picture with a box around each of its digits, and the answers above the boxes.

    Args:
        given: the picture, (H, W, 3) uint8.
        boxes: left, top, right and bottom of each digit, in pixels.
        captions: the answer for each digit.
        title: the figure's title.
    """
    height, width = given.shape[:2]
    figure = Picture(figsize=(WIDTH, min(max(WIDTH * height / width + 0.6, 2.0), 2 * WIDTH)))
    axes = figure.subplots()
    axes.imshow(given)
    for (left, top, right, bottom), caption in zip(boxes, captions, strict=True):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=BLUE))
        axes.text(left, top, caption, color=VERMILION, va="bottom", fontsize=11)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def draw_sheet(
    images: Array,
    captions: Sequence[str] | None,
    *,
    title: str,
    columns: int,
    limits: tuple[float, float],
    cmap: str = PAPER,
) -> tuple[Figure, Axes, AxesImage]:
    """Draw images side by side in one pair of axes, because a hundred axes would take seconds.

    Args:
        images: (N, H, W) or (N, H, W, 3), N > 0.
        captions: N texts of one or more lines; None: no captions.
        title: the figure's title.
        columns: number of images in a row.
        limits: the values at both ends of the colour map.
        cmap: the colour map of grey images.
    """
    width = images.shape[2]
    pixels_per_inch = columns * (width + gap_of(width)) / WIDTH
    lines = max(caption.count("\n") + 1 for caption in captions) if captions else 0
    band = math.ceil(lines * LINE_HEIGHT * pixels_per_inch)
    sheet = tile(images, columns, band=band, limits=limits)
    figure = Picture(figsize=(WIDTH, sheet.shape[0] / pixels_per_inch + 0.4))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_title(title)
    places = place_tiles(images, columns, band=band)
    for caption, (top, left) in zip(captions or [], places, strict=False):
        most = int(WIDTH / columns / LETTER_WIDTH)
        text = "\n".join(shorten(line, most) for line in caption.split("\n"))
        written = axes.text(
            *(left + width / 2, top - 0.5 - 0.03 * pixels_per_inch, text),
            ha="center",
            va="bottom",
            fontsize=8,
            linespacing=1.0,
        )
        written.set_in_layout(False)  # it is inside the axes, and measuring it takes longer than drawing
    picture = axes.imshow(sheet, cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    return figure, axes, picture


def tile(images: Array, columns: int, *, limits: tuple[float, float], band: int = 0) -> Array:
    """Put images side by side into one array; the gaps are NaN or, between coloured images, white.

    Args:
        images: (N, H, W), or (N, H, W, 3), which is scaled from ``limits`` to [0, 1].
        columns: number of images in a row.
        limits: least and largest value of coloured images.
        band: number of free rows of pixels above each image.

    Returns:
        (H', W') or (H', W', 3) float
    """
    height, width = images.shape[1:3]
    rows, gap = math.ceil(len(images) / columns), gap_of(width)
    sheet = np.full((rows * (height + gap + band), columns * (width + gap), *images.shape[3:]), np.nan)
    for image, (top, left) in zip(images, place_tiles(images, columns, band=band), strict=True):
        sheet[top : top + height, left : left + width] = image
    if images.ndim == 4:
        sheet = np.nan_to_num((sheet - limits[0]) / (limits[1] - limits[0]), nan=1.0).clip(0, 1)
    return sheet


def place_tiles(images: Array, columns: int, *, band: int) -> list[tuple[int, int]]:
    """Return top and left of each image in the array of ``tile``, in pixels."""
    height, width = images.shape[1:3]
    gap = gap_of(width)
    return [
        (number // columns * (height + gap + band) + band, number % columns * (width + gap))
        for number in range(len(images))
    ]


def gap_of(width: int) -> int:
    """Return the gap between two images of this width on a sheet, in pixels."""
    return max(1, round(0.1 * width))
