"""What the jobs of a sweep have left in its folder, read without torch."""

import functools
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mnist_lightning.rundir.status import FILE, Status, read

SEED = "seed"
DEFAULT_MODES = {"val/acc": "max", "val/loss": "min"}
MULTIRUN = "multirun.yaml"  # Hydra's own record of a sweep


@dataclass(frozen=True)
class Job:
    """One job's folder, its status and the settings of its command line by key."""

    folder: Path
    status: Status
    params: dict[str, str]

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Setting:
    """Completed jobs that differ in nothing but the seed.

    Attributes:
        params: what varied between the settings of the sweep.
        mean, std: of the monitored metric over the jobs; std (n - 1) is NaN for one job.
        last: mean of the same metric at the last epoch instead of the best.
    """

    params: dict[str, str]
    jobs: list[Job]
    mean: float
    std: float
    last: float


@dataclass(frozen=True)
class Sweep:
    """
    Attributes:
        varied: the keys whose values differ between jobs, in the order of the command line.
        settings: the best first.
    """

    folder: Path
    command: list[str]
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


def read_sweep(folder: Path) -> Sweep:
    """
    Raises:
        FileNotFoundError: the folder is not a sweep's.
    """
    if not (folder / MULTIRUN).is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a sweep: it has no {MULTIRUN}")
    saved = read_multirun(folder)
    metric = saved["monitor"]["metric"]
    jobs = []
    for path in sorted(folder.glob(f"*/{FILE}"), key=lambda path: _natural(path.parent.name)):
        status = read(path.parent)
        if status is not None:
            jobs.append(Job(path.parent, status, split_overrides(status.overrides)))
    # what the settings leave to the metric, the jobs that have ended tell
    modes = [saved["monitor"]["mode"], *(job.status.mode for job in jobs), DEFAULT_MODES.get(metric)]
    maximize = next((mode for mode in modes if mode), "max") == "max"
    keys = list(dict.fromkeys(key for job in jobs for key in job.params))
    varied = [key for key in keys if len({job.params.get(key) for job in jobs}) > 1]
    return Sweep(
        folder=folder,
        command=["-m", *own_overrides(saved)],
        metric=metric,
        maximize=maximize,
        jobs=jobs,
        varied=varied,
        settings=_group(jobs, varied, metric, maximize),
    )


@functools.cache
def read_multirun(folder: Path) -> dict[str, Any]:
    """The composed config of a sweep, with what Hydra was told."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load((folder / MULTIRUN).read_bytes(), loader)
    assert isinstance(content, dict)
    return content


def own_overrides(saved: dict[str, Any]) -> list[str]:
    """The arguments that a person gave to a sweep, less the folder and the mode."""
    told = saved["hydra"]["overrides"]
    implied = ("hydra.mode=", "hydra.sweep.dir=", "hydra.sweep.subdir=")
    return [*told["task"], *(override for override in told["hydra"] if not override.startswith(implied))]


def split_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """["+a.b=1", "~c"] -> {"a.b": "1", "~c": ""}"""
    pairs = (override.partition("=") for override in overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}


def count_jobs(folder: Path) -> int | None:
    """How many jobs a sweep is to have; None where its folder does not tell."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        saved = read_multirun(folder)
        sweeper = saved["hydra"]["sweeper"]
        if "n_trials" in sweeper:
            return int(sweeper["n_trials"])
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*params, *saved["hydra"]["overrides"]["task"]])
        swept = {one.key_or_group: one for one in parsed}.values()
        return math.prod(len(list(one.sweep_string_iterator())) for one in swept if one.is_discrete_sweep())
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        HydraException,
        yaml.YAMLError,
    ):
        return None


def reproduce(job: Job) -> str:
    """The command that trains the job's net again, outside of a sweep."""
    return shlex.join(["python", "-m", "mnist_lightning.train", *job.status.overrides])


def find_sweep(name: str, *, logs: Path = Path("logs")) -> Path:
    """
    Args:
        name: a sweep's folder, or "latest": the newest under ``logs``.

    Raises:
        FileNotFoundError: there is none.
    """
    if name != "latest":
        folder = Path(name).expanduser()
        if not (folder / MULTIRUN).is_file():
            raise FileNotFoundError(f"{name} is not the folder of a sweep: it has no {MULTIRUN}")
        return folder
    found = sorted(logs.glob(f"**/{MULTIRUN}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"latest: there is no sweep under {logs.absolute()} yet;"
            " python -m mnist_lightning.train -m seed=1,2 makes one"
        )
    return found[-1].parent


def _group(jobs: list[Job], varied: list[str], metric: str, maximize: bool) -> list[Setting]:
    groups: dict[tuple[str, ...], list[Job]] = {}
    keys = [key for key in varied if key != SEED]
    for job in jobs:
        if job.status.state == "completed" and metric in job.status.metrics:
            groups.setdefault(tuple(job.params.get(key, "") for key in keys), []).append(job)
    settings = []
    for values, members in groups.items():
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


def _natural(name: str) -> tuple[int, str]:
    return (int(name), name) if name.isdecimal() else (-1, name)
