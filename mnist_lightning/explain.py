"""Explain a net's answers for single images:  python -m mnist_lightning.explain mistakes=12"""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from mnist_lightning import threads
from mnist_lightning.cli import CommandError, begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Explain, check
from mnist_lightning.images.known import draws_like_mnist
from mnist_lightning.rundir.find import find_checkpoint
from mnist_lightning.rundir.output import claim_output, shorten_stem
from mnist_lightning.rundir.outside import as_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

    from mnist_lightning.classifier import DigitClassifier
    from mnist_lightning.data import Images

log = logging.getLogger(__name__)


def main() -> None:
    begin()
    sys.argv[1:] = quote_paths(["images", "run", "checkpoint", "data_dir", "output"], sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="explain")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        failures = explain(check(cfg, Explain))
    if failures:
        sys.exit(1)


def explain(settings: Explain) -> int:
    """Print a sentence and draw a figure for each image.

    A picture that can't be read gets a line on stderr and does not stop the others.

    Returns:
        The number of pictures that can't be read.

    Raises:
        CommandError: the net is a regression, or an index is beyond the split.
        OSError: the checkpoint or the data can't be read, or the output can't be written.
    """
    path = find_checkpoint(settings.run, settings.checkpoint)
    log.info("loading torch and Lightning …")
    import torch

    from mnist_lightning import figures
    from mnist_lightning.evaluation import explanation
    from mnist_lightning.evaluation.trained import choose_threads, load_classifier, load_split

    classifier, checkpoint = load_classifier(path, trust=settings.trust)
    if not classifier.names_classes:
        raise CommandError(f"{path}: explain is for classifiers, and this net gives a number (a regression)")

    def load(split: str) -> "Images":
        return load_split(path, checkpoint, split, data_dir=settings.data_dir, trust=settings.trust)

    training = load("train")
    failures, drawings = 0, []
    found: list[tuple[str, Tensor, int | None]] = []
    with threads.use(choose_threads([classifier], len(training), settings.threads)):
        if settings.images:
            data = checkpoint["datamodule_hyper_parameters"]
            for name, given in _read_pictures(settings.images, classifier, data):
                if isinstance(given, str):
                    failures += 1
                    print(f"{as_text(name)}: {given}", file=sys.stderr, flush=True)
                else:
                    found.append((name, given, None))
        else:
            found += _choose_images(settings, classifier, load(settings.split))
        figure_names = [
            f"{number:03}_{shorten_stem(Path(name).stem)}"
            for number, (name, _, _) in enumerate(found, start=1)
        ]
        folder = claim_output(settings.output, "explain", [f"{name}.png" for name in figure_names])
        print(f"net: {as_text(str(path))}")
        images = [image for _, image, _ in found]
        nearest = explanation.find_nearest(classifier, torch.stack(images), training) if images else []
        for figure_name, (name, image, label), near in zip(figure_names, found, nearest, strict=True):
            one = explanation.explain(classifier, image, nearest=near)
            told = as_text(name) if label is None else f"{name}, a {classifier.class_names[label]}"
            print(f"{told}: {one}", flush=True)
            drawing = one.draw(title=f"{told}: {one}")
            figures.save({figure_name: drawing}, folder)
            if settings.show:
                drawings.append(drawing)
    method = f" ({one.method})" if found else ""
    total = len(found) + failures
    print(f"\n{len(found)} of {total} explained{method}; a figure for each is in {folder}")
    if settings.show:
        figures.show(drawings)
    return failures


def _read_pictures(
    names: list[str], classifier: "DigitClassifier", data: "dict[str, Any]"
) -> "Iterator[tuple[str, Tensor | str]]":
    """Yield each file's name, and its image as uint8 (H, W) or (H, W, 3) or why it can't be read."""
    import torch

    from mnist_lightning.images.handwriting import read_pixels
    from mnist_lightning.images.normalize import NoDigit
    from mnist_lightning.images.pictures import find_files

    as_mnist = draws_like_mnist(data)
    for file in [file for name in names for file in find_files(name)]:
        try:
            _, seen = read_pixels(file, classifier.image_shape, as_mnist=as_mnist)
        except (OSError, NoDigit, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            yield str(file), reason or type(error).__name__
        else:
            yield str(file), torch.from_numpy(seen.copy())


def _choose_images(
    settings: Explain, classifier: "DigitClassifier", split: "Images"
) -> "Iterator[tuple[str, Tensor, int]]":
    """Yield the images of a split that ``index`` or ``mistakes`` asks for: name, image and label.

    Raises:
        CommandError: an index is beyond the split, or no image is misread.
    """
    from mnist_lightning.evaluation.trained import compute_outputs

    indices = settings.index
    for index in indices:
        if index >= len(split):
            raise CommandError(f"index={index}: {settings.split} has images 0 to {len(split) - 1}")
    if settings.mistakes:
        probabilities = classifier.to_probabilities(compute_outputs(classifier, split.images))
        confidences, answers = probabilities.max(dim=1)
        wrong = (answers != split.labels).nonzero().squeeze(1)
        if not len(wrong):
            raise CommandError(f"mistakes={settings.mistakes}: no image of {settings.split} is misread")
        order = confidences[wrong].argsort(descending=True, stable=True)
        indices = wrong[order][: settings.mistakes].tolist()
    for index in indices:
        yield f"{settings.split} {index}", split.images[index], int(split.labels[index])


if __name__ == "__main__":
    main()
