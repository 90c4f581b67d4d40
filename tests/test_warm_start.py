"""Tests of ``init_from``: a run starts with the fitting weights of another run."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.network import FeedForward
from mnist_lightning.rundir.checkpoint import serialize
from mnist_lightning.train import take_weights


def save(net: FeedForward, path: Path) -> Path:
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    path.write_bytes(serialize({"state_dict": weights, "hyper_parameters": {}, "global_step": 1}))
    return path


def test_all_weights_that_fit_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    source = FeedForward([16, 8])
    path = save(source, tmp_path / "best.ckpt")
    same = DigitClassifier(FeedForward([16, 8]))
    take_weights(same, path)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in same.net.state_dict().items())
    assert "6 of 6 weights are from" in caplog.text
    assert "initialised at random" not in caplog.text
    wider = DigitClassifier(FeedForward([16, 9]))
    before = {name: value.clone() for name, value in wider.net.state_dict().items()}
    take_weights(wider, path)
    after = wider.net.state_dict()
    taken = [name for name in after if not torch.equal(before[name], after[name])]
    assert all(torch.equal(after[name], source.state_dict()[name]) for name in taken)
    assert [tuple(after[name].shape) for name in taken] == [(16, 784), (16,), (10,)]
    assert "3 of 6 weights are from" in caplog.text
    assert "(9, 16) instead of (8, 16)" in caplog.text


def test_a_net_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    path = save(FeedForward([16], num_classes=5), tmp_path / "best.ckpt")
    with pytest.raises(OSError, match=r"init_from=.*best.ckpt: no weight fits this net"):
        take_weights(DigitClassifier(FeedForward([8])), path)


def test_a_run_begins_with_them(
    fit: Callable[..., dict[str, object]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    short = ("model.hidden=16", "trainer.max_epochs=1", "+trainer.limit_train_batches=60", "logger=none")
    first = fit(*short, folder="a")
    again = fit(*short, "seed=2", "scheduler=none", f"init_from='{tmp_path / 'a'}'", folder="b")
    assert float(str(again["last/train/loss"])) < float(str(first["last/train/loss"])) / 1.5
    assert f"weights are from {tmp_path / 'a' / 'checkpoints' / 'best.ckpt'}" in caplog.text
