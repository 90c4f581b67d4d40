"""Ink of any size becomes a digit of MNIST's size, stroke width and place."""

import math

import numpy as np
import pytest

from mnist_lightning.images.normalize import NoDigit, center, dilate, fit, normalize, stroke_width


def draw_line(height: int, width: int, half: float, *, lean: float = 0.0) -> np.ndarray:
    """Draw an anti-aliased stroke from near the top to near the bottom: (H, W) in [0, 1].

    Args:
        half: half of the stroke's width in pixels.
        lean: the stroke's shift to the right in pixels for each row.
    """
    y, x = np.mgrid[:height, :width]
    away = np.abs(x - width / 2 - lean * (y - height / 2)) / math.hypot(1, lean)
    inside = np.clip(0.9 * height / 2 - np.abs(y - height / 2) + 0.5, 0, 1)
    return np.clip(half - away + 0.5, 0, 1) * inside


def test_fit_keeps_the_aspect() -> None:
    assert fit(np.ones((200, 50)), 20).shape == (20, 5)
    assert fit(np.ones((3, 7)), 20).shape == (9, 20)
    assert fit(np.ones((1, 900)), 20).shape == (1, 20)


def test_fit_averages_areas_and_interpolates_between_centres() -> None:
    """The values were worked out by hand, so that a port to another language can be checked with them."""
    np.testing.assert_allclose(fit(np.array([[1.0, 2.0, 3.0]]), 2), [[4 / 3, 8 / 3]])
    np.testing.assert_allclose(fit(np.array([[0.0, 1.0]]), 4), [[0, 0.25, 0.75, 1], [0, 0.25, 0.75, 1]])
    image = np.random.default_rng(0).random((60, 60))
    blocks = image.reshape(20, 3, 20, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(fit(image, 20), blocks)
    np.testing.assert_allclose(fit(blocks, 20), blocks)


def test_stroke_width_is_that_of_a_line_however_it_leans() -> None:
    for half in (2.0, 4.0):
        for lean in (0.0, 0.4, 1.0, -1.0):
            line = draw_line(160, 240, half, lean=lean)
            assert stroke_width(line) == pytest.approx(2 * half, rel=0.06)
            assert stroke_width(0.3 * line) == pytest.approx(stroke_width(line)), "however faint"


def test_dilate_is_the_maximum_over_a_disc() -> None:
    point = np.zeros((3, 3))
    point[1, 1] = 0.7
    grown = dilate(point, 2.3)
    assert grown.shape == (9, 9)
    y, x = np.mgrid[-4:5, -4:5]
    np.testing.assert_array_equal(grown, 0.7 * (x**2 + y**2 <= 2.3**2))


@pytest.mark.parametrize("side", [24, 60, 400])
@pytest.mark.parametrize("half", [0.5, 1.0])
def test_thin_strokes_get_the_width_of_mnists(side: int, half: float) -> None:
    ring_y, ring_x = np.mgrid[:side, :side] - side / 2
    ring = np.clip(half + 0.5 - np.abs(np.hypot(ring_x, ring_y) - 0.4 * side), 0, 1)
    image = normalize(ring) / 255
    assert 1.9 < stroke_width(image) < 2.7
    rows = np.flatnonzero(image.sum(axis=1) > 0.1)
    assert rows[-1] - rows[0] + 1 == 20


def test_thick_strokes_stay() -> None:
    thick = draw_line(200, 200, 30)
    image = normalize(thick) / 255
    assert stroke_width(image) == pytest.approx(60 * 20 / (180 + 60), rel=0.1), "its ends are edges too"


def test_center_puts_the_mass_into_the_middle_where_it_can() -> None:
    lopsided = np.zeros((20, 20))
    lopsided[:, :4] = 1  # the mass is on the left, so the box moves right as far as possible
    image = center(lopsided).astype(float)
    rows, columns = image.sum(axis=1), image.sum(axis=0)
    assert (columns * np.arange(28)).sum() / columns.sum() == pytest.approx(9.5)
    assert (rows * np.arange(28)).sum() / rows.sum() == pytest.approx(14, abs=0.5)
    image = center(np.ones((20, 5)))
    assert image.dtype == np.uint8
    assert image.sum() == 255 * 100


def test_place_size_and_darkness_of_ink_do_not_matter() -> None:
    line = draw_line(120, 120, 3, lean=0.5)
    wanted = normalize(line).astype(float)
    moved = np.pad(line, ((0, 70), (130, 10)))
    np.testing.assert_array_equal(normalize(moved), wanted)
    np.testing.assert_allclose(normalize(0.5 * line), wanted, atol=1)
    large = normalize(draw_line(360, 360, 9, lean=0.5)).astype(float)
    assert np.abs(large - wanted).mean() < 4


def test_no_ink_is_no_digit() -> None:
    for blank in (np.zeros((30, 20)), np.full((5, 5), 0.05), np.zeros((0, 7))):
        with pytest.raises(NoDigit, match="blank"):
            normalize(blank)
