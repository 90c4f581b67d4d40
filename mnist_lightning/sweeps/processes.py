"""``hydra/launcher=processes``: several jobs at a time on one machine."""

import atexit
import contextlib
import importlib
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
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
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from mnist_lightning import threads
from mnist_lightning.cli import CommandError, begin
from mnist_lightning.config import AT_LEAST_ONE, POSITIVE, check_number
from mnist_lightning.rundir import signals
from mnist_lightning.rundir.status import Status, read

log = logging.getLogger(__name__)

# macOS has fork, but its own libraries don't survive it
FORKS = hasattr(os, "fork") and sys.platform != "darwin"
KILLED = 9  # SIGKILL, which not every system has
GRACE = 8.0  # seconds that a worker gets to save its job and leave
BAR = "jobs: {n_fmt}/{total_fmt} |{bar:30}| {elapsed}, {remaining} left"
MEMORY_OF_A_JOB = 0.8e9  # bytes: torch, Lightning and a small net, what is shared with other workers apart


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
    """A process, and what its parent knows of it.

    Attributes:
        slot: its place among the workers; on GPUs it says which one is the worker's own.
        wanted: threads that its job has asked for and not yet got; 0: none.
        threads: that its job has got; 0: it has not computed yet.
        deadline: of its job, by ``time.monotonic``; once it is given up, of its life.
        outcome: what it has sent of its job.
    """

    process: BaseProcess
    connection: Connection
    slot: int
    task: Task | None = None
    wanted: int = 0
    threads: int = 0
    deadline: float | None = None
    given_up: bool = False
    outcome: JobReturn | None = None


class ProcessesLauncher(Launcher):
    """Runs jobs in worker processes that import torch once and then take one job after the other.

    They are started before anything heavy is imported.  A worker that dies costs its own job only: another
    takes its place.  Workers notice when their parent is gone, save, and leave within ``GRACE`` seconds and
    a second.

    A job knows its number of threads once its net is built, and asks for them.  Unless ``n_jobs`` says how
    many run at a time, it begins when that many cores are free: a large one alone, small ones side by side.

    Args:
        n_jobs: number of workers; None: one for each usable core or, where jobs run on GPUs, ``jobs_per_gpu``
            for each of these; fewer where memory would not do.
        jobs_per_gpu: at a time on each GPU, the only one that they see.
        timeout_s: seconds from a job's start, and again from when it has got its cores, after which it is
            given up; None: never.
    """

    def __init__(self, n_jobs: int | None, jobs_per_gpu: int, timeout_s: float | None) -> None:
        super().__init__()
        self.n_jobs = n_jobs
        self.jobs_per_gpu = jobs_per_gpu
        self.timeout_s = timeout_s
        self.gpus: list[str] = []
        self.workers: list[Worker] = []
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        try:
            check_number("hydra.launcher.jobs_per_gpu", self.jobs_per_gpu, *AT_LEAST_ONE, whole=True)
            if self.n_jobs is not None:
                check_number("hydra.launcher.n_jobs", self.n_jobs, *AT_LEAST_ONE, whole=True)
            if self.timeout_s is not None:
                check_number("hydra.launcher.timeout_s", self.timeout_s, *POSITIVE)
        except ValueError as error:
            raise CommandError(str(error)) from error
        self.hydra_context = hydra_context
        self.task_function = task_function
        self.config = config
        atexit.register(self.close)  # after, and so before, that of multiprocessing, which waits for ever

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self.config is not None
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        tasks = deque(
            self._compose(position, initial_job_idx + position, overrides)
            for position, overrides in enumerate(job_overrides)
        )
        slots = min(self.count_slots([task.config for task in tasks]), len(tasks))
        log.info("Launching %d jobs, %d at a time", len(tasks), slots)
        returns: dict[int, JobReturn] = {}
        bar = tqdm(
            total=len(tasks), bar_format=BAR, disable=not sys.stderr.isatty(), leave=False, smoothing=0
        )
        try:
            while tasks or any(worker.task for worker in self.workers):
                self._hand_out(tasks, slots)
                for worker in self._wait():
                    assert worker.task is not None
                    task, worker.task = worker.task, None
                    returns[task.position] = self._collect(worker, task)
                    bar.clear()
                    self._tell(task)
                    bar.update()
                bar.refresh()
        except BaseException:
            bar.leave = True  # what comes next has a line of its own, also after the terminal's "^C"
            self.terminate()
            raise
        finally:
            bar.close()
        return [returns[position] for position in range(len(job_overrides))]

    def count_slots(self, configs: Sequence[DictConfig]) -> int:
        """How many workers these jobs get; and which GPUs."""
        self.gpus = find_gpus() if any(map(may_use_gpu, configs)) else []
        if self.n_jobs is not None:
            return self.n_jobs
        wanted = len(self.gpus) * self.jobs_per_gpu or threads.usable_cores()
        return max(1, min(wanted, int(threads.free_memory() / MEMORY_OF_A_JOB)))

    def _compose(self, position: int, number: int, overrides: Sequence[str]) -> Task:
        assert self.hydra_context is not None
        assert self.config is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        return Task(position, number, config, filter_overrides(overrides))

    def _hand_out(self, tasks: "deque[Task]", slots: int) -> None:
        while tasks:
            idle = next((worker for worker in self.workers if worker.task is None), None)
            if idle is None:
                if len(self.workers) >= slots:
                    return
                idle = self._start_worker()
            try:
                idle.connection.send(tasks[0].config)
            except OSError:  # it died idle
                self.workers.remove(idle)
                continue
            idle.task = tasks.popleft()
            self._set_deadline(idle)

    def _set_deadline(self, worker: Worker) -> None:
        worker.deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s

    def _wait(self) -> list[Worker]:
        """The workers whose job has ended, or who have died with it, after a second at most."""
        busy = [worker for worker in self.workers if worker.task]
        ready = wait([end for worker in busy for end in (worker.connection, worker.process.sentinel)], 1.0)
        ended = []
        for worker in busy:
            if worker.connection in ready and self._takes_a_request(worker):
                self._give_threads()
            elif worker.connection in ready or worker.process.sentinel in ready:
                ended.append(worker)
                worker.wanted = worker.threads = 0
            elif worker.deadline is not None and time.monotonic() > worker.deadline:
                self._give_up(worker)
        if ended:
            self._give_threads()
        return ended

    def _takes_a_request(self, worker: Worker) -> bool:
        """Whether what has come from a worker is its job's number of threads."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return False
        worker.outcome = message if isinstance(message, JobReturn) else None
        if worker.outcome is None:
            worker.wanted, worker.deadline = message, None
        return worker.outcome is None

    def _give_threads(self) -> None:
        """Let jobs begin, in the order in which they were handed out, as far as the cores go round."""
        used = sum(worker.threads for worker in self.workers)
        for worker in sorted(self.workers, key=lambda worker: worker.task.number if worker.task else 0):
            if worker.wanted == 0:
                continue
            if self.n_jobs is None and used and used + worker.wanted > threads.usable_cores():
                return  # nor any after it, or a large job would wait for ever
            with contextlib.suppress(OSError):  # it has died: its sentinel tells
                worker.connection.send(True)
            worker.threads, worker.wanted = worker.wanted, 0
            used += worker.threads
            self._set_deadline(worker)

    def _give_up(self, worker: Worker) -> None:
        """Ask a worker to leave, and the next time make it."""
        if worker.given_up:
            worker.process.kill()
            worker.deadline = None
        else:
            worker.process.terminate()
            worker.given_up, worker.deadline = True, time.monotonic() + GRACE

    def _start_worker(self) -> Worker:
        assert self.hydra_context is not None
        assert self.task_function is not None
        slot = min(set(range(len(self.workers) + 1)) - {worker.slot for worker in self.workers})
        ours, theirs = multiprocessing.Pipe()
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        task = (self.task_function.__module__, self.task_function.__name__)
        inherited = [worker.connection for worker in self.workers] + [ours] if FORKS else []
        context = multiprocessing.get_context("fork") if FORKS else multiprocessing.get_context("spawn")
        process = context.Process(
            target=work, args=(theirs, os.getpid(), inherited, gpu, task, self.hydra_context)
        )
        self.workers.append(Worker(process, ours, slot))
        process.start()
        theirs.close()
        return self.workers[-1]

    def _collect(self, worker: Worker, task: Task) -> JobReturn:
        """What a worker says of its job; where it says nothing any more, that the job has failed."""
        job_return, worker.outcome = worker.outcome, None
        if worker.given_up or job_return is None:
            worker.process.join()
            self.workers.remove(worker)
        if job_return is not None:
            return job_return
        code = worker.process.exitcode or 0
        if worker.given_up:
            error = f"given up: it took more than hydra.launcher.timeout_s={self.timeout_s:g}"
        elif code < 0:
            error = f"its process was killed by {signal.Signals(-code).name}"
            error += " (out of memory?)" if code == -KILLED else ""
        else:
            error = f"its process left with code {code}"
        status = read(task.job_dir) or Status(overrides=list(task.overrides), started=time.time())
        if worker.given_up or not (status.state == "interrupted" and code in (130, 143)):
            status.state, status.error = "failed", error
            status.seconds = round(time.time() - status.started, 3)
            with contextlib.suppress(OSError):
                task.job_dir.mkdir(parents=True, exist_ok=True)
                status.write(task.job_dir)
        return failure(error, task)

    def _tell(self, task: Task) -> None:
        from mnist_lightning.sweeps.report import tell_job

        with contextlib.suppress(OSError):
            tell_job(task.job_dir)

    def terminate(self) -> None:
        """Stop all workers: they save where they stand."""
        for worker in self.workers if hasattr(os, "setpgid") else ():  # else Ctrl-C has reached them too
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


def work(
    connection: Connection,
    parent: int,
    inherited: Sequence[Connection],
    gpu: str | None,
    task: tuple[str, str],
    hydra_context: HydraContext,
) -> None:
    """A worker's life, in a process of its own: forked, or begun anew with what can be pickled.

    Args:
        connection: to the parent: jobs come in, their numbers of threads and outcomes go out.
        parent: its process.
        inherited: ends of pipes that a fork has copied.
        gpu: the only one that its jobs see; None: they see all.
        task: module and name of what Hydra runs.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which tells its workers once
    for end in inherited:
        end.close()
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    if gpu is not None:  # before torch looks for them
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if not FORKS:
        begin()
        signals.install()
        setup_globals()
    module, name = task
    task_function = getattr(importlib.import_module(module), name).__wrapped__

    def ask(number: int) -> None:
        connection.send(number)
        connection.recv()

    threads.ask = ask
    while (config := connection.recv()) is not None:
        connection.send(run_task(config, task_function, hydra_context))


def run_task(config: DictConfig, task_function: TaskFunction, hydra_context: HydraContext) -> JobReturn:
    task = Task(0, config.hydra.job.num, config, [])
    try:
        task.job_dir.mkdir(parents=True, exist_ok=True)
        redirect_output(task.job_dir / "output.log")
        job_return = run_job(
            hydra_context=hydra_context,
            task_function=task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    except Exception as error:  # the folder or the log file can't be made
        return failure(f"{type(error).__name__}: {error}", task)
    job_return.cfg = job_return.hydra_cfg = None  # not used
    return job_return


def leave_with(parent: int) -> None:
    """End this process when its parent is gone; what it does is saved first if that is quick."""
    starter = multiprocessing.parent_process()
    if FORKS or starter is None:  # workers forked later hold the pipe that would tell
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        starter.join()
        signal.raise_signal(signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def redirect_output(path: Path) -> None:
    """Send what a job prints to a file: the terminal would show several jobs' lines at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def may_use_gpu(config: DictConfig) -> bool:
    return OmegaConf.select(config, "trainer.accelerator") in ("auto", "gpu", "cuda", None)


def find_gpus() -> list[str]:
    """GPUs for child processes, each as a value of ``CUDA_VISIBLE_DEVICES``, counted without torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(index) for index in range(sum(line.startswith(b"GPU ") for line in listed.splitlines()))]
