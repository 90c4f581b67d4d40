"""Draw the statistics of a data set, and the scores of a net on it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from mnist_lightning.figures.style import (
    BLUE,
    COLORS,
    GREEN,
    GREY,
    LONGEST,
    SKY,
    VERMILION,
    WIDTH,
    Array,
    Picture,
    escape,
    font_size,
    name_classes,
    redraw,
    retitle,
    shorten,
    styled,
)

MOST_NUMBERED = 40  # with more classes, a confusion matrix shows only colours


@styled
def class_counts(counts: Mapping[str, Array], class_names: Sequence[str]) -> Figure:
    """Draw the number of images of each class in each split as bars.

    Args:
        counts: name of a split -> (C,) int.
        class_names: name of each class.
    """
    width = max(WIDTH, min(16.0, 0.14 * len(class_names)))
    longest = max(len(shorten(name, LONGEST)) for name in class_names)
    figure = Picture(figsize=(width, 1.6 * len(counts) + 0.6 + (0.05 * longest if longest > 2 else 0)))
    panels = figure.subplots(len(counts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (split, heights), color in zip(panels, counts.items(), COLORS, strict=False):
        bars = axes.bar(range(len(heights)), heights, color=color)
        if len(heights) <= 26:
            size = 8 if len(heights) <= 12 else 5.5
            axes.bar_label(bars, labels=[f"{height:,}" for height in heights], fontsize=size, padding=1)
        axes.set_title(f"{split}: {int(np.sum(heights)):,} images")
        axes.set_ylabel("images")
        axes.margins(y=0.18)
        axes.grid(axis="x", visible=False)
    name_classes(panels[-1], class_names, width=width)
    panels[-1].set_xlabel("class")
    return figure


@styled
def pixel_histogram(counts: Array, *, mean: float, std: float, title: str) -> Figure:
    """Draw how often each pixel value occurs, on a logarithmic axis.

    Args:
        counts: (1, 256) int, or (3, 256) for red, green and blue.
        mean, std: mean and standard deviation of the pixels, scaled to [0, 1].
        title: beginning of the figure's title.
    """
    figure = Picture(figsize=(WIDTH, 3.2))
    axes = figure.subplots()
    if len(counts) == 1:
        axes.bar(range(256), counts[0], width=1.0, color=BLUE)
    else:
        for values, name, color in zip(
            counts, ("red", "green", "blue"), (VERMILION, GREEN, BLUE), strict=True
        ):
            axes.step(range(256), values, where="mid", color=color, label=name)
        axes.legend()
    axes.set_yscale("log")
    axes.set_xlim(-2, 257)
    axes.set_xlabel("pixel value")
    axes.set_ylabel("pixels")
    share = 100 * float(np.sum(counts[:, 0])) / float(np.sum(counts))
    axes.set_title(
        f"{title}: {share:.1f} % of the pixels are 0; mean {mean:.4f}, std {std:.4f} of pixels in [0, 1]"
    )
    return figure


@styled
def confusion_matrix(matrix: Array, class_names: Sequence[str], *, title: str) -> Figure:
    """Draw a confusion matrix, with mistakes coloured by their number and a grey diagonal.

    Args:
        matrix: (C, C) int; rows are labels, columns are predictions.
        class_names: name of each class.
        title: the figure's title.
    """
    count = len(class_names)
    side = WIDTH if count <= 12 else min(14.0, WIDTH + 0.12 * (count - 12))
    figure = Picture(figsize=(side, 0.8 * side))
    axes = figure.subplots()
    mistakes = np.array(matrix, dtype=float)
    np.fill_diagonal(mistakes, np.nan)
    most = max(1.0, float(np.nanmax(mistakes)))
    picture = axes.imshow(mistakes, cmap="Blues", vmin=0, vmax=most)
    axes.set_facecolor("#ececec")
    axes.grid(False)
    size = font_size(count, 0.8 * side)
    _write_numbers(axes, matrix, size=size, most=most)
    name_classes(axes, class_names, width=0.8 * side)
    axes.set_yticks(range(count), [shorten(name, LONGEST) for name in class_names], fontsize=size)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.set_title(title)
    figure.colorbar(picture, ax=axes, label="mistakes (grey diagonal: right)", shrink=0.85)
    return figure


def confusion_matrices(
    matrices: Sequence[Array], class_names: Sequence[str], *, titles: Sequence[str]
) -> Iterator[Array]:
    """Draw confusion matrices of several moments, with the colour scale of the last one.

    Args:
        matrices: (C, C) int each.
        class_names: name of each class.
        titles: the title of each picture.

    Returns:
        Pictures of one size, (H, W, 3) uint8 each.
    """
    figure = confusion_matrix(matrices[-1], class_names, title=titles[-1])
    axes = figure.axes[0]
    (picture,) = axes.images
    size = font_size(len(class_names), 0.8 * float(figure.get_size_inches()[0]))

    def change(matrix: Array, title: str) -> None:
        mistakes = np.array(matrix, dtype=float)
        np.fill_diagonal(mistakes, np.nan)
        picture.set_data(mistakes)
        for text in list(axes.texts):
            text.remove()
        _write_numbers(axes, matrix, size=size, most=float(picture.get_clim()[1] or 1.0))
        retitle(axes, escape(title))

    changes = [partial(change, *moment) for moment in zip(matrices, titles, strict=True)]
    yield from redraw(figure, axes, changes)


def _write_numbers(axes: Axes, matrix: Array, *, size: float, most: float) -> None:
    """Write each count that is not 0 into its cell.

    Args:
        axes: the axes of the confusion matrix.
        matrix: (C, C) int.
        size: font size of the axes' labels, in points.
        most: the number of mistakes with the darkest colour.
    """
    for (row, column), number in np.ndenumerate(matrix):
        if number and len(matrix) <= MOST_NUMBERED:
            text = f"{number:,}"
            color = "black" if row == column or number < 0.6 * most else "white"
            fitting = min(9, 1.9 * size, 6.4 * size / len(text))
            written = axes.text(column, row, text, ha="center", va="center", color=color, fontsize=fitting)
            written.set_in_layout(False)  # it is inside the axes, and measuring it takes longer than drawing


@styled
def risk_coverage(coverage: Array, risk: Array, *, sure: float | None, title: str) -> Figure:
    """Draw the risk-coverage curve of a net that leaves its least confident images unanswered.

    El-Yaniv and Wiener 2010, "On the Foundations of Noise-free Selective Classification", Journal of Machine
    Learning Research 11, section 2.

    Args:
        coverage: (N,), share of all images that get an answer, in (0, 1], rising.
        risk: (N,), share of the answered images that are misread, in [0, 1].
        sure: share of the images that ``predict`` answers without "not sure"; None: not drawn.
        title: beginning of the figure's title.
    """
    figure = Picture(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    axes.plot(coverage, risk, color=BLUE)
    if sure is not None:
        axes.axvline(sure, linestyle="--", color=GREY, label=f"answered by predict: {100 * sure:.1f} %")
        axes.legend(loc="upper left")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(1.1 * float(np.max(risk)), 0.001))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("coverage: share of images answered, the most confident first")
    axes.set_ylabel("risk: share of these misread")
    axes.set_title(f"{title}: {100 * float(risk[-1]):.2f} % misread if all are answered")
    return figure


@styled
def reliability_diagram(
    counts: Array, confidences: Array, accuracies: Array, *, error: float, title: str
) -> Figure:
    """Draw accuracy against confidence in equal bins of confidence, and the number of images in each bin.

    Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), figure 1.

    Args:
        counts: (B,) int, number of images in each bin.
        confidences, accuracies: (B,), means over each bin in [0, 1]; NaN for an empty bin.
        error: expected calibration error, in [0, 1].
        title: beginning of the figure's title.
    """
    figure = Picture(figsize=(WIDTH, 5.6))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(counts)
    middles = (np.arange(len(counts)) + 0.5) * width
    upper.bar(middles, np.nan_to_num(accuracies), width * 0.94, color=SKY, label="accuracy of the bin")
    upper.plot(confidences, accuracies, "o", color=BLUE, markersize=5, label="its mean confidence")
    upper.plot([0, 1], [0, 1], "--", color=GREY, label="perfectly calibrated")
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1.03)
    upper.set_ylabel("accuracy")
    upper.legend(loc="upper left")
    upper.set_title(f"{title}: expected calibration error {100 * error:.2f} % ({len(counts)} bins)")
    lower.bar(middles, counts, width * 0.94, color=BLUE)
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylim(0, max(10, 3 * int(np.max(counts))))
    lower.set_yticks([0, *(10.0**power for power in range(0, 5) if 10**power < 3 * np.max(counts))])
    lower.yaxis.set_major_formatter(EngFormatter())
    lower.set_ylabel("images")
    lower.set_xlabel("confidence: probability of the predicted class")
    return figure
