"""Fit and apply how sure a net may be of its answers.

This is a temperature for its probabilities, the least probability that counts as an answer, and a measure of
how much an image looks like the training images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from mnist_lightning.classifier import DigitClassifier, Probabilities
from mnist_lightning.data import Images
from mnist_lightning.evaluation import likeness

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEPT = 0.99  # share of the correctly read validation images that get no mark
ANSWERED = 0.999  # share of them that are not "not sure", if a likeness tells the others
LIMITS = (0.05, 20.0)  # least and largest temperature


def fit_temperature(outputs: Tensor, labels: Tensor) -> float:
    """Find the temperature with the least mean cross-entropy, within ``LIMITS``.

    The method is temperature scaling: Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural
    Networks" (arXiv 1706.04599), section 4.2.  The loss is convex in the inverse of the temperature, so
    bisection by the sign of its slope finds the minimum.

    Args:
        outputs: (N, C) logits, N > 0.
        labels: (N,) int64.
    """
    logits = outputs.double() - outputs.double().amax(dim=1, keepdim=True)
    own = logits.gather(1, labels[:, None])[:, 0]
    low, high = 1 / LIMITS[1], 1 / LIMITS[0]
    for _ in range(40):
        middle = math.sqrt(low * high)
        slope = ((F.softmax(middle * logits, dim=1) * logits).sum(dim=1) - own).mean().item()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


@dataclass(frozen=True)
class Answers:
    """A net's answers for N images.

    Attributes:
        probabilities: (N, num_classes) float32.
        distances: (N,) float32, distance of each image from the training images of the predicted class; the
            limit is 1 (``likeness``).  None if the checkpoint has no likeness.
        told: for each image "sure", "not sure", or "no digit" ("no character" if the classes are not digits).
    """

    probabilities: "NDArray[np.float32]"
    distances: "NDArray[np.float32] | None"
    told: Sequence[str]


def answer(classifier: DigitClassifier, images: Tensor) -> Answers:
    """Classify images, and decide how sure each answer is.

    Args:
        classifier: a classifier from ``load_classifier``, with a logit for each class.
        images: (N, H, W) or (N, H, W, C) uint8 or float, in [0, 255], N > 0.
    """
    hidden, outputs = likeness.see(classifier, images)
    probabilities = classifier.to_probabilities(outputs)
    sure = (probabilities.amax(dim=1) >= classifier.sure).tolist()
    distances, nothing = None, ""
    if isinstance(classifier.likeness, likeness.Likeness):
        features = classifier.likeness.describe(classifier, images, hidden)
        distances = classifier.likeness.measure(features, probabilities).numpy()
        nothing = classifier.likeness.nothing
    far = [False] * len(sure) if distances is None else (distances > 1).tolist()
    told = [(nothing if away else "sure") if one else "not sure" for one, away in zip(sure, far, strict=True)]
    return Answers(probabilities.numpy(), distances, told)


def fit(outputs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Fit ``temperature`` and ``sure``, which a checkpoint keeps under "confidence".

    ``sure`` is the least probability that counts as an answer: the share ``KEPT`` of the correctly read
    images has a higher one.

    Args:
        outputs: outputs for the validation images, (N, C) logits.
        labels: their labels, (N,) int64.
    """
    temperature = fit_temperature(outputs, labels)
    highest, predictions = Probabilities(temperature)(outputs.double()).max(dim=1)
    right = highest[predictions == labels]
    return {"temperature": temperature, "sure": right.quantile(1 - KEPT).item() if len(right) else 0.0}


def fit_likeness(
    classifier: DigitClassifier, training: Images, validation: Images, temperature: float
) -> dict[str, Any]:
    """Fit ``likeness`` and with it ``sure``, for the checkpoint of a net for handwriting.

    The share ``KEPT`` of the correctly read validation images is neither "no digit" nor "not sure".  The
    result is empty if no validation image is read correctly.
    """
    found = likeness.fit(
        classifier, training, validation, temperature=temperature, kept=KEPT, answered=ANSWERED
    )
    return {} if found is None else {"likeness": found[0].pack(), "sure": found[1]}


def apply(classifier: DigitClassifier, checkpoint: dict[str, Any]) -> None:
    """Set a classifier's temperature, sure and likeness from its checkpoint; by default 1, 0 and None.

    Raises:
        ValueError: the checkpoint's values are out of range, or of another net.
    """
    kept = checkpoint.get("confidence", {"temperature": 1.0, "sure": 0.0})
    temperature, sure = float(kept["temperature"]), float(kept["sure"])
    if not (LIMITS[0] * 0.99 <= temperature <= LIMITS[1] * 1.01 and 0 <= sure <= 1):
        raise ValueError(f"its confidence is out of range: temperature {temperature}, sure {sure}")
    classifier.temperature, classifier.sure = temperature, sure
    if "likeness" in kept:
        classifier.likeness = likeness.unpack(kept["likeness"], classifier)
