"""How sure a net may be: a temperature for its probabilities, the least probability that is an answer, and
what looks like its training images at all."""

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

KEPT = 0.99  # of the validation images that are read correctly, this share stays an answer
LIMITS = (0.05, 20.0)  # of a temperature


def fit_temperature(outputs: Tensor, labels: Tensor) -> float:
    """The temperature at which the mean cross-entropy is least.

    Temperature scaling: Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks"
    (arXiv 1706.04599), section 4.2.  The loss is convex in the inverse of the temperature, so that halving an
    interval by the slope's sign finds the minimum.

    Args:
        outputs: (N, C) logits, N > 0.
        labels: (N,) int64.

    Returns:
        Within ``LIMITS``.
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
    """What a net says of images.

    Attributes:
        probabilities: (N, num_classes) float32.
        distances: (N,) float32 to what the class of the answer looks like, 1 is the limit; None: the net's
            checkpoint does not tell (``likeness``).
        told: (N,) each "sure", "not sure", or "no digit", of other classes than digits "no character".
    """

    probabilities: "NDArray[np.float32]"
    distances: "NDArray[np.float32] | None"
    told: Sequence[str]


def answer(classifier: DigitClassifier, images: Tensor) -> Answers:
    """The classes of images, and how sure they are.

    Args:
        classifier: as ``load_classifier`` gives it, with a logit for each class.
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
    """Fit what a checkpoint keeps under "confidence".

    ``temperature``, and ``sure``, the least probability with which a class is an answer: ``KEPT`` of the
    images that are read correctly have more.

    Args:
        outputs, labels: of the validation images, see ``fit_temperature``.
    """
    temperature = fit_temperature(outputs, labels)
    highest, predictions = Probabilities(temperature)(outputs.double()).max(dim=1)
    right = highest[predictions == labels]
    return {"temperature": temperature, "sure": right.quantile(1 - KEPT).item() if len(right) else 0.0}


def fit_likeness(
    classifier: DigitClassifier, training: Images, validation: Images, temperature: float
) -> dict[str, Any]:
    """What it keeps besides of a net whose pictures are drawn by hand: ``likeness``, within whose limit are
    ``KEPT`` of the validation images that are read correctly."""
    found = likeness.fit(classifier, training, validation, temperature, KEPT)
    return {} if found is None else {"likeness": found.pack()}


def apply(classifier: DigitClassifier, checkpoint: dict[str, Any]) -> None:
    """Set what a classifier's checkpoint keeps; 1, 0 and None where it has nothing.

    Raises:
        ValueError: the file holds something else.
    """
    kept = checkpoint.get("confidence", {"temperature": 1.0, "sure": 0.0})
    temperature, sure = float(kept["temperature"]), float(kept["sure"])
    if not (LIMITS[0] * 0.99 <= temperature <= LIMITS[1] * 1.01 and 0 <= sure <= 1):
        raise ValueError(f"its confidence is out of range: temperature {temperature}, sure {sure}")
    classifier.temperature, classifier.sure = temperature, sure
    if "likeness" in kept:
        classifier.likeness = likeness.unpack(kept["likeness"], classifier)
