"""Write a net as an ONNX file or a page:  python -m mnist_lightning.export [format=html] [key=value …]"""

import io
import logging
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from mnist_lightning import threads
from mnist_lightning.cli import CommandError, begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Export, check
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.find import find_checkpoint
from mnist_lightning.rundir.output import check_file
from mnist_lightning.rundir.outside import expand_home

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from mnist_lightning.classifier import DigitClassifier

log = logging.getLogger(__name__)

NUM_CHECKED = 1_000  # number of test images on which both nets are compared
TOLERANCE = 1e-4  # largest difference of a probability; another order of float32 sums gives about 1e-6


def main() -> None:
    begin()
    sys.argv[1:] = quote_paths(["run", "checkpoint", "data_dir", "output"], sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="export")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        settings = check(cfg, Export)
        export_page(settings) if settings.format == "html" else export_onnx(settings)


def find_target(settings: Export, checkpoint: Path, name: str) -> Path:
    """Choose the file to write: the user's, one in the run's folder, or one beside a checkpoint file.

    Args:
        settings: the command's settings.
        checkpoint: the checkpoint that is exported.
        name: file name in a run's folder; its suffix is the kind of file.

    Raises:
        CommandError: the user's file is a folder or another kind of file.
    """
    kind = Path(name).suffix
    if settings.output is not None:
        target = expand_home(settings.output)
    elif settings.checkpoint is not None or expand_home(settings.run).is_file():
        target = checkpoint.with_suffix(kind)
    else:
        target = checkpoint.parent.parent / name
    if settings.output is not None:
        check_file(target, name)
    return target


def export_page(settings: Export) -> None:
    """Write the net as a page to draw on, one file that needs no server and no network.

    Raises:
        CommandError: the page can't compute this kind of net, or the run has no film.
        OSError: the checkpoint, the data or the film can't be read, or the page can't be written.
    """
    path = find_checkpoint(settings.run, settings.checkpoint)
    target = find_target(settings, path, "page.html")
    log.info("loading torch and Lightning …")
    import torch

    from mnist_lightning.evaluation.trained import (
        choose_threads,
        compute_outputs,
        load_classifier,
        load_split,
    )
    from mnist_lightning.images.known import draws_like_mnist
    from mnist_lightning.page.build import NotDrawable, choose_samples, compare_layers, make_page, read_layers
    from mnist_lightning.rundir.film import pack_film, read_film

    classifier, checkpoint = load_classifier(path, trust=settings.trust)
    try:
        layers = read_layers(classifier)
    except NotDrawable as error:
        raise CommandError(f"{path}: {error}; format=onnx takes any net") from error
    data = checkpoint["datamodule_hyper_parameters"]
    film = read_film(path.parent.parent) if settings.film else None
    kept = "val" if data.get("val_size") != 0 else "train"
    split, checked = (
        load_split(path, checkpoint, name, data_dir=settings.data_dir, trust=settings.trust)
        for name in (kept, "test")
    )
    images = checked.images[:NUM_CHECKED]
    with threads.use(choose_threads([classifier], len(split), settings.threads)):
        probabilities = classifier.to_probabilities(compute_outputs(classifier, split.images))
        chosen = choose_samples(probabilities, split.labels, classifier.image_shape)
        same, difference = compare_layers(layers, classifier, images)
    correct = float((probabilities.argmax(dim=1) == split.labels).double().mean())
    name = data["name"]
    shape = "-".join(str(layer.weights.shape[1]) for layer in layers) + f"-{len(classifier.class_names)}"
    split_name = "validation" if kept == "val" else "training"
    content = make_page(
        classifier,
        title=f"A net for {name}",
        about=f"{shape}: correct on {100 * correct:.2f} % of {len(split):,} {split_name} images of {name}",
        samples=(
            split.images[chosen],
            split.labels[chosen],
            probabilities[torch.tensor(chosen, dtype=torch.long)].argmax(dim=1),
        ),
        handwriting=draws_like_mnist(data),
        film=None if film is None else pack_film(film),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, content)
    print(f"checkpoint  {path}")
    print(f"written to  {target} ({len(content) / 1e3:,.0f} kB): open it in a browser")
    told = f"{same:,} of {len(images):,} test images get the same answer with weights of 8 bits"
    print(f"checked     {told}, largest difference of a probability {difference:.3f}")


def export_onnx(settings: Export) -> None:
    """Write the net as an ONNX file, after comparing its outputs with the PyTorch net's.

    Raises:
        CommandError: a package is missing, ONNX can't express the net, or the two nets differ.
        OSError: the checkpoint or the data can't be read, or the file can't be written.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise CommandError(f"export needs {', '.join(missing)}: pip install 'mnist_lightning[export]'")
    path = find_checkpoint(settings.run, settings.checkpoint)
    target = find_target(settings, path, "model.onnx")
    log.info("loading torch, Lightning and ONNX …")
    from mnist_lightning.evaluation.trained import choose_threads, load_classifier, load_split

    classifier, checkpoint = load_classifier(path, trust=settings.trust)
    split = load_split(path, checkpoint, "test", data_dir=settings.data_dir, trust=settings.trust)
    images = split.images[:NUM_CHECKED]
    content = to_onnx(classifier, images)
    with threads.use(choose_threads([classifier], len(images), settings.threads)):
        difference = compare(content, classifier, images)
    if not difference <= TOLERANCE:
        raise CommandError(f"the ONNX net differs from the PyTorch net by {difference:.1e}: not written")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, content)
    print(f"checkpoint  {path}")
    print(f"written to  {target} ({len(content) / 1e6:.1f} MB)")
    sizes = ", ".join(map(str, images.shape[1:]))
    print(f"input       images: uint8 (N, {sizes}), in [0, 255], as the data set stores them")
    print(f"output      {name_output(classifier)}: float32 (N, {classifier.num_outputs})")
    print(f"checked     {len(images):,} test images, largest difference to PyTorch {difference:.1e}")


def name_output(classifier: "DigitClassifier") -> str:
    return "probabilities" if classifier.names_classes else "outputs"


def to_onnx(classifier: "DigitClassifier", images: "Tensor") -> bytes:
    """Convert the net to the content of an ONNX file, which maps stored images to probabilities.

    A regression gives its outputs instead.

    Args:
        classifier: the trained net.
        images: (N, H, W) or (N, H, W, C) uint8, N >= 2; the file will take images of this shape, for any N.

    Raises:
        CommandError: ONNX can't express the net.
    """
    import torch

    from mnist_lightning.classifier import Probabilities

    last = [Probabilities(classifier.temperature)] if classifier.names_classes else []
    net = torch.nn.Sequential(classifier.preprocess, classifier.net, *last).eval()
    try:
        with _quiet():
            program = torch.onnx.export(
                net,
                (torch.zeros_like(images[:2]),),
                input_names=["images"],
                output_names=[name_output(classifier)],
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch.onnx and torch.export raise many kinds, with pages of advice
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise CommandError(f"ONNX can't express this net: {type(error).__name__}: {cause}") from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def compare(content: bytes, classifier: "DigitClassifier", images: "Tensor") -> float:
    """Return the largest difference between outputs of the ONNX net and of the PyTorch net."""
    import numpy as np
    import onnxruntime

    from mnist_lightning.evaluation.trained import compute_outputs

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (theirs,) = session.run([name_output(classifier)], {"images": images.numpy()})
    ours = compute_outputs(classifier, images)
    ours = classifier.to_probabilities(ours) if classifier.names_classes else ours
    return float(np.abs(theirs - ours.numpy()).max())


@contextmanager
def _quiet() -> "Iterator[None]":
    """Silence progress and deprecation messages of torch.onnx and onnxscript, but not their errors."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


if __name__ == "__main__":
    main()
