"""Runs of several processes: one decides, the others are told, and none is left behind."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NO_PICTURES, Run, Start
from keep_checkpoints import Keep
from processes import wait_for
from test_resume import differences

from mnist_lightning.rundir.checkpoint import find_newest, load

FAULTS = {"PYTHONPATH": str(Path(__file__).parent)}
DDP = ("trainer=ddp", "model.hidden=8", "test=false", "logger=csv", NO_PICTURES)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks for processes in /proc"),
]


def find_group(cwd: Path) -> list[int]:
    """Return the processes whose working folder is the given one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if path.resolve() == cwd.resolve():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_all_processes_after_a_saved_step(times: int, start: Start, tmp_path: Path) -> None:
    """The first Ctrl-C goes to the main process alone; a second one also ends all processes."""
    arguments = (*DDP, "trainer.max_epochs=2000", "checkpoint.every_n_seconds=0.5", "hydra.run.dir=run")
    process = start("train", *arguments, cwd=tmp_path)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    wait_for(last.exists, process)
    assert len(find_group(tmp_path)) >= 2
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    if times == 1:
        assert f"saved at step {load(last)['global_step']};" in process.stdout
    wait_until(lambda: not find_group(tmp_path))


MOMENTS = {  # a file in the folder -> stop the run up to this many seconds after the file appears
    "its processes are starting": (".hydra/config.yaml", 3.0),
    "it trains": ("checkpoints/last.ckpt", 1.0),
    "it is at its end": ("val_correct.npy", 0.1),
}


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.reliability) for n in range(1, 7))]
)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("killed", [False, True], ids=["Ctrl-C", "SIGKILL"])
def test_stopped_at_any_moment_none_is_left(
    killed: bool, moment: str, number: int, start: Start, tmp_path: Path
) -> None:
    """Ctrl-C goes to all processes, as from a terminal; SIGKILL goes to the main process alone."""
    file, most = MOMENTS[moment]
    epochs = 1 if "end" in moment else 2000
    arguments = (*DDP, f"trainer.max_epochs={epochs}", "checkpoint.every_n_seconds=0.5", "hydra.run.dir=run")
    process = start("train", *arguments, cwd=tmp_path)
    wait_for((tmp_path / "run" / file).exists, process)
    if "start" in moment:
        wait_for(lambda: len(find_group(tmp_path)) > 1, process)
    time.sleep(random.Random(number).uniform(0, most))
    if killed:
        process.kill()
    else:
        for pid in find_group(tmp_path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
    code = process.wait(60)
    wait_until(lambda: not find_group(tmp_path))
    if not killed and "start" in moment:  # Lightning kills the main process if it sees an added one end first
        assert code in (130, -signal.SIGKILL), process.stdout + process.stderr
    elif not killed:
        assert code == 130 or ("end" in moment and code == 0), process.stdout + process.stderr
    if "start" not in moment:
        assert find_newest(tmp_path / "run" / "checkpoints")[1]["global_step"] > 0


def test_resumed_within_an_epoch_it_reports_what_the_whole_run_does(command: Run, tmp_path: Path) -> None:
    """Weights, metrics of the whole epoch and each process's dropout agree; saving by the clock blocks no process."""
    kept = tmp_path / "kept"
    kept.mkdir()
    more = (
        "trainer.max_epochs=2",
        "+trainer.limit_train_batches=12",
        "model.dropout=0.3",
        "hydra.run.dir=run",
    )
    keep = (f"+callbacks.keep._target_={Keep.__module__}.Keep", f"+callbacks.keep.folder='{kept}'")
    often = ("checkpoint.every_n_steps=4", "checkpoint.every_n_seconds=0.01", "trainer.log_every_n_steps=5")
    done = command("train", *DDP, *more, *keep, *often, cwd=tmp_path, **FAULTS)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "run"
    shutil.copytree(whole, tmp_path / "whole")
    (whole / "metrics.json").unlink()
    for name in ("best", "previous"):
        (whole / "checkpoints" / f"{name}.ckpt").unlink()
    shutil.copy(kept / "000016.ckpt", whole / "checkpoints" / "last.ckpt")
    again = command(
        "train", "resume=run", "callbacks.keep.folder=null", "trust=keep_checkpoints", cwd=tmp_path, **FAULTS
    )
    assert again.returncode == 0, again.stderr
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "whole", whole))
    assert differences(one, two) == []
    a, b = (load(folder / "checkpoints" / "last.ckpt") for folder in (tmp_path / "whole", whole))
    assert differences(a, b) == []
    first, second = (process["random_state"]["cpu"] for process in a["processes"])
    assert not first.equal(second), "each process draws numbers of its own"
    assert (whole / "csv" / "metrics.csv").read_text() == (
        tmp_path / "whole" / "csv" / "metrics.csv"
    ).read_text()


def test_a_console_script_that_is_a_program_starts_the_others(python: Run, tmp_path: Path) -> None:
    """On Windows, the script is an .exe followed by a zip file, which Python runs; no file has its name."""
    script = "import sys\nfrom mnist_lightning.train import main\nsys.argv[0] = sys.argv[0].removesuffix('.exe')\nmain()"
    with zipfile.ZipFile(tmp_path / "mnist-train.exe", "w") as archive:
        archive.writestr("__main__.py", script)
    short = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "hydra.run.dir=run")
    done = python("mnist-train.exe", *DDP, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(load(tmp_path / "run" / "checkpoints" / "last.ckpt")["processes"]) == 2
