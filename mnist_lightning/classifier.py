"""The LightningModule: loss, metrics, optimizer and schedule around the net."""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning.network import NUM_CLASSES, FeedForward

Batch = tuple[Tensor, Tensor]  # images (B, 28, 28) uint8, labels (B,) int64
TOTAL_STEPS = "total_steps"  # stands for the run's number of optimizer steps in a scheduler's arguments


class DigitClassifier(L.LightningModule):
    """A ``FeedForward`` net that learns to name digits by cross-entropy on its logits.

    A step does no more Python work than it must: it leaves its outputs in a list, and
    ``_count`` moves them into the metrics once every ``log_every_n_steps`` steps and at the end
    of an epoch.  ``self.log`` and a metric's update in each step would double a small net's time.

    Args:
        hidden, activation, dropout, norm, mean, std: of the net, see ``FeedForward``.
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
        optimizer: Callable[..., Optimizer] | None = None,
        scheduler: "functools.partial[LRScheduler] | None" = None,
    ) -> None:
        super().__init__()
        # plain numbers and strings only: the checkpoint must load with weights_only=True
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.net = FeedForward(
            hidden=hidden, activation=activation, dropout=dropout, norm=norm, mean=mean, std=std
        )
        self.label_smoothing = label_smoothing
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.train_metrics = _metrics("train")
        self.val_metrics = _metrics("val")
        self.test_metrics = _metrics("test")
        self._interval = 0  # steps between two counts, see on_fit_start
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

    def on_train_epoch_end(self) -> None:
        self._count("train")
        self.log_dict(self.train_metrics)

    def on_validation_epoch_start(self) -> None:
        self._count("train")  # validation may come in the middle of an epoch

    def on_validation_epoch_end(self) -> None:
        self._count("val")
        # what trainer.validate measures after training is no point of the learning curve
        self.log_dict(self.val_metrics, logger=self.trainer.state.fn == TrainerFn.FITTING)

    def on_test_epoch_end(self) -> None:
        self._count("test")
        self.log_dict(self.test_metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a net that has gone wrong: the last good checkpoint stays."""
        self._count("train")
        if not all(parameter.isfinite().all() for parameter in self.parameters()):
            raise FloatingPointError(
                f"a weight is NaN or infinite after step {self.global_step}; a smaller optimizer.lr may help"
            )

    def _count(self, stage: str) -> None:
        """Move what the steps left in ``_outputs`` into the stage's metrics.

        Raises:
            FloatingPointError: the loss of one of these steps was NaN or infinite.
        """
        if not self._outputs:
            return
        losses_of_steps, logits, labels = zip(*self._outputs, strict=True)
        self._outputs.clear()
        losses = torch.stack(losses_of_steps)
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            last_step = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
            step = last_step - len(losses) + first + 1 if stage == "train" else last_step
            raise FloatingPointError(
                f"{stage}/loss is {losses[first].item()} at step {step}; a smaller optimizer.lr may help"
            )
        sizes = torch.tensor([len(step) for step in labels], device=losses.device)
        metrics = getattr(self, f"{stage}_metrics")
        metrics["loss"].update(losses, weight=sizes)
        metrics["acc"].update(torch.cat(logits), torch.cat(labels))
        if stage == "train":
            values = {
                "train/loss_step": losses.mean().item(),  # of the steps since the last such value
                "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            }
            for logger in self.loggers:
                logger.log_metrics(values, step=self.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.make_optimizer is not None, "DigitClassifier was made without an optimizer"
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        per_step = [name for name, value in self.make_scheduler.keywords.items() if value == TOTAL_STEPS]
        total_steps = (
            dict.fromkeys(per_step, int(self.trainer.estimated_stepping_batches)) if per_step else {}
        )
        scheduler = self.make_scheduler(optimizer, **total_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "step" if per_step else "epoch",
                "monitor": "val/loss" if isinstance(scheduler, ReduceLROnPlateau) else None,
            },
        }


def _metrics(stage: str) -> MetricCollection:
    return MetricCollection(
        {
            "loss": MeanMetric(),
            "acc": MulticlassAccuracy(NUM_CLASSES, average="micro", validate_args=False),
        },
        prefix=f"{stage}/",
        compute_groups=False,
    )
