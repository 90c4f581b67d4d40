"""In pictures of several digits, drawn here, each digit is found once, in reading order."""

import contextlib
import csv
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image, ImageDraw

from mnist_lightning.images.handwriting import separate_ink
from mnist_lightning.images.normalize import NoDigit
from mnist_lightning.images.several import MOST_PARTS, find_digits, holds_several
from mnist_lightning.rundir.signals import time_limit
from tests.test_handwriting import PICTURES, STROKES, write


def draw_sheet(lines: list[str], *, step: int = 70, pen: int = 6, size: int = 60) -> Image.Image:
    """Draw lines of digits, each in a cell of ``step`` by 100 pixels, shifted a little up or down."""
    picture = Image.new("RGB", (step * max(map(len, lines)) + 60, 100 * len(lines) + 60), (240, 238, 230))
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        for column, digit in enumerate(line):
            left, top = 30 + step * column, 35 + 100 * row + 7 * (column % 3)
            write(draw, digit, (left, top, left + 0.75 * size, top + size), pen, (40, 40, 60))
    return picture


@pytest.mark.parametrize(
    "lines", [["72"], ["5017"], ["1111111", "2"], ["0125", "7", "52017"], ["11"] * 6], ids=str
)
def test_each_digit_is_found_in_reading_order(lines: list[str]) -> None:
    picture = draw_sheet(lines)
    assert holds_several(separate_ink(picture))
    found = find_digits(picture)
    assert [sum(digit.row == row for digit in found) for row in range(len(lines))] == [*map(len, lines)]
    for digit in found:
        column = round((digit.box[0] - 30) / 70)
        left, top, right, bottom = digit.box
        assert 30 + 70 * column - 4 <= left < right <= 30 + 70 * column + 60
        assert 100 * digit.row < top < bottom < 100 * digit.row + 130
        assert digit.ink.max() > 0.9
    assert [digit.box[0] for digit in found if digit.row == 0] == sorted(
        digit.box[0] for digit in found if digit.row == 0
    )


def test_touching_digits_are_parted() -> None:
    picture = Image.new("RGB", (400, 200), "white")
    draw = ImageDraw.Draw(picture)
    for column, digit in enumerate("000"):
        write(draw, digit, (40 + 54 * column, 50, 130 + 54 * column, 150), 7, "black")
    found = find_digits(picture)
    assert len(found) == 3
    assert all(abs(digit.box[2] - digit.box[0] - 58) < 20 for digit in found)


@pytest.mark.parametrize("digit", STROKES)
@pytest.mark.parametrize("kind", ["ballpoint", "small in wide", "four sides", "desk", "axes", "dashed"])
def test_one_digit_is_not_taken_for_several(kind: str, digit: str) -> None:
    assert not holds_several(separate_ink(PICTURES[kind](digit)))


def test_specks_alone_are_no_digits() -> None:
    picture = Image.new("RGB", (1000, 1000), "white")
    draw = ImageDraw.Draw(picture)
    for place in np.random.default_rng(0).integers(20, 980, (5, 2)).tolist():
        draw.point([tuple(place)], fill="black")
    with pytest.raises(NoDigit, match="blank"):
        find_digits(picture)


def test_predict_reads_lines_and_tells_where_each_digit_is(
    trained_run: Path, tmp_path: Path, command: Run
) -> None:
    draw_sheet(["705", "12"]).save(tmp_path / "sheet.png")
    draw_sheet(["7"]).save(tmp_path / "one.png")
    checkpoint = f"checkpoint={trained_run / 'checkpoints' / 'best.ckpt'}"
    done = command("predict", "images=[sheet.png,one.png]", checkpoint, "output=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    start = next(i for i, line in enumerate(told) if line.startswith("net: ")) + 1
    lines = [line.split() for line in told[start : start + 3]]
    assert [len(line) for line in lines[:2]] == [4, 2]
    assert lines[2][0] == "one.png"
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [row["file"] for row in rows] == ["sheet.png"] * 5 + ["one.png"]
    assert [bool(row["left"]) for row in rows] == [True] * 5 + [False]
    assert [row["prediction"] for row in rows[:3]] == [one.strip("?") for one in lines[0][1:]]
    assert int(rows[1]["left"]) == pytest.approx(30 + 70 + 6, abs=8)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    one = command("predict", "images=sheet.png", checkpoint, "layout=one", "output=one", cwd=tmp_path)
    assert len((tmp_path / "one" / "predictions.csv").read_text().splitlines()) == 2, one.stderr


def test_thousands_of_specks_are_looked_at_in_bounded_work() -> None:
    """Comparing all pairs would take a hundred million comparisons."""
    pixels = np.full((1000, 1000), 255, dtype=np.uint8)
    for row in range(0, 4):
        for column in range(0, 4):
            pixels[row::8, column::8] = 0  # 15,625 squares of 4 by 4
    with time_limit(30), contextlib.suppress(NoDigit):
        assert len(find_digits(Image.fromarray(pixels).convert("RGB"))) <= MOST_PARTS


def test_what_takes_too_long_is_broken_off() -> None:
    with pytest.raises(TimeoutError, match="takes longer than"), time_limit(0.05):
        time.sleep(20)
    with time_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
