"""Compare the time of a training step with that of the same arithmetic in a plain torch loop.

``train`` is the project's own train() with everything that is on by default: progress bar on a terminal,
TensorBoard, CSV, metrics, checkpoints, default net and settings, but without validation.  The bare loop
starts from the same weights, and uses the same images in the same order, the same optimizer and the same
schedule; each pair of runs is checked to end with the same weights to the bit.  At batch size 64, bare
Lightning (``Trainer(barebones=True)``) is measured with the same check.  A tutorial's loop is compared with
``experiment=tutorial``, with the same net, optimizer and order; their losses must agree.

Only the steps are timed: from the start of an epoch, including shuffling, to the end of its last step.  One
untimed round comes first.

    python -m benchmarks.step_overhead
    python -m benchmarks.step_overhead --device cuda
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict, read_write
from torch.nn import functional as F

from benchmarks import bare_loop, tutorial_loop
from benchmarks.measure import Table, empty_folder, make_parser, publish, ratio, spread, take_turns
from mnist_lightning import threads
from mnist_lightning.callbacks.progress import Progress
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.config import CONF_DIR, Train, check, register
from mnist_lightning.data import EpochSampler, Images, MNISTDataModule
from mnist_lightning.rundir.checkpoint import load
from mnist_lightning.train import make_classifier, train
from mnist_lightning.workarounds import quiet_lightning, skip_device_probe

EPOCHS = {64: 1, 256: 4, 1024: 12}  # by batch size, so that a round takes about a second
Weights = dict[str, torch.Tensor]


@dataclass
class Result:
    """The result of one round.

    Attributes:
        steps: the number of timed steps.
        seconds: the time of all these steps.
        weights: the net's weights after the last step, on the CPU.
        loss: the mean loss of the last epoch; None if unknown.
    """

    steps: int
    seconds: float
    weights: Weights = field(repr=False)
    loss: float | None = None

    @property
    def step(self) -> float:
        """Seconds per step."""
        return self.seconds / self.steps


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class TimedProgress(Progress):
    """The progress bar with a clock, so that measuring needs no further callback."""

    seconds = 0.0
    steps = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        synchronize()
        TimedProgress.seconds -= time.perf_counter()
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if batch_idx + 1 == trainer.num_training_batches:
            synchronize()
            TimedProgress.seconds += time.perf_counter()
            TimedProgress.steps += batch_idx + 1


def settle(run_dir: Path, overrides: list[str]) -> Train:
    """Compose and check settings, as the command does."""
    register()
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    with read_write(cfg), open_dict(cfg):
        OmegaConf.update(cfg, "hydra.runtime.output_dir", str(run_dir))
    HydraConfig.instance().set_config(cfg)
    return check(cfg, Train)


def list_overrides(arguments: argparse.Namespace, batch_size: int) -> list[str]:
    accelerator = "cpu" if arguments.device == "cpu" else "gpu"
    limit = [f"+trainer.limit_train_batches={arguments.steps}"] if arguments.steps else []
    return [
        f"data.data_dir='{arguments.data_dir}'",
        f"data.batch_size={batch_size}",
        "data.val_size=0",
        f"trainer.max_epochs={EPOCHS.get(batch_size, 4)}",
        f"trainer.accelerator={accelerator}",
        f"threads={arguments.threads}",
        *limit,
    ]


def run_project(overrides: list[str]) -> Result:
    TimedProgress.seconds, TimedProgress.steps = 0.0, 0
    timed = "callbacks.progress._target_=benchmarks.step_overhead.TimedProgress"
    with empty_folder() as folder, terminal():
        metrics = train(settle(folder, [*overrides, timed]), folder, test=False)
        weights = load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    net = {name.removeprefix("net."): value for name, value in weights.items() if name.startswith("net.")}
    return Result(TimedProgress.steps, TimedProgress.seconds, net, float(metrics["last/train/loss"] or 0))


@dataclass
class Start:
    """The settings, classifier and data at the start of a run, made as ``train`` makes them."""

    settings: Train
    classifier: DigitClassifier
    datamodule: MNISTDataModule

    @classmethod
    def make(cls, overrides: list[str]) -> "Start":
        with empty_folder() as folder:
            settings = settle(folder, overrides)
        L.seed_everything(settings.seed, workers=True, verbose=False)
        datamodule = MNISTDataModule(**settings.data.module_arguments(), seed=settings.seed)
        datamodule.prepare_data()
        datamodule.setup("fit")
        return cls(settings, make_classifier(settings, datamodule), datamodule)

    @property
    def digits(self) -> Images:
        return self.datamodule.splits["train"]

    @property
    def whole_net(self) -> torch.nn.Sequential:
        """The module from stored images to logits: (B, H, W) uint8 -> (B, 10)."""
        return torch.nn.Sequential(self.classifier.preprocess, self.classifier.net)

    @property
    def epochs(self) -> int:
        return int(self.settings.trainer["max_epochs"])

    def count_steps(self, limit: int | None) -> int:
        """Return the number of steps in an epoch, at most ``limit``."""
        steps = -(-len(self.digits) // self.settings.data.batch_size)
        return min(steps, limit or steps)

    def make_optimizer(self, limit: int | None) -> tuple[Any, Any]:
        """Return the optimizer, and its schedule or None."""
        make, make_scheduler = self.classifier.make_optimizer, self.classifier.make_scheduler
        assert make is not None
        optimizer = make(self.classifier.net.parameters())
        if make_scheduler is None:
            return optimizer, None
        return optimizer, make_scheduler(optimizer, T_max=self.epochs * self.count_steps(limit))


def run_bare(overrides: list[str], device: str, limit: int | None) -> Result:
    start = Start.make(overrides)
    net = start.whole_net.to(device)
    images, labels = start.digits.images.to(device), start.digits.labels.to(device)
    optimizer, scheduler = start.make_optimizer(limit)
    sampler = EpochSampler(len(labels), shuffle=True, seed=start.settings.seed, rank=0, world_size=1)
    synchronize()
    begin = time.perf_counter()
    for epoch in range(start.epochs):
        sampler.set_epoch(epoch)
        order, batch_size = sampler.order(), start.settings.data.batch_size
        bare_loop.train_epoch(net, images, labels, order, batch_size, optimizer, scheduler, limit)
    synchronize()
    seconds = time.perf_counter() - begin
    return Result(start.epochs * start.count_steps(limit), seconds, copy_weights(net[1]))


class BareModule(L.LightningModule):
    """A minimal LightningModule, as in Lightning's own examples, with a clock."""

    def __init__(self, start: Start, limit: int | None) -> None:
        super().__init__()
        self.net = start.whole_net
        self.made = start.make_optimizer(limit)
        self.seconds = 0.0

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def on_train_epoch_start(self) -> None:
        synchronize()
        self.seconds -= time.perf_counter()

    def on_train_epoch_end(self) -> None:
        synchronize()
        self.seconds += time.perf_counter()

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.made
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def run_bare_lightning(overrides: list[str], device: str, limit: int | None) -> Result:
    start = Start.make(overrides)
    quiet_lightning()
    skip_device_probe()
    module = BareModule(start, limit)
    trainer = L.Trainer(
        barebones=True,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=start.epochs,
        limit_train_batches=limit or 1.0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, start.datamodule.train_dataloader())
    return Result(start.epochs * start.count_steps(limit), module.seconds, copy_weights(module.net[1]))


def run_tutorial(overrides: list[str], data_dir: Path, limit: int | None) -> Result:
    """Run the tutorial's loop for one epoch with the initial weights and order of ``experiment=tutorial``."""
    start = Start.make(overrides)
    net = tutorial_loop.make_net()
    ours = [value for name, value in copy_weights(start.classifier.net).items() if name.startswith("layers")]
    for parameter, value in zip(net.parameters(), ours, strict=True):
        parameter.data.copy_(value)
    optimizer = tutorial_loop.make_optimizer(net)
    sampler = EpochSampler(len(start.digits), shuffle=True, seed=start.settings.seed, rank=0, world_size=1)
    steps = start.count_steps(limit)
    indices = list(sampler)[: steps * tutorial_loop.BATCH_SIZE]
    loader = tutorial_loop.make_loader(tutorial_loop.read_data(data_dir, train=True), indices)
    begin = time.perf_counter()
    loss = tutorial_loop.train_epoch(net, loader, optimizer)
    return Result(steps, time.perf_counter() - begin, copy_weights(net), loss)


def copy_weights(net: torch.nn.Module) -> Weights:
    return {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}


def check_same_work(results: dict[str, list[Result]], *, device: str) -> None:
    """Check that all contestants computed the same.

    Raises:
        SystemExit: they differ in their number of steps, in their weights or in their losses.
    """
    first, *others = results
    for name in others:
        for one, two in zip(results[first], results[name], strict=True):
            if one.steps != two.steps:
                sys.exit(f"{first} took {one.steps} steps, {name} {two.steps}")
            if one.loss is not None and two.loss is not None:
                same = abs(one.loss - two.loss) < 1e-3 * abs(one.loss)
            elif device == "cpu":
                same = all(torch.equal(one.weights[key], two.weights[key]) for key in one.weights)
            else:  # a GPU may sum in another order
                same = all(
                    torch.allclose(one.weights[key], two.weights[key], 1e-2, 1e-2) for key in one.weights
                )
            if not same:
                sys.exit(f"{first} and {name} have not computed the same")


@contextmanager
def terminal() -> Iterator[None]:
    """Replace standard error by a pseudo-terminal within the block, so that the progress bar is drawn."""
    reading, writing = os.openpty()
    before, sys.stderr = sys.stderr, os.fdopen(writing, "w")

    def drain() -> None:
        while True:
            try:
                if not os.read(reading, 65536):
                    return
            except OSError:  # on Linux: the other end is closed
                return

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        thread.join()
        os.close(reading)


def compare(arguments: argparse.Namespace, batch_size: int) -> dict[str, list[Result]]:
    overrides = list_overrides(arguments, batch_size)
    device, limit = arguments.device, arguments.steps
    contestants = {
        "train": lambda: run_project(overrides),
        "bare torch loop": lambda: run_bare(overrides, device, limit),
    }
    if batch_size == 64:
        contestants["bare Lightning"] = lambda: run_bare_lightning(overrides, device, limit)
    for run in contestants.values():
        run()
    results = take_turns(contestants, arguments.pairs)
    check_same_work(results, device=device)
    return results


def compare_tutorial(arguments: argparse.Namespace) -> dict[str, list[Result]]:
    overrides = [
        *("experiment=tutorial", "trainer.max_epochs=1"),
        *(one for one in list_overrides(arguments, 64) if not one.startswith("trainer.max_epochs")),
    ]
    contestants = {
        "train experiment=tutorial": lambda: run_project(overrides),
        "the tutorial's loop": lambda: run_tutorial(overrides, arguments.data_dir, arguments.steps),
    }
    results = take_turns(contestants, arguments.pairs)
    check_same_work(results, device=arguments.device)
    return results


def tabulate(compared: dict[int, dict[str, list[Result]]], device: str) -> Table:
    rows = []
    for batch_size, results in compared.items():
        steps = {name: [result.step for result in found] for name, found in results.items()}
        for name, seconds in steps.items():
            rows.append(
                [
                    f"batch {batch_size}: {name}",
                    spread(seconds, scale=1e3, digits=3),
                    f"{ratio(steps['train'], seconds):.2f} ×",
                ]
            )
    return Table(f"a step on {device}", ["", "ms: median (range)", "train takes"], rows)


def tabulate_tutorial(results: dict[str, list[Result]], device: str) -> Table:
    steps = {name: [result.step for result in found] for name, found in results.items()}
    *_, theirs = steps.values()
    rows = [
        [
            name,
            spread([tutorial_loop.BATCH_SIZE / step for step in seconds], digits=0),
            f"{ratio(theirs, seconds):.2f} ×",
        ]
        for name, seconds in steps.items()
    ]
    return Table(
        f"784-128-64-10, SGD, batch {tutorial_loop.BATCH_SIZE} on {device}",
        ["", "images a second: median (range)", "as fast as the tutorial"],
        rows,
    )


def main() -> None:
    parser = make_parser("step_overhead", __doc__, repeats=7)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(EPOCHS), help="64 256 1024")
    parser.add_argument("--steps", type=int, help="steps of an epoch, at most (all)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="threads of each contestant (1)")
    parser.add_argument("--data-dir", type=Path, default=Path("~/.pytorch/MNIST_data/").expanduser())
    arguments = parser.parse_args()
    with threads.use(arguments.threads):
        compared = {batch_size: compare(arguments, batch_size) for batch_size in arguments.batch_sizes}
        tutorial = compare_tutorial(arguments)
    samples = {
        f"batch {batch_size}": {name: [result.step for result in found] for name, found in results.items()}
        for batch_size, results in compared.items()
    }
    samples["tutorial"] = {name: [result.step for result in found] for name, found in tutorial.items()}
    tables = [tabulate(compared, arguments.device), tabulate_tutorial(tutorial, arguments.device)]
    publish("step_overhead", arguments, tables, samples)


if __name__ == "__main__":
    from benchmarks import step_overhead  # not __main__: TimedProgress is imported by its name

    step_overhead.main()
