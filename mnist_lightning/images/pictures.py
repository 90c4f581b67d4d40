"""Find picture files, and read their pixels."""

import glob
import os
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_lightning.rundir.outside import expand_home

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
MAX_PIXELS = 50_000_000  # as many as a large camera's photo has; as RGB they take 150 MB
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
TOO_MANY = f"too many pixels (at most {MAX_PIXELS:,}): make it smaller"
NO_PICTURE = f"no picture that can be read ({', '.join(FORMATS)})"


def read_picture(path: Path, *, size: tuple[int, int] | None, grey: bool) -> NDArray[np.uint8]:
    """Read the pixels of a picture's first frame, upright; transparent pixels become white.

    Args:
        path: a PNG, JPEG, BMP, TIFF, WebP or GIF file.
        size: (H, W) to resize to, without keeping the aspect ratio; None keeps the size.
        grey: whether to return grey values; otherwise RGB, also for a grey picture.

    Returns:
        (H, W) or (H, W, 3) uint8

    Raises:
        OSError: the file can't be read, is no such picture, or has more than ``MAX_PIXELS``.
    """
    picture = open_picture(path)
    if picture.mode == "F":
        raise OSError("its pixels are floats of unknown range: save it with 8 or 16 bits a pixel")
    if picture.mode.startswith("I"):  # 16 bits a pixel, sometimes read as 32
        pixels = np.asarray(picture, dtype=float) / 257
        picture = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    elif "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    picture = picture.convert("L" if grey else "RGB")
    if size is not None:
        picture = picture.resize(
            (size[1], size[0]), Image.Resampling.BILINEAR
        )  # averages all pixels that a new one covers
    return np.asarray(picture)


def open_picture(path: Path) -> Image.Image:
    """Decode a picture, and turn it upright by its Exif orientation.

    Raises:
        OSError: the file can't be read, is no picture of ``FORMATS``, or has more than ``MAX_PIXELS``.
    """
    if path.stat().st_size == 0:
        raise OSError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, and about sizes, which are checked here
        try:
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise OSError(
                        f"{width}×{height} pixels are too many (at most {MAX_PIXELS:,}): make it smaller"
                    )
                return ImageOps.exif_transpose(picture)
        except Image.DecompressionBombError as error:
            raise OSError(TOO_MANY) from error
        except UnidentifiedImageError as error:
            raise OSError(NO_PICTURE) from error
        except OSError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds for damaged files
            raise OSError(f"the picture is damaged: {error}") from error


def is_grey(path: Path) -> bool:
    """Whether a picture has no colours; only the beginning of its file is read.

    Raises:
        OSError: the file can't be read, or is no picture of ``FORMATS``.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.mode.split(";")[0] in GREY_MODES
    except Image.DecompressionBombError as error:
        raise OSError(TOO_MANY) from error
    except UnidentifiedImageError as error:
        raise OSError(NO_PICTURE) from error


def find_files(name: str) -> list[Path]:
    """Find the files that a name stands for: a file, the pictures of a folder, or the matches of a glob.

    A name that matches nothing is returned itself, so that reading it fails and is reported.

    Raises:
        FileNotFoundError: the name is a folder without pictures.
    """
    path = expand_home(name)
    if path.is_dir():
        pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not pictures:
            raise FileNotFoundError(f"images={name}: this folder has no picture ({', '.join(SUFFIXES)})")
        return pictures
    if path.exists():
        return [path]
    return [Path(match) for match in sorted(find_matches(path))] or [path]


def find_matches(pattern: Path) -> set[str]:
    """Return the names of all files that a pattern matches.

    ``**`` stands for folders of any depth, and follows no links, which may lead round in circles.
    """
    if "**" not in pattern.parts:
        return set(glob.glob(str(pattern)))
    place = pattern.parts.index("**")
    rest = pattern.parts[place + 1 :] or ("*",)
    found: set[str] = set()
    for start in find_matches(Path(*pattern.parts[:place])):
        for folder, inner, _ in os.walk(start):
            inner[:] = [name for name in inner if not name.startswith(".")]  # as * does
            found |= find_matches(Path(glob.escape(folder), *rest))
    return found
