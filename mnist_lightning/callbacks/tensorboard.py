"""Write a run's pictures, graph and charts for TensorBoard."""

import copy
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from mnist_lightning import figures
from mnist_lightning.evaluation.scores import confusion_matrix
from mnist_lightning.evaluation.trained import compute_outputs
from mnist_lightning.rundir.loggers import writing

log = logging.getLogger(__name__)

NUM_IMAGES = 40
NUM_MISTAKES = 24
NUM_UNITS = 60  # of the first layer that are drawn


class TensorBoardPictures(Callback):
    """Charts before training; digits, graph, weights, confusion matrix and mistakes after it, so that
    nobody waits for them.

    The validation pictures belong to the net that ``trainer.validate`` is called with after training,
    the one whose metrics are published.  Nothing happens in a step, no random number is drawn, and
    without a TensorBoard logger nothing happens at all.

    Args:
        enabled: False: write nothing.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with self._writing(trainer) as writer:
            if writer is None:
                return
            writer.add_custom_scalars(lay_out(pl_module))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with self._writing(trainer) as writer:
            if writer is None:
                return
            images, labels = _split(trainer, "train")
            names = trainer.datamodule.class_names  # type: ignore[attr-defined]
            with _left_out_if_it_does_not_fit("training images"):
                drawing = figures.images(
                    images[:NUM_IMAGES].numpy(),
                    [names[label] for label in labels[:NUM_IMAGES].tolist()],
                    title=f"the first {min(NUM_IMAGES, len(images))} training images",
                )
                _add(writer, "data/images", drawing, step=0)
            with _left_out_if_it_does_not_fit("graph of the net"):
                seen = pl_module.preprocess(images[:1].to(pl_module.device))  # type: ignore[operator]
                _add_graph(writer, pl_module.net, seen.cpu())  # type: ignore[arg-type]
            with _left_out_if_it_does_not_fit("first layer"):
                weights = next(pl_module.net.parameters()).detach().cpu()  # type: ignore[union-attr]
                shape: tuple[int, ...] = tuple(pl_module.image_shape)  # type: ignore[arg-type]
                if weights.ndim == 2 and weights.shape[1] == math.prod(shape):  # a unit looks at whole images
                    pictures = weights[:NUM_UNITS].reshape(-1, *shape)
                    count = f"{min(NUM_UNITS, len(weights))} of {len(weights)} units"
                    drawing = figures.first_layer(
                        (pictures[:, 0] if shape[0] == 1 else pictures.permute(0, 2, 3, 1)).numpy(),
                        title=f"first layer after training: {count}",
                    )
                    _add(writer, "net/first_layer", drawing, step=trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.VALIDATING or not pl_module.names_classes:
            return
        with self._writing(trainer) as writer:
            if writer is None:
                return
            images, labels = _split(trainer, "val")
            with _left_out_if_it_does_not_fit("confusion matrix and mistakes"):
                probabilities = torch.softmax(compute_outputs(pl_module, images), dim=1)  # type: ignore[arg-type]
                names = trainer.datamodule.class_names  # type: ignore[attr-defined]
                for tag, drawing in _draw_validation(images, labels, probabilities, names).items():
                    _add(writer, tag, drawing, step=trainer.global_step)
            writer.flush()

    def _writing(self, trainer: L.Trainer) -> AbstractContextManager[SummaryWriter | None]:
        return writing(trainer) if self.enabled else nullcontext()


def lay_out(pl_module: L.LightningModule) -> dict[str, dict[str, list[object]]]:
    """TensorBoard's custom charts: each metric of training beside that of validation."""

    def chart(*tags: str) -> list[object]:
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]  # it reads tags as regular expressions

    names = [name.removeprefix("val/") for name in pl_module.val_metrics]  # type: ignore[union-attr]
    words = {"acc": "accuracy"}
    return {
        "training and validation": {
            words.get(name, name): chart(f"train/{name}", f"val/{name}")
            for name in sorted(names, key=lambda name: name != "loss")
        },
        "every few steps": {"training loss": chart("train/loss_step"), "learning rate": chart("lr")},
    }


@contextmanager
def _left_out_if_it_does_not_fit(what: str) -> Iterator[None]:
    """Leave out a picture that does not fit a user's net or images, with a warning; the run goes on."""
    try:
        yield
    except OSError:  # a failed write, which the logger tells
        raise
    except Exception as error:
        log.warning("TensorBoard gets no %s: %s", what, " ".join(str(error).split())[:200])


def _draw_validation(
    images: torch.Tensor, labels: torch.Tensor, probabilities: torch.Tensor, names: list[str]
) -> dict[str, Figure]:
    """The confusion matrix and the most confident mistakes.  (N, …), (N,), (N, num_classes)"""
    confidences, predictions = probabilities.max(dim=1)
    wrong = (predictions != labels).nonzero().squeeze(1)
    worst = wrong[confidences[wrong].argsort(descending=True, stable=True)][:NUM_MISTAKES]
    title = f"{len(wrong):,} of {len(labels):,} validation images misread"
    matrix = confusion_matrix(labels.numpy(), predictions.numpy(), len(names))
    return {
        "val/confusion_matrix": figures.confusion_matrix(matrix, names, title=title),
        "val/mistakes": figures.mistakes(
            images[worst].numpy(),
            [names[label] for label in labels[worst].tolist()],
            [names[label] for label in predictions[worst].tolist()],
            confidences[worst].numpy(),
            title=f"{title}, the most confident ones",
        ),
    }


def _split(trainer: L.Trainer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """-> images (N, H, W) or (N, H, W, 3) uint8, labels (N,) int64"""
    split = trainer.datamodule.splits[name]  # type: ignore[attr-defined]
    return split.images, split.labels


def _add(writer: SummaryWriter, tag: str, drawing: Figure, *, step: int) -> None:
    pixels = figures.to_array(drawing)
    writer.add_image(tag, pixels, step, dataformats="HWC")


def _add_graph(writer: SummaryWriter, net: torch.nn.Module, images: torch.Tensor) -> None:
    """Trace a copy in eval mode: tracing must touch neither batch norm's state nor the random state."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=Warning)  # used by torch itself
        writer.add_graph(copy.deepcopy(net).cpu().eval(), images)
