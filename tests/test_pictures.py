import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import Run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

SHORT = ("trainer.max_epochs=1", "+trainer.limit_train_batches=20", "test=false", "model.hidden=[8]")
IMAGES = {"data/images", "net/first_layer", "val/confusion_matrix", "val/mistakes"}


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
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "lr"} <= set(tags["scalars"])
    for tag in IMAGES:
        (event,) = content.Images(tag)
        picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
        assert picture.shape[1] == 960
        assert picture.std() > 10  # not blank
    graph = content.Graph()
    linear = [node for node in graph.node if node.op == "aten::linear"]
    assert len(linear) == 2


def test_training_and_validation_stand_in_one_chart(trained_run: Path) -> None:
    content = events(trained_run)
    (event,) = content.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for part in layout.category for chart in part.chart}
    assert charts["loss"] == ["^train/loss$", "^val/loss$"]
    assert charts["accuracy"] == ["^train/acc$", "^val/acc$"]
    scalars = set(content.Tags()["scalars"])
    assert {tag.strip("^$") for tags in charts.values() for tag in tags} <= scalars


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
    for tags in (default, histograms):
        assert tags["images"] == []
        assert not tags["graph"]
        assert "train/loss" in tags["scalars"]
    assert not list(tmp_path.glob("histograms/*/film.npz")), "a job of a multirun keeps no film"


def test_one_key_turns_them_off_and_nothing_else_changes(tmp_path: Path, command: Run) -> None:
    """With batch norm and dropout: pictures draw no random number and leave the net's state alone."""
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


def test_without_tensorboard_nothing_happens(tmp_path: Path, command: Run) -> None:
    arguments = ["logger=csv,none", "callbacks.pictures.enabled=true", "hydra.sweep.dir=loggers"]
    done = command("train", "-m", *arguments, *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "loggers").glob("*/tensorboard"))
    assert len(list((tmp_path / "loggers").glob("*/checkpoints/best.ckpt"))) == 2
