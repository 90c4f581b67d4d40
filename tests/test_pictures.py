import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lightning import figures

SHORT = ("trainer.max_epochs=1", "+trainer.limit_train_batches=20", "test=false", "model.hidden=[8]")
IMAGES = {"images/training", "net/first_layer", "val/confusion_matrix", "val/mistakes"}


def events(run: Path) -> Any:
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    accumulator.Reload()
    return accumulator


def test_a_single_run_fills_tensorboard(trained_run: Path) -> None:
    content = events(trained_run)
    tags = content.Tags()
    assert set(tags["images"]) == IMAGES
    assert tags["graph"]
    assert tags["histograms"] == []
    for tag in IMAGES:
        shown = content.Images(tag)
        moments = {"images/training": [0], "val/mistakes": [1720]}
        assert [event.step for event in shown] == moments.get(tag, [215, 860, 1720])
        pictures = [
            np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L")) for event in shown
        ]
        for picture in pictures:
            assert picture.shape == pictures[0].shape
            assert picture.shape[1] == 960
            assert picture.std() > 5  # not blank
        for one, other in itertools.pairwise(pictures):
            assert not np.array_equal(one, other)
    graph = content.Graph()
    linear = [node for node in graph.node if node.op == "aten::linear"]
    assert len(linear) == 2


def test_a_picture_of_a_series_is_the_one_drawn_alone() -> None:
    """Only changed parts are drawn again; the result, also around them, equals the whole figure."""
    generator = np.random.default_rng(0)
    matrices = [generator.integers(0, most, (3, 3)) for most in (50, 9)]
    first, last = figures.confusion_matrices(matrices, ["a", "b", "c"], titles=["one", "two"])
    alone = figures.to_array(figures.confusion_matrix(matrices[1], ["a", "b", "c"], title="two"))
    assert np.abs(last.astype(int) - alone).mean() < 1
    assert np.abs(first.astype(int) - alone).mean() > 1
    weights = [generator.normal(size=(4, 5, 5)) for _ in range(2)]
    first, last = figures.first_layers(weights, titles=["one", "two"])
    alone = figures.to_array(figures.first_layer(weights[1], title="two"))
    assert np.array_equal(last, alone)
    assert not np.array_equal(first, alone)


@pytest.mark.slow
def test_histograms_show_weights_and_gradients_and_a_multirun_has_no_pictures(
    tmp_path: Path, command: Run
) -> None:
    arguments = ["callbacks=default,histograms", "hydra.sweep.dir=histograms"]
    done = command("train", "-m", *arguments, *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    default, histograms = (events(tmp_path / "histograms" / job).Tags() for job in "01")
    names = [f"net.layers.{layer}.{kind}" for layer in (1, 3) for kind in ("weight", "bias")]
    assert set(histograms["histograms"]) == {
        f"{kind}/{name}" for kind in ("weights", "gradients") for name in names
    }
    for job, tags in (("0", default), ("1", histograms)):
        assert tags["images"] == []
        assert not tags["graph"]
        assert (tmp_path / "histograms" / job / "tensorboard" / "train").is_dir()
    assert not list(tmp_path.glob("histograms/*/film.npz")), "a job of a multirun keeps no film"


@pytest.mark.slow
def test_one_key_turns_them_off_and_nothing_else_changes(tmp_path: Path, command: Run) -> None:
    """With batch norm and dropout, pictures draw no random number and do not change the net's state."""
    arguments = ["callbacks.pictures.enabled=true,false", "model.norm=batch", "model.dropout=0.5"]
    done = command(
        "train",
        "-m",
        *arguments,
        *SHORT,
        "hydra.sweep.dir=pictures",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    runs = [tmp_path / "pictures" / job for job in "01"]
    assert [set(events(run).Tags()["images"]) for run in runs] == [IMAGES, set()]
    with_pictures, without = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in runs
    )
    assert with_pictures.keys() == without.keys()
    assert all(torch.equal(with_pictures[name], without[name]) for name in without)


@pytest.mark.slow
def test_without_tensorboard_nothing_happens(tmp_path: Path, command: Run) -> None:
    arguments = ["logger=csv,none", "callbacks.pictures.enabled=true", "hydra.sweep.dir=loggers"]
    done = command("train", "-m", *arguments, *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "loggers").glob("*/tensorboard"))
    assert len(list((tmp_path / "loggers").glob("*/checkpoints/best.ckpt"))) == 2
