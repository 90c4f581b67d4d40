import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import settle

from mnist_lightning.callbacks.summary import NetSummary
from mnist_lightning.data import load_mnist
from mnist_lightning.images.preprocess import Preprocess
from mnist_lightning.network import ACTIVATIONS, DirectionMaps, DirectionNet, FeedForward


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


@pytest.mark.parametrize(("kind", "chosen"), [(FeedForward, "mlp"), (DirectionNet, "directions")])
def test_its_defaults_are_those_of_the_yaml_file(
    kind: type[FeedForward], chosen: str, tmp_path: Path
) -> None:
    settings = dict(settle(tmp_path, f"model={chosen}").model)
    assert settings.pop("_target_") == f"mnist_lightning.network.{kind.__name__}"
    torch.manual_seed(0)
    net = kind()
    torch.manual_seed(0)
    other = kind(**settings)
    assert net.recipe == other.recipe
    assert net.recipe.items() >= settings.items()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", [FeedForward, DirectionNet])
def test_what_is_derived_from_it_has_no_recipe_that_makes_another_net(kind: type[FeedForward]) -> None:
    class Own(kind):  # type: ignore[misc, valid-type]
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


def read_maps(maps: DirectionMaps, images: torch.Tensor) -> torch.Tensor:
    """Read the maps, in such units that they are 0 where there is no edge."""
    found: torch.Tensor = maps(images) - maps(torch.zeros_like(images))
    return found


def test_an_edge_is_on_the_map_of_the_direction_in_which_brightness_rises() -> None:
    image = torch.zeros(1, 1, 28, 28)
    image[..., 14:] = 3.0
    right, down, left, up = read_maps(DirectionMaps(4, 4, (1, 28, 28)), image)[0]
    assert right[:, 3].min() > 1  # the fourth of seven places is the middle
    assert right[:, [0, 6]].abs().max() < 0.01
    assert left.abs().max() < 1e-4  # brightness falls nowhere
    assert max(down.abs().max(), up.abs().max()) < 0.01  # as far as rounding goes


@pytest.mark.parametrize("value", [-0.4, 2.8])
def test_an_even_image_has_no_edge_not_even_at_its_border(value: float) -> None:
    maps = DirectionMaps(8, 3, (1, 28, 28))
    even = maps(torch.full((1, 1, 28, 28), value))
    torch.testing.assert_close(even, maps(torch.zeros(1, 1, 28, 28)), atol=1e-3, rtol=0)


def test_a_quarter_turn_of_the_image_turns_the_maps_and_exchanges_them(images: torch.Tensor) -> None:
    maps = DirectionMaps(8, 3, (1, 28, 28))
    turned = maps(images.rot90(1, (2, 3)))  # what pointed down points to the right
    wanted = maps(images).rot90(1, (2, 3)).roll(-2, dims=1)
    torch.testing.assert_close(turned, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("directions", "spacing", "image_shape", "shape"),
    [(8, 3, (1, 28, 28), (8, 9, 9)), (4, 2, (3, 9, 14), (12, 4, 7)), (1, 5, (1, 5, 5), (1, 1, 1))],
)
def test_maps_have_a_place_for_each_spacing(
    directions: int, spacing: int, image_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    maps = DirectionMaps(directions, spacing, image_shape)
    assert maps.shape == shape
    assert maps(torch.randn(2, *image_shape)).shape == (2, *shape)
    net = DirectionNet(directions=directions, spacing=spacing, image_shape=image_shape, num_classes=3)
    assert net(torch.randn(2, *image_shape)).shape == (2, 3)


def test_the_maps_of_digits_are_standardised_and_have_no_trainable_part(data_dir: Path) -> None:
    (digits, _), *_ = load_mnist(data_dir, batch_size=500)[1]
    maps = DirectionMaps(8, 3, (1, 28, 28))
    seen = maps(Preprocess()((digits[:, 0] + 1) / 2 * 255))
    assert seen.mean().item() == pytest.approx(0, abs=0.1)
    assert seen.std().item() == pytest.approx(1, abs=0.1)
    assert list(maps.parameters()) == []
    assert not maps.state_dict()


def test_a_blank_image_has_a_gradient_through_the_maps() -> None:
    blank = torch.zeros(2, 1, 28, 28, requires_grad=True)
    DirectionNet()(blank).sum().backward()
    assert blank.grad is not None
    assert blank.grad.isfinite().all()


@pytest.mark.parametrize("spacing", [0, 29])
def test_a_spacing_beyond_the_image_is_refused(spacing: int) -> None:
    with pytest.raises(ValueError, match=f"spacing must be 1 to 28 pixels, got {spacing}"):
        DirectionNet(spacing=spacing)


def test_summary_lists_layers_in_the_order_of_the_data_and_parameters_in_one_column(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trained = L.LightningModule()
    trained.net = DirectionNet([32], norm="batch")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with caplog.at_level(logging.INFO):
        NetSummary().on_fit_start(trainer, trained)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("callbacks.summary")]
    names = [line.split("(")[0].strip() for line in lines[:-1]]
    assert names == ["DirectionMaps", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert lines[-1].split() == ["parameters", f"{1432 * 32 + 32 + 64 + 330:,}"]
    assert len({len(line) for line in lines}) == 1
