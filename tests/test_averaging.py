"""Tests of the moving average of the weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mnist_lightning.evaluation.trained import load_classifier, load_split, log_probabilities
from mnist_lightning.rundir.checkpoint import load

Fit = Callable[..., dict[str, object]]
QUICK = (
    *("trainer.max_epochs=2", "+trainer.limit_train_batches=40", "model.hidden=32", "model.norm=batch"),
    *("logger=none", "scheduler=none"),
)


def test_the_average_is_what_is_validated_kept_and_tested(fit: Fit, tmp_path: Path) -> None:
    metrics = fit(*QUICK, "ema_decay=0.9", "optimizer.lr=0.05", test=True)
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint = load(path)
    current, averaged = checkpoint["current_weights"], checkpoint["state_dict"]
    assert not torch.equal(current["net.layers.1.weight"], averaged["net.layers.1.weight"])
    assert not torch.equal(current["net.layers.2.running_mean"], averaged["net.layers.2.running_mean"])
    classifier, _ = load_classifier(path)
    for split in ("val", "test"):
        digits = load_split(path, checkpoint, split, data_dir=None)
        right = log_probabilities(classifier, digits.images).argmax(1) == digits.labels
        assert right.float().mean().item() == pytest.approx(metrics[f"{split}/acc"], abs=1e-6)
        if split == "val":
            assert metrics["val/acc"] == metrics["last/val/acc"], "the second epoch is the better one"


def test_the_average_follows_its_formula(fit: Fit, tmp_path: Path) -> None:
    """The weights of each step are kept, and averaged here in double precision."""
    kept = tmp_path / "kept"
    kept.mkdir()
    keep = ("+callbacks.keep._target_=keep_checkpoints.Keep", f"+callbacks.keep.folder='{kept}'")
    fit(*QUICK, "trainer.max_epochs=1", "checkpoint.every_n_steps=1", "ema_decay=0.5", *keep)
    name = "net.layers.1.weight"
    saved = [load(path) for path in sorted(kept.iterdir())]
    assert [one["global_step"] for one in saved] == list(range(1, 41))
    average = saved[0]["state_dict"][name].double()
    for step, one in enumerate(saved[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * one["current_weights"][name].double()
        torch.testing.assert_close(one["state_dict"][name].double(), average, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_training_itself_does_not_see_the_average(fit: Fit, tmp_path: Path) -> None:
    fit(*QUICK, "ema_decay=0.99", folder="with")
    fit(*QUICK, folder="without")
    averaged, plain = (load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("with", "without"))
    for name, weight in averaged["current_weights"].items():
        assert torch.equal(weight, plain["state_dict"][name]), name
