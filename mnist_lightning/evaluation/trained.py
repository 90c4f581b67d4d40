"""A trained net, read back from what its run left, and asked."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_lightning import threads
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import EVAL_BATCH_SIZE, Digits, MNISTDataModule, is_whole
from mnist_lightning.images.deform import Deformation
from mnist_lightning.network import IMAGE_SHAPE
from mnist_lightning.rundir.checkpoint import find_newest, load


def load_classifier(path: Path) -> tuple[DigitClassifier, dict[str, Any]]:
    """The net of a checkpoint, rebuilt from the checkpoint alone, and the checkpoint.

    Returns:
        The classifier, in eval mode and for inference only, and what the file holds.

    Raises:
        OSError: the file can't be read, or the net it describes is not the one it holds.
    """
    try:
        checkpoint = load(path)
    except OSError as error:
        try:
            other, _ = find_newest(path.parent, told=False)
        except OSError:
            raise error from None
        raise OSError(
            f"{error}; another net is never taken in silence: checkpoint={shlex.quote(str(other))} is whole"
        ) from error
    try:
        with torch.device("meta"):  # no memory is taken for weights that the file does not hold
            classifier = DigitClassifier(**checkpoint["hyper_parameters"])
        classifier.load_state_dict(checkpoint["state_dict"], strict=True, assign=True)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise OSError(f"{path} holds no net that can be rebuilt: {error}") from error
    return classifier.eval(), checkpoint


def load_split(path: Path, checkpoint: dict[str, Any], split: str, *, data_dir: str | None) -> Digits:
    """The images of a checkpoint's run, split as the run had them.

    Args:
        path: of the checkpoint, for the messages.
        checkpoint: what it holds.
        split: "train", "val" or "test".
        data_dir: where the data lies, made and filled where something is missing; None: where the run
            read it.  That path comes from a file that may be a stranger's: it is read, never written.

    Raises:
        OSError: the checkpoint does not tell its data, the data can't be read or fetched, or the run
            had no such split.
    """
    try:
        settings = dict(checkpoint["datamodule_hyper_parameters"])
        if data_dir is not None:
            settings["data_dir"] = data_dir
        datamodule = MNISTDataModule(**settings)
        known = datamodule.dataset
        if data_dir is not None:
            datamodule.prepare_data()
        elif not is_whole(known, datamodule.data_dir):
            raise OSError(
                f"{path} says that its data lies in {settings['data_dir']}, where it is not, or not whole:"
                f" data_dir=… says where it lies, or is to be put"
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OSError(f"{path} does not tell which data its net was trained on: {error}") from error
    datamodule.setup("fit")
    digits = datamodule.splits[split]
    if not len(digits):
        raise OSError(f"split={split}: the run had no such images of {known} (data.val_size=0)")
    return digits


def check_same_images(paths: Sequence[Path], splits: Sequence[Digits], name: str) -> None:
    """That all these runs have the same images in the split of this name.

    Raises:
        OSError: two have others.
    """
    first = splits[0]
    for path, other in zip(paths, splits, strict=True):
        same = len(other) == len(first) and torch.equal(other.images, first.images)
        if not (same and torch.equal(other.labels, first.labels)):
            raise OSError(
                f"{paths[0]} and {path} have other {name} images"
                " (data.name, data.val_size, data.split_seed): they can't be compared on them"
                + ("; split=test may do" if name == "val" else "")
            )


def choose_threads(classifiers: Sequence[DigitClassifier], num_images: int, wanted: int | None) -> int:
    """The number of threads for ``log_probabilities`` of each of these nets."""
    size = min(num_images, EVAL_BATCH_SIZE)
    flops = [threads.count_flops(classifier.net, IMAGE_SHAPE, size) for classifier in classifiers]
    return threads.choose(max(flops), wanted=wanted)


def log_probabilities(
    classifier: DigitClassifier,
    images: Tensor,
    *,
    deform: Deformation | None = None,
    tta: int = 0,
) -> Tensor:
    """What the net says of each image.  (N, 28, 28) uint8 or float, in [0, 255] -> (N, 10) float

    Args:
        deform: of test-time averaging, see ``make_deformation``; needed where ``tta`` > 0.
        tta: deformations of each image whose probabilities are averaged; 0: the image itself.
    """
    with torch.inference_mode():
        said = []
        for number, batch in enumerate(torch.split(images, EVAL_BATCH_SIZE)):
            if deform is None or tta == 0:
                said.append(F.log_softmax(classifier(batch), dim=1))
                continue
            variants = (deform(batch, number, variant) for variant in range(tta))
            said.append(average([F.log_softmax(classifier(variant), dim=1) for variant in variants]))
        return torch.cat(said)


def average(log_probabilities: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of the probabilities.  K times (N, C) -> (N, C)"""
    return torch.logsumexp(torch.stack(list(log_probabilities)), dim=0) - math.log(len(log_probabilities))


def make_deformation(path: Path, checkpoint: dict[str, Any]) -> Deformation:
    """The deformation that a checkpoint's net was trained with.

    Raises:
        OSError: it was trained with none.
    """
    augment = checkpoint["datamodule_hyper_parameters"].get("augment")
    if augment is None:
        raise OSError(
            f"{path} was trained without deformations (data.augment), and tta averages over those of the"
            " training: use tta=0"
        )
    return Deformation(**augment)
