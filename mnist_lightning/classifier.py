"""Define the LightningModule, which adds loss, metrics, optimizer and schedule to a net."""

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning.images.preprocess import Preprocess
from mnist_lightning.losses import CrossEntropy
from mnist_lightning.network import on_trial
from mnist_lightning.targets import make, name_of, strange_modules
from mnist_lightning.workarounds import SET_EACH_STEP

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images (B, H, W) or (B, H, W, C) uint8, labels (B,) int64
TOTAL_STEPS = "total_steps"  # stands for the run's number of optimizer steps in a scheduler's arguments
TRIAL_STEPS = 10**6  # stands for it on trial: a schedule may refuse a very short run
ADAMW = functools.partial(torch.optim.AdamW, lr=0.004, weight_decay=0.01, fused=True)
COSINE = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=TOTAL_STEPS)  # type: ignore[arg-type]
LOSS = "loss"  # key of the loss among the metrics


class Probabilities(nn.Module):
    """Turn logits into probabilities at a temperature, which keeps the order of the classes.

    Args:
        temperature: the number by which logits are divided before softmax, > 0 (Guo et al. 2017, arXiv
            1706.04599, section 4.2).
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, outputs: Tensor) -> Tensor:
        """(B, num_classes) float logits -> (B, num_classes) float, each row with sum 1"""
        return (outputs / self.temperature).softmax(dim=1)


class DigitClassifier(L.LightningModule):
    """Train and measure a net with Lightning.

    A training step does as little in Python as possible: it only appends its outputs to a list.  ``_count``
    moves them into the metrics every ``log_every_n_steps`` steps and at the end of an epoch.  Calling
    ``self.log`` and updating a metric in each step would double the training time of a small net.

    Loss and metrics get the net's outputs, (B, num_classes) float, and labels (B,) int64.  Where the net has
    a single output (a regression), those of torch and TorchMetrics get (B,) float and labels (B,) float32.

    Args:
        net: maps (B, C, H, W) float32, normalised, to logits (B, num_classes) or, for a regression, (B, 1).
        preprocess: maps stored images to the net's input; None: ``Preprocess()``.
        loss: maps outputs and labels to a single number; None: ``CrossEntropy()``.  If it has a method
            ``penalize_net(net, images, outputs)``, training adds the number that it returns.
        metrics: metrics by name; training, validation and test get a copy of each.  None: "acc", the share
            of correctly classified images.
        image_shape: (C, H, W).
        class_names: name of each label; None: the ten digits.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate schedule from the optimizer; None keeps the learning rate
            constant.  If one of its arguments is the string "total_steps", the run's number of optimizer
            steps replaces it and the schedule advances after each step; else it advances after each epoch.
        decay_biases: whether weight decay also acts on biases and on the parameters of norms.
        seed: seed of the random deformations of training images, if ``preprocess`` has any.  They are a
            function of (seed, step, rank), so that a resumed run draws the same ones.

    Attributes:
        num_outputs: number of outputs for each image; ``check`` sets it.
        temperature: the number by which logits are divided before softmax; see ``confidence``.
        sure: the least probability, in [0, 1], at which the most probable class counts as an answer.
        likeness: a ``likeness.Likeness``, which tells images of no class; None if none was fitted.
        logs_evaluations: whether ``trainer.validate`` and ``trainer.test`` log and return their metrics, as
            Lightning does by default.  ``train`` logs them itself.
        may_diverge: whether training goes on after a NaN or infinite loss; metrics then skip its step.
        measured: metrics of the current or last training epoch, as {"val/acc": 0.98}.  Lightning's
            ``callback_metrics`` also keep values of earlier epochs.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        preprocess: Preprocess | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        image_shape: Sequence[int] = (1, 28, 28),
        class_names: Sequence[str] | None = None,
        optimizer: Callable[..., Optimizer] = ADAMW,
        scheduler: "functools.partial[Any] | None" = COSINE,
        decay_biases: bool = True,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.net = net
        self.preprocess = Preprocess() if preprocess is None else preprocess
        self.loss = CrossEntropy() if loss is None else loss
        self._penalize_net: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = getattr(
            self.loss, "penalize_net", None
        )
        self.class_names = [str(digit) for digit in range(10)] if class_names is None else list(class_names)
        self.num_classes = num_classes = len(self.class_names)
        if metrics is None:
            accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            accuracy.recipe = {
                "_target_": "torchmetrics.classification.MulticlassAccuracy",
                **{"num_classes": num_classes, "average": "micro", "validate_args": False},
            }
            metrics = {"acc": accuracy}
        # plain data: the checkpoint must load with weights_only=True, and hold what rebuilds this classifier
        self.save_hyperparameters(
            {
                "model": getattr(net, "recipe", None),
                "loss": getattr(self.loss, "recipe", None),
                "metrics": {name: getattr(metric, "recipe", None) for name, metric in metrics.items()},
                "preprocess": self.preprocess.arguments,
                "image_shape": list(image_shape),
                "class_names": self.class_names,
            }
        )
        self.image_shape = tuple(image_shape)
        self.num_outputs = num_classes
        self.logs_evaluations = True
        self.may_diverge = False
        self.measured: dict[str, float] = {}
        self.temperature = 1.0
        self.sure = 0.0
        self.likeness: object = None
        self._is_checked = False
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.decay_biases = decay_biases
        self.seed = seed
        self.train_metrics, self.val_metrics, self.test_metrics = (
            MetricCollection(
                {LOSS: MeanMetric(), **metrics}, prefix=f"{stage}/", compute_groups=False
            ).clone()
            for stage in ("train", "val", "test")
        )
        self.train_metrics.persistent(True)  # a checkpoint within an epoch holds the metrics so far
        self._interval = 0  # number of batches between two calls of _count
        self._resumed: dict[str, Any] | None = None  # the checkpoint to go on from
        self._outputs: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, outputs and labels of each step

    @property
    def names_classes(self) -> bool:
        """Whether the net's outputs are logits of the classes."""
        return self.num_outputs == self.num_classes

    def higher_is_better(self, name: str) -> bool | None:
        """Whether a metric, named as "val/acc", should become high; None if the metric does not say."""
        return False if name.endswith(f"/{LOSS}") else self.val_metrics[name].higher_is_better

    def check(self) -> None:
        """Try net, loss and metrics on two blank images, and optimizer and schedule for a step without
        gradients; set ``num_outputs``.

        Raises:
            MisconfigurationException: a part does not fit the images, the labels or another part.
        """
        images = torch.zeros(2, *self.image_shape, device=self.device)
        labels = torch.arange(2, device=self.device) % self.num_classes
        name = f"model: {name_of(self.net)}"
        with on_trial(self), _one_line(f"{name} can't take images {tuple(images.shape)}"):
            outputs = self.net.forward(images)  # net(images) may start a compilation
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if shape not in ((2, self.num_classes), (2, 1)):
            raise MisconfigurationException(
                f"{name} gives {shape} for 2 images, and must give (2, {self.num_classes}), a logit for each"
                " class, or (2, 1) for a regression"
            )
        self.num_outputs = int(outputs.shape[1])
        name = f"loss: {name_of(self.loss)}"
        if isinstance(self.loss, CrossEntropy) and not self.names_classes:
            raise MisconfigurationException(
                f"{name} wants a logit for each class, and {name_of(self.net)} gives one number for an"
                " image: a regression needs another loss, and metrics of its own"
            )
        told = f"{name} can't take outputs {shape} and labels (2,)"
        with on_trial(self), _one_line(told):
            values = {name: self.loss(*_fit(self.loss, outputs, labels))}
        if self._penalize_net:
            name += ".penalize_net"
            told = f"{name} can't take the net, images {tuple(images.shape)} and outputs {shape}"
            with on_trial(self), torch.enable_grad(), _one_line(told):
                values[name] = self._penalize_net(self.net, images, outputs)
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.ndim:
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise MisconfigurationException(
                    f"{name} gives {what} for a batch, and must give one number, ()"
                )
        for key, metric in self.val_metrics.items(keep_base=True):
            if key == LOSS:
                continue
            name = f"metrics.{key}: {name_of(metric)}"
            with _one_line(f"{name} can't take outputs {shape} and labels (2,)"):
                trial = metric.clone()
                trial.update(*_fit(metric, outputs, labels))
                value = trial.compute()
            if not isinstance(value, Tensor) or value.numel() != 1:
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise MisconfigurationException(f"{name} gives {what}, and must give one number")
        self._check_schedule()
        self._is_checked = True

    def _check_schedule(self) -> None:
        """Build the optimizer and its schedule on trial.

        Raises:
            MisconfigurationException: they can't be built or used, or a rate is negative or infinite.
        """
        with on_trial(self), _one_line(f"optimizer: {name_of(self.make_optimizer)} can't be built"):
            optimizer = self._build_optimizer()
        if self.make_scheduler is None:
            return
        name = f"scheduler: {name_of(self.make_scheduler)}"
        with on_trial(self), _one_line(f"{name} can't be used"):
            scheduler = self.make_scheduler(optimizer, **dict.fromkeys(self._find_planned(), TRIAL_STEPS))
            scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
        for rate in (float(group["lr"]) for group in optimizer.param_groups):
            if not 0 <= rate < math.inf:
                raise MisconfigurationException(f"{name} gives the learning rate {rate:g}")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        *,
        net: nn.Module | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> "DigitClassifier":
        """Load a trained classifier from a checkpoint of a run or of Lightning's ModelCheckpoint.

        Nets, losses and metrics of this project, torch and TorchMetrics are built from the settings in the
        checkpoint.  Code of others is never imported by a name in a file: pass the objects instead.

        Args:
            checkpoint_path: the checkpoint file.
            map_location: the device for the weights, see ``torch.load``.
            net: a net with the architecture of the trained one; its weights are replaced.
            loss, metrics: the loss and the metrics of the training.

        Raises:
            ValueError: the checkpoint does not say how to build a part, or names code of others for it.
            OSError: the file can't be read.
        """
        checkpoint = torch.load(checkpoint_path, map_location=map_location, weights_only=True)
        recipe = dict(checkpoint["hyper_parameters"])
        for part, given in (("model", net), ("loss", loss), ("metrics", metrics)):
            strange = [] if given is not None else strange_modules({part: recipe.get(part) or {}})
            if strange or (part == "model" and given is None and not recipe["model"]):
                argument = "net" if part == "model" else part
                what = f"names {', '.join(strange)}" if strange else "does not tell how its net was made"
                raise ValueError(
                    f"{checkpoint_path} {what}: pass it, as in load_from_checkpoint(path, {argument}=…)"
                )
        return rebuild(recipe, checkpoint["state_dict"], net=net, loss=loss, metrics=metrics)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module's setter is slow: it looks for parameters, buffers and modules each time
        if name == SET_EACH_STEP:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor, key: tuple[int, ...] | None = None) -> Tensor:
        """Compute the net's outputs for stored images.

        (B, H, W) or (B, H, W, C) uint8 or float, in [0, 255] -> (B, num_outputs) float

        Args:
            images: images as the data set stores them.
            key: numbers that select a random deformation of each image; None: no deformation.
        """
        outputs: Tensor = self.net(self.preprocess(images, key))
        return outputs

    def setup(self, stage: str) -> None:
        if not self._is_checked:
            self.check()

    def _step(self, batch: Batch, key: tuple[int, ...] | None = None) -> Tensor:
        images, labels = batch
        inputs = self.preprocess(images, key, labels)
        outputs = self.net(inputs)
        loss = self.loss(*_fit(self.loss, outputs, labels))
        self._outputs.append((loss.detach(), outputs.detach(), labels))
        if self._penalize_net and self.training:
            return loss + self._penalize_net(self.net, inputs, outputs)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        step = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1  # number of this batch, from 0
        loss = self._step(batch, (self.seed, step, self.trainer.global_rank))
        if len(self._outputs) >= self._interval and not self._accumulates():
            self._count("train")
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Measure a validation batch; return the net's outputs for callbacks.  -> (B, num_outputs) float"""
        self._step(batch)
        return self._outputs[-1][1]

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Predict (B, num_classes) probabilities or, for a regression, (B, 1) numbers.

        Args:
            batch: stored images, or a batch of images and labels.
            batch_idx: not used.
        """
        outputs: Tensor = self(batch if isinstance(batch, Tensor) else batch[0])
        return self.to_probabilities(outputs) if self.names_classes else outputs

    def to_probabilities(self, outputs: Tensor) -> Tensor:
        """Turn logits into probabilities at the temperature that was fitted on validation images.

        (B, num_classes) float -> (B, num_classes) float
        """
        probabilities: Tensor = Probabilities(self.temperature)(outputs)
        return probabilities

    def on_train_epoch_start(self) -> None:
        # Lightning does not call this hook when a run resumes within an epoch
        self.train_metrics.reset()
        self.measured = {}
        self._interval = self._count_batches()

    def _count_batches(self) -> int:
        """Number of batches between two points of the train/loss_step curve."""
        steps: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return steps * self.trainer.accumulate_grad_batches

    def on_train_epoch_end(self) -> None:
        self._count("train")
        self._report("train")

    def on_validation_epoch_start(self) -> None:
        self._count("train")  # validation may come in the middle of an epoch

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self._outputs.clear()  # they are of the untrained net and belong to no epoch
            return
        self._count("val")
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        # trainer.validate after the training adds no point to the learning curve
        self._report("val", write=fitting)
        if fitting and self.trainer.lr_scheduler_configs:
            scheduler = self.trainer.lr_scheduler_configs[0].scheduler
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(self.val_metrics["loss"].compute())

    def on_test_epoch_end(self) -> None:
        self._count("test")
        self._report("test", write=False)

    def on_train_start(self) -> None:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if self._resumed is None:
            self._interval = self._count_batches()
            if rank:  # else all processes draw the same dropout and noise
                torch.manual_seed((rank << 32) + self.seed)
            return
        for optimizer in self.trainer.optimizers:
            check_state(optimizer)
        # restore the random states last: nothing between here and the next step draws a random number
        saved, self._resumed = self._resumed, None
        if "accumulate_grad_batches" in saved:  # Lightning's scheduler of it acts only at an epoch's start
            self.trainer.accumulate_grad_batches = saved["accumulate_grad_batches"]
        self._interval = self._count_batches()
        self.measured = dict(saved.get("measured", {}))
        processes = saved.get("processes", [saved])  # earlier versions kept one process's state, not a list
        if len(processes) == world_size:
            set_random_state(processes[rank]["random_state"], self.device)
            outputs = processes[rank]["uncounted"]
        else:
            log.warning(
                "the checkpoint was written by %d processes, and this run has %d: random numbers will differ",
                len(processes),
                world_size,
            )
            torch.manual_seed((rank << 32) + self.seed)
            outputs = [] if rank else [one for process in processes for one in process["uncounted"]]
        for step in outputs:
            loss, its_outputs, labels = (tensor.to(self.device) for tensor in step)
            self._outputs.append((loss, its_outputs, labels))
        if rank:
            self.train_metrics.reset()  # the checkpoint's metrics, of all processes, go to rank 0 alone
        for name, gradient in saved.get("gradients", {}).items():
            self.get_parameter(name).grad = gradient.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint what an exact resumption needs; refuse to save NaN or infinite weights.

        Raises:
            FloatingPointError: a loss or a weight is NaN or infinite.
        """
        self._check_losses("train")
        if not all(parameter.isfinite().all() for parameter in self.parameters()):
            raise FloatingPointError(
                f"a weight is NaN or infinite after step {self.global_step}; a smaller optimizer.lr may help"
            )
        process = {
            "random_state": get_random_state(self.device),
            "uncounted": [[tensor.cpu() for tensor in outputs] for outputs in self._outputs],
        }
        checkpoint["processes"] = [process]
        if self.trainer.world_size > 1:
            checkpoint["processes"] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(checkpoint["processes"], process)
            for metric in self.train_metrics.values():
                metric.sync()
            prefix = "train_metrics."
            checkpoint["state_dict"] |= {
                name: value.clone() for name, value in self.train_metrics.state_dict(prefix=prefix).items()
            }
            for metric in self.train_metrics.values():
                metric.unsync()
        checkpoint["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        if self._accumulates():
            checkpoint["gradients"] = {
                name: parameter.grad.clone()
                for name, parameter in self.named_parameters()
                if parameter.grad is not None
            }
        checkpoint["measured"] = dict(self.measured)
        checkpoint["environment"] = environment(self.trainer.strategy.root_device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumed = checkpoint
        here = environment(self.trainer.strategy.root_device)
        for name, saved in checkpoint["environment"].items():
            if here[name] != saved:
                log.warning(
                    "the checkpoint was written with %s %s, this is %s: results may differ in rounding",
                    name,
                    saved,
                    here[name],
                )

    def _count(self, stage: str) -> None:
        """Move the outputs that steps have left in ``_outputs`` into the stage's metrics.

        Raises:
            FloatingPointError: the loss of one of these steps is NaN or infinite.
        """
        if not self._outputs:
            return
        if self.may_diverge:
            self._outputs = [step for step in self._outputs if step[0].isfinite()]
            if not self._outputs:
                return
        losses = self._check_losses(stage)
        _, outputs, labels = zip(*self._outputs, strict=True)
        self._outputs.clear()
        sizes = torch.tensor([len(step) for step in labels], device=losses.device)
        self._update(stage, losses, sizes, torch.cat(outputs), torch.cat(labels))
        if stage == "train":
            mean = losses.mean().item()  # over the steps since the previous point of this curve
            self._write({"train/loss_step": mean, "lr": self.trainer.optimizers[0].param_groups[0]["lr"]})

    def glance(self) -> dict[str, float]:
        """Return the mean "loss" and, for a classifier, the accuracy "acc" of this process's latest steps.

        These are the steps that are not in the metrics yet; if there are none, the result is empty.
        """
        if not self._outputs:
            return {}
        losses, outputs, labels = zip(*self._outputs, strict=True)
        values = {LOSS: torch.stack(losses).mean().item()}
        if self.names_classes:
            values["acc"] = (torch.cat(outputs).argmax(1) == torch.cat(labels)).float().mean().item()
        return values

    def measure(self, stage: str, outputs: Tensor, labels: Tensor) -> None:
        """Add the net's outputs for a batch to the metrics of a stage.

        Args:
            stage: "train", "val" or "test".
            outputs: (B, num_outputs) float.
            labels: (B,) int64.
        """
        loss = self.loss(*_fit(self.loss, outputs, labels))
        self._update(stage, loss, torch.tensor(len(labels), device=loss.device), outputs, labels)

    def _update(self, stage: str, losses: Tensor, sizes: Tensor, outputs: Tensor, labels: Tensor) -> None:
        for name, metric in getattr(self, f"{stage}_metrics").items(keep_base=True):
            if name == LOSS:
                metric.update(losses, weight=sizes)
            else:
                metric.update(*_fit(metric, outputs, labels))

    def _check_losses(self, stage: str) -> Tensor:
        """Return the losses of the steps in ``_outputs``.  -> (len(_outputs),) float

        Raises:
            FloatingPointError: one of them is NaN or infinite.
        """
        losses = torch.stack([loss for loss, _, _ in self._outputs] or [torch.zeros(())])
        if not losses.isfinite().all():
            first = int((~losses.isfinite()).nonzero()[0])
            step = self._step_of(len(losses) - first - 1) if stage == "train" else self.global_step
            raise FloatingPointError(
                f"{stage}/loss is {losses[first].item()} at step {step}; a smaller optimizer.lr may help"
            )
        return losses

    def _report(self, stage: str, *, write: bool = True) -> None:
        """Give an epoch's metrics to Lightning, for callbacks, and at once to the loggers.

        Lightning gives them to the loggers only after the epoch's checkpoint is written, so that a run killed
        in between would resume without them.
        """
        metrics = getattr(self, f"{stage}_metrics")
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        self.log_dict(metrics, logger=self.logs_evaluations and not fitting)
        values = {name: value.item() for name, value in metrics.compute().items()}
        if fitting:
            self.measured |= values
        if write:
            self._write(values)

    def _write(self, values: dict[str, float]) -> None:
        """Give values of the current training epoch to the loggers."""
        for logger in self.loggers:
            logger.log_metrics({"epoch": self.current_epoch + 1, **values}, step=self._last_step())

    def _accumulates(self) -> bool:
        """Whether the optimizer still waits for gradients of further batches."""
        batches: int = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        rest: int = batches % self.trainer.accumulate_grad_batches
        return rest > 0 and bool(batches < self.trainer.num_training_batches)

    def _is_in_step(self) -> bool:
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return bool(progress.processed < progress.ready)

    def _last_step(self) -> int:
        """Return the number of the current or latest optimizer step, counted from 1 over all epochs."""
        return self.global_step + self._is_in_step()

    def _step_of(self, lag: int) -> int:
        """Return the number of the optimizer step to which a batch of this epoch belongs.

        Args:
            lag: how many batches lie between this batch and the latest one.
        """
        accumulate = self.trainer.accumulate_grad_batches
        latest = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        groups = -(-latest // accumulate) + (lag - latest) // accumulate
        return self.global_step + (self._is_in_step() or self._accumulates()) - groups

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as Lightning does, and also with a fused optimizer in bfloat16.

        Lightning refuses the latter, as if its gradients were scaled; only float16 scales gradients.
        """
        precision = self.trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(precision, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _build_optimizer(self) -> Optimizer:
        return self.make_optimizer(self.parameters() if self.decay_biases else group_by_decay(self))

    def _find_planned(self) -> list[str]:
        """Return the names of the schedule's arguments that the run's number of steps replaces."""
        keywords = self.make_scheduler.keywords if self.make_scheduler else {}
        return [name for name, value in keywords.items() if value == TOTAL_STEPS]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._build_optimizer()
        if self.make_scheduler is None:
            return optimizer
        per_step = self._find_planned()
        total_steps = (
            dict.fromkeys(per_step, int(self.trainer.estimated_stepping_batches)) if per_step else {}
        )
        try:
            scheduler = self.make_scheduler(optimizer, **total_steps)
        except ZeroDivisionError as error:  # OneCycleLR raises it if the rate rises for exactly one step
            steps = ", ".join(f"{name}={number}" for name, number in total_steps.items())
            raise MisconfigurationException(
                f"the scheduler can't plan a run with {steps}: train for some steps more or fewer"
            ) from error
        if isinstance(scheduler, ReduceLROnPlateau):
            # on_validation_epoch_end advances it: Lightning does so after the epoch's checkpoint is written,
            # and a resumed run would miss it
            never = 2**62
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "frequency": never, "monitor": "val/loss"},
            }
        interval = "step" if per_step else "epoch"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def rebuild(
    recipe: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    net: nn.Module | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> DigitClassifier:
    """Build a trained classifier from the contents of a checkpoint.

    Args:
        recipe: the hyper-parameters of a ``DigitClassifier``.
        weights: its ``state_dict``.
        net, loss, metrics: objects to use in place of those that the recipe describes.

    Raises:
        TargetError: a part can't be built from the recipe.
        ValueError: a weight has another type than the net's.
        RuntimeError: the weights are not those of this net.
    """
    own = {name.removeprefix("net."): tensor for name, tensor in weights.items() if name.startswith("net.")}
    # a net of a known class is built without memory for its weights: those of the file take their place
    ours = net is None and not strange_modules({"model": recipe["model"]})
    with torch.device("meta") if ours else nullcontext():
        net = make(recipe["model"], "model") if net is None else net
    if ours:  # load_state_dict(assign=True) does not convert the weights to the net's precision
        wanted = net.state_dict()
        own = {name: as_in(wanted.get(name), tensor) for name, tensor in own.items()}
    net.load_state_dict(own, strict=True, assign=ours)
    if loss is None and recipe.get("loss"):
        loss = make(recipe["loss"], "loss")
    if isinstance(loss, nn.Module):
        its = {name.removeprefix("loss."): one for name, one in weights.items() if name.startswith("loss.")}
        loss.load_state_dict(its)
    if metrics is None:
        settings = recipe["metrics"]
        metrics = {name: make(one, f"metrics.{name}") for name, one in settings.items() if one}
    classifier = DigitClassifier(
        net,
        preprocess=Preprocess(**recipe["preprocess"]),
        loss=loss,
        metrics=metrics,
        image_shape=recipe["image_shape"],
        class_names=recipe["class_names"],
    )
    classifier.check()
    return classifier


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Check that a fused optimizer's state, read from a file, has the sizes of its weights.

    torch's fused optimizers do not check this, and would write beyond the end of a smaller state.

    Raises:
        ValueError: a state has another size than its weight.
    """
    for group in optimizer.param_groups:
        for weight in group["params"] if group.get("fused") else ():
            for name, value in optimizer.state[weight].items():
                wanted = torch.Size() if name == "step" else weight.shape
                if not isinstance(value, Tensor) or value.shape != wanted or not value.is_contiguous():
                    raise ValueError(f"{name} of an optimizer does not have the shape {tuple(wanted)}")


def as_in(wanted: Tensor | None, given: Tensor) -> Tensor:
    """Convert a weight to the type of the weight that it replaces.

    Args:
        wanted: the weight to replace; None leaves ``given`` as it is.
        given: the new weight, of any shape.

    Raises:
        ValueError: the types differ, and one of them is no real floating-point type (such as complex).
    """
    if wanted is None or wanted.dtype == given.dtype:
        return given
    if not (wanted.is_floating_point() and given.is_floating_point()):
        raise ValueError(f"a weight is {given.dtype} where its net has {wanted.dtype}")
    return given.to(wanted.dtype)


def get_random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's random generators by device type: the CPU's and the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the random states that ``get_random_state`` returned; warn if this device type has none."""
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type])
    elif device.type not in states:
        log.warning("the checkpoint has no random state of a %s: dropout and noise differ", device.type)


def environment(device: torch.device) -> dict[str, str | int]:
    """Return what decides the rounding of a result: torch's version, number of threads and device type."""
    return {
        "torch": str(torch.__version__),
        "num_threads": torch.get_num_threads(),
        "device": device.type,
    }


def group_by_decay(module: nn.Module) -> list[dict[str, Any]]:
    """Divide parameters into an optimizer's groups: biases and parameters of norms get no weight decay."""
    decayed: dict[nn.Parameter, bool] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            decayed[parameter] = "Norm" not in type(part).__name__ and "bias" not in name
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter, decays in decayed.items() if decays]},
        {"params": [parameter for parameter, decays in decayed.items() if not decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _fit(measure: Any, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and labels in the shapes that a loss or a metric needs, see ``DigitClassifier``."""
    if outputs.shape[1] == 1:
        kind = measure.func if isinstance(measure, functools.partial) else type(measure)
        if (kind.__module__ or "torch").split(".")[0] in ("torch", "torchmetrics"):
            return outputs[:, 0], labels.float()
    return outputs, labels


@contextmanager
def _one_line(told: str) -> Iterator[None]:
    """Turn any error of a user's net, loss or metric into one line.

    Args:
        told: the beginning of the line.

    Raises:
        MisconfigurationException: the block has raised an error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch warns so if a loss broadcasts outputs (B, 1) and labels (B,) to all pairs
            warnings.filterwarnings("error", message="Using a target size", category=UserWarning)
            yield
    except Exception as error:
        cause = " ".join(str(error).split())
        raise MisconfigurationException(f"{told}: {type(error).__name__}: {cause[:300]}") from error
