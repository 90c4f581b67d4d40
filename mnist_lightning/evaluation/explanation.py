"""Why a net answers as it does: what each pixel and unit adds, what is like it, and what would turn it."""

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

NUM_UNITS = 6  # that are drawn
INK = 128.0  # grey levels: what is darker is a stroke, beside which new ink may be put
FAINT = 25.0  # what is fainter is no part of the figure
NUM_NEAREST = 5
MOST_CHANGES = 60  # pixels
MOST_ERASED = 0.6  # of the ink, in one part
BENDS = (nn.ReLU, nn.LeakyReLU)  # activations of two straight lines

# Parts of a figure: the rows and the columns of its box that they take, in sixths
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
    """The units of the first hidden layer.

    Attributes:
        weights: (U, C, H, W), as the net has them, for normalised pixels.
        values: (U,) after the activation.
        adds: (num_classes, U) to each logit; of a net of bends, relative to a blank image.
    """

    weights: Tensor
    values: Tensor
    adds: Tensor


@dataclass
class Change:
    """Few pixels that turn an answer.

    Attributes:
        image: (C, H, W) in [0, 255], as the net would see it.
        pixels: rows and columns of those that are changed.
        label: the new answer.
        probability: of it.
    """

    image: Tensor
    pixels: list[tuple[int, int]]
    label: int
    probability: float


@dataclass
class Erased:
    """A part of a figure without which the net answers otherwise.

    Attributes:
        part: a key of ``PARTS``.
        image: (C, H, W) in [0, 255], without it.
        label: the new answer.
        probability: of it.
    """

    part: str
    image: Tensor
    label: int
    probability: float


@dataclass
class Nearest:
    """The training images that are most like an image to the net's last hidden layer, the nearest first.

    Attributes:
        images: (N, H, W) or (N, H, W, C) uint8.
        labels: (N,) int64.
        distances: (N,) float, Euclidean.
    """

    images: Tensor
    labels: Tensor
    distances: Tensor


@dataclass
class Explanation:
    """The explanation of one image's answer.

    Attributes:
        seen: (C, H, W) float32 in [0, 255], the pixels that the net sees.
        class_names: by label.
        logits: (num_classes,) float64.
        probabilities: (num_classes,) float64, at the net's temperature.
        is_exact: whether ``pixels`` and ``rest`` are the exact decomposition; else gradient × input.
        pixels: (num_classes, H, W) float64, what each pixel adds to each logit; a black one adds nothing.
        rest: (num_classes,) float64.  If exact, the logits of a blank image; else what the pixels leave over.
            Pixels and rest sum to the logits.
        units: None for a net that is no ``FeedForward`` or has no hidden layer.
        change: the smallest that was found; None: none of at most ``MOST_CHANGES`` pixels.
        erased: the smallest part whose loss turns the answer; None: there is none.
        nearest: None where they were not looked for.
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
        """The labels, the most probable first."""
        order: list[int] = self.logits.argsort(descending=True, stable=True).tolist()
        return order

    @property
    def method(self) -> str:
        return "exact, relative to a blank image" if self.is_exact else "gradient × input"

    def __str__(self) -> str:
        """The answer in words; what it says of a part, the net was asked."""
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
            title: None: the sentence.
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

    Of a ``FeedForward`` net of bends (ReLU or leaky ReLU, with batch norm or without) the contributions are
    exact: the slope of each unit is that of the line through its values for a blank image and for this one,
    so that what the pixels add sums to the difference between the two images' logits.  That is DeepLIFT's
    rescale rule: Shrikumar, Greenside and Kundaje 2017, arXiv 1704.02685.  Of any other net they are
    gradient × input.

    Args:
        classifier: in eval mode.
        image: (H, W) or (H, W, C) uint8 or float, in [0, 255], as the data set has them.
        nearest: of ``find_nearest``, which looks for those of many images at once.

    Raises:
        ValueError: the net names no classes, or the image has another shape.
    """
    if not classifier.names_classes:
        raise ValueError("explain is for nets that name classes, and this one gives a number")
    channels, height, width = classifier.image_shape
    if tuple(image.shape) not in ((height, width), (height, width, channels)):
        raise ValueError(f"the net takes images of {height}×{width}×{channels}, not {tuple(image.shape)}")
    with torch.no_grad():
        seen = classifier.preprocess.to_pixels(image.to(classifier.device)[None])[0]
        seen = seen.cpu()  # Apple's GPUs know no float64
    net = copy.deepcopy(classifier.net).cpu().double().eval().requires_grad_(False)
    mean, std = (one.cpu().double() for one in (classifier.preprocess.mean, classifier.preprocess.std))
    exact = is_exact(classifier.net)
    gains, logits, blank, units = (_multiply if exact else _differentiate)(net, seen.double(), mean, std)
    pixels = (gains * seen.double()).sum(dim=1)
    return Explanation(
        seen=seen,
        class_names=classifier.class_names,
        logits=logits,
        probabilities=classifier.to_probabilities(logits[None])[0],
        is_exact=exact,
        pixels=pixels,
        rest=(blank if exact else logits - pixels.sum(dim=(1, 2))),
        units=units,
        change=find_change(classifier, seen),
        erased=find_erased(classifier, seen),
        nearest=nearest,
    )


def is_exact(net: nn.Module) -> bool:
    """Whether a net is one of bends, whose contributions can be told exactly."""
    if type(net) is not FeedForward:
        return False
    smooth = tuple(kind for kind in ACTIVATIONS.values() if kind not in BENDS)
    return not any(isinstance(layer, (nn.LayerNorm, *smooth)) for layer in net.layers)


def _multiply(
    net: nn.Module, seen: Tensor, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor, Units | None]:
    """Slopes between a blank image and this one; see ``explain``.

    Returns:
        (num_classes, C, H, W) for each pixel, the logits of this image and of the blank one, and the units.
    """
    layers = [layer for layer in net.layers if not isinstance(layer, nn.Dropout)]  # type: ignore[union-attr]
    values = [(torch.stack([torch.zeros_like(seen), seen]) - mean) / std]
    for layer in layers:
        values.append(layer(values[-1]))
    blank, logits = values[-1]
    gains = torch.eye(len(logits), dtype=torch.float64)
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
            units = _read_units(net, end, gains * (end - start), seen.shape)  # the first layer's come last
            moved = high - low
            at = F.relu(torch.sign(high)) if isinstance(layer, nn.ReLU) else (end / high).nan_to_num(1.0)
            near = moved.abs() < 1e-9
            gains = gains * torch.where(near, at, (end - start) / torch.where(near, 1.0, moved))
    return gains.reshape(len(logits), *seen.shape) / std, logits, blank, units


def _differentiate(
    net: nn.Module, seen: Tensor, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor, Units | None]:
    """Gradients at this image; as ``_multiply`` otherwise."""
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
    return Units(weights.float(), values, adds)


def ask(classifier: DigitClassifier, seen: Tensor) -> Tensor:
    """The logits for pixels as the net sees them.  (N, C, H, W) in [0, 255] -> (N, num_classes)"""
    outputs = []
    with torch.inference_mode():
        for part in torch.split(seen.to(classifier.device), eval_batch_size(classifier.image_shape)):
            outputs.append(
                classifier.net((part - classifier.preprocess.mean) / classifier.preprocess.std).cpu()
            )
    return torch.cat(outputs)


def find_change(classifier: DigitClassifier, seen: Tensor) -> Change | None:
    """Look for the fewest pixels that turn the answer.

    One pixel after the other is inked (255) where it touches ink, or erased (0) where there is some, always
    the one that brings another answer nearest; then each is taken back whose change is not needed.  A search
    of all sets of pixels would take for ever, so a smaller change may exist.

    Args:
        seen: (C, H, W) in [0, 255].
    """
    label = int(ask(classifier, seen[None]).argmax())

    def lead(images: Tensor) -> Tensor:
        """The lead of the best other answer, in logits.  (N, C, H, W) -> (N,)"""
        logits = ask(classifier, images)
        own = logits[:, label].clone()
        logits[:, label] = -torch.inf
        return logits.amax(dim=1) - own

    image = seen.clone()
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
        without[:, y, x] = seen[:, y, x]
        if lead(without[None])[0] > 0:
            image = without
            done.remove((y, x))
    probabilities = classifier.to_probabilities(ask(classifier, image[None]))[0]
    answer = int(probabilities.argmax())
    return Change(image, done, answer, float(probabilities[answer]))


def find_erased(classifier: DigitClassifier, seen: Tensor) -> Erased | None:
    """Erase one part after the other, and ask the net: the one with the least ink that turns its answer to
    another of which it is more sure than not.

    Args:
        seen: (C, H, W) in [0, 255].
    """
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
    """The training images nearest to each image in the last hidden layer.

    That layer is what goes into the net's last linear layer; of a net that has none, the pixels.

    Args:
        images: (N, H, W) or (N, H, W, C) in [0, 255].
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
