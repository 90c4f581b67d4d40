"""Every picture of the project, as functions from arrays to a matplotlib ``Figure``.

They open no window, touch no global state of pyplot and know nothing of trainers or runs.  Colours are
those of Okabe and Ito, which people with any kind of colour blindness can tell apart
(https://jfly.uni-koeln.de/color/), cividis, and the red-blue map that ColorBrewer marks as safe.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
GREY = "#767676"
PAPER = "gray_r"  # as on paper: ink is dark
WIDTH = 8.0  # inches of every figure: 960 pixels
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "figure.constrained_layout.use": True,
}

Array = NDArray[Any]
Curve = tuple[Array, Array]  # epochs (E,) and values (E,)
Arguments = ParamSpec("Arguments")


def _styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    @functools.wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with rc_context(STYLE):
            figure = draw(*args, **kwargs)
            # The style must still hold while the layout is worked out, and once is enough: it takes
            # longer than the drawing.
            if (engine := figure.get_layout_engine()) is not None:
                engine.execute(figure)
                figure.set_layout_engine("none")
        return figure

    return wrapper


@_styled
def digits(images: Array, labels: Sequence[str], *, title: str, columns: int = 10) -> Figure:
    """A grid of images in reversed grey, each with its label.

    Args:
        images: (N, 28, 28) in [0, 255].
        labels: N texts.
    """
    figure, axes = _sheet_figure(len(images), columns, tile=0.8, lines=1, title=title)
    _draw_sheet(axes, images, labels, columns=columns, limits=(0, 255))
    return figure


@_styled
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
    _name_classes(panels[-1], class_names)
    panels[-1].set_xlabel("class")
    return figure


@_styled
def mean_images(means: Array, class_names: Sequence[str], *, title: str) -> Figure:
    """The mean image of each class.

    Args:
        means: (C, 28, 28) in [0, 255].
    """
    columns = math.ceil(len(means) / 2)
    figure, axes = _sheet_figure(len(means), columns, tile=1.5, lines=1, title=title)
    _draw_sheet(axes, means, class_names, columns=columns, limits=(0, 255))
    return figure


@_styled
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


@_styled
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
    _name_classes(axes, class_names)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.set_title(title)
    figure.colorbar(picture, ax=axes, label="mistakes (grey diagonal: right)", shrink=0.85)
    return figure


@_styled
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


@_styled
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
        f"{label} read as {prediction}\n{_percent(probability)}"
        for label, prediction, probability in zip(labels, predictions, probabilities, strict=True)
    ]
    figure, axes = _sheet_figure(len(images), columns, tile=1.0, lines=2, title=title)
    if len(images):
        _draw_sheet(axes, images, captions, columns=columns, limits=(0, 255))
    else:
        axes.text(0.5, 0.5, "no mistakes", ha="center", va="center", transform=axes.transAxes)
    return figure


@_styled
def first_layer(weights: Array, *, title: str, columns: int = 10) -> Figure:
    """What each unit of the first layer looks for: its weights as an image, blue +, red -.

    Args:
        weights: (units, 28, 28).
    """
    limit = float(np.quantile(np.abs(weights), 0.999)) or 1.0
    figure, axes = _sheet_figure(len(weights), columns, tile=0.8, lines=0, title=title)
    picture = _draw_sheet(axes, weights, None, columns=columns, limits=(-limit, limit), cmap="RdBu")
    figure.colorbar(picture, ax=axes, label="weight", shrink=0.5, aspect=30)
    return figure


@_styled
def curves(runs: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Loss and accuracy by epoch; a colour for each run, train dashed and validation solid.

    Args:
        runs: name of a run -> "train/loss", "val/loss", "train/acc", "val/acc" -> its curve.  A run
            may lack some of them.
    """
    figure = Figure(figsize=(WIDTH, 4.2))
    panels = figure.subplots(1, 2)
    handles = {}
    for axes, metric, name in zip(panels, ("loss", "acc"), ("loss", "accuracy"), strict=True):
        for (run, history), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
            for stage, dashes in (("train", "--"), ("val", "-")):
                if f"{stage}/{metric}" in history:
                    epochs, values = history[f"{stage}/{metric}"]
                    marker = "." if len(epochs) < 30 else ""
                    (line,) = axes.plot(epochs, values, dashes, color=color, marker=marker)
                    handles[f"{run} {stage}"] = line
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.set_title(f"{name} by epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_yscale("log")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure


@_styled
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
    right.bar_label(bars, labels=[_percent(p) for p in probabilities], fontsize=8, padding=2)
    right.set_yticks(range(len(class_names)), class_names)
    right.invert_yaxis()
    right.set_xlim(0, 1.25)
    right.set_xticks([0, 0.5, 1])
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_xlabel("probability")
    right.grid(axis="y", visible=False)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as ``<name>.png`` into a folder, which is made where it is missing.

    Raises:
        OSError: the folder or a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=STYLE["savefig.dpi"])
    return paths


def to_array(figure: Figure) -> NDArray[np.uint8]:
    """The figure's pixels.  -> (H, W, 3) uint8"""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[no-untyped-call]


def show(figures: Iterable[Figure]) -> None:
    """Open a window for each figure, and wait until all are closed.

    Raises:
        OSError: there is no display to open it on.
    """
    from matplotlib import pyplot  # the one place that wants a window system

    for figure in figures:
        window = pyplot.figure(figsize=figure.get_size_inches())
        if window.canvas.required_interactive_framework is None:
            pyplot.close(window)
            raise OSError(
                "show=true opens windows, and there is no display for them"
                f" (matplotlib's backend here is {pyplot.get_backend()}); the files are written"
            )
        manager = window.canvas.manager
        assert manager is not None
        manager.canvas.figure = figure
        figure.set_canvas(manager.canvas)
    pyplot.show()


def _sheet_figure(
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


def _draw_sheet(
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


def _name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    long = max(map(len, class_names)) > 2
    axes.set_xticks(
        range(len(class_names)), class_names, rotation=30 if long else 0, ha="right" if long else "center"
    )


def _percent(probability: float) -> str:
    """A probability that only says 100 % or 0 % where it is so to the last digit shown."""
    percent = 100 * float(probability)
    if 99.9 <= percent < 100:
        return "> 99.9 %"
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.1f} %"


# ---------------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------------

LIGHT_GREY = "#BBBBBB"
HIGHLIGHTED = 6  # learning curves that get a colour and a name of their own
HIGHLIGHTS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)


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
        axes.plot(distinct, medians, "o-", color=VERMILION, markersize=4, label="median")
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes)
    return figure


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


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
    """The distinct values: numbers by size, words as they first come."""
    distinct = list(dict.fromkeys(settings))
    return distinct if _numbers(distinct) is None else sorted(distinct, key=float)


def _wants_log(numbers: Array) -> bool:
    """Whether the values spread over a decade, or each is a like multiple of the one before."""
    distinct = np.unique(numbers)
    if distinct[0] <= 0 or len(distinct) < 2:
        return False
    ratios = distinct[1:] / distinct[:-1]
    return bool(distinct[-1] / distinct[0] >= 10 or (len(ratios) > 1 and np.allclose(ratios, ratios[0])))
