"""Runs of earlier versions can be read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DefaultRun, Run

from mnist_lightning.rundir.checkpoint import serialize


def age(run: Path, folder: Path) -> Path:
    """Turn a run's folder into one of the first edition, whose net normalised its input and settings named no net."""
    shutil.copytree(run, folder)
    config = folder / ".hydra" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    del settings["model"]["_target_"], settings["metrics"], settings["trust"], settings["decay_biases"]
    settings |= {"label_smoothing": settings.pop("loss")["label_smoothing"]}
    config.write_text(yaml.safe_dump(settings))
    for path in folder.glob("checkpoints/*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        recipe = checkpoint["hyper_parameters"]
        names = ("hidden", "activation", "dropout", "norm", "input_noise", "noise")
        checkpoint["hyper_parameters"] = {
            **{name: recipe["model"][name] for name in names},
            **recipe["preprocess"],
            "label_smoothing": 0.0,
        }
        checkpoint["datamodule_hyper_parameters"]["deskew"] = recipe["preprocess"]["deskew"]
        constants = {
            f"net.{name}": torch.tensor(255 * recipe["preprocess"][name]) for name in ("mean", "std")
        }
        checkpoint["state_dict"] = constants | checkpoint["state_dict"]
        path.write_bytes(serialize(checkpoint))
    return folder


@pytest.fixture
def old(default_run: DefaultRun, tmp_path: Path) -> Path:
    return age(default_run.folder, tmp_path / "old")


@pytest.mark.slow
def test_a_run_of_the_first_edition_is_read(
    old: Path, default_run: DefaultRun, command: Run, tmp_path: Path
) -> None:
    metrics = json.loads((default_run.folder / "metrics.json").read_text())
    done = command("evaluate", "run=old", "split=val", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((old / "evaluation" / "val" / "metrics.json").read_text())
    assert evaluated["acc"] == pytest.approx(metrics["val/acc"], abs=1e-6)
    done = command("compare", f"runs=[old,{default_run.folder}]", "output=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "only A is right on 0 images, only B on 0" in done.stdout
    done = command("export", "run=old", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_run_of_the_first_edition_is_not_gone_on_with(old: Path, command: Run, tmp_path: Path) -> None:
    done = command("train", "resume=old", "trainer.max_epochs=20", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{old} can't be resumed: it was trained by an earlier version")


def test_a_checkpoint_of_the_first_edition_that_is_not_whole_is_told_so(
    old: Path, command: Run, tmp_path: Path
) -> None:
    path = old / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["hyper_parameters"]["mean"]
    path.write_bytes(serialize(checkpoint))
    done = command("evaluate", f"checkpoint={path}", cwd=tmp_path)
    assert done.returncode == 1
    assert "is not a checkpoint of mnist_lightning: it lacks 'mean'" in done.stderr


def test_a_run_whose_classes_have_moved_is_not_gone_on_with(
    default_run: DefaultRun, command: Run, tmp_path: Path
) -> None:
    shutil.copytree(default_run.folder, tmp_path / "old")
    config = tmp_path / "old" / ".hydra" / "config.yaml"
    text = config.read_text()
    config.write_text(
        text.replace("mnist_lightning.callbacks.progress.Progress", "mnist_lightning.callbacks.Progress")
    )
    assert config.read_text() != text
    done = command("train", "resume=old", "trainer.max_epochs=20", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"{tmp_path / 'old'} can't be resumed: it was trained by an earlier version"
    )
    assert "mnist_lightning.callbacks.Progress is gone" in done.stderr
    assert len(done.stderr.splitlines()) == 1
