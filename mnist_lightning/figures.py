"""Every picture, as functions from numbers to a matplotlib ``Figure``; none opens a window."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# ---------------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"  # Okabe and Ito's palette, safe for colour-blind eyes
HIGHLIGHTED = 6  # learning curves that get a colour and a name of their own
HIGHLIGHTS = (ORANGE, BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_parameter(name: str, settings: Sequence[str], metric: str, values: Sequence[float]) -> Figure:
    """A metric against one swept parameter: every job a dot, the median of each value a line.

    Args:
        settings: (N,) the parameter's value in each job, as typed.
        values: (N,) the metric.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    numbers = _numbers(settings)
    if numbers is None:
        ticks = _ordered(settings)
        positions = np.array([ticks.index(setting) for setting in settings], float)
        many = len(ticks) > 8 or max(map(len, ticks)) > 12
        rotation, align = (30, "right") if many else (0, "center")
        axes.set_xticks(range(len(ticks)), ticks, rotation=rotation, ha=align)
        axes.margins(x=0.1)
    else:
        positions = numbers
        if _wants_log(numbers):
            axes.set_xscale("log")
        distinct = np.unique(numbers)
        if len(distinct) <= 8:
            axes.set_xticks(distinct, [f"{number:g}" for number in distinct])
            axes.set_xticks([], minor=True)
    scaled = _scale(metric, values)
    axes.plot(positions, scaled, "o", color=BLUE, alpha=0.6, markeredgewidth=0, label="a job")
    distinct = np.unique(positions)
    if len(distinct) < len(positions):
        medians = [np.median(scaled[positions == position]) for position in distinct]
        axes.plot(distinct, medians, "o-", color=ORANGE, markersize=4, label="median")
        axes.legend()
    axes.set_xlabel(name)
    axes.set_ylabel(_label(metric))
    _finish(axes)
    return figure


def draw_heat_map(
    row_name: str,
    rows: Sequence[str],
    column_name: str,
    columns: Sequence[str],
    metric: str,
    values: Sequence[float],
) -> Figure:
    """A metric over two swept parameters.

    Args:
        rows, columns: (N,) the parameters' values in each setting, as typed.
        values: (N,) the metric's mean over the setting's jobs.
    """
    ys, xs = _ordered(rows), _ordered(columns)
    grid = np.full((len(ys), len(xs)), np.nan)
    scaled = _scale(metric, values)
    for row, column, value in zip(rows, columns, scaled, strict=True):
        grid[ys.index(row), xs.index(column)] = value
    figure = Figure(figsize=(2.5 + 0.9 * max(3, len(xs)), 1.5 + 0.6 * max(3, len(ys))), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(xs)), xs, rotation=30 if max(map(len, xs)) > 8 else 0)
    axes.set_yticks(range(len(ys)), ys)
    axes.set_xlabel(column_name)
    axes.set_ylabel(row_name)
    low, high = np.nanmin(grid), np.nanmax(grid)
    for (y, x), value in np.ndenumerate(grid):
        dark = value < (low + high) / 2
        text = "–" if np.isnan(value) else f"{value:.2f}" if metric.endswith("acc") else f"{value:.4f}"
        axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
    figure.colorbar(image, label=_label(metric))
    return figure


def draw_learning_curves(metric: str, curves: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> Figure:
    """The learning curves of many jobs in one picture, the best few in colour.

    Args:
        curves: (label, epochs, values of the metric) of each job, the best first.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for rank, (label, epochs, values) in reversed(list(enumerate(curves))):
        chosen = rank < HIGHLIGHTED
        axes.plot(
            epochs,
            _scale(metric, values),
            color=HIGHLIGHTS[rank] if chosen else GREY,
            linewidth=1.5 if chosen else 0.6,
            marker="o" if len(epochs) < 15 and chosen else None,
            markersize=4,
            label=label if chosen else None,
        )
    handles, labels = axes.get_legend_handles_labels()
    more = f", {len(curves) - HIGHLIGHTED} more in grey" if len(curves) > HIGHLIGHTED else ""
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside lower center",
        ncols=1 if max(map(len, labels)) > 40 else 2,
        fontsize="small",
        title=f"best first{more}",
    )
    axes.set_xlabel("epoch")
    axes.set_ylabel(_label(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)
    return figure


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _label(metric: str) -> str:
    words = metric.replace("val/", "validation ").replace("acc", "accuracy")
    return f"{words} (%)" if metric.endswith("acc") else words


def _scale(metric: str, values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, float) * (100 if metric.endswith("acc") else 1)


def _numbers(settings: Sequence[str]) -> np.ndarray | None:
    try:
        return np.array([float(setting) for setting in settings])
    except ValueError:
        return None


def _ordered(settings: Sequence[str]) -> list[str]:
    """The distinct values: numbers by size, words as they first come."""
    distinct = list(dict.fromkeys(settings))
    return distinct if _numbers(distinct) is None else sorted(distinct, key=float)


def _wants_log(numbers: np.ndarray) -> bool:
    """Whether the values spread over a decade, or each is a like multiple of the one before."""
    distinct = np.unique(numbers)
    if distinct[0] <= 0 or len(distinct) < 2:
        return False
    ratios = distinct[1:] / distinct[:-1]
    return bool(distinct[-1] / distinct[0] >= 10 or (len(ratios) > 1 and np.allclose(ratios, ratios[0])))
