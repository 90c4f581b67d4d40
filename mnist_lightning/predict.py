"""Predict the digits in pictures:  python -m mnist_lightning.predict images=my_digit.png"""

import csv
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
from mnist_lightning.images.known import draws_like_mnist
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.find import find_checkpoint
from mnist_lightning.rundir.output import claim_output, shorten_stem
from mnist_lightning.rundir.outside import as_cell, as_text
from mnist_lightning.rundir.signals import time_limit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL import Image

    from mnist_lightning.images.several import Found

log = logging.getLogger(__name__)

MOST_SECONDS = 20  # time limit for reading a file and finding its digits
MARKS = {"sure": "", "not sure": "?"}  # printed after a digit among several
BOX = ("left", "top", "right", "bottom")  # columns of predictions.csv: place of a digit, in pixels


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
    """Read each picture; print, write and draw the net's answer.

    A file that can't be read gets a line on stderr and does not stop the others.

    Returns:
        The number of files that can't be read.

    Raises:
        OSError: the checkpoint can't be read, or the output can't be written.
    """
    from mnist_lightning.images.normalize import NoDigit
    from mnist_lightning.images.pictures import find_files

    path = find_checkpoint(settings.run, settings.checkpoint)
    files = [file for name in settings.images for file in find_files(name)]
    log.info("loading torch and Lightning …")
    import numpy as np
    import torch

    from mnist_lightning import figures
    from mnist_lightning.evaluation import confidence
    from mnist_lightning.evaluation.trained import (
        choose_device,
        choose_threads,
        compute_outputs,
        load_classifier,
    )

    classifier, checkpoint = load_classifier(path, trust=settings.trust)
    names, classes = classifier.class_names, classifier.names_classes
    as_mnist = draws_like_mnist(checkpoint["datamodule_hyper_parameters"])
    if settings.layout == "many" and not (as_mnist and classes):
        raise OSError("layout=many needs a net for handwritten digits or letters: use layout=one")
    layout = settings.layout if classes else "one"
    figure_names = [f"{number:03}_{shorten_stem(file.stem)}" for number, file in enumerate(files, start=1)]
    written = ["predictions.csv", *(f"{name}.png" for name in figure_names if classes)]
    folder = claim_output(settings.output, "predict", written)
    print(f"net: {as_text(str(path))}")
    width = min(60, max(len(as_text(str(file))) for file in files))
    failures = 0
    drawings: dict[str, Figure] = {}
    computing = threads.use(choose_threads([classifier], 1, settings.threads))
    device = choose_device(settings.device)
    with computing, write_table(folder / "predictions.csv") as writer:
        classifier.to(device)
        header = ["file", "prediction", "probability", "answer", "distance"]
        header += [*(f"p({name})" for name in names), *BOX]
        writer.writerow(map(as_cell, header) if classes else ["file", "output"])
        for file, figure_name in zip(files, figure_names, strict=True):
            shown = as_text(str(file))
            try:
                with time_limit(MOST_SECONDS):
                    picture, seen, digits = look(file, classifier.image_shape, layout, as_mnist=as_mnist)
            except (OSError, NoDigit, MemoryError) as error:
                failures += 1
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                print(f"{shown}: {as_text(reason) or type(error).__name__}", file=sys.stderr, flush=True)
                continue
            if not classes:
                output = compute_outputs(classifier, torch.from_numpy(seen)).item()
                print(f"{shown:{width}}  {output:.4f}", flush=True)
                writer.writerow([as_cell(str(file)), f"{output:.6f}"])
                continue
            said = confidence.answer(classifier, torch.from_numpy(seen))
            read = [names[label] for label in said.probabilities.argmax(axis=1)]
            for number, (name, told, probabilities) in enumerate(
                zip(read, said.told, said.probabilities, strict=True)
            ):
                distance = "" if said.distances is None else f"{said.distances[number]:.4f}"
                box = digits[number].box if digits else ("", "", "", "")
                row = [as_cell(str(file)), as_cell(name), f"{probabilities.max():.6f}", told, distance]
                writer.writerow([*row, *(f"{p:.6f}" for p in probabilities), *box])
            if digits:
                marked = [name + MARKS.get(told, "??") for name, told in zip(read, said.told, strict=True)]
                for row_number in range(digits[-1].row + 1):
                    texts = [
                        text for text, digit in zip(marked, digits, strict=True) if digit.row == row_number
                    ]
                    print(f"{'' if row_number else shown:{width}}  {as_text(' '.join(texts))}", flush=True)
                boxes, title = [digit.box for digit in digits], f"{file.name}: {len(digits)} digits"
                drawing = figures.several(np.asarray(picture), boxes, marked, title=title)
            else:
                probabilities = said.probabilities[0]
                line = f"{read[0]}  {100 * probabilities.max():5.1f} %"
                if said.told[0] != "sure":
                    second = int(probabilities.argsort()[-2])
                    line += f"  {said.told[0]}: perhaps {names[second]}, {100 * probabilities[second]:.1f} %"
                print(f"{shown:{width}}  {line}", flush=True)
                picture.thumbnail((480, 480))
                title = f"{file.name}: {line}"
                drawing = figures.prediction(np.asarray(picture), seen[0], probabilities, names, title=title)
            figures.save({figure_name: drawing}, folder)
            if settings.show:
                drawings[str(file)] = drawing
    done = len(files) - failures
    drawn = " and a figure for each" if classes and done else ""
    print(f"\n{done} of {len(files)} read; written to {folder}: predictions.csv{drawn}")
    if settings.show:
        figures.show(drawings.values())
    return failures


def look(
    file: Path, image_shape: "Sequence[int]", layout: str, *, as_mnist: bool
) -> "tuple[Image.Image, NDArray[np.uint8], list[Found]]":
    """Read a picture and prepare it for the net.

    Args:
        file: the picture's file.
        image_shape: (C, H, W) of the net's images.
        layout: "one", "many", or "auto", which decides by the picture.
        as_mnist: see ``read_pixels``.

    Returns:
        The picture, RGB; the net's images, (N, H, W) or (1, H, W, 3) uint8; and the digits that were found,
        an empty list if the picture is read as a single one.

    Raises:
        OSError: the file can't be read.
        NoDigit: nothing stands out from the background.
    """
    import numpy as np

    from mnist_lightning.images.handwriting import read_image, read_pixels, separate_ink, to_mnist
    from mnist_lightning.images.normalize import normalize
    from mnist_lightning.images.several import find_digits, holds_several

    if not as_mnist:
        picture, pixels = read_pixels(file, image_shape, as_mnist=False)
        return picture, pixels[None], []
    picture = read_image(file)
    if layout != "many":
        separated = separate_ink(picture)
        if layout == "one" or not holds_several(separated):
            return picture, to_mnist(picture, separated)[None], []
    digits = find_digits(picture)
    return picture, np.stack([normalize(digit.ink) for digit in digits]), digits


@contextmanager
def write_table(path: Path) -> "Iterator[Any]":
    """Yield a CSV writer, and write its rows to the file at the end, also after an error."""
    text = io.StringIO(newline="")
    try:
        yield csv.writer(text)
    finally:
        write_atomic(path, text.getvalue().encode())


if __name__ == "__main__":
    main()
