"""Tests of preprocessing, from stored images to a net's input."""

from pathlib import Path

import pytest
import torch
from conftest import settle
from torch import nn

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.evaluation.trained import log_probabilities
from mnist_lightning.images.deform import Deformation, upright
from mnist_lightning.images.preprocess import Preprocess

STRONG = {"rotation": 30.0, "scale": 0.2, "shear": 30.0, "shift": 4.0, "elastic": 1.0, "smoothness": 5.0}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (32, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_it_normalises(images: torch.Tensor) -> None:
    preprocess = Preprocess(mean=0.1307, std=0.3081)
    expected = ((images.double() / 255 - 0.1307) / 0.3081).float()[:, None]
    torch.testing.assert_close(preprocess(images), expected)
    assert torch.equal(preprocess(images), preprocess(images.float()))
    assert not preprocess.state_dict(), "its arguments tell all"


def test_channels_come_first(images: torch.Tensor) -> None:
    coloured = torch.stack([images, 255 - images, images // 2], dim=3)
    seen = Preprocess().to_pixels(coloured)
    assert seen.shape == (32, 3, 28, 28)
    assert torch.equal(seen[:, 1], 255 - images.float())


def test_upright_in_training_as_in_evaluation(images: torch.Tensor) -> None:
    preprocess = Preprocess(deskew=True)
    expected = Preprocess()(upright(images[:, None].float())[:, 0])
    for training in (True, False):
        assert torch.equal(preprocess.train(training)(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(preprocess(images), expected), "moments are not rounded to bfloat16"


class Seen(nn.Module):
    """Return the first ten pixels of the input as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.detach())
        return self.weight * images.flatten(1)[:, :10]


def test_training_and_averaging_over_deformations_see_the_same(images: torch.Tensor) -> None:
    """Images are first set upright, then deformed; averaging shows the net the same images as a training step."""
    net = Seen()
    preprocess = Preprocess(deskew=True, augment=STRONG)
    classifier = DigitClassifier(net, preprocess=preprocess)
    classifier._step((images, torch.zeros(32, dtype=torch.int64)), (0, 0))
    log_probabilities(classifier.eval(), images, tta=1)
    trained, averaged = net.seen
    assert torch.equal(trained, averaged)
    assert torch.equal(trained, preprocess(images, (0, 0)))
    assert not torch.equal(trained, preprocess(images))


def test_upright_and_deformed_is_one_resampling() -> None:
    """The result equals that of two steps one after the other, except for the second blur."""
    smooth = torch.zeros(32, 28, 28)
    smooth[:, 10:18, 12:16] = 255
    smooth = torch.nn.functional.avg_pool2d(smooth, 5, stride=1, padding=2)  # blurred, leaning blots
    leaning = Deformation(rotation=0, scale=0, shear=25, shift=3, elastic=0, smoothness=5)(smooth[:, None], 1)
    both = Preprocess(deskew=True, augment=STRONG).to_pixels(leaning[:, 0], (3,))
    expected = Deformation(**STRONG)(upright(leaning), 3)
    assert (both - expected).abs().mean() < 1
    other = upright(Deformation(**STRONG)(leaning, 3))
    assert (both - other).abs().mean() > 10, "the other order is another thing"


@pytest.mark.parametrize("deskew", [False, True])
def test_without_a_key_nothing_is_drawn(images: torch.Tensor, deskew: bool) -> None:
    preprocess = Preprocess(deskew=deskew, augment=STRONG)
    assert torch.equal(preprocess(images), Preprocess(deskew=deskew)(images))


def test_its_defaults_are_those_of_the_yaml_file(tmp_path: Path) -> None:
    assert settle(tmp_path).data.preprocess_arguments() == Preprocess().arguments
