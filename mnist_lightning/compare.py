"""Compare trained nets and their runs:  python -m mnist_lightning.compare runs=[A,B]"""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_lightning import threads
from mnist_lightning.cli import begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Compare, check
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.curves import read_curves
from mnist_lightning.rundir.find import find_checkpoint
from mnist_lightning.rundir.output import claim_output
from mnist_lightning.rundir.outside import as_text, read_json, read_yaml
from mnist_lightning.rundir.status import show_with_unit
from mnist_lightning.settings_help import flatten

if TYPE_CHECKING:
    from mnist_lightning.data import Images
    from mnist_lightning.evaluation.scores import Evaluation

log = logging.getLogger(__name__)

Content = TypeVar("Content")

LEVEL = 0.05  # significance level of McNemar's test
METRICS = ("epochs", "train_seconds", "num_parameters")  # shown from metrics.json, after the scores


@dataclass(frozen=True)
class Contestant:
    """A net to compare, with its run's files.

    Attributes:
        name: "A", "B", …
        folder: the run's folder; None if only a checkpoint file is known.
        settings: the run's settings by dotted key.
        images: the split on which the net was evaluated.
        evaluation: the net's scores; None for a regression.
        own: the run's own loss and metrics, by name.
        loss_name: the loss's class or function.
    """

    name: str
    folder: Path | None
    settings: dict[str, Any]
    images: "Images"
    evaluation: "Evaluation | None"
    own: dict[str, float]
    loss_name: str


def main() -> None:
    begin()
    sys.argv[1:] = quote_paths(["runs", "data_dir", "output"], sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="compare")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        compare(check(cfg, Compare))


def compare(settings: Compare) -> None:
    """Print and write how nets differ in settings, metrics and curves, and test which of two is better.

    Raises:
        OSError: the nets have different images in this split, a checkpoint or the data can't be read, or
            the output can't be written.
    """
    paths = [find_checkpoint(name) for name in settings.runs]
    log.info("loading torch and Lightning …")
    from mnist_lightning import figures
    from mnist_lightning.evaluation.trained import check_same_images

    contestants = [
        _load(letter, path, settings) for letter, path in zip(_letters(len(paths)), paths, strict=True)
    ]
    first = contestants[0].images
    check_same_images(paths, [contestant.images for contestant in contestants], settings.split)
    folder = claim_output(settings.output, "compare", ("comparison.json", "curves.png"))
    names = [contestant.name for contestant in contestants]
    for contestant, path in zip(contestants, paths, strict=True):
        print(f"{contestant.name} = {as_text(str(path))}")
    differences = differing([contestant.settings for contestant in contestants])
    print("\nsettings that differ" if differences else "\nno setting differs")
    print(tabulate(differences, names))
    metrics = side_by_side(contestants, settings.split)
    print(f"\n{len(first):,} {settings.split} images")
    print(tabulate(metrics, names))
    result: dict[str, Any] = {
        "runs": {name: str(path) for name, path in zip(names, paths, strict=True)},
        "split": settings.split,
        "settings": {key: dict(zip(names, values, strict=True)) for key, values in differences.items()},
        "metrics": {key: dict(zip(names, values, strict=True)) for key, values in metrics.items()},
    }
    a, b = contestants[0].evaluation, contestants[1].evaluation
    if len(contestants) == 2 and a and b:
        result["mcnemar"] = judge(a, b)
        print(f"\n{result['mcnemar']['sentence']}")
    if settings.split == "test":
        print(
            "\nIf you choose a net by its test accuracy, no images are left to estimate its accuracy without"
            " bias: choose by split=val, and read the test images once."
        )
    write_atomic(folder / "comparison.json", (json.dumps(result, indent=2, default=str) + "\n").encode())
    curves = {c.name: read_or_warn(read_curves, c.folder) for c in contestants}
    histories = {name: history for name, history in curves.items() if history}
    written = ["comparison.json"]
    if histories:
        drawing = figures.curves(histories)
        written += [path.name for path in figures.save({"curves": drawing}, folder)]
    print(f"\nwritten to {folder}: {', '.join(written)}")
    if settings.show and histories:
        figures.show([drawing])


def judge(a: "Evaluation", b: "Evaluation") -> dict[str, Any]:
    """Apply McNemar's exact test to two nets on the same images, and say in a sentence what it means.

    Returns:
        "only_A_right" and "only_B_right", numbers of images; "p"; and "sentence".
    """
    from mnist_lightning.evaluation.scores import mcnemar

    a_right, b_right = a.predictions == a.labels, b.predictions == b.labels
    only_a, only_b = int((a_right & ~b_right).sum()), int((b_right & ~a_right).sum())
    p = mcnemar(only_a, only_b)
    p_text = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    if p < LEVEL:
        (better, more), (worse, fewer) = sorted([("A", only_a), ("B", only_b)], key=lambda side: -side[1])
        sentence = (
            f"{better} is better than {worse}: it is right on {more} images where {worse} is wrong,"
            f" and wrong on {fewer} where the other is right, {p_text} (McNemar's exact test)."
        )
    else:
        sentence = (
            f"No evidence of a difference: only A is right on {only_a} images, only B on {only_b},"
            f" {p_text} (McNemar's exact test)."
        )
    return {"only_A_right": only_a, "only_B_right": only_b, "p": p, "sentence": sentence}


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys whose values differ between runs, with one value for each run; "–" if it has none."""
    keys = sorted({key for one in settings for key in one})
    rows = {key: [one.get(key, "–") for one in settings] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def side_by_side(contestants: Sequence[Contestant], split: str) -> dict[str, list[Any]]:
    """Return a row of values for each score on the split, and for each entry of ``METRICS``.

    Scores on the test images appear only with split="test".
    """
    from mnist_lightning.targets import CROSS_ENTROPIES

    evaluations = [contestant.evaluation for contestant in contestants]
    rows: dict[str, list[Any]] = {}
    if any(evaluations):
        rows = {
            f"{split}/acc": [f"{100 * one.accuracy:.2f} %" if one else "–" for one in evaluations],
            "  95 % interval": [
                "{:.2f}–{:.2f} %".format(*(100 * x for x in one.interval)) if one else "–"
                for one in evaluations
            ],
        }
    if not all(one.loss_name.startswith(CROSS_ENTROPIES) for one in contestants) and any(evaluations):
        rows["cross-entropy"] = [f"{one.loss:.4f}" if one else "–" for one in evaluations]
    names = [f"{split}/{name}" for contestant in contestants for name in contestant.own]
    for name in dict.fromkeys(names):
        if name not in rows:
            key = name.removeprefix(f"{split}/")
            rows[name] = [show_with_unit(key, c.own[key]) if key in c.own else "–" for c in contestants]
    reports = []
    for contestant in contestants:
        path = contestant.folder / "metrics.json" if contestant.folder else None
        reports.append(read_or_warn(read_json, path) or {})
    for key in METRICS:
        if any(key in report for report in reports):
            rows[key] = [report.get(key, "–") for report in reports]
    return rows


def tabulate(rows: Mapping[str, Sequence[Any]], names: Sequence[str]) -> str:
    """Format a text table with a row for each key and a column for each run."""
    if not rows:
        return ""
    cells = [["", *names]] + [[as_text(str(one)) for one in (key, *values)] for key, values in rows.items()]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = []
    for key, *values in cells:
        columns = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([f"{key:{widths[0]}}", *columns]))
    return "\n".join(lines)


def read_or_warn(read: Callable[[Path], Content], path: Path | None) -> Content | None:
    """Read a file or folder of a run; return None if there is none, and also warn if it can't be read."""
    if path is None or not path.exists():
        return None
    try:
        return read(path)
    except OSError as error:
        log.warning("%s", error)
        return None


def read_settings(path: Path) -> dict[str, Any]:
    """Read a run's saved settings, by dotted key.

    Raises:
        OSError: the file can't be read or holds no settings.
    """
    try:
        return flatten(OmegaConf.to_container(OmegaConf.create(read_yaml(path)), resolve=False))
    except (OmegaConfBaseException, AttributeError) as error:
        raise OSError(f"{path} holds no settings: {str(error).splitlines()[0]}") from error


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + i) if i < 26 else f"run {i + 1}" for i in range(count)]


def _load(name: str, path: Path, settings: Compare) -> Contestant:
    from mnist_lightning.evaluation.scores import score
    from mnist_lightning.evaluation.trained import (
        choose_device,
        choose_threads,
        compute_outputs,
        load_classifier,
        load_split,
        measure,
    )
    from mnist_lightning.targets import name_of

    classifier, checkpoint = load_classifier(path, trust=settings.trust)
    split = load_split(path, checkpoint, settings.split, data_dir=settings.data_dir, trust=settings.trust)
    folder = path.parent.parent if path.parent.name == "checkpoints" else None
    values = read_or_warn(read_settings, folder / ".hydra" / "config.yaml" if folder else None)
    if values is None:  # a checkpoint alone has the settings of the net and the data
        parts = ("model", "loss", "metrics", "preprocess")
        values = flatten({part: checkpoint["hyper_parameters"][part] for part in parts})
        values |= {f"data.{key}": value for key, value in checkpoint["datamodule_hyper_parameters"].items()}
    with threads.use(choose_threads([classifier], len(split), settings.threads)):
        outputs = compute_outputs(classifier.to(choose_device(settings.device)), split.images)
        own = measure(classifier, outputs, split.labels)
    log_probs, labels = outputs.log_softmax(dim=1).numpy(), split.labels.numpy()
    evaluation = score(labels, log_probs, classifier.temperature) if classifier.names_classes else None
    return Contestant(name, folder, values, split, evaluation, own, name_of(classifier.loss))


if __name__ == "__main__":
    main()
