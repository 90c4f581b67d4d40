"""Tests of how many jobs of a sweep run at a time, on which cores and GPUs, and when a job is stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Once, Run
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.types import HydraContext
from omegaconf import OmegaConf
from test_sweeps import FAULT, FAULTS, TINY, find_sweep, read_statuses

from mnist_lightning import threads
from mnist_lightning.config import ConfigError
from mnist_lightning.rundir.checkpoint import load
from mnist_lightning.sweeps.auto import AutoLauncher
from mnist_lightning.sweeps.grid import check_sweeper
from mnist_lightning.sweeps.processes import ProcessesLauncher, find_gpus

WITNESS = (
    "+callbacks.witness._target_=faults.Witness",
    "+callbacks.witness.file='${run_dir:}/witness.json'",
)
CORES = threads.usable_cores()


def read_witnesses(sweep: Path) -> dict[int, dict[str, Any]]:
    return {int(path.parent.name): json.loads(path.read_text()) for path in sweep.glob("*/witness.json")}


def make(accelerator: str = "cpu", trials: int | None = None, **settings: Any) -> AutoLauncher:
    launcher = AutoLauncher(**({"n_jobs": None, "jobs_per_gpu": 1, "timeout_s": None} | settings))
    sweeper = {} if trials is None else {"n_jobs": trials}
    config = {"hydra": {"sweeper": sweeper}, "trainer": {"accelerator": accelerator}}
    context: Any = None  # needed only to launch
    assert context is None or isinstance(context, HydraContext)
    launcher.setup(hydra_context=context, task_function=lambda cfg: None, config=OmegaConf.create(config))
    return launcher


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make NVIDIA's program report three GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    lines = [f"GPU {number}: NVIDIA H100 (UUID: GPU-{number})" for number in range(3)]
    program.write_text("#!/bin/sh\n" + "\n".join(f"echo '{line}'" for line in [*lines, "  MIG 1g.10gb"]))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.skipif(CORES == 1, reason="one core: nothing runs side by side")
def test_auto_runs_several_small_jobs_at_a_time_and_a_single_one_here() -> None:
    assert isinstance(make().choose(2), ProcessesLauncher)
    assert isinstance(make().choose(1), BasicLauncher)
    assert isinstance(make(trials=1).choose(1), BasicLauncher), "a search: one trial at a time"
    assert isinstance(make(trials=2).choose(1), ProcessesLauncher), "the last trial of an interrupted search"
    assert isinstance(make(n_jobs=1).choose(9), BasicLauncher)
    assert isinstance(make(n_jobs=2).choose(9), ProcessesLauncher)
    assert isinstance(make(timeout_s=60).choose(1), ProcessesLauncher)


def test_auto_keeps_to_its_choice() -> None:
    """A process that has trained must not be forked."""
    launcher = make()
    assert launcher.choose(1) is launcher.choose(9)
    launcher = make(n_jobs=2)
    assert launcher.choose(9) is launcher.choose(1)


@pytest.mark.linux("the affinity of a process")
@pytest.mark.slow
def test_auto_runs_one_job_at_a_time_where_more_would_not_do(
    monkeypatch: pytest.MonkeyPatch, gpus: None, python: Run
) -> None:
    assert isinstance(make("auto").choose(9), ProcessesLauncher), "three GPUs"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert isinstance(make("auto").choose(9), BasicLauncher), "one GPU"
    assert isinstance(make("auto", jobs_per_gpu=2).choose(9), ProcessesLauncher)
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import test_launchers\n"
        "print(type(test_launchers.make().choose(9)).__name__)"
    )
    done = python("-c", code, cwd=Path(__file__).parent)
    assert done.stdout == "BasicLauncher\n", f"one core: {done.stderr}"


@pytest.mark.linux("control groups")
def test_auto_heeds_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    for folder in threads.control_groups("memory"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text("2000000000\n")
        (folder / "memory.current").write_text("700000000\n")
        (folder / "memory.stat").write_text("inactive_file 0\n")
    assert isinstance(make().choose(9), BasicLauncher)


@pytest.mark.posix("a shell's script in place of nvidia-smi")
def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch, gpus: None) -> None:
    assert find_gpus() == ["0", "1", "2"]
    for visible, names in (("2,0", ["2", "0"]), ("", []), ("-1", []), ("GPU-8,-1,1", ["GPU-8"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_gpus() == names
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_gpus() == []


@pytest.mark.posix("a shell's script in place of nvidia-smi")
@pytest.mark.slow
def test_each_worker_sees_a_gpu_of_its_own(command: Run, tmp_path: Path, gpus: None) -> None:
    """Each job sees its own CUDA_VISIBLE_DEVICES; without CUDA in torch, the jobs still train, on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("these GPUs are not there")
    done = command(
        *("train", "-m", "seed=1,2,3,4", "hydra.launcher.jobs_per_gpu=1", "+callbacks.witness.rest=0.5"),
        *(*WITNESS, *TINY),
        cwd=tmp_path,
        **FAULTS,
        PATH=os.environ["PATH"],
    )
    assert done.returncode == 0, done.stderr
    assert "4 jobs, 3 at a time" in done.stdout
    seen = read_witnesses(find_sweep(tmp_path))
    assert {one["gpu"] for one in seen.values()} == {"0", "1", "2"}
    by_process = {(one["process"], one["gpu"]) for one in seen.values()}
    assert len(by_process) == 3, "a worker keeps its GPU"


@pytest.mark.skipif(CORES == 1, reason="one core: nothing runs side by side")
@pytest.mark.slow
def test_a_large_job_has_the_cores_to_itself(command: Run, tmp_path: Path) -> None:
    done = command(
        *("train", "-m", "model.hidden=8,16,[1024,1024],9", "+callbacks.witness.rest=1", *WITNESS, *TINY),
        cwd=tmp_path,
        OMP_NUM_THREADS=str(CORES),
        **FAULTS,
    )
    assert done.returncode == 0, done.stderr
    assert f"4 jobs, {min(CORES, 4)} at a time" in done.stdout
    seen = read_witnesses(find_sweep(tmp_path))
    assert [seen[number]["threads"] for number in range(4)] == [1, 1, CORES, 1]
    large = seen.pop(2)
    assert all(one["ended"] < large["begun"] or large["ended"] < one["begun"] for one in seen.values())
    assert any(
        one["begun"] < other["begun"] < one["ended"]
        for one in seen.values()
        for other in seen.values()
        if one is not other
    ), "small ones run side by side"
    statuses = read_statuses(find_sweep(tmp_path))
    assert all(status["seconds"] < large["ended"] - large["begun"] + 60 for status in statuses.values())


@pytest.mark.slow
def test_each_way_of_launching_gives_the_same_weights(command: Run, tmp_path: Path) -> None:
    """Weights are equal to the bit, for a small and a large net, without a given number of threads."""
    nets, metrics = [], []
    for launcher in ("basic", "processes", "auto", "submitit_local"):
        done = command(
            *("train", "-m", f"hydra/launcher={launcher}", "model.hidden=8,[1024,512]", "model.dropout=0.2"),
            *(f"hydra.sweep.dir={launcher}", *TINY),
            cwd=tmp_path,
            OMP_NUM_THREADS=str(CORES),
        )
        assert done.returncode == 0, done.stderr
        jobs = [tmp_path / launcher / str(number) for number in range(2)]
        assert [json.loads((job / "metrics.json").read_text())["threads"] for job in jobs] == [1, CORES]
        statuses = read_statuses(tmp_path / launcher)
        assert [statuses[number]["state"] for number in range(2)] == ["completed", "completed"]
        told = [statuses[number]["metrics"] for number in range(2)]
        metrics.append([{key: one[key] for key in one if key != "train_seconds"} for one in told])
        assert len((tmp_path / launcher / "results.csv").read_text().splitlines()) == 3
        nets.append([load(job / "checkpoints" / "last.ckpt")["state_dict"] for job in jobs])
    assert all(other == metrics[0] for other in metrics)
    for other in nets[1:]:
        for one, two in zip(nets[0], other, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_job_that_hangs_is_given_up(command: Run, tmp_path: Path) -> None:
    kinds = ["hang", "'hang, deaf to SIGTERM'", "none"]
    done = command(
        *("train", "-m", FAULT, f"+callbacks.fault.kind={','.join(kinds)}", "hydra.launcher.n_jobs=3"),
        *("hydra.launcher.timeout_s=12", *TINY),
        cwd=tmp_path,
        **FAULTS,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "2 of 3 jobs did not finish: 0, 1"
    assert "Traceback" not in done.stdout + done.stderr
    statuses = read_statuses(find_sweep(tmp_path))
    assert [statuses[number]["state"] for number in range(3)] == ["failed", "failed", "completed"]
    for number in range(2):
        assert "stopped: it took more than hydra.launcher.timeout_s=12" in statuses[number]["error"]
        assert statuses[number]["error"] in (find_sweep(tmp_path) / "report.md").read_text()


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("n_jobs=0", "hydra.launcher.n_jobs must be a whole number >= 1, got 0"),
        ("n_jobs=two", "hydra.launcher.n_jobs must be a whole number >= 1, got two"),
        ("jobs_per_gpu=0.5", "hydra.launcher.jobs_per_gpu must be a whole number >= 1, got 0.5"),
        ("jobs_per_gpu=null", "hydra.launcher.jobs_per_gpu must be a whole number >= 1, got None"),
        ("timeout_s=-1", "hydra.launcher.timeout_s must be a finite number > 0, got -1"),
        ("timeout_s=.inf", "hydra.launcher.timeout_s must be a finite number > 0, got .inf"),
    ],
)
@pytest.mark.parametrize("launcher", ["auto", pytest.param("processes", marks=pytest.mark.slow)])
def test_wrong_numbers_are_told_in_a_line(
    argument: str, line: str, launcher: str, command: Run, tmp_path: Path
) -> None:
    more = (f"hydra/launcher={launcher}", f"hydra.launcher.{argument}")
    done = command("train", "-m", "seed=1,2", *more, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == line
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("logs/train/multiruns/*"))


SWEEPER = {
    "max_batch_size": [0, -1, 0.5, "text", True],
    "n_trials": [0, None, "text", 1.5, [1], 10**20],
    "n_jobs": [0, "text", True],
    "seed": [-1, None, "text", 2**32],
    "storage": ["", 1, {"a": 1}],
    "study_name": ["", None, 1],
    "sampler": [None, "text", {"a": 1}],
    "params": ["text", [1], 1],
}


def test_a_sweepers_own_settings_have_types_and_limits() -> None:
    for key, values in SWEEPER.items():
        for value in values:
            config = OmegaConf.create({"hydra": {"sweeper": {key: value}}})
            with pytest.raises(ConfigError, match=rf"^hydra\.sweeper\.{key} must be .*, got "):
                check_sweeper(config)
    for plain in ("grid", "optuna"):
        file = REPOSITORY / "conf" / "hydra" / "sweeper" / f"{plain}.yaml"
        check_sweeper(OmegaConf.create({"hydra": {"sweeper": OmegaConf.load(file)}}))


ONE_WORKER = ("hydra.launcher.n_jobs=1", "hydra.launcher.timeout_s=600")  # each worker imports torch


def sweep_on_a_terminal(cwd: Path, environment: dict[str, str], *settings: str) -> tuple[int, str]:
    """Run a sweep in a new interpreter on a terminal, and return its exit code and output.

    The last line of the output names the heavy packages that the interpreter itself has imported.
    """
    code = (
        "import sys; from mnist_lightning import train; train.main()\n"
        "print('imported', sorted({'torch', 'lightning', 'torchvision'} & set(sys.modules)))"
    )
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    sweeping = subprocess.Popen(
        [sys.executable, "-c", code, "-m", *settings, *TINY],
        cwd=cwd,
        env=environment,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # on Linux: the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return sweeping.wait(), shown.decode()


@pytest.fixture
def grid_on_a_terminal(once: Once, environment: dict[str, str]) -> tuple[int, str]:
    def make(cwd: Path) -> None:
        told = sweep_on_a_terminal(cwd, environment, "seed=1,2", *ONE_WORKER)
        (cwd / "told.json").write_text(json.dumps(told))

    code, shown = json.loads((once("terminal", make) / "told.json").read_text())
    return code, shown


@pytest.mark.posix("pseudo-terminals")
@pytest.mark.slow
def test_the_parent_of_a_sweep_never_imports_torch(grid_on_a_terminal: tuple[int, str]) -> None:
    """The parent forks its workers, and a process with threads or a GPU must not be forked."""
    code, shown = grid_on_a_terminal
    assert code == 0, shown
    assert shown.splitlines()[-1] == "imported []"


@pytest.mark.posix("pseudo-terminals")
@pytest.mark.slow
def test_the_parent_of_a_search_never_imports_torch(environment: dict[str, str], tmp_path: Path) -> None:
    settings = ("search=mlp", "hydra.sweeper.n_trials=2", *ONE_WORKER)
    code, shown = sweep_on_a_terminal(tmp_path, environment, *settings)
    assert code == 0, shown
    assert shown.splitlines()[-1] == "imported []"


@pytest.mark.posix("pseudo-terminals")
def test_on_a_terminal_a_bar_tells_how_many_jobs_are_done(grid_on_a_terminal: tuple[int, str]) -> None:
    code, text = grid_on_a_terminal
    assert code == 0, text
    assert "jobs:" in text
    assert "1/2" in text
    assert [line.count("completed") for line in text.splitlines() if "job   0" in line] == [1], "a line a job"
