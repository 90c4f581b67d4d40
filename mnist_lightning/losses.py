"""Define the losses that training minimises."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

TRIAL_NORM = 0.01  # norm of the random change from which VirtualAdversarial finds its direction


class CrossEntropy(nn.Module):
    """Compute the mean cross-entropy between logits and labels.

    Args:
        label_smoothing: the share of each label that is spread over all classes, in [0, 1) (Szegedy et al.
            2016, arXiv 1512.00567, section 7).  It acts in training mode only, so that validation losses of
            different settings can be compared.
    """

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if type(self) is CrossEntropy:
            self.recipe = {
                "_target_": "mnist_lightning.losses.CrossEntropy",
                "label_smoothing": label_smoothing,
            }
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of a batch.  (B, num_classes) float, (B,) int64 -> () float"""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"


class VirtualAdversarial(CrossEntropy):
    """Compute the mean cross-entropy, to which training adds how far a small change moves the net's answers.

    The change is the one, of all that are as small, that moves the answer for an image most: the direction
    comes from one step of power iteration.  It needs no label, and it knows nothing of where a pixel lies.
    The measure is the Kullback-Leibler divergence between the answers without and with the change (Miyato et
    al. 2016, arXiv 1507.00677, sections 3.1 and 3.2).  A training step takes some three times as long.

    Args:
        epsilon: the Euclidean norm of the change of an image's normalised pixels, > 0.  The authors' 2.1 for
            pixels in [0, 1] is 6.8 for MNIST's, whose standard deviation is 0.31.
        weight: the factor of the divergence, > 0.
        label_smoothing: see ``CrossEntropy``.
    """

    def __init__(self, *, epsilon: float = 6.8, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        self.epsilon = epsilon
        self.weight = weight

    def penalize_net(self, net: nn.Module, images: Tensor, outputs: Tensor) -> Tensor:
        """Compute what is added to the loss of a training batch.

        Args:
            net: in training mode.  Its noise and dropout rest here; its batch norm uses the batch's
                statistics, and does not add those of changed images to its running ones.
            images: (B, …) float, the net's input.
            outputs: (B, num_classes) float.  They are not used, because they contain the net's noise.

        Returns:
            () float.
        """

        def move(changes: Tensor) -> Tensor:
            moved = net(images + changes).log_softmax(dim=1)
            return F.kl_div(moved, answers, reduction="batchmean", log_target=True)

        with without_noise(net):
            with torch.no_grad():
                answers = net(images).log_softmax(dim=1)
            trial = (TRIAL_NORM * to_unit(torch.randn_like(images))).requires_grad_()
            (direction,) = torch.autograd.grad(move(trial), trial)
            return self.weight * move(self.epsilon * to_unit(direction))

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, weight={self.weight}, {super().extra_repr()}"


def to_unit(changes: Tensor) -> Tensor:
    """Scale the change of each image to the Euclidean norm 1.  (B, …) float -> the same"""
    norms: Tensor = changes.flatten(1).norm(dim=1).clamp_min(1e-12)
    return changes / norms.view(-1, *[1] * (changes.ndim - 1))


@contextmanager
def without_noise(net: nn.Module) -> Iterator[None]:
    """Use a net in training within the block, without its noise and its dropout.

    Batch norm uses the statistics of the batch, as in training, and leaves its running ones as they are.
    """
    training = [part for part in net.modules() if part.training]
    norms = [part for part in training if isinstance(part, _BatchNorm) and part.track_running_stats]
    net.eval()
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for part in training:
            part.training = True
