"""Damaged and hostile files cost one line and are skipped; a user's files stay unchanged."""

import copy
import csv
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, few, settle
from hydra.core.utils import JobReturn, JobStatus
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from test_report import make_sweep
from test_trust import FORWARD

from mnist_lightning.cli import CommandError
from mnist_lightning.evaluation.trained import Bounded, load_classifier, load_split
from mnist_lightning.network import FeedForward
from mnist_lightning.rundir.checkpoint import LocalCheckpointIO, find_newest, load, serialize
from mnist_lightning.rundir.find import find_run
from mnist_lightning.rundir.index import list_runs
from mnist_lightning.rundir.loggers import CSVLogger
from mnist_lightning.rundir.output import check_file, claim_output
from mnist_lightning.rundir.outside import (
    as_cell,
    as_code,
    as_text,
    check_inside,
    check_run,
    expand_home,
    read_file,
    read_json,
    read_yaml,
)
from mnist_lightning.rundir.records import average
from mnist_lightning.rundir.status import Status, is_locked, lock, read
from mnist_lightning.runs import write_csv
from mnist_lightning.sweeps.grid import GridSweeper
from mnist_lightning.sweeps.report import write_report, write_tables
from mnist_lightning.sweeps.results import read_multirun, read_sweep
from mnist_lightning.sweeps.study import JOURNAL, mend_journal
from mnist_lightning.train import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep of eight jobs."""
    return make_sweep(tmp_path)


ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e"
SOON = 20.0  # seconds that a hostile file may take at most, on a busy machine


# How texts are shown


def test_texts_are_shown_as_text() -> None:
    assert as_text("a plain text, é 漢 ± €") == "a plain text, é 漢 ± €"
    assert as_text(ESCAPES) == "\\x1b[2J\\x1b]0;owned\\x07\\u202e"
    assert as_text("two\nlines\t") == "two\\nlines\\t"
    assert as_text("two\nlines", lines=True) == "two\nlines"
    assert as_text("\udcff.png") == "\\udcff.png", "a name that is not UTF-8"


@pytest.mark.parametrize("formula", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)"])
def test_a_formula_is_no_formula_in_a_table(formula: str) -> None:
    assert as_cell(formula) == f"'{formula}"


@pytest.mark.parametrize("value", ["-1", "+3.5", "-1e-05", "name", 3, -2.5, ""])
def test_numbers_stay_numbers_in_a_table(value: Any) -> None:
    assert as_cell(value) == value


def test_code_in_markdown_holds_no_markup() -> None:
    assert as_code("a=1") == "`a=1`"
    assert as_code("a`b") == "``a`b``"
    assert as_code("`") == "`` ` ``"
    assert as_code("<b>\n") == "`<b>\\n`"


def test_homes_that_are_none() -> None:
    for name in ("~nosuchuser/data", "a\0b"):
        with pytest.raises(OSError, match=r"no such home|is not a path"):
            expand_home(name)


# Reading


def fifo(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes")
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    if not os.path.exists("/dev/zero"):
        pytest.skip("no /dev/zero")
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 * 10**9)  # a sparse file takes no space


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(5000))


def deep(path: Path) -> None:
    path.write_text("[" * 200_000)


def laughs(path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    path.write_text("\n".join(lines))


def nothing(path: Path) -> None:
    path.touch()


STRANGE = [fifo, folder_instead, endless, huge, garbage, deep, laughs, nothing]


@pytest.fixture(params=STRANGE, ids=lambda make: make.__name__)
def strange_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "strange"
    request.param(path)
    return path


def test_no_reader_takes_a_strange_file_or_waits_for_it(strange_file: Path) -> None:
    begun = time.monotonic()
    for reader in (read_json, read_multirun, load):
        target = strange_file
        if reader is read_multirun:
            target = strange_file.parent
            if not (target / "multirun.yaml").exists():
                strange_file.rename(target / "multirun.yaml")
        with pytest.raises(OSError, match=r"\S"):
            reader(target)
        if reader is read_multirun:
            (target / "multirun.yaml").rename(strange_file)
    assert time.monotonic() - begun < SOON


def test_a_yaml_file_is_read_within_its_length(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\n")
    assert read_yaml(path) == "a: 1\n"
    laughs(path)
    with pytest.raises(OSError, match="it has an alias"):
        read_yaml(path)
    with pytest.raises(OSError, match=r"is refused: it has [\d,]+ bytes, at most 3 are read"):
        read_file(path, most=3)


@pytest.mark.parametrize(
    "content",
    [
        '{"state": 3}',
        '{"state": "running", "metrics": [1]}',
        '{"state": "completed", "metrics": {"val/acc": "high"}}',
        '{"state": "completed", "metrics": {"val/acc": true}}',
        '{"state": "completed", "started": 1e300}',
        '{"state": "completed", "seconds": NaN}',
        '{"state": "completed", "overrides": "seed=1"}',
        '{"state": "completed", "overrides": [1]}',
        '{"state": "completed", "error": ["x"]}',
        '{"state": "completed", "unheard": 1}',
        '{"state": "elsewhere"}',
        "[]",
        "3",
        '{"state": "comp',
        '{"state": "completed", "metrics": {"val/acc": ' + "9" * 5000 + "}}",
        '{"state": "completed", "metrics": {"val/acc": ' + "9" * 400 + "}}",
        '{"state": "completed", "started": ' + "9" * 400 + "}",
        '{"state": "completed", "seconds": ' + "9" * 400 + "}",
    ],
)
def test_a_damaged_status_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text(content)
    status = read(tmp_path / "run")
    assert status is not None
    assert (status.state, status.error) == ("interrupted", "its status.json is damaged")
    for run in average(list_runs(tmp_path)):
        assert run.get("val/acc") is None


# Contents of a sweep's folder


def damage(make: Callable[[Path], None], path: Path) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize("make", STRANGE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["status.json", "val_correct.npy", "csv/metrics.csv"])
def test_a_damaged_job_costs_its_own_row(make: Callable[[Path], None], name: str, folder: Path) -> None:
    damage(make, folder / "6" / name)
    begun = time.monotonic()
    sweep = write_tables(folder)
    assert time.monotonic() - begun < SOON
    report = (folder / "report.md").read_text()
    assert len(sweep.jobs) == 8
    assert "model.hidden=32" in report
    if name == "status.json":
        assert "| 6 | interrupted |" in report
        assert "`its status.json is damaged`" in report


def test_what_a_stranger_wrote_is_shown_as_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = f"{ESCAPES}<script>alert(1)</script>`|](javascript:x)"
    status = Status("failed", hostile, [f"model.hidden={hostile}", "x==cmd()", "y=$x^2"], 1.0, 1.0)
    status.write(folder / "7")
    status = read(folder / "6") or Status()
    status.overrides = ["model.hidden=32", "x=$a_b$", "seed=1"]
    status.metrics["=1+1"] = 3
    status.write(folder / "6")
    write_report(folder)
    report = (folder / "report.md").read_text()
    assert not any(sign in report for sign in "\x1b\x07\u202e")
    (row,) = [line for line in report.splitlines() if line.startswith("| 7 |")]
    assert "<script>" in row.split("``")[1], "within code, where it is no markup"
    with (folder / "results.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert "'=1+1" in cells
    assert "'=cmd()" in cells
    assert not any(cell.startswith(("=", "@")) or "\x1b" in cell for cell in cells)


def test_figures_and_files_of_the_users_stay(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_report(folder)
    (drawn, *others) = sorted((folder / "figures").iterdir())
    before = others[0].read_bytes()
    mine = {folder / "figures" / "mine.png": b"a picture", tmp_path / "target": b"kept", drawn: b"my own"}
    for path, content in mine.items():
        path.write_bytes(content)
    others[0].write_bytes(before[:300])  # drawn by us, so replaced
    write_report(folder)
    assert {path: path.read_bytes() for path in mine} == mine
    assert others[0].read_bytes() == before
    report = (folder / "report.md").read_text()
    assert others[0].name in report
    assert "mine.png" not in report
    assert drawn.name not in report
    assert f"{drawn.name} was not drawn by this project and stays" in caplog.text
    (folder / ".report.lock").unlink()
    (folder / ".report.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match=r"\.report\.lock is a link out of its folder"):
        write_tables(folder)
    (folder / ".report.lock").unlink()
    (folder / "results.csv").unlink()
    (folder / "results.csv").symlink_to(tmp_path / "target")
    write_tables(folder)
    assert not (folder / "results.csv").is_symlink(), "replaced, not followed"
    shutil.rmtree(folder / "figures")
    (folder / "figures").symlink_to(tmp_path)
    with pytest.raises(OSError, match="figures is a link out of its folder"):
        write_report(folder)
    assert (tmp_path / "target").read_bytes() == b"kept"


def test_a_report_that_somebody_has_changed_is_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("report.md", "results.csv")
    write_tables(folder)
    whole = {name: (folder / name).read_bytes() for name in names}
    write_tables(folder)
    assert not list(folder.glob("*-changed-*"))
    for number, name in enumerate((*names, *names)):
        mine = whole[name] + f"my note {number}\n".encode()
        (folder / name).write_bytes(mine)
        write_tables(folder)
        write_tables(folder)
        aside = (folder / name).with_stem(f"{Path(name).stem}-changed-{1 + number // 2}")
        assert aside.read_bytes() == mine
        assert f"{name} is not as this project has written it: it is kept as {aside.name}" in caplog.text
        assert {name: (folder / name).read_bytes() for name in names} == whole
    assert len(list(folder.glob("*-changed-*"))) == 4


def test_a_sweep_whose_folder_takes_nothing_more_is_still_summarized(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As on a full disk: neither a job's end nor the report is written."""
    (folder / "report.md").mkdir()  # no file can be written here
    (folder / "6" / "status.json").write_text('{"state": "running"}')
    sweeper = GridSweeper.__new__(GridSweeper)  # where Hydra has loaded its plugins anew, super() fails
    sweeper.sweep_dir, sweeper.lost = folder, []
    sweeper.config = OmegaConf.create({"hydra": {"sweep": {"subdir": "${hydra.job.num}"}}})
    ended = JobReturn(status=JobStatus.FAILED)
    ended.return_value = CommandError("No space left on device")
    sweeper.note_lost(6, ["seed=1"], ended)
    assert "job   6 failed  No space left on device" in caplog.text
    with pytest.raises(SystemExit, match="jobs did not finish"):
        sweeper.finish()
    told = capsys.readouterr()
    assert "model.hidden" in told.out
    assert "the report is not up to date" in told.err
    assert "report.md" in told.err


def test_a_report_is_ours_again_after_a_kill(folder: Path) -> None:
    """Between the record of what is written and the writing: both the old and the new are ours."""
    write_tables(folder)
    old = (folder / "report.md").read_bytes()
    shutil.rmtree(folder / "7")
    write_tables(folder)
    new = (folder / "report.md").read_bytes()
    assert old != new
    (folder / "report.md").write_bytes(old)
    write_tables(folder)
    assert not list(folder.glob("*-changed-*"))
    assert (folder / "report.md").read_bytes() == new


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "target")
    assert not is_locked(tmp_path / "run")
    with pytest.raises(OSError, match="link out of its folder"), lock(tmp_path / "run"):
        pass
    assert (tmp_path / "target").read_text() == "kept"


@pytest.mark.posix("named pipes")
@pytest.mark.parametrize(
    "name",
    ["train.log", "csv", "csv/metrics.csv", "tensorboard", "checkpoints", ".hydra", ".hydra/config.yaml"],
)
def test_a_run_writes_through_no_link(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    check_run(run)
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link out of its folder"):
        check_run(run)
    (run / name).unlink()
    (run / "inside").mkdir()
    (run / name).symlink_to(run / "inside")
    check_run(run)
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(OSError, match="neither a file nor a folder"):
        check_run(run)
    check_inside(run, ["nowhere", "nor/there"])


# Where commands write


def test_an_output_folder_keeps_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["metrics.json", "a.png"]
    assert claim_output("new", "evaluate", names) == Path("new")
    for name in names:
        (tmp_path / "new" / name).write_text("written")
    claim_output("new", "evaluate", names)
    with pytest.raises(CommandError, match=r"already holds metrics.json, which predict has not written"):
        claim_output("new", "predict", names)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("a run's")
    with pytest.raises(CommandError, match="name another folder"):
        claim_output("run", "evaluate", names)
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"^output=file is not a folder$"):
        claim_output("file", "evaluate", names)
    (tmp_path / "logs" / "old").mkdir(parents=True)
    (tmp_path / "logs" / "old" / "a.png").write_text("of an earlier version")
    claim_output("logs/old", "visualize", names)


@pytest.mark.posix("pipes with a name")
def test_a_pipe_in_the_place_of_a_result_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "page.html"
    os.mkfifo(pipe)
    with pytest.raises(CommandError, match="already exists and is not a "):
        check_file(pipe, "report.html")
    with pytest.raises(OSError, match="is not a file"):
        write_csv(str(pipe), [], ["run"])
    assert pipe.is_fifo()


# Checkpoints


def shared_lists(depth: int) -> list[Any]:
    value: list[Any] = [0]
    for _ in range(depth):
        value = [value] * 8
    return value


def circle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def change(checkpoint: dict[str, Any], **recipe: Any) -> dict[str, Any]:
    return {**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], **recipe}}


def weights(checkpoint: dict[str, Any], make: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return {**checkpoint, "state_dict": {name: make(one) for name, one in checkpoint["state_dict"].items()}}


def inflate(checkpoint: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Change a net of 20 weights so that it begins with these layers."""
    pool = [
        {"_target_": "torch.nn.AdaptiveAvgPool2d", "output_size": 1},
        {"_target_": "torch.nn.Flatten"},
        {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 10},
    ]
    place = len(layers) + 2
    own = {f"net.{place}.weight": torch.zeros(10, 1), f"net.{place}.bias": torch.zeros(10)}
    others = {name: one for name, one in checkpoint["state_dict"].items() if not name.startswith("net.")}
    net = {"_target_": "torch.nn.Sequential", "_args_": [*layers, *pool]}
    return change(checkpoint, model=net) | {"state_dict": others | own}


HOSTILE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "shared lists": lambda c: {**c, "x": shared_lists(400)},
    "shared lists in the recipe": lambda c: change(c, x=shared_lists(30)),
    "a list in itself": lambda c: {**c, "x": circle()},
    "lists in lists": lambda c: {**c, "x": nested(150)},
    "sparse weights": lambda c: weights(c, lambda w: w.to_sparse()),
    "complex weights": lambda c: weights(c, lambda w: w.to(torch.complex64)),
    "whole weights": lambda c: weights(c, lambda w: w.long()),
    "no weights": lambda c: {**c, "state_dict": {}},
    "texts for weights": lambda c: weights(c, lambda w: "weight"),
    "a list of weights": lambda c: {**c, "state_dict": list(c["state_dict"].values())},
    "weights of nowhere": lambda c: weights(c, lambda w: w.to("meta")),
    "weights of other shapes": lambda c: weights(c, lambda w: w.flatten()[:1]),
    "a wide layer": lambda c: change(c, model={"_target_": FORWARD, "hidden": [10**12]}),
    "many layers": lambda c: change(c, model={"_target_": FORWARD, "hidden": [1] * 10**5}),
    "many recurrent layers": lambda c: change(
        c, model={"_target_": "torch.nn.LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 10**9}
    ),
    "a huge activation": lambda c: inflate(c, [{"_target_": "torch.nn.ConstantPad2d", "padding": 10**6, "value": 0}]),
    "an activation by steps": lambda c: inflate(
        c, [{"_target_": "torch.nn.Upsample", "scale_factor": 50}] * 3
    ),
    "an activation that is huge for many images": lambda c: inflate(
        c, [{"_target_": "torch.nn.Upsample", "size": [8000, 8000]}]
    ),
    "layers that are not numbers": lambda c: change(c, model={"_target_": FORWARD, "hidden": ["x"]}),
    "a model that is a text": lambda c: change(c, model="x"),
    "a metric of many classes": lambda c: change(
        c, metrics={"acc": {"_target_": "torchmetrics.classification.MulticlassConfusionMatrix", "num_classes": 10**5}}
    ),
    "a metric of many copies": lambda c: change(
        c, metrics={"x": {"_target_": "torchmetrics.wrappers.MultioutputWrapper", "num_outputs": 10**9,
                          "base_metric": {"_target_": "torchmetrics.classification.BinaryAUROC"}}}
    ),
    "metrics that are none": lambda c: change(c, metrics=[1]),
    "a large image": lambda c: change(c, image_shape=[1, 10**6, 10**6]),
    "no image": lambda c: change(c, image_shape=[0, 28, 28]),
    "an image of texts": lambda c: change(c, image_shape="abc"),
    "a class": lambda c: change(c, class_names=["0"]),
    "classes that are numbers": lambda c: change(c, class_names=list(range(10))),
    "another number of classes": lambda c: change(c, class_names=list("abc")),
    "a mean that is a text": lambda c: change(c, preprocess={"mean": "x", "std": 1.0}),
    "no preprocessing": lambda c: change(c, preprocess=None),
    "no recipe": lambda c: {**c, "hyper_parameters": {}},
    "no loss": lambda c: change(c, loss=3),
    "no step": lambda c: {**c, "global_step": None},
    "a step before the first": lambda c: {**c, "global_step": -1},
    "keys that are lists": lambda c: {**c, "x": {(1, 2): 3}},
}  # fmt: skip


@pytest.fixture(scope="session")
def honest(trained_run: Path) -> dict[str, Any]:
    return load(trained_run / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_checkpoint_is_refused_soon(what: str, honest: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(serialize(HOSTILE[what](honest)))
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"x\.ckpt"):
        load_classifier(path)
    assert time.monotonic() - begun < SOON


def state(checkpoint: dict[str, Any], *keys: Any, value: Any) -> dict[str, Any]:
    """Return a checkpoint with another value at one place; None removes the value."""
    key, *rest = keys
    changed = copy.copy(checkpoint)
    if rest:
        changed[key] = state(changed[key], *rest, value=value)
    elif value is None:
        del changed[key]
    else:
        changed[key] = value
    return changed


KEEPER = "Checkpoints"
OTHER_STATE: dict[str, tuple[Any, ...]] = {  # a place in a checkpoint, and the value there
    **{f"no {name}": (name, None) for name in ("loops", "callbacks", "optimizer_states", "lr_schedulers")},
    **{f"no {name} ": (name, None) for name in ("environment", "processes", "epoch", "MNISTDataModule")},
    "loops that are none": ("loops", {"fit_loop": 3}),
    "an optimizer of other weights": ("optimizer_states", 0, "param_groups", []),
    "a state of another size": ("optimizer_states", 0, "state", 0, "exp_avg", torch.zeros(1)),
    "a state that is none": ("optimizer_states", 0, "state", 1, "exp_avg_sq", "x"),
    "steps of another size": ("optimizer_states", 0, "state", 0, "step", torch.zeros(3)),
    "a random state that is none": ("processes", 0, "random_state", "cpu", torch.zeros(3)),
    "a score that is a text": ("callbacks", KEEPER, "best_score", "x"),
    "callbacks that are none": ("callbacks", 3),
    "an order of no data": ("MNISTDataModule", "epoch", None),
}


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_no_other_state(
    every: int, fit: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    """A complete file with a stranger's state is refused in one line, before anything is trained or written."""
    settings = ("model.hidden=8", "+trainer.limit_train_batches=3", "logger=csv", "callbacks.summary=null")
    run = tmp_path / "run"
    fit(*settings, "trainer.max_epochs=1", "scheduler=none")
    path = run / "checkpoints" / "last.ckpt"
    whole = load(path)
    for name in ("best.ckpt", "previous.ckpt"):
        (run / "checkpoints" / name).unlink(missing_ok=True)
    again = (*settings, "trainer.max_epochs=2", "scheduler=none", f"resume='{run}'")
    for *keys, value in list(OTHER_STATE.values())[::every]:
        changed = state(whole, *keys, value=value)
        path.write_bytes(serialize(changed))
        before = path.read_bytes()
        with pytest.raises(OSError, match=r"last\.ckpt can't be resumed: it (does not hold|has no)"):
            fit(*again)
        assert path.read_bytes() == before
    elsewhere = state(whole, "callbacks", KEEPER, "folder", value=str(tmp_path / "elsewhere"))
    path.write_bytes(serialize(elsewhere))
    assert fit(*again)["epochs"] == 2
    assert not (tmp_path / "elsewhere").exists(), "no attribute but what it keeps is taken"


def test_a_run_goes_on_with_no_net_that_takes_all_memory(tmp_path: Path, data_dir: Path) -> None:
    """A stranger's, with the weights of the checkpoint beside it."""

    def go(first: dict[str, Any], *more: str) -> None:
        settings = settle(
            tmp_path,
            *(
                "+trainer.limit_train_batches=2",
                "trainer.max_epochs=1",
                "data.batch_size=5000",
                "logger=none",
                "callbacks.summary=null",
            ),
            *("callbacks.film.enabled=false", f"data.data_dir='{data_dir}'", *more),
        )
        last = {"_target_": "torch.nn.Linear", "in_features": 784, "out_features": 10}
        pool = {"_target_": "torch.nn.AdaptiveAvgPool2d", "output_size": 28}
        settings.model = {
            "_target_": "torch.nn.Sequential",
            "_args_": [first, pool, {"_target_": "torch.nn.Flatten"}, last],
        }
        train(settings, tmp_path, test=False)

    go({"_target_": "torch.nn.Identity"})
    # on a machine of any size: 5,000 images of 8,000 by 8,000 pixels take 1.3 TB
    for size, told in ((8_000, "GB for 5000 images, more than the memory"), (20_000, "too large a tensor")):
        large = {"_target_": "torch.nn.Upsample", "size": [size, size]}
        with pytest.raises((OSError, MisconfigurationException), match=told):
            go(large, f"resume='{tmp_path}'")
    with pytest.raises(OSError, match="weights of another net than its settings describe"):
        go(
            {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1},
            f"resume='{tmp_path}'",
        )


def test_a_net_for_which_there_is_no_memory_is_a_line(tmp_path: Path, data_dir: Path) -> None:
    settings = settle(tmp_path, "model.hidden=[10000000,10000000]", f"data.data_dir='{data_dir}'")
    with pytest.raises(
        MisconfigurationException, match=r"model: its weights and their gradients take 800,0\d\d"
    ):
        train(settings, tmp_path, test=False)


def test_weights_are_no_activations(honest: dict[str, Any]) -> None:
    """A wide net's weights do not count once for each image of a batch."""
    net, images, bounds = FeedForward(hidden=[2048, 2048]), torch.zeros(2, 1, 28, 28), Bounded(honest)
    with torch.inference_mode(), bounds:
        net(images)
    assert bounds.largest == 2 * 2048 * 4


def test_only_what_a_run_has_written_is_removed(honest: dict[str, Any], tmp_path: Path) -> None:
    """ModelCheckpoint removes files that its state names, and the state may come from a stranger."""
    mine, run = tmp_path / "mine.txt", tmp_path / "run"
    mine.touch()
    (run / "kept").mkdir(parents=True)
    (run / "link").symlink_to(tmp_path)
    files = LocalCheckpointIO(run)
    for name in ("kept/../../mine.txt", "link/mine.txt"):
        files.remove_checkpoint(run / name)
    assert mine.exists()
    for path in (run / "kept" / "a.ckpt", tmp_path / "elsewhere.ckpt"):
        files.save_checkpoint(honest, path)
        files.remove_checkpoint(path)
        assert not path.exists()


def test_a_net_that_makes_its_images_larger_is_taken(honest: dict[str, Any], tmp_path: Path) -> None:
    layers = [{"_target_": "torch.nn.Upsample", "scale_factor": 2}]
    foreign = {key: value for key, value in honest.items() if key != "confidence"}
    (tmp_path / "x.ckpt").write_bytes(serialize(inflate(foreign, layers)))
    assert load_classifier(tmp_path / "x.ckpt")[0](torch.zeros(2, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("make", [torch.Tensor.double, torch.Tensor.half], ids=["double", "half"])
def test_weights_of_another_precision_are_taken(
    make: Callable[[torch.Tensor], torch.Tensor], honest: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "x.ckpt").write_bytes(serialize(weights(honest, make)))
    classifier, _ = load_classifier(tmp_path / "x.ckpt")
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    assert classifier(torch.zeros(2, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    "data",
    [
        {"data_dir": "~nosuchuser/data"},
        {"data_dir": "a\0b"},
        {"data_dir": 3},
        {"name": []},
        {"val_size": "x"},
        {},
    ],
    ids=str,
)
def test_data_of_a_stranger(data: dict[str, Any], honest: dict[str, Any], tmp_path: Path) -> None:
    settings = honest["datamodule_hyper_parameters"] | data if data else None
    checkpoint = honest | {"datamodule_hyper_parameters": settings}
    with pytest.raises(OSError, match=r"home|path|does not tell|data"):
        load_split(tmp_path / "x.ckpt", checkpoint, "val", data_dir=None)


def test_a_classs_name_is_shown_as_text(honest: dict[str, Any], tmp_path: Path) -> None:
    names = [f"{ESCAPES}{number}" for number in range(10)]
    (tmp_path / "x.ckpt").write_bytes(serialize(change(honest, class_names=names)))
    assert "\x1b" not in "".join(load_classifier(tmp_path / "x.ckpt")[0].class_names)


def test_a_sparse_file_of_gigabytes_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    huge(tmp_path / "x.ckpt")
    begun = time.monotonic()
    with pytest.raises(OSError, match="checksum is missing"):
        load(tmp_path / "x.ckpt")
    with pytest.raises(OSError, match="no valid checkpoint"):
        find_newest(tmp_path)
    assert time.monotonic() - begun < SOON


def test_latest_passes_over_what_can_not_be_read(
    honest: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, make in (("a", None), *((make.__name__, make) for make in STRANGE)):
        folder = tmp_path / "logs" / name / "checkpoints"
        folder.mkdir(parents=True)
        (folder.parent / ".hydra").mkdir()
        if make is None:
            (folder / "best.ckpt").write_bytes(serialize(honest))
        else:
            make(folder / "best.ckpt")
    (tmp_path / "logs" / "dangling" / "checkpoints").mkdir(parents=True)
    (tmp_path / "logs" / "dangling" / "checkpoints" / "best.ckpt").symlink_to("nowhere")
    assert find_run("latest") == Path("logs/a")


# Curves, and a search's journal


@pytest.mark.parametrize(
    "content", [b"step,epoch\n\xff\0", b"a,b\n1,2\n", b"step\nx\n", b"", b"step,a\n1\n", b'"']
)
def test_strange_curves_do_not_stop_a_run(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_bytes(content)
    logger = CSVLogger(save_dir=str(tmp_path))
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    written = (tmp_path / "csv" / "metrics.csv").read_bytes()
    if logger.failed:
        assert "training continues without it" in caplog.text
        assert written == content, "nothing of it is lost"
    else:
        assert b"loss" in written


def test_files_in_the_place_of_the_loggers_folders(
    fit: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "csv").write_text("mine")
    (tmp_path / "run" / "tensorboard").write_text("mine too")
    metrics = fit(
        "model.hidden=8", "trainer.max_epochs=1", "+trainer.limit_train_batches=5", "scheduler=none"
    )
    assert isinstance(metrics["val/acc"], float)
    assert (tmp_path / "run" / "csv").read_text() == "mine"
    assert (tmp_path / "run" / "tensorboard").read_text() == "mine too"


def test_a_journal_with_half_a_line_is_mended(tmp_path: Path) -> None:
    whole = b'{"op_code": 0}\n{"op_code": 4}\n'
    for rest in (b"", b'{"op_co', b"{"):
        (tmp_path / JOURNAL).write_bytes(whole + rest)
        (tmp_path / f"{JOURNAL}.lock").unlink(missing_ok=True)
        (tmp_path / f"{JOURNAL}.lock").symlink_to("/nowhere/optuna.journal")
        mend_journal(tmp_path)
        assert (tmp_path / JOURNAL).read_bytes() == whole
        assert not os.path.lexists(tmp_path / f"{JOURNAL}.lock")
    mend_journal(tmp_path / "nowhere")


# Many kinds of files, damaged in many ways


def damaged(content: bytes, seed: int) -> Iterator[bytes]:
    """Yield copies of a content that are cut, flipped, doubled, emptied and mixed up."""
    generator = random.Random(seed)
    yield content[: generator.randrange(len(content))]
    flipped = bytearray(content)
    for _ in range(10):
        flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
    yield bytes(flipped)
    place = generator.randrange(len(content))
    yield content[:place] + content
    yield content[:place] + generator.randbytes(50) + content[place:]
    yield content.replace(b"1", b"-1e999").replace(b"[", b"{")


def read_all(run: Path, sweep: Path) -> None:
    """Read a run and a sweep as the commands do; an OSError is allowed, because it is shown as one line."""
    for ask in (
        lambda: load_classifier(run / "checkpoints" / "best.ckpt"),
        lambda: find_newest(run / "checkpoints", told=False),
        lambda: read(run),
        lambda: read_yaml(run / ".hydra" / "config.yaml"),
        lambda: read_json(run / "metrics.json"),
        lambda: read_sweep(sweep),
        lambda: write_tables(sweep),
        lambda: mend_journal(sweep),
        lambda: CSVLogger(save_dir=str(run)).experiment,
    ):
        try:
            ask()
        except OSError as error:
            assert str(error)


@pytest.mark.parametrize(
    "rounds", [pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.reliability)]
)
def test_damaged_files_of_all_kinds(rounds: int, trained_run: Path, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (folder / JOURNAL).write_text('{"op_code": 0, "worker_id": "a", "study_name": "b"}\n' * 5)
    names = ("checkpoints/best.ckpt", "status.json", "metrics.json", ".hydra/config.yaml", "csv/metrics.csv")
    files = [run / name for name in names]
    files += [folder / name for name in ("multirun.yaml", "0/status.json", "0/val_correct.npy", JOURNAL)]
    count = 0
    for number in range(rounds):
        for path in files:
            content = path.read_bytes()
            for changed in damaged(content, number):
                path.write_bytes(changed)
                read_multirun.cache_clear()
                read_all(run, folder)
                count += 1
            path.write_bytes(content)
    assert count == 45 * rounds
    read_multirun.cache_clear()
    assert len(read_sweep(folder).jobs) == 8, "whole again"


# From the command line


def test_predict_takes_any_name_and_links_lead_nowhere(
    trained_run: Path, tmp_path: Path, command: Run
) -> None:
    from PIL import Image

    digit = np.full((28, 28), 255, dtype=np.uint8)
    digit[6:22, 12:16] = 0
    Image.fromarray(digit).save(tmp_path / "one.png")
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"x" * 251, b"\xff\xfe", b"=cmd", b"$x^$", b"\x1b[2J", b"a"):
        (Path(os.fsdecode(os.fsencode(photos) + b"/" + name + b".png"))).write_bytes(
            (tmp_path / "one.png").read_bytes()
        )
    run = f"run={trained_run}"
    done = command("predict", "images=photos", run, "output=out", cwd=tmp_path, PYTHONIOENCODING="cp1251")
    assert done.returncode == 0, done.stderr
    assert "6 of 6 read" in done.stdout
    assert "\x1b" not in done.stdout
    assert len(list((tmp_path / "out").glob("*.png"))) == 6
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 6
    done = command("predict", "images=nowhere.png", run, "output=none", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith("0 of 1 read; written to none: predictions.csv\n")
    shutil.copytree(trained_run, tmp_path / "r")
    kept = (tmp_path / "r" / "metrics.json").read_bytes()
    done = command("evaluate", "run=r", "output=r", "split=val", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("output=r already holds metrics.json")
    assert (tmp_path / "r" / "metrics.json").read_bytes() == kept
    (tmp_path / "mine").mkdir()
    (tmp_path / "r" / "evaluation").symlink_to(tmp_path / "mine")
    done = command("evaluate", "run=r", "split=val", cwd=tmp_path)
    assert done.returncode == 1
    assert "evaluation is a link out of its folder" in done.stderr
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_resumption_writes_through_no_link(trained_run: Path, tmp_path: Path, command: Run) -> None:
    shutil.copytree(trained_run, tmp_path / "r")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "r" / "train.log").unlink()
    (tmp_path / "r" / "train.log").symlink_to(tmp_path / "mine.txt")
    done = command("train", "resume=r", "trainer.max_epochs=20", cwd=tmp_path)
    assert done.returncode == 1
    assert "train.log is a link out of its folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cp1251", "cp932"))]
)
def test_any_encoding_of_a_pipe_will_do(encoding: str, folder: Path, fresh_command: Run) -> None:
    done = fresh_command("report", f"run={folder}", cwd=folder.parent, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if encoding == "ascii":
        assert "95.30 +/- 0.14" in done.stdout


SETTINGS = {
    "callbacks=null": "callbacks=null chooses nothing: callbacks must be one of default, early_stopping, histograms",
    "logger=null": "logger=null chooses nothing: logger must be one of csv, none, tensorboard, wandb",
    "trainer.max_epoch=3": "Could not override 'trainer.max_epoch': did you mean trainer.max_epochs? "
    "Otherwise, +trainer.max_epoch=… adds it",
    "trainer.min_epochs=3": "Could not override 'trainer.min_epochs': did you mean trainer.max_epochs? "
    "Otherwise, +trainer.min_epochs=… adds it",
    "hiden=64": "Could not override 'hiden': did you mean model.hidden?",
    "foo=1": "Could not override 'foo': there is no foo: see --help",
    "+foo.bar=1": "Could not add 'foo.bar': there is no foo: see --help",
    "+monitor.x=1": "Could not add 'monitor.x': monitor has no x: it has metric, mode",
    "++data.augment.rotatoin=3": "Could not add 'data.augment.rotatoin': did you mean data.augment.rotation?",
    "trainer.gradient_clip_val=1": "Could not override 'trainer.gradient_clip_val': trainer has no "
    "gradient_clip_val; +trainer.gradient_clip_val=… adds it",
    "callbacks.early_stopping.monitor=val/loss": "Could not override 'callbacks.early_stopping.monitor': it comes "
    "with callbacks=early_stopping, which is not chosen",
    "callbacks.mine.x=1": "Could not override 'callbacks.mine.x': no YAML file has it; +callbacks.mine.x=… adds it",
    "trainer.batch_size=8": "Could not override 'trainer.batch_size': did you mean data.batch_size? "
    "Otherwise, +trainer.batch_size=… adds it",
    "trainr.max_epochs=1": "Could not override 'trainr.max_epochs': did you mean trainer.max_epochs?",
    "model=mpl": "In 'train': Could not find 'model/mpl' Available options in 'model': directions mlp",
}


@pytest.mark.parametrize("setting", few(SETTINGS, 3))
def test_a_wrong_setting_is_a_line(setting: str, tmp_path: Path, command: Run) -> None:
    for mode in ((), ("-m",)):
        done = command("train", *mode, setting, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr == f"{SETTINGS[setting]}\n"
        assert not (tmp_path / "logs").exists()


def test_a_choice_beside_resume_is_told(trained_run: Path, tmp_path: Path, command: Run) -> None:
    shutil.copytree(trained_run, tmp_path / "r")
    done = command("train", "resume=r", "trainer=cpu", cwd=tmp_path)
    assert done.returncode == 1
    assert "trainer=cpu can't be chosen with resume=" in done.stderr
    (tmp_path / "r" / ".hydra" / "config.yaml").write_text("seed: [1\n")
    done = command("train", "resume=r", cwd=tmp_path)
    assert done.returncode == 1
    assert "config.yaml is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_lightning_can_not_do_is_a_line(tmp_path: Path, command: Run) -> None:
    wrong = {
        (
            "+trainer.val_check_interval=500",
            "+trainer.limit_train_batches=20",
        ): "val_check_interval` (500) must be",
    }
    for number, (settings, line) in enumerate(wrong.items()):
        run = f"run {number}"
        done = command("train", *settings, "model.hidden=8", f"hydra.run.dir={run}", cwd=tmp_path)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert line in done.stderr
        assert "Traceback" in (tmp_path / run / "train.log").read_text()


@pytest.mark.slow
def test_a_copied_search_is_a_search_of_its_own(tmp_path: Path, command: Run) -> None:
    search = (
        "search=mlp",
        "hydra.sweeper.params=null",
        "hydra.sweeper.n_trials=1",
        "model.hidden=choice(8,9)",
    )
    tiny = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "scheduler=none")
    done = command("train", "-m", *search, *tiny, "hydra.sweep.dir=search", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "search", tmp_path / "copy")
    before = (tmp_path / "search" / JOURNAL).read_bytes()
    with (tmp_path / "copy" / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 4, "wor')  # as after a kill within a line
    shutil.move(tmp_path / "search", tmp_path / "aside")
    done = command("train", "-m", "resume=copy", "hydra.sweeper.n_trials=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "search").exists()
    assert (tmp_path / "aside" / JOURNAL).read_bytes() == before
    saved = json.loads((tmp_path / "copy" / "1" / "trial.json").read_text())
    assert saved["storage"] is None
    assert len(read_sweep(tmp_path / "copy").jobs) == 2


FLAT = """
import ctypes, json, os, threading
from lightning.pytorch.callbacks import Callback
class Mallinfo2(ctypes.Structure):  # of glibc's malloc.h
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
class Count(Callback):
    def on_train_start(self, trainer, pl_module):
        memory = mallinfo2()
        allocated = memory.field_7 + memory.field_4  # uordblks, hblkhd
        told = [threading.active_count(), len(os.listdir("/proc/self/fd")), allocated]
        with open("counts.jsonl", "a") as file:
            file.write(json.dumps(told) + "\\n")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc here")
@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.33"), reason="no mallinfo2 here")
@pytest.mark.parametrize(
    "jobs", [pytest.param(6, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.reliability)]
)
def test_jobs_leave_nothing_behind(jobs: int, tmp_path: Path, command: Run) -> None:
    """The test measures allocated memory; the memory of the process also grows by gaps, by 30 MB now and then."""
    (tmp_path / "counting.py").write_text(FLAT)
    done = command(
        *("train", "-m", "hydra/launcher=basic", f"seed=range({jobs})", "model.hidden=8", "scheduler=none"),
        *("trainer.max_epochs=1", "+trainer.limit_train_batches=3", "data.val_size=500"),
        "+callbacks.count._target_=counting.Count",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    counts = [json.loads(line) for line in (tmp_path / "counts.jsonl").read_text().splitlines()]
    assert len(counts) == jobs
    threads, files, allocated = zip(*counts, strict=True)
    assert threads[-1] <= threads[1], "no thread stays"
    assert files[-1] <= files[1], "no file stays open"
    assert allocated[-1] - allocated[2] < 10e6, "no job's tensors stay"
