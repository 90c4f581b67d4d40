"""Explanations of a net's prediction: the parts sum to the logit, and each claim is computed by the net."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from matplotlib.text import Text
from PIL import Image
from torch import Tensor, nn

from mnist_lightning import load
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import Images
from mnist_lightning.evaluation.explanation import PARTS, ask, explain, find_nearest
from mnist_lightning.evaluation.trained import load_classifier, load_split
from mnist_lightning.images.preprocess import Preprocess
from mnist_lightning.network import FeedForward


def make(
    hidden: list[int], activation: str = "relu", norm: str = "none", *, deskew: bool = False
) -> DigitClassifier:
    torch.manual_seed(5)
    net = FeedForward(hidden, activation=activation, norm=norm, image_shape=(1, 10, 8), num_classes=4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    made = DigitClassifier(
        net,
        preprocess=Preprocess(mean=0.3, std=0.25, deskew=deskew),
        image_shape=(1, 10, 8),
        class_names=["a", "b", "c", "d"],
    )
    made.check()
    return made.eval()


def write_digit() -> Tensor:
    """Return a digit, (10, 8) uint8, with a margin."""
    image = torch.zeros(10, 8, dtype=torch.uint8)
    image[2:8, 3:5] = torch.randint(60, 256, (6, 2), generator=torch.Generator().manual_seed(1)).byte()
    return image


@pytest.mark.parametrize("hidden", [[], [7], [9, 6, 5]])
@pytest.mark.parametrize(
    ("activation", "norm"), [("relu", "none"), ("leaky_relu", "none"), ("relu", "batch")]
)
@pytest.mark.parametrize("deskew", [False, True])
def test_the_parts_of_a_net_of_bends_sum_to_the_logit(
    hidden: list[int], activation: str, norm: str, deskew: bool
) -> None:
    classifier, image = make(hidden, activation, norm if hidden else "none", deskew=deskew), write_digit()
    found = explain(classifier, image)
    assert found.is_exact
    assert found.method == "exact, relative to a blank image"
    with torch.inference_mode():
        blank, logits = classifier(torch.stack([torch.zeros_like(image), image]))
    torch.testing.assert_close(found.rest.float(), blank, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits.float(), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.rest + found.pixels.sum(dim=(1, 2)), found.logits, rtol=1e-4, atol=1e-6)
    assert found.pixels[:, found.seen[0] == 0].abs().max() == 0, "black pixels add nothing"
    assert found.pixels.abs().max() > 0
    if hidden:
        assert found.units is not None
        torch.testing.assert_close(
            found.units.adds.sum(dim=1), found.logits - found.rest, rtol=1e-4, atol=1e-6
        )
        assert found.units.weights.shape == (hidden[0], 1, 10, 8)
    else:
        assert found.units is None


def test_a_linear_nets_parts_are_its_weights_times_the_pixels() -> None:
    classifier, image = make([]), write_digit()
    weights = classifier.net.layers[-1].weight.reshape(4, 10, 8).detach()  # type: ignore[union-attr]
    wanted = weights * image / (255 * 0.25)
    torch.testing.assert_close(explain(classifier, image).pixels.float(), wanted)


@pytest.mark.parametrize(
    ("activation", "norm"), [("tanh", "none"), ("gelu", "batch"), ("relu", "layer"), ("elu", "none")]
)
def test_of_other_nets_it_is_gradient_times_input_by_name(activation: str, norm: str) -> None:
    classifier, image = make([7, 5], activation, norm), write_digit()
    found = explain(classifier, image)
    assert not found.is_exact
    assert found.method == "gradient × input"
    pixels = image.float().requires_grad_()
    for label, logit in enumerate(classifier(pixels[None])[0]):
        (gradient,) = torch.autograd.grad(logit, pixels, retain_graph=True)
        torch.testing.assert_close(found.pixels[label].float(), gradient * image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.rest + found.pixels.sum(dim=(1, 2)), found.logits)
    assert found.units is not None
    assert found.units.adds.shape == (4, 7)


class Own(nn.Module):
    """A user's own net, for colour images."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4 * 8 * 6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.look(images).relu().flatten(1))  # type: ignore[no-any-return]


def test_a_foreign_net_is_explained_without_units() -> None:
    torch.manual_seed(1)
    classifier = DigitClassifier(Own(), image_shape=(3, 10, 8), class_names=["a", "b", "c", "d"])
    classifier.check()
    training = Images(torch.randint(0, 256, (9, 10, 8, 3), dtype=torch.uint8), torch.arange(9) % 4)
    image = training.images[3]
    found = explain(classifier.eval(), image, nearest=find_nearest(classifier, image[None], training)[0])
    assert found.method == "gradient × input"
    assert found.units is None
    assert found.pixels.shape == (4, 10, 8)
    assert found.nearest is not None
    assert torch.equal(found.nearest.images[0], training.images[3])


def test_nearest_images_are_those_of_the_last_hidden_layer() -> None:
    classifier = make([7, 5])
    training = Images(torch.randint(0, 256, (50, 10, 8), dtype=torch.uint8), torch.arange(50))
    asked = training.images[[4, 20]]
    with torch.inference_mode():
        layers = classifier.net.layers[:-1]  # type: ignore[union-attr]
        hidden, own = (layers(classifier.preprocess(images)) for images in (training.images, asked))
    distances = torch.cdist(own, hidden)
    for found, row in zip(find_nearest(classifier, asked, training), distances, strict=True):
        assert found.labels.tolist() == row.argsort()[:5].tolist()
        torch.testing.assert_close(found.distances, row.sort().values[:5], atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def trained(trained_run: Path, data_dir: Path) -> tuple[DigitClassifier, Images]:
    path = trained_run / "checkpoints" / "best.ckpt"
    classifier, checkpoint = load_classifier(path)
    return classifier, load_split(path, checkpoint, "test", data_dir=str(data_dir))


def test_what_is_said_was_asked(trained: tuple[DigitClassifier, Images]) -> None:
    classifier, split = trained
    told = 0
    for image in split.images[:12]:
        found = explain(classifier, image)
        first = found.ranking[0]
        assert str(found).startswith(f"read as {first} (")
        if found.change is not None:
            changed = (found.change.image != found.seen).any(dim=0)
            assert sorted(map(tuple, changed.nonzero().tolist())) == sorted(found.change.pixels)
            assert set(found.change.image[:, changed].flatten().tolist()) <= {0.0, 255.0}, "ink or paper"
            logits = ask(classifier, found.change.image[None])[0]
            assert int(logits.argmax()) == found.change.label != first
            assert float(classifier.to_probabilities(logits[None]).max()) == pytest.approx(
                found.change.probability
            )
        if found.erased is not None:
            told += 1
            logits = ask(classifier, found.erased.image[None])[0]
            assert int(logits.argmax()) == found.erased.label != first
            assert found.erased.part in PARTS
            gone = found.erased.image != found.seen
            assert (found.erased.image[gone] == 0).all()
            assert f"without its {found.erased.part} it would be read as {found.erased.label}" in str(found)
        else:
            assert "no single part decides" in str(found)
    assert told > 3


def test_a_blank_image_has_no_parts(trained: tuple[DigitClassifier, Images]) -> None:
    found = explain(trained[0], torch.zeros(28, 28, dtype=torch.uint8))
    assert found.pixels.abs().max() == 0
    assert found.erased is None
    assert found.change is None
    torch.testing.assert_close(found.rest, found.logits)


def test_what_it_can_not_take_is_told(trained: tuple[DigitClassifier, Images]) -> None:
    with pytest.raises(ValueError, match=r"takes images of 28×28×1, not \(5, 28, 28\)"):
        explain(trained[0], trained[1].images[:5])


@pytest.mark.slow
def test_mistakes_indices_and_pictures(
    trained_run: Path, trained: tuple[DigitClassifier, Images], tmp_path: Path, command: Run
) -> None:
    done = command("explain", "mistakes=2", f"run={trained_run}", "output=ex", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    found = [re.match(r"test (\d+), a (\d): read as (\d) \([\d.]+ %\); ", line) for line in lines[-3:-1]]
    for match in found:
        assert match
        assert match[2] != match[3]
        assert int(trained[1].labels[int(match[1])]) == int(match[2])
    assert lines[-1] == "2 of 2 explained (exact, relative to a blank image); a figure for each is in ex"
    for path in (tmp_path / "ex").glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 10
    assert len(list((tmp_path / "ex").glob("*.png"))) == 2

    digit = Image.fromarray(255 - np.kron(trained[1].images[0].numpy(), np.ones((6, 6), np.uint8)))
    digit.save(tmp_path / "seven.png")
    (tmp_path / "broken.png").write_text("no picture")
    done = command(
        "explain", "images=[seven.png,broken.png]", f"run={trained_run}", "output=own", cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("broken.png: no picture that can be read")
    assert re.search(r"^seven.png: read as 7", done.stdout, re.M)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [".written", "001_seven.png"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give one of images=my_digit.png, index=[3,7] and mistakes=12"),
        (
            ["index=3", "mistakes=2"],
            "give one of images=my_digit.png, index=[3,7] and mistakes=12, not several",
        ),
        (["index=[-1]"], "index must be a whole number >= 0, got -1"),
        (["index=3", "split=tset"], "split must be one of test, val, train, got tset"),
        (["mistakes=-1"], "mistakes must be >= 0, got -1"),
    ],
)
def test_a_wrong_setting_is_told_in_a_line(
    arguments: list[str], told: str, tmp_path: Path, command: Run
) -> None:
    done = command("explain", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"{told}\n"


def test_an_index_beyond_the_split_is_told(trained_run: Path, tmp_path: Path, command: Run) -> None:
    done = command("explain", "index=[0,10000]", f"run={trained_run}", "output=ex", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "index=10000: test has images 0 to 9999"
    shutil.rmtree(tmp_path / "ex", ignore_errors=True)


def test_from_python(trained_run: Path, trained: tuple[DigitClassifier, Images]) -> None:
    net, images = load(trained_run), trained[1].images
    why = net.explain(images[9], nearest=False)
    assert str(why).startswith(f"read as {int(net.predict(images[9]).labels)} (")
    assert why.nearest is None
    figure = why.draw()
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert "what the net sees" in texts
    assert any("exact, relative to a blank image" in text for text in texts)
    with pytest.raises(ValueError, match="explain takes one image, got 2"):
        net.explain(images[:2], nearest=False)
