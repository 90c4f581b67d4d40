"""Test whether one setting is better than another on the same images; for two nets, see scores.mcnemar."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def sign_flip(differences: "np.ndarray") -> float:
    """Compute the two-sided p-value of the exact sign-flip test on paired differences.

    If two settings are equally good, each difference has either sign with probability 1/2: Fisher 1935, "The
    Design of Experiments", section 21.  For differences of -1, 0 and 1, this is McNemar's exact test.

    Args:
        differences: (N,) integers.  For each image, it is the number of seeds with which the first setting
            classifies it correctly, minus that number of the second setting.

    Returns:
        The p-value, in [0, 1].
    """
    import numpy as np

    observed = abs(int(differences.sum()))
    sizes = np.bincount(np.abs(differences))
    distribution = np.ones(1)  # of the sum of all |differences| with random signs
    for size, count in enumerate(sizes):
        if size and count:
            binomial = np.zeros(2 * size * count + 1)
            k = np.arange(count)
            logs = np.concatenate([[0.0], np.cumsum(np.log(count - k) - np.log(k + 1))])
            binomial[:: 2 * size] = np.exp(logs - count * math.log(2))
            distribution = np.convolve(distribution, binomial)
    middle = len(distribution) // 2
    if observed == 0:
        return 1.0
    return min(1.0, 2 * float(distribution[middle + observed :].sum()))


def holm(p_values: list[float]) -> list[float]:
    """Adjust p-values for their number by the method of Holm 1979, Scandinavian Journal of Statistics 6."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted
