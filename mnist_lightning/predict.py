"""What is in a picture?  python -m mnist_lightning.predict images=my_digit.png"""

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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

BOX = ("left", "top", "right", "bottom")  # columns of predictions.csv: of one digit among several, in pixels


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

    A file that can't be read gets a line on stderr, and the others go on.

    Returns:
        The number of such files.

    Raises:
        OSError: no checkpoint can be read, or the output can't be written.
    """
    from mnist_lightning.images.handwriting import read_pixels
    from mnist_lightning.images.normalize import NoDigit, normalize
    from mnist_lightning.images.pictures import find_files
    from mnist_lightning.images.several import read_several

    path = find_checkpoint(settings.run, settings.checkpoint)
    files = [file for name in settings.images for file in find_files(name)]
    log.info("loading torch and Lightning …")
    import numpy as np
    import torch

    from mnist_lightning import figures
    from mnist_lightning.evaluation.trained import (
        choose_device,
        choose_threads,
        compute_outputs,
        load_classifier,
    )

    classifier, checkpoint = load_classifier(path, trust=settings.trust)
    names, classes = classifier.class_names, classifier.names_classes
    data = checkpoint["datamodule_hyper_parameters"]
    as_mnist = draws_like_mnist(data)
    if settings.layout == "many" and not (as_mnist and classes):
        raise OSError("layout=many finds handwritten characters, and this net reads others: use layout=one")
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
        header = ["file", "prediction", "probability", "answer", *(f"p({name})" for name in names), *BOX]
        writer.writerow(map(as_cell, header) if classes else ["file", "output"])
        for file, figure_name in zip(files, figure_names, strict=True):
            shown = as_text(str(file))
            try:
                several = read_several(file, settings.layout) if as_mnist and classes else None
                if several is None:
                    picture, seen = read_pixels(file, classifier.image_shape, as_mnist=as_mnist)
            except (OSError, NoDigit, MemoryError) as error:
                failures += 1
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                print(f"{shown}: {as_text(reason) or type(error).__name__}", file=sys.stderr, flush=True)
                continue
            if several is not None:
                picture, digits = several
                stored = torch.from_numpy(np.stack([normalize(digit.ink) for digit in digits]))
                each = classifier.to_probabilities(compute_outputs(classifier, stored)).numpy()
                answers = [names[one] for one in each.argmax(axis=1)]
                sure = each.max(axis=1) >= classifier.sure
                marked = [answer + "?" * (not one) for answer, one in zip(answers, sure, strict=True)]
                for row in range(digits[-1].row + 1):
                    texts = [text for text, digit in zip(marked, digits, strict=True) if digit.row == row]
                    print(f"{'' if row else shown:{width}}  {as_text(' '.join(texts))}", flush=True)
                for digit, answer, one, row_of in zip(digits, answers, sure, each, strict=True):
                    told = (f"{row_of.max():.6f}", "sure" if one else "not sure")
                    numbers = [f"{p:.6f}" for p in row_of]
                    writer.writerow([as_cell(str(file)), as_cell(answer), *told, *numbers, *digit.box])
                boxes = [digit.box for digit in digits]
                title = f"{file.name}: {len(digits)} digits"
                drawing = figures.several(np.asarray(picture), boxes, marked, title=title)
                figures.save({figure_name: drawing}, folder)
                if settings.show:
                    drawings[str(file)] = drawing
                continue
            outputs = compute_outputs(classifier, torch.from_numpy(seen)[None])[0]
            if not classes:
                print(f"{shown:{width}}  {outputs.item():.4f}", flush=True)
                writer.writerow([as_cell(str(file)), f"{outputs.item():.6f}"])
                continue
            probabilities = classifier.to_probabilities(outputs[None])[0].numpy()
            best = int(probabilities.argmax())
            line = f"{names[best]}  {100 * probabilities[best]:5.1f} %"
            is_sure = bool(probabilities[best] >= classifier.sure)
            if not is_sure:
                second = int(probabilities.argsort()[-2])
                line += f"  not sure: perhaps {names[second]}, {100 * probabilities[second]:.1f} %"
            print(f"{shown:{width}}  {line}", flush=True)
            numbers = [f"{p:.6f}" for p in probabilities]
            answer = "sure" if is_sure else "not sure"
            writer.writerow(
                [
                    as_cell(str(file)),
                    as_cell(names[best]),
                    f"{probabilities[best]:.6f}",
                    answer,
                    *numbers,
                    "",
                    "",
                    "",
                    "",
                ]
            )
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


if __name__ == "__main__":
    main()
