"""Whether an image looks like the training images of the class that the net gives it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import Images, eval_batch_size

POOL = 2  # pixels on a side that are averaged
UNITS = 128  # of the last hidden layer; more are folded into so many
IMAGES = 1_000  # of each class, from which its images are learned
DIRECTIONS = 32  # along which images of a class may differ from their mean
ROUNDS = 6  # of subspace iteration: more change no digit of the limit
DOUBT = 1 / 3  # of what tells images apart, the part of the answer's probability


@dataclass(frozen=True)
class Likeness:
    """For each class the images that it may have: a mean and directions around it.

    An image is described by features: its pixels, averaged in squares, and the last hidden layer, each scaled
    so that the training images vary by 1.  What is left of them beside the mean and the directions of its
    class, squared, is how far it is from that class: SIMCA, Wold 1976, "Pattern recognition by means of
    disjoint principal components models", Pattern Recognition 8(3).  To that comes the net's doubt, the
    negative logarithm of the answer's probability.

    Attributes:
        scales: by which pixels and hidden units are multiplied.
        means: (num_classes, F) float.
        directions: (num_classes, R, F) float, each class's orthonormal, or 0 where it has fewer.
        doubt: by which the negative logarithm is multiplied.
        limit: the largest distance of what looks like its class.
        nothing: what is beyond it: "no digit", of other classes than digits "no character".
    """

    scales: tuple[float, float]
    means: Tensor
    directions: Tensor
    doubt: float
    limit: float
    nothing: str

    def describe(self, classifier: DigitClassifier, images: Tensor, hidden: Tensor) -> Tensor:
        """Features, see above.  -> (N, F)"""
        pixels, units = pool(classifier, images), fold(hidden)
        return torch.cat([self.scales[0] * pixels, self.scales[1] * units], dim=1)

    def measure(self, features: Tensor, probabilities: Tensor) -> Tensor:
        """How far images are from their most probable class, as a share of the limit: above 1 they do not
        look like it.

        Args:
            features: (N, F)
            probabilities: (N, num_classes)

        Returns:
            (N,)
        """
        highest, labels = probabilities.max(dim=1)
        away = torch.empty(len(features))
        for label in sorted({*labels.tolist()}):
            own = labels == label
            away[own] = leftover(features[own] - self.means[label], self.directions[label])
        return (away - self.doubt * highest.clamp(min=1e-12).log()) / self.limit

    def pack(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            **{"scales": list(self.scales), "doubt": self.doubt, "limit": self.limit},
            **{"means": self.means.half(), "directions": self.directions.half()},
        }


def unpack(kept: Mapping[str, Any], classifier: DigitClassifier) -> Likeness:
    """
    Args:
        kept: see ``Likeness.pack``.

    Raises:
        ValueError, TypeError, KeyError: it is something else, or of another net.
    """
    first, second, doubt, limit = (float(x) for x in (*kept["scales"], kept["doubt"], kept["limit"]))
    means, directions = kept["means"].float(), kept["directions"].float()
    blank = torch.zeros(1, *classifier.image_shape[1:])
    width = pool(classifier, blank).shape[1] + fold(see(classifier, blank)[0]).shape[1]
    count = len(classifier.class_names)
    fits = means.shape == (count, width) and directions.ndim == 3 and directions.shape[::2] == (count, width)
    numbers = torch.tensor([first, second, doubt, limit])
    if not (fits and means.isfinite().all() and directions.isfinite().all() and numbers.isfinite().all()):
        raise ValueError("what it keeps of its training images is of another net")
    if limit <= 0:
        raise ValueError(f"the limit of its training images is {limit}")
    return Likeness((first, second), means, directions, doubt, limit, name_nothing(classifier))


def fit(
    classifier: DigitClassifier, training: Images, validation: Images, temperature: float, kept: float
) -> Likeness | None:
    """Learn what images of each class look like; None where no validation image is read correctly.

    Args:
        training: from whose first images of each class it is learned.
        validation: on which the limit is set.
        temperature: of the probabilities.
        kept: share of the validation images read correctly that are within the limit.
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
    means, directions = means.half().float(), directions.half().float()  # as they are kept
    nothing = name_nothing(classifier)
    likeness = Likeness((first, second), means, directions, 0.0, 1.0, nothing)
    hidden, outputs = see(classifier, validation.images)
    probabilities = (outputs.float() / temperature).softmax(dim=1)
    right = probabilities.argmax(dim=1) == validation.labels
    if not right.any():
        return None
    away = likeness.measure(likeness.describe(classifier, validation.images, hidden), probabilities)[right]
    doubts = -probabilities[right].amax(dim=1).clamp(min=1e-12).log()
    span, its = (float(values.quantile(kept) - values.median()) for values in (away, doubts))
    doubt = DOUBT * span / max(its, 1e-6)
    limit = float((away + doubt * doubts).quantile(kept))
    return Likeness((first, second), means, directions, doubt, max(limit, 1e-6), nothing)


def name_nothing(classifier: DigitClassifier) -> str:
    return "no digit" if all(map(str.isdigit, classifier.class_names)) else "no character"


def find_directions(rows: Tensor, count: int) -> Tensor:
    """The principal directions of centred rows, by subspace iteration.  (N, F) -> (at most count, F)"""
    count = min(count, len(rows) - 1)
    if count < 1:
        return rows[:0]
    basis = rows[:count].T
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis))[0]
    return basis.T


def leftover(offsets: Tensor, directions: Tensor) -> Tensor:
    """The squared length of what no direction explains.  (N, F), (R, F) -> (N,)"""
    return offsets.square().sum(dim=1) - (offsets @ directions.T).square().sum(dim=1)


def pool(classifier: DigitClassifier, images: Tensor) -> Tensor:
    """The pixels that the net sees, averaged in squares.  (N, H, W) in [0, 255] -> (N, H // 2 * W // 2)"""
    pixels = classifier.preprocess.to_pixels(images.to(classifier.device)).cpu()
    return F.avg_pool2d(pixels, POOL).flatten(1)


def fold(hidden: Tensor) -> Tensor:
    """Hidden units, of which each further ``UNITS`` are taken from and added to the first ones by turns: sums
    with random signs keep distances, and the units' order is random.  (N, U) -> (N, at most UNITS)"""
    groups = torch.split(hidden, UNITS, dim=1)
    folded: Tensor = groups[0].clone()
    for number, group in enumerate(groups[1:], start=1):
        folded[:, : group.shape[1]] += (-1) ** number * group
    return folded


def see(classifier: DigitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden layer and the outputs for each image.

    That layer is what goes into the net's last linear layer; of a net that has none, the pixels.

    (N, H, W) or (N, H, W, C) in [0, 255] -> (N, U) float32, (N, num_outputs), on the CPU
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
                outputs.append(classifier.net.forward(inputs).cpu())  # a compiled net would miss the hook
            finally:
                for handle in handles:
                    handle.remove()
            found = caught[-1] if caught and len(caught[-1]) == len(inputs) else inputs
            hidden.append(found.flatten(1).float().cpu())
    return torch.cat(hidden), torch.cat(outputs)


def _spread(rows: Tensor) -> float:
    """The root of the variances' sum.  (N, F)"""
    return max(float((rows - rows.mean(dim=0)).square().sum(dim=1).mean().sqrt()), 1e-6)
