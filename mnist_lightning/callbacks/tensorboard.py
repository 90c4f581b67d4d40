"""Give a run's pictures and graph to TensorBoard and to other loggers that accept images."""

import copy
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from mnist_lightning import figures
from mnist_lightning.evaluation.scores import confusion_matrix
from mnist_lightning.evaluation.trained import compute_outputs
from mnist_lightning.rundir.loggers import TensorBoardLogger, writing

log = logging.getLogger(__name__)

NUM_IMAGES = 40
NUM_MISTAKES = 24
NUM_UNITS = 60  # units of the first layer to draw
MOMENTS = [4**power for power in range(16)]  # epochs that have pictures of their own


class TensorBoardPictures(Callback):
    """Draw training images, graph, weights, confusion matrix and mistakes, after training has ended.

    The weights of the first layer and the confusion matrix are also kept at the ends of epochs 1, 4, 16 …;
    no training step gets slower by it.  Those matrices count the predictions of the epoch's own validation.
    The last matrix and the mistakes belong to the net that ``trainer.validate`` gets after training, whose
    metrics are reported.  The callback draws no random number.  The pictures go to TensorBoard's logger and
    to every logger with a method ``log_image``, such as W&B's; without such a logger, nothing is drawn.

    Args:
        enabled: whether to draw anything.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.moments: list[dict[str, Any]] = []  # "step", "weights", "matrix" of the kept epochs
        self._validated: torch.Tensor | None = None  # (C, C) int64, counts of the current or last validation
        self._matrices: list[dict[str, Any]] = []  # the moments with a matrix, set when training has ended

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments} if self.moments else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.moments = state_dict["moments"]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        classes: int = pl_module.num_classes  # type: ignore[assignment]
        wanted = self._wanted(trainer) and _is_moment(trainer) and pl_module.names_classes
        self._validated = torch.zeros(classes, classes, dtype=torch.int64) if wanted else None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._validated is not None:
            classes = len(self._validated)
            cells = batch[1] * classes + outputs.argmax(dim=1)
            self._validated += cells.bincount(minlength=classes**2).reshape(classes, classes).cpu()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        matrix, self._validated = self._validated, None
        if not self._wanted(trainer) or not _is_moment(trainer):
            return
        if matrix is not None:  # add the counts of all processes
            matrix = trainer.strategy.reduce(matrix.to(pl_module.device), reduce_op="sum").cpu()
        weights = _first_layer(pl_module)
        moment = {"step": trainer.global_step, "weights": None if weights is None else weights.half()}
        self.moments.append({**moment, "matrix": matrix})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._wanted(trainer) or not trainer.is_global_zero:
            return
        earlier = [one for one in self.moments if one["step"] < trainer.global_step]
        self._matrices = [one for one in earlier if one["matrix"] is not None]
        images, labels = _split(trainer, "train")
        names = trainer.datamodule.class_names  # type: ignore[attr-defined]
        with _left_out_if_it_does_not_fit("training images"):
            drawing = figures.images(
                images[:NUM_IMAGES].numpy(),
                [names[label] for label in labels[:NUM_IMAGES].tolist()],
                title=f"the first {min(NUM_IMAGES, len(images))} training images",
            )
            _show(trainer, "images/training", [figures.to_array(drawing)], steps=[0])
        with _left_out_if_it_does_not_fit("graph of the net"), writing(trainer) as writer:
            if writer is not None:
                seen = pl_module.preprocess(images[:1].to(pl_module.device))  # type: ignore[operator]
                _add_graph(writer, pl_module.net, seen.cpu())  # type: ignore[arg-type]
        with _left_out_if_it_does_not_fit("first layer"):
            weights = _first_layer(pl_module)
            if weights is not None:
                steps = [*(one["step"] for one in earlier), trainer.global_step]
                shown = [*(one["weights"].float() for one in earlier), weights]
                units = len(next(pl_module.net.parameters()))  # type: ignore[union-attr]
                titles = [
                    f"first layer after step {step:,}: {len(weights)} of {units} units" for step in steps
                ]
                drawn = figures.first_layers([one.numpy() for one in shown], titles=titles)
                _show(trainer, "net/first_layer", drawn, steps=steps)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.VALIDATING or not pl_module.names_classes:
            return
        if not self._wanted(trainer) or not trainer.is_global_zero:
            return
        images, labels = _split(trainer, "val")
        with _left_out_if_it_does_not_fit("confusion matrix and mistakes"):
            probabilities = torch.softmax(compute_outputs(pl_module, images), dim=1)  # type: ignore[arg-type]
            names: list[str] = trainer.datamodule.class_names  # type: ignore[attr-defined]
            predictions = probabilities.argmax(dim=1)
            last = torch.from_numpy(confusion_matrix(labels.numpy(), predictions.numpy(), len(names)))
            matrices = [*(one["matrix"] for one in self._matrices), last]
            steps = [*(one["step"] for one in self._matrices), trainer.global_step]
            titles = [tell_mistakes(matrix) for matrix in matrices]
            drawn = figures.confusion_matrices([one.numpy() for one in matrices], names, titles=titles)
            _show(trainer, "val/confusion_matrix", drawn, steps=steps)
            mistakes = _draw_mistakes(images, labels, probabilities, names, title=titles[-1])
            _show(trainer, "val/mistakes", [mistakes], steps=steps[-1:])
        with writing(trainer) as writer:
            if writer is not None:
                writer.flush()

    def _wanted(self, trainer: L.Trainer) -> bool:
        """Tell whether any logger accepts images; all processes get the same answer."""
        return self.enabled and any(
            isinstance(logger, TensorBoardLogger) or hasattr(logger, "log_image")
            for logger in trainer.loggers
        )


def tell_mistakes(matrix: torch.Tensor) -> str:
    """Say in words how many mistakes a confusion matrix (C, C) holds."""
    count = int(matrix.sum())
    return f"{count - int(matrix.trace()):,} of {count:,} validation images misread"


def _is_moment(trainer: L.Trainer) -> bool:
    """Tell whether this epoch has pictures of its own: epochs 1, 4, 16 …, except the last one."""
    epoch = trainer.current_epoch + 1
    fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return fitting and epoch in MOMENTS and epoch != trainer.max_epochs


def _first_layer(pl_module: L.LightningModule) -> torch.Tensor | None:
    """Return the weights of the first units as images, (units, H, W) or (units, H, W, 3), or None if the
    first layer does not take whole images."""
    weights = next(pl_module.net.parameters(), None)  # type: ignore[union-attr]
    shape: tuple[int, ...] = tuple(pl_module.image_shape)  # type: ignore[arg-type]
    if weights is None or weights.ndim != 2 or weights.shape[1] != math.prod(shape):
        return None
    pictures = weights.detach()[:NUM_UNITS].clone().cpu().float().reshape(-1, *shape)
    return pictures[:, 0] if shape[0] == 1 else pictures.permute(0, 2, 3, 1)


@contextmanager
def _left_out_if_it_does_not_fit(what: str) -> Iterator[None]:
    """Skip a picture that does not fit the user's net or images, and log a warning."""
    try:
        yield
    except OSError:  # a failed write, which the logger reports
        raise
    except Exception as error:
        log.warning("the loggers get no %s: %s", what, " ".join(str(error).split())[:200])


def _draw_mistakes(
    images: torch.Tensor, labels: torch.Tensor, probabilities: torch.Tensor, names: list[str], *, title: str
) -> NDArray[Any]:
    """Draw the most confident mistakes.  (N, …), (N,), (N, num_classes) -> (H, W, 3) uint8"""
    confidences, predictions = probabilities.max(dim=1)
    wrong = (predictions != labels).nonzero().squeeze(1)
    worst = wrong[confidences[wrong].argsort(descending=True, stable=True)][:NUM_MISTAKES]
    drawing = figures.mistakes(
        images[worst].numpy(),
        [names[label] for label in labels[worst].tolist()],
        [names[label] for label in predictions[worst].tolist()],
        confidences[worst].numpy(),
        title=f"{title}, the most confident ones",
    )
    return figures.to_array(drawing)


def _split(trainer: L.Trainer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a split's images, (N, H, W) or (N, H, W, 3) uint8, and labels, (N,) int64."""
    split = trainer.datamodule.splits[name]  # type: ignore[attr-defined]
    return split.images, split.labels


def _show(trainer: L.Trainer, tag: str, pictures: Iterable[NDArray[Any]], *, steps: list[int]) -> None:
    """Give pictures, (H, W, 3) uint8 each, to the loggers that accept images."""
    for pixels, step in zip(pictures, steps, strict=True):
        with writing(trainer) as writer:
            if writer is not None:
                writer.add_image(tag, pixels, step, dataformats="HWC")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(key=tag, images=[pixels], step=step)


def _add_graph(writer: SummaryWriter, net: torch.nn.Module, images: torch.Tensor) -> None:
    """Trace a copy of the net in eval mode, so that batch norm's and the random state do not change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=Warning)  # torch calls it itself
        writer.add_graph(copy.deepcopy(net).cpu().eval(), images)
