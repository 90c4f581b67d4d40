"""Files of pictures, as their pixels."""

import glob
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_lightning.rundir.outside import expand_home

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
MAX_PIXELS = 50_000_000  # a large camera's photo; decoded as RGB it takes 150 MB
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
TOO_MANY = f"too many pixels (at most {MAX_PIXELS:,}): make it smaller"
NO_PICTURE = f"no picture that can be read ({', '.join(FORMATS)})"


def read_picture(path: Path, *, size: tuple[int, int] | None, grey: bool) -> NDArray[np.uint8]:
    """A picture's pixels, upright, its first frame if it has several; transparent ones lie on white.

    Args:
        path: of a PNG, JPEG, BMP, TIFF, WebP or GIF.
        size: (H, W) to resize to, whatever its own aspect; None: as it is.
        grey: else in colour, whatever its file has.

    Returns:
        (H, W) or (H, W, 3) uint8

    Raises:
        OSError: the file can't be read, is no such picture, or is larger than ``MAX_PIXELS``.
    """
    picture = open_picture(path)
    if picture.mode == "F":
        raise OSError("its pixels are fractions of no known range: save it with 8 or 16 bits a pixel")
    if picture.mode.startswith("I"):  # 16 bits a pixel, sometimes read as 32
        pixels = np.asarray(picture, dtype=float) / 257
        picture = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    elif "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    picture = picture.convert("L" if grey else "RGB")
    if size is not None:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)  # a mean of all it covers
    return np.asarray(picture)


def open_picture(path: Path) -> Image.Image:
    """A picture, turned as its camera was held, decoded.

    Raises:
        OSError: the file can't be read, is no picture of ``FORMATS``, or has more than ``MAX_PIXELS``.
    """
    if path.stat().st_size == 0:
        raise OSError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata; sizes are judged here
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
    """Whether a picture has no colours; reads no more than the beginning of its file.

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
    """The files that a name stands for: itself, a folder's pictures, or what a glob matches.

    A name that matches nothing stands for itself, so that it is reported with the files that fail.
    """
    path = expand_home(name)
    if path.is_dir():
        pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not pictures:
            raise FileNotFoundError(f"images={name}: no picture lies in this folder ({', '.join(SUFFIXES)})")
        return pictures
    if path.exists():
        return [path]
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] or [path]
