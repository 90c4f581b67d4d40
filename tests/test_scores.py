import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_lightning.evaluation import scores


def test_wilson_interval_of_a_published_example() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    assert scores.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert scores.wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert scores.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert scores.wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(counts: tuple[int, int]) -> None:
    successes, trials = counts
    low, high = scores.wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_what_is_no_share(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} of {trials}"):
        scores.wilson_interval(successes, trials)


def test_mcnemar_is_the_fair_coin() -> None:
    assert scores.mcnemar(0, 0) == 1
    assert scores.mcnemar(5, 5) == 1
    assert scores.mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert scores.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert scores.mcnemar(12, 31) == scores.mcnemar(31, 12) == pytest.approx(0.00538, abs=5e-5)
    assert 0 <= scores.mcnemar(4_000, 6_000) < 1e-80  # large counts do not overflow or take long


def test_calibration_by_hand() -> None:
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, 1.0])
    hits = np.array([True, True, True, False, True, False, True])
    result = scores.calibration(confidences, hits, num_bins=10)
    assert result.counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 5]
    assert result.accuracies[[5, 9]] == pytest.approx([0.5, 0.8])
    assert result.confidences[[5, 9]] == pytest.approx([0.55, 0.96])
    assert math.isnan(result.accuracies[0])
    assert result.error == pytest.approx((2 * 0.05 + 5 * 0.16) / 7)


def test_calibration_agrees_with_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(5_000, 10, generator=generator), dim=1)
    labels = torch.randint(10, (5_000,), generator=generator)
    confidences, predictions = probabilities.max(dim=1)
    ours = scores.calibration(confidences.numpy(), (predictions == labels).numpy())
    theirs = multiclass_calibration_error(probabilities, labels, 10, n_bins=scores.NUM_BINS)
    assert ours.error == pytest.approx(float(theirs), abs=1e-5)


def test_class_scores_of_a_confusion_matrix() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    predictions = np.array([0, 0, 1, 1, 0, 0])
    confusion = scores.confusion_matrix(labels, predictions, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    result = scores.class_scores(confusion)
    assert result.precision[:2] == pytest.approx([2 / 4, 1 / 2])
    assert result.recall[:3] == pytest.approx([2 / 3, 1 / 2, 0])
    assert result.f1[:2] == pytest.approx([2 * 2 / 7, 2 * 1 / 4])
    assert math.isnan(result.precision[2])  # this class is never predicted
    assert math.isnan(result.recall[3])  # this class never occurs
    assert result.support.tolist() == [3, 2, 1, 0]
