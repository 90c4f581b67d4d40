import csv
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image
from processes import FORKS, Preloaded

from benchmarks.handwriting import KINDS, through_predict
from mnist_lightning.evaluation.trained import load_classifier, load_split, log_probabilities
from mnist_lightning.images.handwriting import read_image, to_mnist
from mnist_lightning.images.normalize import NoDigit
from mnist_lightning.images.pictures import MAX_PIXELS, SUFFIXES, find_files

NUM_DIGITS = 40  # of each kind; benchmarks/handwriting.py uses more, with a goal of 97 % for most kinds
QUICK = (
    "plain",
    "tiny",
    "rotated",
    "inverted",
    "transparent",
    "squared",
)  # tests of the others are marked slow


@pytest.fixture(scope="module")
def test_digits(trained_run: Path, data_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    path = trained_run / "checkpoints" / "best.ckpt"
    split = load_split(path, load_classifier(path)[1], "test", data_dir=str(data_dir))
    chosen = torch.from_numpy(np.random.default_rng(5).choice(10_000, NUM_DIGITS, replace=False))
    return split.images[chosen], split.labels[chosen]


@pytest.mark.parametrize("count", [10, pytest.param(NUM_DIGITS, marks=pytest.mark.reliability)])
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_pictures_of_digits_are_read_as_the_digits_are(
    kind: str, count: int, trained_run: Path, test_digits: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    classifier, _ = load_classifier(trained_run / "checkpoints" / "best.ckpt")
    images = test_digits[0][:count]
    random = np.random.default_rng(0)
    seen = np.stack([through_predict(KINDS[kind](image, random), tmp_path) for image in images.numpy()])
    own, read = (log_probabilities(classifier, x).argmax(dim=1) for x in (images, torch.from_numpy(seen)))
    assert (own == read).float().mean() >= 0.9


def test_an_mnist_image_itself_comes_back_almost_unchanged(
    test_digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    likeness = [
        np.corrcoef(to_mnist(Image.fromarray(image).convert("RGB")).ravel(), image.ravel())[0, 1]
        for image in test_digits[0].numpy()
    ]
    assert np.mean(likeness) > 0.95


@pytest.mark.parametrize("kind", ["white", "black", "noise", "gradient", "faint", "one pixel"])
def test_a_picture_without_a_digit_is_blank(kind: str) -> None:
    random = np.random.default_rng(0)
    pixels = np.full((120, 100, 3), 255.0)
    if kind == "black":
        pixels[:] = 0
    elif kind == "noise":
        pixels = 128 + random.normal(0, 20, pixels.shape)
    elif kind == "gradient":
        pixels -= np.linspace(0, 150, 100)[None, :, None]
    elif kind == "faint":
        pixels[40:80, 50:54] -= 3
    elif kind == "one pixel":
        pixels = pixels[:1, :1]
    with pytest.raises(NoDigit, match="blank"):
        to_mnist(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))


def draw_seven(side: int = 100) -> np.ndarray:
    """Draw a seven, dark on light: (side, side) uint8."""
    pixels = np.full((side, side), 255, dtype=np.uint8)
    pixels[20:28, 25:75] = 0
    for row in range(28, 85):
        column = 70 - (row - 28) // 2
        pixels[row, column : column + 8] = 0
    return pixels


def test_every_format_and_mode_gives_the_same_digit(tmp_path: Path) -> None:
    seven = draw_seven()
    grey = Image.fromarray(seven)
    rgba = Image.merge("RGBA", [Image.new("L", grey.size)] * 3 + [Image.fromarray(255 - seven)])
    light = Image.merge("RGBA", [Image.new("L", grey.size, 255)] * 3 + [Image.fromarray(255 - seven)])
    pictures = {
        "grey.png": grey,
        "rgb.bmp": grey.convert("RGB"),
        "photo.JPG": grey.convert("RGB"),
        "lossless.webp": grey.convert("RGB"),
        "palette.gif": grey.convert("P"),
        "bilevel.tiff": grey.convert("1"),
        "sixteen.png": Image.fromarray(seven.astype(np.uint16) * 200),
        "float.tiff": Image.fromarray(seven.astype(np.float32) / 3),
        "cmyk.jpg": grey.convert("CMYK"),
        "dark on nothing.png": rgba,
        "light on nothing.png": light,
        "two channels.png": rgba.convert("LA"),
    }
    wanted = to_mnist(grey.convert("RGB")).astype(float)
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        seen = to_mnist(read_image(tmp_path / name)).astype(float)
        assert np.abs(seen - wanted).mean() < 3, name


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    upright = Image.fromarray(draw_seven()).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was held sideways
    upright.rotate(90).save(tmp_path / "sideways.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "sideways.png")), np.asarray(upright))


def png(width: int, height: int) -> bytes:
    """Make a small PNG file that claims to have this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(0, 20), (20, 0)])
def test_pictures_without_pixels_are_refused(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "nothing.png"
    path.write_bytes(png(width, height))
    with pytest.raises(OSError, match="picture"):
        read_image(path)
    bitmap = struct.pack(
        "<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0
    )
    path.write_bytes(bitmap)
    with pytest.raises(OSError, match="picture"):
        read_image(path)


@pytest.mark.parametrize(("width", "height"), [(8_000, 8_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_bombs_are_refused_before_they_are_decoded(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height))
    with pytest.raises(OSError, match=f"at most {MAX_PIXELS:,}"):
        read_image(path)


def test_bad_files_are_told_and_the_others_go_on(trained_run: Path, tmp_path: Path, command: Run) -> None:
    odd = "a (1)=b,é #x.png"
    seven = Image.fromarray(draw_seven())
    seven.save(tmp_path / odd)
    seven.save(tmp_path / "last.jpg")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes((tmp_path / odd).read_bytes()[:150])
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    names = [odd, "empty.png", "text.png", "half.png", "bomb.png", "blank.png", "missing.png", "last.jpg"]
    done = command(
        "predict",
        f"images=[{','.join(names)}]",
        f"checkpoint={trained_run / 'checkpoints' / 'best.ckpt'}",
        "output=out (1)",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    told = dict(line.split(": ", 1) for line in done.stderr.splitlines())
    assert list(told) == names[1:-1]
    assert told["empty.png"] == "the file is empty"
    assert told["text.png"].startswith("no picture that can be read (PNG, JPEG")
    assert "truncated" in told["half.png"] or "damaged" in told["half.png"]
    assert "too many" in told["bomb.png"]
    assert told["blank.png"].startswith("blank")
    assert told["missing.png"] == "No such file or directory"
    assert "2 of 8 read" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out (1)" / "predictions.csv").open()))
    assert [row["file"] for row in rows] == [odd, "last.jpg"]
    for row in rows:
        assert float(row["probability"]) == max(float(row[f"p({digit})"]) for digit in range(10))
        assert sum(float(row[f"p({digit})"]) for digit in range(10)) == pytest.approx(1, abs=1e-5)
    figures = sorted(path.name for path in (tmp_path / "out (1)").glob("*.png"))
    assert figures == [f"001_{odd}", "008_last.png"]
    with Image.open(tmp_path / "out (1)" / figures[0]) as picture:
        assert picture.size[0] == 960
    assert not (tmp_path / "outputs").exists()


OTHER_FORMATS = {  # other formats that people rename to .png
    "pdf": b"%PDF-1.7\n%%EOF",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "html": b"<!DOCTYPE html><html></html>",
    "zip": b"PK\x05\x06" + bytes(18),
    "ps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "ppm": b"P6 40000 40000 255\n",
    "ico": b"\0\0\1\0\1\0" + bytes(16),
    "wav": b"RIFF\x24\0\0\0WAVEfmt ",
}


def mutate(content: bytes, kind: str, random: np.random.Generator) -> bytes:
    """Return a damaged copy of a picture's file."""
    changed = bytearray(content)
    if kind in ("one byte", "a tenth"):
        count = 1 if kind == "one byte" else len(content) // 10
        for position in random.integers(0, len(content), count):
            changed[position] ^= int(random.integers(1, 256))
    elif kind == "header":
        for position in random.integers(0, 40, 4):
            changed[position] = int(random.integers(256))
    elif kind == "size":  # the place of width and height in most formats
        start = int(random.integers(4, 30))
        changed[start : start + 8] = b"\x7f\xff\xff\xff" * 2
    elif kind == "cut":
        del changed[int(random.integers(len(content))) :]
    elif kind == "zeros":
        start = int(random.integers(len(content)))
        changed[start:] = bytes(len(content) - start)
    elif kind == "twice":
        changed += content[int(random.integers(len(content))) :]
    elif kind == "another format":
        return OTHER_FORMATS[str(random.choice(sorted(OTHER_FORMATS)))]
    return bytes(changed)


MUTATIONS = ("one byte", "a tenth", "header", "size", "cut", "zeros", "twice", "another format")


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.reliability)])
def test_mutated_pictures_are_read_or_named(
    count: int, trained_run: Path, preloaded: Preloaded, environment: dict[str, str], tmp_path: Path
) -> None:
    """Each picture gets a prediction or one line with its name, whatever the other pictures hold."""
    random = np.random.default_rng(count)
    seven = Image.fromarray(draw_seven()).convert("RGB")
    contents = []
    for suffix in SUFFIXES:
        seven.save(tmp_path / f"whole{suffix}")
        contents.append((suffix, (tmp_path / f"whole{suffix}").read_bytes()))
    (tmp_path / "pictures").mkdir()
    names = []
    for number in range(count):
        suffix, content = contents[number % len(contents)]
        kind = MUTATIONS[(number // len(contents) + number) % len(MUTATIONS)]
        names.append(f"{number:03}{suffix}")
        (tmp_path / "pictures" / names[-1]).write_bytes(mutate(content, kind, random))
    checkpoint = trained_run / "checkpoints" / "best.ckpt"
    arguments = ("images=pictures", f"checkpoint={checkpoint}", "output=out")
    process = preloaded.start("-m", "mnist_lightning.predict", *arguments, cwd=tmp_path, env=environment)
    _, errors = process.communicate()
    told = [line.split(": ", 1)[0] for line in errors.splitlines()]
    with (tmp_path / "out" / "predictions.csv").open() as file:
        read = [row["file"] for row in csv.DictReader(file)]
    assert sorted([*set(read), *told]) == [f"pictures/{name}" for name in names]
    assert read
    assert told
    assert process.returncode == 1
    if FORKS:
        assert process.peak < 1_500_000, "kilobytes: torch and matplotlib, and a picture of MAX_PIXELS"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "images must be a name, as in images=my_digit.png, got []"),
        (["images=x.png", "run=a", "checkpoint=b"], "run and checkpoint name two nets"),
        (["images=x.png"], "latest: no run under"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, command: Run
) -> None:
    done = command("predict", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.posix("symbolic links")
def test_links_in_a_circle_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "in/b.png", "in/deep/c.png", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("in/one", "in/two", "in/deep/three"):  # glob.glob would find 2^40 files
        (tmp_path / name).symlink_to(tmp_path)
    found = [tmp_path / name for name in ("a.png", "in/b.png", "in/deep/c.png")]
    assert find_files(f"{tmp_path}/**/*.png") == found
    assert find_files(f"{tmp_path}/i*/**/*.png") == found[1:]
    assert find_files(f"{tmp_path}/**/deep/**/*.png") == found[2:]
    monkeypatch.chdir(tmp_path)
    assert find_files("**/*.png") == [path.relative_to(tmp_path) for path in found]
    assert find_files("**/*.jpg") == [Path("**/*.jpg")]


def test_folders_and_globs_stand_for_their_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", "[1].png"):
        (tmp_path / name).touch()
    (tmp_path / "none").mkdir()
    found = [path.name for path in find_files(str(tmp_path))]
    assert found == ["[1].png", "a.JPG", "b.png"]
    assert [path.name for path in find_files(f"{tmp_path}/*.png")] == ["[1].png", "b.png"]
    assert [path.name for path in find_files(f"{tmp_path}/[1].png")] == ["[1].png"]
    assert [path.name for path in find_files(f"{tmp_path}/c.png")] == ["c.png"]
    with pytest.raises(FileNotFoundError, match="this folder has no picture"):
        find_files(str(tmp_path / "none"))


def test_the_benchmark_explains_itself(python: Run, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "handwriting.py"
    done = python(str(script), "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--digits" in done.stdout
