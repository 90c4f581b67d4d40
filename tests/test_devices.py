"""Tests of what a GPU needs, as far as they are possible without one."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from test_resume import differences
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnist_lightning.classifier import DigitClassifier, get_random_state, set_random_state
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.evaluation.explanation import ask
from mnist_lightning.evaluation.likeness import pool, see
from mnist_lightning.evaluation.trained import choose_device, compute_outputs
from mnist_lightning.images.preprocess import Preprocess
from mnist_lightning.network import FeedForward

HERE = [torch.device("cpu")]
if (found := torch.accelerator.current_accelerator(check_available=True)) is not None:
    HERE.append(found)
ELASTIC = {
    "rotation": 15.0,
    "shear": 0.1,
    "scale": 0.1,
    "shift": 2.0,
    "elastic": 1.0,
    "smoothness": 4.0,
    "flags": 0.5,
}


def fit(data_dir: Path, epochs: int, *more: Any, resumed: Path | None = None, **preprocess: Any) -> L.Trainer:
    torch.manual_seed(1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=4,
        limit_val_batches=1,
        plugins=list(more),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net = FeedForward([16], norm="batch", dropout=0.2, input_noise=0.1)
    optimizer = functools.partial(torch.optim.AdamW, lr=0.004, fused=True)
    classifier = DigitClassifier(
        net, preprocess=Preprocess(**preprocess), optimizer=optimizer, scheduler=None
    )
    datamodule = MNISTDataModule(data_dir=data_dir, batch_size=64)
    trainer.fit(classifier, datamodule=datamodule, ckpt_path=resumed, weights_only=True)
    return trainer


class NoFloat64(TorchDispatchMode):
    """Forbid float64, which Apple's GPUs do not support."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64:
                raise TypeError(f"{func} gives float64")
        return result


def test_the_simulation_simulates() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="gives float64"):
        torch.zeros(2).double()


def test_training_needs_no_float64(data_dir: Path) -> None:
    """Training with deformation, deskewing, noise, dropout, validation and metrics uses no float64."""
    with NoFloat64():
        trainer = fit(data_dir, 1, deskew=True, augment=ELASTIC)
    assert trainer.global_step == 4
    assert 0 <= trainer.callback_metrics["val/acc"] <= 1


@pytest.mark.parametrize("device", HERE, ids=str)
def test_random_numbers_go_on(device: torch.device) -> None:
    before = get_random_state(torch.device("cpu")), get_random_state(device)
    drawn = torch.rand(3), torch.rand(3, device=device)
    assert before[1].keys() == {"cpu", device.type}
    set_random_state(before[1], device)
    assert torch.equal(torch.rand(3), drawn[0])
    if device.type != "cpu":
        assert torch.equal(torch.rand(3, device=device), drawn[1])


@pytest.mark.parametrize("device", HERE, ids=str)
def test_a_net_answers_alike_on_each_device(device: torch.device) -> None:
    torch.manual_seed(2)
    classifier = DigitClassifier(FeedForward([32])).eval()
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    here = compute_outputs(classifier, images)
    there = compute_outputs(classifier.to(device), images)
    assert there.device.type == "cpu"
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compute", [compute_outputs, see, pool, ask])
def test_images_go_to_the_net_and_answers_come_back(compute: Callable[..., Any]) -> None:
    """On the meta device, whose tensors have no content, only copying the answers back fails."""
    net = FeedForward([16, 8], norm="batch", dropout=0.2, input_noise=0.1)
    classifier = DigitClassifier(net, preprocess=Preprocess(deskew=True)).eval().to("meta")
    images = torch.zeros(5, 28, 28, dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        compute(classifier, images[:, None] if compute is ask else images)


def test_auto_is_cuda_or_the_cpu() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(OSError, match="device=cuda:99 can't be used here: "):
        choose_device("cuda:99")


def test_float16_goes_on_with_its_scale(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A resumed run has the same loss scale, and the same number of steps at it, as one that never stopped.

    The checkpoint claims another device; the run continues with a warning.
    """

    def scaled() -> MixedPrecision:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)  # type: ignore[attr-defined]
        return MixedPrecision("16-mixed", "cpu", scaler)

    first = fit(data_dir, 1, scaled())
    first.save_checkpoint(tmp_path / "first.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "first.ckpt", weights_only=True)
    assert checkpoint["MixedPrecision"]["scale"] == 512.0
    assert checkpoint["MixedPrecision"]["_growth_tracker"] == 1
    assert checkpoint["environment"]["device"] == "cpu"
    checkpoint["environment"]["device"] = "cuda"
    torch.save(checkpoint, tmp_path / "first.ckpt")
    with caplog.at_level(logging.WARNING):
        resumed = fit(data_dir, 2, scaled(), resumed=tmp_path / "first.ckpt")
    assert "the checkpoint was written with device cuda, this is cpu: results may differ" in caplog.text
    whole = fit(data_dir, 2, scaled())
    for trainer, name in ((resumed, "resumed"), (whole, "whole")):
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt", weights_only=False)
    two = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("resumed", "whole")]
    assert two[0]["MixedPrecision"]["_growth_tracker"] == 2
    for part in ("state_dict", "optimizer_states", "MixedPrecision"):
        assert differences(two[0][part], two[1][part]) == []
