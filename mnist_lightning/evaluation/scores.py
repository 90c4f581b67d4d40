"""Score predictions: accuracy with its interval, scores of each class, calibration, McNemar's test."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959964  # 97.5 % quantile of the normal distribution, for a two-sided interval of 95 %
NUM_BINS = 15  # number of bins of confidence, as in Guo et al. 2017

Labels = NDArray[np.integer]
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Calibration:
    """Confidence and accuracy of predictions in B equal bins of confidence.

    Attributes:
        counts: (B,) int64, number of predictions in each bin.
        confidences, accuracies: (B,) float64, means over each bin in [0, 1]; NaN for an empty bin.
        error: the expected calibration error, in [0, 1].
    """

    counts: NDArray[np.int64]
    confidences: Floats
    accuracies: Floats
    error: float


@dataclass(frozen=True)
class ClassScores:
    """Scores of C classes, (C,) each; NaN where a score is not defined, such as without predictions."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: NDArray[np.int64]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Compute Wilson's 95 % confidence interval of a share.

    It stays within [0, 1], and its level is right even near 1, where accuracies are.  Wilson 1927, "Probable
    Inference, the Law of Succession, and Statistical Inference", p. 212; Brown, Cai and DasGupta 2001,
    "Interval Estimation for a Binomial Proportion", recommend it.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: ``trials`` is 0, or ``successes`` is not in [0, trials].
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"no share: {successes} of {trials}")
    share, squared = successes / trials, Z_95**2
    center = (share + squared / (2 * trials)) / (1 + squared / trials)
    half = Z_95 / (1 + squared / trials) * math.sqrt(
        share * (1 - share) / trials + squared / (4 * trials**2)
    )  # fmt: skip
    # the interval of a share of 0 or 1 must include it in spite of rounding
    return 0.0 if successes == 0 else center - half, 1.0 if successes == trials else center + half


def confusion_matrix(labels: Labels, predictions: Labels, num_classes: int) -> NDArray[np.int64]:
    """Count label against prediction; rows are labels, columns predictions.  (N,), (N,) -> (C, C) int64"""
    pairs = labels.astype(np.int64) * num_classes + predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_scores(confusion: NDArray[np.int64]) -> ClassScores:
    """Compute precision, recall, F1 and support of each class from a (C, C) confusion matrix."""
    hits = np.diag(confusion).astype(float)
    predicted, support = confusion.sum(axis=0), confusion.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ClassScores(
            precision=hits / predicted,
            recall=hits / support,
            f1=2 * hits / (predicted + support),
            support=support,
        )


def calibration(confidences: Floats, hits: NDArray[np.bool_], *, num_bins: int = NUM_BINS) -> Calibration:
    """Compare confidence with accuracy in equal bins.

    The expected calibration error is the mean of |accuracy - confidence| over the bins, weighted by their
    counts: Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks" (arXiv
    1706.04599), equation 3.

    Args:
        confidences: (N,), probability of each predicted class, in [0, 1]; N > 0.
        hits: (N,), whether each prediction is right.
        num_bins: number of bins.
    """
    # bins are (lower, upper], as in the paper
    bins = np.clip(np.ceil(confidences.astype(float) * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidences = np.bincount(bins, weights=confidences, minlength=num_bins) / counts
        accuracies = np.bincount(bins, weights=hits, minlength=num_bins) / counts
    gaps = np.nan_to_num(np.abs(accuracies - mean_confidences))
    return Calibration(counts, mean_confidences, accuracies, float((counts * gaps).sum() / len(confidences)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute the exact two-sided p-value of McNemar's test that two classifiers err equally often.

    If they do, each image that only one of them reads correctly is like the toss of a fair coin.  McNemar
    1947, "Note on the sampling error of the difference between correlated proportions or percentages";
    Dietterich 1998, "Approximate Statistical Tests for Comparing Supervised Classification Learning
    Algorithms", section 3.1, uses it for classifiers.

    Args:
        only_first: number of images that only the first classifier reads correctly.
        only_second: number of images that only the second classifier reads correctly.

    Returns:
        The p-value, in [0, 1].
    """
    total = only_first + only_second
    ways_of_k = tail = 1  # integers, so that nothing is rounded before the end
    for k in range(min(only_first, only_second)):
        ways_of_k = ways_of_k * (total - k) // (k + 1)
        tail += ways_of_k
    ways: int = 2**total
    return min(1.0, 2 * tail / ways)


@dataclass(frozen=True)
class Evaluation:
    """A net's predictions for N images of C classes, and their scores.

    Attributes:
        labels, predictions: (N,) int64.
        probabilities: (N, C) float32.
        confusion: (C, C) int64; rows are labels, columns are predictions.
        loss: mean cross-entropy, without label smoothing and temperature.
        accuracy: share of correct predictions, in [0, 1].
        interval: Wilson's 95 % interval of the accuracy.
        scores: scores of each class.
        calibration: confidence against accuracy.
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    confusion: NDArray[np.int64]
    loss: float
    accuracy: float
    interval: tuple[float, float]
    scores: ClassScores
    calibration: Calibration

    @property
    def confidences(self) -> NDArray[np.float32]:
        """The probability of each prediction.  -> (N,) float32"""
        highest: NDArray[np.float32] = self.probabilities.max(axis=1)
        return highest

    def risk_coverage(self) -> tuple[Floats, Floats]:
        """Compute the risk-coverage curve: answer the n most confident images, for n = 1 … N.

        Returns:
            Coverage, the share of images that are answered, (N,) in (0, 1], rising; and risk, the share of
            the answered images that are misread, (N,) in [0, 1].
        """
        order = (-self.confidences).argsort(kind="stable")
        count = np.arange(1, len(order) + 1)
        wrong = np.cumsum((self.labels != self.predictions)[order])
        return count / len(order), wrong / count

    def worst(self, most: int) -> NDArray[np.int64]:
        """Return the indices of misread images, the most confident first.  -> (at most ``most``,) int64"""
        wrong = (self.labels != self.predictions).nonzero()[0]
        chosen: NDArray[np.int64] = wrong[(-self.confidences[wrong]).argsort(kind="stable")][:most]
        return chosen

    def doubtful(self) -> NDArray[np.int64]:
        """Return the indices of the misread images, the least probable label first.  -> (M,) int64

        If a net was not trained on the images, labels to which it gives a low probability are the most likely
        to be wrong: Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset
        Labels" (arXiv 1911.00068), section 3, where this probability is called self-confidence.
        """
        wrong = (self.labels != self.predictions).nonzero()[0]
        given = self.probabilities[wrong, self.labels[wrong]]
        chosen: NDArray[np.int64] = wrong[given.argsort(kind="stable")]
        return chosen


def score(
    labels: "NDArray[np.int64]", log_probabilities: "NDArray[np.float32]", temperature: float = 1.0
) -> Evaluation:
    """Score the predictions of a net.

    Args:
        labels: (N,) int64, N > 0.
        log_probabilities: (N, C) float32.
        temperature: number by which they are divided for the probabilities and the calibration, but not for
            the loss.
    """
    num_classes = log_probabilities.shape[1]
    predictions = log_probabilities.argmax(axis=1)
    tempered = np.exp(log_probabilities / np.float32(temperature))
    probabilities = tempered / tempered.sum(axis=1, keepdims=True)
    hits = predictions == labels
    confusion = confusion_matrix(labels, predictions, num_classes)
    return Evaluation(
        labels=labels,
        predictions=predictions,
        probabilities=probabilities,
        confusion=confusion,
        loss=-float(log_probabilities[np.arange(len(labels)), labels].mean(dtype=float)),
        accuracy=float(hits.mean()),
        interval=wilson_interval(int(hits.sum()), len(hits)),
        scores=class_scores(confusion),
        calibration=calibration(probabilities.max(axis=1), hits),
    )
