"""Tests of the film of a training: its content, its use, and that recording changes nothing."""

import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from conftest import Run
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn

from mnist_lightning.callbacks.film import NUM_MOMENTS, plan
from mnist_lightning.callbacks.watch import WatchPage
from mnist_lightning.classifier import DigitClassifier
from mnist_lightning.evaluation.trained import load_classifier
from mnist_lightning.network import FeedForward
from mnist_lightning.rundir.film import Film, find_film, pack_film, read_film, write_film

Fit = Callable[..., dict[str, object]]

SHORT = ("trainer.max_epochs=2", "+trainer.limit_train_batches=40", "model.hidden=32", "logger=none")
FILMED = (*SHORT, "callbacks.film.enabled=true")


def test_it_shows_the_net_as_it_was_and_changes_nothing(fit: Fit, tmp_path: Path) -> None:
    plain, filmed = fit(*SHORT, folder="plain"), fit(*FILMED, folder="filmed")
    same = [key for key in plain if key.startswith(("val/", "last/"))]
    assert len(same) >= 4
    assert [plain[key] for key in same] == [filmed[key] for key in same], "to the bit"
    path = tmp_path / "filmed" / "film.npz"
    assert not (tmp_path / "plain" / "film.npz").exists()
    assert path.stat().st_size < 2_000_000
    film = read_film(path.parent)
    assert [int(film.steps[0]), int(film.steps[-1])] == [0, 80]
    assert (np.diff(film.steps) > 0).all()
    assert 30 < len(film.steps) <= NUM_MOMENTS
    assert film.epochs[-1] == 2
    assert film.weights.shape[1:] == (24, 28, 28)
    assert np.bincount(film.labels).tolist() == [2] * 10, "two images of each class"

    classifier, _ = load_classifier(path.parent / "checkpoints" / "last.ckpt")
    weights = classifier.net.layers[1].weight[:24].reshape(24, 28, 28).detach().numpy()  # type: ignore[union-attr]
    shown = (film.weights[-1].astype(float) - 128) / 127 * film.limits[-1]
    assert np.abs(shown - weights).max() <= film.limits[-1] / 250
    with torch.inference_mode():
        wanted = classifier(torch.from_numpy(film.images)).softmax(dim=1).numpy()
    assert np.abs(film.probabilities[-1] / 255 - wanted).max() < 1 / 250
    assert film.train_loss[-1] < 0.5 < film.train_loss[0]
    assert film.val_acc[-1] > 0.8 > film.val_acc[0]
    assert np.isnan(film.batch_loss[0])
    assert np.isfinite(film.batch_loss[1:]).all()


def test_a_run_that_goes_on_goes_on_with_its_film(fit: Fit, tmp_path: Path) -> None:
    constant = (*FILMED, "scheduler=none")
    fit(*constant, "trainer.max_epochs=1")
    first = read_film(tmp_path / "run")
    assert first.steps[-1] == 40
    fit(*constant, "resume=run")
    film = read_film(tmp_path / "run")
    assert film.steps[-1] == 80
    assert (np.diff(film.steps) > 0).all()
    np.testing.assert_array_equal(film.weights[: len(first.steps)], first.weights)


@pytest.mark.parametrize("total", [1, 2, 80, 1720, 129_000])
def test_moments_are_denser_at_the_start(total: int) -> None:
    steps = plan(total)
    assert [steps[0], steps[-1]] == [0, total]
    assert len(steps) <= NUM_MOMENTS
    if total > 1000:
        assert len(steps) > 50
        assert sum(step < total / 10 for step in steps) > len(steps) / 3


def make_film(moments: int = 4) -> Film:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.integers(0, 256, shape, dtype=np.uint8)

    losses = [np.linspace(2, 0.1, moments, dtype=np.float32) for _ in range(5)]
    return Film(
        np.arange(moments), np.arange(moments, dtype=np.float32), draw(moments, 6, 9, 7), losses[0],
        draw(5, 9, 7), np.arange(5) % 3, draw(moments, 5, 3), draw(moments, 5, 6), *losses,
    )  # fmt: skip


def test_a_film_is_read_as_it_was_written(tmp_path: Path) -> None:
    film = make_film()
    write_film(tmp_path / "film.npz", film)
    again = read_film(tmp_path)
    for field in fields(Film):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(film, field.name))
    packed = pack_film(film)
    assert packed["units"] == 6
    assert json.dumps(packed, allow_nan=False)


@pytest.mark.parametrize("kind", ["none", "cut", "text", "bomb", "pickle", "shapes", "labels", "missing"])
def test_a_damaged_film_costs_a_line(kind: str, tmp_path: Path) -> None:
    path, film = tmp_path / "film.npz", make_film()
    write_film(path, film)
    content = path.read_bytes()
    if kind == "none":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        path.write_text("no film")
    elif kind == "bomb":
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("more.npy", bytes(60_000_000))
    else:
        arrays = {field.name: getattr(film, field.name) for field in fields(Film)}
        arrays |= {
            "pickle": {"steps": np.array([{}], dtype=object)},
            "shapes": {"weights": film.weights[:2]},
            "labels": {"labels": film.labels + 7},
            "missing": {},
        }[kind]
        if kind == "missing":
            del arrays["epochs"]
        stored = io.BytesIO()
        np.savez(stored, **arrays)
        path.write_bytes(stored.getvalue())
    told = "has no film.npz: a single run of train writes one" if kind == "none" else "is not a readable film"
    with pytest.raises(OSError, match=told):
        read_film(tmp_path)


def test_watch_writes_the_page_and_ends_it(fit: Fit, tmp_path: Path) -> None:
    fit(*FILMED, "watch=true", "trainer.max_epochs=1")
    text = (tmp_path / "run" / "page.html").read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["live"] == 0
    assert data["about"] == "after 40 steps"
    assert data["film"]["steps"][-1] == 40
    assert len(data["samples"]["labels"]) == 100


@pytest.mark.slow
def test_a_film_is_drawn_and_exported(fit: Fit, tmp_path: Path, command: Run) -> None:
    fit(*FILMED, "trainer.max_epochs=1")
    film = read_film(tmp_path / "run")
    done = command("visualize", "film=run", "output=pictures", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "pictures" / "film.gif") as picture:
        assert picture.n_frames == len(film.steps)  # type: ignore[attr-defined]
        first = np.asarray(picture.convert("L"))
        picture.seek(picture.n_frames - 1)  # type: ignore[attr-defined]
        assert first.std() > 10
        assert np.abs(first - np.asarray(picture.convert("L")).astype(float)).mean() > 1, "it moves"
    done = command("export", "format=html", "film=true", "run=run", "output=filmed.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"written to +filmed.html \([\d,]+ kB\)", done.stdout)
    assert json.loads((tmp_path / "filmed.html").read_text().split('id="data">')[1].split("</script>")[0])[
        "film"
    ]


def test_watch_tells_of_a_net_that_the_page_can_not_run() -> None:
    colour = DigitClassifier(FeedForward([4], image_shape=(3, 5, 5)), image_shape=(3, 5, 5))
    own = DigitClassifier(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    for classifier, told in (
        (colour, "is for coloured ones"),
        (own, "and this is torch.nn.modules.container.Sequential"),
    ):
        with pytest.raises(MisconfigurationException, match=f"^watch=true: the page .*{told}"):
            WatchPage(path="page.html").on_fit_start(L.Trainer(logger=False), classifier)


def test_a_film_that_is_not_there_is_told(trained_run: Path, tmp_path: Path, command: Run) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint = trained_run / "checkpoints" / "best.ckpt"
    (tmp_path / "run" / "checkpoints" / "best.ckpt").write_bytes(checkpoint.read_bytes())
    for name, argument in (("visualize", "film=run"), ("export", "run=run")):
        more = ["format=html", "film=true"] if name == "export" else []
        done = command(name, argument, *more, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(
            "run has no film.npz: a single run of train writes one"
        )


@pytest.mark.posix("symbolic links")
def test_a_film_that_is_gone_hides_no_other(tmp_path: Path) -> None:
    for name in ("whole", "gone"):
        (tmp_path / name).mkdir()
    (tmp_path / "whole" / "film.npz").touch()
    (tmp_path / "gone" / "film.npz").symlink_to(tmp_path / "nowhere")
    assert find_film("latest", logs=tmp_path) == tmp_path / "whole"
