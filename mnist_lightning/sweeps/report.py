"""Report the results of a sweep: ``results.csv``, ``report.md``, figures, and a short table to print."""

import csv
import functools
import io
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from mnist_lightning.rundir.curves import Curve, read_curves
from mnist_lightning.rundir.find import MULTIRUN
from mnist_lightning.rundir.output import replace_unchanged
from mnist_lightning.rundir.outside import (
    OF_A_SWEEP,
    as_cell,
    as_code,
    as_command,
    as_text,
    as_word,
    check_inside,
    is_our_figure,
    read_file,
)
from mnist_lightning.rundir.record import read_settings
from mnist_lightning.rundir.status import show_value
from mnist_lightning.sweeps.importance import Importance, find_importance
from mnist_lightning.sweeps.results import (
    FOLD,
    SEED,
    Job,
    Results,
    Setting,
    Sweep,
    join_folds,
    read_sweep,
    reproduce,
)

if TYPE_CHECKING:
    import numpy as np
    from hydra.core.utils import JobReturn

log = logging.getLogger(__name__)

OF_THE_IMAGES = tuple(
    f"data.{key}" for key in ("name", "path", "source", "val_size", "split_seed", "num_folds", "size", "grey")
)
TOLD_APART = 0.05  # significance level of the paired tests
ABOUT_P = (
    "p: how likely is a difference in accuracy at least as large as the one to the best by chance alone?"
    " (Exact paired sign-flip test on the validation images, which is McNemar's test for one seed; Holm's"
    " correction for the number of settings. It accounts for the choice of images, not for that of seeds.)"
)
MAX_HEAT_MAP_CELLS = 400
MAX_FIGURES = 12
LONGEST_NAME = 200  # letters of a file's name, with room for a prefix and a suffix


class ReportEachJob(Callback):
    """Rewrite a sweep's tables after each of its jobs, in the process that ran the job."""

    def on_job_end(self, config: DictConfig, job_return: "JobReturn", **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            try:
                tell_job(Path(config.hydra.runtime.output_dir))
            except OSError as error:  # the end of the next job, or of the sweep, tries again
                log.warning("the sweep's tables are not up to date: %s", error)


def tell_job(job_dir: Path) -> None:
    """Rewrite the tables of a job's sweep, and log one line about the job."""
    folder = next(place for place in job_dir.parents if (place / MULTIRUN).is_file())
    sweep = write_tables(folder)
    for job in sweep.jobs:
        if job.folder == job_dir:
            log.info("%s", tell(job, sweep))


def tell(job: Job, sweep: Sweep) -> str:
    """Describe a job in one line: its number, state, value, time and settings."""
    value = job.status.metrics.get(sweep.metric)
    return "  ".join(
        [
            f"job {job.name:>3} {job.status.state:11}",
            f"{sweep.metric} {show_value(sweep.metric, value)}" if value is not None else "",
            f"{job.status.seconds:.1f} s",
            " ".join(f"{key}={job.params[key]}" for key in sweep.varied if key in job.params),
            job.status.error or "",
        ]
    ).rstrip()


def write_tables(folder: Path) -> Sweep:
    """Write ``results.csv`` and ``report.md`` anew, from what the jobs' folders hold now; what somebody has
    changed in them since is kept beside them.

    Raises:
        OSError: the sweep's folder can't be read or written.
    """
    from filelock import FileLock

    check_inside(folder, OF_A_SWEEP)
    with FileLock(folder / ".report.lock"):  # jobs in other processes write the tables, too
        sweep = read_sweep(folder)
        told = {"results.csv": format_csv(sweep), "report.md": format_markdown(sweep)}
        replace_unchanged(folder, {name: text.encode() for name, text in told.items()})
    return sweep


def write_report(folder: Path) -> Sweep:
    """Write the tables and the figures of a sweep.

    Raises:
        OSError: the sweep's folder can't be read or written.
    """
    sweep = read_sweep(folder)
    check_inside(folder, OF_A_SWEEP)
    if sweep.settings:
        draw(sweep, folder / "figures")
    return write_tables(folder)


def format_csv(sweep: Sweep) -> str:
    """Format a table with one row for each job: folder, state, varied settings, metrics, time, error."""
    metrics = dict.fromkeys(name for job in sweep.jobs for name in job.status.metrics)
    names = sorted(set(metrics) - set(sweep.varied), key=lambda name: (name != sweep.metric, name))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(as_cell, ["job", "state", *sweep.varied, *names, "seconds", "error"]))
    for job in sweep.jobs:
        status = job.status
        params = [job.params.get(key, "") for key in sweep.varied]
        values = [status.metrics.get(name, "") for name in names]
        row = [job.name, status.state, *params, *values, status.seconds, status.error or ""]
        writer.writerow(map(as_cell, row))
    return text.getvalue()


def format_markdown(sweep: Sweep) -> str:
    states = [job.status.state for job in sweep.jobs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    lines = [
        f"# Sweep {as_name(sweep.folder.name)}",
        "",
        *code(as_command(["python", "-m", "mnist_lightning.train", *sweep.command])),
        f"{len(states)} jobs: {counts}.",
        "",
    ]
    if sweep.settings:
        p_values = compare_with_winner(sweep)
        lines += format_settings(sweep, p_values)
        lines += format_folds(sweep)
        lines += format_importance(sweep, find_importance(sweep))
        lines += format_winner(sweep, p_values)
    elif together := evaluate_together(sweep):
        lines += ["There are no validation images (data.val_size=0), so the settings are not ranked."]
        lines += ["Evaluate the nets together on the test images, once:", "", *code(together)]
    lines += format_failures(sweep)
    lines += format_time(sweep)
    drawn = [name for name in name_figures(sweep) if is_our_figure(sweep.folder / "figures" / f"{name}.png")]
    if drawn:
        lines += ["## Figures", ""]
        lines += [line for name in drawn for line in (f"![{name}](figures/{name}.png)", "")]
    return "\n".join(lines).rstrip() + "\n"


def format_settings(sweep: Sweep, p_values: "Sequence[float | None]") -> list[str]:
    keys = list(sweep.settings[0].params)
    metric = as_name(sweep.metric) + (" (%)" if sweep.metric.endswith("acc") else "")
    header = ["", *map(as_name, keys), metric, "last epoch", "n", "seconds", "p"]
    rows = [
        [
            str(rank),
            *(as_code(value) if value else "–" for value in setting.params.values()),
            show_value(sweep.metric, setting.mean, setting.std),
            show_value(sweep.metric, setting.last),
            str(len(setting.jobs)),
            f"{sum(job.status.seconds for job in setting.jobs) / len(setting.jobs):.1f}",
            "" if rank == 1 else show_p(p),
        ]
        for rank, (setting, p) in enumerate(zip(sweep.settings, p_values, strict=True), start=1)
    ]
    words = f"Mean{' ± standard deviation' if any(len(s.jobs) > 1 for s in sweep.settings) else ''}"
    return [
        "## Settings, the best first",
        "",
        *table(header, rows),
        "",
        f"{words} of the best epoch's {as_name(sweep.metric)} on the validation images, over n jobs that"
        f" differ only in the seed; then the mean of the last epoch's. Seconds are per job. {ABOUT_P}",
        "",
    ]


def show_p(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def format_folds(sweep: Sweep) -> list[str]:
    """Format the accuracy over all folds of each setting that has folds, and the missing folds."""
    header, rows = tabulate_folds(sweep)
    if not rows:
        return []
    return [
        "## All folds together",
        "",
        *table(
            header, [[f"**{cell}**" if cell.startswith("fold ") else cell for cell in row] for row, _ in rows]
        ),
        "",
        "Each image is classified by nets that were not trained on it; accuracies of several seeds are"
        " averaged. The interval is Wilson's: it accounts for the choice of these images, not for that of"
        " the training images.",
        "",
        *code(f"python -m mnist_lightning.evaluate folds={as_word(str(sweep.folder))} labels=true"),
    ]


def tabulate_folds(results: Results) -> tuple[list[str], list[tuple[list[str], list[int]]]]:
    """Return the header, and a row for each setting with folds; the rows name no runs."""
    from mnist_lightning.evaluation.scores import wilson_interval

    rows: list[tuple[list[str], list[int]]] = []
    for rank, setting in enumerate(results.settings, start=1):
        if (joined := join_folds(setting)) is not None:
            low, high = wilson_interval(round(joined.correct), joined.images)
            missing = ", ".join(map(str, joined.missing))
            cells = [
                *(str(rank), f"{100 * joined.accuracy:.2f}", f"{100 * low:.2f} to {100 * high:.2f}"),
                *(f"{joined.images:,}", f"fold {missing}" if missing else "none"),
            ]
            rows.append((cells, []))
    return ["", "accuracy (%)", "95 % interval", "images", "missing"], rows


def format_importance(sweep: Sweep, importance: Importance | None) -> list[str]:
    if importance is None:
        return []
    rows = [
        [as_code(key), f"{100 * share:.0f} %", tell_luck(share, importance)]
        for key, share in importance.shares.items()
    ]
    if importance.method == "variance":
        if importance.luck is not None:
            rows.append([f"{tell_repeated(sweep)}: luck", f"{100 * importance.luck:.0f} %", ""])
        if importance.is_whole:
            name = "together, not alone" if importance.luck is not None else "together, and luck"
            rows.append([name, f"{100 * importance.rest:.0f} %", ""])
    words = explain_importance(importance, sweep)
    return ["## What mattered", "", *table(["", "share", ""], rows), "", words, ""]


def tell_repeated(results: Results) -> str:
    """Name what differs between jobs of one setting: "seed", "data.fold", both or nothing."""
    return " and ".join(key for key in (SEED, FOLD) if key in results.varied)


def explain_importance(importance: Importance, results: Results) -> str:
    if importance.method != "variance":
        return (
            f"The influence of each parameter on {results.metric}, over all values that the search tried:"
            " Optuna's PED-ANOVA (Watanabe and others 2023). It does not show how much of this is luck; a"
            " grid with several seeds does."
        )
    return (
        (
            f"The share of each parameter in the variance of {results.metric} over all jobs, corrected for"
            " chance (epsilon squared). "
        )
        + (
            "Luck is the share of differences between jobs of one setting."
            if importance.luck is not None
            else "One seed does not show how much of this is luck: try seed=1,2,3."
        )
        + ("" if importance.is_whole else " Not all values were combined with each other: shares overlap.")
    )


def tell_luck(share: float, importance: Importance) -> str:
    return "smaller than luck" if importance.luck is not None and share < importance.luck else ""


def format_winner(sweep: Sweep, p_values: "Sequence[float | None]") -> list[str]:
    winner = sweep.settings[0]
    job = sweep.best_job(winner)
    checkpoint = job.folder / "checkpoints" / "best.ckpt"
    alike = [
        setting
        for setting, p in zip(sweep.settings[1:], p_values[1:], strict=True)
        if p is not None and p >= TOLD_APART
    ]
    lines = [
        "## The winner",
        "",
        f"{describe(winner)}: {as_name(sweep.metric)} {show_value(sweep.metric, winner.mean, winner.std)}"
        f"{'' if len(winner.jobs) == 1 else f', best of its {len(winner.jobs)} jobs: {job.name}'}.",
        "",
        f"- checkpoint: {as_code(str(checkpoint))}",
        "- the same net again:",
        "",
        *code(reproduce(job)),
        "- this sweep has not used the test images. Use them once, with the winner alone:",
        "",
        *code(f"python -m mnist_lightning.evaluate run={as_word(str(job.folder))}"),
    ]
    if len(sweep.settings) > 1:
        if alike:
            lines += ["These settings can't be told apart from the winner (p ≥ 0.05):", ""]
            lines += [f"- {describe(setting)}" for setting in alike]
        elif all(p is not None for p in p_values[1:]):
            lines += ["Every other setting is worse than the winner (p < 0.05)."]
        lines += [""]
    return lines


def evaluate_together(sweep: Sweep) -> str | None:
    """Return the command that evaluates the average of a sweep's nets; None with fewer than two nets."""
    folders = [str(job.folder) for job in sweep.in_state("completed")]
    if len(folders) < 2:
        return None
    return as_command(["python", "-m", "mnist_lightning.evaluate", f"runs=[{','.join(folders)}]"])


def format_failures(sweep: Sweep) -> list[str]:
    jobs = sweep.in_state("failed", "interrupted")
    if not jobs:
        return []
    rows = [
        [job.name, job.status.state, *(as_code(text) if text else "" for text in (settings(job), error))]
        for job, error in ((job, job.status.error) for job in jobs)
    ]
    return [
        "## Jobs that did not finish",
        "",
        *table(["job", "state", "settings", "error"], rows),
        "",
        "Each job's `train.log` has the details. Run the jobs again:",
        "",
        *code(f"python -m mnist_lightning.train -m resume={as_word(str(sweep.folder))}"),
    ]


def format_time(sweep: Sweep) -> list[str]:
    if not sweep.jobs:
        return []
    total = sum(job.status.seconds for job in sweep.jobs)
    begin = min(job.status.started for job in sweep.jobs)
    end = max(job.status.started + job.status.seconds for job in sweep.jobs)
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(begin))
    return [
        "## Time",
        "",
        f"Started {started}; {end - begin:.0f} s from the first job's start to the last one's end;"
        f" {total:.0f} s in all jobs together.",
        "",
    ]


def compare_with_winner(results: Results) -> "list[float | None]":
    """Compare each setting with the first.

    Returns:
        a Holm-adjusted p-value for each setting, in [0, 1]; None for the first, and for a setting that has no
        seed and fold in common with the first or was validated on other images.
    """
    from mnist_lightning.evaluation.significance import holm, sign_flip

    winner, images = read_correct(results.settings[0]), find_images(results.settings[0])
    p_values: list[float | None] = [None]
    for setting in results.settings[1:]:
        other = read_correct(setting)
        pairs = sorted(winner.keys() & other.keys())
        same = find_images(setting) == images
        if not pairs or not same or any(winner[pair].shape != other[pair].shape for pair in pairs):
            p_values.append(None)
            continue
        p_values.append(sign_flip(join_differences({pair: winner[pair] - other[pair] for pair in pairs})))
    known = [position for position, p in enumerate(p_values) if p is not None]
    adjusted = holm([p for p in p_values if p is not None])
    for position, p in zip(known, adjusted, strict=True):
        p_values[position] = p
    return p_values


def find_images(setting: Setting) -> tuple[str, ...]:
    """Return the settings that determine the validation images of a setting's jobs."""
    saved = read_settings(setting.jobs[0].folder).get("settings", {})
    return tuple(repr(saved.get(key)) for key in OF_THE_IMAGES)


def join_differences(differences: "Mapping[tuple[str, str], np.ndarray]") -> "np.ndarray":
    """Sum each image's differences over seeds, and join the folds: (N,) by fold and seed -> (all images,)."""
    import numpy as np

    sums: dict[str, np.ndarray] = {}
    for (fold, _), of_seed in differences.items():
        sums[fold] = sums[fold] + of_seed if fold in sums else of_seed.astype(np.int64)
    return np.concatenate(list(sums.values()))


def read_correct(setting: Setting) -> "dict[tuple[str, str], np.ndarray]":
    """Return, by fold and seed, which validation images the net classified correctly: (N,) int8, 1 or 0."""
    correct = {}
    for job in setting.jobs:
        images = load_correct(job.folder / "val_correct.npy", job.status.started)
        if images is not None:
            correct[job.params.get(FOLD, ""), job.params.get(SEED, "")] = images
    return correct


@functools.lru_cache(maxsize=4096)  # a sweep's report is written after each job, from all jobs so far
def load_correct(path: Path, started: float) -> "np.ndarray | None":
    """Read which images a net classified correctly: (N,) int8, 1 or 0; None if the file can't be read."""
    import numpy as np

    try:
        packed = np.load(io.BytesIO(read_file(path)), allow_pickle=False)
    except Exception:  # missing, damaged or not an array: numpy raises many kinds of exceptions
        return None
    if not isinstance(packed, np.ndarray) or packed.dtype != np.uint8 or packed.ndim != 1:
        return None
    return np.unpackbits(packed).astype(np.int8)


def draw(sweep: Results, folder: Path) -> None:
    """Draw the metric against each varied parameter, a heat map for two of them, and all learning curves."""
    from mnist_lightning import figures

    jobs = [job for setting in sweep.settings for job in setting.jobs]
    jobs.sort(key=lambda job: job.status.metrics[sweep.metric], reverse=sweep.maximize)
    values = [job.status.metrics[sweep.metric] for job in jobs]
    keys = find_drawn(sweep)
    pictures = {}
    for key in keys[:MAX_FIGURES]:
        settings_of_key = [job.params.get(key, "none") for job in jobs]
        pictures[f"{key} {sweep.metric}"] = figures.parameter(key, settings_of_key, sweep.metric, values)
    if len(keys) == 2:
        rows, columns = ([setting.params[key] or "none" for setting in sweep.settings] for key in keys)
        if len(set(rows)) * len(set(columns)) <= MAX_HEAT_MAP_CELLS:
            means = [setting.mean for setting in sweep.settings]
            pictures["heat map"] = figures.heat_map(keys[0], rows, keys[1], columns, sweep.metric, means)
    curves = [
        (f"{job.name}: {settings(job, sweep.varied)}", *curve)
        for job in jobs
        if (curve := try_read_curves(job).get(sweep.metric))
    ]
    if curves:
        pictures["learning curves"] = figures.learning_curves(sweep.metric, curves)
    named = {to_file_name(title): one for title, one in pictures.items()}
    for path in (folder / f"{name}.png" for name in list(named)):
        if os.path.lexists(path) and not is_our_figure(path):
            log.warning("%s was not drawn by this project and stays: rename it to get ours", path)
            del named[path.stem]
    figures.save(named, folder)


def find_drawn(sweep: Results) -> list[str]:
    """Return the parameters that differ between settings; each has a figure."""
    params = [setting.params for setting in sweep.settings]
    return [key for key in params[0] if len({its[key] for its in params}) > 1]


def name_figures(sweep: Sweep) -> list[str]:
    """Return the names of the files that ``draw`` may have written, without ".png"."""
    if not sweep.settings:
        return []
    titles = [f"{key} {sweep.metric}" for key in find_drawn(sweep)[:MAX_FIGURES]]
    return [to_file_name(title) for title in ("heat map", "learning curves", *titles)]


def to_file_name(title: str) -> str:
    name = "".join(one if one.isalnum() and one.isascii() else "_" for one in title)
    return name[:LONGEST_NAME]


def try_read_curves(job: Job) -> dict[str, Curve]:
    """Read a job's curves; none if its file is damaged, so that the others are still drawn."""
    try:
        return read_curves(job.folder)
    except OSError:
        return {}


def summarize(sweep: Results, top: int = 5) -> str:
    """Return the top of the table and the unfinished jobs as lines for a terminal."""
    lines = [""]
    if sweep.settings:
        p_values = compare_with_winner(sweep)
        keys, names = tell_settings(sweep)
        header = ["", *keys, sweep.metric, "n", "against the first" if len(sweep.settings) > 1 else ""]
        rows = [
            [
                str(rank),
                *names[rank - 1],
                show_value(sweep.metric, setting.mean, setting.std),
                str(len(setting.jobs)),
                "" if rank == 1 else judge(p),
            ]
            for rank, (setting, p) in enumerate(zip(sweep.settings[:top], p_values, strict=False), start=1)
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            lines.append("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        if len(sweep.settings) > top:
            alike = sum(p is not None and p >= TOLD_APART for p in p_values[top:])
            told = f", {alike} of them can't be told apart from the first" if alike else ""
            lines.append(f"   … {len(sweep.settings) - top} more settings{told}")
        lines += summarize_folds(sweep)
        if (importance := find_importance(sweep)) is not None:
            lines += ["", summarize_importance(importance)]
    unfinished = sweep.in_state("failed", "interrupted")
    for job in unfinished[:top]:
        lines.append(f"job {job.name} {job.status.state}: {job.status.error}")
    if len(unfinished) > top:
        lines.append(f"… {len(unfinished) - top} more jobs did not finish")
    return "\n".join(lines)


def tell_settings(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return a column for each of a sweep's parameters or, for other runs, one column "changed".

    Returns:
        the headings, and the texts of each setting.
    """
    if isinstance(results, Sweep):
        keys = list(results.settings[0].params) if results.settings else []
        return keys, [list(setting.params.values()) for setting in results.settings]
    return ["changed"], [[setting.jobs[0].changed or "default"] for setting in results.settings]


def tell_next(sweep: Sweep) -> str:
    """Say where the report is, and which commands to type next."""
    report = sweep.folder / "report.md"
    lines = ["", f"the report is in {as_text(str(report))}"] * report.is_file() + ["", "next:"]
    if sweep.in_state("failed", "interrupted"):
        lines.append(f"  python -m mnist_lightning.train -m resume={as_word(str(sweep.folder))}")
    if any((job.folder / "tensorboard").is_dir() for job in sweep.jobs):
        lines.append(f"  tensorboard --logdir {as_word(str(sweep.folder))}")
    if sweep.settings and join_folds(sweep.settings[0]) is not None:
        folds = as_word(str(sweep.folder))
        lines.append(f"  python -m mnist_lightning.evaluate folds={folds} labels=true")
    elif sweep.settings:
        best = sweep.best_job(sweep.settings[0])
        lines.append(f"  python -m mnist_lightning.evaluate run={as_word(str(best.folder))}")
    elif together := evaluate_together(sweep):
        lines.append(f"  {together}")
    return "\n".join(lines)


def judge(p: float | None) -> str:
    """Say the result of the paired test in words."""
    if p is None:
        return "–"
    shown = f"p {show_p(p)}" if p < 0.001 else f"p = {p:.3f}"
    return f"can't be told apart, {shown}" if p >= TOLD_APART else f"worse, {shown}"


def summarize_folds(sweep: Results) -> list[str]:
    from mnist_lightning.evaluation.scores import wilson_interval

    lines = []
    joined = join_folds(sweep.settings[0])
    if joined is not None:
        low, high = wilson_interval(round(joined.correct), joined.images)
        lines += [
            "",
            f"all folds together: accuracy {100 * joined.accuracy:.2f} % (95 % interval {100 * low:.2f} to"
            f" {100 * high:.2f} %) on {joined.images:,} images that the nets were not trained on",
        ]
        if joined.missing:
            lines.append(f"no completed job has fold {', '.join(map(str, joined.missing))}")
    return lines


def summarize_importance(importance: Importance) -> str:
    shares = [f"{key} {100 * share:.0f} %" for key, share in importance.shares.items()]
    if importance.luck is not None:
        shares.append(f"luck (seeds, folds) {100 * importance.luck:.0f} %")
    overlap = "" if importance.is_whole else ", shares overlap"
    return f"what mattered ({importance.method}{overlap}): {', '.join(shares)}"


def describe(setting: Setting) -> str:
    words = " ".join(f"{key}={value}" for key, value in setting.params.items() if value)
    return as_code(words) if words else "the only setting"


def settings(job: Job, keys: Sequence[str] | None = None) -> str:
    chosen = job.params if keys is None else {key: job.params[key] for key in keys if key in job.params}
    return " ".join(f"{key}={value}" for key, value in chosen.items())


def as_name(text: str) -> str:
    """Return a name for Markdown, as code if any character in it could be markup."""
    return text if re.fullmatch(r"[\w./() -]+", text) else as_code(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table in Markdown, as lines; each "|" in a cell is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    cells.insert(1, ["---"] * len(header))
    return [f"| {' | '.join(row)} |" for row in cells]


def code(command: str) -> list[str]:
    return ["```bash", as_text(command), "```", ""]
