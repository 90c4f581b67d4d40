"""docs/lightning.md is complete and true: each Trainer argument and callback works, or a line says why not."""

import importlib.util
import inspect
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import lightning as L
import lightning.pytorch.callbacks
import pytest
import torch
from conftest import REPOSITORY, few, settle
from hydra.errors import CompactHydraException

from mnist_lightning.rundir.checkpoint import load

Fit = Callable[..., dict[str, object]]
PAGE = (REPOSITORY / "docs" / "lightning.md").read_text()
CALLBACKS = "lightning.pytorch.callbacks"
SHORT = ("model.hidden=8", "logger=csv", "callbacks.summary=null", "callbacks.progress=null")


def read_rows() -> list[tuple[str, tuple[str, ...], str]]:
    """Return the rows of the page: the listed name, the arguments of its example, and its description."""
    rows = []
    for name, example, said in re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\| (.*) \|$", PAGE, re.M):
        arguments = shlex.split(example)
        if name in lightning.pytorch.callbacks.__all__:
            target = f"+callbacks.mine._target_={CALLBACKS}.{name}"
            arguments = [target, *(f"+callbacks.mine.{argument}" for argument in arguments)]
        rows.append((name, tuple(arguments), said))
    return rows


ROWS = read_rows()
INSTALLED = tuple(  # what the page says is refused without these packages works where they are installed
    f"refused without the package `{name}`" for name in ("rich",) if importlib.util.find_spec(name)
)
REFUSED = [row for row in ROWS if row[2].startswith("refused") and not row[2].startswith(INSTALLED)]
WORKING = [row for row in ROWS if row not in REFUSED]


def test_all_of_lightning_is_listed() -> None:
    arguments = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert {name for name, _, _ in ROWS} == arguments | set(lightning.pytorch.callbacks.__all__)


@pytest.mark.parametrize("row", few([(row,) for row in REFUSED], 3), ids=lambda row: " ".join(row[1])[-60:])
def test_what_is_refused_is_refused_in_a_line(row: tuple[str, tuple[str, ...], str], tmp_path: Path) -> None:
    """It is refused before any data is read: the data's folder does not exist and can't be made."""
    from mnist_lightning.train import train

    (tmp_path / "file").write_text("")
    with pytest.raises(CompactHydraException) as caught:
        train(settle(tmp_path, f"data.data_dir='{tmp_path / 'file'}'", *row[1]), tmp_path, test=False)
    assert row[0].removesuffix("_predict_batches") in str(caught.value)
    assert "\n" not in str(caught.value)


def run_example(arguments: tuple[str, ...], fit: Fit) -> dict[str, object]:
    limit = () if "limit_train_batches" in " ".join(arguments) else ("+trainer.limit_train_batches=6",)
    return fit("trainer.max_epochs=1", *SHORT, *limit, *arguments, test=True)


@pytest.mark.slow
@pytest.mark.parametrize("row", WORKING, ids=lambda row: " ".join(row[1])[-60:])
def test_what_works_works(
    row: tuple[str, tuple[str, ...], str], fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = run_example(row[1], fit)
    assert 0 < metrics["test/acc"] <= 1  # type: ignore[operator]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


def test_several_work_together(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    together = ("bf16-mixed", "limit_val", "inference_mode", "detect_anomaly", "LearningRateMonitor", "Timer")
    rows = [row for row in WORKING if any(part in " ".join(row[1]) for part in together)]
    named = [
        argument.replace("callbacks.mine", f"callbacks.{name}")
        for name, arguments, _ in rows
        for argument in arguments
    ]
    metrics = fit("trainer.max_epochs=1", *SHORT, "+trainer.limit_train_batches=6", *named)
    assert metrics["steps"] == 6
    weights = load(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"].values()
    assert {one.dtype for one in weights if one.is_floating_point()} == {torch.float32}


def test_bfloat16_is_clipped_beside_a_fused_optimizer(fit: Fit) -> None:
    settings = (*SHORT, "trainer.precision=bf16-mixed", "optimizer=sgd", "+trainer.limit_train_batches=6")
    losses = [
        fit(*settings, "trainer.max_epochs=1", *more, folder=str(number))["last/train/loss"]
        for number, more in enumerate([(), ("+trainer.gradient_clip_val=1e-6",)])
    ]
    assert losses[1] > losses[0]  # type: ignore[operator]
    assert losses[1] == pytest.approx(2.3, abs=0.3), "it has hardly learned"


def test_no_checkpoints_and_no_loggers_where_trainer_is_told_so(fit: Fit, tmp_path: Path) -> None:
    off = ("+trainer.enable_checkpointing=false", "+trainer.logger=false")
    metrics = fit("trainer.max_epochs=1", "model.hidden=8", "+trainer.limit_train_batches=3", *off, test=True)
    assert "test/acc" in metrics
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "metrics.json",
        "test_correct.npy",
        "val_correct.npy",
    ]
