"""A training as an animated picture."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mnist_lightning.figures.style import BLUE, PAPER, VERMILION, Array, percent, shorten, styled, to_array

COLUMNS = 6  # of the units


def film_frames(film: Any, class_names: Sequence[str], *, title: str) -> Iterator[Array]:
    """Each moment of a film as a picture: weights of some units, some images' answers, and the losses.

    Args:
        film: a ``rundir.film.Film``.

    Returns:
        (H, W, 3) uint8 each.
    """
    for moment in range(len(film.steps)):
        yield to_array(film_moment(film, moment, class_names, title=title))


@styled
def film_moment(film: Any, moment: int, class_names: Sequence[str], *, title: str) -> Figure:
    """One moment of a film; see ``film_frames``."""
    figure = Figure(figsize=(7.2, 3.7), dpi=100)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.35, 0.75, 1.1))
    left.imshow(_tile(film.weights[moment].astype(float) - 128, np.nan), cmap="RdBu", vmin=-127, vmax=127)
    left.set_title("weights of the first layer", fontsize=8)
    shown = film.images[:12]
    middle.imshow(_tile(shown.astype(float), np.nan, columns=3), cmap=PAPER, vmin=0, vmax=255)
    middle.set_title("answers", fontsize=8)
    height, width = shown.shape[1:]
    for index, shares in enumerate(film.probabilities[moment][: len(shown)]):
        best = int(shares.argmax())
        color = BLUE if best == film.labels[index] else VERMILION
        place = index % 3 * (width + 2), index // 3 * (height + 2)
        middle.text(*place, shorten(class_names[best], 8), color=color, fontsize=9, va="top", weight="bold")
    for axes in (left, middle):
        axes.set_axis_off()
    for losses, color, name in ((film.train_loss, BLUE, "train"), (film.val_loss, VERMILION, "val")):
        if np.isfinite(losses).all():
            right.plot(film.epochs, losses, color=color, linewidth=1, alpha=0.35)
            right.plot(film.epochs[: moment + 1], losses[: moment + 1], color=color, label=name)
            right.plot(film.epochs[moment], losses[moment], "o", color=color, markersize=5)
    right.set_yscale("log")
    right.set_xlabel("epoch", fontsize=8)
    right.set_title("loss of 100 images each", fontsize=8)
    right.tick_params(labelsize=7)
    right.legend(fontsize=8, loc="upper right")
    accuracy = percent(float(film.train_acc[moment]))
    told = f"step {film.steps[moment]:,}: {accuracy} of the training images right"
    figure.suptitle(f"{title}, {told}", x=0.01, ha="left", fontsize=10)
    return figure


def _tile(images: Array, gap: float, *, columns: int = COLUMNS) -> Array:
    """(N, H, W) -> one image of them side by side"""
    count, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2), columns * (width + 2)), gap)
    for index, image in enumerate(images):
        top, start = index // columns * (height + 2), index % columns * (width + 2)
        sheet[top : top + height, start : start + width] = image
    return sheet
