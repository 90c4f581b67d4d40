"""Define the loss that training minimises."""

from torch import Tensor, nn
from torch.nn import functional as F


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
