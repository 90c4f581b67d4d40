import csv
import json
import os
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.config import ConfigError, Evaluate
from mnist_lightning.evaluate import tabulate
from mnist_lightning.evaluation.scores import score
from mnist_lightning.evaluation.trained import load_classifier, load_split, log_probabilities
from mnist_lightning.images.preprocess import Preprocess
from mnist_lightning.losses import CrossEntropy
from mnist_lightning.network import DirectionNet, FeedForward
from mnist_lightning.rundir.checkpoint import serialize
from mnist_lightning.rundir.find import find_checkpoint, find_run

NAMES = [str(digit) for digit in range(10)]


def test_evaluate_finds_the_run_and_agrees_with_training(
    trained_run: Path, tmp_path: Path, command: Run
) -> None:
    shutil.copytree(trained_run.parents[2], tmp_path / "logs")
    workplace, trained_run = tmp_path, tmp_path / "logs" / trained_run.relative_to(trained_run.parents[2])
    done = command("evaluate", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = trained_run / "evaluation" / "test"
    metrics = json.loads((folder / "metrics.json").read_text())
    of_training = json.loads((trained_run / "metrics.json").read_text())
    assert metrics["acc"] == pytest.approx(of_training["test/acc"], abs=1e-6)
    assert metrics["loss"] == pytest.approx(of_training["test/loss"], abs=1e-5)
    low, high = metrics["acc_interval_95"]
    assert low < metrics["acc"] < high
    assert metrics["images"] == sum(metrics["support"]) == 10_000
    assert 0 < metrics["expected_calibration_error"] < 0.1

    rows = list(csv.DictReader((folder / "predictions.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(10_000))
    hits = [row["label"] == row["prediction"] for row in rows]
    assert np.mean(hits) == pytest.approx(metrics["acc"])
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    for name in ("confusion_matrix", "reliability", "mistakes"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size[0] == 960

    assert f"{100 * metrics['acc']:.2f} %" in done.stdout
    assert f"{100 * low:.2f} to {100 * high:.2f} %" in done.stdout
    for name in NAMES:
        assert any(line.split()[:1] == [name] for line in done.stdout.splitlines())
    assert sorted(path.name for path in workplace.iterdir()) == ["logs"]  # no outputs/


def test_a_checkpoint_file_alone_is_enough_whatever_its_name(
    trained_run: Path, tmp_path: Path, command: Run
) -> None:
    checkpoint = tmp_path / "a (1)=b,é #x.ckpt"
    shutil.copy(trained_run / "checkpoints" / "best.ckpt", checkpoint)
    done = command(
        "evaluate", f"checkpoint={checkpoint.name}", "split=val", "output=out, (2)=é", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out, (2)=é" / "metrics.json").read_text())
    of_training = json.loads((trained_run / "metrics.json").read_text())
    assert metrics["acc"] == pytest.approx(of_training["val/acc"], abs=1e-6)
    assert metrics["images"] == 5_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.name, "out, (2)=é"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split=dev"], "split must be one of test, val, train, got dev"),
        (["run=nowhere"], "nowhere is not a run folder: there is no such folder"),
        (["checkpoint=a,b.ckpt"], "a,b.ckpt"),
        (["run=a", "checkpoint=b"], "run and checkpoint name two nets"),
        ([], "latest: no run under"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, command: Run
) -> None:
    done = command("evaluate", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_damaged_net_is_never_replaced_in_silence(trained_run: Path, tmp_path: Path, command: Run) -> None:
    folder = tmp_path / "my run" / "checkpoints"
    shutil.copytree(trained_run / "checkpoints", folder)
    (folder / "best.ckpt").write_bytes((folder / "best.ckpt").read_bytes()[:-7])
    done = command("evaluate", "run=my run", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "my run/checkpoints/best.ckpt is cut off" in done.stderr
    (other,) = [word for word in shlex.split(done.stderr) if word.startswith("checkpoint=")]
    assert other == "checkpoint=my run/checkpoints/last.ckpt"
    assert command("evaluate", other, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_a_path_in_a_checkpoint_is_never_written_to(trained_run: Path, tmp_path: Path, command: Run) -> None:
    checkpoint = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["datamodule_hyper_parameters"]["data_dir"] = str(tmp_path / "victim")
    (tmp_path / "a.ckpt").write_bytes(serialize(checkpoint))
    for command_name in ("evaluate", "export"):
        done = command(command_name, "checkpoint=a.ckpt", cwd=tmp_path)
        assert done.returncode == 1
        assert "a.ckpt was trained on data in" in done.stderr
        assert "data_dir=" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "victim").exists()
    damaged = tmp_path / "victim" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    damaged.mkdir(parents=True)  # preparing the data would replace it
    with pytest.raises(OSError, match="was trained on data in"):
        load_split(tmp_path / "a.ckpt", checkpoint, "test", data_dir=None)
    assert damaged.is_dir()
    done = command("evaluate", "checkpoint=a.ckpt", "data_dir=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "MNIST").is_dir()


def test_settings_are_checked_without_a_process() -> None:
    values = {"run": "latest", "checkpoint": None, "runs": [], "tta": 0}
    values |= {
        "folds": None,
        "labels": False,
        "data_dir": None,
        "trust": None,
        "output": None,
        "show": False,
        "threads": None,
        "device": "auto",
    }
    assert Evaluate(split="val", **values).split == "val"  # type: ignore[arg-type]
    with pytest.raises((ValueError, ConfigError), match="split must be one of"):
        Evaluate(split="all", **values)  # type: ignore[arg-type]
    for name in ("gpu", "CUDA", "cuda:", "cuda:x", "cpu:0", ""):
        with pytest.raises(
            (ValueError, ConfigError), match="device must be auto, cpu, cuda, cuda:<number> or mps"
        ):
            Evaluate(split="val", **(values | {"device": name}))  # type: ignore[arg-type]


def test_what_is_no_run_is_called_what_it_is(trained_run: Path, tmp_path: Path, command: Run) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(trained_run / ".hydra", run / ".hydra")
    shutil.copy(trained_run / "checkpoints" / "best.ckpt", run / "checkpoints")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    for name, argument, told in (
        ("train", "resume=run/checkpoints/best.ckpt", "is not a run folder: it belongs to the run run"),
        ("train", "resume=run/checkpoints", "is not a run folder: it belongs to the run run"),
        ("train", "resume=run/lost", "is not a run folder: there is no such folder"),
        ("train", "resume=notes.txt", "is not a run folder: it is a file"),
        ("train", "resume=empty", "is not a run folder: it has no checkpoints/*.ckpt"),
        ("train", "reproduce=notes.txt", "is not a run folder: it is a file"),
        ("evaluate", "checkpoint=run", "is not a checkpoint: it is a folder"),
        ("evaluate", "checkpoint=lost", "is not a checkpoint: there is no such file"),
        ("runs", "under=notes.txt", "holds no runs: it is a file"),
    ):
        wrong = command(name, argument, cwd=tmp_path)
        assert wrong.returncode == 1
        assert wrong.stderr == f"{argument.partition('=')[2]} {told}\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    """It is refused by its kind: to read it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="pipe is not a checkpoint: it is a pipe or a device"):
        find_checkpoint("latest", str(tmp_path / "pipe"))
    with pytest.raises(FileNotFoundError, match="pipe is not a run folder: it is a pipe or a device"):
        find_checkpoint(str(tmp_path / "pipe"))


@pytest.mark.parametrize("kind", [FeedForward, partial(DirectionNet, directions=5, spacing=6)])
def test_nothing_comes_from_todays_defaults(
    kind: Callable[..., FeedForward], trained_run: Path, tmp_path: Path
) -> None:
    """A net with settings that no YAML file has is loaded unchanged."""
    torch.manual_seed(3)
    net = kind([7, 5], activation="tanh", dropout=0.3, norm="batch")
    classifier = DigitClassifier(
        net, preprocess=Preprocess(mean=0.4, std=0.2, deskew=True), loss=CrossEntropy(label_smoothing=0.1)
    ).eval()
    checkpoint = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
    rebuilt = rebuild(classifier.state_dict(), dict(classifier.hparams), checkpoint, tmp_path)
    images = torch.randint(0, 256, (50, 28, 28), dtype=torch.uint8)
    assert torch.equal(rebuilt(images), classifier(images))
    assert not rebuilt.training
    assert isinstance(rebuilt.loss, CrossEntropy)
    assert rebuilt.loss.label_smoothing == 0.1


def rebuild(state: Any, settings: Any, checkpoint: dict[str, Any], folder: Path) -> DigitClassifier:
    path = folder / "other.ckpt"
    content = checkpoint | {"hyper_parameters": settings, "state_dict": state}
    content.pop("confidence")  # it belongs to the trained net
    path.write_bytes(serialize(content))
    return load_classifier(path)[0]


def test_a_net_that_does_not_fit_its_settings_is_refused(trained_run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
    state, settings = checkpoint["state_dict"], checkpoint["hyper_parameters"]
    model = settings["model"]
    for change in ({"hidden": [10**7, 10**7]}, {"hidden": "wide"}, {"activation": "sign"}, {"width": 3}):
        with pytest.raises(OSError, match=r"other\.ckpt"):
            rebuild(state, settings | {"model": model | change}, checkpoint, tmp_path)
    for change in (
        {"image_shape": [1, 9, 9]},
        {"class_names": list("abcdefg")},
        {"preprocess": {}, "metrics": 3},
        {"loss": 3},
    ):
        with pytest.raises(OSError, match=r"other\.ckpt"):
            rebuild(state, settings | change, checkpoint, tmp_path)


def test_the_validation_images_are_those_of_the_run(data_dir: Path, trained_run: Path) -> None:
    path = trained_run / "checkpoints" / "best.ckpt"
    classifier, checkpoint = load_classifier(path)
    sizes = {
        split: len(load_split(path, checkpoint, split, data_dir=str(data_dir)))
        for split in ("train", "val", "test")
    }
    assert sizes == {"train": 55_000, "val": 5_000, "test": 10_000}
    checkpoint["datamodule_hyper_parameters"]["val_size"] = 0
    with pytest.raises(OSError, match=r"split=val: the run had no such split of mnist \(data.val_size=0\)"):
        load_split(path, checkpoint, "val", data_dir=str(data_dir))
    test = load_split(path, checkpoint, "test", data_dir=str(data_dir))
    one_by_one = torch.cat([log_probabilities(classifier, image[None]) for image in test.images[:50]])
    assert torch.allclose(one_by_one, log_probabilities(classifier, test.images)[:50], atol=1e-5)


def test_latest_is_the_newest_folder_with_a_valid_checkpoint(trained_run: Path, tmp_path: Path) -> None:
    import os

    for age, name in ((30, "runs/old"), (20, "multiruns/sweep/3"), (10, "runs/broken")):
        folder = tmp_path / "train" / name / "checkpoints"
        folder.mkdir(parents=True)
        (folder.parent / ".hydra").mkdir()
        shutil.copy(trained_run / "checkpoints" / "best.ckpt", folder / "best.ckpt")
        if name.endswith("broken"):
            (folder / "best.ckpt").write_bytes(b"PK half a file")
        os.utime(folder / "best.ckpt", (1e9 - age, 1e9 - age))
    assert find_run("latest", logs=tmp_path) == tmp_path / "train/multiruns/sweep/3"


def test_score_and_table_of_a_faultless_and_a_useless_net() -> None:
    labels = np.arange(100) % 10
    certain = np.full((100, 10), -50.0, dtype=np.float32)
    certain[np.arange(100), labels] = 0
    perfect = score(labels, certain)
    assert perfect.accuracy == 1
    assert perfect.loss == 0
    assert len(perfect.worst(40)) == 0
    assert "most often" not in tabulate(perfect, NAMES)
    constant = np.full((100, 10), -50.0, dtype=np.float32)
    constant[:, 3] = 0
    useless = score(labels, constant)
    assert useless.accuracy == pytest.approx(0.1)
    assert useless.loss == pytest.approx(45)
    assert useless.calibration.error == pytest.approx(0.9)
    assert "–" in tabulate(useless, NAMES)  # the precision of a class that is never predicted is undefined
    assert 3 not in useless.labels[useless.worst(100)]
