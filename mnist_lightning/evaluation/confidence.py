"""How sure a net may be: a temperature for its probabilities, and the least probability that is an answer."""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mnist_lightning.classifier import DigitClassifier, Probabilities

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


def fit(outputs: Tensor, labels: Tensor) -> dict[str, float]:
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


def apply(classifier: DigitClassifier, checkpoint: dict[str, Any]) -> None:
    """Set a classifier's temperature and threshold from its checkpoint; 1 and 0 where it has none.

    Raises:
        ValueError: the file holds something else.
    """
    kept = checkpoint.get("confidence", {"temperature": 1.0, "sure": 0.0})
    temperature, sure = float(kept["temperature"]), float(kept["sure"])
    if not (LIMITS[0] * 0.99 <= temperature <= LIMITS[1] * 1.01 and 0 <= sure <= 1):
        raise ValueError(f"its confidence is out of range: {kept}")
    classifier.temperature, classifier.sure = temperature, sure
