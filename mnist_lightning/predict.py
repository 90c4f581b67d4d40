"""What is in a picture?  python -m mnist_lightning.predict images=my_digit.png"""

import csv
import glob
import io
import logging
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from mnist_lightning import threads
from mnist_lightning.cli import begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Predict, check
from mnist_lightning.images.known import KNOWN
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.find import find_checkpoint
from mnist_lightning.rundir.output import claim_output
from mnist_lightning.rundir.outside import as_cell, as_text, expand_home

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image

log = logging.getLogger(__name__)

LONGEST_NAME = 200  # bytes of a file's name, with room for what is put before and behind it


def main() -> None:
    begin()
    sys.argv[1:] = quote_paths(["images", "run", "checkpoint", "output"], sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="predict")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        failures = predict(check(cfg, Predict))
    if failures:
        sys.exit(1)


def predict(settings: Predict) -> int:
    """Read each picture; print, write and draw what the net says of it.

    A file that can't be read gets a line on stderr, and the others go on.

    Returns:
        The number of such files.

    Raises:
        OSError: no checkpoint can be read, or the output can't be written.
    """
    from mnist_lightning.images.handwriting import NoDigit
    from mnist_lightning.images.pictures import SUFFIXES

    path = find_checkpoint(settings.run, settings.checkpoint)
    files = [file for name in settings.images for file in find_files(name, SUFFIXES)]
    log.info("loading torch and Lightning …")
    import numpy as np
    import torch

    from mnist_lightning import figures
    from mnist_lightning.evaluation.trained import choose_threads, compute_outputs, load_classifier

    classifier, checkpoint = load_classifier(path, trust=settings.trust)
    names, classes = classifier.class_names, classifier.names_classes
    data = checkpoint["datamodule_hyper_parameters"]
    known = KNOWN.get(str(data.get("name"))) if data.get("source") is None else None
    as_mnist = known is not None and known.handwriting
    figure_names = [f"{number:03}_{shorten(file.stem)}" for number, file in enumerate(files, start=1)]
    written = ["predictions.csv", *(f"{name}.png" for name in figure_names if classes)]
    folder = claim_output(settings.output, "predict", written)
    print(f"net: {as_text(str(path))}")
    width = min(60, max(len(as_text(str(file))) for file in files))
    failures = 0
    drawings: dict[str, Figure] = {}
    computing = threads.use(choose_threads([classifier], 1, settings.threads))
    with computing, write_table(folder / "predictions.csv") as writer:
        header = ["file", "prediction", "probability", *(f"p({name})" for name in names)]
        writer.writerow(map(as_cell, header) if classes else ["file", "output"])
        for file, figure_name in zip(files, figure_names, strict=True):
            shown = as_text(str(file))
            try:
                picture, seen = read_pixels(file, classifier.image_shape, as_mnist=as_mnist)
            except (OSError, NoDigit, MemoryError) as error:
                failures += 1
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                print(f"{shown}: {as_text(reason) or type(error).__name__}", file=sys.stderr, flush=True)
                continue
            outputs = compute_outputs(classifier, torch.from_numpy(seen)[None])[0]
            if not classes:
                print(f"{shown:{width}}  {outputs.item():.4f}", flush=True)
                writer.writerow([as_cell(str(file)), f"{outputs.item():.6f}"])
                continue
            probabilities = outputs.softmax(dim=0).numpy()
            best = int(probabilities.argmax())
            line = f"{names[best]}  {100 * probabilities[best]:5.1f} %"
            print(f"{shown:{width}}  {line}", flush=True)
            numbers = [f"{p:.6f}" for p in (probabilities[best], *probabilities)]
            writer.writerow([as_cell(str(file)), as_cell(names[best]), *numbers])
            picture.thumbnail((480, 480))
            drawing = figures.prediction(
                np.asarray(picture), seen, probabilities, names, title=f"{file.name}: {line}"
            )
            figures.save({figure_name: drawing}, folder)
            if settings.show:
                drawings[str(file)] = drawing
    done = len(files) - failures
    drawn = " and a figure for each" if classes and done else ""
    print(f"\n{done} of {len(files)} read; written to {folder}: predictions.csv{drawn}")
    if settings.show:
        figures.show(drawings.values())
    return failures


@contextmanager
def write_table(path: Path) -> "Iterator[Any]":
    """A CSV writer whose rows are in the file at the end, whatever ends it."""
    text = io.StringIO(newline="")
    try:
        yield csv.writer(text)
    finally:
        write_atomic(path, text.getvalue().encode())


def shorten(stem: str) -> str:
    """A file's name for that of its figure: letters that every file system takes, and not too many."""
    text = "".join("_" if one in '<>:"/\\|?*' else one for one in as_text(stem))
    return text.encode()[:LONGEST_NAME].decode(errors="ignore")


def read_pixels(
    file: Path, image_shape: "Sequence[int]", *, as_mnist: bool
) -> "tuple[Image, NDArray[np.uint8]]":
    """A picture, for people to look at, and the image that is made of it for a net.

    Args:
        image_shape: (C, H, W) of the net's images.
        as_mnist: whether these were made as MNIST's digits: ink, in a box, in the middle.  Else the picture
            is resized, as ``data=folder`` does it.

    Returns:
        The picture, RGB, and (H, W) or (H, W, 3) uint8.

    Raises:
        OSError: the file can't be read.
        NoDigit: nothing stands out from the background.
    """
    from mnist_lightning.images.handwriting import read_image, to_mnist
    from mnist_lightning.images.pictures import read_picture

    picture = read_image(file)
    if as_mnist:
        return picture, to_mnist(picture)
    channels, height, width = image_shape
    return picture, read_picture(file, size=(height, width), grey=channels == 1)


def find_files(name: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a name stands for: itself, a folder's pictures, or what a glob matches.

    A name that matches nothing stands for itself, so that it is told with the files that fail.
    """
    path = expand_home(name)
    if path.is_dir():
        pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
        if not pictures:
            raise FileNotFoundError(f"images={name}: no picture lies in this folder ({', '.join(suffixes)})")
        return pictures
    if path.exists():
        return [path]
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] or [path]


if __name__ == "__main__":
    main()
