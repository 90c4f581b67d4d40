"""Full disks and vanished folders cost one line; the last good checkpoint stays, and curves never stop a run."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import NO_PICTURES, Run, Start
from processes import Process, wait_for

from mnist_lightning.images.sources import unpack
from mnist_lightning.rundir.checkpoint import find_newest, load
from mnist_lightning.rundir.loggers import CSVLogger

SETTINGS = (
    *("trainer.max_epochs=2", "+trainer.limit_train_batches=20", "model.hidden=64", "test=false"),
    *("hydra.run.dir=run", "scheduler=none", "data.val_size=500", NO_PICTURES),
)
ROOM = 200_000  # bytes, enough for curves and configs, but too few for a checkpoint of this net


def train_with_little_room(start: Start, cwd: Path, room: int, *arguments: str) -> tuple[int, str]:
    """Train while no file may grow beyond ``room`` bytes, so that writes really fail."""
    done = start("train", *arguments, cwd=cwd, file_size=room).finish()
    return done.returncode, done.stderr


def test_no_room_for_a_checkpoint(command: Run, start: Start, tmp_path: Path) -> None:
    first = command("train", *SETTINGS, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    code, errors = train_with_little_room(start, tmp_path, ROOM, "resume=run", "trainer.max_epochs=4")
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert "checkpoints" in errors
    assert "File too large" in errors
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before
    again = command("train", "resume=run", "trainer.max_epochs=4", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert load(checkpoints / "last.ckpt")["global_step"] == 80


@pytest.mark.slow
def test_no_room_for_tensorboard_does_not_stop_training(start: Start, tmp_path: Path) -> None:
    unpack(tmp_path / "data")  # or the limit would hit the data
    arguments = (*SETTINGS, "callbacks.checkpoint=null", "data.data_dir=data", "trainer.log_every_n_steps=1")
    arguments += ("callbacks.pictures.enabled=true",)
    code, errors = train_with_little_room(start, tmp_path, 30_000, *arguments)
    assert code == 0, errors
    told = (tmp_path / "run" / "train.log").read_text()
    assert told.count("TensorBoardLogger can't be written") == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val/acc"] > 0.5


def test_no_place_for_csv_does_not_stop_training(command: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "csv").write_text("a file where a folder is to be")
    done = command("train", *SETTINGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CSVLogger can't be written: [Errno 17] File exists") == 1
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 40


def test_no_room_for_the_log_does_not_stop_training(start: Start, tmp_path: Path) -> None:
    room = 8_000_000
    unpack(tmp_path / "data")  # or the limit would hit the data
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_bytes(bytes(room))
    arguments = (*SETTINGS, "trainer.max_epochs=1", "data.data_dir=data")
    code, errors = train_with_little_room(start, tmp_path, room, *arguments)
    assert code == 0
    assert errors == ""
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 20


@pytest.mark.parametrize(
    ("room", "line"),
    [(1_000, "can't write to the run's folder"), (1_000_000, "train-images-idx3-ubyte")],
    ids=["settings", "data"],
)
def test_no_room_at_the_start(room: int, line: str, start: Start, tmp_path: Path) -> None:
    code, errors = train_with_little_room(start, tmp_path, room, *SETTINGS, "data.data_dir=data")
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert line in errors
    assert "File too large" in errors
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def start_training(start: Start, cwd: Path, *more: str) -> Process:
    return start("train", *SETTINGS, *more, cwd=cwd, heed_permissions=True)


def wait_for_checkpoint(cwd: Path, process: Process) -> None:
    wait_for((cwd / "run" / "checkpoints" / "last.ckpt").exists, process)


def test_read_only_folder_at_the_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    process = start_training(start, tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors == f"can't write to the run's folder {Path('run')}: Permission denied\n"


@pytest.mark.parametrize(
    ("folder", "epochs", "file"),
    [
        pytest.param("run/checkpoints", 1000, "run/checkpoints/", marks=pytest.mark.slow),
        ("run", 20, "run/"),
    ],
    ids=["checkpoints", "metrics and status"],
)
def test_folder_turned_read_only(folder: str, epochs: int, file: str, start: Start, tmp_path: Path) -> None:
    process = start_training(start, tmp_path, f"trainer.max_epochs={epochs}")
    wait_for_checkpoint(tmp_path, process)
    (tmp_path / folder).chmod(0o555)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert file in errors
    assert "Permission denied" in errors
    assert len(errors.splitlines()) == 1
    assert find_newest(tmp_path / "run" / "checkpoints")[1]["global_step"] >= 20


@pytest.mark.parametrize("folder", ["run", pytest.param("run/checkpoints", marks=pytest.mark.slow)])
def test_vanishing_folder(folder: str, start: Start, tmp_path: Path) -> None:
    process = start_training(start, tmp_path, "trainer.max_epochs=1000")
    wait_for_checkpoint(tmp_path, process)
    shutil.rmtree(tmp_path / folder)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "the folder has vanished" in errors
    assert len(errors.splitlines()) == 1
    assert "Traceback" not in errors


def test_only_a_failed_write_turns_a_logger_off(tmp_path: Path) -> None:
    """Lightning's loggers wrap some failed writes in a ValueError; other ValueErrors must still be raised."""
    logger = CSVLogger(save_dir=str(tmp_path))
    with pytest.raises(ValueError, match="shape"), logger.forgiving():
        raise ValueError("shape '[-1, 28, 28]' is invalid")
    assert not logger.failed
    with logger.forgiving():
        raise ValueError("you tried to log a number") from OSError(28, "No space left on device")
    assert logger.failed
