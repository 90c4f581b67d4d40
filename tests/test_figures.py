import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from mnist_lightning import figures

NAMES = [str(digit) for digit in range(10)]
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (60, 28, 28), dtype=np.uint8)


def texts(figure: Figure) -> list[str]:
    """Return every visible text of a figure."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def sheet(figure: Figure) -> np.ndarray:
    """Return the image of the first axes, with NaN between tiles."""
    return np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))


def test_digits_shows_every_image_with_its_label() -> None:
    labels = [str(index % 10) for index in range(60)]
    figure = figures.images(IMAGES, labels, title="sixty")
    assert [text.get_text() for text in figure.axes[0].texts] == labels
    pixels = sheet(figure)
    assert np.isfinite(pixels).sum() == 60 * 28 * 28
    assert np.array_equal(np.sort(pixels[np.isfinite(pixels)]), np.sort(IMAGES.ravel()))
    assert figure.axes[0].images[0].get_cmap().name == "gray_r"
    # the 13th image is the third of the second row
    tiles = np.argwhere(np.isfinite(pixels))
    height, width = pixels.shape[0] // 6, 28 + 3
    assert pixels.shape == (6 * height, 10 * width)
    top = tiles[:, 0].min()
    assert top == height - 31, "captions have room above each image"
    assert np.array_equal(pixels[height + top : height + top + 28, 2 * width : 2 * width + 28], IMAGES[12])


def test_class_counts_draws_a_bar_for_each_class_and_split() -> None:
    counts = {"train": np.arange(10) * 100, "val": np.arange(10)}
    figure = figures.class_counts(counts, NAMES)
    assert [[bar.get_height() for bar in axes.patches] for axes in figure.axes] == [
        list(range(0, 1000, 100)),
        list(range(10)),
    ]
    assert {"train: 4,500 images", "val: 45 images"} <= set(texts(figure))


def test_mean_images_are_named() -> None:
    figure = figures.mean_images(IMAGES[:10].astype(float), NAMES, title="means")
    assert [text.get_text() for text in figure.axes[0].texts] == NAMES
    assert np.nanmax(sheet(figure)) == IMAGES[:10].max()


def test_pixel_histogram_has_a_bar_for_each_grey() -> None:
    counts = np.arange(1, 257)
    figure = figures.pixel_histogram(counts[None], mean=0.13, std=0.31, title="mnist")
    assert [bar.get_height() for bar in figure.axes[0].patches] == counts.tolist()
    assert figure.axes[0].get_yscale() == "log"
    assert "mean 0.1300, std 0.3100" in figure.axes[0].get_title(loc="left")


def test_confusion_matrix_writes_every_count_and_colours_only_mistakes() -> None:
    matrix = np.diag(np.full(10, 1_000))
    matrix[4, 9] = 12
    figure = figures.confusion_matrix(matrix, NAMES, title="test")
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(digit, digit): "1,000" for digit in range(10)} | {(9, 4): "12"}
    colours = sheet(figure)
    assert np.isnan(np.diag(colours)).all()
    assert colours[4, 9] == 12
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "label")


def test_reliability_diagram_leaves_empty_bins_empty() -> None:
    counts = np.array([0, 0, 5, 20])
    confidences = np.array([np.nan, np.nan, 0.6, 0.9])
    accuracies = np.array([np.nan, np.nan, 0.5, 0.95])
    figure = figures.reliability_diagram(counts, confidences, accuracies, error=0.06, title="test")
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == [0, 0, 0.5, 0.95]
    assert [bar.get_height() for bar in lower.patches] == [0, 0, 5, 20]
    assert "6.00 % (4 bins)" in upper.get_title(loc="left")


def test_mistakes_tell_label_prediction_and_probability() -> None:
    figure = figures.mistakes(IMAGES[:2], ["4", "7"], ["9", "1"], np.array([0.987, 0.9999]), title="two")
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "4 read as 9\n98.7 %",
        "7 read as 1\n> 99.9 %",
    ]


def test_mistakes_of_a_faultless_net() -> None:
    figure = figures.mistakes(IMAGES[:0], [], [], np.array([]), title="none")
    assert "no mistakes" in texts(figure)


def test_first_layer_is_centred_on_zero() -> None:
    weights = RANDOM.normal(size=(32, 28, 28))
    figure = figures.first_layer(weights, title="first layer")
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high < 0
    assert np.isfinite(sheet(figure)).sum() == 32 * 28 * 28


def test_curves_tell_runs_and_stages_apart() -> None:
    history = {
        f"{stage}/{metric}": ([1, 2, 3], RANDOM.random(3).tolist())
        for stage in ("train", "val")
        for metric in ("loss", "acc")
    }
    figure = figures.curves({"A": history, "B": {"val/loss": history["val/loss"]}})
    loss, accuracy = figure.axes
    assert len(loss.lines) == 3
    assert len(accuracy.lines) == 2
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    assert loss.lines[0].get_linestyle() != loss.lines[1].get_linestyle()
    assert np.array_equal(loss.lines[1].get_ydata(), history["val/loss"][1])
    assert [text.get_text() for text in figure.legends[0].texts] == ["A train", "A val", "B val"]


def test_prediction_shows_input_and_ten_bars() -> None:
    probabilities = np.full(10, 0.05)
    probabilities[7] = 0.55
    given = RANDOM.integers(0, 256, (50, 80, 3), dtype=np.uint8)
    figure = figures.prediction(given, IMAGES[0], probabilities, NAMES, title="a.png: 7")
    left, middle, right = figure.axes
    assert np.array_equal(left.images[0].get_array(), given)
    assert np.array_equal(middle.images[0].get_array(), IMAGES[0])
    assert [bar.get_width() for bar in right.patches] == probabilities.tolist()
    assert len({bar.get_facecolor() for bar in right.patches}) == 2  # the winner stands out


def test_saved_figures_are_readable_pngs(tmp_path: Path) -> None:
    before = dict(rcParams)
    figure = figures.images(IMAGES, NAMES * 6, title="sixty")
    (path,) = figures.save({"digits": figure}, tmp_path / "new" / "folder")
    with Image.open(path) as picture:
        assert picture.size[0] == 960
        assert np.asarray(picture.convert("L")).std() > 10  # not blank
    assert figures.to_array(figure).shape[1:] == (960, 3)
    assert dict(rcParams) == before  # the user's own style is unchanged


def test_show_without_a_display_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    figure = figures.images(IMAGES[:10], NAMES, title="ten")
    with pytest.raises(OSError, match="no display"):
        figures.show([figure])


CLASSES = {
    2: ["a cat", "no cat"],
    26: [f"letter {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"],
    100: [f"{'a name of thirty letters, nr. ':.<27}{number:03}" for number in range(100)],
}


def overlaps(texts: list[Text]) -> list[tuple[str, str]]:
    """Return pairs of neighbouring texts that overlap by more than a letter's edge."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [
        (one, other)
        for (one, first), (other, second) in itertools.pairwise(boxes)
        if min(first.x1, second.x1) - max(first.x0, second.x0) > 1
        and min(first.y1, second.y1) - max(first.y0, second.y0) > 1
    ]


@pytest.mark.parametrize(
    ("count", "shape"),
    [(2, (20, 40)), (26, (16, 16, 3)), pytest.param(100, (12, 12), marks=pytest.mark.slow)],
    ids=str,
)
def test_any_number_of_classes_of_any_shape_stays_legible(count: int, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(1)
    names = CLASSES[count]
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    probabilities = generator.dirichlet(np.ones(count))
    given = generator.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    drawings = {
        "images": figures.images(images, names, title="images"),
        "mean images": figures.mean_images(images.astype(float), names, title="means"),
        "mistakes": figures.mistakes(images, names, names[::-1], probabilities, title="mistakes"),
        "counts": figures.class_counts({"train": np.full(count, 1_000), "val": np.full(count, 99)}, names),
        "confusion": figures.confusion_matrix(
            generator.integers(0, 400, (count, count)), names, title="confusion"
        ),
        "prediction": figures.prediction(given, images[0], probabilities, names, title="one picture"),
    }
    for name, figure in drawings.items():
        pixels = figures.to_array(figure)
        assert pixels.shape[1] <= 16 * 120
        for axes in figure.axes:
            assert not overlaps(list(axes.texts)), name
            for axis in (axes.xaxis, axes.yaxis):
                assert not overlaps(axis.get_ticklabels()), name
    bars = drawings["prediction"].axes[2]
    assert len(bars.patches) == min(count, 10)
    best = names[int(probabilities.argmax())]
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert any(label[:5] == best[:5] and label[-3:] == best[-3:] for label in labels)
    (sheet_image,) = drawings["images"].axes[0].images
    if len(shape) == 3:
        shown = np.asarray(sheet_image.get_array())
        assert shown.shape[2] == 3, "colour pictures in colour"
        assert shown.max() <= 1


def test_colour_weights_and_colour_pixels_are_drawn_in_colour() -> None:
    weights = np.zeros((4, 5, 6, 3))
    weights[0, 2, 3, 0] = 1.0
    figure = figures.first_layer(weights, title="red")
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert shown.shape[2] == 3
    assert (shown[..., 0] > 0.99).any()
    counts = np.arange(1, 769).reshape(3, 256)
    figure = figures.pixel_histogram(counts, mean=0.13, std=0.31, title="cifar10")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["red", "green", "blue"]
    for line, values in zip(figure.axes[0].lines, counts, strict=True):
        assert list(line.get_ydata()) == values.tolist()


def test_a_dollar_is_a_dollar() -> None:
    """A "$" in names and titles starts no formula; powers of ten at the axes are still formulas."""
    names = ["$x", "$y$", r"\$z", "100 %"]
    figure = figures.confusion_matrix(np.eye(4, dtype=int), names, title="from $a$ to $b")
    figures.to_array(figure)  # a broken formula would raise an error
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [name.replace("$", r"\$") for name in names]
    figure = figures.pixel_histogram(np.arange(1, 257)[None], mean=0.1, std=0.3, title="$")
    figures.to_array(figure)
    assert any("mathdefault" in label.get_text() for label in figure.axes[0].get_yticklabels())
