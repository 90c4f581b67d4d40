"""Sweep over all combinations of values.

In addition to what Hydra's own sweeper does, wrong settings are reported before the first job starts, one
failed job does not stop the others, and the sweep ends with a report.
"""

import contextlib
import json
import logging
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from mnist_lightning.cli import CommandError, quote, typed
from mnist_lightning.config import COUNT, MAX_SEED, ConfigError, Limit, Train, check
from mnist_lightning.rundir import signals
from mnist_lightning.rundir.atomic import LONG_LEFT, remove_leftovers, write_atomic
from mnist_lightning.rundir.claim import check_processes
from mnist_lightning.rundir.find import MULTIRUN
from mnist_lightning.rundir.outside import as_word
from mnist_lightning.rundir.status import GONE, Status, lock, read
from mnist_lightning.settings_help import flatten, without_hydra
from mnist_lightning.sweeps.auto import AutoLauncher
from mnist_lightning.sweeps.parts import Parts, check_parts, find_parts
from mnist_lightning.sweeps.results import MOST_JOBS, SEED, count_values, read_multirun, read_sweep
from mnist_lightning.targets import is_target, is_whole
from mnist_lightning.trust import KEY as TRUST
from mnist_lightning.trust import check_targets, typed_trust

log = logging.getLogger(__name__)

Job = list[str]  # a job's overrides
COUNT_OR_NULL: Limit = (lambda x: x is None or COUNT[0](x), f"{COUNT[1]}, or null")
SWEEPER_LIMITS: dict[str, Limit] = {  # of GridSweeper and OptunaSweeper
    **dict.fromkeys(("max_batch_size", "n_jobs"), COUNT_OR_NULL),
    "n_trials": COUNT,
    "seed": (lambda x: is_whole(x) and 0 <= x <= MAX_SEED, "a whole number in [0, 2^32)"),
    "storage": (
        lambda x: x is None or (isinstance(x, str) and x != ""),
        "a file, the URL of a database, or null",
    ),
    "study_name": (lambda x: isinstance(x, str) and x != "", "a name"),
    "sampler": (is_target, "settings with a _target_"),
    "params": (lambda x: x is None or isinstance(x, dict), "settings, or null"),
}
NAMED = "a name with ${hydra.job.num} in it gives each its own"


class RememberingLoader(ConfigLoaderImpl):
    """Compose the config of each job only once.

    A sweep needs it twice: to check all jobs before the first one starts, and to run the job.  Composing
    takes most of the time between two jobs.

    Attributes:
        composed: pickled configs of the jobs that are checked and have not run yet, by their overrides; 60 kB
            each, a tenth of the config's own size.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.composed: dict[tuple[str, ...], bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"composed": {}}  # a cluster's job needs the loader, but no configs of other jobs

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        known = self.composed.pop(tuple(sweep_overrides), None)
        if known is None:
            return super().load_sweep_config(master_config, sweep_overrides)
        config = pickle.loads(known)
        assert isinstance(config, DictConfig)
        return config

    def remember(self, overrides: Sequence[str], config: DictConfig) -> None:
        self.composed[tuple(overrides)] = pickle.dumps(config)


class GridSweeper(BasicSweeper):
    """Run every combination of the swept values, after checking all of them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.sweep_dir = Path(config.hydra.sweep.dir)
        self.modes: set[str] = set()  # "max" or "min" of each monitored metric
        self.lost: list[str] = []  # jobs whose status can't be written
        self.resumed = (self.sweep_dir / MULTIRUN).is_file()
        self.loader = RememberingLoader(hydra_context.config_loader.get_search_path())
        hydra_context = HydraContext(config_loader=self.loader, callbacks=hydra_context.callbacks)
        with _no_empty_folder(self.sweep_dir):
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Check all jobs, run them, and write the report.

        Raises:
            ConfigError: a job's settings are wrong; no job has started.
            SystemExit: some jobs failed and all others have finished, or Ctrl-C (code 130) or SIGTERM (143)
                ended the sweep.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        with _no_empty_folder(self.sweep_dir):
            self.prepare(arguments)
        with lock(self.sweep_dir), _stopped_by_signals(self.sweep_dir):
            remove_leftovers(self.sweep_dir, age=LONG_LEFT)
            if not self.resumed:
                self.write_multirun()
            returns = self.launch_all()
        self.hydra_context.callbacks.on_multirun_end(config=self.config)
        self.finish()
        return returns

    def write_multirun(self) -> None:
        """Write the composed config of the sweep to ``multirun.yaml``.

        Raises:
            CommandError: the sweep's folder can't be written; no job has started.
        """
        try:
            write_atomic(self.sweep_dir / MULTIRUN, OmegaConf.to_yaml(self.config).encode())
        except OSError as error:
            raise CommandError(str(error)) from error

    def prepare(self, arguments: list[str]) -> None:
        """Split the arguments into jobs, and check all jobs.

        Raises:
            ConfigError: a job's settings are wrong, or differ from those of the sweep that is resumed.
        """
        assert self.hydra_context is not None
        assert self.config is not None
        check_sweeper(self.config)
        if self.resumed:
            check_same(self.sweep_dir, self.config)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        check_size(overrides)
        (self.jobs,) = self.split_arguments(overrides, None)
        self.check_jobs(self.jobs)
        self.check_folders(list(enumerate(self.jobs)))

    def check_jobs(self, jobs: Sequence[Job]) -> None:
        assert self.config is not None
        start = time.monotonic()
        parts: dict[str, Parts] = {}
        settings = {tuple(o for o in job if not o.startswith(f"{SEED}=")) for job in jobs}
        for number, overrides in enumerate(jobs):
            cfg = self.loader.load_sweep_config(self.config, overrides)
            job_settings = check_job(cfg, overrides, compared=len(settings) > 1)
            found = find_parts(job_settings)
            if not found["monitor"] and job_settings.monitor.mode:
                self.modes.add(job_settings.monitor.mode)
            if self.resumed:
                saved = OmegaConf.to_container(without_hydra(cfg))
                assert isinstance(saved, dict)
                check_targets(saved, self.sweep_dir, typed_trust(typed))  # type: ignore[arg-type]
            parts[json.dumps(found)] = found
            self.loader.remember(overrides, cfg)
            if time.monotonic() - start > 2:
                start = time.monotonic()
                log.info("checked the settings of %d of %d jobs", number + 1, len(jobs))
        self.modes |= {mode for found in parts.values() if (mode := check_parts(found))}

    def launch_all(self) -> list[JobReturn]:
        numbered = [
            (number, job) for number, job in enumerate(self.jobs) if not self.is_finished(number, job)
        ]
        if len(numbered) < len(self.jobs):
            log.info("%d of %d jobs have already finished", len(self.jobs) - len(numbered), len(self.jobs))
        size = self.max_batch_size or len(self.jobs)
        returns: list[JobReturn] = []
        for start in range(0, len(numbered), size):
            returns += self.launch(numbered[start : start + size])
        return returns

    def job_dir(self, number: int, job: Job) -> Path:
        """The folder that Hydra gives a job.

        Raises:
            ConfigError: it lies outside of the sweep's.
        """
        assert self.config is not None
        subdir = OmegaConf.to_container(self.config.hydra.sweep)["subdir"]  # type: ignore[call-overload, index]
        if subdir == "${hydra.job.num}":
            return self.sweep_dir / str(number)
        config = ConfigLoaderImpl.load_sweep_config(self.loader, self.config, list(job))
        with open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
        folder = self.sweep_dir / str(config.hydra.sweep.subdir)
        if ".." in folder.parts or self.sweep_dir not in folder.parents:
            raise ConfigError(
                f"hydra.sweep.subdir gives job {number} no folder within the sweep's ({folder}); {NAMED}"
            )
        return folder

    def check_folders(self, jobs: Sequence[tuple[int, Job]]) -> None:
        """Check that each job gets a folder of its own.

        Raises:
            ConfigError: two jobs would write to the same folder.
        """
        folders: dict[Path, int] = {}
        for number, job in jobs:
            folder = self.job_dir(number, job)
            other = folders.setdefault(folder, number)
            if other != number:
                raise ConfigError(
                    f"hydra.sweep.subdir gives job {number} the same folder as job {other} ({folder});"
                    f" {NAMED}"
                )

    def is_finished(self, number: int, job: Job) -> bool:
        """Tell whether a job has completed or was pruned.

        Raises:
            SystemExit: the job is still running, in a process that has outlived its sweep.
        """
        status = read(self.job_dir(number, job))
        if status is None:
            return False
        if status.state == "running":
            sys.exit(f"job {number} of {self.sweep_dir} is still running: wait until it has ended")
        return status.state in ("completed", "pruned")

    def launch(self, jobs: Sequence[tuple[int, Job]]) -> Sequence[JobReturn]:
        """Run jobs, each in the folder of its number, and return their results in the same order."""
        assert self.launcher is not None
        launcher = self.launcher
        if isinstance(launcher, AutoLauncher):
            launcher = launcher.choose(len(jobs))
        if isinstance(launcher, BasicLauncher) and len(jobs) > 1:
            # one at a time, so that a folder that can't be written fails only its own job
            return [job_return for job in jobs for job_return in self.launch([job])]
        first = jobs[0][0]
        overrides = [
            # a launcher numbers jobs upwards from the first; other numbers need their folder's name
            job
            if number == first + position
            else [
                *job,
                f"hydra.sweep.subdir={quote(str(self.job_dir(number, job).relative_to(self.sweep_dir)))}",
            ]
            for position, (number, job) in enumerate(jobs)
        ]
        try:
            returns = launcher.launch(overrides, initial_job_idx=first)
        except OSError as error:
            if len(jobs) > 1:
                raise
            returns = [JobReturn(overrides=jobs[0][1], status=JobStatus.FAILED)]
            returns[0].return_value = CommandError(str(error))
        except Exception as error:
            if not type(error).__module__.startswith("submitit."):
                raise
            raised = type(error).__name__ == "FailedJobError"  # its message ends with the job's traceback
            told = str(error).rstrip("- \n").splitlines()[-1] if raised else "its process is gone"
            sys.exit(
                f"a job has ended without a result ({told}); the others continue by"
                " themselves. When they have ended, run the rest with\n  python -m mnist_lightning.train -m"
                f" resume={as_word(str(self.sweep_dir))}"
            )
        for (number, job), job_return in zip(jobs, returns, strict=True):
            self.note_lost(number, job, job_return)
        return returns

    def note_lost(self, number: int, job: Job, job_return: JobReturn) -> None:
        """Mark a job without a status as failed, because it was killed or had no folder, and log the error of
        a job that could not write its last status to a full disk."""
        job_dir = self.job_dir(number, job)
        error, left = getattr(job_return, "_return_value", None), read(job_dir)
        if left is not None and left.error == GONE and isinstance(error, Exception):
            log.error("job %3d failed  %s", number, error)
        if left is None:
            status = Status(state="failed", error=str(error or "left no status"), overrides=job)
            log.error("job %3d failed  %s", number, status.error)
            try:
                status.write(job_dir)
            except OSError:
                self.lost.append(str(number))

    def finish(self) -> None:
        """Write the report, and print the top of its table.

        Raises:
            SystemExit: some jobs failed, or the report can't be written.
        """
        from mnist_lightning.sweeps.report import summarize, tell_next, write_report

        unwritten: OSError | None = None
        try:
            sweep = write_report(self.sweep_dir)
        except OSError as error:  # a full disk: the jobs' results are still reported
            unwritten, sweep = error, read_sweep(self.sweep_dir)
        print(f"{summarize(sweep)}\n{tell_next(sweep)}", flush=True)
        if unwritten:
            print(f"the report is not up to date: {unwritten}", file=sys.stderr)
        names = [*(job.name for job in sweep.in_state("failed", "interrupted")), *self.lost]
        if names:
            count = len(sweep.jobs) + len(self.lost)
            sys.exit(f"{len(names)} of {count} jobs did not finish: {', '.join(names)}")
        if unwritten:
            sys.exit(1)


def check_sweeper(config: DictConfig) -> None:
    """Check the sweeper's own settings.

    Raises:
        ConfigError: one has another type, or is out of its limits.
    """
    settings = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    assert isinstance(settings, dict)
    for key, (holds, wanted) in SWEEPER_LIMITS.items():
        if key in settings and not holds(settings[key]):
            raise ConfigError(f"hydra.sweeper.{key} must be {wanted}, got {settings[key]}")


def check_size(overrides: Sequence[Override]) -> None:
    """Check that a sweep's values can be listed, before they are.

    Raises:
        ConfigError: they make more than ``MOST_JOBS`` jobs.
    """
    jobs = 1
    for override in overrides:
        try:
            jobs *= count_values(override) if override.is_discrete_sweep() else 1
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if jobs > MOST_JOBS:
            raise ConfigError(
                f"{override.input_line} makes more than {MOST_JOBS:,} jobs, the most of a sweep"
            )


def check_job(cfg: DictConfig, overrides: Sequence[str], *, compared: bool) -> Train:
    """Check a job's config, and return its settings.

    Args:
        cfg: the composed config.
        overrides: the job's overrides.
        compared: whether the sweep's jobs differ in more than the seed.

    Raises:
        ConfigError: the job's settings are wrong, or can't be part of a sweep.
    """
    try:
        settings = check(cfg, Train)
        check_processes(settings)
    except ConfigError as error:
        raise ConfigError(f"job {' '.join(overrides)}: {error}") from error
    trainer = settings.trainer
    if trainer.get("devices", 1) != 1 or "ddp" in str(trainer.get("strategy")):
        raise ConfigError(
            "trainer=ddp can't be part of a multirun, its child processes would run the sweep again:"
            " start such runs one by one"
        )
    if compared and not settings.validates:
        why, instead = (
            ("trainer.limit_val_batches=0 validates nothing", "leave that out")
            if settings.data.has_validation
            else ("data.val_size=0 leaves no validation split", "set data.val_size=5000")
        )
        raise ConfigError(
            f"a multirun compares its settings by {settings.monitor.metric}, and {why}: {instead}, or vary"
            " nothing but the seed"
        )
    return settings


def check_same(sweep_dir: Path, config: DictConfig) -> None:
    """Check that a resumed sweep has the same settings as before.

    Raises:
        ConfigError: the settings differ.
    """
    saved = read_multirun(sweep_dir)
    others = ("hydra", "trust")
    told = [one for one in saved["hydra"]["overrides"]["task"] if not one.startswith(TRUST)]
    before = told, {k: v for k, v in saved.items() if k not in others}
    settings = OmegaConf.to_container(without_hydra(config))
    assert isinstance(settings, dict)
    typed: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    now = typed, {k: v for k, v in settings.items() if k not in others}
    params = saved["hydra"]["sweeper"].get("params"), config.hydra.sweeper.get("params")
    changed = [f"hydra.sweeper.params: {params[0]} -> {params[1]}"] * (params[0] != params[1])
    changed += [f"{argument} was not given" for argument in now[0] if argument not in before[0]]
    changed += [f"{argument} is missing" for argument in before[0] if argument not in now[0]]
    old, new = flatten(before[1]), flatten(now[1])
    changed += [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise ConfigError(f"the sweep in {sweep_dir} has other settings ({'; '.join(changed)})")


@contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove a sweep's folder if an error within the block leaves it empty."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


@contextmanager
def _stopped_by_signals(sweep_dir: Path) -> Iterator[None]:
    """Write the tables and print how to resume if Ctrl-C or SIGTERM ends the sweep within the block."""
    try:
        yield
    except SystemExit:
        if signals.received():
            from mnist_lightning.sweeps.report import write_tables

            with contextlib.suppress(OSError):
                write_tables(sweep_dir)
            folder = as_word(str(sweep_dir))
            print(
                f"interrupted; continue with\n  python -m mnist_lightning.train -m resume={folder}",
                file=sys.stderr,
            )
        raise
