import functools
import gzip
import hashlib
import http.server
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Run, few
from processes import Preloaded
from torchvision.datasets.mnist import read_image_file, read_label_file

from mnist_lightning.data import EpochSampler, MNISTDataModule, split
from mnist_lightning.images import sources
from mnist_lightning.images.sources import RAW_FILES, find_fault, unpack
from mnist_lightning.rundir.atomic import LONG_LEFT, TEMPORARY

SETTINGS = {
    "name": "mnist",
    "batch_size": 128,
    "val_size": 5000,
    "split_seed": 0,
    "num_workers": 0,
    "seed": 1,
}


def make(data_dir: Path, **changes: object) -> MNISTDataModule:
    datamodule = MNISTDataModule(**(SETTINGS | {"data_dir": str(data_dir)} | changes))  # type: ignore[arg-type]
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def test_three_splits(data_dir: Path) -> None:
    splits = make(data_dir).splits
    assert {name: len(digits) for name, digits in splits.items()} == {
        "train": 55_000,
        "val": 5_000,
        "test": 10_000,
    }
    assert all(digits.images.dtype == torch.uint8 for digits in splits.values())
    labels = torch.cat([splits["train"].labels, splits["val"].labels])
    of_all, of_val = torch.bincount(labels), torch.bincount(splits["val"].labels)
    assert (of_val - of_all / 12).abs().max() < 1, "stratified: each class gives its twelfth"


def test_val_size_0_trains_on_all(data_dir: Path) -> None:
    datamodule = make(data_dir, val_size=0)
    assert len(datamodule.splits["train"]) == 60_000
    assert len(datamodule.splits["val"]) == 0


def test_validation_images_never_change(data_dir: Path) -> None:
    """Published validation numbers refer to these images, so any change of the split must be noticed."""
    labels = torch.cat([torch.arange(10)] * 6000)
    val, train = split(labels, 5000, 0)
    assert val[:8].tolist() == [16, 47, 57, 86, 87, 119, 123, 128]
    assert torch.equal(torch.cat([val, train]).sort().values, torch.arange(60_000))
    assert torch.equal(val, split(labels, 5000, 0)[0])
    assert not torch.equal(val, split(labels, 5000, 1)[0])
    run_seeds = [make(data_dir, seed=seed).splits["val"].images for seed in (1, 2)]
    assert torch.equal(*run_seeds), "the split does not depend on the run's seed"


def test_epoch_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(1000, shuffle=True, seed=seed, rank=0, world_size=1)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(1, 0)) == list(range(1000))
    assert order(1, 3) == order(1, 3)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_sampler_starts_in_the_middle_of_one_epoch() -> None:
    """This holds however often the epoch is started, because Lightning may ask for loaders again."""
    sampler = EpochSampler(1000, shuffle=True, seed=1, rank=0, world_size=1)
    whole, following = list(sampler), list(sampler)
    assert following != whole, "the next epoch, where nobody sets one"
    sampler.set_epoch(0)
    sampler.start = 0, 640
    assert list(sampler) == whole[640:]
    assert list(sampler) == following


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_each_batch(world_size: int) -> None:
    def order(rank: int, world_size: int) -> list[int]:
        return list(EpochSampler(1000, shuffle=True, seed=1, rank=rank, world_size=world_size))

    single, parts = order(0, 1), [order(rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1, "all take the same number of steps"
    for batch in range(3):
        global_batch = [part[batch * 10 : (batch + 1) * 10] for part in parts]
        expected = single[batch * 10 * world_size : (batch + 1) * 10 * world_size]
        assert sorted(index for part in global_batch for index in part) == sorted(expected)


def test_evaluation_pads_nothing() -> None:
    parts = [list(EpochSampler(1001, shuffle=False, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(1001))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_is_what_the_order_says(data_dir: Path, num_workers: int) -> None:
    datamodule = make(data_dir, num_workers=num_workers)
    loader = datamodule.train_dataloader()
    order = EpochSampler(55_000, shuffle=True, seed=1, rank=0, world_size=1).order()
    digits = datamodule.splits["train"]
    for batch, (images, labels) in zip(range(3), loader, strict=False):
        chosen = order[batch * 128 : (batch + 1) * 128]
        assert torch.equal(images, digits.images[chosen])
        assert torch.equal(labels, digits.labels[chosen])


def flip_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def make_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def swap(path: Path) -> None:
    other = path.with_name("t10k-images-idx3-ubyte")
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def change_byte(position: int, value: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        assert content[position] != value
        content[position] = value
        path.write_bytes(content)

    return change


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        pytest.param("train-images-idx3-ubyte", flip_pixel, "another checksum", id="flipped pixel"),
        pytest.param("train-labels-idx1-ubyte", change_byte(5000, 200), "another checksum", id="label 200"),
        pytest.param("train-images-idx3-ubyte", truncate, "1,000 bytes", id="truncated"),
        pytest.param("train-images-idx3-ubyte", swap, "another checksum", id="swapped files"),
        pytest.param("t10k-labels-idx1-ubyte", change_byte(3, 3), "another checksum", id="wrong magic"),
        pytest.param("t10k-images-idx3-ubyte", change_byte(7, 0), "another checksum", id="wrong count"),
        pytest.param("train-labels-idx1-ubyte", lambda path: path.write_bytes(b""), "0 bytes", id="empty"),
        pytest.param("train-images-idx3-ubyte", make_folder, "is a folder", id="folder"),
        pytest.param("train-images-idx3-ubyte", make_dangling, "is a dangling link", id="dangling link"),
    ],  # the tenth case is test_unreadable_file_is_repaired
)
def test_damaged_file_is_named_and_repaired(
    file: str, damage: Callable[[Path], None], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unpack(tmp_path)
    assert not caplog.records
    path = tmp_path / "MNIST" / "raw" / file
    damage(path)
    unpack(tmp_path)
    assert str(path) in caplog.text
    assert told in caplog.text
    assert all(find_fault(path.parent / name, md5) is None for name, (_, _, md5) in RAW_FILES.items())
    aside = [f"{file}.aside"] if damage is make_folder else []
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([*RAW_FILES, *aside])
    assert [inside.name for inside in path.parent.glob("*.aside/*")] == ["inside"] * len(aside)


def test_leftovers_of_killed_processes_go_and_those_at_work_are_left_alone(tmp_path: Path) -> None:
    unpack(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    for name, age in ((f"{TEMPORARY}killed-1", 2 * LONG_LEFT), (f"{TEMPORARY}at-work-2", 0)):
        (raw / name).touch()
        os.utime(raw / name, (time.time() - age,) * 2)
    unpack(tmp_path)
    assert sorted(path.name for path in raw.glob(f"{TEMPORARY}*")) == [f"{TEMPORARY}at-work-2"]


def test_what_is_right_is_left_alone(tmp_path: Path) -> None:
    unpack(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*ubyte")}
    assert len(before) == 4
    unpack(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*ubyte")} == before


READ_AT_ONCE = """
import hashlib, os, sys, time
from pathlib import Path
from mnist_lightning.data import MNISTDataModule

count, settings = int(sys.argv[1]), eval(sys.argv[2])
Path(f"ready-{os.getpid()}").touch()
while len(list(Path().glob("ready-*"))) < count:
    time.sleep(0.001)
datamodule = MNISTDataModule(**settings)
datamodule.prepare_data()
datamodule.setup("fit")
digest = hashlib.sha256()
for digits in datamodule.splits.values():
    digest.update(digits.images.numpy())
    digest.update(digits.labels.numpy())
print(digest.hexdigest())
"""


def read_at_once(
    count: int, data_dir: Path, cwd: Path, preloaded: Preloaded, env: dict[str, str]
) -> list[str]:
    """Start ``count`` processes at the same moment, and return each one's hash of all images and labels."""
    cwd.mkdir()
    arguments = ("-c", READ_AT_ONCE, str(count), repr(SETTINGS | {"data_dir": str(data_dir)}))
    processes = [preloaded.start(*arguments, cwd=cwd, env=env) for _ in range(count)]
    done = [process.finish() for process in processes]
    assert [one.returncode for one in done] == [0] * count, done
    return [one.stdout.strip() for one in done]


@pytest.mark.parametrize(
    "rounds", [pytest.param(1, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.reliability)]
)
def test_many_start_at_once(
    rounds: int, tmp_path: Path, data_dir: Path, preloaded: Preloaded, environment: dict[str, str]
) -> None:
    """Eight processes unpack into one empty folder at the same moment, and all read the right images."""
    alone = read_at_once(1, data_dir, tmp_path / "alone", preloaded, environment)
    for number in range(rounds):
        folder = tmp_path / str(number)
        read = read_at_once(8, folder, tmp_path / f"work-{number}", preloaded, environment)
        assert read == alone * 8
        raw = folder / "MNIST" / "raw"
        assert sorted(os.listdir(raw)) == sorted(RAW_FILES)
        assert all(find_fault(raw / name, md5) is None for name, (_, _, md5) in RAW_FILES.items())
        shutil.rmtree(folder)


def test_no_network_is_told(command: Run, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"  # no server listens at this address
    done = command(
        "train",
        "data=fashion_mnist",
        f"data.data_dir={tmp_path / 'data'}",
        cwd=tmp_path,
        http_proxy=nowhere,
        https_proxy=nowhere,
    )
    assert done.returncode == 1
    assert "data=fashion_mnist could not be downloaded" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


class Faulty(http.server.BaseHTTPRequestHandler):
    """A server that answers each request in one wrong way."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        fault = self.path.split("/")[1]
        if fault in ("404", "503"):
            self.send_error(int(fault))
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            body = {"html": b"<html>moved</html>", "hash": gzip.compress(b"other")}.get(fault, b"x" * 100)
            self.send_response(200)
            self.send_header("Content-Length", "100000" if fault in ("stall", "short") else str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            if fault == "stall":
                self.server.stopped.wait(60)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.stopped = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stopped.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", ["404", "503", "reset", "stall", "html", "short", "hash"])
@pytest.mark.parametrize("name", few(["fashion_mnist", "kmnist"], 2))
def test_broken_download_ends_clearly(
    name: str, fault: str, faulty_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources.find_class(name), "mirrors", [f"{faulty_server}/{fault}/"])
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT", 1.0)
    with pytest.raises(OSError, match=f"data={name} could not be downloaded"):
        sources.download(sources.Idx(name, tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "no partial files"


def test_download_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST's own files, served as Fashion-MNIST's, with their checksums."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(sources.PACKAGED))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    dataset = sources.find_class("fashion_mnist")
    monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    checksums = [
        (file, hashlib.md5((sources.PACKAGED / file).read_bytes()).hexdigest())
        for file in (f"{name}.gz" for name in RAW_FILES)
    ]
    monkeypatch.setattr(dataset, "resources", checksums)
    sources.Idx("fashion_mnist", tmp_path).make_whole()
    server.shutdown()
    server.server_close()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(RAW_FILES)
    sources.Idx(
        "fashion_mnist", tmp_path
    ).make_whole()  # the server is gone, so nothing can be downloaded again
    datamodule = make(tmp_path, name="fashion_mnist")
    assert len(datamodule.splits["train"]) == 55_000


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        (lambda content: content, True),
        (lambda content: content[:-1], False),
        (lambda content: content + b"x", False),
        (lambda content: b"\0\0\x08\x03" + content[4:], False),  # the magic number of images
        (lambda content: content[:7] + b"\0" + content[8:], False),  # a wrong number of images
        (lambda content: content[:-1] + b"\xc8", False),  # label 200
        (lambda content: b"", False),
    ],
)
def test_idx_files_are_looked_into(
    change: Callable[[bytes], bytes], valid: bool, tmp_path: Path, data_dir: Path
) -> None:
    unpack(data_dir)
    content = (data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").read_bytes()
    path = tmp_path / "labels"
    path.write_bytes(change(content))
    assert sources.is_idx(path, sources.LABELS_MAGIC, 10_000, range(10)) is valid


def test_idx_files_are_read_as_torchvision_reads_them(data_dir: Path) -> None:
    unpack(data_dir)
    for part in ("train", "t10k"):
        images, labels = (
            data_dir / "MNIST" / "raw" / f"{part}-{name}"
            for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        assert torch.equal(sources.read_idx(images), read_image_file(str(images)))
        assert torch.equal(sources.read_idx(labels).long(), read_label_file(str(labels)))


def test_unreadable_file_is_repaired(
    preloaded: Preloaded, environment: dict[str, str], tmp_path: Path
) -> None:
    unpack(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.chmod(0)
    code = f"from pathlib import Path; from mnist_lightning.images.sources import unpack; unpack(Path({str(tmp_path)!r}))"
    done = preloaded.start("-c", code, cwd=tmp_path, env=environment, heed_permissions=True).finish()
    assert done.returncode == 0, done.stderr
    assert f"{path} can't be read: replaced" in done.stderr
    assert find_fault(path, RAW_FILES[path.name][2]) is None
