"""Folds and training sets of any size: how images are divided, and how the nets of all folds are evaluated."""

import csv
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NO_PICTURES, Once, Run
from hypothesis import given
from hypothesis import strategies as st

from mnist_lightning.config import ConfigError
from mnist_lightning.data import MNISTDataModule, assign_folds, order_stratified
from mnist_lightning.evaluation.scores import score
from mnist_lightning.images.arrays import DataError
from mnist_lightning.rundir.status import Status
from mnist_lightning.sweeps.importance import find_importance, share_variance
from mnist_lightning.sweeps.report import join_differences, summarize, write_report
from mnist_lightning.sweeps.results import count_jobs, join_folds, read_sweep
from mnist_lightning.sweeps.resume import expand_folds

SHORT = ("trainer.max_epochs=1", "logger=csv", NO_PICTURES, "data.train_size=600", "model.hidden=16")


@given(st.lists(st.integers(0, 4), min_size=12, max_size=200), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_folds_are_stratified_and_take_each_image_once(
    labels: list[int], num_folds: int, split_seed: int
) -> None:
    of = torch.tensor(labels)
    folds = assign_folds(of, num_folds, split_seed)
    for chosen in (of >= 0, *(of == label for label in set(labels))):
        counts = torch.bincount(folds[chosen], minlength=num_folds)
        assert len(counts) == num_folds
        assert counts.max() - counts.min() <= 1
    assert torch.equal(folds, assign_folds(of, num_folds, split_seed))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 2**32 - 1))
def test_every_beginning_of_the_order_is_stratified(labels: list[int], split_seed: int) -> None:
    of = torch.tensor(labels)
    order = order_stratified(of, split_seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    totals = torch.bincount(of)
    for size in range(1, len(labels) + 1):
        shares = totals * size / len(labels)
        assert (torch.bincount(of[order[:size]], minlength=len(totals)) - shares).abs().max() <= len(
            totals
        ) / 2 + 1


def test_training_sets_are_parts_of_each_other(data_dir: Path) -> None:
    def read(**changes: Any) -> MNISTDataModule:
        datamodule = MNISTDataModule(data_dir=data_dir, **changes)
        datamodule.prepare_data()
        datamodule.setup("fit")
        return datamodule

    small, large, whole = (read(train_size=size).splits for size in (1000, 3000, 55_000))
    names = [{image.tobytes() for image in one["train"].images.numpy()} for one in (small, large, whole)]
    assert [len(one["train"]) for one in (small, large, whole)] == [1000, 3000, 55_000]
    assert names[0] < names[1] < names[2]
    assert torch.equal(small["val"].images, whole["val"].images), "the same validation images"
    assert torch.equal(whole["train"].images, read().splits["train"].images), "all of them are the default"
    shares = torch.bincount(whole["train"].labels) / 55
    assert (torch.bincount(small["train"].labels) - shares).abs().max() < 2
    folds = [read(num_folds=3, fold=fold).splits for fold in range(3)]
    assert [len(one["val"]) for one in folds] == [20_000] * 3
    seen = torch.cat([one["val"].labels for one in folds])
    assert torch.equal(torch.bincount(seen), torch.bincount(read(val_size=0).splits["train"].labels))
    with pytest.raises(ValueError, match="num_folds and fold go together"):
        MNISTDataModule(data_dir=data_dir, num_folds=3)
    with pytest.raises(DataError, match=r"data.train_size must be in \[1, 40000\], which data.num_folds=3"):
        read(num_folds=3, fold=0, train_size=40_001)
    with pytest.raises(DataError, match=r"the 100 training images that data.train_size=100 leaves, got 256"):
        read(train_size=100)
    with pytest.raises(DataError, match=r"no image of class . is among data.train_size=5"):
        read(train_size=5, batch_size=1)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["-m", "folds=3", "seed=1,2"], ["-m", "data.num_folds=3", "data.fold=0,1,2", "seed=1,2"]),
        (["seed=1"], ["seed=1"]),
        (["model.folds=3"], ["model.folds=3"]),
    ],
)
def test_folds_are_expanded(typed: list[str], meant: list[str]) -> None:
    assert expand_folds(typed) == meant


@pytest.mark.parametrize(
    "typed",
    [
        ["folds=5"],
        ["-m", "folds=1"],
        ["-m", "folds=a"],
        ["-m", "folds="],
        ["-m", "folds=-3"],
        ["-m", "folds=99999"],
        ["-m", "folds=5", "data.num_folds=3"],
        ["-m", "data.fold=1", "folds=5"],
    ],
)
def test_folds_that_are_none_are_told(typed: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^folds"):
        expand_folds(typed)


@pytest.fixture(scope="module")
def swept(command: Run, once: Once) -> Path:
    """Three folds with two seeds; each net is trained on 600 images, and the job of fold 1 and seed 2 has failed."""

    def make(cwd: Path) -> None:
        done = command("train", "-m", "folds=3", "seed=1,2", *SHORT, "hydra.sweep.dir=sweep", cwd=cwd)
        assert done.returncode == 0, done.stderr
        (cwd / "printed.txt").write_text(done.stdout)

    return once("folds", make)


def test_a_sweep_over_folds_is_one_setting(swept: Path) -> None:
    sweep = read_sweep(swept / "sweep")
    (setting,) = sweep.settings
    assert len(setting.jobs) == 6
    joined = join_folds(setting)
    assert joined is not None
    assert (joined.images, joined.missing) == (60_000, [])
    assert joined.accuracy == pytest.approx(setting.mean, abs=1e-9)  # all folds have the same size
    printed = (swept / "printed.txt").read_text()
    assert (
        "data.num_folds=3: fold 0 is the validation split, val_size is ignored"
        in (swept / "sweep" / "0" / "train.log").read_text()
    )
    assert re.search(r"all folds together: accuracy .* on 60,000 images", printed)
    assert count_jobs(swept / "sweep") == 6


def test_a_fold_that_is_none_costs_the_joined_accuracy_alone(swept: Path) -> None:
    (setting,) = read_sweep(swept / "sweep").settings
    for fold in ("x", "9" * 5_000, "-1"):
        job = dataclasses.replace(setting.jobs[0], params=setting.jobs[0].params | {"data.fold": fold})
        assert join_folds(dataclasses.replace(setting, jobs=[job])) is None


@pytest.mark.slow
def test_evaluate_joins_what_nets_say_of_images_that_they_left_out(
    swept: Path, tmp_path: Path, command: Run
) -> None:
    done = command("evaluate", f"folds={swept / 'sweep'}", "labels=true", f"output={tmp_path}", cwd=swept)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["images"], metrics["missing_folds"]) == (60_000, [])
    low, high = metrics["acc_interval_95"]
    assert high - low == pytest.approx(
        2 * 1.96 * math.sqrt(metrics["acc"] * (1 - metrics["acc"]) / 60_000), rel=0.01
    )
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(60_000))
    sweep = read_sweep(swept / "sweep")
    mean = np.mean([job.status.metrics["val/acc"] for job in sweep.jobs])
    assert metrics["acc"] >= mean, "two seeds are averaged, which helps nets that have hardly learnt"
    doubtful = list(csv.DictReader((tmp_path / "labels.csv").open()))
    assert len(doubtful) == metrics["mistakes"]
    given = [float(row["probability_of_label"]) for row in doubtful]
    assert given == sorted(given)
    first = rows[int(doubtful[0]["index"])]
    assert (first["label"], first["prediction"]) == (doubtful[0]["label"], doubtful[0]["prediction"])
    assert (tmp_path / "labels.png").stat().st_size > 10_000
    assert "the least probable of the contradicted labels" in done.stdout
    for arguments, told in (
        (["labels=true"], "labels=true needs nets that were not trained"),
        ([f"folds={swept / 'sweep'}", "run=x"], "folds already names the sweep"),
    ):
        wrong = command("evaluate", *arguments, cwd=swept)
        assert wrong.returncode == 1
        assert told in wrong.stderr


@pytest.mark.slow
def test_a_missing_fold_is_told(swept: Path, tmp_path: Path, command: Run) -> None:
    import shutil

    copy = tmp_path / "sweep"
    shutil.copytree(swept / "sweep", copy)
    for number in (2, 3):
        Status("failed", "no memory left", read_sweep(copy).jobs[number].status.overrides).write(
            copy / str(number)
        )
    sweep = read_sweep(copy)
    missing = sweep.jobs[2].params["data.fold"]
    joined = join_folds(sweep.settings[0])
    assert joined is not None
    assert (joined.images, joined.missing) == (40_000, [int(missing)])
    assert f"no completed job has fold {missing}" in summarize(sweep)
    assert f"**fold {missing}**" in (write_report(copy).folder / "report.md").read_text()
    done = command("evaluate", f"folds={copy}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"fold {missing}: no net was evaluated on its images" in done.stdout
    assert "no memory left" in done.stdout
    assert json.loads((copy / "evaluation" / "out-of-fold" / "metrics.json").read_text())["images"] == 40_000


def test_doubtful_labels_are_the_least_probable_ones() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.01, 0.99], [0.4, 0.6]])
    evaluation = score(np.array([0, 0, 0, 1]), np.log(probabilities).astype(np.float32))
    assert evaluation.doubtful().tolist() == [2, 1]


def test_differences_are_added_over_seeds_and_joined_over_folds() -> None:
    one, other = np.array([1, 0, -1], np.int8), np.array([1, 1, 0], np.int8)
    joined = join_differences({("0", "1"): one, ("0", "2"): other, ("1", "1"): one})
    assert joined.tolist() == [2, 1, -1, 1, 0, -1]


def test_shares_of_variance_are_known_where_the_truth_is() -> None:
    """One of two parameters has no effect, and the size of luck is known."""
    generator = np.random.default_rng(0)
    levels = {"a": [a for a in "xyz" for _ in "pq"], "b": ["p", "q"] * 3}
    effect = {"x": 0.0, "y": 1.0, "z": 2.0}
    groups = [(effect[a] + generator.normal(0, 0.5, 400)).tolist() for a in levels["a"]]
    found = share_variance(levels, groups)
    assert found is not None
    variance = 2 / 3 + 0.25  # the variances of 0, 1, 2 and of luck
    assert found.shares["a"] == pytest.approx(2 / 3 / variance, abs=0.02)
    assert found.shares["b"] == pytest.approx(0, abs=0.01)
    assert found.luck == pytest.approx(0.25 / variance, abs=0.02)
    assert found.rest == pytest.approx(0, abs=0.01)
    assert list(found.shares) == ["a", "b"]
    together = share_variance({"a": ["x", "x", "y", "y"], "b": ["p", "q"] * 2}, [[0.0], [1.0], [1.0], [0.0]])
    assert together is not None
    assert (together.shares, together.luck, together.rest) == ({"a": 0.0, "b": 0.0}, None, 1.0)
    one_by_one = share_variance({"a": ["x", "y", "x"], "b": ["p", "p", "q"]}, [[0.0], [1.0], [2.0]])
    assert one_by_one is not None
    assert (together.is_whole, one_by_one.is_whole) == (True, False)
    assert share_variance({"a": ["x", "y"]}, [[0.5], [0.5]]) is None


SEARCH = """
hydra:
  overrides: {task: ["search=mlp"], hydra: ["hydra.mode=MULTIRUN"]}
  sweeper:
    n_trials: 30
    params: {model.hidden: "choice(16, [32,16])", optimizer.lr: "tag(log, interval(1e-4, 1e-1))", seed: "1,2"}
monitor: {metric: val/acc, mode: max}
"""


def test_importance_of_a_search_finds_the_parameter_that_decides(tmp_path: Path) -> None:
    (tmp_path / "multirun.yaml").write_text(SEARCH)
    generator = np.random.default_rng(0)
    for number in range(30):
        (tmp_path / str(number)).mkdir()
        rate = 10 ** generator.uniform(-4, -1)
        overrides = [f"model.hidden={['16', '[32,16]'][number % 2]}", f"optimizer.lr={rate:.4g}", "seed=1"]
        accuracy = 0.9 - 0.1 * (math.log10(rate) + 2.5) ** 2
        Status("completed", None, overrides, 1.0, 1.0, {"val/acc": accuracy}).write(tmp_path / str(number))
    sweep = read_sweep(tmp_path)
    found = find_importance(sweep)
    assert found is not None
    assert (found.method, list(found.shares)) == ("PED-ANOVA", ["optimizer.lr", "model.hidden"])
    assert found.shares["optimizer.lr"] > 0.8
    assert sum(found.shares.values()) == pytest.approx(1)
    assert "what mattered (PED-ANOVA): optimizer.lr" in summarize(sweep)
    report = (write_report(tmp_path).folder / "report.md").read_text()
    assert re.search(r"\| `optimizer.lr` \| \d+ % \|", report)


@pytest.mark.slow
def test_a_search_takes_the_mean_over_folds(tmp_path: Path, command: Run) -> None:
    import optuna

    from mnist_lightning.sweeps.study import open_storage

    generator = np.random.default_rng(1)
    images, labels = generator.integers(0, 256, (200, 8, 8), dtype=np.uint8), np.arange(200) % 4
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    arguments = ("-m", "search=mlp", "folds=2", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=s")
    arguments += ("data=npz", "data.path=set.npz", "data.batch_size=20", *SHORT[:3], "model.hidden=16")
    done = command("train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = read_sweep(tmp_path / "s")
    assert [job.name for job in sweep.jobs] == ["0", "1", "2", "3"]
    assert [job.params["data.fold"] for job in sweep.jobs] == ["0", "1", "0", "1"]
    study = optuna.load_study(
        study_name="mnist_lightning", storage=open_storage(str(tmp_path / "s" / "optuna.journal"))
    )
    accuracies = [job.status.metrics["val/acc"] for job in sweep.jobs]
    assert study.trials[0].value == pytest.approx(np.mean(accuracies[:2]))
    assert study.trials[1].value == pytest.approx(np.mean(accuracies[2:]))
    assert count_jobs(tmp_path / "s") == 4
