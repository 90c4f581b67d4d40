import pytest
import torch

from mnist_lightning.images.deform import upright
from mnist_lightning.network import ACTIVATIONS, FeedForward

PLAIN = {"hidden": [16], "activation": "relu", "dropout": 0.0, "norm": "none", "mean": 0.1307, "std": 0.3081}


def make(**changes: object) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(**(PLAIN | changes))  # type: ignore[arg-type]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (32, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("hidden", "num_parameters"),
    [([], 7_850), ([128, 64], 109_386), ([256], 203_530)],  # sums of (inputs + 1) * outputs
)
def test_shape_and_size(hidden: list[int], num_parameters: int, images: torch.Tensor) -> None:
    net = make(hidden=hidden)
    assert net(images).shape == (32, 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == num_parameters


def test_normalises_pixels_itself(images: torch.Tensor) -> None:
    net = make(hidden=[])
    linear = net.layers[-1]
    expected = linear(((images.double() / 255 - 0.1307) / 0.3081).float().flatten(1))
    torch.testing.assert_close(net(images), expected)
    torch.testing.assert_close(net(images), net(images.float()))


def test_normalisation_travels_with_the_net(images: torch.Tensor) -> None:
    net, other = make(mean=0.5, std=0.5), make()
    assert not torch.equal(net(images), other(images))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(images), other(images))


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
    normalised = net.layers[:3]((images.float() - net.mean) / net.std)  # flatten, linear, norm
    torch.testing.assert_close(
        normalised.mean(axis), torch.zeros(normalised.shape[1 - axis]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        normalised.std(axis, correction=0), torch.ones(normalised.shape[1 - axis]), atol=1e-2, rtol=0
    )


@pytest.mark.parametrize("key", ["input_noise", "noise"])
def test_noise_disturbs_training_by_its_size_and_nothing_else(key: str) -> None:
    """Small noise through a smooth activation: what comes out spreads as the noise that goes in."""
    images = torch.full((4000, 28, 28), 100, dtype=torch.uint8)
    spreads = {}
    for std in (0.1, 0.2):
        torch.manual_seed(1)
        arguments: dict[str, float] = {key: std}
        net = FeedForward(
            hidden=[50], activation="elu", dropout=0.0, norm="none", mean=0.1307, std=0.3081, **arguments
        )
        with torch.no_grad():
            spreads[std] = net(images).std(dim=0).mean().item()
            assert net.eval()(images).std(dim=0).max() < 1e-5
    assert spreads[0.2] / spreads[0.1] == pytest.approx(2, rel=0.1)


def test_a_deskewing_net_sees_upright_images_but_trains_on_what_it_is_given(images: torch.Tensor) -> None:
    net, other = make(deskew=True), make()
    assert torch.equal(net(images), other(images)), "training images come upright"
    net.eval()
    assert torch.equal(net(images), other(upright(images.float())))
    assert not torch.allclose(net(images), other(images))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(images), other(upright(images.float()))), "moments are not rounded to bfloat16"
