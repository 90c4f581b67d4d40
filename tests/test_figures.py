from pathlib import Path

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from mnist_lightning import figures

NAMES = [str(digit) for digit in range(10)]
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (60, 28, 28), dtype=np.uint8)


def texts(figure: Figure) -> list[str]:
    """Every visible text of a figure."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def sheet(figure: Figure) -> np.ndarray:
    """The image of the first axes; NaN between tiles."""
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
    epochs = np.arange(3)
    history = {
        f"{stage}/{metric}": (epochs, RANDOM.random(3))
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
    assert dict(rcParams) == before  # the user's own style is left alone


def test_show_without_a_display_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    figure = figures.images(IMAGES[:10], NAMES, title="ten")
    with pytest.raises(OSError, match="no display"):
        figures.show([figure])
