"""Record a net while it learns."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lightning.network import ACTIVATIONS, FeedForward, on_trial
from mnist_lightning.rundir.film import Film, read_film, write_film

log = logging.getLogger(__name__)

NUM_MOMENTS = 60
NUM_UNITS = 24
NUM_IMAGES = 20
NUM_MEASURED = 100  # training images, and validation images, whose loss is measured at each moment
MOST_BYTES = 1_500_000  # of all weights in the film
UNKNOWN_STEPS = 20_000  # assumed length of a run without a last step
PAUSE = 10.0  # seconds between two writes of the file, at least


class FilmCallback(Callback):
    """Record up to 60 moments of training in ``film.npz``.

    A moment holds the weights of some units of the first layer, activations and probabilities for some
    images, and the losses.  Moments are closer together at the start, where the net changes most.  The
    callback draws no random number, so training is bit for bit the same with and without it.  It records
    only ``FeedForward`` nets that classify grey images.

    Args:
        path: the file to write.
        enabled: whether to record anything.
    """

    def __init__(self, *, path: str, enabled: bool) -> None:
        self.path = Path(path)
        self.enabled = enabled
        self.moments: list[dict[str, Any]] = []
        self._plan: list[int] = []  # steps still to record, in descending order
        self._written = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        classifier: Any = pl_module
        self._plan = []
        self.moments = []
        if not (
            self.enabled
            and trainer.is_global_zero
            and not trainer.fast_dev_run  # type: ignore[attr-defined]
            and type(classifier.net) is FeedForward
            and classifier.image_shape[0] == 1
            and classifier.names_classes
        ):
            return
        splits = trainer.datamodule.splits  # type: ignore[attr-defined]
        train, val = splits["train"], splits["val"]
        shown = val if len(val) else train
        chosen = _spread(shown.labels, NUM_IMAGES)
        self._images, self._labels = shown.images[chosen], shown.labels[chosen]
        measured = [(one.images[:NUM_MEASURED], one.labels[:NUM_MEASURED]) for one in (train, val)]
        images = torch.cat([self._images, *(images for images, _ in measured)])
        with torch.no_grad():
            self._inputs = classifier.preprocess(images.to(classifier.device))
        self._measured = [labels.to(classifier.device) for _, labels in measured]
        size = math.prod(classifier.image_shape)
        self._num_units = min(NUM_UNITS, MOST_BYTES // (NUM_MOMENTS * size))
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        if step:
            self._recall(step)
        steps = plan(int(total) if math.isfinite(total) else UNKNOWN_STEPS)
        self._plan = [one for one in reversed(steps) if one > step or not self.moments]
        self._last_write = time.monotonic()
        if self._plan and self._plan[-1] <= step:
            self._keep(trainer, classifier, None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._plan and trainer.global_step >= self._plan[-1]:
            self._keep(trainer, pl_module, outputs)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if time.monotonic() - self._last_write_or_now() > PAUSE:
            self._write()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.moments and self.moments[-1]["steps"] != trainer.global_step:
            self._keep(trainer, pl_module, None)  # the run ended before the last planned step
        self._write()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._write()

    def develop(self) -> Film | None:
        """Return the film so far, or None when nothing has been recorded."""
        if not self.moments:
            return None
        arrays = {name: np.stack([moment[name] for moment in self.moments]) for name in self.moments[0]}
        images, labels = self._images.cpu().numpy(), self._labels.cpu().numpy()
        return Film(**arrays, images=images, labels=labels)

    def _last_write_or_now(self) -> float:
        return self._last_write if self.moments else time.monotonic()

    def _write(self) -> None:
        film = self.develop()
        if film is None or len(self.moments) == self._written:
            return
        try:
            write_film(self.path, film)
        except OSError as error:  # training continues without a film
            log.warning("the film can't be written: %s", error)
            self._plan = []
        self._written, self._last_write = len(self.moments), time.monotonic()

    def _recall(self, step: int) -> None:
        """Read the film of a resumed run, up to the step at which the run resumes."""
        try:
            film = read_film(self.path.parent)
        except OSError as error:
            log.warning("the film starts where the run resumes: %s", error)
            return
        if not np.array_equal(film.images, self._images.cpu().numpy()):
            return
        names = set(vars(film)) - {"images", "labels"}
        kept = int((film.steps <= step).sum())
        self.moments = [{name: getattr(film, name)[i] for name in names} for i in range(kept)]
        self._num_units = film.weights.shape[1]

    def _keep(self, trainer: L.Trainer, classifier: Any, outputs: Any) -> None:
        step = trainer.global_step
        while self._plan and self._plan[-1] <= step:
            self._plan.pop()
        linear = next(layer for layer in classifier.net.layers if isinstance(layer, nn.Linear))
        units = min(self._num_units, linear.out_features)
        with on_trial(classifier.net):
            activations, logits = _run(classifier.net, self._inputs)
            weights = linear.weight.detach()[:units].reshape(units, *self._images.shape[1:])
        count, (train_labels, val_labels) = len(self._images), self._measured
        limit = weights.abs().max().clamp(min=1e-12)
        lit = activations[:count, :units].clamp(min=0)
        train = logits[count : count + len(train_labels)], train_labels
        val = logits[count + len(train_labels) :], val_labels
        loss = math.nan if outputs is None else float(outputs["loss"])
        per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        moment = {
            "steps": np.int64(step),
            "epochs": np.float32(step / per_epoch),
            "weights": _to_bytes(128 + 127 * weights / limit),
            "limits": limit.cpu().numpy(),
            "probabilities": _to_bytes(255 * logits[:count].softmax(dim=1)),
            "activations": _to_bytes(255 * lit / lit.max().clamp(min=1e-12)),
            "batch_loss": np.float32(loss),
        }
        for name, (outputs_of, labels) in (("train", train), ("val", val)):
            few = len(labels) == 0
            right = (outputs_of.argmax(dim=1) == labels).float().mean()
            moment[f"{name}_loss"] = np.float32(
                math.nan if few else float(F.cross_entropy(outputs_of, labels))
            )
            moment[f"{name}_acc"] = np.float32(math.nan if few else float(right))
        self.moments.append(moment)


def plan(total: int) -> list[int]:
    """Choose at most ``NUM_MOMENTS`` steps from 0 to ``total`` to record, in ascending order."""
    shares = np.linspace(0, 1, NUM_MOMENTS) ** 2.5
    return sorted({round(share * total) for share in shares.tolist()})


def _spread(labels: Tensor, count: int) -> Tensor:
    """Return the indices of images in which the classes are as balanced as possible.  (N,) -> (count,)"""
    order = labels.argsort(stable=True)
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels)) - starts[labels[order]]  # 0 for the first of each class, …
    first = (ranks * (int(labels.max()) + 1) + labels).argsort(stable=True)
    return first[:count].sort().values


def _run(net: FeedForward, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the activations of the first hidden layer, (B, units), and the logits, (B, classes)."""
    values, first = inputs, None
    for layer in net.layers:
        values = layer(values)
        if first is None and isinstance(layer, tuple(ACTIVATIONS.values())):
            first = values
    return values if first is None else first, values


def _to_bytes(values: Tensor) -> Any:
    return values.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
