"""Read the results of a sweep's jobs, or of other runs, without importing torch."""

import collections
import dataclasses
import functools
import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

from mnist_lightning.rundir.find import MULTIRUN, newest_first
from mnist_lightning.rundir.index import Record
from mnist_lightning.rundir.outside import as_command, as_text, expand_home, read_yaml
from mnist_lightning.rundir.records import is_decisive, is_measured
from mnist_lightning.rundir.status import FILE, Status, read

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SEED, FOLD = "seed", "data.fold"
EXPERIMENT = "experiment"
NUM_FOLDS = "data.num_folds"
DEFAULT_MODES = {"val/acc": "max", "val/loss": "min"}
LARGEST = 1e100  # metrics with a larger absolute value are not ranked
MOST_JOBS = 100_000  # of a sweep
LONGEST_NUMBER = 6  # the number of a fold has fewer digits


@dataclass(frozen=True)
class Job:
    """One job of a sweep, or a single run.

    Attributes:
        folder: its folder.
        status: its status.
        params: for a job, the overrides of its command line by key; for a single run, all its settings.
        name: the path of its folder, relative to the sweep's folder or to the parent of all runs.
        changed: for a single run, the overrides that differ from the defaults, as typed.
    """

    folder: Path
    status: Status
    params: dict[str, str]
    name: str
    changed: str = ""


@dataclass(frozen=True)
class Setting:
    """Completed jobs that differ only in the seed and the fold, one job for each seed and fold.

    Attributes:
        params: the values of the varied keys, except the seed and the fold.
        jobs: the jobs.
        mean: the mean of the monitored metric over the jobs.
        std: its standard deviation, with n - 1 in the denominator; NaN for one job.
        last: the mean of the same metric at the last epoch instead of the best; NaN if unknown.
    """

    params: dict[str, str]
    jobs: list[Job]
    mean: float
    std: float
    last: float


@dataclass(frozen=True)
class OutOfFold:
    """The results of a setting's nets on images that they were not trained on, over all folds.

    Attributes:
        images: the number of images, each classified by one net for each seed.
        correct: the number of images classified correctly, as a mean over seeds.
        missing: the folds that no completed job has used for validation.
    """

    images: int
    correct: float
    missing: list[int]

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


def join_folds(setting: Setting) -> OutOfFold | None:
    """Join the results of a setting's folds; None without folds, accuracies or numbers of images."""
    jobs = [job for job in setting.jobs if FOLD in job.params]
    if not jobs:
        return None
    told = [job.params.get(key, "0") for job in jobs for key in (FOLD, NUM_FOLDS)]
    if not all(text.isdecimal() and len(text) < LONGEST_NUMBER for text in told):  # the file is damaged
        return None
    wanted = max(int(job.params.get(NUM_FOLDS, 0)) for job in jobs)
    sizes: dict[int, int] = {}
    correct: dict[int, list[float]] = {}
    for job in jobs:
        metrics = job.status.metrics
        if "val_images" not in metrics or "val/acc" not in metrics:
            return None
        fold = int(job.params[FOLD])
        sizes[fold] = int(metrics["val_images"])
        correct.setdefault(fold, []).append(metrics["val/acc"] * metrics["val_images"])
    return OutOfFold(
        images=sum(sizes.values()),
        correct=sum(statistics.fmean(counts) for counts in correct.values()),
        missing=sorted(set(range(wanted)) - correct.keys()),
    )


@dataclass(frozen=True)
class Results:
    """The results of jobs, grouped into settings.

    Attributes:
        metric: the name of the monitored metric.
        maximize: whether a large value of the metric is good.
        jobs: all jobs.
        varied: the keys whose values differ between jobs, in the order of the command line.
        settings: the settings, the best first.
    """

    metric: str
    maximize: bool
    jobs: list[Job]
    varied: list[str]
    settings: list[Setting]

    def best_job(self, setting: Setting) -> Job:
        choose = max if self.maximize else min
        return choose(setting.jobs, key=lambda job: job.status.metrics[self.metric])

    def in_state(self, *states: str) -> list[Job]:
        return [job for job in self.jobs if job.status.state in states]


@dataclass(frozen=True)
class Sweep(Results):
    """The results of one sweep.

    Attributes:
        folder: the sweep's folder.
        command: the arguments of its command line.
        is_search: whether Optuna chose the settings.
    """

    folder: Path
    command: list[str]
    is_search: bool


def collect(records: Sequence[Record]) -> Results:
    """Group single runs and jobs of sweeps by the settings that influence their weights.

    ``varied`` has the keys typed for at least one run, and other keys only if runs with different settings
    would look the same without them.

    Args:
        records: the runs, see ``list_runs``, the newest first.  Of two runs with the same setting, seed and
            fold, only the first counts.
    """
    jobs, typed = [], {EXPERIMENT: None}
    for record, name in zip(records, shorten([record["run"] for record in records]), strict=True):
        status = read(Path(record["run"]))
        if status is not None:
            params = {
                key: show_setting(value)
                for key, value in record.items()
                if not is_measured(key) and not (value is None and key in (FOLD, NUM_FOLDS))
            }
            jobs.append(Job(Path(record["run"]), status, params, as_text(name), as_text(record["changed"])))
            typed |= dict.fromkeys(key.lstrip("~") for key in split_overrides(status.overrides))
    chosen = [record for record in records if record["state"] == "completed"]
    decisive = {key for record in chosen for key, value in record.items() if is_decisive(key, value)}
    different = {key for key in decisive | {EXPERIMENT} if len({job.params.get(key) for job in jobs}) > 1}
    varied = [key for key in typed if key in different]
    alike: dict[tuple[str | None, ...], list[Job]] = {}
    for key in sorted(different - set(varied)):
        alike.clear()
        for job in jobs:
            alike.setdefault(tuple(map(job.params.get, varied)), []).append(job)
        if any(len({job.params.get(key) for job in group}) > 1 for group in alike.values()):
            varied.append(key)
            jobs = [
                dataclasses.replace(job, changed=f"{job.changed} {key}={job.params.get(key)}".strip())
                for job in jobs
            ]
    varied += [key for key in (SEED, FOLD) if len({job.params.get(key) for job in jobs}) > 1]
    monitors = collections.Counter(
        (job.status.monitor, job.status.mode) for job in jobs if job.status.monitor and job.status.mode
    )
    metric, mode = monitors.most_common(1)[0][0] if monitors else ("val/acc", "max")
    assert metric is not None
    maximize = mode == "max"
    return Results(metric, maximize, jobs, varied, _group(jobs, varied, metric, maximize))


def shorten(folders: Sequence[str], *, paths: ModuleType = os.path) -> list[str]:
    """Names of folders: their paths from the innermost one around all of them, where there is one.

    Args:
        paths: how they are read; a module like ``os.path``.
    """
    whole = [paths.abspath(folder) for folder in folders]
    try:
        parent = paths.commonpath([paths.dirname(folder) for folder in whole])
    except ValueError:  # Windows has no folder around two drives
        return whole
    return [paths.relpath(folder, parent) for folder in whole]


def show_setting(value: Any) -> str:
    """Return a setting's value as one would type it."""
    if isinstance(value, str):
        return as_text(value)
    return json.dumps(value, separators=(",", ":"), default=str)


def read_sweep(folder: Path) -> Sweep:
    """Read the results of the sweep in a folder.

    Raises:
        FileNotFoundError: the folder is not a sweep's.
        OSError: its ``multirun.yaml`` can't be read.
    """
    if not (folder / MULTIRUN).is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a sweep: it has no {MULTIRUN}")
    saved = read_multirun(folder)
    metric = as_text(saved["monitor"]["metric"])
    jobs = []
    places = {path.relative_to(folder).as_posix(): path for path in find_jobs(folder)}
    for name in sorted(places, key=_natural):
        status = read(places[name])
        if status is not None:
            jobs.append(Job(places[name], status, split_overrides(status.overrides), as_text(name)))
    # without a mode in the settings, the metric has chosen one, which completed jobs have saved
    modes = [saved["monitor"].get("mode"), *(job.status.mode for job in jobs), DEFAULT_MODES.get(metric)]
    maximize = next((mode for mode in modes if mode), "max") == "max"
    keys = list(dict.fromkeys(key for job in jobs for key in job.params))
    varied = [key for key in keys if len({job.params.get(key) for job in jobs}) > 1]
    return Sweep(
        folder=folder,
        command=["-m", *map(as_text, own_overrides(saved))],
        metric=metric,
        maximize=maximize,
        jobs=jobs,
        varied=varied,
        settings=_group(jobs, varied, metric, maximize),
        is_search="n_trials" in ((saved["hydra"] or {}).get("sweeper") or {}),
    )


def find_jobs(folder: Path) -> Iterator[Path]:
    """Yield the folders of a sweep's jobs, at any depth below the sweep's folder."""
    for place, below, files in os.walk(folder):
        if FILE in [*files, *below] and Path(place) != folder:  # a folder in place of the file counts, too
            below.clear()  # do not search within a job's folder
            yield Path(place)


@functools.cache
def read_multirun(folder: Path) -> dict[str, Any]:
    """Read the composed config of a sweep, Hydra's own settings included.

    Raises:
        OSError: the file can't be read, or is damaged.
    """
    path = folder / MULTIRUN
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(read_yaml(path), loader)
    try:
        told = content["hydra"]["overrides"]
        texts = [*told["task"], *told["hydra"], content["monitor"]["metric"]]
        whole = all(isinstance(text, str) for text in texts)
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise OSError(f"{path} is damaged: it lacks the sweep's command or metric")
    return content  # type: ignore[no-any-return]


def own_overrides(saved: dict[str, Any]) -> list[str]:
    """The sweep's own overrides, without the folder and mode that Hydra adds."""
    told = saved["hydra"]["overrides"]
    implied = ("hydra.mode=", "hydra.sweep.dir=")
    return [*told["task"], *(override for override in told["hydra"] if not override.startswith(implied))]


def split_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Split overrides into keys and values: ["+a.b=1", "~c"] -> {"a.b": "1", "~c": ""}."""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def read_space(folder: Path) -> dict[str, "Override"]:
    """Return the swept values of a sweep's command, by key.

    Raises:
        OSError: the sweep's ``multirun.yaml`` can't be read.
        ValueError: it does not hold the swept values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        told = read_multirun(folder)["hydra"]
        params = [f"{key}={value}" for key, value in (told["sweeper"].get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*params, *told["overrides"]["task"]])
    except (KeyError, TypeError, AttributeError, AssertionError, HydraException, yaml.YAMLError) as error:
        raise ValueError(f"{folder / MULTIRUN} does not hold the swept values: {error}") from error
    last = {one.key_or_group: one for one in parsed}  # the command line overrides the YAML
    return {key: one for key, one in last.items() if one.is_sweep_override()}


def count_jobs(folder: Path) -> int | None:
    """Return the number of jobs that a sweep has when it is complete; None if unknown."""
    try:
        space = read_space(folder)
        trials = read_multirun(folder)["hydra"]["sweeper"].get("n_trials")
        folds = count_values(space[FOLD]) if FOLD in space else 1
        if trials is not None:
            return int(trials) * folds
        return math.prod(count_values(one) for one in space.values())
    except (OSError, ValueError, TypeError):
        return None


def reproduce(job: Job) -> str:
    """Return the command that trains the job's net again, outside of a sweep."""
    return as_command(["python", "-m", "mnist_lightning.train", *job.status.overrides])


def find_sweep(name: str, *, logs: Path = Path("logs")) -> Path:
    """Find the folder of a sweep.

    Args:
        name: a sweep's folder, or "latest": the newest sweep under ``logs``.
        logs: the folder of all runs.

    Raises:
        FileNotFoundError: there is no such sweep.
    """
    if name != "latest":
        folder = expand_home(name)
        if not (folder / MULTIRUN).is_file():
            raise FileNotFoundError(f"{name} is not the folder of a sweep: it has no {MULTIRUN}")
        return folder
    found = newest_first(logs.glob(f"**/{MULTIRUN}"))
    if not found:
        raise FileNotFoundError(
            f"latest: there is no sweep under {logs.absolute()} yet;"
            " python -m mnist_lightning.train -m seed=1,2 makes one"
        )
    return found[0].parent


def _group(jobs: list[Job], varied: list[str], metric: str, maximize: bool) -> list[Setting]:
    groups: dict[tuple[str, ...], dict[tuple[str | None, str | None], Job]] = {}
    keys = [key for key in varied if key not in (SEED, FOLD)]
    for job in jobs:
        value = job.status.metrics.get(metric, math.nan)
        if job.status.state == "completed" and abs(value) < LARGEST:
            group = groups.setdefault(tuple(job.params.get(key, "") for key in keys), {})
            group.setdefault((job.params.get(SEED), job.params.get(FOLD)), job)  # count a repeated run once
    settings = []
    for values, group in groups.items():
        members = list(group.values())
        results = [job.status.metrics[metric] for job in members]
        lasts = [job.status.metrics.get(f"last/{metric}", math.nan) for job in members]
        settings.append(
            Setting(
                params=dict(zip(keys, values, strict=True)),
                jobs=members,
                mean=statistics.fmean(results),
                std=statistics.stdev(results) if len(results) > 1 else math.nan,
                last=statistics.fmean(lasts),
            )
        )
    return sorted(settings, key=lambda setting: setting.mean, reverse=maximize)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by the numbers in them: 2_x before 10_x."""
    return [(int(part or -1), text) for text, part in re.findall(r"(\D*)(\d*)", name)]


def count_values(override: "Override") -> int:
    """Count the values of a choice or range without listing those of a range.

    Raises:
        ValueError: there are more than ``MOST_JOBS``.
    """
    sweep: Any = override.value()
    if not override.is_range_sweep():
        return len(list(override.sweep_string_iterator()))
    count = (sweep.stop - sweep.start) / sweep.step if sweep.step else math.inf
    if not count <= MOST_JOBS:
        raise ValueError(f"{override.input_line} has more than {MOST_JOBS:,} values, the most of a sweep")
    return max(0, math.ceil(count))
