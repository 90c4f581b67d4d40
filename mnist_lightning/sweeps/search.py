"""``-m search=…``: let Optuna choose the settings, one trial after the other."""

import json
import logging
import statistics
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from mnist_lightning.config import MAX_SEED, ConfigError
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.outside import as_text, read_json
from mnist_lightning.rundir.status import read
from mnist_lightning.sweeps.grid import GridSweeper, Job, check_same, check_size, check_sweeper
from mnist_lightning.sweeps.processes import ProcessesLauncher
from mnist_lightning.sweeps.results import FOLD
from mnist_lightning.sweeps.resume import check_overrides
from mnist_lightning.sweeps.study import TRIAL, find_storage, mend_journal, open_storage, to_distribution
from mnist_lightning.targets import check_types
from mnist_lightning.workarounds import trial_id

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

log = logging.getLogger(__name__)


class OptunaSweeper(GridSweeper):
    """Ask an Optuna study for the settings of each trial, and tell it the result.

    A trial's number is the name of its folder.  With ``data.fold=0,1,2`` a trial has three jobs with
    consecutive numbers, and its value is their mean.  Sweeps with the same ``storage`` and ``study_name``
    work on the same study.

    Args:
        n_trials: the total number of trials in the study, failed and pruned ones included.
        n_jobs: the number of trials at a time; None: one, so that each trial learns from all earlier ones, or
            the number of workers of ``hydra/launcher=processes``.
        storage: a journal file, or the URL of a database; None: ``optuna.journal`` in the sweep's folder.
        study_name: the study's name in the storage.
        seed: the sampler's seed; trial k uses ``seed`` + k, so that a resumed search chooses the same trials.
        sampler: a ``_partial_`` config of an Optuna sampler that takes a seed.
        params: the search space: a value in Hydra's override grammar for each key.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int | None,
        storage: str | None,
        study_name: str,
        seed: int,
        sampler: DictConfig,
        params: Mapping[str, str] | None,
    ) -> None:
        super().__init__(max_batch_size=None, params=params)  # type: ignore[arg-type]  # Hydra says str
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.storage = storage
        self.study_name = study_name
        self.seed = seed
        self.sampler = sampler
        self.fixed: dict[str, str] = {}
        self.space: dict[str, Override] = {}
        self.folds: list[str] = []  # the folds of each trial; empty: a trial is one job
        self.trials: dict[int, Trial] = {}

    def prepare(self, arguments: list[str]) -> None:
        assert self.hydra_context is not None
        assert self.config is not None
        check_sweeper(self.config)
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "a search needs Optuna: pip install optuna, or mnist_lightning[search]"
            ) from error
        try:
            self.make_sampler(0)
            check_types(self.sampler, "hydra.sweeper.sampler")
        except (InstantiationException, TypeError) as error:
            cause = as_text(" ".join(str(error.__cause__ or error).split()))
            raise ConfigError(f"hydra.sweeper.sampler can't be built: {cause}") from error
        if self.resumed:
            check_same(self.sweep_dir, self.config)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        for override in parser.parse_overrides([*self._parse_config(), *arguments]):
            key = override.get_key_element()
            self.space.pop(key, None)  # the command line overrides the YAML
            self.fixed.pop(key, None)
            self.folds = [] if key == FOLD else self.folds
            if key == FOLD and override.is_discrete_sweep():
                self.folds = list(override.sweep_string_iterator())
            elif override.is_sweep_override():
                check_size([override])
                self.space[key] = override
            else:
                self.fixed[key] = override.get_value_element_as_str()
        if not self.space:
            raise ConfigError("nothing to search: give a key choice(), range() or interval() as its value")
        self.check_jobs([job for example in self.examples() for job in self.divide(example)])

    def divide(self, job: Job) -> list[Job]:
        """Return a trial's jobs: one for each fold, or just one."""
        return [[*job, f"{FOLD}={fold}"] for fold in self.folds] or [job]

    def number_jobs(self, number: int, job: Job) -> list[tuple[int, Job]]:
        """Return a trial's jobs with their numbers."""
        divided = self.divide(job)
        return list(enumerate(divided, start=number * len(divided)))

    def examples(self) -> Iterator[Job]:
        """Yield jobs with each value of each choice and both ends of each interval, to check them all."""
        values = {key: ends(override) for key, override in self.space.items()}
        first = {key: texts[0] for key, texts in values.items()}
        yield self.make_job(first)
        for key, texts in values.items():
            for text in texts[1:]:
                yield self.make_job(first | {key: text})

    def make_job(self, values: Mapping[str, str]) -> Job:
        return [f"{key}={value}" for key, value in (self.fixed | dict(values)).items()]

    def launch_all(self) -> list[JobReturn]:
        assert self.config is not None
        study = self.open_study()
        space = {key: to_distribution(override) for key, override in self.space.items()}
        size = self.n_jobs or 1
        if self.n_jobs is None and isinstance(self.launcher, ProcessesLauncher):
            size = self.launcher.count_slots([self.config])
        batch = self.find_unfinished(study, space)
        returns: list[JobReturn] = []
        while batch or (batch := self.ask(study, space, size)):
            returns += self.launch(
                [
                    (place, one)
                    for number, job in batch
                    for place, one in self.number_jobs(number, job)
                    if not self.is_finished(place, one)
                ]
            )
            for number, job in batch:
                self.tell(study, number, job)
            batch = []
        return returns

    def open_study(self) -> "Study":
        import optuna

        assert self.config is not None
        mode = self.find_mode()
        if self.storage is None:
            mend_journal(self.sweep_dir)
        storage = find_storage(self.storage, self.sweep_dir)
        try:
            return optuna.create_study(
                storage=open_storage(storage),
                study_name=self.study_name,
                direction="maximize" if mode == "max" else "minimize",
                load_if_exists=True,
            )
        except Exception as error:  # Optuna and database drivers raise many kinds of exceptions
            cause = as_text(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            raise ConfigError(f"the study in {storage} can't be used: {cause}") from error

    def find_mode(self) -> str:
        """Return "max" or "min", the mode of the monitored metric.

        Raises:
            ConfigError: the mode is not the same for all trials.
        """
        if len(self.modes) != 1:
            raise ConfigError("a search needs one monitor.metric and one monitor.mode for all its trials")
        (mode,) = self.modes
        return mode

    def ask(
        self, study: "Study", space: "Mapping[str, BaseDistribution]", size: int
    ) -> list[tuple[int, Job]]:
        """Ask the study for up to ``size`` new trials; return none when it has ``n_trials``.

        Trials that somebody has enqueued come first, and count once they are asked for.
        """
        from optuna.trial import TrialState

        batch: list[tuple[int, Job]] = []
        while len(batch) < size:
            trials = study.get_trials(deepcopy=False)
            count = sum(trial.state != TrialState.WAITING for trial in trials)
            if count >= self.n_trials:
                break
            study.sampler = self.make_sampler(count)
            trial = study.ask()
            if trial.number >= self.n_trials:  # another sweep has asked at the same moment
                study.tell(trial, state=TrialState.FAIL)
                break
            batch += self.begin(study, trial, space)
        return batch

    def make_sampler(self, number: int) -> "BaseSampler":
        sampler: BaseSampler = instantiate(self.sampler)(seed=(self.seed + number) % (MAX_SEED + 1))
        return sampler

    def begin(
        self, study: "Study", trial: "Trial", space: "Mapping[str, BaseDistribution]"
    ) -> list[tuple[int, Job]]:
        """Choose a trial's settings, and note them.

        Return none if the study has other settings for it than the search tries; the trial then has failed.
        """
        from optuna.trial import TrialState

        study.sampler = self.make_sampler(trial.number)
        try:
            job = self.make_job({key: suggest(trial, key, space[key]) for key in space})
        except ValueError as error:
            log.error(
                "trial %d failed  the study gives it other settings: %s", trial.number, as_text(str(error))
            )
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.FAIL)
            self.lost.append(str(trial.number))
            return []
        self.trials[trial.number] = trial
        self.note_trial(trial, job)
        return [(trial.number, job)]

    def note_trial(self, trial: "Trial", job: Job) -> None:
        """Write ``trial.json`` in a trial's folder, for the trial's own process and for resuming."""
        job_dir = self.job_dir(*self.number_jobs(trial.number, job)[0])
        job_dir.mkdir(parents=True, exist_ok=True)
        saved = {
            "storage": self.storage,  # None: the journal in the search's folder, even if that is moved
            "study_name": self.study_name,
            "id": trial_id(trial),
            "overrides": job,
            "folds": len(self.folds),  # a trial with several jobs is not pruned
        }
        write_atomic(job_dir / TRIAL, (json.dumps(saved, indent=2) + "\n").encode())

    def find_unfinished(
        self, study: "Study", space: "Mapping[str, BaseDistribution]"
    ) -> list[tuple[int, Job]]:
        """Return this sweep's interrupted trials, to continue them."""
        from optuna.trial import Trial, TrialState

        unfinished: list[tuple[int, Job]] = []
        for frozen in study.get_trials(states=[TrialState.RUNNING]):
            try:
                saved = self.find_trial(frozen)
            except OSError as error:
                log.warning("trial %d can't be continued and counts as failed: %s", frozen.number, error)
                study.tell(frozen.number, state=TrialState.FAIL)
                continue
            if saved is None:
                if self.storage is None:  # no other sweep's: a kill came between the question and the note
                    study.sampler = self.make_sampler(frozen.number)
                    unfinished += self.begin(study, Trial(study, trial_id(frozen)), space)
                continue
            job = saved["overrides"]
            check_overrides(self.sweep_dir, job)
            self.check_jobs(self.divide(job))
            trial = self.trials[frozen.number] = Trial(study, trial_id(frozen))
            self.note_trial(trial, job)  # the saved storage may not be this sweep's
            if all(self.is_finished(*one) for one in self.number_jobs(frozen.number, job)):
                self.tell(study, frozen.number, job)
            else:
                unfinished.append((frozen.number, job))
        return unfinished

    def find_trial(self, trial: "FrozenTrial") -> dict[str, Any] | None:
        """Read what ``note_trial`` wrote about a trial of this sweep; None if the trial is another sweep's.

        Raises:
            OSError: no readable file is about the trial, and at least one file is damaged.
        """
        damaged: OSError | None = None
        for file in self.sweep_dir.rglob(TRIAL):
            try:
                saved = read_json(file)
                if saved["id"] == trial_id(trial):
                    return saved | {"overrides": [str(override) for override in saved["overrides"]]}
            except (OSError, KeyError, TypeError) as error:
                damaged = OSError(f"{file} is damaged: {error}")
        if damaged is not None:
            raise damaged
        return None

    def tell(self, study: "Study", number: int, job: Job) -> None:
        """Tell the study a trial's result, read from its jobs' ``status.json``, unless it was interrupted."""
        from optuna.trial import TrialState

        assert self.config is not None
        metric = self.config.monitor.metric
        statuses = [read(self.job_dir(*one)) for one in self.number_jobs(number, job)]
        ended = [status for status in statuses if status is not None]
        values = [
            status.metrics[metric]
            for status in ended
            if status.state == "completed" and metric in status.metrics
        ]
        failed = [
            status
            for status in ended
            if status.state == "failed" or (status.state == "completed" and metric not in status.metrics)
        ]
        if failed or len(ended) < len(statuses):
            error = failed[0].error if failed else "left no status"
            self.trials[number].set_user_attr("error", error)
            study.tell(self.trials[number], state=TrialState.FAIL)
        elif len(values) == len(statuses):
            study.tell(self.trials[number], statistics.fmean(values))
        elif any(status.state == "pruned" for status in ended):
            study.tell(self.trials[number], state=TrialState.PRUNED)


def ends(override: Override) -> list[str]:
    """Return the values of a choice or range, or the two ends of an interval."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return [str(sweep.start), str(sweep.end)]
    return list(override.sweep_string_iterator())


def suggest(trial: "Trial", key: str, distribution: "BaseDistribution") -> str:
    """Return a trial's value as text; fractional numbers are rounded to four significant digits.

    Raises:
        ValueError: the study has a value for this key, of an enqueued trial, that the search does not try.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return str(trial.suggest_categorical(key, distribution.choices))
    options = {"log": distribution.log, "step": distribution.step}  # type: ignore[attr-defined]
    low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
    if isinstance(distribution, IntDistribution):
        value: float = trial.suggest_int(key, low, high, **options)
    else:
        value = trial.suggest_float(key, low, high, **options)
    if not low <= value <= high:
        raise ValueError(f"{key}={value} is not in [{low}, {high}]")
    return str(value) if isinstance(distribution, IntDistribution) else f"{value:.4g}"
