"""A trained net as one HTML file that needs nothing else: its weights, images to try, script and style."""

import base64
import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.evaluation.likeness import POOL, UNITS, Likeness
from mnist_lightning.network import ACTIVATIONS, FeedForward
from mnist_lightning.page.assemble import assemble, encode

SCRIPTS = ("core.js", "net.js", "page.js", "film.js")
LEVELS = 127  # of a weight of 8 bits, on each side of 0
SAMPLE_BYTES = 100_000  # for the images to try
MOST_SAMPLES = 100
NAME_OF = {kind: name for name, kind in ACTIVATIONS.items()}

Floats = NDArray[np.float32]


class NotDrawable(ValueError):
    """A net that the page can't run."""


@dataclass
class Layer:
    """A linear layer, its norm and its activation, as the page has them.

    Attributes:
        weights: (outputs, inputs) int8; times ``scales`` they are the weights.
        scales: (outputs,) float32.
        biases: (outputs,) float32.
        norm: of a layer norm its gains and shifts, (outputs,) float32 each, and its epsilon.
        activation: a key of ``ACTIVATIONS``, or "none".
    """

    weights: NDArray[np.int8]
    scales: Floats
    biases: Floats
    norm: tuple[Floats, Floats, float] | None
    activation: str


def read_layers(classifier: DigitClassifier) -> list[Layer]:
    """The layers of a net for pixels in [0, 1]: normalisation and batch norm are folded into the weights.

    Raises:
        NotDrawable: it is no ``FeedForward`` of grey images with a logit for each class.
    """
    net, shape = classifier.net, classifier.image_shape
    if type(net) is not FeedForward:
        kind = type(net)
        raise NotDrawable(f"the page runs FeedForward nets, and this is {kind.__module__}.{kind.__name__}")
    if shape[0] != 1:
        raise NotDrawable("the page is for nets of grey images, and this one's are in colour")
    if not classifier.names_classes:
        raise NotDrawable("the page is for nets that name classes, and this one gives a number")
    found: list[Layer] = []
    for linear, *others in _group(copy.deepcopy(net.layers).cpu()):  # Apple's GPUs know no float64
        weights, biases = linear.weight.detach().double(), linear.bias.detach().double()
        norm, activation = None, "none"
        for other in others:
            if isinstance(other, nn.BatchNorm1d):
                means, var = _known(other.running_mean).double(), _known(other.running_var).double()
                factor = other.weight.detach().double() / torch.sqrt(var + other.eps)
                weights = weights * factor[:, None]
                biases = (biases - means) * factor + other.bias.detach().double()
            elif isinstance(other, nn.LayerNorm):
                norm = (_to_array(other.weight), _to_array(other.bias), float(other.eps))
            else:
                activation = NAME_OF[type(other)]
        if not found:
            mean, std = classifier.preprocess.mean.item(), classifier.preprocess.std.item()
            biases = biases - weights.sum(dim=1) * (mean / std)
            weights = weights * (255 / std)
        found.append(Layer(*quantise(weights), _to_array(biases), norm, activation))
    return found


def quantise(rows: Tensor) -> tuple[NDArray[np.int8], Floats]:
    """Rows with 8 bits for each number.  (N, F) float -> (N, F) int8, (N,) float32 to be multiplied by"""
    scales = (rows.abs().amax(dim=1) / LEVELS).clamp(min=1e-30)
    return (rows / scales[:, None]).round().to(torch.int8).cpu().numpy(), _to_array(scales)


def _group(layers: nn.Sequential) -> list[list[Any]]:
    """Each linear layer and what counts of the modules behind it, up to the next one."""
    groups: list[list[Any]] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            groups.append([layer])
        elif groups and isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm, *ACTIVATIONS.values())):
            groups[-1].append(layer)  # what is left out, dropout and noise, does nothing in a trained net
    return groups


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _to_array(tensor: Tensor) -> Floats:
    return tensor.detach().float().cpu().numpy()


def run_layers(layers: Sequence[Layer], pixels: Floats) -> Floats:
    """Compute what the page computes, in float32.  (N, H * W) in [0, 1] -> (N, num_classes) logits"""
    values = torch.from_numpy(np.asarray(pixels, dtype=np.float32))
    for layer in layers:
        weights = torch.from_numpy(layer.weights).float() * torch.from_numpy(layer.scales)[:, None]
        values = values @ weights.T + torch.from_numpy(layer.biases)
        if layer.norm is not None:
            gains, shifts, eps = layer.norm
            size = (len(gains),)
            values = nn.functional.layer_norm(
                values, size, torch.from_numpy(gains), torch.from_numpy(shifts), eps
            )
        if layer.activation != "none":
            values = ACTIVATIONS[layer.activation]()(values)
    return values.numpy()


def compare_layers(layers: Sequence[Layer], classifier: DigitClassifier, images: Tensor) -> tuple[int, float]:
    """How many images get the same answer from the page's weights as from the net's, and the largest
    difference of a probability.

    Args:
        images: (N, H, W) uint8.
    """
    same, difference = 0, 0.0
    with torch.inference_mode():
        for part in torch.split(images, 500):
            seen = classifier.preprocess.to_pixels(part.to(classifier.device))
            own = classifier.net((seen - classifier.preprocess.mean) / classifier.preprocess.std).cpu()
            page = torch.from_numpy(run_layers(layers, (seen / 255).flatten(1).cpu().numpy()))
            same += int((own.argmax(dim=1) == page.argmax(dim=1)).sum())
            distance = (classifier.to_probabilities(own) - classifier.to_probabilities(page)).abs().max()
            difference = max(difference, float(distance))
    return same, difference


def choose_samples(probabilities: Tensor, labels: Tensor, image_shape: Sequence[int]) -> list[int]:
    """Which images of a split are kept in the page: at most half of them misread, the most confident first,
    then others, as many of each class as there is room for.

    Args:
        probabilities: (N, num_classes).
        labels: (N,) int64.
        image_shape: (C, H, W).

    Returns:
        Indices, at most ``MOST_SAMPLES``.
    """
    most = min(MOST_SAMPLES, SAMPLE_BYTES // math.prod(image_shape), len(labels))
    confidences, answers = probabilities.max(dim=1)
    wrong = (answers != labels).nonzero().squeeze(1)
    worst = wrong[confidences[wrong].argsort(descending=True, stable=True)][: most // 2].tolist()
    right = (answers == labels).nonzero().squeeze(1).tolist()
    by_class: dict[int, list[int]] = {}
    for index in right:
        by_class.setdefault(int(labels[index]), []).append(index)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(by_class[k] for k in sorted(by_class))))
    others = [index for index in turns if index is not None]
    return worst + others[: most - len(worst)]


def make_page(
    classifier: DigitClassifier,
    *,
    title: str,
    about: str,
    samples: tuple[Tensor, Tensor, Tensor],
    handwriting: bool,
    film: Mapping[str, Any] | None = None,
    live: float | None = None,
) -> bytes:
    """The page.

    Args:
        title: of the page.
        about: a line below it.
        samples: images to try, (N, H, W) uint8, their labels and the net's answers, (N,) int64.
        handwriting: whether drawings are made like MNIST's images; else the whole field is shrunk.
        film: see ``callbacks.film.pack``; None: the page has none.
        live: when a page was written that is written anew while its net learns, in seconds since 1970, and 0
            in its last edition; None: it is not.

    Raises:
        NotDrawable: the page can't run the net.
    """
    images, labels, answers = samples
    data = {
        "about": about,
        "classes": classifier.class_names,
        "shape": list(classifier.image_shape[1:]),
        "deskew": classifier.preprocess.deskew,
        "handwriting": handwriting,
        "temperature": classifier.temperature,
        "sure": classifier.sure,
        "likeness": _pack_likeness(classifier),
        "layers": [_pack_layer(layer) for layer in read_layers(classifier)],
        "samples": {
            "images": base64.b64encode(squeeze(images.cpu().numpy())).decode(),
            "labels": labels.tolist(),
            "answers": answers.tolist(),
        },
        "film": film,
        "live": live,
    }
    return assemble("page", SCRIPTS, title=title, data=data)


def _pack_layer(layer: Layer) -> dict[str, Any]:
    norm = layer.norm and {
        **{"gains": encode(layer.norm[0]), "shifts": encode(layer.norm[1]), "eps": layer.norm[2]}
    }
    return {
        "outputs": layer.weights.shape[0],
        "inputs": layer.weights.shape[1],
        "weights": encode(layer.weights),
        "scales": encode(layer.scales),
        "biases": encode(layer.biases),
        "norm": norm,
        "activation": layer.activation,
    }


def _pack_likeness(classifier: DigitClassifier) -> dict[str, Any] | None:
    """Rows of each class: its mean, then its directions."""
    likeness = classifier.likeness
    if not isinstance(likeness, Likeness):
        return None
    rows, scales = quantise(torch.cat([likeness.means[:, None], likeness.directions], dim=1).flatten(0, 1))
    preprocess = classifier.preprocess
    return {
        **{"scales": likeness.scales, "doubt": likeness.doubt, "limit": likeness.limit},
        **{"nothing": likeness.nothing.capitalize(), "pool": POOL, "units": UNITS},
        **{"features": rows.shape[1], "rows": encode(rows), "steps": encode(scales)},
        "mean": preprocess.mean.item() / 255,  # of the pixels, which are the last hidden layer of a net
        "std": preprocess.std.item() / 255,  # that has none
    }


def squeeze(array: NDArray[np.uint8]) -> bytes:
    """An array's bytes; of zeros one, and then how many they are, at most 255."""
    squeezed = bytearray()
    for value, run in itertools.groupby(array.tobytes()):
        count = sum(1 for _ in run)
        for start in range(0, count, 255):
            part = min(255, count - start)
            squeezed += bytes([value]) * part if value else bytes([0, part])
    return bytes(squeezed)
