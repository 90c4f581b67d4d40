"""Draw the film of a training as an animated picture."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mnist_lightning.figures.style import BLUE, PAPER, VERMILION, Array, percent, shorten, styled, to_array

COLUMNS = 6  # units in a row
NUM_IMAGES, IMAGE_COLUMNS = 12, 3
GAP = 2  # pixels between two images


def film_frames(film: Any, class_names: Sequence[str], *, title: str) -> Iterator[Array]:
    """Draw each moment of a film: weights of some units, answers for some images, and the losses.

    Args:
        film: a ``rundir.film.Film``.
        class_names: name of each class.
        title: beginning of each picture's title.

    Returns:
        Pictures of one size, (H, W, 3) uint8 each.
    """
    figure = _draw_end(film)
    left, middle, right = figure.axes
    dots = right.lines[-len(_losses(film)) :]
    for moment, step in enumerate(film.steps):
        left.images[0].set_data(_tile(film.weights[moment].astype(float) - 128, COLUMNS))
        for text, shares, label in zip(middle.texts, film.probabilities[moment], film.labels, strict=False):
            best = int(shares.argmax())
            text.set_text(shorten(class_names[best], 8).replace("$", r"\$"))
            text.set_color(BLUE if best == label else VERMILION)
        for dot, (_, _, losses) in zip(dots, _losses(film), strict=True):
            dot.set_data([film.epochs[moment]], [losses[moment]])
        accuracy = percent(float(film.train_acc[moment]))
        told = f"{title}, step {step:,}: {accuracy} of some training images right"
        figure.suptitle(told.replace("$", r"\$"), x=0.01, ha="left", fontsize=10)
        yield to_array(figure)


@styled
def _draw_end(film: Any) -> Figure:
    """Draw the last moment, without answers.

    Other moments change only the image of the first axes, the texts of the second and the last lines of the
    third.
    """
    figure = Figure(figsize=(7.2, 3.7), dpi=100)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.35, 0.75, 1.1))
    weights = _tile(film.weights[-1].astype(float) - 128, COLUMNS)
    left.imshow(weights, cmap="RdBu", vmin=-127, vmax=127)
    left.set_title("weights of the first layer", fontsize=8)
    shown = film.images[:NUM_IMAGES].astype(float)
    middle.imshow(_tile(shown, IMAGE_COLUMNS), cmap=PAPER, vmin=0, vmax=255)
    middle.set_title("answers", fontsize=8)
    height, width = shown.shape[1:]
    for index in range(len(shown)):
        place = index % IMAGE_COLUMNS * (width + GAP), index // IMAGE_COLUMNS * (height + GAP)
        middle.text(*place, "", fontsize=9, va="top", weight="bold")
    for axes in (left, middle):
        axes.set_axis_off()
    for name, color, losses in _losses(film):
        right.plot(film.epochs, losses, color=color, linewidth=1.2, label=name)
    for _, color, losses in _losses(film):
        right.plot(film.epochs[-1:], losses[-1:], "o", color=color, markersize=6)
    right.set_yscale("log")
    right.set_xlabel("epoch", fontsize=8)
    right.set_title("loss of 100 images each", fontsize=8)
    right.tick_params(labelsize=7)
    right.legend(fontsize=8, loc="upper right")
    figure.suptitle("step", x=0.01, ha="left", fontsize=10)
    return figure


def _losses(film: Any) -> list[tuple[str, str, Array]]:
    """Return name, colour and values of each curve that the film has."""
    curves = [("train", BLUE, film.train_loss), ("val", VERMILION, film.val_loss)]
    return [curve for curve in curves if np.isfinite(curve[2]).all()]


def _tile(images: Array, columns: int) -> Array:
    """Put images side by side into one array, with NaN in the gaps.  (N, H, W) -> (H', W')"""
    count, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP), columns * (width + GAP)), np.nan)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet
