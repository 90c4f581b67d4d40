"""Measure how much an image looks like the training images of its predicted class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import Images, eval_batch_size

POOL = 2  # side, in pixels, of the squares that are averaged
UNITS = 128  # most features from the last hidden layer; a larger layer is folded to so many
IMAGES = 1_000  # number of training images of each class to fit
DIRECTIONS = 32  # number of directions in which images of a class may differ from their mean
ROUNDS = 6  # iterations of the subspace method; more change no digit of the limit
DOUBT = 1 / 4  # weight of the answer's probability in the distance


@dataclass(frozen=True)
class Likeness:
    """Describe the images of each class by a mean and principal directions around it.

    The features of an image are its pixels, averaged in squares, and the last hidden layer, both scaled to a
    total variance of 1 over the training images.  The distance of an image from a class is the squared length
    of what the class's mean and directions leave over: SIMCA, Wold 1976, "Pattern recognition by means of
    disjoint principal components models", Pattern Recognition 8(3).  The net's doubt, the negative logarithm
    of the answer's probability, is added to it.

    Attributes:
        scales: factors for pixels and for hidden units.
        means: (num_classes, F) float.
        directions: (num_classes, R, F) float, orthonormal for each class; rows are 0 if it has fewer.
        doubt: factor for the negative logarithm.
        limit: the largest distance at which an image looks like its class.
        nothing: what images beyond the limit are called: "no digit", or "no character" if the classes are not
            digits.
    """

    scales: tuple[float, float]
    means: Tensor
    directions: Tensor
    doubt: float
    limit: float
    nothing: str

    def describe(self, classifier: DigitClassifier, images: Tensor, hidden: Tensor) -> Tensor:
        """Compute the features of images from their pixels and last hidden layer.

        Args:
            classifier: prepares the images.
            images: (N, H, W) in [0, 255].
            hidden: (N, U), see ``see``.

        Returns:
            (N, F) float
        """
        pixels, units = pool(classifier, images), fold(hidden)
        return torch.cat([self.scales[0] * pixels, self.scales[1] * units], dim=1)

    def measure(self, features: Tensor, probabilities: Tensor) -> Tensor:
        """Measure the distance of images from their most probable class, divided by the limit.

        An image with a distance above 1 does not look like the class.

        Args:
            features: (N, F), see ``describe``.
            probabilities: (N, num_classes).

        Returns:
            (N,) float
        """
        highest, labels = probabilities.max(dim=1)
        away = torch.empty(len(features))
        for label in sorted({*labels.tolist()}):
            own = labels == label
            away[own] = leftover(features[own] - self.means[label], self.directions[label])
        return (away - self.doubt * highest.clamp(min=1e-12).log()) / self.limit

    def pack(self) -> dict[str, Any]:
        """Return plain data and tensors (float16) for a checkpoint."""
        return {
            **{"scales": list(self.scales), "doubt": self.doubt, "limit": self.limit},
            **{"means": self.means.half(), "directions": self.directions.half()},
        }


def unpack(kept: Mapping[str, Any], classifier: DigitClassifier) -> Likeness:
    """Make a ``Likeness`` of the data in a checkpoint.

    Args:
        kept: what ``Likeness.pack`` returned.
        classifier: the net to which it belongs.

    Raises:
        ValueError, TypeError, KeyError: the data is something else, or of another net.
    """
    first, second, doubt, limit = (float(x) for x in (*kept["scales"], kept["doubt"], kept["limit"]))
    means, directions = kept["means"].float(), kept["directions"].float()
    blank = torch.zeros(1, *classifier.image_shape[1:])
    width = pool(classifier, blank).shape[1] + fold(see(classifier, blank)[0]).shape[1]
    count = len(classifier.class_names)
    fits = means.shape == (count, width) and directions.ndim == 3 and directions.shape[::2] == (count, width)
    numbers = torch.tensor([first, second, doubt, limit])
    if not (fits and means.isfinite().all() and directions.isfinite().all() and numbers.isfinite().all()):
        raise ValueError("its likeness of training images is of another net")
    if limit <= 0:
        raise ValueError(f"the limit of its likeness is {limit}")
    return Likeness((first, second), means, directions, doubt, limit, name_nothing(classifier))


def fit(
    classifier: DigitClassifier,
    training: Images,
    validation: Images,
    *,
    temperature: float,
    kept: float,
    answered: float,
) -> tuple[Likeness, float] | None:
    """Fit what images of each class look like, and the least probability that counts as an answer.

    Both are fitted together: the share ``kept`` of the correctly read validation images has a high enough
    probability and a distance within the limit.

    Args:
        classifier: the trained net.
        training: the first ``IMAGES`` images of each class are used.
        validation: the images that set the limit.
        temperature: temperature of the probabilities.
        kept: share of the correctly read validation images that pass both tests.
        answered: share of them that have the least probability, at least ``kept``.

    Returns:
        The likeness and the least probability; None if no validation image is read correctly.
    """
    chosen = torch.cat([(training.labels == k).nonzero()[:IMAGES, 0] for k in range(classifier.num_classes)])
    images, labels = training.images[chosen], training.labels[chosen]
    parts = pool(classifier, images), fold(see(classifier, images)[0])
    first, second = (1 / _spread(part) for part in parts)
    features = torch.cat([first * parts[0], second * parts[1]], dim=1)
    means = torch.zeros(classifier.num_classes, features.shape[1])
    directions = torch.zeros(classifier.num_classes, min(DIRECTIONS, *features.shape), features.shape[1])
    for label in sorted({*labels.tolist()}):
        own = features[labels == label]
        means[label] = own.mean(dim=0)
        found = find_directions(own - means[label], directions.shape[1])
        directions[label, : len(found)] = found
    means, directions = means.half().float(), directions.half().float()  # as a checkpoint stores them
    nothing = name_nothing(classifier)
    likeness = Likeness((first, second), means, directions, 0.0, 1.0, nothing)
    hidden, outputs = see(classifier, validation.images)
    probabilities = (outputs.float() / temperature).softmax(dim=1)
    right = probabilities.argmax(dim=1) == validation.labels
    if not right.any():
        return None
    away = likeness.measure(likeness.describe(classifier, validation.images, hidden), probabilities)[right]
    highest = probabilities[right].amax(dim=1)
    doubts = -highest.clamp(min=1e-12).log()
    span, its = (float(values.quantile(kept) - values.median()) for values in (away, doubts))
    doubt = DOUBT * span / max(its, 1e-6)
    least = float(highest.quantile(1 - answered))
    sure = highest >= least
    rest = min(1.0, kept / float(sure.double().mean()))  # of a few images, fewer than `kept` may be sure
    limit = float((away + doubt * doubts)[sure].quantile(rest))
    return Likeness((first, second), means, directions, doubt, max(limit, 1e-6), nothing), least


def name_nothing(classifier: DigitClassifier) -> str:
    return "no digit" if all(map(str.isdigit, classifier.class_names)) else "no character"


def find_directions(rows: Tensor, count: int) -> Tensor:
    """Find the principal directions of centred rows by subspace iteration.  (N, F) -> (at most count, F)"""
    count = min(count, len(rows) - 1)
    if count < 1:
        return rows[:0]
    basis = rows[:count].T
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis))[0]
    return basis.T


def leftover(offsets: Tensor, directions: Tensor) -> Tensor:
    """Compute the squared length of what the directions do not explain.  (N, F), (R, F) -> (N,)"""
    return offsets.square().sum(dim=1) - (offsets @ directions.T).square().sum(dim=1)


def pool(classifier: DigitClassifier, images: Tensor) -> Tensor:
    """Average the net's input in squares of pixels.  (N, H, W) in [0, 255] -> (N, C * (H // 2) * (W // 2))"""
    pixels = classifier.preprocess.to_pixels(images.to(classifier.device)).cpu()
    return F.avg_pool2d(pixels, POOL).flatten(1)


def fold(hidden: Tensor) -> Tensor:
    """Fold a large hidden layer to at most ``UNITS`` features.  (N, U) -> (N, at most UNITS)

    Each further group of ``UNITS`` is subtracted from or added to the first one, alternately.  Sums with
    random signs keep distances, and the order of the units is random.
    """
    groups = torch.split(hidden, UNITS, dim=1)
    folded: Tensor = groups[0].clone()
    for number, group in enumerate(groups[1:], start=1):
        folded[:, : group.shape[1]] += (-1) ** number * group
    return folded


def see(classifier: DigitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the last hidden layer and the outputs for each image.

    The last hidden layer is the input of the net's last linear layer or, without one, the net's input.

    (N, H, W) or (N, H, W, C) in [0, 255] -> (N, U) float32, (N, num_outputs), both on the CPU
    """
    linear = [layer for layer in classifier.net.modules() if isinstance(layer, nn.Linear)]
    hidden, outputs = [], []
    with torch.inference_mode():
        for batch in torch.split(images, eval_batch_size(classifier.image_shape)):
            caught: list[Tensor] = []
            inputs = classifier.preprocess(batch.to(classifier.device))
            handles = [
                layer.register_forward_pre_hook(lambda _, given: caught.append(given[0]))  # noqa: B023
                for layer in linear[-1:]
            ]
            try:
                outputs.append(
                    classifier.net.forward(inputs).cpu()
                )  # forward(), because a compiled net skips the hook
            finally:
                for handle in handles:
                    handle.remove()
            found = caught[-1] if caught and len(caught[-1]) == len(inputs) else inputs
            hidden.append(found.flatten(1).float().cpu())
    return torch.cat(hidden), torch.cat(outputs)


def _spread(rows: Tensor) -> float:
    """Compute the square root of the sum of the features' variances.  (N, F) -> float"""
    return max(float((rows - rows.mean(dim=0)).square().sum(dim=1).mean().sqrt()), 1e-6)
