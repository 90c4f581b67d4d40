"""What the data looks like:  python -m mnist_lightning.visualize [key=value …]"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from mnist_lightning import threads, workarounds
from mnist_lightning.cli import compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Data, Visualize, check, register

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
register()

NUM_IMAGES = 60  # of the grid: six rows of ten
NUM_DEFORMED, NUM_VARIANTS = 7, 9


def main() -> None:
    threads.wait_passively()
    workarounds.share_config_store()
    quote_paths(["data.data_dir", "output"])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="visualize")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        visualize(check(cfg, Visualize))


def visualize(settings: Visualize) -> None:
    """Draw the training images, their classes and their pixels.

    Raises:
        OSError: the data can't be read or fetched, or the output can't be written.
    """
    log.info("loading torch and Lightning …")
    from mnist_lightning import figures

    with threads.use(settings.threads or threads.most()):
        drawings, summary = draw(settings.data)
    for path in figures.save(drawings, Path(settings.output).expanduser()):
        print(path)
    print(f"\n{summary}")
    if settings.show:
        figures.show(drawings.values())


def draw(data: Data) -> "tuple[dict[str, Figure], str]":
    """The figures by name, and in a line what they are of.

    Raises:
        OSError: the data can't be read or fetched.
    """
    import torch

    from mnist_lightning import figures
    from mnist_lightning.data import MNISTDataModule, class_names
    from mnist_lightning.images.deform import Deformation
    from mnist_lightning.network import NUM_CLASSES

    datamodule = MNISTDataModule(**data.module_arguments(), seed=0)
    datamodule.prepare_data()
    datamodule.setup("fit")
    names = class_names(data.name)
    train = datamodule.training_digits()
    pixels = torch.bincount(train.images.flatten(), minlength=256).double()
    levels = torch.arange(256) / 255
    mean = float((pixels * levels).sum() / pixels.sum())
    std = float((pixels * (levels - mean) ** 2).sum() / pixels.sum()) ** 0.5
    counts = {
        name: torch.bincount(split.labels, minlength=NUM_CLASSES)
        for name, split in datamodule.splits.items()
        if len(split)
    }
    means = torch.stack(
        [train.images[train.labels == label].float().mean(dim=0) for label in range(NUM_CLASSES)]
    )
    kind = "upright training" if data.deskew else "training"
    drawings = {
        "digits": figures.digits(
            train.images[:NUM_IMAGES].numpy(),
            [names[label] for label in train.labels[:NUM_IMAGES].tolist()],
            title=f"{data.name}: the first {NUM_IMAGES} {kind} images",
        ),
        "class_counts": figures.class_counts({name: count.numpy() for name, count in counts.items()}, names),
        "mean_images": figures.mean_images(
            means.numpy(), names, title=f"{data.name}: mean {kind} image of each class"
        ),
        "pixels": figures.pixel_histogram(pixels.long().numpy(), mean=mean, std=std, title=data.name),
    }
    if data.augment.deforms:
        originals = train.images[:NUM_DEFORMED]
        deform = Deformation(**asdict(data.augment))
        variants = [originals.float(), *(deform(originals, number) for number in range(NUM_VARIANTS))]
        drawings["augmented"] = figures.digits(
            torch.stack(variants, dim=1).flatten(0, 1).numpy(),
            (["as it is"] + [""] * NUM_VARIANTS) * NUM_DEFORMED,
            title=f"{data.name}: {NUM_DEFORMED} {kind} images and {NUM_VARIANTS} deformations of each",
            columns=1 + NUM_VARIANTS,
        )
    sizes = ", ".join(f"{int(count.sum()):,} {name}" for name, count in counts.items())
    return drawings, f"{data.name}: {sizes} images; training pixels have mean {mean:.4f} and std {std:.4f}"


if __name__ == "__main__":
    main()
