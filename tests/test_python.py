"""Tests of the parts used from Python: the tutorial's loaders, and with Lightning's own Trainer."""

import functools
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import REPOSITORY, Run, settle
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from processes import Fresh
from torch import Tensor, nn

from mnist_lightning import DigitClassifier, FeedForward, MNISTDataModule, load_mnist
from mnist_lightning.targets import name_of

IMPORTED = """
import sys, threading
from hydra.core.config_store import ConfigStore
hook, before = threading.excepthook, set(sys.modules)
import mnist_lightning
assert {"train", "load", "compose", "load_mnist"} < set(mnist_lightning.__all__) < set(dir(mnist_lightning))
assert not {"torch", "lightning", "matplotlib"} & set(sys.modules)
assert {name for name in set(sys.modules) - before if name.startswith("mnist_lightning.")} == set()
from mnist_lightning import *
assert DigitClassifier.__module__ == "mnist_lightning.classifier"
assert threading.excepthook is hook
assert "__deepcopy__" not in vars(ConfigStore)
try:
    mnist_lightning.load_minst
except AttributeError as error:
    print(error)
"""


@pytest.mark.slow
def test_importing_is_instant_and_changes_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    done = Fresh("-c", IMPORTED, cwd=tmp_path, env=environment).finish()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'mnist_lightning' has no attribute 'load_minst'\n"


def test_the_tutorials_loaders(data_dir: Path) -> None:
    torch.manual_seed(1)
    train, test = load_mnist(data_dir)
    assert [len(train.dataset), len(test.dataset)] == [60_000, 10_000]  # type: ignore[arg-type]
    assert [len(train), len(test)] == [938, 157]
    images, labels = next(iter(train))
    assert (images.shape, images.dtype) == ((64, 1, 28, 28), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    assert (images.min(), images.max()) == (-1, 1)
    passes = [[labels for _, labels in loader] for loader in (train, train, test, test)]
    for first, second in (passes[:2], passes[2:]):
        one, two = torch.cat(first), torch.cat(second)
        assert not torch.equal(one, two), "shuffled anew at each pass"
        assert torch.equal(one.bincount(), two.bincount())
    official = MNISTDataModule(data_dir=data_dir, val_size=0)
    official.setup("fit")
    everything = torch.cat([images for images, _ in test]).flatten(1)
    expected = (official.splits["test"].images.flatten(1).float() / 255 - 0.5) / 0.5
    assert torch.equal(everything.sum(dim=1).sort().values, expected.sum(dim=1).sort().values)
    torch.manual_seed(1)
    again, _ = load_mnist(str(data_dir), batch_size=128)
    assert torch.equal(next(iter(again))[1][:64], labels), "torch.manual_seed decides the order"


@pytest.mark.parametrize(
    ("epochs", "least"),
    [
        pytest.param(2, 0.9, marks=pytest.mark.slow),
        pytest.param(15, 0.97, marks=pytest.mark.reliability),
    ],
)
def test_the_tutorials_loop_trains_on_them(epochs: int, least: float, data_dir: Path) -> None:
    torch.manual_seed(1)
    train_loader, val_loader = load_mnist(data_dir, batch_size=64)
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    for _ in range(epochs):
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
    correct = 0
    with torch.no_grad():
        for images, labels in val_loader:
            correct += int((model(images).argmax(dim=1) == labels).sum())
    assert correct / 10_000 > least


@pytest.fixture
def trainer(tmp_path: Path) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        limit_train_batches=40,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[ModelCheckpoint(monitor="val/acc", mode="max", filename="best")],
        logger=CSVLogger(str(tmp_path)),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Linear(nn.Module):
    """A user's own net, which does not store its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [FeedForward, Linear])
def test_lightnings_own_way(make: type[nn.Module], trainer: L.Trainer, data_dir: Path) -> None:
    datamodule = MNISTDataModule(data_dir=data_dir)
    classifier = DigitClassifier(make())
    trainer.fit(classifier, datamodule=datamodule)
    (validated,) = trainer.validate(classifier, datamodule=datamodule, verbose=False)
    (tested,) = trainer.test(classifier, datamodule=datamodule, verbose=False)
    assert set(validated) == {"val/loss", "val/acc"}
    assert set(tested) == {"test/loss", "test/acc"}
    assert tested["test/acc"] > 0.8
    batches = trainer.predict(classifier, datamodule=datamodule)
    assert batches is not None
    probabilities = torch.cat(batches)  # type: ignore[arg-type]
    assert probabilities.shape == (10_000, 10)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(10_000))
    right = (probabilities.argmax(dim=1) == datamodule.splits["test"].labels).float().mean()
    assert right == pytest.approx(tested["test/acc"])

    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    if make is Linear:
        with pytest.raises(ValueError, match=r"does not tell how its net was made: pass it, as in .*net=…"):
            DigitClassifier.load_from_checkpoint(path)
        loaded = DigitClassifier.load_from_checkpoint(path, net=Linear())
    else:
        loaded = DigitClassifier.load_from_checkpoint(path)
    images = datamodule.splits["test"].images[:100]
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(images), classifier.eval()(images))


def test_a_net_that_a_file_names_is_not_imported(trainer: L.Trainer, data_dir: Path, tmp_path: Path) -> None:
    net = Linear()
    net.recipe = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}  # type: ignore[assignment]
    trainer.fit(DigitClassifier(net), datamodule=MNISTDataModule(data_dir=data_dir))
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"names os: pass it, as in load_from_checkpoint\(path, net=…\)"):
        DigitClassifier.load_from_checkpoint(path)
    assert not (tmp_path / "made").exists()
    assert isinstance(DigitClassifier.load_from_checkpoint(path, net=Linear()).net, Linear)


def test_a_sanity_check_is_no_epoch(data_dir: Path, tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=3,
        num_sanity_val_steps=2,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitClassifier(FeedForward([8])), datamodule=MNISTDataModule(data_dir=data_dir))
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/acc")
    assert len([row for row in rows[1:] if row.split(",")[column]]) == 1


def test_defaults_are_those_of_the_configs(tmp_path: Path) -> None:
    settings = settle(tmp_path)
    datamodule = MNISTDataModule()
    given = settings.data.module_arguments() | {"seed": settings.seed}
    assert dict(datamodule.hparams) == given
    classifier = DigitClassifier(FeedForward())
    for made, config in (
        (classifier.make_optimizer, settings.optimizer),
        (classifier.make_scheduler, settings.scheduler),
    ):
        assert isinstance(made, functools.partial)
        kind = made.func
        whole = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **made.keywords}
        same = {key: value for key, value in whole.items() if key != "_target_"}
        assert same == {key: value for key, value in config.items() if key != "_target_"}
        assert config["_target_"].rpartition(".")[2] == kind.__name__
    assert name_of(classifier.loss) == settings.loss["_target_"]
    assert set(classifier.val_metrics) == {"val/loss", "val/acc"}
    metric: Any = classifier.val_metrics["val/acc"]
    assert metric.average == "micro"
    assert [classifier.seed, classifier.decay_biases] == [settings.seed, settings.decay_biases]


def test_loaders_work_in_a_plain_loop(data_dir: Path) -> None:
    """The loaders work without calls of setup and set_epoch."""
    loader = MNISTDataModule(data_dir=data_dir).train_dataloader()
    first, second = (torch.cat([labels for _, labels in loader]) for _ in range(2))
    assert len(first) == 55_000
    assert not torch.equal(first, second)


def test_normalised_images_are_told(data_dir: Path) -> None:
    images, _ = next(iter(load_mnist(data_dir)[0]))
    with pytest.raises(ValueError, match=r"got \(64, 1, 28, 28\): use MNISTDataModule"):
        DigitClassifier(FeedForward([8]))(images)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, python: Run) -> None:
    """The code of docs/python.md runs as for a user, with Lightning's own defaults."""
    page = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 5
    (tmp_path / "page.py").write_text("\n".join(blocks) + "assert probabilities.shape == (5, 10)\n")
    done = python("page.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (float(number) for number in re.findall(r"^accuracy ([\d.]+)$", done.stdout, re.M))
    assert 0.85 < first < second
