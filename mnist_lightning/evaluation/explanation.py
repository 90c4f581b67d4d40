"""Explain a net's answer: contributions of pixels and units, similar images, and changes that turn it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.data import Images, eval_batch_size
from mnist_lightning.evaluation.likeness import see
from mnist_lightning.network import ACTIVATIONS, FeedForward

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

NUM_UNITS = 6  # number of units to draw
INK = 128.0  # grey level from which a pixel is a stroke, beside which new ink may be added
FAINT = 25.0  # grey level below which a pixel is no part of the figure
NUM_NEAREST = 5
MOST_CHANGES = 60  # most pixels to change
MOST_ERASED = 0.6  # largest share of the ink that an erased part may have
BENDS = (nn.ReLU, nn.LeakyReLU)  # activations that consist of two straight lines

# Parts of a figure: the rows and the columns of its bounding box that they cover, in sixths
PARTS = {
    "top": ((0, 2), (0, 6)),
    "middle": ((2, 4), (0, 6)),
    "bottom": ((4, 6), (0, 6)),
    "left side": ((0, 6), (0, 2)),
    "right side": ((0, 6), (4, 6)),
    "upper left": ((0, 3), (0, 3)),
    "upper right": ((0, 3), (3, 6)),
    "lower left": ((3, 6), (0, 3)),
    "lower right": ((3, 6), (3, 6)),
    "centre": ((2, 4), (2, 4)),
}


@dataclass
class Units:
    """The U units of the first hidden layer.

    Attributes:
        weights: (U, C, H, W), the net's weights for normalised pixels.
        values: (U,), their values after the activation.
        adds: (num_classes, U), their contributions to each logit; for exact explanations (``is_exact``),
            relative to a blank image.
    """

    weights: Tensor
    values: Tensor
    adds: Tensor


@dataclass
class Change:
    """A change of few pixels that turns the answer.

    Attributes:
        image: (C, H, W) in [0, 255], the changed input of the net.
        pixels: row and column of each changed pixel.
        label: the new answer.
        probability: probability of the new answer, in [0, 1].
    """

    image: Tensor
    pixels: list[tuple[int, int]]
    label: int
    probability: float


@dataclass
class Erased:
    """A part of a figure without which the net gives another answer.

    Attributes:
        part: a key of ``PARTS``.
        image: (C, H, W) in [0, 255], the net's input without the part.
        label: the new answer.
        probability: probability of the new answer, in [0, 1].
    """

    part: str
    image: Tensor
    label: int
    probability: float


@dataclass
class Nearest:
    """The training images nearest to an image in the net's last hidden layer, the nearest first.

    Attributes:
        images: (N, H, W) or (N, H, W, C) uint8.
        labels: (N,) int64.
        distances: (N,) float, Euclidean distances in the last hidden layer.
    """

    images: Tensor
    labels: Tensor
    distances: Tensor


@dataclass
class Explanation:
    """The explanation of a net's answer for one image.

    Attributes:
        seen: (C, H, W) float32 in [0, 255], the net's input before it is normalised.
        class_names: name of each label.
        logits: (num_classes,) float64.
        probabilities: (num_classes,) float64, at the net's temperature.
        is_exact: whether ``pixels`` and ``rest`` decompose the logits exactly; otherwise ``pixels`` are
            gradient × input.
        pixels: (num_classes, H, W) float64, contribution of each pixel to each logit; a pixel of 0 has none.
        rest: (num_classes,) float64, the logits minus the sums of ``pixels``; if ``is_exact``, these are the
            logits of a blank image.
        units: the first hidden layer; None if the net is no ``FeedForward`` or has no hidden layer.
        change: the smallest change that was found; None: none of at most ``MOST_CHANGES`` pixels.
        erased: the smallest part whose removal turns the answer; None: there is none.
        nearest: the nearest training images; None: they were not asked for.
    """

    seen: Tensor
    class_names: Sequence[str]
    logits: Tensor
    probabilities: Tensor
    is_exact: bool
    pixels: Tensor
    rest: Tensor
    units: Units | None
    change: Change | None
    erased: Erased | None
    nearest: Nearest | None

    @property
    def ranking(self) -> list[int]:
        """The labels in descending order of probability."""
        order: list[int] = self.logits.argsort(descending=True, stable=True).tolist()
        return order

    @property
    def method(self) -> str:
        return "exact, relative to a blank image" if self.is_exact else "gradient × input"

    def __str__(self) -> str:
        """Say the answer in a sentence, and how it changes without a part of the figure."""
        first = self.ranking[0]
        told = f"read as {self.class_names[first]} ({100 * float(self.probabilities[first]):.1f} %)"
        if self.erased is None:
            return f"{told}; no single part decides it: with any one erased the answer stays"
        name = self.class_names[self.erased.label]
        share = 100 * self.erased.probability
        return f"{told}; without its {self.erased.part} it would be read as {name} ({share:.1f} %)"

    def draw(self, *, title: str | None = None) -> "Figure":
        """Draw the explanation as a figure.

        Args:
            title: the figure's title; None: the sentence of ``str``.
        """
        from mnist_lightning import figures

        names, (first, second) = self.class_names, self.ranking[:2]

        def picture(image: Tensor) -> "NDArray[np.float32]":
            return (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()

        def tell(label: int) -> str:
            rest, total = float(self.rest[label]), float(self.logits[label])
            return f"for {names[label]}: {rest:.1f} {total - rest:+.1f} = {total:.1f}".replace("-", "−")

        change = None
        if self.change is not None:
            count = len(self.change.pixels)
            told = f"{count} pixel{'s' * (count > 1)}: {names[self.change.label]}"
            change = (picture(self.change.image), told)
        units = None
        if self.units is not None:
            decided = self.units.adds[first] - self.units.adds[second]
            chosen = decided.abs().argsort(descending=True, stable=True)[:NUM_UNITS]
            captions = [f"unit {int(unit) + 1}: {decided[unit]:+.2f}".replace("-", "−") for unit in chosen]
            pictures = np.stack([picture(weights) for weights in self.units.weights[chosen]])
            line = "units of the first layer that decided: what each adds to"
            units = (pictures, captions, f"{line} {names[first]} over {names[second]}")
        nearest = None
        if self.nearest is not None:
            labels = [names[label] for label in self.nearest.labels.tolist()]
            nearest = (self.nearest.images.numpy(), labels)
        what = "a blank image's logit" if self.is_exact else "the rest"
        return figures.explanation(
            picture(self.seen),
            {tell(label): self.pixels[label].numpy() for label in (first, second)},
            change=change,
            units=units,
            nearest=nearest,
            title=str(self) if title is None else title,
            note=f"blue: for it, red: against it; {what} + what the pixels add = the logit ({self.method})",
        )


def explain(classifier: DigitClassifier, image: Tensor, *, nearest: Nearest | None = None) -> Explanation:
    """Explain the answer for one image.

    For a ``FeedForward`` net with ReLU or leaky ReLU, with or without batch norm, the contributions of pixels
    are exact: they sum to the difference between the logits of this image and of a blank one.  To this end
    the slope of each unit is that of the line through its values for both images.  This is the rescale rule
    of DeepLIFT: Shrikumar, Greenside and Kundaje 2017, arXiv 1704.02685.  For any other net the contributions
    are gradient × input.

    Args:
        classifier: the net, in eval mode.
        image: (H, W) or (H, W, C) uint8 or float, in [0, 255], as the data set stores it.
        nearest: the image's result of ``find_nearest``, which takes many images at once; None: not shown.

    Raises:
        ValueError: the net is a regression, or the image has another shape.
    """
    if not classifier.names_classes:
        raise ValueError("explain is for classifiers, and this net gives a number (a regression)")
    channels, height, width = classifier.image_shape
    if tuple(image.shape) not in ((height, width), (height, width, channels)):
        raise ValueError(f"the net takes images of {height}×{width}×{channels}, not {tuple(image.shape)}")
    with torch.no_grad():
        seen = classifier.preprocess.to_pixels(image.to(classifier.device)[None])[0]
    net = copy.deepcopy(classifier.net).double().eval().requires_grad_(False)
    mean, std = classifier.preprocess.mean.double(), classifier.preprocess.std.double()
    exact = is_exact(classifier.net)
    gains, logits, blank, units = (_multiply if exact else _differentiate)(net, seen.double(), mean, std)
    pixels = (gains * seen.double()).sum(dim=1)
    return Explanation(
        seen=seen.cpu(),
        class_names=classifier.class_names,
        logits=logits.cpu(),
        probabilities=classifier.to_probabilities(logits[None])[0].cpu(),
        is_exact=exact,
        pixels=pixels.cpu(),
        rest=(blank if exact else logits - pixels.sum(dim=(1, 2))).cpu(),
        units=units,
        change=find_change(classifier, seen),
        erased=find_erased(classifier, seen),
        nearest=nearest,
    )


def is_exact(net: nn.Module) -> bool:
    """Whether the contributions of a net's pixels can be computed exactly, see ``explain``."""
    if type(net) is not FeedForward:
        return False
    smooth = tuple(kind for kind in ACTIVATIONS.values() if kind not in BENDS)
    return not any(isinstance(layer, (nn.LayerNorm, *smooth)) for layer in net.layers)


def _multiply(
    net: nn.Module, seen: Tensor, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor, Units | None]:
    """Compute slopes between a blank image and this one, see ``explain``.

    Returns:
        The slope of each logit for each pixel, (num_classes, C, H, W); the logits of this image and of the
        blank one, (num_classes,) each; and the units.
    """
    layers = [layer for layer in net.layers if not isinstance(layer, nn.Dropout)]  # type: ignore[union-attr]
    values = [(torch.stack([torch.zeros_like(seen), seen]) - mean) / std]
    for layer in layers:
        values.append(layer(values[-1]))
    blank, logits = values[-1]
    gains = torch.eye(len(logits), dtype=torch.float64, device=seen.device)
    units = None
    for number in reversed(range(len(layers))):
        layer, (low, high) = layers[number], values[number]
        if isinstance(layer, nn.Linear):
            gains = gains @ layer.weight
        elif isinstance(layer, nn.BatchNorm1d):
            assert layer.running_var is not None
            gains = gains * (layer.weight / torch.sqrt(layer.running_var + layer.eps))
        elif isinstance(layer, BENDS):
            start, end = values[number + 1]
            units = _read_units(
                net, end, gains * (end - start), seen.shape
            )  # those of the first layer remain
            moved = high - low
            at = F.relu(torch.sign(high)) if isinstance(layer, nn.ReLU) else (end / high).nan_to_num(1.0)
            near = moved.abs() < 1e-9
            gains = gains * torch.where(near, at, (end - start) / torch.where(near, 1.0, moved))
    return gains.reshape(len(logits), *seen.shape) / std, logits, blank, units


def _differentiate(
    net: nn.Module, seen: Tensor, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor, Units | None]:
    """Compute gradients at this image; the result is like that of ``_multiply``, with 0 for a blank image."""
    pixels = seen.clone().requires_grad_()
    hidden: list[Tensor] = []
    first = None
    if type(net) is FeedForward:
        first = next((layer for layer in net.layers if isinstance(layer, tuple(ACTIVATIONS.values()))), None)
    handle = first.register_forward_hook(lambda _, __, output: hidden.append(output)) if first else None
    with torch.enable_grad():
        logits = net(((pixels - mean) / std)[None])[0]
        wanted = [pixels, *hidden]
        rows = [torch.autograd.grad(logit, wanted, retain_graph=True) for logit in logits]
    if handle is not None:
        handle.remove()
    units = None
    if hidden:
        values = hidden[0][0].detach()
        units = _read_units(net, values, torch.stack([row[1][0] for row in rows]) * values, seen.shape)
    gains = torch.stack([row[0] for row in rows])
    return gains, logits.detach(), torch.zeros_like(logits), units


def _read_units(net: nn.Module, values: Tensor, adds: Tensor, shape: Sequence[int]) -> Units:
    linear = next(layer for layer in net.modules() if isinstance(layer, nn.Linear))
    weights = linear.weight.reshape(-1, *shape)
    return Units(weights.float().cpu(), values.cpu(), adds.cpu())


def ask(classifier: DigitClassifier, seen: Tensor) -> Tensor:
    """Compute the logits for preprocessed pixels.  (N, C, H, W) in [0, 255] -> (N, num_classes)"""
    outputs = []
    with torch.inference_mode():
        for part in torch.split(seen.to(classifier.device), eval_batch_size(classifier.image_shape)):
            outputs.append(
                classifier.net((part - classifier.preprocess.mean) / classifier.preprocess.std).cpu()
            )
    return torch.cat(outputs)


def find_change(classifier: DigitClassifier, seen: Tensor) -> Change | None:
    """Search for few pixels whose change turns the answer.

    Each step sets one pixel to 255 beside ink, or to 0 where there is ink: the pixel that brings another
    answer nearest.  Afterwards, changes that are not needed are undone.  A search of all sets of pixels would
    take too long, so a smaller change may exist.

    Args:
        classifier: the net.
        seen: (C, H, W) in [0, 255].

    Returns:
        The change; None: none of at most ``MOST_CHANGES`` pixels was found.
    """
    label = int(ask(classifier, seen[None]).argmax())

    def lead(images: Tensor) -> Tensor:
        """Compute how far the best other logit is above the answer's.  (N, C, H, W) -> (N,)"""
        logits = ask(classifier, images)
        own = logits[:, label].clone()
        logits[:, label] = -torch.inf
        return logits.amax(dim=1) - own

    image = seen.cpu().clone()
    changed = torch.zeros(image.shape[1:], dtype=torch.bool)
    done: list[tuple[int, int]] = []
    for _ in range(MOST_CHANGES):
        level = image.amax(dim=0)
        beside = F.max_pool2d((level >= INK).float()[None], 3, stride=1, padding=1)[0] > 0
        places = ((~changed) & ((level > 0) | (beside & (level < 255)))).nonzero()
        trials = []
        for y, x in places.tolist():
            for value in (0.0, 255.0):
                if (value == 0 and level[y, x] > 0) or (value == 255 and beside[y, x] and level[y, x] < 255):
                    trials.append((y, x, value))
        if not trials:
            return None
        images = image.expand(len(trials), *image.shape).clone()
        rows, columns, values = (torch.tensor(one) for one in zip(*trials, strict=True))
        images[torch.arange(len(trials)), :, rows, columns] = values[:, None]
        leads = lead(images)
        best = int(leads.argmax())
        image = images[best]
        y, x, _ = trials[best]
        changed[y, x] = True
        done.append((y, x))
        if leads[best] > 0:
            break
    else:
        return None
    for y, x in list(done[:-1]):
        without = image.clone()
        without[:, y, x] = seen[:, y, x].cpu()
        if lead(without[None])[0] > 0:
            image = without
            done.remove((y, x))
    probabilities = classifier.to_probabilities(ask(classifier, image[None]))[0]
    answer = int(probabilities.argmax())
    return Change(image, done, answer, float(probabilities[answer]))


def find_erased(classifier: DigitClassifier, seen: Tensor) -> Erased | None:
    """Find the part with the least ink whose removal turns the answer to one with a probability above 1/2.

    Args:
        classifier: the net, which is tried without each of ``PARTS``.
        seen: (C, H, W) in [0, 255].

    Returns:
        The part; None: there is none.
    """
    seen = seen.cpu()
    level = seen.amax(dim=0)
    ink = level > FAINT
    if not ink.any():
        return None
    top, bottom = ink.any(dim=1).nonzero().flatten()[[0, -1]].tolist()
    left, right = ink.any(dim=0).nonzero().flatten()[[0, -1]].tolist()
    rows = ((torch.arange(level.shape[0]) - top + 0.5) * 6 / (bottom - top + 1))[:, None]
    columns = (torch.arange(level.shape[1]) - left + 0.5) * 6 / (right - left + 1)
    masks = torch.stack(
        [
            (rows >= first_row) & (rows < end_row) & (columns >= first) & (columns < end)
            for (first_row, end_row), (first, end) in PARTS.values()
        ]
    )
    shares = (masks * level).sum(dim=(1, 2)) / level.sum()
    images = torch.where(masks[:, None], 0.0, seen)
    before = int(ask(classifier, seen[None]).argmax())
    probabilities, labels = classifier.to_probabilities(ask(classifier, images)).max(dim=1)
    turned = (labels != before) & (probabilities > 0.5) & (shares > 0) & (shares <= MOST_ERASED)
    if not turned.any():
        return None
    best = int(torch.where(turned, shares, 2.0).argmin())
    return Erased(list(PARTS)[best], images[best], int(labels[best]), float(probabilities[best]))


def find_nearest(classifier: DigitClassifier, images: Tensor, training: Images) -> list[Nearest]:
    """Find the training images nearest to each image in the last hidden layer, see ``likeness.see``.

    Args:
        classifier: the net.
        images: (N, H, W) or (N, H, W, C) in [0, 255].
        training: the training images.

    Returns:
        The ``NUM_NEAREST`` nearest for each image, fewer if there are fewer training images.
    """
    wanted = see(classifier, images)[0]
    distances, indices = [], []
    start = 0
    for part in torch.split(training.images, eval_batch_size(classifier.image_shape)):
        near, at = torch.cdist(wanted, see(classifier, part)[0]).topk(
            min(NUM_NEAREST, len(part)), largest=False
        )
        distances.append(near)
        indices.append(at + start)
        start += len(part)
    near, at = torch.cat(distances, dim=1).topk(min(NUM_NEAREST, start), largest=False)
    chosen = torch.cat(indices, dim=1).gather(1, at)
    return [
        Nearest(training.images[one], training.labels[one], distance)
        for one, distance in zip(chosen, near, strict=True)
    ]
