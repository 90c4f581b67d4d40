"""Write a trained net as one HTML file with its weights, images to try, scripts and styles."""

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
LEVELS = 127  # largest absolute value of a weight of 8 bits
SAMPLE_BYTES = 100_000  # most bytes of the images to try
MOST_SAMPLES = 100
NAME_OF = {kind: name for name, kind in ACTIVATIONS.items()}

Floats = NDArray[np.float32]


class NotDrawable(ValueError):
    """The page can't compute this net; the message says why."""


@dataclass
class Layer:
    """A linear layer with its norm and activation, as the page stores them.

    Attributes:
        weights: (outputs, inputs) int8; multiplied by ``scales``, they are the weights.
        scales: (outputs,) float32.
        biases: (outputs,) float32.
        norm: gains and shifts of a layer norm, (outputs,) float32 each, and its epsilon; None: no layer norm.
        activation: a key of ``ACTIVATIONS``, or "none".
    """

    weights: NDArray[np.int8]
    scales: Floats
    biases: Floats
    norm: tuple[Floats, Floats, float] | None
    activation: str


def read_layers(classifier: DigitClassifier) -> list[Layer]:
    """Read the layers of a net, with normalisation of the pixels and batch norms folded into the weights.

    The first layer takes pixels in [0, 1].

    Raises:
        NotDrawable: the net is no ``FeedForward`` for grey images with a logit for each class.
    """
    net, shape = classifier.net, classifier.image_shape
    if type(net) is not FeedForward:
        kind = type(net)
        raise NotDrawable(f"the page needs a FeedForward net, and this is {kind.__module__}.{kind.__name__}")
    if shape[0] != 1:
        raise NotDrawable("the page needs a net for grey images, and this net is for coloured ones")
    if not classifier.names_classes:
        raise NotDrawable("the page needs a classifier, and this net gives a number (a regression)")
    found: list[Layer] = []
    for linear, *others in _group(copy.deepcopy(net.layers).cpu()):  # Apple's GPUs have no float64
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
    """Round rows to 8 bits for each number.  (N, F) float -> (N, F) int8, and a factor for each row, (N,)"""
    scales = (rows.abs().amax(dim=1) / LEVELS).clamp(min=1e-30)
    return (rows / scales[:, None]).round().to(torch.int8).cpu().numpy(), _to_array(scales)


def _group(layers: nn.Sequential) -> list[list[Any]]:
    """Group each linear layer with the norm and activation that follow it."""
    groups: list[list[Any]] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            groups.append([layer])
        elif groups and isinstance(layer, (nn.BatchNorm1d, nn.LayerNorm, *ACTIVATIONS.values())):
            groups[-1].append(layer)  # others, dropout and noise, do nothing in a trained net
    return groups


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _to_array(tensor: Tensor) -> Floats:
    return tensor.detach().float().cpu().numpy()


def run_layers(layers: Sequence[Layer], pixels: Floats) -> Floats:
    """Compute logits as the page does, in float32.  (N, H * W) in [0, 1] -> (N, num_classes) float32"""
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
    """Compare the answers of the page's layers with those of the net.

    Args:
        layers: the page's layers.
        classifier: the net.
        images: (N, H, W) uint8.

    Returns:
        The number of images with the same answer, and the largest difference of a probability.
    """
    same, difference = 0, 0.0
    with torch.inference_mode():
        for part in torch.split(images, 500):
            seen = classifier.preprocess.to_pixels(part)
            own = classifier.net((seen - classifier.preprocess.mean) / classifier.preprocess.std)
            page = torch.from_numpy(run_layers(layers, (seen / 255).flatten(1).numpy()))
            same += int((own.argmax(dim=1) == page.argmax(dim=1)).sum())
            distance = (classifier.to_probabilities(own) - classifier.to_probabilities(page)).abs().max()
            difference = max(difference, float(distance))
    return same, difference


def choose_samples(probabilities: Tensor, labels: Tensor, image_shape: Sequence[int]) -> list[int]:
    """Choose the images of a split that the page offers.

    First come misread ones, the most confident first, as at most half of all; then others, with the same
    number of each class if possible.

    Args:
        probabilities: (N, num_classes).
        labels: (N,) int64.
        image_shape: (C, H, W).

    Returns:
        Indices of at most ``MOST_SAMPLES`` images.
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
    """Return the content of the page.

    Args:
        classifier: the net.
        title: the page's title.
        about: a line below the title.
        samples: images to try, (N, H, W) uint8, their labels and the net's answers, (N,) int64 each.
        handwriting: whether to prepare drawings like MNIST's images; otherwise the whole field is resized.
        film: what ``rundir.film.pack_film`` returned; None: the page has no film.
        live: for a page that is rewritten while its net learns, the time of writing in seconds since 1970, or
            0 in its last version; None for other pages.

    Raises:
        NotDrawable: the page can't compute the net.
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
    """Pack a classifier's likeness: for each class its mean, then its directions; None without likeness."""
    likeness = classifier.likeness
    if not isinstance(likeness, Likeness):
        return None
    rows, scales = quantise(torch.cat([likeness.means[:, None], likeness.directions], dim=1).flatten(0, 1))
    preprocess = classifier.preprocess
    return {
        **{"scales": likeness.scales, "doubt": likeness.doubt, "limit": likeness.limit},
        **{"nothing": likeness.nothing.capitalize(), "pool": POOL, "units": UNITS},
        **{"features": rows.shape[1], "rows": encode(rows), "steps": encode(scales)},
        "mean": preprocess.mean.item() / 255,  # a net without hidden layers uses normalised pixels in
        "std": preprocess.std.item() / 255,  # place of the last hidden layer
    }


def squeeze(array: NDArray[np.uint8]) -> bytes:
    """Compress an array's bytes: each run of at most 255 zeros becomes a zero and the run's length."""
    squeezed = bytearray()
    for value, run in itertools.groupby(array.tobytes()):
        count = sum(1 for _ in run)
        for start in range(0, count, 255):
            part = min(255, count - start)
            squeezed += bytes([value]) * part if value else bytes([0, part])
    return bytes(squeezed)
