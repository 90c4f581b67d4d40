"""Define the style of all figures, and save or show them.

The colours can be told apart with any kind of colour blindness: those of Okabe and Ito
(https://jfly.uni-koeln.de/color/), the colour map cividis, and ColorBrewer's red-blue map.
"""

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.outside import SOFTWARE, as_text

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
GREY = "#767676"
PAPER = "gray_r"  # colour map with dark ink on white paper
WIDTH = 8.0  # width of every figure in inches: 960 pixels
LONGEST = 24  # most characters of a class's name on an axis
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
Arguments = ParamSpec("Arguments")


class Picture(Figure):
    """A figure that a notebook shows if it is a cell's last line, without ``%matplotlib``."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=STYLE["savefig.dpi"])
        return file.getvalue()

    def __repr__(self) -> str:
        width, height = (round(inches * STYLE["savefig.dpi"]) for inches in self.get_size_inches())
        return f"a figure of {width} x {height} pixels: .savefig('figure.png') writes it"


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Make a function draw in this project's style, and show texts literally: a $ starts no formula."""

    @functools.wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with rc_context(STYLE):
            figure = draw(*escape(args), **escape(kwargs))
            # Compute the layout now, while the style holds, and only once: it takes longer than drawing.
            if (engine := figure.get_layout_engine()) is not None:
                engine.execute(figure)
                figure.set_layout_engine("none")
        return figure

    return wrapper


def escape(value: Any) -> Any:
    """Escape each $ and each control character in all texts of a value, nested ones included."""
    if isinstance(value, str):
        return as_text(value, lines=True).replace("$", r"\$")
    if isinstance(value, Mapping):
        return {escape(key): escape(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(escape(inner) for inner in value)
    return value


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as ``<name>.png`` into a folder, and create the folder if it is missing.

    Args:
        figures: figures by name.
        folder: the folder.

    Returns:
        The files.

    Raises:
        OSError: the folder or a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=STYLE["savefig.dpi"], metadata={"Software": SOFTWARE})
        write_atomic(path, content.getvalue())
    return paths


def save_animation(frames: Iterable[Array], path: Path, *, milliseconds: int = 120) -> None:
    """Write pictures of one size as an animated GIF that repeats after a pause.

    Args:
        frames: (H, W, 3) uint8 each.
        path: the file.
        milliseconds: duration of a frame; the last one lasts 20 times as long.

    Raises:
        OSError: the file can't be written.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    palette = pictures[-1].quantize(96, dither=Image.Dither.NONE)
    reduced = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [milliseconds] * (len(reduced) - 1) + [20 * milliseconds]
    content = io.BytesIO()
    reduced[0].save(
        content, "GIF", save_all=True, append_images=reduced[1:], duration=durations, loop=0, optimize=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())


def to_array(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure.  -> (H, W, 3) uint8"""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[no-untyped-call]


def redraw(
    figure: Figure, axes: Axes, changes: Iterable[Callable[[], object]]
) -> Iterator[NDArray[np.uint8]]:
    """Render a figure after each of several changes to images, texts and title of one of its axes.

    Everything else is drawn only once, because it takes ten times as long.

    Args:
        figure: the figure.
        axes: the axes whose contents change.
        changes: functions that change them, called in this order.

    Returns:
        (H, W, 3) uint8 each.
    """
    canvas = FigureCanvasAgg(figure)
    title = retitle(axes, axes.get_title(loc="left"))
    for artist in (*axes.images, *axes.texts, title):
        artist.set_visible(False)
    canvas.draw()  # type: ignore[no-untyped-call]
    rest = canvas.copy_from_bbox(figure.bbox)  # type: ignore[no-untyped-call]
    for change in changes:
        change()
        canvas.restore_region(rest)  # type: ignore[no-untyped-call]
        edges = axes.spines.values() if axes.axison else ()
        for artist in (*axes.images, *axes.texts, title):
            artist.set_visible(True)
        for artist in (*axes.images, *edges, *axes.texts, title):
            axes.draw_artist(artist)
        yield np.asarray(canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[no-untyped-call]


def retitle(axes: Axes, title: str) -> Text:
    """Set the title of axes, in this project's style."""
    with rc_context(STYLE):
        return axes.set_title(title)


def show(figures: Iterable[Figure]) -> None:
    """Open a window for each figure, and wait until all are closed.

    Raises:
        OSError: there is no display.
    """
    from matplotlib import pyplot  # imported only here, because it needs a window system

    for figure in figures:
        window = pyplot.figure(figsize=figure.get_size_inches())
        if window.canvas.required_interactive_framework is None:
            pyplot.close(window)
            raise OSError(
                "show=true opens windows, and there is no display for them"
                f" (matplotlib's backend is {pyplot.get_backend()}); the files have been written"
            )
        manager = window.canvas.manager
        assert manager is not None
        manager.canvas.figure = figure
        figure.set_canvas(manager.canvas)
    pyplot.show()


def name_classes(axes: Axes, class_names: Sequence[str], *, width: float = WIDTH) -> None:
    """Label the x axis with the names of the classes, small or rotated if they need it.

    Args:
        axes: the axes, with class k at x = k.
        class_names: name of each class.
        width: width of the figure, in inches.
    """
    names = [shorten(name, LONGEST) for name in class_names]
    longest, count = max(map(len, names)), len(names)
    size = font_size(count, width)
    if longest > 2 and (count > 12 or longest > 14):
        axes.set_xticks(range(count), names, rotation=90, fontsize=size)
    elif longest > 2:
        axes.set_xticks(range(count), names, rotation=30, ha="right", fontsize=size)
    else:
        axes.set_xticks(range(count), names, fontsize=size)


def font_size(count: int, inches: float) -> float:
    """Return the font size, in points, for so many texts side by side on a figure of this width."""
    return max(3.5, min(10.0, 0.55 * 72 * inches / count))


def shorten(text: str, most: int) -> str:
    """Shorten a text to at most this many characters, with "…" in place of its middle."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: max(1, most - 1 - tail)]}…{text[len(text) - tail :]}"


def percent(probability: float) -> str:
    """Format a probability in percent; only exactly 1 and 0 become "100.0 %" and "0.0 %"."""
    percent = 100 * float(probability)
    if 99.9 <= percent < 100:
        return "> 99.9 %"
    if 0 < percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.1f} %"
