"""Measure how well a net reads digits in pictures of many kinds.

MNIST test digits are drawn in the way of people's pictures: off-centre, thin, coloured, photographed, …
Each picture is prepared as ``python -m mnist_lightning.predict`` does it.  The net's prediction is compared
with the label, and with its prediction for the original 28×28 image.

    python benchmarks/handwriting.py checkpoint.ckpt
    python benchmarks/handwriting.py checkpoint.ckpt --digits 1000 --seed 3 --sheet kinds.png

With ``--folder``, the pictures of a folder are read instead.  Its ``labels.csv`` has the columns ``file``
(in the folder) and ``label`` (a class name), and may have ``kind`` and ``source`` (a person or a web page):

    python benchmarks/handwriting.py checkpoint.ckpt --folder my_pictures --apart printed,clipart

Pictures from the same source are alike, so the bootstrap intervals resample sources instead of pictures.

With ``--letters``, the net reads letters, and the share of answers "no digit" and "not sure" is printed.  The
letters are drawn in fonts of matplotlib or of a folder; letters that look like digits are left out:

    python benchmarks/handwriting.py checkpoint.ckpt --letters
    python benchmarks/handwriting.py checkpoint.ckpt --letters /usr/share/fonts/truetype/liberation
"""

import argparse
import csv
import string
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

Digit = NDArray[np.uint8]  # (28, 28), 255 is ink
Render = Callable[[Digit, np.random.Generator], Image.Image]

ZOOM = 8


def _enlarge(digit: Digit, zoom: float = ZOOM) -> Image.Image:
    side = round(28 * zoom)
    return Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)


def _paint(
    ink: Image.Image, ink_color: tuple[int, ...] = (0, 0, 0), paper: tuple[int, ...] = (255, 255, 255)
) -> Image.Image:
    """Paint ink on paper in the given colours (RGB, 0 to 255), with the ink image as a mask."""
    picture = Image.new("RGB", ink.size, paper)
    picture.paste(Image.new("RGB", ink.size, ink_color), mask=ink)
    return picture


def _place(ink: Image.Image, size: tuple[int, int], random: np.random.Generator) -> Image.Image:
    """Place the digit at a random position on a larger canvas."""
    canvas = Image.new("L", size, 0)
    box = ink.getbbox() or (0, 0, 1, 1)
    digit = ink.crop(box)
    left = int(random.integers(2, size[0] - digit.width - 2))
    top = int(random.integers(2, size[1] - digit.height - 2))
    canvas.paste(digit, (left, top))
    return canvas


def plain(digit: Digit, random: np.random.Generator) -> Image.Image:
    return _paint(_enlarge(digit))


def off_centre(digit: Digit, random: np.random.Generator) -> Image.Image:
    return _paint(_place(_enlarge(digit), (620, 420), random))


def tiny(digit: Digit, random: np.random.Generator) -> Image.Image:
    return _paint(_enlarge(digit, 0.8))  # the digit is 16 pixels tall


def huge(digit: Digit, random: np.random.Generator) -> Image.Image:
    return _paint(_enlarge(digit, 40))


def small_in_large(digit: Digit, random: np.random.Generator) -> Image.Image:
    return _paint(_place(_enlarge(digit, 4), (1600, 1200), random))


def rotated(digit: Digit, random: np.random.Generator) -> Image.Image:
    """Rotate the digit by up to 10 degrees."""
    return _paint(_enlarge(digit).rotate(random.uniform(-10, 10), Image.Resampling.BICUBIC))


def inverted(digit: Digit, random: np.random.Generator) -> Image.Image:
    return ImageOps.invert(_paint(_enlarge(digit)))


def coloured(digit: Digit, random: np.random.Generator) -> Image.Image:
    """Paint with random colours of ink and paper that differ by at least 80 levels in one channel."""
    while True:
        ink, paper = random.integers(0, 256, (2, 3)).tolist()
        if max(abs(a - b) for a, b in zip(ink, paper, strict=True)) >= 80:
            return _paint(_enlarge(digit), tuple(ink), tuple(paper))


def transparent(digit: Digit, random: np.random.Generator) -> Image.Image:
    ink = _enlarge(digit)
    color = (255, 255, 255) if random.random() < 0.5 else (0, 0, 0)
    picture = Image.new("RGBA", ink.size, (*color, 0))
    picture.putalpha(ink)
    return picture


def thin(digit: Digit, random: np.random.Generator) -> Image.Image:
    """Make the strokes, 2 to 3 MNIST pixels wide, thinner by about 0.9 pixels."""
    return _paint(_enlarge(digit).filter(ImageFilter.MinFilter(7)))


def thick(digit: Digit, random: np.random.Generator) -> Image.Image:
    """Make the strokes thicker by about 1.1 MNIST pixels."""
    return _paint(_enlarge(digit).filter(ImageFilter.MaxFilter(9)))


def photographed(digit: Digit, random: np.random.Generator) -> Image.Image:
    """Imitate a photograph of a pen on paper under a lamp: a strong gradient of light, blur and noise."""
    ink = np.asarray(_place(_enlarge(digit), (360, 300), random).filter(ImageFilter.GaussianBlur(1.5))) / 255
    y, x = np.mgrid[-1 : 1 : ink.shape[0] * 1j, -1 : 1 : ink.shape[1] * 1j]
    angle = random.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * x + np.sin(angle) * y
    light = 165 + 45 * slope - 15 * (x**2 + y**2)
    paper = light[..., None] * np.array([1.0, 0.97, 0.9])
    pen = light[..., None] * np.array([0.25, 0.27, 0.4])
    picture = paper + ink[..., None] * (pen - paper) + random.normal(0, 12, (*ink.shape, 3))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


KINDS: dict[str, Render] = {
    "plain": plain,
    "off-centre": off_centre,
    "tiny": tiny,
    "huge": huge,
    "small in large": small_in_large,
    "rotated": rotated,
    "inverted": inverted,
    "coloured": coloured,
    "transparent": transparent,
    "thin": thin,
    "thick": thick,
    "photographed": photographed,
}


NUM_RESAMPLES = 10_000
LETTERS = [letter for letter in string.ascii_letters if letter not in "lIioOsSzZbgq"]


def through_predict(picture: Image.Image, folder: Path) -> Digit:
    """Return the net's input for a picture, an empty image if no digit is found in it.

    Args:
        picture: the picture.
        folder: a folder for the picture's file.
    """
    path = folder / "picture.png"
    picture.save(path, compress_level=1)
    return prepare(path)


def prepare(path: Path) -> Digit:
    """Return the net's input for a picture file, an empty image if no digit is found in it.

    Raises:
        OSError: the file can't be read.
    """
    from mnist_lightning.images.handwriting import read_image, to_mnist
    from mnist_lightning.images.normalize import NoDigit

    try:
        return to_mnist(read_image(path))
    except NoDigit:
        return np.zeros((28, 28), dtype=np.uint8)


def interval_over_sources(
    right: NDArray[np.bool_], sources: list[str], *, seed: int = 0
) -> tuple[float, float]:
    """Return a 95 % interval of the share of correct predictions, in [0, 1].

    It is a cluster bootstrap, which draws sources with replacement: Field and Welsh 2007, "Bootstrapping
    clustered data", Journal of the Royal Statistical Society B 69(3).

    Args:
        right: (N,) whether the prediction for each picture is correct, N > 0.
        sources: the source of each picture.
        seed: the seed of the resampling.
    """
    names, numbers = np.unique(sources, return_inverse=True)
    hits = np.bincount(numbers, weights=right, minlength=len(names))
    counts = np.bincount(numbers, minlength=len(names))
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), NUM_RESAMPLES)
    low, high = np.quantile((drawn @ hits) / (drawn @ counts), [0.025, 0.975])
    return float(low), float(high)


def read_labels(folder: Path) -> list[dict[str, str]]:
    """Read the rows of a folder's ``labels.csv``: file, label, kind and source.

    Raises:
        SystemExit: the file does not exist or lacks a column, or a picture is missing.
    """
    path = folder / "labels.csv"
    try:
        with path.open(newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: {getattr(error, 'strerror', None) or error}")
    if not rows:
        sys.exit(f"{path} names no picture: it needs a line for each, below the line file,label,kind,source")
    for column in ("file", "label"):
        if any(not row.get(column) for row in rows):
            sys.exit(f"{path} has lines without a {column}: its columns are file,label,kind,source")
    missing = [row["file"] for row in rows if not (folder / row["file"]).is_file()]
    if missing:
        sys.exit(f"{path} names {missing[0]}, which is not in the folder (and {len(missing) - 1} more)")
    return [
        {"kind": row.get("kind") or "all", "source": row.get("source") or row["file"]}
        | {name: row[name] for name in ("file", "label")}
        for row in rows
    ]


def draw_letters(font: Path) -> list[Image.Image]:
    """Draw each of ``LETTERS``, black on white, on a picture of 300 × 300 pixels."""
    drawn = []
    for letter in LETTERS:
        picture = Image.new("RGB", (300, 300), "white")
        whole = ImageFont.truetype(str(font), 150)
        ImageDraw.Draw(picture).text((150, 150), letter, font=whole, fill="black", anchor="mm")
        drawn.append(picture)
    return drawn


def report_letters(checkpoint: Path, folder: Path | None) -> str:
    """Report, as lines of text, the shares of letters that are "no digit" or "not sure", by font, and the
    share of correctly classified validation images that are neither.

    Args:
        checkpoint: the net.
        folder: the folder of the fonts; None: matplotlib's DejaVu fonts.  Matplotlib's other fonts, STIX and
            Computer Modern, were used to choose how letters are recognised.
    """
    import matplotlib
    import torch

    from mnist_lightning.evaluation.confidence import answer
    from mnist_lightning.evaluation.trained import load_classifier, load_split
    from mnist_lightning.images.handwriting import to_mnist

    classifier, loaded = load_classifier(checkpoint)
    fonts = sorted((folder or Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))
    if folder is None:
        fonts = [font for font in fonts if font.stem.startswith("DejaVu") and "Display" not in font.stem]
    if not fonts:
        sys.exit(f"{folder} has no *.ttf file")
    width = max(len(font.stem) for font in fonts)
    lines, told = [f"{'font':{width}}  letters  no digit  not sure"], []
    for font in fonts:
        seen = np.stack([to_mnist(picture) for picture in draw_letters(font)])
        told.append(np.array(answer(classifier, torch.from_numpy(seen)).told))
    for name, words in (
        *zip((font.stem for font in fonts), told, strict=True),
        ("all", np.concatenate(told)),
    ):
        shares = (f"{100 * np.mean(words == word):6.1f} %" for word in ("no digit", "not sure"))
        lines.append(f"{name:{width}}  {len(words):7}  {'  '.join(shares)}")
    val = load_split(checkpoint, loaded, "val", data_dir=None)
    said = answer(classifier, val.images)
    right = said.probabilities.argmax(axis=1) == val.labels.numpy()
    kept = np.array(said.told)[right] == "sure"
    return "\n".join(
        [*lines, f"{100 * kept.mean():.1f} % of the correctly read validation images are neither"]
    )


def report_folder(checkpoint: Path, folder: Path, apart: list[str]) -> str:
    """Report, as lines of text, the accuracy on a folder's pictures by kind, and the share of pictures that
    are "not sure" or "no digit".

    Args:
        checkpoint: the net.
        folder: the folder of the pictures, with its ``labels.csv``.
        apart: kinds that do not count in the total.
    """
    rows = read_labels(folder)
    import torch

    from mnist_lightning.evaluation.confidence import answer
    from mnist_lightning.evaluation.trained import load_classifier

    classifier, _ = load_classifier(checkpoint)
    strange = sorted({row["label"] for row in rows} - {*classifier.class_names})
    if strange:
        sys.exit(f"{folder / 'labels.csv'}: no class of the net: {', '.join(strange[:5])}")
    seen = []
    for row in rows:
        try:
            seen.append(prepare(folder / row["file"]))
        except OSError as error:
            sys.exit(f"{folder / row['file']}: {error}")
    said = answer(classifier, torch.from_numpy(np.stack(seen)))
    read = said.probabilities.argmax(axis=1)
    right = np.array([classifier.class_names[i] == row["label"] for i, row in zip(read, rows, strict=True)])
    doubted = np.array(said.told) != "sure"
    kinds = sorted({row["kind"] for row in rows})
    groups = {kind: [row["kind"] == kind for row in rows] for kind in kinds}
    if len(kinds) > 1:
        counted = f"all but {', '.join(apart)}" if apart else "all"
        groups[counted] = [row["kind"] not in apart for row in rows]
    width = max(map(len, groups))
    lines = [f"{'kind':{width}}  pictures  sources    right  doubted  95 % interval over sources"]
    for name, members in groups.items():
        chosen = np.array(members)
        if chosen.any():
            sources = [row["source"] for row, member in zip(rows, members, strict=True) if member]
            low, high = interval_over_sources(right[chosen], sources)
            share = f"{100 * right[chosen].mean():.1f} %"
            told = f"{100 * doubted[chosen].mean():.1f} %"  # of correct and of wrong predictions
            ends = f"{100 * low:.1f} to {100 * high:.1f} %" if len({*sources}) > 1 else "one source"
            lines.append(
                f"{name:{width}}  {chosen.sum():8}  {len({*sources}):7}  {share:>7}  {told:>7}  {ends}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--digits", type=int, default=300, help="number of digits of each kind (300)")
    parser.add_argument("--seed", type=int, default=0, help="seed for digits, positions and colours (0)")
    parser.add_argument("--sheet", type=Path, help="write a picture of the net's inputs to this file")
    parser.add_argument("--folder", type=Path, help="read the pictures in this folder's labels.csv instead")
    parser.add_argument("--apart", default="", help="kinds of the folder to leave out of the total, a,b,c")
    parser.add_argument(
        "--letters", nargs="?", const="", help="read letters instead, in matplotlib's fonts or a folder's"
    )
    arguments = parser.parse_args()
    if arguments.letters is not None:
        print(report_letters(arguments.checkpoint, Path(arguments.letters) if arguments.letters else None))
        return
    if arguments.folder:
        apart = [kind for kind in arguments.apart.split(",") if kind]
        print(report_folder(arguments.checkpoint, arguments.folder, apart))
        return

    import tempfile

    import torch

    from mnist_lightning import figures
    from mnist_lightning.evaluation.trained import load_classifier, load_split, log_probabilities

    classifier, checkpoint = load_classifier(arguments.checkpoint)
    test = load_split(arguments.checkpoint, checkpoint, "test", data_dir=None)
    random = np.random.default_rng(arguments.seed)
    chosen = torch.from_numpy(random.choice(len(test), arguments.digits, replace=False))
    originals, labels = test.images[chosen], test.labels[chosen]
    own = log_probabilities(classifier, originals).argmax(dim=1)
    print(
        f"{len(chosen)} test digits, the net reads {100 * (own == labels).float().mean():.1f} % correctly\n"
    )
    print(f"{'kind':16} same reading   right")
    sheet = [*originals[:12].numpy()]
    with tempfile.TemporaryDirectory() as folder:
        for kind, render in KINDS.items():
            pictures = (render(digit, random) for digit in originals.numpy())
            seen = torch.from_numpy(np.stack([through_predict(p, Path(folder)) for p in pictures]))
            read = log_probabilities(classifier, seen).argmax(dim=1)
            same, right = (100 * (read == wanted).float().mean() for wanted in (own, labels))
            print(f"{kind:16} {same:10.1f} % {right:7.1f} %", flush=True)
            sheet += [*seen[:12].numpy()]
    if arguments.sheet:
        names = [name for kind in ("original", *KINDS) for name in [kind, *[""] * 11]]
        drawing = figures.images(np.stack(sheet), names, title="what the net sees", columns=12)
        figures.save({arguments.sheet.stem: drawing}, arguments.sheet.parent)


if __name__ == "__main__":
    main()
