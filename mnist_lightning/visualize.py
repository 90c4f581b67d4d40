"""Draw the data set, or the film of a training:  python -m mnist_lightning.visualize [key=value …]"""

import logging
import sys
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from mnist_lightning import threads
from mnist_lightning.cli import begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Data, Visualize, check
from mnist_lightning.rundir.find import find_checkpoint
from mnist_lightning.rundir.output import claim_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

NUM_IMAGES = 60  # number of images in the grid: six rows of ten
NUM_DEFORMED, NUM_VARIANTS = 7, 9


def main() -> None:
    begin()
    sys.argv[1:] = quote_paths(["data.data_dir", "data.path", "film", "output"], sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="visualize")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        visualize(check(cfg, Visualize))


def visualize(settings: Visualize) -> None:
    """Draw the training images, their classes and their pixels.

    Raises:
        OSError: the data can't be read or downloaded, or the output can't be written.
    """
    if settings.film is not None:
        visualize_film(settings)
        return
    log.info("loading torch and Lightning …")
    from mnist_lightning import figures

    with threads.use(settings.threads or threads.most()):
        drawings, summary = draw(settings.data)
    folder = claim_output(settings.output, "visualize", [f"{name}.png" for name in drawings])
    for path in figures.save(drawings, folder):
        print(path)
    print(f"\n{summary}")
    if settings.show:
        figures.show(drawings.values())


def visualize_film(settings: Visualize) -> None:
    """Draw the training of a run as an animated picture, ``film.gif``.

    Raises:
        OSError: the run, its checkpoint or its film can't be read, or the output can't be written.
    """
    assert settings.film is not None
    log.info("loading torch and Lightning …")
    from mnist_lightning import figures
    from mnist_lightning.rundir.checkpoint import load
    from mnist_lightning.rundir.film import find_film, read_film

    folder = find_film(settings.film)
    film = read_film(folder)
    names = load(find_checkpoint(str(folder)))["hyper_parameters"]["class_names"]
    path = claim_output(settings.output, "visualize", ["film.gif"]) / "film.gif"
    figures.save_animation(figures.film_frames(film, names, title=folder.name), path)
    print(f"{path}\n\n{folder}: {len(film.steps)} moments of {film.steps[-1]:,} steps")


def draw(data: Data) -> "tuple[dict[str, Figure], str]":
    """Draw the figures of a data set.

    Returns:
        The figures by name, and a line with the numbers of images and the pixels' mean and deviation.

    Raises:
        OSError: the data can't be read or downloaded.
    """
    import torch

    from mnist_lightning import figures
    from mnist_lightning.data import MNISTDataModule
    from mnist_lightning.images.preprocess import Preprocess

    datamodule = MNISTDataModule(**data.module_arguments(), seed=0)
    datamodule.prepare_data()
    datamodule.setup("fit")
    data.check_shape(datamodule.image_shape)
    names, in_colour = datamodule.class_names, datamodule.image_shape[0] > 1
    train = datamodule.splits["train"]
    preprocess = Preprocess(deskew=data.deskew, augment=data.preprocess_arguments()["augment"])

    def see(stored: torch.Tensor, key: tuple[int, ...] | None = None) -> torch.Tensor:
        """Preprocess images as for the net, without normalising.  -> (N, H, W) or (N, H, W, 3) uint8"""
        parts = [preprocess.to_pixels(batch, key).round().byte() for batch in torch.split(stored, 1_000)]
        return torch.cat(parts).permute(0, 2, 3, 1) if in_colour else torch.cat(parts)[:, 0]

    images = see(train.images)
    channels = images.reshape(-1, 3).T if in_colour else images.reshape(1, -1)
    pixels = torch.stack([torch.bincount(channel, minlength=256) for channel in channels]).double()
    levels = torch.arange(256) / 255
    mean = float((pixels * levels).sum() / pixels.sum())
    std = float((pixels * (levels - mean) ** 2).sum() / pixels.sum()) ** 0.5
    counts = {
        name: torch.bincount(split.labels, minlength=len(names))
        for name, split in datamodule.splits.items()
        if len(split)
    }
    means = torch.stack([images[train.labels == label].float().mean(dim=0) for label in range(len(names))])
    kind = "upright training" if data.deskew else "training"
    drawings = {
        "images": figures.images(
            images[:NUM_IMAGES].numpy(),
            [names[label] for label in train.labels[:NUM_IMAGES].tolist()],
            title=f"{data.name}: the first {min(NUM_IMAGES, len(train))} {kind} images",
        ),
        "class_counts": figures.class_counts({name: count.numpy() for name, count in counts.items()}, names),
        "mean_images": figures.mean_images(
            means.numpy(), names, title=f"{data.name}: mean {kind} image of each class"
        ),
        "pixels": figures.pixel_histogram(pixels.long().numpy(), mean=mean, std=std, title=data.name),
    }
    if data.augment.deforms:
        originals = train.images[:NUM_DEFORMED]
        variants = [see(originals), *(see(originals, (number,)) for number in range(NUM_VARIANTS))]
        drawings["augmented"] = figures.images(
            torch.stack(variants, dim=1).flatten(0, 1).numpy(),
            (["as it is"] + [""] * NUM_VARIANTS) * len(originals),
            title=f"{data.name}: {len(originals)} {kind} images and {NUM_VARIANTS} deformations of each",
            columns=1 + NUM_VARIANTS,
        )
    sizes = ", ".join(f"{int(count.sum()):,} {name}" for name, count in counts.items())
    return drawings, f"{data.name}: {sizes} images; training pixels have mean {mean:.4f} and std {std:.4f}"


if __name__ == "__main__":
    main()
