"""List the published data sets, with sizes and classes that are known before reading them."""

from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_letters, ascii_lowercase, digits
from typing import Any


@dataclass(frozen=True)
class Known:
    """A published data set.

    Attributes:
        folder: torchvision's folder for it, within ``data_dir``.
        class_names: name of each label.
        image_shape: (C, H, W).
        num_train: number of training images; None if it differs between releases.
        handwriting: whether its images were made like MNIST's, so that a user's pictures must be, too.
    """

    folder: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] = (1, 28, 28)
    num_train: int | None = None
    handwriting: bool = False


MERGED = "cijklmopsuvwxyz"  # letters whose small and large forms share a class in EMNIST's balanced split
KNOWN = {
    "mnist": Known("MNIST", tuple(digits), num_train=60_000, handwriting=True),
    "fashion_mnist": Known(
        "FashionMNIST",
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"),
            "Ankle boot",
        ),
        num_train=60_000,
    ),
    "kmnist": Known(
        "KMNIST",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        num_train=60_000,
        handwriting=True,
    ),
    "emnist_letters": Known("EMNIST", tuple(ascii_lowercase), handwriting=True),
    "emnist_balanced": Known(
        "EMNIST", tuple(sorted({*digits, *ascii_letters} - {*MERGED})), handwriting=True
    ),
    "cifar10": Known(
        "cifar-10-batches-py",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        image_shape=(3, 32, 32),
        num_train=50_000,
    ),
}


def draws_like_mnist(settings: Mapping[str, Any]) -> bool:
    """Whether a net's images were made like MNIST's, so that pictures for it must be, too.

    Args:
        settings: the arguments of the net's ``MNISTDataModule``.
    """
    known = KNOWN.get(str(settings.get("name"))) if settings.get("source") is None else None
    return known is not None and known.handwriting


OF_A_PATH = ("folder", "npz")  # data sets that are read from ``data.path``


def check_sizes(
    num_images: int,
    *,
    batch_size: int,
    val_size: int | None,
    num_folds: int | None = None,
    train_size: int | None = None,
) -> int:
    """Check that the sizes of the splits fit the number of images and the size of a batch.

    Args:
        num_images: number of training images, including those for validation.
        batch_size: number of images in a batch.
        val_size: number of validation images; None: a tenth; ignored if there are folds.
        num_folds: number of folds, one of which is for validation; None: no folds.
        train_size: number of the remaining images to train on; None: all.

    Returns:
        The number of validation images; if folds differ by one image, the larger number.

    Raises:
        ValueError: a size is too large.
    """
    if num_folds is not None:
        if not 2 <= num_folds <= num_images:
            raise ValueError(
                f"data.num_folds must be in [2, {num_images}], or null for none, got {num_folds}"
            )
        chosen, cause = -(-num_images // num_folds), f"data.num_folds={num_folds}"
    else:
        chosen = num_images // 10 if val_size is None else val_size
        cause = f"data.val_size={chosen}"
        if not 0 <= chosen < num_images:
            raise ValueError(f"data.val_size must be in [0, {num_images - 1}], got {chosen}")
    left = num_images - chosen
    if train_size is not None:
        if not 1 <= train_size <= left:
            raise ValueError(
                f"data.train_size must be in [1, {left}], which {cause} leaves, or null for all of them, got"
                f" {train_size}"
            )
        left, cause = train_size, f"data.train_size={train_size}"
    if batch_size > left:
        raise ValueError(
            f"data.batch_size must be at most the {left} training images that {cause} leaves,"
            f" got {batch_size}"
        )
    return chosen
