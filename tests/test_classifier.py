import hashlib
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Once, Run
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.optim import lr_scheduler

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.cli import is_of_library
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.evaluation.trained import load_classifier
from mnist_lightning.network import FeedForward
from mnist_lightning.rundir.checkpoint import load

Fit = Callable[..., dict[str, object]]
SHORT = ("trainer.max_epochs=2", "+trainer.limit_train_batches=40", "model.hidden=32", "logger=csv")


def test_metrics_are_those_of_the_net(fit: Fit, tmp_path: Path, data_dir: Path) -> None:
    """val/loss and val/acc equal those computed plainly over the validation images."""
    metrics = fit(*SHORT)
    checkpoint = load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    classifier, _ = load_classifier(tmp_path / "run" / "checkpoints" / "best.ckpt")
    datamodule = MNISTDataModule(**checkpoint["datamodule_hyper_parameters"])
    datamodule.setup("fit")
    digits = datamodule.splits["val"]
    with torch.inference_mode():
        logits = classifier(digits.images)
    assert metrics["val/acc"] == pytest.approx(
        (logits.argmax(1) == digits.labels).double().mean().item(), abs=1e-6
    )
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, digits.labels).item(), abs=1e-5)
    assert metrics["val/acc"] > 0.8, "it learns"


def test_training_loss_includes_label_smoothing_and_validation_loss_does_not(fit: Fit) -> None:
    plain, smooth = fit(*SHORT, folder="a"), fit(*SHORT, "loss.label_smoothing=0.3", folder="b")
    assert smooth["last/train/loss"] > plain["last/train/loss"] + 0.3  # type: ignore[operator]
    assert smooth["last/val/loss"] != plain["last/val/loss"]
    floor = -0.73 * math.log(0.73) - 9 * 0.03 * math.log(0.03)  # the entropy of the smoothed labels
    assert smooth["last/train/loss"] > floor  # type: ignore[operator]


def test_training_adds_what_the_loss_finds_wrong_with_the_net(fit: Fit) -> None:
    """Its addition changes the weights, by its factor; the losses that are shown do not contain it."""
    few = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "model.hidden=32", "logger=none")
    virtual = (*few, "loss=virtual_adversarial")
    plain, idle = fit(*few, folder="a"), fit(*virtual, "loss.weight=1e-9", folder="b")
    acting = fit(*virtual, "loss.weight=50", folder="c")
    for key in ("last/train/loss", "last/val/loss"):
        assert idle[key] == pytest.approx(plain[key], rel=1e-3)
        assert acting[key] != pytest.approx(plain[key], rel=0.02)
    assert acting["last/train/loss"] < 10  # type: ignore[operator]


def learning_rates(folder: Path) -> list[float]:
    import csv

    with (folder / "csv" / "metrics.csv").open() as file:
        return [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        # the middle and the end of 80 steps, logged every 40; the rate is that of the last step's update
        ("none", [0.004, 0.004]),
        (
            "cosine",
            [0.004 * (1 + math.cos(math.pi * 39 / 80)) / 2, 0.004 * (1 + math.cos(math.pi * 79 / 80)) / 2],
        ),
        ("step", [0.004, 0.002]),
    ],
)
def test_schedule_covers_the_run(fit: Fit, tmp_path: Path, scheduler: str, expected: list[float]) -> None:
    fit(
        *SHORT,
        f"scheduler={scheduler}",
        *(["scheduler.step_size=1"] if scheduler == "step" else []),
        "trainer.log_every_n_steps=40",
    )
    assert learning_rates(tmp_path / "run") == pytest.approx(expected, rel=1e-3)


def test_onecycle_ends_at_the_bottom(fit: Fit, tmp_path: Path) -> None:
    fit(*SHORT, "scheduler=onecycle", "trainer.log_every_n_steps=8")
    rates = learning_rates(tmp_path / "run")
    assert max(rates) == pytest.approx(0.004, rel=0.02)
    assert rates[-1] < 1e-5


def test_plateau_lowers_the_rate(fit: Fit, tmp_path: Path) -> None:
    fit(
        *SHORT,
        *(
            "scheduler=plateau",
            "scheduler.patience=0",
            "+scheduler.threshold=10",
            "+scheduler.threshold_mode=abs",
        ),
        "trainer.max_epochs=4",
    )
    assert learning_rates(tmp_path / "run")[-1] < 0.004


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer_learns(fit: Fit, optimizer: str) -> None:
    assert fit(*SHORT, f"optimizer={optimizer}")["val/acc"] > 0.75  # type: ignore[operator]


@pytest.mark.parametrize(
    ("knob", "folder"),
    [("model.dropout=0.5", "a"), ("model.norm=batch", "b"), ("seed=0", "c"), ("seed=2", "d")],
)
def test_every_knob_changes_the_net(fit: Fit, once: Once, knob: str, folder: str) -> None:
    def make(cwd: Path) -> None:
        (cwd / "loss.json").write_text(json.dumps(fit(*SHORT)["val/loss"]))

    plain = json.loads((once("no knob", make) / "loss.json").read_text())
    assert fit(*SHORT, knob, folder=folder)["val/loss"] != plain


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param((0, 2), marks=pytest.mark.slow),
        pytest.param((0, 0, 0, 0, 0, 2, 4), marks=pytest.mark.reliability),
    ],
)
def test_every_process_makes_the_same_weights(workers: tuple[int, ...], tmp_path: Path, command: Run) -> None:
    hashes = set()
    for number, num_workers in enumerate(workers):
        run = f"hydra.run.dir={number}"
        done = command(
            "train", *SHORT, "model.dropout=0.2", f"data.num_workers={num_workers}", run, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        weights = load(tmp_path / str(number) / "checkpoints" / "last.ckpt")["state_dict"]
        hashes.add(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).digest())
    assert len(hashes) == 1


def test_nan_is_told_with_its_step_and_the_last_good_checkpoint_stays(fit: Fit, tmp_path: Path) -> None:
    fit(*SHORT, "trainer.max_epochs=1")
    good = (tmp_path / "run" / "checkpoints" / "best.ckpt").read_bytes()
    with pytest.raises(FloatingPointError, match=r"train/loss is (nan|inf) at step 2;"):
        fit(*SHORT, "optimizer.lr=1e30")
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").read_bytes() == good


def test_a_run_too_short_for_its_schedule_is_told_so(fit: Fit) -> None:
    """OneCycleLR divides by zero if 5 % of the steps are one step."""
    with pytest.raises(MisconfigurationException, match="can't plan a run with total_steps=20"):
        fit(*SHORT, "scheduler=warmup_cosine", "trainer.limit_train_batches=20", "trainer.max_epochs=1")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"optimizer": partial(torch.optim.AdamW, lr=0.1, betas=(2, 2))}, "optimizer: torch.optim.adamw.AdamW can't"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1, fused=True, foreach=True)}, "optimizer: torch.optim.sgd.SGD"),
        (
            {"scheduler": partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps="total_steps", anneal_strategy="x")},
            "scheduler: torch.optim.lr_scheduler.OneCycleLR can't be used: ValueError",
        ),
        ({"scheduler": partial(lr_scheduler.StepLR, step_size=0)}, "scheduler: torch.optim.lr_scheduler.StepLR can't"),
        ({"scheduler": partial(lr_scheduler.ReduceLROnPlateau, patience="x")}, "ReduceLROnPlateau can't be used"),
        ({"scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: -1.0)}, "gives the learning rate -0.004"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)  # fmt: skip
def test_optimizer_and_schedule_are_tried_before_the_training(made: dict[str, Any], message: str) -> None:
    classifier = DigitClassifier(FeedForward([8]), **made)
    before, drawn = classifier.state_dict(), torch.get_rng_state()
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        classifier.check()
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_schedule_that_ends_before_the_run_is_told_in_a_line(fit: Fit) -> None:
    with pytest.raises(ValueError, match="Tried to step 2 times") as caught:
        fit(*SHORT, "scheduler=onecycle", "scheduler.total_steps=1")
    assert is_of_library(caught.value)


def test_weights_gone_wrong_are_not_saved(fit: Fit, tmp_path: Path) -> None:
    """After one step with an infinite update, the loss is still finite, but the weights are not."""
    with pytest.raises(FloatingPointError, match="a weight is NaN or infinite after step 1"):
        fit(
            *SHORT,
            *("data.val_size=0", "optimizer=sgd", "optimizer.lr=3e38", "optimizer.weight_decay=1e38"),
            *("trainer.limit_train_batches=1", "trainer.max_epochs=1"),
        )
    assert not list((tmp_path / "run").rglob("*.ckpt"))
