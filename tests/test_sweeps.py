"""Tests of whole sweeps: failures, interruptions, resumption, launchers and searches."""

import csv
import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import Run, Start
from processes import PATIENCE, wait_for

from mnist_lightning.rundir.checkpoint import load
from mnist_lightning.sweeps.results import read_sweep
from mnist_lightning.sweeps.study import open_storage

TINY = ("trainer.max_epochs=2", "+trainer.limit_train_batches=10", "data.val_size=500", "logger=csv")
FAULTS = {"PYTHONPATH": str(Path(__file__).parent)}
FAULT = "+callbacks.fault._target_=faults.Fault"


def find_sweep(cwd: Path) -> Path:
    (sweep,) = (cwd / "logs" / "train" / "multiruns").iterdir()
    return sweep


def read_statuses(sweep: Path) -> dict[int, dict[str, Any]]:
    return {int(path.parent.name): json.loads(path.read_bytes()) for path in sweep.glob("*/status.json")}


def find_children(pid: int) -> list[int]:
    if not os.path.isdir(f"/proc/{os.getpid()}/task"):
        pytest.skip("looks for processes in /proc")
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(Path("/proc", str(pid)).exists() for pid in pids):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


ERRORS = {
    "raise": "RuntimeError: something broke",
    "exit": "something called sys.exit(0)",
    "diverge": "train/loss is nan",
    "disk": "No space left on device",
    "memory": "memory is used up",
    "kill": "killed by SIGKILL",
}


@pytest.mark.posix("SIGKILL and /dev/full")
@pytest.mark.parametrize("launcher", [pytest.param("basic", marks=pytest.mark.slow), "processes"])
def test_a_failure_is_its_jobs_own(command: Run, tmp_path: Path, launcher: str) -> None:
    kinds = ["raise", "exit", "diverge", "disk", "memory", "none"]
    if launcher == "processes":
        kinds.insert(0, "kill")
    done = command(
        "train",
        "-m",
        f"hydra/launcher={launcher}",
        *(["hydra.launcher.n_jobs=2"] if launcher == "processes" else []),
        FAULT,
        f"+callbacks.fault.kind={','.join(kinds)}",
        *TINY,
        cwd=tmp_path,
        **FAULTS,
    )
    sweep = find_sweep(tmp_path)
    statuses = read_statuses(sweep)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{len(kinds) - 1} of {len(kinds)} jobs did not finish")
    assert "Traceback" not in done.stdout + done.stderr
    assert [statuses[number]["state"] for number in range(len(kinds))] == (
        ["failed"] * (len(kinds) - 1) + ["completed"]
    )
    with (sweep / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["callbacks.fault.kind"] for row in rows] == kinds
    report = (sweep / "report.md").read_text()
    for number, kind in enumerate(kinds[:-1]):
        assert ERRORS[kind] in statuses[number]["error"]
        assert ERRORS[kind] in rows[number]["error"]
        assert ERRORS[kind] in report
        if kind not in ("kill", "diverge"):  # a killed job can't write; divergence is no error in the code
            assert "Traceback" in (sweep / str(number) / "train.log").read_text()
    assert float(rows[-1]["val/acc"]) == statuses[len(kinds) - 1]["metrics"]["val/acc"]


@pytest.mark.parametrize("launcher", [pytest.param("basic", marks=pytest.mark.slow), "processes"])
def test_a_job_without_room_for_its_folder_is_its_own_affair(
    command: Run, tmp_path: Path, launcher: str
) -> None:
    sweep = tmp_path / "sweep"
    (sweep / "1").mkdir(parents=True)
    (sweep / "0").touch()  # prevents a folder from being made here
    (sweep / "1" / ".hydra").touch()  # and here, for the job's settings
    done = command(
        *("train", "-m", "seed=1,2,3", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep", *TINY),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "2 of 3 jobs did not finish: 1, 0"
    assert {number: status["state"] for number, status in read_statuses(sweep).items()} == {
        1: "failed",
        2: "completed",
    }
    assert "File exists" in (sweep / "report.md").read_text()


def test_a_killed_sweep_goes_on_and_repeats_nothing(start: Start, command: Run, tmp_path: Path) -> None:
    sweeping = start(
        "train",
        "-m",
        "hydra/launcher=processes",
        "hydra.launcher.n_jobs=2",
        "seed=1,2",
        "+trainer.limit_train_batches=20,400",  # the first job ends long before the second
        "trainer.max_epochs=4",
        "data.val_size=500",
        "model.hidden=16",
        "logger=csv",
        cwd=tmp_path,
    )
    root = tmp_path / "logs" / "train" / "multiruns"

    def one_done_and_one_under_way() -> bool:
        statuses = read_statuses(find_sweep(tmp_path)) if root.is_dir() and any(root.iterdir()) else {}
        under_way = [number for number, status in statuses.items() if status["state"] == "running"]
        return any(status["state"] == "completed" for status in statuses.values()) and any(
            (find_sweep(tmp_path) / str(number) / "checkpoints" / "last.ckpt").exists()
            for number in under_way
        )

    wait_for(one_done_and_one_under_way, sweeping)
    workers = find_children(sweeping.pid)
    assert len(workers) == 2
    sweeping.kill()
    sweeping.communicate()
    wait_until_gone(workers)

    sweep = find_sweep(tmp_path)
    before = read_statuses(sweep)
    completed = {number for number, status in before.items() if status["state"] == "completed"}
    assert 0 < len(completed) < 4
    report = command("report", "run=latest", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert "interrupted" in (sweep / "report.md").read_text()

    other = command("train", "-m", "resume=latest", "trainer.max_epochs=7", cwd=tmp_path)
    assert other.returncode != 0
    assert "trainer.max_epochs=7: its command has trainer.max_epochs=4" in other.stderr

    saved = (sweep / "multirun.yaml").read_bytes()
    done = command("train", "-m", "resume=latest", "hydra/launcher=basic", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = read_statuses(sweep)
    assert {status["state"] for status in after.values()} == {"completed"}
    assert sorted(after) == [0, 1, 2, 3]
    assert all(after[number] == before[number] for number in completed)
    assert (sweep / "multirun.yaml").read_bytes() == saved
    continued = [
        number
        for number in after
        if "resuming from" in (sweep / str(number) / "train.log").read_text() and number not in completed
    ]
    assert continued
    for number in continued:  # the curve of an interrupted job is whole
        with (sweep / str(number) / "csv" / "metrics.csv").open() as file:
            epochs = [row["epoch"] for row in csv.DictReader(file) if row["val/acc"]]
        assert epochs == ["1", "2", "3", "4"]

    again = command("train", "-m", "resume=latest", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert read_statuses(sweep) == after


@pytest.mark.parametrize("launcher", [pytest.param("basic", marks=pytest.mark.slow), "processes"])
def test_sigterm_ends_the_sweep(start: Start, tmp_path: Path, launcher: str) -> None:
    sweeping = start(
        "train",
        "-m",
        f"hydra/launcher={launcher}",
        "seed=1,2,3",
        "trainer.max_epochs=500",
        "checkpoint.every_n_steps=10",
        "logger=csv",
        cwd=tmp_path,
    )
    checkpoint = "logs/train/multiruns/*/0/checkpoints/last.ckpt"
    wait_for(lambda: any(tmp_path.glob(checkpoint)), sweeping)
    sweeping.terminate()
    _, errors = sweeping.communicate()
    assert sweeping.returncode == 143, errors
    assert "-m resume=" in errors
    sweep = find_sweep(tmp_path)
    assert read_statuses(sweep)[0]["state"] == "interrupted"
    assert "interrupted" in (sweep / "results.csv").read_text()


@pytest.mark.slow
def test_a_job_of_a_cluster_is_requeued_and_a_lost_one_is_told(
    start: Start, command: Run, tmp_path: Path
) -> None:
    """submitit simulates the cluster.  Its signal saves the newest step and queues the job again.  After a
    SIGKILL the sweep is resumed.  In the end the weights equal those of an undisturbed job."""
    settings = (
        *("seed=1", "model.hidden=16", "model.dropout=0.2", "logger=none"),
        *("trainer.max_epochs=6", "+trainer.limit_train_batches=300"),
    )
    basic = "hydra/launcher=basic"
    whole = command("train", "-m", *settings, basic, "hydra.sweep.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    launcher = "hydra/launcher=submitit_local"
    sweeping = start("train", "-m", *settings, launcher, "hydra.sweep.dir=sweep", cwd=tmp_path)
    job = tmp_path / "sweep" / "0"
    last = job / "checkpoints" / "last.ckpt"
    wait_for(last.exists, sweeping)
    (controller,) = find_children(sweeping.pid)
    (worker,) = find_children(controller)
    os.kill(worker, signal.SIGTERM)  # as SLURM does before a pre-emption; it must not end the job
    os.kill(worker, signal.SIGUSR2)
    wait_for(lambda: find_children(controller) not in ([worker], []), sweeping)
    assert read_statuses(tmp_path / "sweep")[0]["state"] in ("interrupted", "running")
    wait_for(lambda: "resuming from" in (job / "train.log").read_text(), sweeping)
    saved = time.time()
    wait_for(lambda: last.exists() and last.stat().st_mtime > saved, sweeping)
    os.kill(find_children(controller)[0], signal.SIGKILL)
    _, errors = sweeping.communicate()
    assert sweeping.returncode == 1
    assert "a job has ended without a result (its process is gone)" in errors
    assert "Traceback" not in errors
    done = command("train", "-m", "resume=sweep", basic, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (job / "train.log").read_text().count("resuming from") == 2
    nets = [
        load(tmp_path / name / "0" / "checkpoints" / "last.ckpt")["state_dict"] for name in ("whole", "sweep")
    ]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


@pytest.mark.slow
def test_seeds_alone_need_no_validation_images(command: Run, tmp_path: Path) -> None:
    """experiment=record_ensemble is a sweep, and its nets are evaluated together by the command in its report."""
    small = ("model.hidden=[16]", "trainer.max_epochs=1", "+trainer.limit_train_batches=8")
    done = command("train", "experiment=record_ensemble", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "logs" / "train" / "multiruns").iterdir()
    assert [json.loads((sweep / job / "metrics.json").read_text())["seed"] for job in "012"] == [1, 2, 3]
    assert all("test/acc" not in json.loads((sweep / job / "metrics.json").read_text()) for job in "012")
    (line,) = (line for line in (sweep / "report.md").read_text().splitlines() if "evaluate" in line)
    assert line in done.stdout
    together = command("evaluate", *shlex.split(line)[3:], cwd=tmp_path)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("checkpoint ") == 3
    assert "10,000 of mnist test" in together.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("data.val_size=0", "model.hidden=16,32"), "data.val_size=0 leaves no validation split"),
        (("model.dropout=0.1,1.5",), "model.dropout must be in [0, 1), got 1.5"),
        (("trainer=ddp", "seed=1,2"), "trainer=ddp can't be part of a multirun"),
        (("search=mlp", "optimizer.lr=interval(-1,1)"), "optimizer.lr must be a finite number > 0"),
        (
            ("search=mlp", "hydra.sweeper.n_trials=0"),
            "hydra.sweeper.n_trials must be a whole number >= 1, got 0",
        ),
        (
            ("hydra/launcher=processes", "hydra.launcher.n_jobs=0", "seed=1,2"),
            "n_jobs must be a whole number >= 1, got 0",
        ),
        (("resume=latest",), "there is no sweep under"),
    ],
)
def test_mistakes_are_told_before_the_first_job(
    command: Run, tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    done = command("train", "-m", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("logs/train/multiruns/*"))


def test_a_search_records_prunes_and_resumes(start: Start, command: Run, tmp_path: Path) -> None:
    settings = (
        "search=mlp",
        "hydra.sweeper.params=null",
        "hydra.sweeper.seed=51",  # the first trials are good
        "model.hidden=16",
        "optimizer.lr=choice(3e-3,1e-8,1e30)",
        "callbacks.pruning.pruner.n_startup_trials=1",
        "callbacks.pruning.pruner.n_warmup_steps=0",
        *TINY,
    )
    searching = start("train", "-m", *settings, "hydra.sweeper.n_trials=8", cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("logs/train/multiruns/*/*/status.json"))) >= 3, searching)
    searching.kill()
    searching.communicate()
    sweep = find_sweep(tmp_path)
    done = command("train", "-m", "resume=latest", cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # some jobs have failed
    assert "jobs did not finish" in done.stderr

    study = optuna.load_study(study_name=None, storage=open_storage(str(sweep / "optuna.journal")))
    statuses = read_statuses(sweep)
    assert len(study.trials) == 8
    assert sorted(statuses) == list(range(8))
    states = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed"}
    for trial in study.trials:
        status = statuses[trial.number]
        assert status["state"] == states[trial.state.name]
        assert f"optimizer.lr={trial.params['optimizer.lr']}" in status["overrides"]
        if trial.state.name == "COMPLETE":
            assert trial.value == status["metrics"]["val/acc"]
        if trial.params["optimizer.lr"] == "1e+30":
            assert trial.state.name == "FAIL"
            assert "nan" in trial.user_attrs["error"]
    assert {trial.state.name for trial in study.trials} == set(states)

    more = command("train", "-m", "resume=latest", "hydra.sweeper.n_trials=9", cwd=tmp_path)
    assert more.returncode == 1
    assert sorted(read_statuses(sweep)) == list(range(9))


@pytest.mark.slow
def test_a_search_takes_what_its_study_holds(command: Run, tmp_path: Path) -> None:
    """A trial that a kill left without its folder goes on, enqueued ones come first, and count like others."""
    settings = ("search=mlp", "hydra.sweeper.params=null", "model.hidden=choice(8,9)", *TINY)
    limit = "trainer.max_epochs=1"
    done = command(
        *("train", "-m", *settings, "hydra.sweeper.n_trials=1", limit, "hydra.sweep.dir=s"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    journal = str(tmp_path / "s" / "optuna.journal")
    study = optuna.load_study(study_name=None, storage=open_storage(journal))
    study.ask()
    for value in ("9", "64", "8"):
        study.enqueue_trial({"model.hidden": value})
    done = command("train", "-m", "resume=s", "hydra.sweeper.n_trials=4", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "trial 3 failed  the study gives it other settings: '64' not in ('8', '9')" in done.stdout
    assert done.stderr.splitlines()[-1] == "1 of 4 jobs did not finish: 3"
    study = optuna.load_study(study_name=None, storage=open_storage(journal))
    assert [trial.state.name for trial in study.trials] == [*["COMPLETE"] * 3, "FAIL", "WAITING"]
    assert "model.hidden=9" in read_statuses(tmp_path / "s")[2]["overrides"]
    assert sorted(read_statuses(tmp_path / "s")) == [0, 1, 2]
    done = command("train", "-m", "resume=s", "hydra.sweeper.n_trials=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.hidden=8" in read_statuses(tmp_path / "s")[4]["overrides"]


@pytest.mark.slow
def test_two_processes_share_a_study(start: Start, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    open_storage(storage)  # made once, because Optuna fails if two processes make its tables at the same time
    arguments = (
        *("search=mlp", "hydra.sweeper.params=null", "optimizer.lr=interval(1e-3,1e-2)", "model.hidden=16"),
        f"hydra.sweeper.storage={storage}",
        "hydra.sweeper.n_trials=4",
        *TINY,
    )
    both = [
        start("train", "-m", *arguments, f"hydra.sweep.dir=sweep-{name}", cwd=tmp_path) for name in ("a", "b")
    ]
    for one in both:
        _, errors = one.communicate()
        assert one.returncode == 0, errors
    numbers = [sorted(read_statuses(tmp_path / f"sweep-{name}")) for name in ("a", "b")]
    assert sorted(numbers[0] + numbers[1]) == list(range(4))
    study = optuna.load_study(study_name=None, storage=open_storage(storage))
    finished = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(finished) == 4
    assert os.path.exists(tmp_path / "study.db")


@pytest.mark.parametrize("subdir", ["${hydra.job.num}_x", "${seed}/${hydra.job.num}/run"])
@pytest.mark.slow
def test_jobs_lie_where_the_user_wants_them(subdir: str, command: Run, tmp_path: Path) -> None:
    """Finished jobs are found there, reported and not trained again; a missing job is trained."""
    short = ("model.hidden=8", "+trainer.limit_train_batches=3", "trainer.max_epochs=1", "logger=none")
    folders = (f"hydra.sweep.subdir={subdir}", "hydra.sweep.dir=sweep")
    settings = ("seed=1,2", "hydra/launcher=basic")
    done = command("train", "-m", *settings, *short, *folders, cwd=tmp_path)
    names = ["0_x", "1_x"] if "_x" in subdir else ["1/0/run", "2/1/run"]
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    sweep = read_sweep(tmp_path / "sweep")
    assert [job.name for job in sweep.jobs] == names
    assert {job.status.state for job in sweep.jobs} == {"completed"}
    assert "failed" not in done.stdout
    shutil.rmtree(tmp_path / "sweep" / names[0])
    again = command("train", "-m", "resume=sweep", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of 2 jobs have already finished" in again.stdout
    assert [job.name for job in read_sweep(tmp_path / "sweep").jobs] == names


@pytest.mark.parametrize("subdir", ["same", "../${hydra.job.num}"])
def test_jobs_that_would_share_a_folder_are_told_before_the_first(
    subdir: str, command: Run, tmp_path: Path
) -> None:
    done = command("train", "-m", "seed=1,2", f"hydra.sweep.subdir={subdir}", cwd=tmp_path)
    assert done.returncode == 1
    assert "hydra.sweep.subdir gives job" in done.stderr
    assert not list(tmp_path.rglob("status.json"))


def test_a_job_of_a_sweep_goes_on_without_the_test_images(command: Run, tmp_path: Path) -> None:
    """``resume=latest`` skips the job; by its name it continues, without a test."""
    short = ("model.hidden=8", "+trainer.limit_train_batches=3", "trainer.max_epochs=1", "logger=none")
    done = command(
        "train", "-m", "seed=1,2", "hydra/launcher=basic", *short, "hydra.sweep.dir=logs/sweep", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    job = tmp_path / "logs" / "sweep" / "0"
    (job / "metrics.json").unlink()
    (job / "mine" / "checkpoints").mkdir(parents=True)
    shutil.copy(job / "checkpoints" / "last.ckpt", job / "mine" / "checkpoints" / "newest.ckpt")
    done = command("train", "resume=latest", cwd=tmp_path)
    assert done.returncode == 1
    assert "train -m resume=logs/sweep continues the latest" in done.stderr
    done = command("train", "resume=logs/sweep/0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((job / "metrics.json").read_text())
    assert "val/acc" in metrics
    assert "test/acc" not in metrics
