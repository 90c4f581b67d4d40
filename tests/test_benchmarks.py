"""Tests of the benchmarks in their smallest form: they run and compare the same work; times are not tested."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Run
from processes import Preloaded

NAMES = ("step_overhead", "time_to_accuracy", "startup", "scaling", "report")


@pytest.fixture
def run_benchmark(python: Run) -> Callable[..., str]:
    """``run_benchmark("startup", "--pairs", "1")`` runs a benchmark and returns its output."""

    def run(name: str, *arguments: str) -> str:
        done = python("-m", f"benchmarks.{name}", *arguments, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def results(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    assert {"cpu", "load", "torch", "lightning"} <= content["machine"].keys()
    assert all(len(row) == len(table["header"]) for table in content["tables"] for row in table["rows"])
    return content


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, run_benchmark: Callable[..., str]) -> None:
    assert f"python -m benchmarks.{name}" in run_benchmark(name, "--help")


@pytest.mark.slow
def test_step_overhead_compares_equal_arithmetic(data_dir: Path) -> None:
    """train, a bare loop and bare Lightning end with the same bits, and the tutorial's loop with the same loss."""
    from benchmarks import step_overhead

    overrides = [
        *(f"data.data_dir='{data_dir}'", "data.batch_size=64", "data.val_size=0"),
        *("trainer.max_epochs=2", "+trainer.limit_train_batches=5", "trainer.accelerator=cpu"),
    ]
    results = {
        "train": [step_overhead.run_project(overrides)],
        "bare": [step_overhead.run_bare(overrides, "cpu", 5)],
        "Lightning": [step_overhead.run_bare_lightning(overrides, "cpu", 5)],
    }
    step_overhead.check_same_work(results, device="cpu")
    assert {found[0].steps for found in results.values()} == {10}
    for name in ("bare", "Lightning"):
        for key, value in results["train"][0].weights.items():
            assert torch.equal(value, results[name][0].weights[key]), (name, key)
    results["bare"][0].weights["layers.1.bias"][0] += 1e-6
    with pytest.raises(SystemExit, match="train and bare have not computed the same"):
        step_overhead.check_same_work(results, device="cpu")
    results["bare"] = [step_overhead.run_bare(overrides, "cpu", 4)]
    with pytest.raises(SystemExit, match="train took 10 steps, bare 8"):
        step_overhead.check_same_work(results, device="cpu")

    tutorial = ["experiment=tutorial", *overrides, "trainer.max_epochs=1"]
    ours = step_overhead.run_project(tutorial)
    theirs = step_overhead.run_tutorial(tutorial, data_dir, 5)
    assert (ours.steps, theirs.steps) == (5, 5)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
    for mine, other in zip(ours.weights.values(), theirs.weights.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_progress_bar_is_drawn_while_it_is_measured() -> None:
    from benchmarks.step_overhead import terminal

    before = sys.stderr
    with terminal():
        assert sys.stderr.isatty()
        print("a bar", file=sys.stderr)
    assert sys.stderr is before


@pytest.mark.slow
def test_step_overhead(tmp_path: Path, data_dir: Path, run_benchmark: Callable[..., str]) -> None:
    path = tmp_path / "step.json"
    arguments = ("--pairs", "1", "--steps", "3", "--batch-sizes", "64", "256", "--data-dir", str(data_dir))
    assert "batch 256: bare torch loop" in run_benchmark("step_overhead", *arguments, "--output", str(path))
    assert [len(table["rows"]) for table in results(path)["tables"]] == [5, 2]


@pytest.mark.slow
def test_contestants_tell_when_they_knew_which_accuracy(tmp_path: Path, data_dir: Path, python: Run) -> None:
    """Each command line of time_to_accuracy runs in a process that has already imported the heavy packages."""
    from benchmarks.time_to_accuracy import LOG, list_contestants

    arguments = argparse.Namespace(data_dir=data_dir, steps=30, epochs=1, project=None)
    contestants = list_contestants(arguments)
    assert contestants.keys() == {"train", "the tutorial's loop", "bare torch loop"}
    for number, command in enumerate(contestants.values()):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        began = time.time()
        done = python(*command, cwd=cwd, PYTHONPATH=str(REPOSITORY))
        assert done.returncode == 0, done.stderr
        (line,) = [json.loads(line) for line in (cwd / LOG).read_text().splitlines()]
        assert 0.1 < line["accuracy"] < 0.98
        assert began < line["time"] < time.time()


@pytest.mark.reliability
def test_time_to_accuracy(tmp_path: Path, data_dir: Path, run_benchmark: Callable[..., str]) -> None:
    path = tmp_path / "accuracy.json"
    arguments = ("--pairs", "1", "--steps", "30", "--epochs", "2", "--data-dir", str(data_dir))
    projects = ("--project", "", "--project", "optimizer.lr=0.002 model.hidden=64")
    run_benchmark("time_to_accuracy", *arguments, *projects, "--output", str(path))
    samples = results(path)["samples"]
    assert len(samples) == 4
    for name, (run,) in samples.items():
        times, accuracies = zip(*run["curve"], strict=True)
        assert len(accuracies) == 2, name
        assert 0.1 < accuracies[0] < 0.98, name
        assert 0 < times[0] < times[1] < run["seconds"], name


def test_reached_is_the_first_epoch_that_shows_it() -> None:
    from benchmarks.time_to_accuracy import Run

    run = Run(9.0, [(3.0, 0.95), (5.0, 0.975), (7.0, 0.97)])
    assert [run.reached(level) for level in (0.95, 0.97, 0.98)] == [3.0, 5.0, float("inf")]


def test_first_step_is_stamped(tmp_path: Path, data_dir: Path, python: Run) -> None:
    """This is a part of test_startup without new interpreters."""
    from benchmarks.startup import STAMP, TRAIN

    first_step = "+callbacks.first_step._target_=benchmarks.startup.FirstStep"
    began = time.time()
    done = python(*TRAIN, f"data.data_dir={data_dir}", first_step, cwd=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    assert began < float((tmp_path / STAMP).read_text()) < time.time()


@pytest.mark.reliability
def test_startup(tmp_path: Path, data_dir: Path, run_benchmark: Callable[..., str]) -> None:
    path = tmp_path / "startup.json"
    run_benchmark("startup", "--pairs", "1", "--data-dir", str(data_dir), "--output", str(path))
    seconds = results(path)["samples"]
    assert len(seconds) == 8
    assert all(one > 0 for (one,) in seconds.values())


@pytest.mark.slow
def test_a_row_of_scaling(tmp_path: Path, data_dir: Path, python: Run) -> None:
    """This is a part of test_scaling without new interpreters."""
    from benchmarks.scaling import Run, make, tabulate

    arguments = argparse.Namespace(data_dir=data_dir, epochs=1, steps=3)
    run = make(arguments, ["model.hidden=64"])
    done = python("-m", "mnist_lightning.train", *run.args[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["num_parameters"] == 785 * 64 + 65 * 10
    found = Run(metrics["epochs"] * run.keywords["images"], metrics["train_seconds"], 150.0)
    assert found.images == 3 * 256
    ((name, *cells),) = tabulate("hidden", {"model.hidden=64": [found]}, 100.0).rows
    assert name == "model.hidden=64"
    assert cells[-1] == "+50"


@pytest.mark.reliability
def test_scaling(tmp_path: Path, data_dir: Path, run_benchmark: Callable[..., str]) -> None:
    path = tmp_path / "scaling.json"
    small = ("--pairs", "1", "--rows", "1", "--epochs", "1", "--steps", "3", "--data-dir", str(data_dir))
    run_benchmark("scaling", *small, "--only", "hidden", "threads", "processes", "--output", str(path))
    samples = results(path)["samples"]
    assert samples.keys() == {"hidden", "threads", "processes"}
    for group in samples.values():
        ((run,),) = group.values()
        assert run["images"] == 3 * 256
        assert run["peak"] > 50


def test_report_puts_the_tables_into_the_readme(tmp_path: Path, run_benchmark: Callable[..., str]) -> None:
    from benchmarks.measure import Table, describe_machine
    from benchmarks.report import MARKER

    table = {"title": "steps", "header": ["", "ms"], "rows": [["train", "1.5"], ["bare", "1.2"]]}
    content = {
        "benchmark": "step_overhead",
        "options": {"pairs": "5"},
        "machine": describe_machine(),
        "tables": [table],
    }
    (tmp_path / "step.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n\n{MARKER}\n\nold")
    for _ in range(2):
        run_benchmark("report", "--results", str(tmp_path), "--readme", str(readme))
    written = readme.read_text()
    assert written.startswith(f"above\n\n{MARKER}\n\n### step_overhead")
    assert "old" not in written
    assert written.count("`python -m benchmarks.step_overhead --pairs=5`") == 1
    assert str(Table(**table)) in written  # type: ignore[arg-type]


def test_take_turns_and_the_median_of_ratios() -> None:
    from benchmarks.measure import ratio, take_turns

    order: list[str] = []
    take_turns({name: lambda name=name: order.append(name) for name in "AB"}, 3)  # type: ignore[misc]
    assert order == ["A", "B"] * 3
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bare_loop", "tutorial_loop"])
def test_references_do_not_wait_for_lightning(
    name: str, light: Preloaded, environment: dict[str, str]
) -> None:
    code = (
        f"import sys, benchmarks.{name}; assert 'torch' in sys.modules; sys.exit('lightning' in sys.modules)"
    )
    assert light.start("-c", code, cwd=REPOSITORY, env=environment).wait() == 0
