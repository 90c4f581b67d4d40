"""The LightningModule: loss, metrics, optimizer and schedule around the net."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning.network import NUM_CLASSES, FeedForward

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images (B, 28, 28) uint8, labels (B,) int64
TOTAL_STEPS = "total_steps"  # stands for the run's number of optimizer steps in a scheduler's arguments


class DigitClassifier(L.LightningModule):
    """A ``FeedForward`` net that learns to name digits by cross-entropy on its logits.

    A step does no more Python work than it must: it leaves its outputs in a list, and
    ``_count`` moves them into the metrics once every ``log_every_n_steps`` steps and at the end
    of an epoch.  ``self.log`` and a metric's update in each step would double a small net's time.

    Args:
        hidden, activation, dropout, norm, mean, std, input_noise, noise, deskew: of the net,
            see ``FeedForward``.
        label_smoothing: in [0, 1), of the training loss only (Szegedy et al. 2016,
            arXiv 1512.00567, section 7).
        optimizer: makes the optimizer from the parameters; not needed to evaluate.
        scheduler: makes the learning-rate schedule from the optimizer; None keeps it constant.  An
            argument that is the string "total_steps" is replaced by the run's number of optimizer
            steps, and the schedule is then stepped after each of them, else after each epoch.
    """

    def __init__(
        self,
        *,
        hidden: list[int],
        activation: str,
        dropout: float,
        norm: str,
        mean: float,
        std: float,
        label_smoothing: float,
        input_noise: float = 0.0,
        noise: float = 0.0,
        deskew: bool = False,
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: "functools.partial[LRScheduler] | None" = None,
    ) -> None:
        super().__init__()
        # plain numbers and strings only: the checkpoint must load with weights_only=True
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.net = FeedForward(
            hidden=hidden,
            activation=activation,
            dropout=dropout,
            norm=norm,
            mean=mean,
            std=std,
            input_noise=input_noise,
            noise=noise,
            deskew=deskew,
        )
        self.label_smoothing = label_smoothing
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.train_metrics = _metrics("train")
        self.val_metrics = _metrics("val")
        self.test_metrics = _metrics("test")
        self.train_metrics.persistent(True)  # a checkpoint within an epoch holds its first part
        self._interval = 0  # steps between two counts, see on_fit_start
        self._resumed: dict[str, Any] | None = None  # the checkpoint to go on from
        self._outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, logits, labels of a step

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning sets this name some 40 times a step; nn.Module's setter would look for
        # parameters, buffers and modules each time
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Logits for a batch.  (B, 28, 28) uint8 or float, in [0, 255] -> (B, 10) float."""
        logits: Tensor = self.net(images)
        return logits

    def on_fit_start(self) -> None:
        self._interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]

    def _step(self, batch: Batch, stage: str) -> Tensor:
        images, labels = batch
        logits = self.net(images)
        smoothing = self.label_smoothing if stage == "train" else 0.0
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        self._outputs.append((loss.detach(), logits.detach(), labels))
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._step(batch, "train")
        if len(self._outputs) == self._interval:
            self._count("train")
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "test")

    def on_train_epoch_start(self) -> None:
        self.train_metrics.reset()  # not called where an epoch is resumed within

    def on_train_epoch_end(self) -> None:
        self._count("train")
        self._report("train")

    def on_validation_epoch_start(self) -> None:
        self._count("train")  # validation may come in the middle of an epoch

    def on_validation_epoch_end(self) -> None:
        self._count("val")
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        # what trainer.validate measures after training is no point of the learning curve
        self._report("val", to_loggers=fitting)
        if fitting and self.trainer.lr_scheduler_configs:
            scheduler = self.trainer.lr_scheduler_configs[0].scheduler
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(self.val_metrics["loss"].compute())

    def on_test_epoch_end(self) -> None:
        self._count("test")
        self._report("test")

    def on_train_start(self) -> None:
        if self._resumed is None:
            return
        # nothing between here and the next step draws a random number
        torch.set_rng_state(self._resumed["random_state"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._resumed["random_state"]["cuda"], self.device)
        for loss, logits, labels in self._resumed["uncounted"]:
            self._outputs.append((loss.to(self.device), logits.to(self.device), labels.to(self.device)))
        self._resumed = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an exact resumption needs; refuse to save a net that has gone wrong.

        Raises:
            FloatingPointError: a loss or a weight is NaN or infinite.
        """
        self._check_losses("train")
        if not all(parameter.isfinite().all() for parameter in self.parameters()):
            raise FloatingPointError(
                f"a weight is NaN or infinite after step {self.global_step}; a smaller optimizer.lr may help"
            )
        checkpoint["random_state"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["random_state"]["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["uncounted"] = [list(outputs) for outputs in self._outputs]
        checkpoint["environment"] = environment()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumed = checkpoint
        here = environment()
        for name, saved in checkpoint["environment"].items():
            if here[name] != saved:
                log.warning(
                    "the checkpoint was written with %s %s, this is %s: results may differ in rounding",
                    name,
                    saved,
                    here[name],
                )

    def _count(self, stage: str) -> None:
        """Move what the steps left in ``_outputs`` into the stage's metrics.

        Raises:
            FloatingPointError: the loss of one of these steps was NaN or infinite.
        """
        if not self._outputs:
            return
        losses = self._check_losses(stage)
        _, logits, labels = zip(*self._outputs, strict=True)
        self._outputs.clear()
        sizes = torch.tensor([len(step) for step in labels], device=losses.device)
        metrics = getattr(self, f"{stage}_metrics")
        metrics["loss"].update(losses, weight=sizes)
        metrics["acc"].update(torch.cat(logits), torch.cat(labels))
        if stage == "train":
            mean = losses.mean().item()  # of the steps since the last such value
            self._write({"train/loss_step": mean, "lr": self.trainer.optimizers[0].param_groups[0]["lr"]})

    def _check_losses(self, stage: str) -> Tensor:
        """The losses of the steps in ``_outputs``.  -> (len(_outputs),)

        Raises:
            FloatingPointError: one of them is NaN or infinite.
        """
        losses = torch.stack([loss for loss, _, _ in self._outputs] or [torch.zeros(())])
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            step = self._last_step() - (len(losses) - first - 1 if stage == "train" else 0)
            raise FloatingPointError(
                f"{stage}/loss is {losses[first].item()} at step {step}; a smaller optimizer.lr may help"
            )
        return losses

    def _report(self, stage: str, *, to_loggers: bool = True) -> None:
        """Give an epoch's metrics to Lightning (for callbacks) and, at once, to the loggers.

        Lightning would write them after the epoch's checkpoint, and a run killed between the two
        would resume without them.
        """
        metrics = getattr(self, f"{stage}_metrics")
        self.log_dict(metrics, logger=False)
        if to_loggers:
            self._write({name: value.item() for name, value in metrics.compute().items()})

    def _write(self, values: dict[str, float]) -> None:
        epoch = self.current_epoch + (self.trainer.state.fn == TrainerFn.FITTING)  # from 1
        for logger in self.loggers:
            logger.log_metrics({"epoch": epoch, **values}, step=self._last_step())

    def _last_step(self) -> int:
        """The number of the latest training step, counted from 1 over all epochs."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.make_optimizer is not None, "DigitClassifier was made without an optimizer"
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        per_step = [name for name, value in self.make_scheduler.keywords.items() if value == TOTAL_STEPS]
        total_steps = (
            dict.fromkeys(per_step, int(self.trainer.estimated_stepping_batches)) if per_step else {}
        )
        try:
            scheduler = self.make_scheduler(optimizer, **total_steps)
        except ZeroDivisionError as error:  # OneCycleLR's, where it would rise for exactly one step
            steps = ", ".join(f"{name}={number}" for name, number in total_steps.items())
            raise MisconfigurationException(
                f"the scheduler can't plan a run with {steps}: train for some steps more or fewer"
            ) from error
        if isinstance(scheduler, ReduceLROnPlateau):
            # Lightning would step it after the epoch's checkpoint, and a resumed run would miss that:
            # on_validation_epoch_end does it instead
            never = 2**62
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "frequency": never, "monitor": "val/loss"},
            }
        interval = "step" if per_step else "epoch"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def environment() -> dict[str, str | int]:
    """What else decides the last bits of a result."""
    return {"torch": str(torch.__version__), "num_threads": torch.get_num_threads()}


def _metrics(stage: str) -> MetricCollection:
    return MetricCollection(
        {
            "loss": MeanMetric(),
            "acc": MulticlassAccuracy(NUM_CLASSES, average="micro", validate_args=False),
        },
        prefix=f"{stage}/",
        compute_groups=False,
    )
