"""Write the results of runs as one HTML file that can be sent."""

import base64
import io
import logging
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_lightning.rundir.find import find_checkpoint
from mnist_lightning.rundir.outside import as_command, as_text
from mnist_lightning.rundir.status import show_value, show_with_unit
from mnist_lightning.sweeps.importance import Importance, find_importance
from mnist_lightning.sweeps.report import (
    ABOUT_P,
    MAX_FIGURES,
    compare_with_winner,
    explain_importance,
    find_drawn,
    judge,
    tabulate_folds,
    tell_luck,
    tell_repeated,
    tell_settings,
    try_read_curves,
)
from mnist_lightning.sweeps.results import FOLD, SEED, Job, Results, Setting, Sweep, reproduce

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Cell = str | tuple[float, str] | None  # a text, or a number and its text
Row = tuple[Sequence[Cell], Sequence[int]]  # the cells, and the places of the runs in the row

BEST = 3  # settings whose best net is evaluated
MISTAKES = 18  # misread images shown for each net
LARGEST_SIDE = 96  # pixels; larger images are shrunk
MOST_CLASSES = 20  # in a confusion matrix that is still readable
MOST_CURVES = 100  # runs with curves, the best first
MOST_POINTS = 200  # points of a curve
MOST_METRICS = 6  # metrics that have curves, or columns in the tables
MOST_COMMANDS = 20


def make_page(
    results: Results, *, title: str, command: Sequence[str], data_dir: str | None, trust: Any
) -> bytes:
    """Return the page as bytes of HTML.  The page treats texts of runs as data, never as markup.

    Args:
        results: the runs to report.
        title: the page's title.
        command: the arguments of the whole sweep; empty without one.
        data_dir: the folder of the validation images; None: where the runs read them.
        trust: see ``evaluation.trained.load_classifier``.
    """
    from mnist_lightning.page.assemble import assemble

    ranked = [job for setting in results.settings for job in setting.jobs]
    folders = {job.folder for job in ranked}
    places = {job.folder: place for place, job in enumerate(results.jobs)}
    finished = len(results.in_state("completed"))
    importance = find_importance(results)
    data = {
        "about": f"{count(len(results.jobs), 'run')}, {finished:,} of them completed,"
        f" {count(len(results.settings), 'setting')}; {time.strftime('%Y-%m-%d %H:%M')}",
        "explained": ABOUT_P if len(results.settings) > 1 else "",
        "metric": results.metric,
        "maximize": results.maximize,
        "parameters": order_parameters(results, importance),
        "runs": [describe_run(job, results, ranks=job.folder in folders) for job in results.jobs],
        "tables": {
            "settings": tabulate_settings(results, places),
            "folds": to_table(*tabulate_folds(results)),
            "runs": tabulate_runs(results),
        },
        "importance": importance and show_importance(importance, results),
        "curves": collect_curves(ranked or results.jobs, places),
        "nets": [ask_net(setting, rank, results, data_dir, trust)
                 for rank, setting in enumerate(results.settings[:BEST], start=1)],
        "commands": list_commands(results, command),
    }  # fmt: skip
    return assemble("report", ["report.js"], title=title, data=data)


def order_parameters(results: Results, importance: Importance | None) -> list[str]:
    """Return the parameters that vary between settings, the most important first."""
    keys = find_drawn(results) if results.settings else []
    shares = importance.shares if importance else {}
    return sorted(keys, key=lambda key: -shares.get(key, 0.0))[:MAX_FIGURES]


def count(number: int, name: str) -> str:
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def name_run(job: Job, results: Results) -> str:
    """Name a run by the settings that set it apart from the others, and by its folder."""
    keys = [key for key in results.varied if isinstance(results, Sweep) or key in (SEED, FOLD)]
    told = [job.changed, *(f"{key}={job.params[key]}" for key in keys if job.params.get(key))]
    return f"{' '.join(filter(None, told)) or 'default'} ({job.name})"


def describe_run(job: Job, results: Results, *, ranks: bool) -> dict[str, Any]:
    """Return a run's name, value and parameters for the page.

    Args:
        job: the run.
        results: all runs.
        ranks: whether the run counts in its setting.
    """
    return {
        "name": name_run(job, results),
        "value": job.status.metrics[results.metric] if ranks else None,
        "parameters": {key: show_parameter(job, key) for key in results.varied},
    }


def show_parameter(job: Job, key: str) -> str:
    return job.params.get(key) or "default"


def show_number(metric: str, value: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return None
    return value, show_with_unit(metric, value)


def find_metrics(results: Results) -> list[str]:
    """Return the tables' metrics: the monitored one first, then others of validation, training and test."""
    names = dict.fromkeys(name for job in results.jobs for name in job.status.metrics)
    others = [name for name in names if name.startswith(("val/", "last/train/", "test/"))]
    return list(dict.fromkeys([results.metric, *others]))[:MOST_METRICS]


def to_table(columns: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    return {"columns": list(columns), "rows": [{"cells": cells, "runs": runs} for cells, runs in rows]}


def tabulate_settings(results: Results, places: dict[Path, int]) -> dict[str, Any] | None:
    if not results.settings:
        return None
    metrics = find_metrics(results)
    keys, told = tell_settings(results)
    rows: list[Row] = []
    p_values = compare_with_winner(results)
    for rank, (setting, p) in enumerate(zip(results.settings, p_values, strict=True), start=1):
        cells: list[Cell] = [
            *((rank, str(rank)), (setting.mean, show_value(results.metric, setting.mean, setting.std))),
            *("the best" if rank == 1 else judge(p), *(text or "default" for text in told[rank - 1])),
        ]
        for name in metrics[1:]:
            values = [job.status.metrics[name] for job in setting.jobs if name in job.status.metrics]
            cells.append(show_number(name, statistics.fmean(values)) if values else None)
        seconds = statistics.fmean(job.status.seconds for job in setting.jobs)
        cells += [(len(setting.jobs), str(len(setting.jobs))), (seconds, f"{seconds:.1f}")]
        rows.append((cells, [places[job.folder] for job in setting.jobs]))
    unit = f"{results.metric} (%)" if results.metric.endswith("acc") else results.metric
    return to_table(["", unit, "against the best", *keys, *metrics[1:], "n", "seconds"], rows)


def tabulate_runs(results: Results) -> dict[str, Any]:
    metrics = find_metrics(results)
    keys = results.varied
    rows: list[Row] = []
    for place, job in enumerate(results.jobs):
        status = job.status
        epochs = status.metrics.get("epochs", math.nan)
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.started)) if status.started else None
        cells: list[Cell] = [
            *(started, status.state, show_number(metrics[0], status.metrics.get(metrics[0]))),
            *(show_parameter(job, key) for key in keys),
            *(show_number(name, status.metrics.get(name)) for name in metrics[1:]),
            (epochs, f"{epochs:g}") if math.isfinite(epochs) else None,
            *((status.seconds, f"{status.seconds:.1f}"), job.name, status.error),
        ]
        rows.append((cells, [place]))
    return to_table(
        ["when", "state", metrics[0], *keys, *metrics[1:], "epochs", "seconds", "run", "error"], rows
    )


def show_importance(importance: Importance, results: Results) -> dict[str, Any]:
    rows: list[tuple[str, float, str, bool]] = [
        (key, share, tell_luck(share, importance), False) for key, share in importance.shares.items()
    ]
    if importance.luck is not None:
        rows.append((f"{tell_repeated(results)}: luck", importance.luck, "", True))
    if importance.method == "variance" and importance.is_whole:
        rest = "together, not alone" if importance.luck is not None else "together, and luck"
        rows.append((rest, importance.rest, "", True))
    return {"rows": rows, "words": explain_importance(importance, results)}


def collect_curves(jobs: Sequence[Job], places: dict[Path, int]) -> dict[str, list[dict[str, Any]]]:
    """Read the curves of the first ``MOST_CURVES`` runs, by the metric's name without "train/" or "val/"."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for job in jobs[:MOST_CURVES]:
        for name, (epochs, values) in try_read_curves(job).items():
            split, _, metric = name.partition("/")
            if metric not in curves and len(curves) == MOST_METRICS:
                continue
            step = math.ceil(len(values) / MOST_POINTS)
            kept = sorted({*range(0, len(values), step), len(values) - 1})
            line = {
                "run": places[job.folder],
                "split": split,
                "values": [float(f"{values[i]:.5g}") for i in kept],
            }
            if [epochs[i] for i in kept] != list(range(1, len(kept) + 1)):
                line["epochs"] = [epochs[i] for i in kept]
            curves.setdefault(metric, []).append(line)
    return dict(sorted(curves.items(), key=lambda item: (item[0] != "acc", item[0] != "loss", item[0])))


def ask_net(
    setting: Setting, rank: int, results: Results, data_dir: str | None, trust: Any
) -> dict[str, Any]:
    """Evaluate the best net of a setting on its validation images, or say why that is not possible."""
    from hydra.errors import CompactHydraException

    job = results.best_job(setting)
    net: dict[str, Any] = {"name": f"{rank}. {name_run(job, results)}", "classes": [], "confusion": []}
    net |= {"mistakes": []}
    try:
        return net | judge_net(find_checkpoint(str(job.folder)), data_dir, trust)
    except (OSError, CompactHydraException) as error:
        told = as_text(" ".join(str(error).split()))
        log.warning("the page is without the mistakes of %s: %s", job.name, told)
        return net | {"told": f"Not evaluated: {told}"}


def judge_net(checkpoint: Path, data_dir: str | None, trust: Any) -> dict[str, Any]:
    """Compute a net's accuracy, confusion matrix and most confident mistakes on the validation images.

    Raises:
        OSError: the checkpoint or the data can't be read, or the net does not classify.
    """
    from mnist_lightning import threads
    from mnist_lightning.evaluation.scores import score
    from mnist_lightning.evaluation.trained import (
        choose_threads,
        load_classifier,
        load_split,
        log_probabilities,
    )

    classifier, saved = load_classifier(checkpoint, trust=trust)
    if not classifier.names_classes:
        raise OSError("the net predicts a number, not a class")
    split = load_split(checkpoint, saved, "val", data_dir=data_dir, trust=trust)
    with threads.use(choose_threads([classifier], len(split), None)):
        log_probs = log_probabilities(classifier, split.images).numpy()
    found = score(split.labels.numpy(), log_probs, classifier.temperature)
    names = [as_text(name) for name in classifier.class_names]
    low, high = found.interval
    wrong = round((1 - found.accuracy) * len(split))
    told = (
        f"{100 * found.accuracy:.2f} % of {len(split):,} validation images (95 % interval {100 * low:.2f} to"
        f" {100 * high:.2f} %); {wrong:,} misread, the most confident of them here"
    )
    readable = len(names) <= MOST_CLASSES
    return {
        "told": told,
        "classes": names if readable else [],
        "confusion": found.confusion.tolist() if readable else [],
        "mistakes": [
            {
                "image": to_png(split.images[place].numpy()),
                "label": names[found.labels[place]],
                "answer": names[found.predictions[place]],
                "probability": round(float(found.confidences[place]), 4),
            }
            for place in found.worst(MISTAKES)
        ],
    }


def to_png(image: "NDArray[np.uint8]") -> str:
    """Return an image, (H, W) or (H, W, 3) uint8, as a PNG in base64; grey images become dark on white."""
    from PIL import Image

    picture = Image.fromarray(255 - image if image.ndim == 2 else image)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def list_commands(results: Results, command: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of what a command does, and the command."""
    train = ["python", "-m", "mnist_lightning.train"]
    commands = [("the whole sweep", as_command([*train, *command]))] if command else []
    if isinstance(results, Sweep) and results.in_state("failed", "interrupted"):
        commands.append(
            ("the jobs that did not finish", as_command([*train, "-m", f"resume={results.folder}"]))
        )
    for rank, setting in enumerate(results.settings[:MOST_COMMANDS], start=1):
        job = results.best_job(setting)
        commands.append((f"{rank}. {name_run(job, results)}", reproduce(job)))
    if results.settings:
        best = results.best_job(results.settings[0])
        commands.append(
            (
                "the best net on the test images: do this once, with one net",
                as_command(["python", "-m", "mnist_lightning.evaluate", f"run={best.folder}"]),
            )
        )
    return commands
