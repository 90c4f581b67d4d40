"""``hydra/launcher=processes``: run several jobs at a time on one machine."""

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

# macOS has fork, but its own libraries do not work in a forked process
FORKS = hasattr(os, "fork") and sys.platform != "darwin"
KILLED = 9  # SIGKILL, which the signal module does not define on every system
GRACE = 8.0  # seconds for a worker to save its job and exit
BAR = "jobs: {n_fmt}/{total_fmt} |{bar:30}| {elapsed}, {remaining} left"
MEMORY_OF_A_JOB = 0.8e9  # bytes for torch, Lightning and a small net, without memory shared by workers


@dataclass
class Task:
    """A job to run.

    Attributes:
        position: its position in the list of results.
        number: its number in the sweep.
        config: its composed config.
        overrides: its overrides, without those of Hydra.
    """

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
    """A worker process and its state.

    Attributes:
        process: the process.
        connection: the parent's end of the pipe.
        slot: the worker's number, from 0, which selects its GPU.
        task: the job that it runs; None: it is idle.
        wanted: the threads that its job has requested and not received yet; 0: none.
        threads: the threads that its job has received; 0: the job does not compute yet.
        deadline: the time (``time.monotonic``) at which its job is stopped, or at which a worker that was
            asked to exit is killed; None: never.
        given_up: whether the worker was asked to exit because its job took too long.
        outcome: the result of its job; None until the worker has sent it.
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
    """Run jobs in worker processes, which import torch once and then run one job after the other.

    The workers are started before anything heavy is imported.  If a worker dies, only its own job fails, and
    another worker takes its place.  If the parent process is gone, workers save their jobs and exit within
    ``GRACE`` + 1 seconds.

    When a job has built its net, it requests the threads that it needs.  Unless ``n_jobs`` is given, it waits
    until that many cores are free: a large job runs alone, small ones run side by side.

    Args:
        n_jobs: the number of workers; None: one for each usable core, or ``jobs_per_gpu`` for each GPU if
            jobs run on GPUs; fewer if the memory is too small.
        jobs_per_gpu: the number of workers for each GPU; a worker sees only its own GPU.
        timeout_s: stop a job this many seconds after its start, counted again from when it receives its
            threads; None: never.
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
        atexit.register(self.close)  # runs before multiprocessing's own handler, which would wait for workers

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
            bar.leave = True  # so that the next message, or the terminal's "^C", gets a line of its own
            self.terminate()
            raise
        finally:
            bar.close()
        return [returns[position] for position in range(len(job_overrides))]

    def count_slots(self, configs: Sequence[DictConfig]) -> int:
        """Return the number of workers for these jobs, and find the GPUs to use."""
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
            except OSError:  # the idle worker has died
                self.workers.remove(idle)
                continue
            idle.task = tasks.popleft()
            self._set_deadline(idle)

    def _set_deadline(self, worker: Worker) -> None:
        worker.deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s

    def _wait(self) -> list[Worker]:
        """Wait for at most a second, and return the workers whose job has ended or who have died."""
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
        """Receive a worker's message, and tell whether it is a request for threads."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return False
        worker.outcome = message if isinstance(message, JobReturn) else None
        if worker.outcome is None:
            worker.wanted, worker.deadline = message, None
        return worker.outcome is None

    def _give_threads(self) -> None:
        """Let waiting jobs begin, in the order of their numbers, while enough cores are free."""
        used = sum(worker.threads for worker in self.workers)
        for worker in sorted(self.workers, key=lambda worker: worker.task.number if worker.task else 0):
            if worker.wanted == 0:
                continue
            if self.n_jobs is None and used and used + worker.wanted > threads.usable_cores():
                return  # later jobs wait, too; otherwise a large job could wait for ever
            with contextlib.suppress(OSError):  # the worker has died, which _wait will notice
                worker.connection.send(True)
            worker.threads, worker.wanted = worker.wanted, 0
            used += worker.threads
            self._set_deadline(worker)

    def _give_up(self, worker: Worker) -> None:
        """Ask a worker to exit; at the second call, kill it."""
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
        """Return the result of a worker's job; if the worker died or took too long, the job has failed."""
        job_return, worker.outcome = worker.outcome, None
        if worker.given_up or job_return is None:
            worker.process.join()
            self.workers.remove(worker)
        if job_return is not None:
            return job_return
        code = worker.process.exitcode or 0
        if worker.given_up:
            error = f"stopped: it took more than hydra.launcher.timeout_s={self.timeout_s:g}"
        elif code < 0:
            error = f"its process was killed by {signal.Signals(-code).name}"
            error += " (out of memory?)" if code == -KILLED else ""
        else:
            error = f"its process exited with code {code}"
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
        """Stop all workers; they save their jobs first."""
        for worker in self.workers if hasattr(os, "setpgid") else ():  # otherwise they got the Ctrl-C, too
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
    """Run a worker, in a process that was forked or spawned.

    Args:
        connection: the pipe to the parent: configs of jobs come in; requests for threads and results go out.
        parent: the process id of the parent.
        inherited: ends of pipes of other workers, which a fork has copied, to be closed.
        gpu: the only GPU that its jobs see; None: they see all.
        task: the module and the name of the function that Hydra runs.
        hydra_context: Hydra's loader and callbacks.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # so that Ctrl-C reaches only the parent, which signals its workers once
    for end in inherited:
        end.close()
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    if gpu is not None:  # must be set before torch is imported
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
    """End this process when its parent is gone, after up to ``GRACE`` seconds to save its job."""
    starter = multiprocessing.parent_process()
    if FORKS or starter is None:  # workers forked later keep open the pipe that join() waits for
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        starter.join()
        signal.raise_signal(signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def redirect_output(path: Path) -> None:
    """Send a job's output to a file, because lines of several jobs would mix on the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def may_use_gpu(config: DictConfig) -> bool:
    return OmegaConf.select(config, "trainer.accelerator") in ("auto", "gpu", "cuda", None)


def find_gpus() -> list[str]:
    """Find GPUs without torch; return a value of ``CUDA_VISIBLE_DEVICES`` for each."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(index) for index in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]
