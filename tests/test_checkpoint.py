"""Damaged and hostile checkpoints are refused, and the previous one is used."""

import copy
import hashlib
import pickle
import random
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run

from mnist_lightning.rundir.atomic import TEMPORARY, remove_leftovers, write_atomic
from mnist_lightning.rundir.checkpoint import LABEL, LENGTH, find_newest, load, serialize

PLAIN: dict[str, Any] = {
    "hyper_parameters": {"model": {"hidden": [4]}},
    "global_step": 7,
    "state_dict": OrderedDict(w=torch.arange(2000, dtype=torch.float32)),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    write_atomic(path, serialize(PLAIN))
    return path


def test_round_trip(checkpoint: Path) -> None:
    assert torch.equal(load(checkpoint)["state_dict"]["w"], PLAIN["state_dict"]["w"])
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"] == {"model": {"hidden": [4]}}


def flip_bits(path: Path, times: int) -> int:
    """Flip a random bit in each of ``times`` copies, and return how many of them are refused."""
    content, refused = path.read_bytes(), 0
    generator = random.Random(0)
    damaged = path.with_name("damaged.ckpt")
    for _ in range(times):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        damaged.write_bytes(changed)
        with pytest.raises(OSError, match=r"damaged|cut off"):
            load(damaged)
        refused += 1
    return refused


def test_bit_flips_are_refused(checkpoint: Path) -> None:
    assert flip_bits(checkpoint, 100) == 100


@pytest.mark.reliability
def test_1000_bit_flips_are_refused_and_1000_untouched_files_load(checkpoint: Path) -> None:
    assert flip_bits(checkpoint, 1000) == 1000
    for _ in range(1000):
        load(checkpoint)


@pytest.mark.parametrize("share", [part / 20 for part in range(20)])
def test_truncated_newest_gives_way_to_the_one_before(
    share: float, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoint.with_name("best.ckpt")
    content = serialize(PLAIN | {"global_step": 9})
    newest.write_bytes(content)
    assert find_newest(checkpoint.parent)[0] == newest
    newest.write_bytes(content[: int(share * len(content))])
    path, found = find_newest(checkpoint.parent)
    assert path == checkpoint
    assert found["global_step"] == 7
    assert str(newest) in caplog.text


def test_no_valid_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="has no valid checkpoint"):
        find_newest(tmp_path)


class Payload:
    """A hostile pickle, which acts when a careless program loads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def hostile_pickle(path: Path, ran: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(ran)))


def hostile_torch(path: Path, ran: Path) -> None:
    torch.save(PLAIN | {"x": Payload(ran)}, path)


def hostile_checksummed(path: Path, ran: Path) -> None:
    write_atomic(path, serialize(PLAIN | {"x": Payload(ran)}))


def instantiator(path: Path, ran: Path) -> None:
    """A checkpoint with a name that Lightning's load_from_checkpoint would import and call."""
    write_atomic(path, serialize({"hyper_parameters": ["os.system"], "_instantiator": "os.system"}))


def add_checksum(path: Path) -> None:
    content = path.read_bytes()[:-2]
    path.write_bytes(content + LENGTH + LABEL + hashlib.sha256(content).hexdigest().encode())


def bomb(path: Path, ran: Path) -> None:
    """A checkpoint with a gigabyte of zeros, compressed to five megabytes."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data/0", "w") as member,
    ):
        for _ in range(1024):
            member.write(bytes(2**20))
    add_checksum(path)


def overlapping(path: Path, ran: Path) -> None:
    """An uncompressed checkpoint of ten gigabytes: a thousand entries share the same ten megabytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(10 * 2**20))
        for number in range(1, 1000):
            entry = copy.copy(archive.filelist[0])
            entry.filename = f"archive/data/{number}"
            archive.filelist.append(entry)
    add_checksum(path)


def expanded(path: Path, ran: Path) -> None:
    """A tensor of four terabytes: one number, repeated a million times in both directions."""
    write_atomic(path, serialize(PLAIN | {"state_dict": {"w": torch.zeros(1).expand(10**6, 10**6)}}))


HOSTILE = [
    hostile_pickle,
    hostile_torch,
    hostile_checksummed,
    instantiator,
    bomb,
    overlapping,
    expanded,
]


@pytest.mark.parametrize("make", HOSTILE)
def test_hostile_files_are_refused(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    path, ran = tmp_path / "hostile.ckpt", tmp_path / "ran"
    make(path, ran)
    with pytest.raises(OSError, match=r"refused|checksum|not a checkpoint of mnist_lightning"):
        load(path)
    assert not ran.exists()


def test_hostile_files_take_no_memory(tmp_path: Path, python: Run) -> None:
    for make in HOSTILE:
        make(tmp_path / f"{make.__name__}.ckpt", tmp_path / "ran")
    code = (
        "import sys; from pathlib import Path; from mnist_lightning.rundir.checkpoint import load\n"
        "for path in Path(sys.argv[1]).glob('*.ckpt'):\n"
        "    try: load(path)\n"
        "    except OSError: print('refused')\n"
        "print(Path('/proc/self/status').read_text())\n"  # rusage would include the parent's memory
    )
    done = python("-c", code, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused\n") == len(HOSTILE)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert int(peak) < 900_000, "torch and Lightning take 500,000"


def test_dotted_names_are_data(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_atomic(path, serialize(PLAIN | {"optimizer": {"_target_": "os.system", "command": "true"}}))
    assert load(path)["optimizer"]["_target_"] == "os.system"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.ckpt", "s3://bucket/a.ckpt", "file:///a.ckpt"])
def test_remote_files_are_refused(address: str) -> None:
    with pytest.raises(OSError, match="local files only"):
        load(Path(address))


def test_failed_write_leaves_the_old_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = checkpoint.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(checkpoint, b"new")
    assert checkpoint.read_bytes() == old
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_leftovers_of_killed_processes_go(checkpoint: Path) -> None:
    shutil.copy(checkpoint, checkpoint.with_name(f"{TEMPORARY}last.ckpt-123"))
    remove_leftovers(checkpoint.parent)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_in_the_place_of_a_file_stays(tmp_path: Path) -> None:
    (tmp_path / "results.csv").mkdir()
    (tmp_path / "results.csv" / "mine.txt").write_text("kept")
    with pytest.raises(OSError, match="can't be written: a folder is in its place"):
        write_atomic(tmp_path / "results.csv", b"new")
    assert (tmp_path / "results.csv" / "mine.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"], "no part of a file is left"
