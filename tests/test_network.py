from pathlib import Path

import pytest
import torch
from conftest import settle

from mnist_lightning.network import ACTIVATIONS, FeedForward


def make(**changes: object) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(**({"hidden": [16]} | changes))  # type: ignore[arg-type]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("hidden", "num_parameters"),
    [([], 7_850), ([128, 64], 109_386), ([256], 203_530)],  # sums of (inputs + 1) * outputs over layers
)
def test_shape_and_size(hidden: list[int], num_parameters: int, images: torch.Tensor) -> None:
    net = make(hidden=hidden)
    assert net(images).shape == (32, 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == num_parameters


@pytest.mark.parametrize(("image_shape", "num_classes"), [((3, 8, 5), 4), ((1, 20, 40), 2)])
def test_sizes_are_given(image_shape: tuple[int, ...], num_classes: int) -> None:
    net = make(image_shape=image_shape, num_classes=num_classes)
    assert net(torch.zeros(6, *image_shape)).shape == (6, num_classes)


def test_its_defaults_are_those_of_the_yaml_file(tmp_path: Path) -> None:
    settings = {name: value for name, value in settle(tmp_path).model.items() if name != "_target_"}
    torch.manual_seed(0)
    net = FeedForward()
    torch.manual_seed(0)
    other = FeedForward(**settings)
    assert net.recipe == other.recipe
    assert net.recipe.items() >= settings.items()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


def test_what_is_derived_from_it_has_no_recipe_that_makes_another_net() -> None:
    class Own(FeedForward):
        pass

    assert not hasattr(Own(), "recipe")


@pytest.mark.parametrize(("key", "value"), [("activation", "sign"), ("norm", "group")])
def test_an_unknown_part_is_refused(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be one of .*, got {value}"):
        make(**{key: value})


def test_each_activation_gives_another_net(images: torch.Tensor) -> None:
    outputs = [make(activation=name)(images) for name in ACTIVATIONS]
    for one in range(len(outputs)):
        for two in range(one):
            assert not torch.allclose(outputs[one], outputs[two])


def test_dropout_acts_in_training_only(images: torch.Tensor) -> None:
    net = make(dropout=0.5)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))
    assert torch.equal(net(images), make()(images)), "dropout changes nothing in evaluation"


@pytest.mark.parametrize(("norm", "axis"), [("batch", 0), ("layer", 1)])
def test_norm_normalises(norm: str, axis: int, images: torch.Tensor) -> None:
    net = make(norm=norm)
    normalised = net.layers[:3](images)  # flatten, linear, norm
    torch.testing.assert_close(
        normalised.mean(axis), torch.zeros(normalised.shape[1 - axis]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        normalised.std(axis, correction=0), torch.ones(normalised.shape[1 - axis]), atol=1e-2, rtol=0
    )


@pytest.mark.parametrize("key", ["input_noise", "noise"])
def test_noise_disturbs_training_by_its_size_and_nothing_else(key: str) -> None:
    """With a smooth activation, the spread of the logits is proportional to that of small noise."""
    images = torch.full((4000, 1, 28, 28), 0.85)
    spreads = {}
    for std in (0.1, 0.2):
        torch.manual_seed(1)
        arguments: dict[str, float] = {key: std}
        net = FeedForward([50], activation="elu", **arguments)  # type: ignore[arg-type]
        with torch.no_grad():
            spreads[std] = net(images).std(dim=0).mean().item()
            assert net.eval()(images).std(dim=0).max() < 1e-5
    assert spreads[0.2] / spreads[0.1] == pytest.approx(2, rel=0.1)
