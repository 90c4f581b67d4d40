"""``hydra/launcher=processes``: several jobs at a time on one machine."""

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from mnist_lightning.command import CommandError
from mnist_lightning.status import Status, read

log = logging.getLogger(__name__)

GRACE = 8.0  # seconds that a worker gets to save its job and leave


@dataclass
class Task:
    """A job on its way: its place in the launcher's answer, its number, its settings and folder."""

    position: int
    number: int
    config: DictConfig
    overrides: Sequence[str]

    @property
    def job_dir(self) -> Path:
        sweep = self.config.hydra.sweep
        return Path(str(sweep.dir)) / str(sweep.subdir)


@dataclass
class Worker:
    process: ForkProcess
    connection: Connection
    task: Task | None = None


class ProcessesLauncher(Launcher):
    """Runs jobs in worker processes that import torch once and then take one job after the other.

    They are forked before anything heavy is imported, so that nothing needs to be pickled but a
    job's config.  A worker that dies costs its own job only: another takes its place.  Workers
    notice when their parent is gone, save, and leave within ``GRACE`` seconds and a second.

    Args:
        n_jobs: number of workers; None: one for each CPU core.
    """

    def __init__(self, n_jobs: int | None) -> None:
        super().__init__()
        self.n_jobs = count_cpus() if n_jobs is None else n_jobs
        self.workers: list[Worker] = []
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if self.n_jobs < 1:
            raise CommandError(f"hydra.launcher.n_jobs must be >= 1, got {self.n_jobs}")
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config
        atexit.register(self.close)  # after, and so before, that of multiprocessing, which waits for ever

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        log.info("Launching %d jobs, %d at a time", len(job_overrides), self.n_jobs)
        tasks = deque(
            self._compose(position, initial_job_idx + position, overrides)
            for position, overrides in enumerate(job_overrides)
        )
        returns: dict[int, JobReturn] = {}
        try:
            while tasks or any(worker.task for worker in self.workers):
                self._hand_out(tasks)
                busy = [worker for worker in self.workers if worker.task]
                ready = wait([end for worker in busy for end in (worker.connection, worker.process.sentinel)])
                for worker in busy:
                    if worker.connection in ready or worker.process.sentinel in ready:
                        assert worker.task is not None
                        task, worker.task = worker.task, None
                        returns[task.position] = self._collect(worker, task)
                        self._tell(task)
        except BaseException:
            self.terminate()
            raise
        return [returns[position] for position in range(len(job_overrides))]

    def _compose(self, position: int, number: int, overrides: Sequence[str]) -> Task:
        assert self.hydra_context is not None
        assert self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        return Task(position, number, config, filter_overrides(overrides))

    def _hand_out(self, tasks: "deque[Task]") -> None:
        while tasks:
            idle = next((worker for worker in self.workers if worker.task is None), None)
            if idle is None:
                if len(self.workers) == self.n_jobs:
                    return
                idle = self._start_worker()
            try:
                idle.connection.send(tasks[0].config)
            except OSError:  # it died idle
                self.workers.remove(idle)
                continue
            idle.task = tasks.popleft()
            log.info("\t#%d : %s", idle.task.number, " ".join(idle.task.overrides))

    def _start_worker(self) -> Worker:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=self._work, args=(theirs, os.getpid()))
        self.workers.append(Worker(process, ours))  # the child closes its copy of all of these
        process.start()
        theirs.close()
        return self.workers[-1]

    def _collect(self, worker: Worker, task: Task) -> JobReturn:
        """What a worker says of its job; where it says nothing any more, that the job has failed."""
        try:
            job_return = worker.connection.recv()
            assert isinstance(job_return, JobReturn)
            return job_return
        except (EOFError, OSError):
            pass
        worker.process.join()
        self.workers.remove(worker)
        code = worker.process.exitcode or 0
        if code < 0:
            error = f"its process was killed by {signal.Signals(-code).name}"
            error += " (out of memory?)" if -code == signal.SIGKILL else ""
        else:
            error = f"its process left with code {code}"
        status = read(task.job_dir) or Status(overrides=list(task.overrides), started=time.time())
        if not (status.state == "interrupted" and code in (130, 143)):
            status.state, status.error = "failed", error
            status.seconds = round(time.time() - status.started, 3)
            with contextlib.suppress(OSError):
                task.job_dir.mkdir(parents=True, exist_ok=True)
                status.write(task.job_dir)
        return failure(error, task)

    def _tell(self, task: Task) -> None:
        from mnist_lightning.report import tell_job

        with contextlib.suppress(OSError):
            tell_job(task.job_dir)

    def _work(self, connection: Connection, parent: int) -> None:
        """A worker's life."""
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which tells its workers once
        for worker in self.workers:
            worker.connection.close()
        threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cpus() // self.n_jobs)))
        while (config := connection.recv()) is not None:
            connection.send(self._run(config))

    def _run(self, config: DictConfig) -> JobReturn:
        assert self.hydra_context is not None
        assert self.task_function is not None
        task = Task(0, config.hydra.job.num, config, [])
        try:
            task.job_dir.mkdir(parents=True, exist_ok=True)
            redirect_output(task.job_dir / "output.log")
            job_return = run_job(
                hydra_context=self.hydra_context,
                task_function=self.task_function,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except Exception as error:  # the folder or the log file can't be made
            return failure(f"{type(error).__name__}: {error}", task)
        job_return.cfg = job_return.hydra_cfg = None  # nobody asks
        return job_return

    def terminate(self) -> None:
        """Stop all workers: they save where they stand."""
        for worker in self.workers:
            worker.process.terminate()
        self._bury()

    def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError):
                worker.connection.send(None)
        self._bury()

    def _bury(self) -> None:
        deadline = time.monotonic() + GRACE
        for worker in self.workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
        self.workers.clear()


def failure(error: str, task: Task) -> JobReturn:
    job_return = JobReturn(overrides=task.overrides, status=JobStatus.FAILED)
    job_return.return_value = CommandError(error)
    return job_return


def leave_with(parent: int) -> None:
    """End this process when its parent is gone; what it does is saved first if that is quick."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def redirect_output(path: Path) -> None:
    """What a job prints goes to a file: the terminal would show several jobs' lines at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def count_cpus() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
