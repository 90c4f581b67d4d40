"""Tests of ``train``, ``compose`` and ``load`` from Python, in this process and in a notebook."""

import logging
import random
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Once, Run
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from PIL import Image, ImageDraw

import mnist_lightning
from mnist_lightning import compose, load
from mnist_lightning.config import ConfigError
from mnist_lightning.rundir.checkpoint import load as load_checkpoint

TINY = ("model.hidden=[16]", "trainer.max_epochs=2", "+trainer.limit_train_batches=20", "data.val_size=500")


@pytest.fixture(scope="module")
def work(once: Once) -> Iterator[Path]:
    """A folder in which a run was made from Python; each worker has its own data folder."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            mnist_lightning.train(*TINY, f"data.data_dir={folder / 'data'}", "hydra.run.dir=a run")

    folder = once("from_python", make)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_it_is_the_commands_run(work: Path, tmp_path: Path, command: Run) -> None:
    """Files, messages and weights are the same."""
    done = command("train", *TINY, f"data.data_dir={work / 'data'}", "hydra.run.dir=a run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mine, its = work / "a run", tmp_path / "a run"

    def files(folder: Path) -> set[str]:
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {re.sub(r"tfevents.*", "tfevents", name) for name in names}

    assert files(mine) == files(its)
    for name in (".hydra/config.yaml", ".hydra/overrides.yaml", "test_correct.npy"):
        assert (mine / name).read_bytes() == (its / name).read_bytes()
    nets = [load_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"] for folder in (mine, its)]
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])

    def messages(folder: Path) -> list[str]:
        lines = [line[24:] for line in (folder / "train.log").read_text().splitlines()]
        return [
            re.sub(r"[\d.]+ s$", "", line) for line in lines if line.startswith("INFO") and "epoch" in line
        ]

    assert messages(mine) == messages(its)
    assert len(messages(mine)) == 2


def test_what_a_run_has_left(work: Path) -> None:
    run = mnist_lightning.train("resume=a run")  # the run has finished: nothing is done or lost
    assert run.folder == work / "a run"
    assert run.state == "completed"
    assert run.metrics["epochs"] == 2
    shown = f"{100 * run.metrics['test/acc']:.2f} %"
    assert repr(run).endswith(f"test/acc {shown}, test/loss {run.metrics['test/loss']:.4f}")
    assert f"<td>test/acc</td><td>{shown}</td>" in run._repr_html_()
    assert run.load().path == run.folder / "checkpoints" / "best.ckpt"
    figure: Any = run.show()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss by epoch", "accuracy by epoch"]


def test_the_process_is_as_it_was(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of torch, random generators, loggers, warnings and another Hydra application does not change."""
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("answer: 42\n")
    root, own = logging.getLogger(), logging.getLogger("mnist_lightning")
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    backend, style = pyplot.get_backend(), dict(pyplot.rcParams)

    def state() -> list[Any]:
        loggers = [(one.level, one.propagate, one.handlers[:]) for one in (root, own)]
        random_states = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
        torch_set = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
        torch_set += (torch.are_deterministic_algorithms_enabled(),)
        return [loggers, random_states, torch_set, warnings.filters[:], threading.excepthook]

    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with (
            torch.no_grad(),
            initialize_config_dir(str(tmp_path / "theirs"), version_base="1.2", job_name="theirs"),
        ):
            before, config = state(), HydraConfig.instance().cfg
            run = mnist_lightning.train(*TINY, f"data.data_dir={data_dir}", "hydra.run.dir=r", "logger=none")
            images = torch.zeros(2, 28, 28, dtype=torch.uint8)
            run.load().predict(images)
            assert state() == before
            assert hydra_compose("config").answer == 42
            assert GlobalHydra.instance().hydra is not None
            assert HydraConfig.instance().cfg is config
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert (pyplot.get_backend(), dict(pyplot.rcParams)) == (backend, style)
    assert run.metrics["val/acc"] > 0.2


def test_threads_run_one_after_the_other(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[Any] = []
    settings = (*TINY, f"data.data_dir={data_dir}", "logger=none")
    workers = [
        threading.Thread(target=lambda: runs.append(mnist_lightning.train(*settings))) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({run.folder for run in runs}) == 2
    assert runs[0].metrics["val/loss"] == runs[1].metrics["val/loss"]
    spans = sorted((one["started"], one["seconds"]) for one in map(read_status, runs))
    assert spans[0][0] + spans[0][1] <= spans[1][0] + 0.01


def read_status(run: Any) -> dict[str, Any]:
    import json

    return dict(json.loads((run.folder / "status.json").read_text()))


@pytest.mark.parametrize(
    ("arguments", "kind", "line"),
    [
        (("model.dropout=2",), "ConfigError", r"model\.dropout must be in \[0, 1\), got 2\.0"),
        (("label_smoothing=0.1",), "ConfigError", r"label_smoothing is loss\.label_smoothing now.*"),
        (("-m", "seed=1,2"), "ConfigError", r"train\(…\) trains one net; .* -m … runs a sweep"),
        (("--cfg=job",), "ConfigError", r"--cfg=job works on the command line only.*"),
        ((3,), "ConfigError", r'settings are given as text, as in train\("model\.hidden=256"\), got 3'),
        (("trainer=ddp",), "ConfigError", r"trainer\.strategy=ddp.* starts more processes.*"),
        (("resume=nowhere",), "FileNotFoundError", r"nowhere is not a run folder: .*"),
        (("hydra.run.dir=/proc/x",), "ConfigError", r"can't write to the run's folder /proc/x: .*"),
        (("model._target_=my.Net", "logger=none"), "CommandError", r".*my\.Net.*"),
    ],
)
def test_errors_are_the_commands_line(
    arguments: tuple[Any, ...], kind: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r".") as caught:
        mnist_lightning.train(*arguments)
    assert type(caught.value).__name__ == kind
    assert re.fullmatch(line, str(caught.value), re.S)
    assert "\n" not in str(caught.value)


def test_settings_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose("model.hidden=[7,8]", "optimizer.lr=0.5").model["hidden"] == [7, 8]
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "small.yaml").write_text(
        "_target_: mnist_lightning.network.FeedForward\nhidden: [3]\n"
    )
    for flags in (("--config-dir=mine",), ("--config-dir", "mine"), ("-cd", "mine")):
        assert compose(*flags, "model=small").model["hidden"] == [3]
    with pytest.raises(ConfigError, match="--config-dir=nowhere: there is no such folder"):
        compose("--config-dir=nowhere")
    with pytest.raises(ConfigError, match="seed must be"):
        compose("seed=-1")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_images_of_every_shape(work: Path) -> None:
    net = load("a run")
    stored = net.data.splits["test"].images[:6]
    labels, probabilities = net.predict(stored)
    assert (labels.shape, labels.dtype) == ((6,), np.int64)
    assert (probabilities.shape, probabilities.dtype) == ((6, 10), np.float32)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    with torch.inference_mode():
        expected = net.classifier.to_probabilities(net.classifier(stored)).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    array = stored.numpy()
    for many in (array, array[:, None], array[..., None], array / 255, (array / 255).astype(np.float16)):
        for images in (
            many,
            torch.from_numpy(many),
            torch.from_numpy(many).requires_grad_(many.dtype != np.uint8),
        ):
            again = net.predict(images)
            np.testing.assert_array_equal(again.labels, labels)
            np.testing.assert_allclose(again.probabilities, probabilities, atol=2e-3)
    one = net.predict(array[0])
    assert one.labels == labels[0]
    assert isinstance(one.labels, int)
    assert one.probabilities.shape == (10,)
    assert net.predict(array[:1]).labels.shape == (1,), "of grey images three axes are always many"
    assert net.predict(array[:0]).probabilities.shape == (0, 10)
    assert repr(one) == f"{labels[0]} ({100 * probabilities[0].max():.1f} %)"
    assert net.predict(array)._repr_html_().count("<tr>") == 7


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((28, 28), np.int64), r"uint8 in \[0, 255\] or floats in \[0, 1\], got int64"),
        (np.zeros((28, 28), bool), "got bool"),
        (np.full((28, 28), 255.0), r"must be in \[0, 1\], got 255 to 255: divide by 255, or give uint8"),
        (np.full((28, 28), np.nan), r"must be in \[0, 1\]"),
        (np.zeros((28, 28)) - 0.5, r"must be in \[0, 1\], got -0\.5 to -0\.5"),
        (np.zeros((29, 28)), r"takes images of \(28, 28\), one or many \(N, …\), got \(29, 28\)"),
        (np.zeros((2, 3, 28, 28)), r"got \(2, 3, 28, 28\)"),
        (np.zeros(784), r"got \(784,\)"),
    ],
)
def test_images_of_another_kind_are_told(work: Path, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("a run").predict(images)


def test_pictures(work: Path, tmp_path: Path, command: Run) -> None:
    files = []
    for number in range(2):
        picture = Image.new("L", (90, 120), 250)
        ImageDraw.Draw(picture).line([(45, 20), (40 + 8 * number, 100)], fill=20, width=9)
        files.append(tmp_path / f"{number}.png")
        picture.save(files[-1])
    net = load("a run")
    many = net.predict(files)
    assert many.labels.shape == (2,)
    one = net.predict(str(files[1]))
    assert one.labels == many.labels[1]
    done = command("predict", f"run={work / 'a run'}", f"images={files[1]}", "output=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert [float(cell) for cell in rows[1].split(",")[5:15]] == pytest.approx(one.probabilities, abs=1e-6)
    with pytest.raises(OSError, match=r"nothing\.png"):
        net.predict("nothing.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "blank.png")
    with pytest.raises(ValueError, match=r"blank\.png: "):
        net.predict(tmp_path / "blank.png")


def test_scores_are_the_commands(work: Path, tmp_path: Path, command: Run) -> None:
    net = load(Path("a run") / "checkpoints" / "best.ckpt")
    scores = net.evaluate("test")
    run = mnist_lightning.train("resume=a run")
    assert scores.metrics["acc"] == pytest.approx(run.metrics["test/acc"], abs=1e-6)  # there in float32
    assert set(scores.figures) >= {"confusion_matrix", "mistakes", "reliability"}
    assert repr(scores).startswith(f"accuracy      {100 * scores.metrics['acc']:.2f} %")
    assert scores._repr_html_().count("<tr>") >= 11 + 7
    assert load("a run").evaluate().metrics["images"] == 500
    with pytest.raises(ValueError, match="split must be train, val or test, got 'all'"):
        net.evaluate("all")
    assert net.settings["model"]["hidden"] == [16]
    assert net.settings["data"]["val_size"] == 500
    with pytest.raises(OSError, match="is not a run folder"):
        load("nowhere")


ORDERS = """
import mnist_lightning.train
from mnist_lightning import train
assert train is mnist_lightning.train and callable(train) and train.main
del mnist_lightning
from mnist_lightning import train as again
assert again is train
"""
OTHER_ORDER = """
from mnist_lightning import train
first = train
import mnist_lightning.train as module
from mnist_lightning.train import main
assert callable(first) and module is first and first.main is main
"""


@pytest.mark.parametrize("order", [ORDERS, OTHER_ORDER])
def test_a_module_that_can_be_called(order: str, tmp_path: Path, python: Run) -> None:
    (tmp_path / "order.py").write_text(order)
    done = python("order.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_types_of_the_public_names(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from mnist_lightning import compose, load, train\n"
        'run = train("model.hidden=256")\n'
        "reveal_type(run.folder)\n"
        'labels = run.load().predict("digit.png").labels\n'
        'reveal_type(compose("seed=2").seed)\n'
        "load(3)\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml")),
            *("--cache-dir", str(REPOSITORY / ".mypy_cache"), "user.py"),  # one for all of the gate
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert re.findall(r'Revealed type is "([\w.]+)"', done.stdout) == ["pathlib.Path", "int"]
    assert len(re.findall(r"error: ", done.stdout)) == 1
    assert 'Argument 1 to "load" has incompatible type "int"' in done.stdout


CELLS = [
    "from mnist_lightning import load, train",
    "run = train('model.hidden=[16]', 'trainer.max_epochs=3')",
    "run",
    "run.show()",
    "net = run.load()\nnet.predict(net.data.splits['val'].images[:3])",
    "net.evaluate('val')",
    "net.evaluate('val').figures['mistakes']",
    "train('model.dropout=2')",
    "run = train('model.hidden=[16]', 'trainer.max_epochs=500')",
    "run.state, (run.folder / 'checkpoints' / 'last.ckpt').exists()",
]


@pytest.mark.slow
def test_a_notebook(tmp_path: Path, environment: dict[str, str]) -> None:
    """A notebook shows one bar, pictures and tables as results, and one line for an error; it can be interrupted."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = NotebookClient(
        notebook, timeout=300, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )

    def interrupt() -> None:
        """Interrupt the kernel as Jupyter does, once the ninth cell's run has saved an epoch."""
        import os
        import signal

        while len(list(tmp_path.glob("logs/train/runs/*/checkpoints/last.ckpt"))) < 2:
            time.sleep(0.1)
        os.kill(client.km.provisioner.process.pid, signal.SIGINT)

    with client.setup_kernel(env=environment):
        watching = threading.Thread(target=interrupt, daemon=True)
        watching.start()
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[0] == []
    drawn = [one for one in outputs[1] if one.output_type == "display_data"]
    assert len(drawn) == 1, "a bar for the whole run"
    assert "<progress" in drawn[0].data["text/html"]
    assert re.match(r"epoch 3/3   train loss [\d.]+ acc [\d.]+ %   val loss", drawn[0].data["text/plain"])
    printed = "".join(one.text for one in outputs[1] if one.output_type == "stream")
    assert "test accuracy" in printed
    assert "epoch 1/3" not in printed
    assert not [one for one in outputs[1] if one.get("name") == "stderr"]
    assert "<table>" in outputs[2][0].data["text/html"]
    assert "image/png" in outputs[3][0].data
    assert "<th>probability</th>" in outputs[4][0].data["text/html"]
    assert "<th>precision</th>" in outputs[5][0].data["text/html"]
    assert "image/png" in outputs[6][0].data
    assert outputs[7][0].traceback == ["ConfigError: model.dropout must be in [0, 1), got 2.0"]
    assert not [one for one in outputs[8] if one.output_type == "error"]
    assert outputs[9][0].data["text/plain"] == "('interrupted', True)"
