"""The default launcher: jobs side by side where that is faster, one after the other where it is not."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from mnist_lightning.sweeps.processes import ProcessesLauncher


class AutoLauncher(Launcher):
    """Hands a sweep's jobs to ``ProcessesLauncher`` or to Hydra's ``BasicLauncher``.

    Hydra settles on a launcher before it knows the jobs, so this one chooses when the first ones come.  It
    keeps to its choice: a process that has trained must not be forked.  Jobs run one after the other where
    there is only one at a time (in a search), on a single core or GPU, and where memory would not do for two.

    Args:
        n_jobs: jobs at a time; None: decided as above, and by ``ProcessesLauncher``.
        jobs_per_gpu: at a time on each GPU.
        timeout_s: seconds after which a job is given up, for which it gets a process; None: never.
    """

    def __init__(self, n_jobs: int | None, jobs_per_gpu: int, timeout_s: float | None) -> None:
        super().__init__()
        self.processes = ProcessesLauncher(n_jobs, jobs_per_gpu, timeout_s)
        self.basic = BasicLauncher()
        self.config: DictConfig | None = None
        self.chosen: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        for launcher in (self.processes, self.basic):
            launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.config = config

    def choose(self, count: int) -> Launcher:
        """Choose the launcher for this many jobs, and for all that follow."""
        if self.chosen is None:
            self.chosen = self.processes if self._side_by_side(count) else self.basic
        return self.chosen

    def _side_by_side(self, count: int) -> bool:
        assert self.config is not None
        if self.processes.timeout_s is not None:
            return True
        if self.processes.n_jobs is not None:
            return self.processes.n_jobs > 1
        trials = OmegaConf.select(self.config, "hydra.sweeper.n_jobs") or 1  # at a time
        return max(count, trials) > 1 and self.processes.count_slots([self.config]) > 1

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.choose(len(job_overrides)).launch(job_overrides, initial_job_idx)
