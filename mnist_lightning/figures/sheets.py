"""Images: sheets of many, and one beside what a net says of it."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from mnist_lightning.figures.style import BLUE, GREY, PAPER, VERMILION, WIDTH, Array, percent, styled


@styled
def digits(images: Array, labels: Sequence[str], *, title: str, columns: int = 10) -> Figure:
    """A grid of images in reversed grey, each with its label.

    Args:
        images: (N, 28, 28) in [0, 255].
        labels: N texts.
    """
    figure, axes = sheet_figure(len(images), columns, tile=0.8, lines=1, title=title)
    draw_sheet(axes, images, labels, columns=columns, limits=(0, 255))
    return figure


@styled
def mean_images(means: Array, class_names: Sequence[str], *, title: str) -> Figure:
    """The mean image of each class.

    Args:
        means: (C, 28, 28) in [0, 255].
    """
    columns = math.ceil(len(means) / 2)
    figure, axes = sheet_figure(len(means), columns, tile=1.5, lines=1, title=title)
    draw_sheet(axes, means, class_names, columns=columns, limits=(0, 255))
    return figure


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
    """A sheet of misread images, each with its label, the prediction and its probability.

    Args:
        images: (N, 28, 28) in [0, 255]; N may be 0.
        probabilities: (N,) of the predictions, in [0, 1].
    """
    captions = [
        f"{label} read as {prediction}\n{percent(probability)}"
        for label, prediction, probability in zip(labels, predictions, probabilities, strict=True)
    ]
    figure, axes = sheet_figure(len(images), columns, tile=1.0, lines=2, title=title)
    if len(images):
        draw_sheet(axes, images, captions, columns=columns, limits=(0, 255))
    else:
        axes.text(0.5, 0.5, "no mistakes", ha="center", va="center", transform=axes.transAxes)
    return figure


@styled
def first_layer(weights: Array, *, title: str, columns: int = 10) -> Figure:
    """What each unit of the first layer looks for: its weights as an image, blue +, red -.

    Args:
        weights: (units, 28, 28).
    """
    limit = float(np.quantile(np.abs(weights), 0.999)) or 1.0
    figure, axes = sheet_figure(len(weights), columns, tile=0.8, lines=0, title=title)
    picture = draw_sheet(axes, weights, None, columns=columns, limits=(-limit, limit), cmap="RdBu")
    figure.colorbar(picture, ax=axes, label="weight", shrink=0.5, aspect=30)
    return figure


@styled
def prediction(
    given: Array, seen: Array, probabilities: Array, class_names: Sequence[str], *, title: str
) -> Figure:
    """What was given, the 28x28 that the net saw, and its ten probabilities.

    Args:
        given: (H, W, 3) uint8.
        seen: (28, 28) in [0, 255], ink is high.
        probabilities: (C,) in [0, 1].
    """
    figure = Figure(figsize=(WIDTH, 3.1))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    left.imshow(given)
    left.set_title("given")
    middle.imshow(seen, cmap=PAPER, vmin=0, vmax=255)
    middle.set_title("what the net sees, 28×28")
    for axes in (left, middle):
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set(visible=True, color=GREY)
    best = int(np.argmax(probabilities))
    colors = [VERMILION if index == best else BLUE for index in range(len(probabilities))]
    bars = right.barh(range(len(probabilities)), probabilities, color=colors)
    right.bar_label(bars, labels=[percent(p) for p in probabilities], fontsize=8, padding=2)
    right.set_yticks(range(len(class_names)), class_names)
    right.invert_yaxis()
    right.set_xlim(0, 1.25)
    right.set_xticks([0, 0.5, 1])
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_xlabel("probability")
    right.grid(axis="y", visible=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def sheet_figure(
    num_images: int, columns: int, *, tile: float, lines: int, title: str
) -> tuple[Figure, Axes]:
    """An empty figure with room for a sheet whose tiles have captions of so many lines."""
    rows = max(1, math.ceil(num_images / columns))
    height = rows * (WIDTH / columns * (1 + 0.24 * lines * 0.8 / tile)) + 0.4
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_title(title)
    return figure, axes


def draw_sheet(
    axes: Axes,
    images: Array,
    captions: Sequence[str] | None,
    *,
    columns: int,
    limits: tuple[float, float],
    cmap: str = PAPER,
) -> AxesImage:
    """Images side by side in one array: a hundred axes would take seconds to draw."""
    lines = max((caption.count("\n") + 1 for caption in captions), default=0) if captions else 0
    gap, band = 3, 8 * lines
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1] + gap + band, images.shape[2] + gap
    sheet = np.full((rows * height, columns * width), np.nan)
    for index, image in enumerate(images):
        top, left = index // columns * height + band, index % columns * width
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
        if captions:
            axes.text(
                left + image.shape[1] / 2,
                top - 1.5,
                captions[index],
                ha="center",
                va="bottom",
                fontsize=8,
                linespacing=1.0,
            )
    return axes.imshow(sheet, cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
