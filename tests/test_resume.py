"""A run that is killed or stopped at any moment, and resumed, ends like one that was not."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NO_PICTURES, DefaultRun, Once, Run, Start
from processes import Process, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lightning.rundir.atomic import TEMPORARY
from mnist_lightning.rundir.checkpoint import find_newest, load
from mnist_lightning.rundir.status import read

SETTINGS = (
    *("trainer.max_epochs=3", "+trainer.limit_train_batches=60", "trainer.log_every_n_steps=7"),
    *("model.hidden=32", "model.dropout=0.2", "checkpoint.every_n_steps=5", "test=false"),
)
# values that may differ between a run and its twin
TIMES = ("train_seconds",)


def wait_for_checkpoint(cwd: Path, process: Process) -> None:
    wait_for(lambda: any(cwd.glob("run/checkpoints/*.ckpt")), process)


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    """Return the places at which two nested structures are not equal to the bit."""
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{path}: other keys"]
        return [
            d for key in one if key not in TIMES for d in differences(one[key], two[key], f"{path}/{key}")
        ]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return [f"{path}: other length"]
        return [
            d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differences(a, b, f"{path}/{i}")
        ]
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    return [] if same else [path]


def read_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read TensorBoard's scalars by split and tag."""
    curves = {}
    for split in filter(lambda split: (run / "tensorboard" / split).is_dir(), ("", "train", "val", "test")):
        events = EventAccumulator(str(run / "tensorboard" / split), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            curves[f"{split}:{tag}"] = [(event.step, event.value) for event in events.Scalars(tag)]
    return curves


def assert_twins(one: Path, two: Path) -> None:
    a, b = (load(run / "checkpoints" / "last.ckpt") for run in (one, two))
    assert differences(a, b) == []
    assert (one / "csv" / "metrics.csv").read_text() == (two / "csv" / "metrics.csv").read_text()
    assert read_scalars(one) == read_scalars(two)


def kill_and_resume(
    more: tuple[str, ...], kills: int, seed: int, folder: Path, command: Run, start: Start, once: Once
) -> None:
    """Kill a run at random moments and resume it each time; in the end it equals its twin."""

    def make(cwd: Path) -> None:
        done = command("train", *SETTINGS, *more, "hydra.run.dir=run", cwd=cwd)
        assert done.returncode == 0, done.stderr

    twin = once("-".join(["twin", *more]), make) / "run"
    generator = random.Random(seed)
    process = start("train", *SETTINGS, *more, "hydra.run.dir=run", cwd=folder)
    for _ in range(kills):
        wait_for_checkpoint(folder, process)
        time.sleep(generator.uniform(0, 1.0))
        process.kill()
        process.wait()
        process = start("train", "resume=run", cwd=folder)
        if kills > 1:
            time.sleep(generator.uniform(0, 3))  # some kills come during start-up
    assert process.wait() == 0, process.stderr
    assert_twins(twin, folder / "run")
    assert not list(folder.rglob(".writing-*"))


@pytest.mark.parametrize(
    "more",
    [(NO_PICTURES,), pytest.param(("scheduler=onecycle", "data.num_workers=2"), marks=pytest.mark.slow)],
    ids=["cosine", "onecycle, 2 workers"],
)
def test_killed_and_resumed(more, tmp_path, command, start, once) -> None:  # type: ignore[no-untyped-def]
    kill_and_resume(more, 1, 1, tmp_path, command, start, once)


@pytest.mark.reliability
@pytest.mark.parametrize("number", range(20))
def test_killed_at_20_moments(number, tmp_path, command, start, once) -> None:  # type: ignore[no-untyped-def]
    variants = [
        (),
        ("scheduler=onecycle",),
        ("data.num_workers=2",),
        ("scheduler=plateau", "model.norm=batch"),
    ]
    kill_and_resume(variants[number % 4], 2, number, tmp_path, command, start, once)


def kill_while_saving(kills: int, cwd: Path, start: Start) -> int:
    """Kill a run each time it writes a checkpoint, with TMPDIR on a file system in memory.

    Returns:
        the number of kills after which a checkpoint could be loaded, and the next process removed all
        incomplete files.
    """
    checkpoints = cwd / "run" / "checkpoints"
    generator, right = random.Random(kills), 0

    def is_writing() -> bool:
        return any(checkpoints.glob(f"{TEMPORARY}*-{process.pid}"))

    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        wide = ("model.hidden=1024", "checkpoint.every_n_steps=1", "trainer.max_epochs=500", "logger=none")
        process = start("train", *SETTINGS, *wide, "hydra.run.dir=run", cwd=cwd, TMPDIR=elsewhere)
        wait_for_checkpoint(cwd, process)
        for _ in range(kills):
            time.sleep(generator.uniform(0, 0.2))
            wait_for(is_writing, process, pause=0.0005)
            process.kill()
            process.wait()
            step = find_newest(checkpoints)[1]["global_step"]
            half = set(cwd.rglob(f"{TEMPORARY}*"))
            assert half, "it was killed while it was writing"
            process = start("train", "resume=run", cwd=cwd, TMPDIR=elsewhere)
            wait_for(is_writing, process, pause=0.0005)
            assert not half & set(cwd.rglob(f"{TEMPORARY}*-*"))
            assert f"step {step}\n" in process.stdout
            right += 1
        process.terminate()
        assert process.wait() == 143
        assert not list(cwd.rglob(f"{TEMPORARY}*"))
        assert not [path for path in Path(elsewhere).rglob("*") if path.is_file()]
    return right


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no file system in memory here")
@pytest.mark.parametrize(
    "kills", [pytest.param(2, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.reliability)]
)
def test_killed_while_saving(kills: int, tmp_path: Path, start: Start) -> None:
    assert kill_while_saving(kills, tmp_path, start) == kills


@pytest.mark.parametrize("apart", [90, pytest.param(7, marks=pytest.mark.reliability)])
@pytest.mark.parametrize(
    "deformed",
    [
        pytest.param((), id="plain"),
        pytest.param(
            ("data/augment=elastic", "ema_decay=0.9", "model.norm=batch", "loss=virtual_adversarial"),
            id="deformed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ended_within_any_phase_resumes_exactly(
    deformed: tuple[str, ...], apart: int, tmp_path: Path, data_dir: Path
) -> None:
    """Resume from each checkpoint of a run: within epochs, at their ends, and at the last step."""
    from conftest import settle

    from mnist_lightning.train import train

    def run(name: str, *more: str) -> Path:
        (tmp_path / name / ".hydra").mkdir(parents=True, exist_ok=True)
        arguments = (f"data.data_dir='{data_dir}'", "logger=csv", *SETTINGS, *deformed, *more)
        train(settle(tmp_path / name, *arguments), tmp_path / name, test=False)
        return tmp_path / name

    kept = tmp_path / "kept"
    kept.mkdir()
    whole = run("whole", "+callbacks.keep._target_=keep_checkpoints.Keep", f"+callbacks.keep.folder='{kept}'")
    moments = sorted(kept.iterdir())
    assert len(moments) > 30
    for moment in sorted({*moments[::apart], moments[-1]}):
        name = f"from-{moment.stem}"
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").write_bytes(moment.read_bytes())
        again = run(name, f"resume='{tmp_path / name}'", "+callbacks.keep._target_=keep_checkpoints.Keep")
        a, b = (load(folder / "checkpoints" / "last.ckpt") for folder in (whole, again))
        assert a.keys() == b.keys()
        for part in {"state_dict", "current_weights", "optimizer_states"} & a.keys():
            assert differences(a[part], b[part]) == []
        assert ("current_weights" in a) == bool(deformed)


def stop(sig: signal.Signals, moment: float, cwd: Path, start: Start) -> None:
    """Send a signal some seconds after the start of a new interpreter, or after a process's first checkpoint."""
    arguments = (*SETTINGS, "trainer.max_epochs=500", "hydra.run.dir=run")
    process = start("train", *arguments, cwd=cwd, fresh=moment < 0)
    if moment < 0:
        time.sleep(-moment)
        wait_for(lambda: "loading torch" in process.stdout, process)  # its handlers are installed
    else:
        wait_for_checkpoint(cwd, process)
        time.sleep(moment)
    process.send_signal(sig)
    assert process.wait() == 128 + sig, process.stdout + process.stderr
    if moment >= 0:
        assert load(cwd / "run" / "checkpoints" / "last.ckpt")["global_step"] > 0
        assert "saved at step" in process.stdout
        status, name = read(cwd / "run"), "Ctrl-C" if sig == signal.SIGINT else sig.name
        assert status is not None
        assert (status.state, status.error) == ("interrupted", f"interrupted by {name}")


@pytest.mark.parametrize(
    ("sig", "moment"), [(signal.SIGTERM, 0.3), (signal.SIGINT, 0.7), (signal.SIGTERM, -1.5)]
)
def test_signal_saves_and_ends_with_the_shells_code(
    sig: signal.Signals, moment: float, tmp_path: Path, start: Start
) -> None:
    stop(sig, moment, tmp_path, start)


@pytest.mark.reliability
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("number", range(20))
def test_signal_at_20_moments(sig: signal.Signals, number: int, tmp_path: Path, start: Start) -> None:
    generator = random.Random(number)
    moment = -generator.uniform(0.3, 6) if number % 3 == 0 else generator.uniform(0, 2)
    stop(sig, moment, tmp_path, start)


@pytest.mark.posix("signals that a process can heed")
def test_a_signal_that_a_library_swallows_is_still_a_signal() -> None:
    """This happens if a signal comes while numpy is imported: the import is tried again, and fails."""
    code = (
        "import contextlib, os, signal; from mnist_lightning import cli as command; from mnist_lightning.rundir import signals; signals.install()\n"
        "with command.compact_errors():\n"
        "    with contextlib.suppress(BaseException):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    raise ImportError('cannot load module more than once per process')\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 143


@pytest.mark.posix("signals that a process can heed")
def test_a_second_signal_ends_at_once() -> None:
    code = (
        "import os, signal, time; from mnist_lightning.rundir import signals; signals.install()\n"
        "with signals.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('waits', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == "waits\n"


def test_finished_run_says_so(default_run: DefaultRun, command: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in default_run.folder.rglob("*")}
    done = command("train", f"resume={default_run.folder}", cwd=default_run.logs.parent)
    assert done.returncode == 0, done.stderr
    assert "has finished: 8 epochs; nothing to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in default_run.folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("model.hidden=64", "data.batch_size=64"), "model.hidden: [256] -> [64]"),
        (("trainer.max_epochs=20",), "is planned for 8 epochs"),
        (("trainer.max_epochs=0",), "trainer.max_epochs must be"),
    ],
)
def test_other_settings_are_refused(
    more: tuple[str, ...], message: str, default_run: DefaultRun, command: Run
) -> None:
    done = command("train", f"resume={default_run.folder}", *more, cwd=default_run.logs.parent)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_longer_run_extends_where_the_schedule_allows(command: Run, tmp_path: Path) -> None:
    """``resume=latest`` finds the run by any name; the run's config stays, and the resumption's config lies beside it."""
    name = "logs/my run (1)=é,#"
    settings = (*SETTINGS, "scheduler=none", NO_PICTURES)
    first = command("train", *settings, f"hydra.run.dir={name}", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    config = (tmp_path / name / ".hydra" / "config.yaml").read_text()
    done = command("train", "resume=latest", "trainer.max_epochs=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 4/4" in done.stdout
    assert "epoch 3/4" not in done.stdout
    assert (tmp_path / name / ".hydra" / "config.yaml").read_text() == config
    assert (tmp_path / name / ".hydra" / "resume-1" / "config.yaml").is_file()
    assert load(tmp_path / name / "checkpoints" / "last.ckpt")["global_step"] == 240


def test_damaged_checkpoints_are_named(command: Run, tmp_path: Path) -> None:
    first = command(
        "train", *SETTINGS, NO_PICTURES, "trainer.max_epochs=1", "hydra.run.dir=run", cwd=tmp_path
    )
    assert first.returncode == 0, first.stderr
    os.unlink(tmp_path / "run" / "metrics.json")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    done = command("train", "resume=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "has no valid checkpoint" in done.stderr
    assert "best.ckpt is cut off" in done.stdout
