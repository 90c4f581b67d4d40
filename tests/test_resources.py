"""Full disks and vanishing folders: a line, the last good checkpoint, and curves that never stop a net."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Run

from mnist_lightning.checkpoint import load
from mnist_lightning.data import unpack

SETTINGS = (
    *("trainer.max_epochs=2", "+trainer.limit_train_batches=20", "model.hidden=64", "test=false"),
    *("hydra.run.dir=run", "scheduler=none"),
)
ROOM = 200_000  # bytes: enough for curves and configs, too little for a checkpoint of this net


def train_with_little_room(
    cwd: Path, environment: dict[str, str], room: int, *arguments: str
) -> tuple[int, str]:
    """A real failing write without a file system of its own: no file may grow beyond ``room`` bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "mnist_lightning.train", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    return done.returncode, done.stderr


def test_no_room_for_a_checkpoint(command: Run, tmp_path: Path, environment: dict[str, str]) -> None:
    first = command("train", *SETTINGS, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    code, errors = train_with_little_room(tmp_path, environment, ROOM, "resume=run", "trainer.max_epochs=4")
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert "checkpoints" in errors
    assert "File too large" in errors
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before
    again = command("train", "resume=run", "trainer.max_epochs=4", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert load(checkpoints / "last.ckpt")["global_step"] == 80


def test_no_room_for_tensorboard_does_not_stop_training(tmp_path: Path, environment: dict[str, str]) -> None:
    unpack(tmp_path / "data")  # or the limit would hit the data
    arguments = (*SETTINGS, "callbacks.checkpoint=null", "data.data_dir=data", "trainer.log_every_n_steps=1")
    code, errors = train_with_little_room(tmp_path, environment, 6_000, *arguments)
    assert code == 0, errors
    told = (tmp_path / "run" / "train.log").read_text()
    assert told.count("TensorBoardLogger can't be written") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val/acc"] > 0.5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_no_room_for_csv_does_not_stop_training(command: Run, tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    (tmp_path / "run" / "csv").mkdir(parents=True)
    (tmp_path / "run" / "csv" / "metrics.csv").symlink_to("/dev/full")
    done = command("train", *SETTINGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CSVLogger can't be written: [Errno 28] No space left on device") == 1
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 40


@pytest.mark.parametrize("folder", ["run", "run/checkpoints"])
def test_vanishing_folder(folder: str, tmp_path: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mnist_lightning.train", *SETTINGS, "trainer.max_epochs=1000"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    shutil.rmtree(tmp_path / folder)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the folder has vanished" in errors
    assert len(errors.splitlines()) == 1
    assert "Traceback" not in errors
