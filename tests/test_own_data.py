"""Tests of users' own data sets: folders, npz files, functions, and data sets of torchvision."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Run, settle
from numpy.typing import NDArray
from PIL import Image
from processes import Preloaded, wait_for
from test_own_parts import draw_seven, retyped
from test_resume import differences
from torchvision.datasets import CIFAR10, EMNIST

from mnist_lightning.config import ConfigError, Data
from mnist_lightning.data import Images, MNISTDataModule, read_splits
from mnist_lightning.images.arrays import DataError, check_arrays, read_npz
from mnist_lightning.images.folder import Picture, decode
from mnist_lightning.images.known import KNOWN
from mnist_lightning.images.pictures import read_picture
from mnist_lightning.images.sources import Cifar10, find_class, find_source
from mnist_lightning.rundir.checkpoint import load, serialize

Arrays = dict[str, Any]
TINY = ("trainer.max_epochs=2", "data.batch_size=20", "trainer.log_every_n_steps=5", "model.hidden=16")

pytestmark = pytest.mark.usefixtures("from_wheel")


def make_arrays(num_classes: int, shape: tuple[int, ...], each: int, *, noise: float = 40.0) -> Arrays:
    """Make a random image for each class, and noisy copies of it for training and testing."""
    generator = np.random.default_rng(1)
    means = generator.integers(80, 176, (num_classes, *shape))
    content: Arrays = {}
    for part, count in (("train", each), ("test", max(2, each // 5))):
        labels = generator.permutation(np.arange(count * num_classes) % num_classes)
        noisy = means[labels] + generator.normal(0, noise, (len(labels), *shape))
        content |= {f"{part}_images": noisy.clip(0, 255).astype(np.uint8), f"{part}_labels": labels}
    return content


def one_set(content: Arrays) -> Arrays:
    return {"images": content["train_images"], "labels": content["train_labels"]}


def idx(array: NDArray[np.uint8]) -> bytes:
    header = (0x800 + array.ndim, *array.shape)
    return b"".join(number.to_bytes(4, "big") for number in header) + array.tobytes()


def write_emnist(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Write a small zip like EMNIST's: the files of each split, with transposed images and letters from 1."""
    generator = np.random.default_rng(1)
    upright = {}
    with zipfile.ZipFile(folder / "gzip.zip", "w") as archive:
        for split, first, count in (("letters", 1, 26), ("balanced", 0, 47), ("digits", 0, 10)):
            for part in ("train", "test"):
                images = generator.integers(0, 256, (count * 2, 28, 28), dtype=np.uint8)
                labels = (np.arange(count * 2) % count + first).astype(np.uint8)
                upright[f"{split} {part}"] = images
                for kind, array in (("images-idx3", images.transpose(0, 2, 1)), ("labels-idx1", labels)):
                    name = f"gzip/emnist-{split}-{part}-{kind}-ubyte.gz"
                    archive.writestr(name, gzip.compress(idx(np.ascontiguousarray(array))))
    return upright


def write_cifar(folder: Path) -> dict[str, str]:
    """Write a small folder like that of CIFAR-10's archive; return checksums by file."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    names = [f"data_batch_{number}" for number in range(1, 6)]
    for name in (*names, "test_batch"):
        batch = {"data": generator.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [*range(10)] * 2}
        (folder / name).write_bytes(pickle.dumps(batch))
    classes = {"label_names": list(KNOWN["cifar10"].class_names)}
    (folder / "batches.meta").write_bytes(pickle.dumps(classes))
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def unpack_emnist(folder: Path) -> None:
    write_emnist(folder)
    raw = folder / "cache" / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    with zipfile.ZipFile(folder / "gzip.zip") as archive:
        for name in archive.namelist():
            (raw / Path(name).stem).write_bytes(gzip.decompress(archive.read(name)))


SMALL_CIFAR = """
import json, runpy, sys
from torchvision.datasets import CIFAR10
checksums = json.load(open("checksums.json"))
CIFAR10.train_list = [[name, checksums[name]] for name, _ in CIFAR10.train_list]
CIFAR10.test_list = [["test_batch", checksums["test_batch"]]]
CIFAR10.meta["md5"] = checksums["batches.meta"]
runpy.run_module(f"mnist_lightning.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
"""


def unpack_cifar(folder: Path) -> None:
    checksums = write_cifar(folder / "cache" / "cifar-10-batches-py")
    (folder / "checksums.json").write_text(json.dumps(checksums))
    (folder / "small_cifar.py").write_text(SMALL_CIFAR)


LONG_NAMES = [f"{'a name of thirty letters, nr. ':.<27}{number:03}" for number in range(100)]
# A data set -> the function that writes its files, and the settings that choose it
SETS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "26 classes in colour": (
        lambda folder: np.savez(
            folder / "my set, 1.npz", **make_arrays(26, (32, 32, 3), 20), class_names=list("abcdefghijklmnopqrstuvwxyz")
        ),
        ("data=npz", "data.path=my set, 1.npz"),
    ),
    "2 classes of wide images": (
        lambda folder: np.savez(folder / "wide.npz", **one_set(make_arrays(2, (20, 40), 100))),
        ("data=npz", "data.path=wide.npz", "data.deskew=true", "data/augment=elastic"),
    ),
    "100 classes with long names": (
        lambda folder: np.savez(
            folder / "many.npz", **make_arrays(100, (12, 12), 12), class_names=LONG_NAMES
        ),
        ("data=npz", "data.path=many.npz"),
    ),
    "a folder of pictures": (
        lambda folder: write_pictures(folder / "pictures", make_arrays(3, (9, 7, 3), 40)),
        ("data=folder", "data.path=pictures", "data.size=8", "data/augment=affine"),
    ),
    "a function": (lambda folder: None, ("--config-dir", "my_conf", "data=columns")),
    "letters of EMNIST": (unpack_emnist, ("data=emnist_letters", "data.val_size=12", "data.deskew=true")),
    "CIFAR-10": (unpack_cifar, ("data=cifar10", "data.val_size=30", "data/augment=affine")),
}  # fmt: skip
QUICK = ("a folder of pictures",)
GATE = ("a function", "CIFAR-10")


def write_pictures(folder: Path, content: Arrays, *, parts: bool = True) -> None:
    for part in ("train", "test") if parts else ("train",):
        arrays = zip(content[f"{part}_images"], content[f"{part}_labels"], strict=True)
        for number, (image, label) in enumerate(arrays):
            path = folder / (part if parts else "") / f"class {label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[] if name in QUICK else pytest.mark.slow if name in GATE else pytest.mark.reliability,
        )
        for name in SETS
    ],
)
def test_from_training_to_report(
    name: str, tmp_path: Path, python: Run, preloaded: Preloaded, environment: dict[str, str]
) -> None:
    shutil.copytree(REPOSITORY / "tests" / "own", tmp_path, dirs_exist_ok=True)
    make, chosen = SETS[name]
    make(tmp_path)

    def module(command: str) -> list[str]:
        return ["small_cifar.py", command] if name == "CIFAR-10" else ["-m", f"mnist_lightning.{command}"]

    def command(name: str, *arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
        return python(*module(name), *arguments, cwd=cwd)

    trust = ["trust=my_data"] if name == "a function" else []
    settings = [*chosen, *TINY, "data.data_dir=cache", "checkpoint.every_n_steps=2"]
    done = command("train", *settings, "hydra.run.dir=twin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the loggers get no" not in done.stdout + done.stderr
    where = (tmp_path / "twin" / ".hydra" / "hydra.yaml").read_text()
    assert f"{environment['PYTHONPATH']}/mnist_lightning/conf" in where, "what is installed"
    metrics = json.loads((tmp_path / "twin" / "metrics.json").read_text())

    process = preloaded.start(*module("train"), *settings, "hydra.run.dir=run", cwd=tmp_path, env=environment)
    wait_for(lambda: any(tmp_path.glob("run/checkpoints/last.ckpt")), process)
    process.kill()
    process.wait()
    done = command("train", "resume=run", *trust, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (load(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("twin", "run"))
    assert differences(one, two) == []

    for words in (
        ["evaluate", "run=run", "split=val"],
        ["compare", "runs=[run,twin]"],
        ["export", "run=run"],
    ):
        if trust:
            done = command(*words, cwd=tmp_path)
            assert done.returncode == 1
            assert retyped(done.stderr) == ["-m", f"mnist_lightning.{words[0]}", *words[1:], *trust]
        done = command(*words, *trust, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    evaluated = json.loads((tmp_path / "run" / "evaluation" / "val" / "metrics.json").read_text())
    assert evaluated["acc"] == pytest.approx(metrics["val/acc"], abs=1e-6)

    draw_seven().save(tmp_path / "picture.png")
    done = command("predict", "images=picture.png", "run=run", "output=predicted", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    classes = one["hyper_parameters"]["class_names"]
    table = (tmp_path / "predicted" / "predictions.csv").read_text()
    assert all(class_name in table.splitlines()[0] for class_name in classes)
    arguments = [one for one in settings if not one.startswith(("trainer", "checkpoint", "model"))]
    done = command("visualize", *arguments, "output=drawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    if name not in QUICK:
        done = command(
            "train", "-m", *settings, "seed=1,2", "test=false", "hydra.sweep.dir=sweep", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        done = command("report", "run=sweep", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "| 1 |" in (tmp_path / "sweep" / "report.md").read_text()


# A fault -> the change to a correct data set, and the message
def change(**values: Any) -> Callable[[Arrays], Arrays]:
    return lambda content: content | values


WRONG_ARRAYS: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "nothing": (lambda _: {}, "must hold train_images, .*, and holds nothing"),
    "one part": (lambda all: {"train_images": all["train_images"]}, "must hold train_images"),
    "both": (lambda all: all | one_set(all), "must hold train_images"),
    "no labels": (
        lambda all: {key: value for key, value in all.items() if key != "test_labels"},
        "holds test_images and no test_labels",
    ),
    "floats": (lambda all: all | {"train_images": all["train_images"] / 255}, "train_images must be uint8, .* float64"),
    "NaN": (change(test_images=np.full((2, 5, 5), np.nan)), "test_images must be uint8"),
    "flat images": (lambda all: all | {"train_images": all["train_images"].reshape(60, -1)}, r"got \(60, 25\)"),
    "two channels": (change(train_images=np.zeros((60, 5, 5, 2), np.uint8)), r"got \(60, 5, 5, 2\)"),
    "no images": (change(train_images=np.zeros((0, 5, 5), np.uint8)), "holds no image"),
    "no pixels": (change(train_images=np.zeros((60, 0, 5), np.uint8)), "holds no image"),
    "labels of floats": (change(train_labels=np.zeros(60)), "train_labels must be whole numbers, got float64"),
    "words": (change(train_labels=np.array(["a"] * 60)), "train_labels must be whole numbers"),
    "too few labels": (change(train_labels=np.arange(7)), "one for each of 60 images"),
    "negative": (change(train_labels=np.arange(60) % 3 - 1), "must be 0, 1, 2 …, got -1"),
    "from 1 to 3": (change(train_labels=np.arange(60) % 3 + 1), "no image of class 0"),
    "huge": (change(train_labels=np.arange(60) + 10**6), "must be 0, 1, 2 …, got 1000059"),
    "more than the names": (change(class_names=["a", "b"]), r"in \[0, 2\), got 2"),
    "a name too many": (change(class_names=["a", "b", "c", "d"]), "no image of class d"),
    "equal names": (change(class_names=["a", "b", "a"]), "two of its class_names are equal"),
    "names that are numbers": (change(class_names=[1, 2, 3]), "must be a list of texts"),
    "one class": (
        change(train_labels=np.zeros(60, int), test_labels=np.zeros(12, int)),
        "has a single class",
    ),
    "other sizes": (change(test_images=np.zeros((12, 5, 6), np.uint8)), r"\(5, 5\) and \(5, 6\)"),
    "no fingerprint": (change(fingerprint=3), "fingerprint must be a text, got int"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_ARRAYS)
def test_arrays_that_do_not_fit_are_told_in_a_line(what: str) -> None:
    right = make_arrays(3, (5, 5), 20)
    check_arrays(right, "it")
    wrong, line = WRONG_ARRAYS[what]
    with pytest.raises(DataError, match=line) as told:
        check_arrays(wrong(right), "it")
    assert "\n" not in str(told.value)


def test_arrays_of_torch_of_any_whole_numbers(tmp_path: Path) -> None:
    right = make_arrays(3, (5, 5, 1), 20)
    of_torch = {key: torch.tensor(value).to(torch.uint8) for key, value in right.items()}
    one, two = check_arrays(right, "it"), check_arrays(of_torch, "it")
    assert one.parts["train"][0].shape == (60, 5, 5), "a single channel is none"
    assert one.parts["train"][1].dtype == torch.int64
    assert torch.equal(one.parts["train"][0], two.parts["train"][0])
    assert one.fingerprint == two.fingerprint
    other = right | {"test_images": right["test_images"].copy()}
    other["test_images"][3, 2, 1] ^= 1
    assert check_arrays(other, "it").fingerprint != one.fingerprint
    assert check_arrays(right | {"fingerprint": "mine"}, "it").fingerprint == "mine"


# A fault of a file -> the function that writes the file, and the message
WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "is no file"),
    "empty": (lambda path: path.touch(), "can't be read as an npz file"),
    "text": (lambda path: path.write_text("images"), "can't be read as an npz file"),
    "one array": (lambda path: np.save(path.open("wb"), np.zeros(3)), "is a single array"),
    "objects": (
        lambda path: np.savez(path.open("wb"), images=np.array([None, {}]), labels=np.zeros(2)),
        "it holds objects, and only arrays of numbers are read",
    ),
    "cut": (lambda path: cut(path), "can't be read as an npz file|is damaged"),
    "a bit flipped": (lambda path: flip(path), "can't be read as an npz file|is damaged|must"),
}  # fmt: skip


def cut(path: Path) -> None:
    np.savez(path.open("wb"), **make_arrays(3, (5, 5), 20))
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    np.savez_compressed(path.open("wb"), **make_arrays(3, (5, 5), 20))
    content = bytearray(path.read_bytes())
    content[200] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("what", WRONG_FILES)
def test_npz_files_that_can_not_be_read_are_told_in_a_line(what: str, tmp_path: Path) -> None:
    write, line = WRONG_FILES[what]
    path = tmp_path / "set.npz"
    write(path)
    with pytest.raises(DataError, match=line) as told:
        read_npz(path)
    assert str(told.value).startswith(f"data.path={path}")
    assert "\n" not in str(told.value)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "pictures", make_arrays(3, (9, 7, 3), 10))
    return tmp_path / "pictures"


def read(folder: Path, tmp_path: Path, *, size: int | None = None, grey: bool = False) -> Any:
    source = find_source("folder", tmp_path / "cache", path=folder, size=size, grey=grey)
    source.make_whole()
    return source.read()


def test_a_folder_of_pictures(pictures: Path, tmp_path: Path) -> None:
    images = read(pictures, tmp_path)
    assert images.class_names == ["class 0", "class 1", "class 2"]
    train, labels = images.parts["train"]
    assert train.shape == (30, 9, 7, 3)
    files = sorted((pictures / "train" / "class 1").iterdir())
    (first,) = (labels == 1).nonzero()[:1, 0].tolist()
    assert np.array_equal(train[first].numpy(), np.asarray(Image.open(files[0])))
    assert images.parts["test"][0].shape == (6, 9, 7, 3)
    grey = read(pictures, tmp_path, grey=True, size=5)
    assert grey.parts["train"][0].shape == (30, 5, 5)
    assert grey.fingerprint != images.fingerprint
    assert sorted(path.name for path in pictures.iterdir()) == ["test", "train"], "the cache lies elsewhere"


def test_it_is_decoded_once_and_a_change_is_noticed(pictures: Path, tmp_path: Path) -> None:
    before = read(pictures, tmp_path)
    (cache,) = (tmp_path / "cache" / "folders").iterdir()
    written = cache.stat().st_mtime_ns
    assert read(pictures, tmp_path).fingerprint == before.fingerprint
    assert cache.stat().st_mtime_ns == written
    picture = next((pictures / "train" / "class 2").iterdir())
    Image.new("RGB", (7, 9), "red").save(picture)
    changed = read(pictures, tmp_path)
    assert changed.fingerprint != before.fingerprint
    assert cache.stat().st_mtime_ns > written
    picture.unlink()
    assert len(read(pictures, tmp_path).parts["train"][1]) == 29
    cache.write_bytes(b"damaged")
    assert len(read(pictures, tmp_path).parts["train"][1]) == 29


def test_one_set_is_split_by_the_splits_seed(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", make_arrays(3, (9, 7, 3), 40), parts=False)
    source = find_source("folder", tmp_path / "cache", path=tmp_path / "pictures")

    def count(split_seed: int) -> dict[str, torch.Tensor]:
        splits, names, _ = read_splits(source, None, split_seed, source.stamp())
        assert names == ("class 0", "class 1", "class 2")
        assert torch.bincount(splits["test"].labels).tolist() == [8, 8, 8]
        assert torch.bincount(splits["val"].labels).tolist() == [3, 3, 3]
        assert torch.bincount(splits["train"].labels).tolist() == [29, 29, 29]
        return {name: split.images for name, split in splits.items()}

    one, two, again = count(0), count(1), count(0)
    assert torch.equal(one["test"], again["test"])
    assert not torch.equal(one["test"], two["test"])
    everything = torch.cat(list(one.values())).flatten(1)
    assert len(everything.unique(dim=0)) == 120, "no image is in two splits"


def put(path: Path, picture: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: shutil.rmtree(folder), "is missing"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.touch()), "is no folder"),
    "an empty class": (lambda folder: (folder / "train" / "zz").mkdir(), r"class zz is missing in test/"),
    "no picture": (
        lambda folder: [(folder / part / "zz").mkdir() for part in ("train", "test")],
        r"train/zz has no picture",
    ),
    "no test": (lambda folder: shutil.rmtree(folder / "test"), r"has train/<class>/ and no test/<class>/"),
    "a class of the test": (
        lambda folder: put(folder / "test" / "zz" / "1.png", Image.new("RGB", (7, 9))),
        "class zz is missing in train/",
    ),
    "another size": (
        lambda folder: put(folder / "train" / "class 1" / "zz.png", Image.new("RGB", (8, 9))),
        r"class 0/.*png has 7×9 pixels and .*zz.png 8×9: resize all of them",
    ),
    "no picture in a file": (
        lambda folder: (folder / "train" / "class 1" / "zz.png").write_text("text"),
        r"zz.png: no picture that can be read",
    ),
    "an empty file": (
        lambda folder: (folder / "train" / "class 1" / "zz.png").touch(),
        r"zz.png: (the file is empty|no picture)",
    ),
    "a cut picture": (lambda folder: cut_picture(folder / "train" / "class 1" / "zz.png"), r"zz.png: "),
    "fractions": (
        lambda folder: put(folder / "train" / "class 1" / "zz.tiff", Image.new("F", (7, 9))),
        r"zz.tiff: its pixels are floats",
    ),
}  # fmt: skip


def cut_picture(path: Path) -> None:
    put(path, Image.effect_noise((7, 9), 50).convert("RGB"))
    path.write_bytes(path.read_bytes()[:80])


@pytest.mark.parametrize("what", WRONG_FOLDERS)
def test_folders_that_do_not_fit_are_told_in_a_line(what: str, pictures: Path, tmp_path: Path) -> None:
    wrong, line = WRONG_FOLDERS[what]
    wrong(pictures)
    with pytest.raises(DataError, match=line) as told:
        read(pictures, tmp_path)
    assert "\n" not in str(told.value)


def test_other_files_and_hidden_ones_are_left_alone(pictures: Path, tmp_path: Path) -> None:
    before = read(pictures, tmp_path)
    for name in ("Thumbs.db", ".DS_Store", ".hidden.png", "notes.txt"):
        (pictures / "train" / "class 0" / name).write_text("nothing")
    (pictures / ".git").mkdir()
    (pictures / "train" / ".ipynb_checkpoints").mkdir()
    (pictures / "train" / "class 0" / "more.png").mkdir()
    assert read(pictures, tmp_path).fingerprint == before.fingerprint


def test_numbered_classes_come_in_their_order(tmp_path: Path) -> None:
    for number in range(12):
        put(tmp_path / "numbers" / str(number) / "1.png", Image.new("L", (4, 4), number))
    assert read(tmp_path / "numbers", tmp_path).class_names == [str(number) for number in range(12)]


def test_pictures_of_every_mode(tmp_path: Path) -> None:
    def see(picture: Image.Image, *, grey: bool = True, suffix: str = "png") -> NDArray[np.uint8]:
        put(tmp_path / f"one.{suffix}", picture)
        return read_picture(tmp_path / f"one.{suffix}", size=None, grey=grey)

    half = Image.new("L", (2, 3), 128)
    assert see(half).tolist() == [[128, 128]] * 3
    assert see(half, grey=False).shape == (3, 2, 3)
    assert see(half.convert("1", dither=Image.Dither.NONE)).max() == 255
    deep = Image.fromarray(np.full((3, 2), 128 * 257, dtype=np.uint16))
    assert see(deep).tolist() == [[128, 128]] * 3, "16 bits a pixel"
    clear = Image.new("RGBA", (2, 3), (0, 0, 0, 0))
    assert see(clear).tolist() == [[255, 255]] * 3, "what is transparent is white"
    turned = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # must be rotated by 90 degrees
    put(tmp_path / "turned.png", turned, exif=exif)
    seen = read_picture(tmp_path / "turned.png", size=None, grey=True)
    assert seen.tolist() == np.rot90(np.asarray(turned), -1).tolist()
    assert read_picture(tmp_path / "turned.png", size=(4, 5), grey=True).shape == (4, 5)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_emnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    upright = write_emnist(tmp_path)
    monkeypatch.setattr(EMNIST, "md5", hashlib.md5((tmp_path / "gzip.zip").read_bytes()).hexdigest())
    with serve(tmp_path) as address, caplog.at_level("INFO"):
        monkeypatch.setattr(EMNIST, "url", f"{address}/gzip.zip")
        letters = find_source("emnist_letters", tmp_path / "data")
        assert not letters.is_whole()
        letters.make_whole()
    assert "560 MB" in caplog.text, "told before it is fetched"
    assert letters.is_whole()
    images = letters.read()
    assert images.class_names == list("abcdefghijklmnopqrstuvwxyz"), "26, not torchvision's 27"
    assert torch.bincount(images.parts["train"][1]).tolist() == [2] * 26
    assert np.array_equal(images.parts["test"][0].numpy(), upright["letters test"]), "not transposed"
    raw = tmp_path / "data" / "EMNIST" / "raw"
    assert len(list(raw.iterdir())) == 4
    (raw / "emnist-letters-test-labels-idx1-ubyte").write_bytes(idx(np.zeros(52, np.uint8)))
    assert not letters.is_whole(), "a label of 0 is none of letters"


def test_a_broken_emnist_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_emnist(tmp_path)
    with serve(tmp_path) as address:
        monkeypatch.setattr(EMNIST, "url", f"{address}/gzip.zip")
        source = find_source("emnist_balanced", tmp_path / "data")
        with pytest.raises(OSError, match="data=emnist_balanced could not be downloaded"):
            source.make_whole()  # the checksum is wrong
        monkeypatch.setattr(EMNIST, "md5", hashlib.md5((tmp_path / "gzip.zip").read_bytes()).hexdigest())
        source.make_whole()
    assert source.is_whole()
    assert len(source.read().class_names) == 47


class Opened:
    """Make a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "served" / "cifar-10-batches-py"
    checksums = write_cifar(folder)
    shutil.make_archive(str(tmp_path / "served" / "cifar"), "gztar", tmp_path / "served", folder.name)
    archive = tmp_path / "served" / "cifar.tar.gz"
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{n}", checksums[f"data_batch_{n}"]] for n in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": checksums["batches.meta"]})
    source = Cifar10(tmp_path / "data")
    with serve(tmp_path / "served") as address:
        monkeypatch.setattr(CIFAR10, "url", f"{address}/missing.tar.gz")
        with pytest.raises(OSError, match="data=cifar10 could not be downloaded"):
            source.make_whole()
        assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
        monkeypatch.setattr(CIFAR10, "url", f"{address}/cifar.tar.gz")
        source.make_whole()
    images = source.read()
    assert images.parts["train"][0].shape == (100, 32, 32, 3)
    assert images.parts["test"][0].shape == (20, 32, 32, 3)
    first = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0].reshape(3, 32, 32)
    assert np.array_equal(images.parts["train"][0][0].permute(2, 0, 1).numpy(), first)

    strange = source.files[2]
    strange.write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
    assert not source.is_whole()
    with pytest.raises(RuntimeError, match="corrupted"):
        source.read()
    assert not (tmp_path / "opened").exists(), "a pickle with another checksum is never opened"


def test_names_are_torchvisions() -> None:
    for name, known in KNOWN.items():
        dataset: Any = find_class(name)
        if name.startswith("emnist"):
            theirs = dataset.classes_split_dict[name.partition("_")[2]]
            assert list(known.class_names) == [one for one in theirs if one != "N/A"]
        elif name in ("fashion_mnist", "kmnist"):
            assert list(known.class_names) == dataset.classes
        assert known.folder in ("EMNIST", "cifar-10-batches-py", dataset.__name__)


# Settings that do not fit, reported before torch is imported -> the message
WRONG_SETTINGS = {
    ("data=folder",): "data.path",
    ("data.path=x",): "data.path is not for data=mnist: only",
    ("data=npz", "data.path=x", "data.size=28"): "data.size is for data=folder only",
    ("data.grey=true",): "data.grey is for data=folder only",
    ("data=folder", "data.path=x", "data.size=0"): "data.size must be >= 1, got 0",
    (
        "data=cifar10",
        "data.deskew=true",
    ): "data.deskew is for grey images, and the images of cifar10 are in colour",
    ("data=cifar10", "data.val_size=50000"): "data.val_size must be in [0, 49999], got 50000",
    ("data.mean=[0.1,0.2,0.3]",): "data.mean must be one number, or one for each of 1 channels",
    ("data=own",): "data.source names no _target_",
    ("data=own", "+data.source.path=x"): "data.source names no _target_",
}


@pytest.mark.parametrize("arguments", WRONG_SETTINGS)
def test_settings_that_do_not_fit(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(Exception, match=re.escape(WRONG_SETTINGS[arguments])):
        settle(tmp_path, *arguments)


# Settings that do not fit a data set of 3 classes, (90, 9, 7, 3), reported once it is read -> the message
WRONG_SIZES = {
    ("data.val_size=90",): "data.val_size must be in [0, 89], got 90",
    ("data.val_size=88",): "no image of class",
    (
        "data.batch_size=82",
    ): "data.batch_size must be at most the 81 training images that data.val_size=9 leaves",
    ("data.augment.shift=4",): "data.augment.shift must be in [0, 3] pixels, got 4",
    (
        "data.augment.elastic=1",
        "data.augment.smoothness=10",
    ): "data.augment.smoothness must be in [1, 9] pixels",
    ("data.deskew=true",): "data.deskew is for grey images",
    ("data.mean=[0.5,0.5]",): "data.mean must be one number, or one for each of 3 channels",
}


@pytest.mark.slow
def test_sizes_are_those_of_the_images(tmp_path: Path, command: Run) -> None:
    np.savez(tmp_path / "set.npz", **make_arrays(3, (9, 7, 3), 30))
    right = ("data=npz", f"data.path={tmp_path / 'set.npz'}", "data.batch_size=20")
    for arguments, line in WRONG_SIZES.items():
        data = settle(tmp_path, *right, *arguments).data
        with pytest.raises((DataError, ConfigError), match=re.escape(line)):
            use(data)
    use(settle(tmp_path, *right).data)
    done = command("train", *right, "data.val_size=90", cwd=tmp_path)
    assert done.returncode == 1
    assert "data.val_size must be in [0, 89], got 90" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def use(data: Data) -> None:
    datamodule = MNISTDataModule(**data.module_arguments(), seed=1)
    datamodule.prepare_data()
    datamodule.setup("fit")
    data.check_shape(datamodule.image_shape)


def test_from_python_a_wrong_name_is_told() -> None:
    with pytest.raises(ValueError, match=r"name must be one of mnist, .*, folder, npz, got 'cifar'"):
        MNISTDataModule(name="cifar")
    with pytest.raises(ValueError, match="name='folder' needs a path"):
        MNISTDataModule(name="folder")


def test_mean_and_std_are_those_of_the_training_images(tmp_path: Path) -> None:
    content = make_arrays(3, (9, 7, 3), 30)
    np.savez(tmp_path / "set.npz", **content)
    datamodule = MNISTDataModule(name="npz", path=tmp_path / "set.npz", batch_size=8, val_size=None)
    datamodule.prepare_data()
    datamodule.setup("fit")
    train = datamodule.splits["train"].images.double() / 255
    assert len(train) == 81
    means, stds = datamodule.measure_pixels()
    assert means == pytest.approx(train.mean(dim=(0, 1, 2)).tolist(), abs=1e-6)
    assert stds == pytest.approx(train.std(dim=(0, 1, 2), correction=0).tolist(), abs=1e-6)


def test_a_colour_that_does_not_vary_is_let_through_and_blank_images_are_not() -> None:
    content = make_arrays(3, (9, 7, 3), 30)
    content["train_images"][..., 2] = 7
    assert measure(content)[1][2] == 1.0
    content["train_images"][:] = 7
    with pytest.raises(DataError, match="are blank: all pixels are equal"):
        measure(content)


def measure(content: Arrays) -> tuple[list[float], list[float]]:
    datamodule = MNISTDataModule(name="own", source={"_target_": "unused"})
    datamodule.splits = {"train": Images(torch.tensor(content["train_images"]), torch.zeros(90))}
    datamodule.image_shape = (3, 9, 7)
    return datamodule.measure_pixels()


@pytest.mark.slow
def test_other_images_are_refused(tmp_path: Path, command: Run) -> None:
    """A net is not evaluated on, or trained further with, a file that has changed since its training."""
    content = make_arrays(3, (9, 7), 30)
    np.savez(tmp_path / "set.npz", **content)
    settings = ("data=npz", "data.path=set.npz", *TINY, "logger=none", "scheduler=none")
    done = command("train", *settings, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copyfile(tmp_path / "set.npz", tmp_path / "moved.npz")
    content["test_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "set.npz", **content)
    told = "are not those that the run was trained on: their fingerprint is"
    for words in (("evaluate", "run=run"), ("train", "resume=run", "trainer.max_epochs=3")):
        done = command(*words, cwd=tmp_path)
        assert done.returncode == 1, words
        assert told in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = command("evaluate", "run=run", "data_dir=moved.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("train", "resume=run", "trainer.max_epochs=3", "data.path=moved.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_source_gives_what_it_says(tmp_path: Path, command: Run) -> None:
    shutil.copytree(REPOSITORY / "tests" / "own", tmp_path, dirs_exist_ok=True)
    (tmp_path / "other.py").write_text("def load():\n    return [1, 2]\n\ndef fail():\n    return 1 / 0\n")
    for arguments, line in {
        ("data.source._target_=my_data.lode",): r"data.source._target_=my_data.lode can't be imported",
        (
            "+data.source.cuont=3",
        ): r"data.source.cuont is no argument of my_data.load \(did you mean count\?\)",
        ("data.source._target_=other.load",): r"other.load must return a dict of arrays, got list",
        ("data.source._target_=other.fail",): r"data.source: other.fail .*ZeroDivisionError",
        ("+data.source.names=one two",): r"my_data.load: its labels must be in \[0, 2\), got 2",
    }.items():
        done = command("train", "--config-dir", "my_conf", "data=columns", *arguments, *TINY, cwd=tmp_path)
        assert done.returncode == 1
        assert re.search(line, done.stderr), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_source_of_a_stranger_is_refused(tmp_path: Path, command: Run) -> None:
    """A source is refused by its name, and if it reads the environment, whatever is trusted."""
    shutil.copytree(REPOSITORY / "tests" / "own", tmp_path, dirs_exist_ok=True)
    settings = ("--config-dir", "my_conf", "data=columns", *TINY, "logger=none", "trainer.max_epochs=1")
    done = command("train", *settings, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    checkpoint = load(path)
    for source, line in (
        ({"_target_": "os.mkdir", "path": str(tmp_path / "made")}, "names os.mkdir (data.source)"),
        ({"_target_": "my_data.load", "names": "${oc.env:HOME} a b"}, "which only a settings file may hold"),
    ):
        checkpoint["datamodule_hyper_parameters"]["source"] = source
        (tmp_path / "strange.ckpt").write_bytes(serialize(checkpoint))
        done = command("evaluate", "checkpoint=strange.ckpt", "trust=my_data", cwd=tmp_path)
        assert done.returncode == 1
        assert line in done.stderr
    assert not (tmp_path / "made").exists()


def test_a_size_without_room_is_told_before_a_picture_is_read() -> None:
    pictures = [Picture("all", 0, "missing.png", 0, 0)] * 10**6
    with pytest.raises(DataError, match=r"^data.size=7000: 1,000,000 pictures take 49,000.0 GB, and "):
        decode(pictures, size=7_000, grey=True)
    with pytest.raises(DataError, match=r"^data.size=8000 makes 64,000,000 pixels of a picture, at most"):
        decode(pictures, size=8_000, grey=True)


def test_tiny_images_need_no_smoothness(tmp_path: Path) -> None:
    augment = settle(tmp_path).data.augment
    augment.check_shape(2, 2)
    augment.elastic = 1.0
    with pytest.raises(ValueError, match=r"smoothness must be in \[1, 2\] pixels, got 5"):
        augment.check_shape(2, 2)
