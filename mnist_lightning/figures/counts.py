"""Numbers of a data set, and scores of a net on it."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mnist_lightning.figures.style import BLUE, COLORS, GREY, SKY, WIDTH, Array, name_classes, styled


@styled
def class_counts(counts: Mapping[str, Array], class_names: Sequence[str]) -> Figure:
    """Bars: how many images of each class a split holds.

    Args:
        counts: name of a split -> (C,) int.
    """
    figure = Figure(figsize=(WIDTH, 1.6 * len(counts) + 0.6))
    panels = figure.subplots(len(counts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (split, heights), color in zip(panels, counts.items(), COLORS, strict=False):
        bars = axes.bar(range(len(heights)), heights, color=color)
        axes.bar_label(bars, labels=[f"{height:,}" for height in heights], fontsize=8, padding=1)
        axes.set_title(f"{split}: {int(np.sum(heights)):,} images")
        axes.set_ylabel("images")
        axes.margins(y=0.18)
        axes.grid(axis="x", visible=False)
    name_classes(panels[-1], class_names)
    panels[-1].set_xlabel("class")
    return figure


@styled
def pixel_histogram(counts: Array, *, mean: float, std: float, title: str) -> Figure:
    """How often each grey value stands in the images, on a logarithmic axis.

    Args:
        counts: (256,) int.
        mean, std: of the pixels, in [0, 1].
    """
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.subplots()
    axes.bar(range(256), counts, width=1.0, color=BLUE)
    axes.set_yscale("log")
    axes.set_xlim(-2, 257)
    axes.set_xlabel("pixel value: 0 is paper, 255 is ink")
    axes.set_ylabel("pixels")
    share = 100 * float(counts[0]) / float(np.sum(counts))
    axes.set_title(
        f"{title}: {share:.1f} % of the pixels are 0; mean {mean:.4f}, std {std:.4f} of pixels in [0, 1]"
    )
    return figure


@styled
def confusion_matrix(matrix: Array, class_names: Sequence[str], *, title: str) -> Figure:
    """Counts of label against prediction; mistakes are coloured by their number, hits are not.

    Args:
        matrix: (C, C) int, rows are labels, columns are predictions.
    """
    figure = Figure(figsize=(WIDTH, 6.4))
    axes = figure.subplots()
    mistakes = np.array(matrix, dtype=float)
    np.fill_diagonal(mistakes, np.nan)
    most = max(1.0, float(np.nanmax(mistakes)))
    picture = axes.imshow(mistakes, cmap="Blues", vmin=0, vmax=most)
    axes.set_facecolor("#ececec")
    axes.grid(False)
    for (row, column), count in np.ndenumerate(matrix):
        hit = row == column
        color = "black" if hit or count < 0.6 * most else "white"
        if count:
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=9)
    name_classes(axes, class_names)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.set_title(title)
    figure.colorbar(picture, ax=axes, label="mistakes (grey diagonal: right)", shrink=0.85)
    return figure


@styled
def reliability_diagram(
    counts: Array, confidences: Array, accuracies: Array, *, error: float, title: str
) -> Figure:
    """Accuracy against confidence in equal bins of confidence, and how many images each bin holds.

    Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), figure 1.

    Args:
        counts: (B,) int, images in each bin.
        confidences, accuracies: (B,) means in [0, 1]; NaN where the bin is empty.
        error: expected calibration error, in [0, 1].
    """
    figure = Figure(figsize=(WIDTH, 5.6))
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
