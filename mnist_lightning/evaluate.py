"""Measure a trained net and find its mistakes:  python -m mnist_lightning.evaluate [key=value …]"""

import csv
import io
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from mnist_lightning import threads
from mnist_lightning.cli import begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Evaluate, check
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.find import find_checkpoint
from mnist_lightning.rundir.output import claim_output
from mnist_lightning.rundir.outside import as_cell, as_text, check_inside, expand_home
from mnist_lightning.rundir.status import show_with_unit
from mnist_lightning.sweeps.results import FOLD, Sweep, find_sweep, read_sweep

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from mnist_lightning.evaluation.scores import Evaluation

log = logging.getLogger(__name__)

NUM_MISTAKES = 40  # on the sheet of mistakes
NUM_LABELS = 12  # doubtful labels in the terminal
NUM_ASKED = 10_000  # number of images for which the number of threads is chosen
FILES = (
    *("metrics.json", "predictions.csv", "confusion_matrix.png", "reliability.png", "mistakes.png"),
    *("labels.csv", "labels.png"),
)


def main() -> None:
    begin()
    sys.argv[1:] = quote_paths(["run", "runs", "checkpoint", "folds", "data_dir", "output"], sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="evaluate")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        evaluate(check(cfg, Evaluate))


def evaluate(settings: Evaluate) -> None:
    """Score the net on a split; print the scores; write scores, predictions and figures.

    Raises:
        OSError: the checkpoint or the data can't be read, or the output can't be written.
    """
    sweep = read_folds(settings.folds) if settings.folds is not None else None
    if sweep is not None:
        paths = [find_checkpoint(str(job.folder)) for job in sweep.settings[0].jobs]
    elif settings.runs:
        paths = [find_checkpoint(name) for name in settings.runs]
    else:
        paths = [find_checkpoint(settings.run, settings.checkpoint)]
    log.info("loading torch and Lightning …")
    from mnist_lightning import figures
    from mnist_lightning.evaluation.folds import join_folds
    from mnist_lightning.evaluation.scores import score
    from mnist_lightning.evaluation.trained import (
        average,
        check_same_images,
        choose_device,
        choose_threads,
        compute_outputs,
        describe_device,
        load_classifier,
        load_split,
        log_probabilities,
        measure,
    )
    from mnist_lightning.targets import CROSS_ENTROPIES, name_of

    loaded = [load_classifier(path, trust=settings.trust) for path in paths]
    first = loaded[0][0]
    averaged = len(paths) > 1 or settings.tta > 0 or sweep is not None
    for path, (classifier, _) in zip(paths, loaded, strict=True):
        if averaged and not classifier.names_classes:
            raise OSError(f"{path}: runs, folds and tta need probabilities, and this net is a regression")
        if settings.tta and classifier.preprocess.deform is None:
            raise OSError(
                f"{path} was trained without deformations (data.augment), over which tta averages: use tta=0"
            )
    indices: Any = None  # positions of the evaluated images in the split; None: all
    missing: list[int] = []
    start = time.perf_counter()
    if sweep is None:
        splits = [
            load_split(path, checkpoint, settings.split, data_dir=settings.data_dir, trust=settings.trust)
            for path, (_, checkpoint) in zip(paths, loaded, strict=True)
        ]
        check_same_images(paths, splits, settings.split)
        split = splits[0]
    log_probs = []
    device = choose_device(settings.device)
    with threads.use(choose_threads([net for net, _ in loaded], NUM_ASKED, settings.threads)):
        for classifier, _ in loaded:
            classifier.to(device)
        if sweep is not None:
            judged = join_folds(
                paths, loaded, data_dir=settings.data_dir, trust=settings.trust, tta=settings.tta
            )
            split, outputs, missing = judged.images, judged.log_probs, judged.missing
            indices = judged.indices.numpy()
        elif not averaged:
            outputs = compute_outputs(first, split.images)
        for path, (classifier, _) in zip(paths, loaded, strict=True) if sweep is None else ():
            if averaged:
                log_probs.append(log_probabilities(classifier, split.images, tta=settings.tta))
            seconds = time.perf_counter() - start
            if seconds > 2:
                log.info("%s: %d of %d nets, %.1f s", path, len(log_probs), len(paths), seconds)
        if averaged and sweep is None:
            outputs = average(log_probs)
        own = measure(first, outputs, split.labels)  # log-probabilities can serve as logits
    classes = first.names_classes
    temperature = 1.0 if averaged else first.temperature  # an average of nets has no fitted temperature
    log_probs_of_all = outputs.log_softmax(dim=1).numpy()
    evaluation = score(split.labels.numpy(), log_probs_of_all, temperature) if classes else None
    seconds = time.perf_counter() - start

    name = str(loaded[0][1]["datamodule_hyper_parameters"]["name"])
    names = first.class_names
    own["loss"], loss_name = own.pop("loss"), name_of(first.loss)
    if evaluation and (averaged or loss_name.startswith(CROSS_ENTROPIES)):
        del own["loss"]  # an average of nets has none, and cross-entropy is among the scores
    if evaluation:
        own.pop("acc", None)
    folder = find_output(settings, paths[0])
    metrics: dict[str, Any] = {"checkpoints": [str(path.absolute()) for path in paths], "tta": settings.tta}
    metrics["device"] = describe_device(device)
    what = settings.split if sweep is None else "out-of-fold"
    metrics |= {"data": name, "split": what, "images": len(split)}
    if sweep is not None:
        metrics["missing_folds"] = missing
    if evaluation:
        metrics |= to_metrics(evaluation) | {"temperature": temperature}
    metrics["own"] = own | ({"loss_is": loss_name} if "loss" in own else {})
    more: dict[str, str] = {}
    if evaluation:
        table = format_predictions(evaluation, indices)
        pictures = draw(
            evaluation,
            split.images.numpy(),
            names,
            f"{name} {what}",
            0.0 if averaged else first.sure,
        )
        if settings.labels:
            doubtful = evaluation.doubtful()
            more["labels.csv"] = format_labels(evaluation, doubtful, indices, names)
            pictures["labels"] = draw_labels(
                evaluation, doubtful, split.images.numpy(), names, f"{name} {what}"
            )
    else:
        table, pictures = format_outputs(outputs[:, 0].numpy(), split.labels.numpy()), {}
    write_atomic(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    write_atomic(folder / "predictions.csv", table.encode())
    for file, content in more.items():
        write_atomic(folder / file, content.encode())
    written = [
        "metrics.json",
        "predictions.csv",
        *more,
        *(path.name for path in figures.save(pictures, folder)),
    ]

    for path in paths:
        print(f"{'checkpoint':13} {as_text(str(path))}")
    if sweep is not None:
        tell_folds(sweep, missing)
    if settings.tta:
        print(f"{'averaged over':13} {settings.tta} deformations of each image")
    print(f"{'images':13} {len(split):,} of {name} {what}, evaluated in {seconds:.2f} s\n")
    if evaluation:
        print(tabulate(evaluation, names))
        if settings.labels:
            print(f"\n{tabulate_labels(evaluation, doubtful, indices, names)}")
        if temperature != 1:
            fitted = " on these images: use split=test for the calibration on other images"
            told = fitted if settings.split == "val" else " on the validation images"
            print(f"\nprobabilities are at temperature {temperature:.2f}, fitted{told}")
        if own:
            print("\nthe run's own:")
    else:
        print("this net is a regression: its run's own loss and metrics are")
    for key, value in own.items():
        print(f"{key:13} {show_with_unit(key, value)}" + (f"   {loss_name}" if key == "loss" else ""))
    print(f"\nwritten to {folder}:")
    print("  " + "  ".join(written))
    if settings.show:
        figures.show(pictures.values())


def read_folds(name: str) -> Sweep:
    """Read the sweep over folds whose best setting is evaluated.

    Raises:
        OSError: there is no such sweep, or no job of it with a fold has finished.
    """
    sweep = read_sweep(find_sweep(name))
    if not sweep.settings or not any(FOLD in job.params for job in sweep.settings[0].jobs):
        raise FileNotFoundError(
            f"{sweep.folder} has no finished job with a fold; python -m mnist_lightning.train -m folds=5"
            " starts such a sweep"
        )
    return sweep


def tell_folds(sweep: Sweep, missing: Sequence[int]) -> None:
    if len(sweep.settings) > 1:
        told = " ".join(f"{key}={value}" for key, value in sweep.settings[0].params.items() if value)
        print(f"{'of':13} the best of {len(sweep.settings)} settings: {as_text(told)}")
    failed = [job for job in sweep.in_state("failed", "interrupted") if FOLD in job.params]
    for job in failed:
        print(
            f"{'left out':13} job {job.name}, fold {job.params[FOLD]}: {job.status.state}, {job.status.error}"
        )
    if missing:
        print(f"{'missing':13} fold {', '.join(map(str, missing))}: no net was evaluated on its images")


def format_outputs(outputs: "NDArray[np.float32]", labels: "NDArray[np.int64]") -> str:
    """Format a CSV table with a row for each image: its index in the split, label and the net's output.

    Args:
        outputs: (N,), the outputs of a regression.
        labels: (N,).
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["index", "label", "output"])
    for index, (label, output) in enumerate(zip(labels, outputs, strict=True)):
        writer.writerow([index, label, f"{output:.6f}"])
    return text.getvalue()


def find_output(settings: Evaluate, checkpoint: Path) -> Path:
    """Choose and create the folder to write to.

    It is the user's, one in the run's or the sweep's folder, one beside a checkpoint file, or, for several
    runs, one under ``logs/evaluate``.

    Raises:
        CommandError: files that this command has not written would be overwritten.
        OSError: the folder can't be created, or a link in it leads elsewhere.
    """
    if settings.output is not None:
        return claim_output(settings.output, "evaluate", FILES)
    if settings.folds is not None:
        home, split = find_sweep(settings.folds), "evaluation/out-of-fold"
    elif settings.runs:
        home, split = Path("logs/evaluate"), f"{time.strftime('%Y-%m-%d_%H-%M-%S')}/{settings.split}"
    elif settings.checkpoint is None and not expand_home(settings.run).is_file():
        split = f"{settings.split}-tta{settings.tta}" if settings.tta else settings.split
        home, split = checkpoint.parent.parent, f"evaluation/{split}"
    else:
        home, split = checkpoint.parent, f"{checkpoint.stem}-evaluation/{settings.split}"
    check_inside(home, [str(Path(split).parent), split])
    (home / split).mkdir(parents=True, exist_ok=True)
    return home / split


def to_metrics(evaluation: "Evaluation") -> dict[str, Any]:
    """Return the scores for ``metrics.json`` as plain numbers; None where a score is not defined."""
    per_class = {
        name: [None if math.isnan(value) else float(value) for value in getattr(evaluation.scores, name)]
        for name in ("precision", "recall", "f1")
    }
    return {
        "mistakes": int((evaluation.labels != evaluation.predictions).sum()),
        "acc": evaluation.accuracy,
        "acc_interval_95": list(evaluation.interval),
        "loss": evaluation.loss,
        "expected_calibration_error": evaluation.calibration.error,
        "calibration_bins": len(evaluation.calibration.counts),
        **per_class,
        "support": evaluation.scores.support.tolist(),
        "confusion_matrix": evaluation.confusion.tolist(),
    }


def format_predictions(evaluation: "Evaluation", indices: "NDArray[np.int64] | None" = None) -> str:
    """Format a CSV table with a row for each image: its index, label, prediction and its probability.

    Args:
        evaluation: of N images.
        indices: (N,), index of each image in the split; None: 0, 1, 2, …
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["index", "label", "prediction", "probability"])
    columns = (evaluation.labels, evaluation.predictions, evaluation.confidences)
    for position, (label, prediction, probability) in enumerate(zip(*columns, strict=True)):
        index = position if indices is None else indices[position]
        writer.writerow([index, label, prediction, f"{probability:.6f}"])
    return text.getvalue()


def format_labels(
    evaluation: "Evaluation", doubtful: "NDArray[np.int64]", indices: "NDArray[np.int64]", names: list[str]
) -> str:
    """Format a CSV table with a row for each label that the nets contradict, the least probable first.

    Args:
        evaluation: of N images.
        doubtful: (M,), positions in the evaluation, see ``Evaluation.doubtful``.
        indices: (N,), index of each image among all training images.
        names: name of each class.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["index", "label", "prediction", "probability_of_label", "probability"])
    confidences = evaluation.confidences
    for place in doubtful:
        label, prediction = evaluation.labels[place], evaluation.predictions[place]
        given, taken = evaluation.probabilities[place, label], confidences[place]
        cells = (as_cell(names[label]), as_cell(names[prediction]), f"{given:.3e}", f"{taken:.6f}")
        writer.writerow([indices[place], *cells])
    return text.getvalue()


def draw_labels(
    evaluation: "Evaluation",
    doubtful: "NDArray[np.int64]",
    images: "NDArray[np.uint8]",
    names: list[str],
    title: str,
) -> "Figure":
    from mnist_lightning import figures

    worst = doubtful[:NUM_MISTAKES]
    return figures.mistakes(
        images[worst],
        [names[label] for label in evaluation.labels[worst]],
        [names[label] for label in evaluation.predictions[worst]],
        evaluation.confidences[worst],
        title=f"{title}: the {len(worst)} least probable labels, of {len(doubtful):,} contradicted ones",
    )


def tabulate_labels(
    evaluation: "Evaluation",
    doubtful: "NDArray[np.int64]",
    indices: "NDArray[np.int64]",
    names: list[str],
) -> str:
    """Format the most doubtful labels as lines of text."""
    lines = ["the least probable of the contradicted labels; labels.csv has all of them:"]
    lines += ["  image  label  read as  probability of the label"]
    for place in doubtful[:NUM_LABELS]:
        label, prediction = evaluation.labels[place], evaluation.predictions[place]
        given = evaluation.probabilities[place, label]
        lines.append(f"{indices[place]:>7}  {names[label]:>5}  {names[prediction]:>7}  {given:.1e}")
    return "\n".join(lines)


def draw(
    evaluation: "Evaluation", images: "NDArray[np.uint8]", names: list[str], title: str, sure: float = 0.0
) -> "dict[str, Figure]":
    """Draw the figures of an evaluation, by file name.

    Args:
        evaluation: of N images.
        images: (N, H, W) or (N, H, W, 3).
        names: name of each class.
        title: the beginning of each title.
        sure: the least probability of an answer, see ``DigitClassifier``; 0 accepts every answer.
    """
    from mnist_lightning import figures

    total = len(evaluation.labels)
    wrong = int((evaluation.labels != evaluation.predictions).sum())
    worst = evaluation.worst(NUM_MISTAKES)
    calibration = evaluation.calibration
    coverage, risk = evaluation.risk_coverage()
    answered = float((evaluation.confidences >= sure).mean()) if sure else None
    return {
        "risk_coverage": figures.risk_coverage(coverage, risk, sure=answered, title=title),
        "confusion_matrix": figures.confusion_matrix(
            evaluation.confusion, names, title=f"{title}: {wrong:,} of {total:,} images misread"
        ),
        "reliability": figures.reliability_diagram(
            calibration.counts,
            calibration.confidences,
            calibration.accuracies,
            error=calibration.error,
            title=title,
        ),
        "mistakes": figures.mistakes(
            images[worst],
            [names[label] for label in evaluation.labels[worst]],
            [names[label] for label in evaluation.predictions[worst]],
            evaluation.confidences[worst],
            title=f"{title}: the {len(worst)} most confident of {wrong:,} mistakes",
        ),
    }


def tabulate(evaluation: "Evaluation", names: list[str]) -> str:
    """Format the scores as lines of text."""
    low, high = (100 * end for end in evaluation.interval)
    bins = len(evaluation.calibration.counts)
    width = max(5, *map(len, names))
    lines = [
        f"{'accuracy':13} {100 * evaluation.accuracy:.2f} %   95 % Wilson interval {low:.2f} to {high:.2f} %",
        f"{'loss':13} {evaluation.loss:.4f}   mean cross-entropy",
        f"{'calibration':13} {100 * evaluation.calibration.error:.2f} %"
        f"   expected calibration error, {bins} bins",
        "",
        f"{'class':>{width}}  precision   recall       F1  support",
    ]
    columns = (evaluation.scores.precision, evaluation.scores.recall, evaluation.scores.f1)
    for label, name in enumerate(names):
        cells = "  ".join(
            f"{'–' if math.isnan(column[label]) else f'{100 * column[label]:.2f} %':>7}" for column in columns
        )
        lines.append(f"{name:>{width}}    {cells}  {evaluation.scores.support[label]:>7,}")
    mistakes = [
        (int(count), names[label], names[prediction])
        for label, row in enumerate(evaluation.confusion)
        for prediction, count in enumerate(row)
        if label != prediction and count
    ]
    if mistakes:
        most = sorted(mistakes, key=lambda mistake: -mistake[0])[:3]
        lines += ["", "most often: " + ", ".join(f"{a} read as {b} ({count} ×)" for count, a, b in most)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
