import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Run

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.evaluation.trained import compute_outputs, load_classifier
from mnist_lightning.export import compare, to_onnx
from mnist_lightning.images.preprocess import Preprocess
from mnist_lightning.network import DirectionNet, FeedForward


def test_export_gives_what_the_net_gives(trained_run: Path, tmp_path: Path, command: Run) -> None:
    checkpoint = tmp_path / "a (1)=b,é #x.ckpt"
    shutil.copy(trained_run / "checkpoints" / "best.ckpt", checkpoint)
    done = command("export", f"checkpoint={checkpoint.name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 6  # only our own lines, none of torch.onnx
    difference = re.search(r"1,000 test images, largest difference to PyTorch (\S+)", done.stdout)
    assert difference
    assert float(difference[1]) < 1e-4

    session = onnxruntime.InferenceSession(tmp_path / "a (1)=b,é #x.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [28, 28])
    assert isinstance(given.shape[0], str)  # the batch size is free
    assert (returned.name, returned.type) == ("probabilities", "tensor(float)")
    classifier, _ = load_classifier(checkpoint)
    for count in (1, 2, 77):
        images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
        (probabilities,) = session.run(None, {"images": images.numpy()})
        assert probabilities.shape == (count, 10)
        assert probabilities.sum(axis=1) == pytest.approx(np.ones(count), abs=1e-5)
        wanted = classifier.to_probabilities(compute_outputs(classifier, images)).numpy()
        assert np.abs(probabilities - wanted).max() < 1e-4
    assert len(list(tmp_path.iterdir())) == 2  # no outputs/


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "activation", "norm", "deskew"),
    [
        pytest.param(FeedForward, "gelu", "batch", False, marks=SLOW),
        (FeedForward, "leaky_relu", "layer", True),
        (DirectionNet, "relu", "batch", True),
        pytest.param(FeedForward, "elu", "batch", False, marks=SLOW),
        pytest.param(FeedForward, "tanh", "layer", True, marks=SLOW),
        pytest.param(FeedForward, "gelu", "layer", True, marks=SLOW),
        pytest.param(FeedForward, "leaky_relu", "batch", False, marks=SLOW),
        pytest.param(FeedForward, "elu", "layer", True, marks=SLOW),
        pytest.param(FeedForward, "tanh", "batch", False, marks=SLOW),
    ],
)
def test_every_kind_of_net_can_be_exported(
    kind: type[FeedForward], activation: str, norm: str, deskew: bool
) -> None:
    torch.manual_seed(0)
    net = kind([16, 8], activation=activation, dropout=0.5, norm=norm)
    classifier = DigitClassifier(net, preprocess=Preprocess(mean=0.5, std=0.25, deskew=deskew)).eval()
    images = torch.randint(0, 256, (32, 28, 28), dtype=torch.uint8)
    assert compare(to_onnx(classifier, images), classifier, images) < 1e-5


def test_a_missing_checkpoint_is_told_in_a_line(tmp_path: Path, command: Run) -> None:
    done = command("export", "checkpoint=no.ckpt", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr == "no.ckpt is not a checkpoint: there is no such file\n"


def test_a_folder_is_no_output_and_stays(trained_run: Path, tmp_path: Path, command: Run) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = command("export", f"run={trained_run}", "output=mine", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "output=mine is a folder: name a file, for example mine/model.onnx\n"
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
