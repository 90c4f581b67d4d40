"""Join the predictions of several folds' nets, each for the images on which it was not trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import Images, assign_folds
from mnist_lightning.evaluation.trained import average, load_split, log_probabilities


@dataclass(frozen=True)
class Judged:
    """Predictions for training images by nets that were trained without them.

    Attributes:
        images: the N training images that have predictions.
        indices: (N,) int64, their positions among all training images.
        log_probs: (N, C) float32, log-probabilities.
        missing: folds for which there is no net.
    """

    images: Images
    indices: Tensor
    log_probs: Tensor
    missing: list[int]


def join_folds(
    paths: Sequence[Path],
    loaded: Sequence[tuple[DigitClassifier, dict[str, Any]]],
    *,
    data_dir: str | None,
    trust: Any = None,
    tta: int = 0,
) -> Judged:
    """Predict each fold's images with its own net; nets of one fold, with other seeds, are averaged.

    Args:
        paths: the checkpoints.
        loaded: the result of ``load_classifier`` for each checkpoint.
        data_dir, trust: see ``load_split``.
        tta: see ``log_probabilities``.

    Raises:
        OSError: a net has no fold, or its folds are not those of the first net.
    """
    told = [dict(checkpoint["datamodule_hyper_parameters"]) for _, checkpoint in loaded]
    for path, settings in zip(paths, told, strict=True):
        if settings.get("num_folds") is None:
            raise OSError(f"{path} was trained without folds (data.num_folds)")
    all_images = {"num_folds": None, "fold": None, "train_size": None, "val_size": 0}
    whole = load_split(
        paths[0],
        loaded[0][1] | {"datamodule_hyper_parameters": told[0] | all_images},
        "train",
        data_dir=data_dir,
        trust=trust,
    )
    num_folds = int(told[0]["num_folds"])
    fold_of = assign_folds(whole.labels, num_folds, int(told[0]["split_seed"]))
    by_fold: dict[int, list[Tensor]] = {}
    for path, settings, (classifier, checkpoint) in zip(paths, told, loaded, strict=True):
        own = load_split(path, checkpoint, "val", data_dir=data_dir, trust=trust)
        members = fold_of == int(settings["fold"])
        if settings["num_folds"] != num_folds or not (
            len(own) == int(members.sum()) and torch.equal(own.images, whole.images[members])
        ):
            raise OSError(
                f"{paths[0]} and {path} divide their images in different ways (data.name, data.num_folds,"
                " data.split_seed): they can't be joined"
            )
        by_fold.setdefault(int(settings["fold"]), []).append(
            log_probabilities(classifier, own.images, tta=tta)
        )
    judged = torch.isin(fold_of, torch.tensor(sorted(by_fold)))
    log_probs = torch.zeros(len(fold_of), next(iter(by_fold.values()))[0].shape[1])
    for fold, of_its_nets in by_fold.items():
        log_probs[fold_of == fold] = average(of_its_nets)
    indices = judged.nonzero().squeeze(1)
    return Judged(
        images=Images(whole.images[indices], whole.labels[indices]),
        indices=indices,
        log_probs=log_probs[indices],
        missing=sorted(set(range(num_folds)) - by_fold.keys()),
    )
