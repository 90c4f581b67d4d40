import numpy as np
import pytest

from mnist_lightning.evaluation.scores import mcnemar
from mnist_lightning.evaluation.significance import holm, sign_flip


@pytest.mark.parametrize(("b", "c"), [(0, 1), (3, 3), (9, 1), (31, 12), (400, 350)])
def test_sign_flip_of_single_seeds_is_mcnemar(b: int, c: int) -> None:
    differences = np.array([1] * b + [-1] * c + [0] * 17)
    assert sign_flip(differences) == pytest.approx(mcnemar(b, c))


def test_sign_flip_counts_all_signs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        differences = rng.integers(-3, 4, size=9)
        signs = 1 - 2 * ((np.arange(2**9)[:, None] >> np.arange(9)) & 1)
        sums = np.abs(signs @ np.abs(differences))
        expected = np.mean(sums >= abs(differences.sum()))
        assert sign_flip(differences) == pytest.approx(expected)


def test_sign_flip_of_many_images_stays_exact() -> None:
    assert sign_flip(np.array([1] * 2600 + [-1] * 2400)) == pytest.approx(mcnemar(2600, 2400))
    assert 0 <= sign_flip(np.ones(5000, int)) < 1e-300 or sign_flip(np.ones(5000, int)) == 0


def test_holm() -> None:
    # by hand: 3 · 0.01 = 0.03; 2 · 0.03 = 0.06; 1 · 0.04 is less than the previous value, so 0.06
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
