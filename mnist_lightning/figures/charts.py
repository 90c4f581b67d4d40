"""Draw curves by epoch, and the metric of a sweep's jobs against its settings."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mnist_lightning.figures.style import (
    BLUE,
    COLORS,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    WIDTH,
    Array,
    Picture,
    styled,
)
from mnist_lightning.rundir.curves import Curve

LIGHT_GREY = "#BBBBBB"
HIGHLIGHTED = 6  # number of learning curves that get their own colour and name
HIGHLIGHTS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)


@styled
def curves(runs: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Draw loss and metrics by epoch, with a colour for each run; train is dashed, validation solid.

    Args:
        runs: name of a run -> name of a metric ("train/loss", "val/acc", …) -> its curve.  Runs may lack
            metrics.
    """
    names = {key.partition("/")[2] for history in runs.values() for key in history}
    metrics = sorted(names, key=lambda name: (name != "loss", name)) or ["loss"]
    figure = Picture(figsize=(WIDTH, 4.2))
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    handles = {}
    for axes, metric in zip(panels, metrics, strict=True):
        for (run, history), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
            for stage, dashes in (("train", "--"), ("val", "-")):
                if f"{stage}/{metric}" in history:
                    epochs, values = history[f"{stage}/{metric}"]
                    marker = "." if len(epochs) < 30 else ""
                    (line,) = axes.plot(epochs, values, dashes, color=color, marker=marker)
                    handles[f"{run} {stage}"] = line
        name = "accuracy" if metric == "acc" else metric
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.set_title(f"{name} by epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if metric == "loss":
            axes.set_yscale("log")
        elif metric == "acc":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure


@styled
def parameter(name: str, settings: Sequence[str], metric: str, values: Sequence[float]) -> Figure:
    """Draw a metric against one swept parameter, with a dot for each job and a line through the medians.

    Args:
        name: key of the parameter.
        settings: the parameter's value in each of N jobs, as typed.
        metric: name of the metric.
        values: the metric of each job, N numbers.
    """
    figure = Picture(figsize=(6.4, 4))
    axes = figure.subplots()
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
        axes.plot(distinct, medians, "o-", color=VERMILION, markersize=4, label="median")
        axes.legend()
    axes.set_xlabel(name)
    axes.set_ylabel(_label(metric))
    return figure


@styled
def heat_map(
    row_name: str,
    rows: Sequence[str],
    column_name: str,
    columns: Sequence[str],
    metric: str,
    values: Sequence[float],
) -> Figure:
    """Draw a metric over two swept parameters as a coloured table.

    Args:
        row_name, column_name: keys of the parameters.
        rows, columns: the parameters' values in each of N settings, as typed.
        metric: name of the metric.
        values: mean of the metric over each setting's jobs, N numbers.
    """
    ys, xs = _ordered(rows), _ordered(columns)
    grid = np.full((len(ys), len(xs)), np.nan)
    scaled = _scale(metric, values)
    for row, column, value in zip(rows, columns, scaled, strict=True):
        grid[ys.index(row), xs.index(column)] = value
    figure = Picture(figsize=(2.5 + 0.9 * max(3, len(xs)), 1.5 + 0.6 * max(3, len(ys))))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="cividis", aspect="auto")
    axes.grid(False)
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


@styled
def learning_curves(metric: str, curves: Sequence[tuple[str, Sequence[int], Sequence[float]]]) -> Figure:
    """Draw the learning curves of many jobs, the best ``HIGHLIGHTED`` in colour.

    Args:
        metric: name of the metric.
        curves: label, epochs and values of each job, the best first.
    """
    figure = Picture(figsize=(8, 4.5))
    axes = figure.subplots()
    for rank, (label, epochs, values) in reversed(list(enumerate(curves))):
        chosen = rank < HIGHLIGHTED
        axes.plot(
            epochs,
            _scale(metric, values),
            color=HIGHLIGHTS[rank] if chosen else LIGHT_GREY,
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


@styled
def learning_rates(
    rates: Array, losses: Array, smooth: Array, suggestion: float | None, *, title: str
) -> Figure:
    """Draw the loss of a range test against the rising learning rate.

    Args:
        rates: learning rate of each step, (S,).
        losses: loss of each step's batch, (S,).
        smooth: the smoothed losses, (S,).
        suggestion: the suggested rate; None: there is none.
        title: the figure's title.
    """
    figure = Picture(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    shown = np.isfinite(losses)
    axes.plot(rates[shown], losses[shown], ".", color=LIGHT_GREY, markersize=4, label="loss of a batch")
    axes.plot(rates[shown], smooth[shown], color=BLUE, label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, linestyle="--", color=VERMILION, label=f"suggested: {suggestion:g}")
    low, high = float(np.nanmin(losses[shown])), float(np.max(losses[: max(10, len(losses) // 4)]))
    axes.set_ylim(max(0.0, low - 0.05 * (high - low)), high + 0.4 * (high - low))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title)
    axes.legend(loc="lower left")
    return figure


def _label(metric: str) -> str:
    words = metric.replace("val/", "validation ").replace("acc", "accuracy")
    return f"{words} (%)" if metric.endswith("acc") else words


def _scale(metric: str, values: Sequence[float]) -> Array:
    return np.asarray(values, float) * (100 if metric.endswith("acc") else 1)


def _numbers(settings: Sequence[str]) -> Array | None:
    try:
        return np.array([float(setting) for setting in settings])
    except ValueError:
        return None


def _ordered(settings: Sequence[str]) -> list[str]:
    """Return the distinct values, numbers by size and words in the order of their first use."""
    distinct = list(dict.fromkeys(settings))
    return distinct if _numbers(distinct) is None else sorted(distinct, key=float)


def _wants_log(numbers: Array) -> bool:
    """Whether the values span a factor of 10, or each is the same multiple of the previous one."""
    distinct = np.unique(numbers)
    if distinct[0] <= 0 or len(distinct) < 2:
        return False
    ratios = distinct[1:] / distinct[:-1]
    return bool(distinct[-1] / distinct[0] >= 10 or (len(ratios) > 1 and np.allclose(ratios, ratios[0])))
