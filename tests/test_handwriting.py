"""In pictures like those that people make, drawn here, only the digit is found."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from benchmarks.handwriting import interval_over_sources, read_labels
from mnist_lightning.images.handwriting import NoDigit, find_ink, to_mnist
from mnist_lightning.images.parts import find_parts, label, widen
from mnist_lightning.images.ruling import find_ruling

PAPER, PEN = (226, 219, 205), (58, 62, 90)
STROKES = {  # polylines in [0, 1]²
    "2": [[(0.2, 0.25), (0.35, 0.05), (0.7, 0.05), (0.8, 0.3), (0.2, 0.95), (0.85, 0.95)]],
    "5": [[(0.8, 0.03), (0.3, 0.03)], [(0.28, 0.05), (0.25, 0.45), (0.7, 0.45), (0.75, 0.9), (0.2, 0.95)]],
    "7": [[(0.1, 0.05), (0.8, 0.05), (0.4, 0.98)], [(0.35, 0.5), (0.8, 0.5)]],
    "0": [[(0.5, 0.02), (0.2, 0.3), (0.2, 0.7), (0.5, 0.98), (0.8, 0.7), (0.8, 0.3), (0.5, 0.02)]],
    "1": [[(0.3, 0.3), (0.6, 0.02), (0.6, 0.98)], [(0.35, 0.98), (0.85, 0.98)]],
}
FORMS = STROKES | {  # in which some write them
    "slashed 0": [*STROKES["0"], [(0.15, 0.95), (0.85, 0.05)]],
    "open 9": [
        [(0.75, 0.1), (0.4, 0.02), (0.15, 0.25), (0.35, 0.48), (0.75, 0.4)],
        [(0.78, 0.02), (0.7, 0.98)],
    ],
    "wedge 1": [[(0.2, 0.45), (0.55, 0.02), (0.5, 0.98)]],
}
Draw = Callable[[ImageDraw.ImageDraw, str], None]


def write(
    draw: ImageDraw.ImageDraw,
    digit: str,
    box: tuple[float, float, float, float],
    width: int,
    ink: object = PEN,
) -> None:
    left, top, right, bottom = box
    for stroke in FORMS[digit]:
        points = [(left + x * (right - left), top + y * (bottom - top)) for x, y in stroke]
        draw.line(points, fill=ink, width=width, joint="curve")  # type: ignore[arg-type]


def clean(digit: str) -> np.ndarray:
    """Return the digit alone, as the net should see it: (28, 28) uint8."""
    picture = Image.new("RGB", (300, 300), "white")
    write(ImageDraw.Draw(picture), digit, (75, 50, 225, 250), 14, "black")
    return to_mnist(picture)


def likeness(picture: Image.Image, digit: str) -> float:
    """Return the correlation of the prepared picture with the digit alone, at the best shift by up to a pixel."""
    seen, wanted = to_mnist(picture).astype(float), clean(digit).astype(float)
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    return max(float(np.corrcoef(np.roll(seen, s, (0, 1)).ravel(), wanted.ravel())[0, 1]) for s in shifts)


def ballpoint(digit: str) -> Image.Image:
    """Draw with a thin pen on grey-beige paper, with a shadow in a corner and a camera's noise."""
    picture = Image.new("RGB", (520, 520), PAPER)
    write(ImageDraw.Draw(picture), digit, (180, 130, 330, 330), 5, (90, 90, 140))
    y, x = np.mgrid[0:1:520j, 0:1:520j]
    light = 1 - 0.35 * np.clip(x + y - 1.2, 0, 1)
    noise = np.random.default_rng(0).normal(0, 3, (520, 520, 3))
    pixels = np.asarray(picture) * light[..., None] + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def mouse_line(digit: str) -> Image.Image:
    picture = Image.new("RGB", (303, 340), "white")
    write(ImageDraw.Draw(picture), digit, (80, 60, 230, 260), 1, "black")
    return picture


def small_in_wide(digit: str) -> Image.Image:
    picture = Image.new("RGB", (1500, 800), "white")
    write(ImageDraw.Draw(picture), digit, (900, 500, 937, 550), 3, "black")
    return picture


def scan_with_a_dark_edge(digit: str) -> Image.Image:
    picture = Image.new("RGB", (90, 140), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 2, 139), fill=(70, 70, 70))
    write(draw, digit, (25, 45, 65, 98), 3, (40, 60, 180))
    return picture


def box_sides(digit: str, sides: str) -> Image.Image:
    picture = Image.new("RGB", (194, 194), (214, 196, 170))
    draw = ImageDraw.Draw(picture)
    for side in sides:
        lines = {"l": (0, 0, 6, 193), "r": (186, 0, 193, 193), "t": (0, 0, 193, 7), "b": (0, 187, 193, 193)}
        draw.rectangle(lines[side], fill=(30, 28, 26))
    write(draw, digit, (62, 58, 122, 138), 4, (40, 40, 44))
    return picture


def desk(digit: str) -> Image.Image:
    """Draw a phone's photo with a dark strip of the desk along one side."""
    picture = Image.new("RGB", (600, 800), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.polygon([(0, 0), (90, 0), (60, 800), (0, 800)], fill=(60, 45, 35))
    write(draw, digit, (240, 280, 390, 480), 9)
    return picture


def figure(digit: str) -> Image.Image:
    """Draw an enlarged white-on-black image on a white page, with ticks beside it."""
    small = Image.new("L", (28, 28), 0)
    write(ImageDraw.Draw(small), digit, (7, 4, 22, 24), 2, 255)
    picture = Image.new("RGB", (640, 480), "white")
    picture.paste(small.resize((340, 340), Image.Resampling.NEAREST).convert("RGB"), (150, 50))
    draw = ImageDraw.Draw(picture)
    for tick in range(6):
        draw.line((160 + 60 * tick, 400, 160 + 60 * tick, 408), fill="black", width=2)
        draw.line((136, 60 + 60 * tick, 142, 60 + 60 * tick), fill="black", width=2)
    return picture


def axes(digit: str) -> Image.Image:
    """Draw a thin rectangle of axes with ticks around the digit."""
    picture = Image.new("RGB", (640, 480), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((140, 50, 500, 410), outline="black", width=2)
    for tick in range(5):
        draw.line((170 + 70 * tick, 411, 170 + 70 * tick, 418), fill="black", width=2)
    write(draw, digit, (250, 130, 390, 330), 16, "black")
    return picture


def neighbour(digit: str) -> Image.Image:
    """Draw the end of the next digit's stroke at the edge."""
    picture = Image.new("RGB", (200, 240), "white")
    draw = ImageDraw.Draw(picture)
    draw.line((200, 60, 188, 110, 200, 170), fill="black", width=8)
    write(draw, digit, (35, 40, 155, 200), 10, "black")
    return picture


def diagonal_gradient(digit: str) -> Image.Image:
    y, x = np.mgrid[0:1:200j, 0:1:200j]
    picture = Image.fromarray(np.clip(255 * (x + y - 0.2) / 0.9, 0, 255).astype(np.uint8)).convert("RGB")
    write(ImageDraw.Draw(picture), digit, (85, 70, 160, 170), 7, (10, 10, 10))
    return picture


def faint(digit: str) -> Image.Image:
    picture = Image.new("RGB", (120, 120), (250, 250, 250))
    write(ImageDraw.Draw(picture), digit, (35, 25, 80, 85), 4, (243, 243, 243))
    return picture


def dashed(digit: str) -> Image.Image:
    """Draw a binary image whose stroke has gaps."""
    picture = Image.new("L", (64, 64), 0)
    write(ImageDraw.Draw(picture), digit, (14, 8, 50, 56), 5, 255)
    pixels = np.asarray(picture).copy()
    pixels[::7] = 0
    return Image.fromarray(pixels).convert("RGB")


def ruled(
    digit: str, *, line: int = 120, width: int = 2, apart: int = 45, turn: float = 0.03, across: bool = False
) -> Image.Image:
    """Printed lines, turned a little; one of them runs where the digit stands, if they are level."""
    picture = Image.new("RGB", (400, 360), "white")
    draw = ImageDraw.Draw(picture)
    for place in range(-400, 800, apart):
        draw.line((0, place + 15, 400, place + 15 + 400 * turn), fill=(line, line, line + 20), width=width)
        if across:
            draw.line((place, 0, place - 360 * turn, 360), fill=(line, line, line + 20), width=width)
    write(draw, digit, (140, 105, 250, 265), 9, (20, 22, 40))
    return picture


def coloured_lines(digit: str, *, line: tuple[int, int, int], apart: int, turn: float) -> Image.Image:
    """Draw with a blue pen on paper with printed lines of a colour and a red margin."""
    picture = Image.new("RGB", (400, 360), (250, 248, 240))
    draw = ImageDraw.Draw(picture)
    for place in range(-400, 800, apart):
        draw.line((0, place + 9, 400, place + 9 + 400 * turn), fill=line, width=2)
    draw.line((60, 0, 60 - 360 * turn, 360), fill=(210, 90, 90), width=2)
    write(draw, digit, (150, 105, 260, 265), 8, (30, 40, 130))
    return picture


PICTURES: dict[str, Callable[[str], Image.Image]] = {
    "ballpoint": ballpoint,
    "mouse line": mouse_line,
    "small in wide": small_in_wide,
    "dark edge": scan_with_a_dark_edge,
    "two sides": lambda digit: box_sides(digit, "lb"),
    "three sides": lambda digit: box_sides(digit, "trb"),
    "four sides": lambda digit: box_sides(digit, "ltrb"),
    "desk": desk,
    "figure": figure,
    "axes": axes,
    "neighbour": neighbour,
    "gradient": diagonal_gradient,
    "faint": faint,
    "dashed": dashed,
    "ruled": ruled,
    "faintly ruled": lambda digit: ruled(digit, line=190, turn=-0.08),
    "squared": lambda digit: ruled(digit, line=150, apart=30, across=True),
    "squared, level": lambda digit: ruled(digit, line=60, apart=52, turn=0, across=True),
    "squared, as dark as the pen": lambda digit: ruled(digit, line=20, width=3, turn=-0.05, across=True),
    "narrowly ruled": lambda digit: ruled(digit, apart=24, turn=0.06),
    "widely ruled, steep": lambda digit: ruled(digit, line=90, apart=95, turn=-0.12),
    "blue lines, a margin": lambda digit: coloured_lines(digit, line=(150, 185, 230), apart=38, turn=0.02),
    "green lines, a margin": lambda digit: coloured_lines(digit, line=(120, 200, 140), apart=60, turn=-0.06),
    "squared, light on dark": lambda digit: ImageOps.invert(ruled(digit, line=90, across=True)),
}


@pytest.mark.parametrize("digit", STROKES)
@pytest.mark.parametrize("kind", PICTURES)
def test_the_digit_alone_is_found(kind: str, digit: str) -> None:
    assert likeness(PICTURES[kind](digit), digit) > 0.75


@pytest.mark.parametrize("digit", [form for form in FORMS if form not in STROKES])
@pytest.mark.parametrize("kind", ["ballpoint", "mouse line", "axes", "squared"])
def test_other_forms_of_digits_are_found_alike(kind: str, digit: str) -> None:
    assert likeness(PICTURES[kind](digit), digit) > 0.75


@pytest.mark.parametrize("pen", [4, 5])
def test_a_stem_along_a_printed_line_stays(pen: int) -> None:
    """A 1 on squared paper, whose stem lies on a line."""
    picture = Image.new("RGB", (300, 300), "white")
    draw = ImageDraw.Draw(picture)
    for place in range(25, 300, 50):
        draw.line((0, place, 300, place), fill=(120, 120, 140), width=2)
        draw.line((place, 0, place, 300), fill=(120, 120, 140), width=2)
    draw.line([(115, 115), (176, 70), (176, 230)], fill=(20, 22, 40), width=pen)
    alone = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(alone).line([(115, 115), (176, 70), (176, 230)], fill=(20, 22, 40), width=pen)
    seen, wanted = to_mnist(picture).astype(float), to_mnist(alone).astype(float)
    assert np.corrcoef(seen.ravel(), wanted.ravel())[0, 1] > 0.8


@pytest.mark.parametrize("pen", [3, 8])
def test_strokes_from_border_to_border_are_no_printed_lines(pen: int) -> None:
    """A crop that a straight 4 fills, and two 1s."""
    four = Image.new("RGB", (140, 200), "white")
    draw = ImageDraw.Draw(four)
    draw.line([(90, 0), (20, 120), (140, 120)], fill="black", width=pen)
    draw.line([(100, 20), (95, 200)], fill="black", width=pen)
    whole = 255 - np.asarray(four.convert("L"), dtype=float)
    assert find_ink(four).sum() == pytest.approx(whole.sum() / 255, rel=0.1)
    ones = Image.new("RGB", (140, 200), "white")
    for place in (40, 100):
        ImageDraw.Draw(ones).line([(place, 0), (place - 6, 200)], fill="black", width=pen)
    assert find_ruling(255 - np.asarray(ones.convert("L"), dtype=float), 20, ruled=False) is None


def test_strokes_that_cross_or_touch_printed_lines_stay() -> None:
    """A circle of a pen as thick and dark as the lines: one line crosses it, another touches its foot."""
    drawn, alone = Image.new("L", (200, 200), 0), Image.new("L", (200, 200), 0)
    for picture in (drawn, alone):
        ImageDraw.Draw(picture).ellipse((60, 50, 140, 151), outline=255, width=3)
    for place in (20, 85, 150):
        ImageDraw.Draw(drawn).line((0, place, 200, place), fill=255, width=2)
    strength, circle = np.asarray(drawn, dtype=float), np.asarray(alone) > 0
    ruling = find_ruling(strength, 20, ruled=False)
    assert ruling is not None
    left = (strength > 0) & ~ruling
    assert (left & circle).sum() >= 0.95 * circle.sum()
    assert (left & ~circle).sum() <= 0.05 * circle.sum()
    assert find_ruling(np.zeros((90, 90)), 20, ruled=False) is None


@pytest.mark.parametrize("digit", STROKES)
def test_a_digit_that_fills_its_picture_stays_whole(digit: str) -> None:
    picture = Image.new("RGB", (100, 140), "white")
    write(ImageDraw.Draw(picture), digit, (-10, 5, 105, 138), 12, "black")
    box = picture.convert("L").point(lambda level: 255 * (level < 128)).getbbox()
    assert likeness(picture.crop(box), digit) > 0.75


def test_a_thick_bar_is_a_digit_and_no_picture_on_a_page() -> None:
    picture = Image.new("RGB", (300, 400), "white")
    ImageDraw.Draw(picture).rectangle((110, 60, 180, 340), fill=(20, 20, 20))
    assert to_mnist(picture)[4:24, 12:16].min() > 200


def test_nothing_on_textured_paper_is_no_digit() -> None:
    noise = np.random.default_rng(1).normal(0, 6, (300, 300))
    smooth = Image.fromarray((200 + noise).clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    with pytest.raises(NoDigit, match="blank"):
        find_ink(smooth.convert("RGB"))


def test_parts_are_connected_by_eight_neighbours() -> None:
    ink = np.zeros((6, 9))
    ink[0, 0] = ink[1, 1] = ink[2, 0] = 1  # diagonal
    ink[0, 4:7] = ink[1, 6] = ink[2, 4:7] = 0.5  # a hook
    ink[5, 8] = 1
    parts = find_parts(ink)
    assert len(parts) == 3
    assert sorted(parts.amounts.tolist()) == [1, 3, 3.5]
    assert parts.boxes[parts.labels[0, 0]].tolist() == [0, 0, 3, 2]
    assert parts.boxes[parts.labels[2, 4]].tolist() == [0, 4, 3, 7]
    assert len(find_parts(ink, gap=3)) == 1
    assert len(find_parts(np.zeros((3, 4)))) == 0
    mask = np.random.default_rng(0).random((40, 50)) < 0.4
    same = label(mask)
    assert (same[mask] >= 0).all()
    assert (same[~mask] == -1).all()
    for labels in (same, same.T, same[:, ::-1]):  # neighbours in all eight directions have the same label
        above, below = labels[:-1], labels[1:]
        for one, other in ((above, below), (above[:, 1:], below[:, :-1])):
            both = (one >= 0) & (other >= 0)
            assert (one[both] == other[both]).all()
    assert widen(mask, 0).sum() == mask.sum()
    point = np.zeros((9, 9), dtype=bool)
    point[4, 0] = True
    assert np.argwhere(widen(point, 2)).tolist() == [[y, x] for y in range(2, 7) for x in range(3)]


def test_intervals_are_over_sources() -> None:
    right = np.array([True] * 90 + [False] * 10)
    alike = interval_over_sources(right, ["a"] * 90 + ["b"] * 10)
    assert alike == (0, 1)
    low, high = interval_over_sources(right, [str(i) for i in range(100)])
    assert 0.82 < low < 0.86
    assert 0.94 < high < 0.97


def test_labels_of_a_folder_are_read_or_what_is_wrong_is_told(tmp_path: Path) -> None:
    def fails(content: str, message: str) -> None:
        (tmp_path / "labels.csv").write_text(content)
        with pytest.raises(SystemExit, match=message):
            read_labels(tmp_path)

    with pytest.raises(SystemExit, match=r"labels\.csv: No such file"):
        read_labels(tmp_path)
    fails("file,label\n", "names no picture")
    fails("name,label\na.png,1\n", "without a file")
    fails("file,label\na.png,1\n", "names a.png, which is not in the folder")
    (tmp_path / "a.png").touch()
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\n")
    assert read_labels(tmp_path) == [{"kind": "all", "source": "a.png", "file": "a.png", "label": "1"}]
