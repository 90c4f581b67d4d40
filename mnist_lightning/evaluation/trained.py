"""Load a trained net and its data from a checkpoint, and compute its outputs."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_lightning import threads, workarounds
from mnist_lightning.classifier import DigitClassifier, rebuild
from mnist_lightning.data import Images, MNISTDataModule, eval_batch_size
from mnist_lightning.evaluation import confidence
from mnist_lightning.images.arrays import DataError
from mnist_lightning.images.known import OF_A_PATH
from mnist_lightning.rundir.checkpoint import find_fault, find_newest, load
from mnist_lightning.rundir.outside import as_text, as_word
from mnist_lightning.targets import PARTS, TargetError, make, strange_modules
from mnist_lightning.trust import check_recipe, read_trust

OPERATIONS = 10_000  # most operations of torch to try a net; a recurrent one takes some for each row
OPERATIONS_OF_A_WEIGHT = 1_000  # as many more for each tensor of weights
BUILDING = 10  # an operation that makes a weight counts as so many; each weight takes some tens of them
LARGEST = 2**30  # most bytes of a tensor
MOST_PIXELS = 2**26  # most values of an image
MOST_CLASSES = 10_000
MOST_VALUES = 10_000  # most values in the settings of a net, a loss and metrics


def load_classifier(path: Path, *, trust: Any = None) -> tuple[DigitClassifier, dict[str, Any]]:
    """Rebuild the classifier of a checkpoint from the checkpoint alone.

    Args:
        path: the checkpoint file.
        trust: the user's modules that the checkpoint may name, see ``trust.read_trust``.

    Returns:
        The classifier, in eval mode and for inference only, and the contents of the file.

    Raises:
        OSError: the file can't be read, describes another net than it holds, or needs too much memory.
        TrustError: the checkpoint names code that is not trusted.
    """
    try:
        checkpoint = load(path)
    except OSError as error:
        try:
            other, _ = find_newest(path.parent, told=False)
        except OSError:
            raise error from None
        raise OSError(
            f"{error}; a valid checkpoint of the run is checkpoint={as_word(str(other))}"
        ) from error
    recipe = checkpoint["hyper_parameters"]
    if recipe.get("model") is None:
        raise OSError(f"{path} does not tell how its net was made")
    if missing := [
        name for name in (*PARTS, "preprocess", "image_shape", "class_names") if name not in recipe
    ]:
        raise OSError(f"{path} does not tell how its net was made: it has no {missing[0]}")
    check_sizes(recipe, path)
    check_recipe({group: recipe[group] for group in PARTS}, path, read_trust(trust))
    recipe["class_names"] = [as_text(name) for name in recipe["class_names"]]
    ours = not strange_modules({group: recipe[group] for group in PARTS})
    bounds = Bounded(checkpoint)
    try:
        with bounds if ours else nullcontext():
            classifier = rebuild(recipe, checkpoint["state_dict"]).eval()
        with (
            Bounded(checkpoint) if ours else nullcontext()
        ):  # another: the first one tells what the net takes
            confidence.apply(classifier, checkpoint)
    except TargetError as error:
        raise OSError(f"{path}: {error}") from error
    except Exception as error:  # a class with unexpected arguments may raise anything
        cause = as_text(" ".join(f"{error}".split()) or type(error).__name__)
        raise OSError(f"{path} holds no net that can be rebuilt: {cause[:400]}") from error
    bounds.check_batch(eval_batch_size(classifier.image_shape), path)
    return classifier, checkpoint


def check_net(model: Mapping[str, Any], path: Path, checkpoint: Mapping[str, Any], **sizes: Any) -> None:
    """Whether the net that a run's settings describe is the one whose weights its checkpoint holds; before
    memory is taken for it.

    Args:
        model: the settings, which may be a stranger's.
        path: of the checkpoint.
        sizes: see ``targets.make``.

    Raises:
        OSError: it is not.
        TargetError: it can't be built.
    """
    if strange_modules({"model": model}):
        return
    with Bounded(checkpoint), torch.device("meta"):
        net = make(model, "model", **sizes)
    described = {f"net.{name}": one.shape for name, one in net.state_dict().items()}
    held = {name: one.shape for name, one in checkpoint["state_dict"].items() if name.startswith("net.")}
    if described != held:
        raise OSError(
            f"{path} can't be resumed: it holds the weights of another net than its settings describe"
        )


DispatchMode, tree_leaves, tree_map_only = workarounds.operation_tools()


class Bounded(DispatchMode):  # type: ignore[misc, valid-type]
    """Limit the number of torch's operations within the block, and each tensor to ``LARGEST`` bytes.

    A hostile checkpoint may describe a net that no machine can hold, or that takes for ever to build.  Sizes
    are computed on tensors without content, before memory is allocated.

    Args:
        most: largest number of operations.

    Args:
        checkpoint: that holds the net's weights.

    Attributes:
        left: number of operations that are left.
        largest: bytes of the largest tensor so far.

    Raises:
        MemoryError: the block exceeds a limit.
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        super().__init__()
        self.left = OPERATIONS + OPERATIONS_OF_A_WEIGHT * len(checkpoint["state_dict"])
        self.largest = 0

    def check_batch(self, size: int, path: Path) -> None:
        """Whether there is memory for a batch, once the net was tried on two images.

        Args:
            path: the net's file.

        Raises:
            OSError: there is not.
        """
        wanted = self.largest // 2 * size
        if wanted > threads.free_memory():
            raise OSError(
                f"{path} is refused: its net takes {wanted / 1e9:.1f} GB for {size} images, more than the"
                " memory that is free"
            )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        is_building = any(one.is_meta for one in given) or kwargs.get("device") == torch.device("meta")
        self.left -= BUILDING if is_building else 1
        if self.left < 0:
            raise MemoryError("it describes a far larger net than it holds")
        if not is_building:
            self.look_ahead(func, args, kwargs, most=max([LARGEST, *(one.nbytes for one in given)]))
        return func(*args, **kwargs)

    def look_ahead(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], *, most: int) -> None:
        """Compute the size of an operation's results without running it.

        Args:
            func, args, kwargs: the operation and its arguments.
            most: most bytes of a result; the caller allows as many as an argument has.

        Raises:
            MemoryError: a result is larger.
        """
        if getattr(func, "is_view", False):  # of what is there: a weight, transposed
            return
        where = {"device": "meta"} if "device" in kwargs else {}
        try:
            empty = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs | where))
            results = tree_leaves(func(*empty[0], **empty[1]))
        except RuntimeError:  # the result depends on the content, or the operation fails anyway
            return
        size = max((one.nbytes for one in results if isinstance(one, Tensor)), default=0)
        if size > most:
            raise MemoryError("it describes a net that asks for too large a tensor")
        self.largest = max(self.largest, size)


def check_sizes(recipe: Mapping[str, Any], path: Path) -> None:
    """Check the image shape, the class names and the number of settings in a checkpoint.

    Raises:
        OSError: no data set of this project has such images or classes, or there are too many settings.
    """
    shape, names = recipe["image_shape"], recipe["class_names"]
    if find_fault({part: recipe[part] for part in (*PARTS, "preprocess")}, MOST_VALUES):
        raise OSError(f"{path} is refused: its net has too many settings")
    check_numbers(recipe["metrics"], path)
    numbers = isinstance(shape, list) and all(type(size) is int and size >= 1 for size in shape)
    if not numbers or len(shape) != 3 or math.prod(shape) > MOST_PIXELS:
        raise OSError(f"{path} is refused: its image_shape is no (C, H, W)")
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or not 2 <= len(names) <= MOST_CLASSES:
        raise OSError(f"{path} is refused: its class_names are no list of names")


def check_numbers(metrics: Any, path: Path) -> None:
    """
    Args:
        metrics: settings of metrics, which may be a stranger's.

    Raises:
        OSError: a known one is to have a number of parts, or of copies, that no machine can hold.
    """
    if not isinstance(metrics, Mapping) or strange_modules({"metrics": metrics}):
        return
    left: list[Any] = [metrics]
    while left:
        value = left.pop()
        if isinstance(value, int) and value > MOST_CLASSES:
            raise OSError(f"{path} is refused: a metric of {value:,} parts is more than {MOST_CLASSES:,}")
        left += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else []


def load_data(
    path: Path, checkpoint: dict[str, Any], *, data_dir: str | None, trust: Any = None
) -> MNISTDataModule:
    """Load the data of a checkpoint's run, in the run's splits.

    Args:
        path: the checkpoint file, for messages.
        checkpoint: its contents.
        data_dir: folder or npz file with the data; a missing folder is created and filled.  None: the path
            from which the run read the data.  It comes from a file that may be a stranger's, so it is only
            read, never written.
        trust: see ``load_classifier``.

    Raises:
        OSError: the checkpoint does not say which data it used, the data can't be read or downloaded, or it
            is not the data of the training.
        TrustError: the data needs code that is not trusted.
    """
    try:
        settings = dict(checkpoint["datamodule_hyper_parameters"])
        source = settings.get("source")
        place = "path" if source is None and settings["name"] in OF_A_PATH else "data_dir"
        if source is not None:
            check_recipe({"data": {"source": source}}, path, read_trust(trust))
        if data_dir is not None:
            settings[place] = data_dir
        datamodule = MNISTDataModule(**settings)
        if data_dir is not None:
            datamodule.prepare_data()
        elif not datamodule.source.is_whole():
            raise OSError(
                f"{path} was trained on data in {settings[place]}, which is missing or incomplete:"
                f" give its place, or a folder to put it in, by data_dir=…"
            )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        cause = as_text(str(error))
        raise OSError(f"{path} does not tell which data its net was trained on: {cause}") from error
    try:
        datamodule.setup("fit")
        datamodule.check_fingerprint(checkpoint.get(type(datamodule).__qualname__) or {})
    except DataError as error:
        raise OSError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:  # settings of wrong types
        cause = as_text(str(error))
        raise OSError(f"{path} does not tell which data its net was trained on: {cause}") from error
    return datamodule


def load_split(
    path: Path, checkpoint: dict[str, Any], split: str, *, data_dir: str | None, trust: Any = None
) -> Images:
    """Load the images of one split of a checkpoint's run; see ``load_data`` and ``find_split``."""
    return find_split(load_data(path, checkpoint, data_dir=data_dir, trust=trust), split)


def find_split(datamodule: MNISTDataModule, split: str) -> Images:
    """Return the images of a split, after checking that there are some.

    Args:
        datamodule: set up.
        split: "train", "val" or "test".

    Raises:
        OSError: the run had no such split.
    """
    images = datamodule.splits[split]
    if not len(images):
        raise OSError(f"split={split}: the run had no such split of {datamodule.name} (data.val_size=0)")
    return images


def check_same_images(paths: Sequence[Path], splits: Sequence[Images], name: str) -> None:
    """Check that all runs have the same images in the split of this name.

    Args:
        paths: the checkpoints, for messages.
        splits: the split of each run.
        name: "train", "val" or "test".

    Raises:
        OSError: two runs have different images.
    """
    first = splits[0]
    for path, other in zip(paths, splits, strict=True):
        same = len(other) == len(first) and torch.equal(other.images, first.images)
        if not (same and torch.equal(other.labels, first.labels)):
            raise OSError(
                f"{paths[0]} and {path} have different {name} images"
                " (data.name, data.val_size, data.split_seed), so they can't be compared on them"
                + ("; split=test may work" if name == "val" else "")
            )


def choose_threads(classifiers: Sequence[DigitClassifier], num_images: int, wanted: int | None) -> int:
    """Choose the number of threads for ``compute_outputs`` of these nets; ``wanted`` is the user's."""
    flops = [
        threads.count_flops(one.net, one.image_shape, min(num_images, eval_batch_size(one.image_shape)))
        for one in classifiers
    ]
    return threads.choose(max(flops), wanted=wanted)


def choose_device(name: str) -> torch.device:
    """Find a device by its name.

    Args:
        name: torch's name, or "auto": CUDA if there is one, else the CPU, as in training.

    Raises:
        OSError: torch can't use this device here.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # each type of device raises another exception
        cause = as_text(f"{error}".partition("\n")[0])
        raise OSError(f"device={name} can't be used here: {cause}") from error
    return device


def describe_device(device: torch.device) -> str:
    """Describe a device with what decides its rounding: the GPU's name or the CPU's instructions."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def compute_outputs(classifier: DigitClassifier, images: Tensor, *, variant: int | None = None) -> Tensor:
    """Compute the net's outputs for each image.

    (N, H, W) or (N, H, W, C) uint8 or float, in [0, 255] -> (N, num_outputs) float

    Args:
        classifier: the net, in eval mode.
        images: the images as the data set stores them.
        variant: a number that selects a deformation for each image; None: no deformation.
    """
    outputs = []
    with torch.inference_mode():
        for number, batch in enumerate(torch.split(images, eval_batch_size(classifier.image_shape))):
            key = None if variant is None else (number, variant)
            outputs.append(classifier(batch.to(classifier.device), key).cpu())
    return torch.cat(outputs)


def log_probabilities(classifier: DigitClassifier, images: Tensor, *, tta: int = 0) -> Tensor:
    """Compute log-probabilities for each image.

    (N, H, W) or (N, H, W, C) uint8 or float, in [0, 255] -> (N, num_classes) float

    Args:
        classifier: a classifier (``names_classes``), in eval mode.
        images: the images as the data set stores them.
        tta: number of deformations of each image whose probabilities are averaged; 0: no deformation.
    """
    return average(
        [
            F.log_softmax(compute_outputs(classifier, images, variant=variant), dim=1)
            for variant in (range(tta) if tta else [None])
        ]
    )


def measure(classifier: DigitClassifier, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute the run's own loss and metrics on a whole split.

    Args:
        classifier: has the loss and the metrics.
        outputs: the net's outputs, (N, num_outputs) float.
        labels: (N,) int64.

    Returns:
        Values by name; the loss is "loss".
    """
    with torch.inference_mode():
        size = eval_batch_size(classifier.image_shape)
        parts = torch.split(outputs, size), torch.split(labels, size)
        classifier.test_metrics.reset()
        for batch, its_labels in zip(*parts, strict=True):
            classifier.measure("test", batch.to(classifier.device), its_labels.to(classifier.device))
        values = classifier.test_metrics.compute()
    return {name.removeprefix("test/"): value.item() for name, value in values.items()}


def average(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Average probabilities, given and returned as logarithms.  K times (N, C) -> (N, C)"""
    return torch.logsumexp(torch.stack(list(log_probabilities)), dim=0) - math.log(len(log_probabilities))
