"""Full disks and vanished folders cost one line; the last good checkpoint stays, and curves never stop a run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NO_PICTURES, Run, Start
from processes import Process, wait_for

from mnist_lightning.cli import compact_errors
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


@pytest.mark.posix("limits of a process's memory")
def test_no_memory_for_a_batch_is_a_line(tmp_path: Path, environment: dict[str, str]) -> None:
    limit = "import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, (12_000_000_000,) * 2); "
    arguments = (
        "model.hidden=100000",
        "data.batch_size=50000",
        "trainer.accelerator=cpu",
        "hydra.run.dir=run",
    )
    done = subprocess.run(
        [
            *(sys.executable, "-c", f"{limit}runpy.run_module('mnist_lightning.train', run_name='__main__')"),
            *(*arguments, NO_PICTURES),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "memory is used up (20.00 GB more were asked for): a smaller data.batch_size or a smaller net takes less"
    )
    assert "Traceback" not in done.stderr
    assert "can't allocate memory" in (tmp_path / "run" / "train.log").read_text(), "the log has all of it"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (  # as an NVIDIA H100 said
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 476.84 GiB. GPU 0 has a total capacity of 79.18 GiB of which"
                " 58.07 GiB is free. Process 592 has 16.79 GiB memory in use."
            ),
            "the GPU's memory is used up (476.84 GiB more were asked for): ",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "the GPU's memory is used up: "),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 KB)"), "the GPU's memory is used up: "),
        (  # on Windows
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 40000000000 bytes."),
            "memory is used up (40.00 GB more were asked for): ",
        ),
        (MemoryError(), "memory is used up: "),
    ],
)
def test_a_lack_of_memory_is_a_line(error: Exception, told: str) -> None:
    with pytest.raises(SystemExit) as caught, compact_errors():
        raise error
    assert str(caught.value).startswith(told)
    assert "data.batch_size" in str(caught.value)


def test_what_numpy_can_not_hold_is_a_line() -> None:
    with pytest.raises(SystemExit) as caught, compact_errors():
        np.zeros((10**7, 10**7))
    assert str(caught.value).startswith("memory is used up (728. TiB more were asked for): ")


def test_other_errors_of_torch_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), compact_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
