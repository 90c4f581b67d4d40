"""The default launcher: run jobs side by side where that is faster, otherwise one after the other."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from mnist_lightning.sweeps.processes import ProcessesLauncher


class AutoLauncher(Launcher):
    """Pass a sweep's jobs to ``ProcessesLauncher`` or to Hydra's ``BasicLauncher``.

    Hydra needs a launcher before it knows the jobs, so this class chooses when the first jobs arrive.  It
    keeps its choice, because a process that has trained must not be forked.  Jobs run one after the other if
    only one is ready at a time (in a search), on a single core or GPU, and if memory is too small for two.

    Args:
        n_jobs: the number of jobs at a time; None: chosen as above and by ``ProcessesLauncher``.
        jobs_per_gpu: the number of jobs at a time on each GPU.
        timeout_s: stop a job after this many seconds, for which it needs a process of its own; None: never.
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
        trials = OmegaConf.select(self.config, "hydra.sweeper.n_jobs") or 1  # trials at a time, in a search
        return max(count, trials) > 1 and self.processes.count_slots([self.config]) > 1

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.choose(len(job_overrides)).launch(job_overrides, initial_job_idx)
