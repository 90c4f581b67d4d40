"""What is in a picture?  python -m mnist_lightning.predict images=my_digit.png"""

import csv
import glob
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from mnist_lightning import threads
from mnist_lightning.cli import begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Predict, check
from mnist_lightning.images.known import KNOWN
from mnist_lightning.rundir.find import find_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image

log = logging.getLogger(__name__)


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
    folder = Path(settings.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"net: {path}")
    width = min(60, max(len(str(file)) for file in files))
    failures = 0
    drawings: dict[str, Figure] = {}
    computing = threads.use(choose_threads([classifier], 1, settings.threads))
    with computing, (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        header = ["file", "prediction", "probability", *(f"p({name})" for name in names)]
        writer.writerow(header if classes else ["file", "output"])
        for number, file in enumerate(files, start=1):
            try:
                picture, seen = read_pixels(file, classifier.image_shape, as_mnist=as_mnist)
            except (OSError, NoDigit, MemoryError) as error:
                failures += 1
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                print(f"{file}: {reason or type(error).__name__}", file=sys.stderr, flush=True)
                continue
            outputs = compute_outputs(classifier, torch.from_numpy(seen)[None])[0]
            if not classes:
                print(f"{file!s:{width}}  {outputs.item():.4f}", flush=True)
                writer.writerow([file, f"{outputs.item():.6f}"])
                continue
            probabilities = outputs.softmax(dim=0).numpy()
            best = int(probabilities.argmax())
            line = f"{names[best]}  {100 * probabilities[best]:5.1f} %"
            print(f"{file!s:{width}}  {line}", flush=True)
            writer.writerow(
                [file, names[best], f"{probabilities[best]:.6f}", *(f"{p:.6f}" for p in probabilities)]
            )
            picture.thumbnail((480, 480))
            drawing = figures.prediction(
                np.asarray(picture), seen, probabilities, names, title=f"{file.name}: {line}"
            )
            figures.save({f"{number:03}_{file.stem}": drawing}, folder)
            if settings.show:
                drawings[str(file)] = drawing
    done = len(files) - failures
    drawn = " and a figure for each" if classes else ""
    print(f"\n{done} of {len(files)} read; written to {folder}: predictions.csv{drawn}")
    if settings.show:
        figures.show(drawings.values())
    return failures


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
    path = Path(name).expanduser()
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
