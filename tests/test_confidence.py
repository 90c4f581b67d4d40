"""A temperature makes a net's confidence match its accuracy, and changes nothing else."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from benchmarks.handwriting import draw_letters
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import Images
from mnist_lightning.evaluation import confidence, likeness
from mnist_lightning.evaluation.scores import score
from mnist_lightning.evaluation.trained import compute_outputs, load_classifier, load_split
from mnist_lightning.images.handwriting import to_mnist
from mnist_lightning.network import FeedForward
from mnist_lightning.rundir.checkpoint import load, serialize


def draw_outputs(scale: float, count: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw labels from logits, and return the logits times ``scale``."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return scale * logits, labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_and_mends_the_calibration(scale: float) -> None:
    outputs, labels = draw_outputs(scale)
    temperature = confidence.fit_temperature(outputs[:10_000], labels[:10_000])
    assert temperature == pytest.approx(scale, rel=0.05)
    others = labels[10_000:].numpy(), outputs[10_000:].log_softmax(dim=1).numpy()
    plain, tempered = score(*others), score(*others, temperature)
    assert tempered.calibration.error < 0.02
    assert tempered.calibration.error <= plain.calibration.error + 0.005
    assert np.array_equal(tempered.predictions, plain.predictions)
    assert tempered.loss == plain.loss
    assert tempered.accuracy == plain.accuracy
    np.testing.assert_allclose(tempered.probabilities.sum(axis=1), 1, atol=1e-5)


def test_outputs_that_are_never_wrong_get_a_temperature_within_its_limits() -> None:
    outputs = torch.eye(4)
    assert confidence.fit_temperature(outputs, torch.arange(4)) == pytest.approx(
        confidence.LIMITS[0], rel=0.01
    )
    assert confidence.fit_temperature(outputs, 3 - torch.arange(4)) == pytest.approx(
        confidence.LIMITS[1], rel=0.01
    )


def test_99_of_100_right_images_are_answers() -> None:
    outputs, labels = draw_outputs(2)
    kept = confidence.fit(outputs, labels)
    evaluation = score(labels.numpy(), outputs.log_softmax(dim=1).numpy(), kept["temperature"])
    right = evaluation.predictions == evaluation.labels
    assert (evaluation.confidences >= kept["sure"])[right].mean() == pytest.approx(0.99, abs=0.001)


def test_risk_rises_to_the_error_of_all() -> None:
    outputs, labels = draw_outputs(1)
    evaluation = score(labels.numpy(), outputs.log_softmax(dim=1).numpy())
    coverage, risk = evaluation.risk_coverage()
    assert coverage[-1] == 1
    assert risk[-1] == pytest.approx(1 - evaluation.accuracy)
    assert risk[len(risk) // 4] < risk[len(risk) // 2] < risk[-1]


def test_a_run_keeps_it_in_its_best_checkpoint_and_old_files_are_at_1(
    trained_run: Path, tmp_path: Path
) -> None:
    path = trained_run / "checkpoints" / "best.ckpt"
    classifier, checkpoint = load_classifier(path)
    assert checkpoint["confidence"]["temperature"] == classifier.temperature != 1
    images = load_split(path, checkpoint, "val", data_dir=None)
    outputs = compute_outputs(classifier, images.images)
    kept = checkpoint["confidence"]
    assert confidence.fit(outputs, images.labels)["temperature"] == pytest.approx(
        kept["temperature"], rel=1e-3
    )
    probabilities = classifier.to_probabilities(outputs)
    torch.testing.assert_close(probabilities, (outputs / classifier.temperature).softmax(dim=1))
    old = {name: value for name, value in load(path).items() if name != "confidence"}
    (tmp_path / "old.ckpt").write_bytes(serialize(old))
    before, _ = load_classifier(tmp_path / "old.ckpt")
    assert (before.temperature, before.sure) == (1, 0)
    assert confidence.answer(before, images.images[:3]).distances is None
    wrongs: list[object] = [{"temperature": float("nan"), "sure": 0.5}, {"temperature": 1.0}, 7]
    wrongs += [
        {"temperature": "x"},
        kept | {"likeness": 7},
        kept | {"likeness": kept["likeness"] | {"limit": 0}},
    ]
    for name, other in (("means", kept["likeness"]["means"][:, 1:]), ("directions", torch.zeros(10, 32))):
        wrongs.append(kept | {"likeness": kept["likeness"] | {name: other}})
    for wrong in wrongs:
        (tmp_path / "old.ckpt").write_bytes(serialize(old | {"confidence": wrong}))
        with pytest.raises(OSError, match="can be rebuilt"):
            load_classifier(tmp_path / "old.ckpt")


def test_letters_are_told_and_digits_are_not(trained_run: Path) -> None:
    """The fonts were not used to choose anything; the benchmark has more of them."""
    path = trained_run / "checkpoints" / "best.ckpt"
    classifier, checkpoint = load_classifier(path)
    images = load_split(path, checkpoint, "val", data_dir=None)
    said = confidence.answer(classifier, images.images)
    right = said.probabilities.argmax(axis=1) == images.labels.numpy()
    assert said.distances is not None
    assert (np.array(said.told) == "sure")[right].mean() == pytest.approx(confidence.KEPT, abs=0.001)
    assert (np.array(said.told) != "not sure")[right].mean() == pytest.approx(confidence.ANSWERED, abs=0.001)
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    letters = np.stack([to_mnist(picture) for picture in draw_letters(fonts / "DejaVuSans.ttf")])
    told = confidence.answer(classifier, torch.from_numpy(letters)).told
    assert sum(word != "sure" for word in told) / len(told) > 0.4
    assert "no digit" in told


def test_a_net_without_training_images_of_a_class_still_tells() -> None:
    classifier = DigitClassifier(FeedForward([8]))
    classifier.check()
    images = torch.randint(0, 256, (60, 28, 28), dtype=torch.uint8)
    labels = classifier.eval()(images).argmax(dim=1)
    few = labels != labels[0]
    shares = {"temperature": 1.0, "kept": 0.99, "answered": 0.999}
    fitted = likeness.fit(classifier, Images(images[few], labels[few]), Images(images, labels), **shares)
    assert fitted
    found, least = fitted
    assert 0 < least < 1
    assert found.directions.isfinite().all()
    assert likeness.unpack(found.pack(), classifier).limit == found.limit
    wrong = Images(images, (labels + 1) % 10)
    assert likeness.fit(classifier, Images(images, labels), wrong, **shares) is None
