"""Each amount changes what it names, the same key draws the same deformation, and digits stay readable."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import settle
from torch import Tensor

from mnist_lightning.data import read_splits
from mnist_lightning.evaluation.trained import load_classifier, load_split, log_probabilities
from mnist_lightning.images.deform import Deformation, add_flags, from_center, upright
from mnist_lightning.images.sources import find_source, unpack

Fit = Callable[..., dict[str, object]]
NONE = {"rotation": 0, "scale": 0, "shear": 0, "shift": 0, "elastic": 0, "smoothness": 5.0}
COUNT = 2000
PLACE = from_center(28, torch.device("cpu"))


def make(**amounts: float) -> Deformation:
    return Deformation(**(NONE | amounts))


@pytest.fixture(scope="module")
def images(data_dir: Path) -> Tensor:
    unpack(data_dir)
    stored = read_splits(find_source("mnist", data_dir), 0, 0, None)[0]["train"].images
    return stored[:COUNT, None].float()


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre (B, 2), x and y, and the covariance (B, 2, 2) of each image's ink, in pixels."""
    points = torch.stack([PLACE.repeat(28), PLACE.repeat_interleave(28)]).double()
    ink = images.flatten(1).double()
    ink = ink / ink.sum(dim=1, keepdim=True)
    mean = ink @ points.T
    away = points - mean[:, :, None]
    return mean, torch.einsum("bp,bip,bjp->bij", ink, away, away)


def blots(x: float, y: float, *, wide: float = 1.5, tall: float = 1.5) -> Tensor:
    """Draw the same smooth blot of ink in each of many images, with its centre at (x, y) from the middle."""
    blot = torch.exp(-0.5 * (((PLACE - x) / wide) ** 2 + ((PLACE[:, None] - y) / tall) ** 2))
    return (255 * blot).expand(COUNT, 1, 28, 28)


def test_without_an_amount_the_images_stay(images: Tensor) -> None:
    same = make()(images, 1)
    assert same.dtype == torch.float32
    torch.testing.assert_close(same, images, rtol=0, atol=0.01)


def test_pixels_stay_in_their_range(images: Tensor) -> None:
    wild = make(rotation=45, scale=0.5, shear=30, shift=8, elastic=4, smoothness=2)(images, 1)
    assert wild.shape == images.shape
    assert wild.min() >= 0
    assert wild.max() <= 255.001, "rounding of the weights of four neighbours"
    assert wild.isfinite().all()


def test_the_key_alone_decides(images: Tensor) -> None:
    one, two = (make(rotation=10, elastic=1) for _ in range(2))
    first = one(images, 1, 7, 0)
    assert not torch.equal(one(images, 1, 8, 0), first)
    assert not torch.equal(two(images, 2, 7, 0), first)
    assert not torch.equal(two(images, 1, 7, 1), first)
    assert torch.equal(two(images, 1, 7, 0), first)


def test_the_global_random_state_is_not_touched(images: Tensor) -> None:
    before = torch.get_rng_state()
    make(rotation=10, elastic=1)(images, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_shift_moves_by_pixels() -> None:
    mean, spread = moments(make(shift=3)(blots(0, 0), 1))
    assert mean.abs().max() <= 3.01
    assert mean.amax(dim=0).min() > 2.9
    assert mean.amin(dim=0).max() < -2.9
    assert mean.mean(dim=0).abs().max() < 0.15, "either way alike"
    assert (torch.diagonal(spread, dim1=1, dim2=2).sqrt() - 1.5).abs().max() < 0.1


def test_rotation_turns_about_the_centre() -> None:
    mean, _ = moments(make(rotation=30)(blots(0, 0, wide=3), 1))
    assert mean.abs().max() < 0.01, "what lies in the centre stays there"
    mean, _ = moments(make(rotation=30)(blots(6, 0), 1))
    assert (mean.norm(dim=1) - 6).abs().max() < 0.1, "the distance to the centre stays"
    angle = torch.rad2deg(torch.atan2(mean[:, 1], mean[:, 0]))
    assert 29 < angle.max() < 30.5
    assert -30.5 < angle.min() < -29


def test_scale_stretches_each_axis_by_its_share() -> None:
    mean, spread = moments(make(scale=0.2)(blots(0, 0, wide=2, tall=3), 1))
    assert mean.abs().max() < 0.01
    width, height = (spread[:, i, i].sqrt() / size for i, size in enumerate((2, 3)))
    for share in (width, height):
        assert 1.17 < share.max() < 1.23, "bilinear sampling blurs a little"
        assert 0.79 < share.min() < 0.84
    assert torch.corrcoef(torch.stack([width, height]))[0, 1].abs() < 0.1, "each on its own"


def test_shear_leans_upright_lines_and_keeps_rows() -> None:
    mean, _ = moments(make(shear=20)(blots(0, 6), 1))
    assert (mean[:, 1] - 6).abs().max() < 0.05
    lean = torch.rad2deg(torch.atan2(mean[:, 0], mean[:, 1])).abs()
    assert 19 < lean.max() < 20.5


def test_elastic_displaces_by_its_standard_deviation_and_smoothly() -> None:
    for smoothness in (4.0, 6.0):
        deformation = make(elastic=1.2, smoothness=smoothness)
        places = torch.stack([PLACE.repeat(28), PLACE.repeat_interleave(28)])
        moved = deformation.draw(torch.empty(4000, 1, 28, 28), 1).flatten(2) - places
        assert moved.std(dim=0).mean() == pytest.approx(1.2, rel=0.02)
        assert (moved.std(dim=0) - 1.2).abs().max() < 0.1, "everywhere alike"
        # white noise smoothed by a Gaussian has the correlation exp(-d² / 4 s²) at a distance d
        field = moved.view(4000, 2, 28, 28)
        for distance in (3, 6):
            pairs = (field[..., :-distance] * field[..., distance:]).mean() / 1.2**2
            expected = torch.tensor(-(distance**2) / (4 * smoothness**2)).exp()
            assert pairs == pytest.approx(expected.item(), abs=0.04)


def test_any_size_and_colour(images: Tensor) -> None:
    """The deformation depends on the key alone, and is the same for each colour."""
    wide = torch.rand(16, 3, 20, 40) * 255
    deformation = make(rotation=15, elastic=1)
    deformed = deformation(wide, 1)
    assert deformed.shape == wide.shape
    assert torch.equal(deformed[:, 1:2], deformation(wide[:, 1:2], 1))
    still = torch.zeros(COUNT, 1, 20, 40)
    still[:, :, 8:12, 30:34] = 1  # a blot 12 pixels to the right of the centre
    turned = make(rotation=30)(still, 1)
    ink = turned / turned.sum(dim=(2, 3), keepdim=True)
    x = (ink.sum(dim=2) * from_center(40, still.device)).sum(dim=(1, 2))
    y = (ink.sum(dim=3) * from_center(20, still.device)).sum(dim=(1, 2))
    inside = y.abs() < 5  # elsewhere a part of the blot is outside the image
    assert inside.sum() > 1000
    assert ((x**2 + y**2).sqrt() - 12)[inside].abs().max() < 0.3, "pixels are square, whatever the shape"


@pytest.mark.slow
def test_a_short_training_reads_deformed_digits(fit: Fit, tmp_path: Path) -> None:
    """Labels stay valid: the net reads other deformations of images that it has never seen."""
    arguments = ("data/augment=elastic", "trainer.max_epochs=2", "model.norm=batch", "logger=none")
    metrics = fit(*arguments)
    assert metrics["val/acc"] > 0.96  # type: ignore[operator]
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    classifier, checkpoint = load_classifier(path)
    assert checkpoint["hyper_parameters"]["preprocess"]["augment"]["elastic"] == 1.2
    digits = load_split(path, checkpoint, "val", data_dir=None)
    right = log_probabilities(classifier, digits.images, tta=1).argmax(1) == digits.labels
    assert right.float().mean() > 0.85
    plain = fit(*arguments[1:], folder="plain")
    assert plain["last/train/acc"] > metrics["last/train/acc"] + 0.03, "validation is on whole digits"  # type: ignore[operator]


@pytest.mark.slow
def test_a_net_of_upright_digits_reads_leaning_ones(fit: Fit, tmp_path: Path) -> None:
    """Images are set upright in front of the net, without any further argument."""
    arguments = ("data.deskew=true", "trainer.max_epochs=1", "logger=none")
    metrics = fit(*arguments)
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    classifier, checkpoint = load_classifier(path)
    digits = load_split(path, checkpoint, "val", data_dir=None)
    right = log_probabilities(classifier, digits.images).argmax(1) == digits.labels
    assert right.float().mean() == pytest.approx(metrics["val/acc"], abs=1e-3)
    leaning = make(shear=30)(digits.images[:, None].float(), 1)[:, 0]
    right = log_probabilities(classifier, leaning).argmax(1) == digits.labels
    assert right.float().mean() > 0.93
    fit(*arguments[1:], folder="plain")
    plain, _ = load_classifier(tmp_path / "plain" / "checkpoints" / "best.ckpt")
    not_set_upright = log_probabilities(plain, leaning).argmax(1) == digits.labels
    assert not_set_upright.float().mean() < right.float().mean() - 0.03


def test_amounts_of_zero_are_no_deformation(tmp_path: Path) -> None:
    assert settle(tmp_path).data.preprocess_arguments()["augment"] is None
    assert settle(tmp_path, "data.augment.shift=1").data.preprocess_arguments()["augment"]["shift"] == 1


def test_upright_ink_does_not_lean_and_is_in_the_middle(images: Tensor) -> None:
    straight = upright(images)
    assert straight.shape == images.shape
    assert 0 <= straight.min() <= straight.max() <= 255.001
    before, after = moments(images), moments(straight)
    assert before[0].abs().max() > 0.5
    assert (after[0].abs() < 0.01).double().mean() > 0.98  # pixels; few images lose ink at the edge
    lean_before, lean_after = (spread[:, 0, 1] / spread[:, 1, 1] for _, spread in (before, after))
    assert lean_before.abs().mean() > 0.2
    assert (lean_after.abs() < 0.02).double().mean() > 0.98
    torch.testing.assert_close(after[1][:, 1, 1], before[1][:, 1, 1], rtol=0.1, atol=0.3)  # same height


def test_upright_leaves_paper_blank_and_a_standing_blot_as_it_is() -> None:
    paper = torch.zeros(2, 1, 28, 28)
    assert torch.equal(upright(paper), paper)
    blot = blots(0, 0, wide=1.5, tall=3)[:2]
    torch.testing.assert_close(upright(blot), blot, rtol=0, atol=0.01)


def bars(lean: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return many 1s drawn as a single stroke, 3 pixels wide and 20 high, and their labels."""
    y, x = PLACE[:, None], PLACE
    bar = (2 - (x - lean * y).abs()).clamp(0, 1) * (y.abs() <= 10)
    return (255 * bar).expand(COUNT, 1, 28, 28), torch.ones(COUNT, dtype=torch.int64)


@pytest.mark.parametrize("lean", [0.0, -0.4])
def test_flags_go_back_from_the_top_of_some_1s(lean: float) -> None:
    ones, labels = bars(lean)
    flagged = add_flags(ones, labels, 0.4, 1)
    changed = (flagged != ones).flatten(1).any(dim=1)
    assert changed.float().mean() == pytest.approx(0.4, abs=0.04)
    assert 0 <= flagged.min() <= flagged.max() <= 255
    assert flagged.shape == ones.shape
    more = flagged[changed].sum(dim=(1, 2, 3)) / ones[0].sum()
    assert more.min() > 1.05, "a flag is ink"
    assert more.max() < 2.8
    mean, _ = moments(flagged[changed])
    before, _ = moments(ones[:1])
    assert (mean - before).abs().max() < 0.6, "the centre of mass stays, to half a pixel"
    upper = flagged[changed][:, 0, :14].sum(dim=1) - ones[0, 0, :14].sum(dim=0)
    assert (upper[:, :12].sum(dim=1) > 0).float().mean() > 0.9, "to the left"


def test_flags_are_for_1s_alone_and_the_key_decides(images: Tensor) -> None:
    others = torch.full((COUNT,), 7)
    assert torch.equal(add_flags(images, others, 1.0, 1), images)
    ones, labels = bars()
    first = add_flags(ones, labels, 0.5, 1, 2)
    assert torch.equal(add_flags(ones, labels, 0.5, 1, 2), first)
    assert not torch.equal(add_flags(ones, labels, 0.5, 1, 3), first)
    assert torch.equal(add_flags(ones, labels, 0.0, 1), ones)
    assert torch.equal(
        add_flags(torch.zeros(3, 1, 28, 28), labels[:3], 1.0, 1).isfinite().all(), torch.tensor(True)
    )


def test_flags_need_the_digits(tmp_path: Path) -> None:
    assert settle(tmp_path, "data.augment.flags=0.4").data.preprocess_arguments()["augment"]["flags"] == 0.4
    for wrong in ("data.augment.flags=2", "data.augment.flags=-0.1"):
        with pytest.raises(Exception, match=r"data.augment.flags must be in \[0, 1\]"):
            settle(tmp_path, wrong)
    with pytest.raises(Exception, match=r"flags draws strokes on digits 1: it is for data=mnist"):
        settle(tmp_path, "data=kmnist", "data.augment.flags=0.4")
