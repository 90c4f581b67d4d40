"""Draw the explanation of a net's answer for one image."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from mnist_lightning.figures.style import BLUE, GREY, PAPER, VERMILION, WIDTH, Array, shorten, styled

LINE = 105  # most characters in a line of a title


@styled
def explanation(
    seen: Array,
    maps: Mapping[str, Array],
    *,
    change: tuple[Array, str] | None,
    units: tuple[Array, Sequence[str], str] | None,
    nearest: tuple[Array, Sequence[str]] | None,
    title: str,
    note: str,
) -> Figure:
    """Draw an explanation.

    It shows the net's input, the contribution of each pixel, the smallest change that turns the answer, the
    units that decided, and the nearest training images.

    Args:
        seen: the net's input, (H, W) or (H, W, 3) in [0, 255].
        maps: caption -> contribution of each pixel, (H, W).  Positive ones are blue, negative ones red, with
            one scale for all maps.
        change: the changed image, in the form of ``seen``, and a caption; None: none was found.
        units: weights, (U, H, W) or (U, H, W, 3), their captions, and a line above them; None: no units.
        nearest: images, (N, H, W) or (N, H, W, 3) in [0, 255], and their captions; None: no images.
        title: the figure's title.
        note: what the maps show, in small letters.
    """
    rows = 1 + (units is not None) + (nearest is not None)
    figure = Figure(figsize=(WIDTH, 0.75 + 2.15 + 1.75 * (rows - 1)))
    parts = figure.subfigures(rows, 1, height_ratios=[2.15 + 0.3] + [1.75] * (rows - 1), squeeze=False)[:, 0]
    _draw_maps(parts[0], seen, maps, change, note)
    if units is not None:
        weights, captions, line = units
        limit = float(np.abs(weights).max()) or 1.0
        parts[1].suptitle(line, x=0.01, ha="left", fontsize=9)
        for axes, image, caption in zip(_panels(parts[1], len(weights)), weights, captions, strict=True):
            if image.ndim == 2:
                axes.imshow(image, cmap="RdBu", vmin=-limit, vmax=limit)
            else:
                axes.imshow(np.clip(0.5 + image / (2 * limit), 0, 1))
            axes.set_title(caption, fontsize=8, loc="center")
    if nearest is not None:
        images, captions = nearest
        told = "nearest training images, to the last hidden layer"
        parts[-1].suptitle(told, x=0.01, ha="left", fontsize=9)
        for axes, image, caption in zip(_panels(parts[-1], len(images)), images, captions, strict=True):
            axes.imshow(image, cmap=PAPER, vmin=0, vmax=255)
            axes.set_title(shorten(caption, 20), fontsize=8, loc="center")
    figure.suptitle(textwrap.fill(title, LINE), x=0.01, ha="left", fontsize=10)
    return figure


def _draw_maps(
    figure: SubFigure,
    seen: Array,
    maps: Mapping[str, Array],
    change: tuple[Array, str] | None,
    note: str,
) -> None:
    panels = _panels(figure, 2 + len(maps))
    panels[0].imshow(seen, cmap=PAPER, vmin=0, vmax=255)
    panels[0].set_title("what the net sees", fontsize=8, loc="center")
    limit = max(float(np.abs(values).max()) for values in maps.values()) or 1.0
    for axes, (caption, values) in zip(panels[1:], maps.items(), strict=False):
        axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
        grey = seen if seen.ndim == 2 else seen.mean(axis=2)
        axes.contour(grey, levels=[64], colors=GREY, linewidths=0.6)
        axes.set_title(caption, fontsize=8, loc="center")
    last = panels[-1]
    if change is None:
        last.set_axis_off()
        last.text(0.5, 0.5, "no small change\nturns the answer", ha="center", va="center", fontsize=8)
    else:
        image, caption = change
        last.imshow(image, cmap=PAPER, vmin=0, vmax=255)
        difference = image - seen if image.ndim == 2 else (image - seen).mean(axis=2)
        for color, where in ((BLUE, difference > 0.5), (VERMILION, difference < -0.5)):
            y, x = np.nonzero(where)
            last.scatter(x, y, s=10, marker="s", facecolors="none", edgecolors=color, linewidths=1.2)
        last.set_title(caption, fontsize=8, loc="center")
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=GREY)


def _panels(figure: SubFigure, count: int) -> list[Axes]:
    panels: list[Axes] = list(figure.subplots(1, max(count, 4), squeeze=False)[0])
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set(visible=True, color=GREY)
    for axes in panels[count:]:
        axes.set_axis_off()
    return panels[:count]
