"""Tests of the table of accuracies, from real runs and evaluations."""

import functools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, Once, Run
from PIL import Image

from benchmarks import accuracy
from mnist_lightning.evaluation.trained import load_classifier, load_split, log_probabilities

Tabulate = Callable[..., "subprocess.CompletedProcess[str]"]

SETTINGS = (
    "data/augment=elastic",
    "model.hidden=32",
    "+trainer.limit_train_batches=60",
    "trainer.max_epochs=1",
)


@pytest.fixture
def workplace(command: Run, once: Once, tmp_path: Path) -> Path:
    """A folder with two seeds of a training with deformations, and a run without."""

    def make(cwd: Path) -> None:
        for name, arguments in (
            ("a", (*SETTINGS, "seed=1")),
            ("b", (*SETTINGS, "seed=2")),
            ("plain", (*SETTINGS[1:], "data.val_size=4000")),
        ):
            done = command("train", *arguments, f"hydra.run.dir={name}", "logger=none", cwd=cwd)
            assert done.returncode == 0, done.stderr

    shutil.copytree(once("deformed", make), tmp_path, dirs_exist_ok=True)
    return tmp_path


def read(path: Path) -> dict[str, float]:
    content: dict[str, float] = json.loads((path / "metrics.json").read_text())
    return content


@pytest.mark.slow
def test_several_runs_are_averaged(workplace: Path, command: Run, data_dir: Path) -> None:
    done = command("evaluate", "runs=[a,b]", "output=pair", cwd=workplace)
    assert done.returncode == 0, done.stderr
    metrics = read(workplace / "pair")
    means = 0.0
    for name in ("a", "b"):
        path = workplace / name / "checkpoints" / "best.ckpt"
        classifier, checkpoint = load_classifier(path)
        digits = load_split(path, checkpoint, "test", data_dir=str(data_dir))
        means = means + log_probabilities(classifier, digits.images).exp() / 2  # type: ignore[assignment]
    right = means.argmax(1) == digits.labels  # type: ignore[attr-defined]
    assert metrics["acc"] == pytest.approx(right.float().mean().item(), abs=1e-6)
    assert {path.suffix for path in (workplace / "pair").glob("*.*[a-z]")} - {""} == {".json", ".csv", ".png"}
    assert "mean cross-entropy" in done.stdout


@pytest.mark.slow
def test_tta_is_seeded_and_its_own(workplace: Path, command: Run) -> None:
    said = []
    for output in ("one", "two"):
        done = command("evaluate", "run=a", "tta=3", f"output={output}", cwd=workplace)
        assert done.returncode == 0, done.stderr
        assert "3 deformations of each image" in done.stdout
        said.append((workplace / output / "predictions.csv").read_text())
    assert said[0] == said[1]
    assert command("evaluate", "run=a", "output=whole", cwd=workplace).returncode == 0
    assert (workplace / "whole" / "predictions.csv").read_text() != said[0]
    assert abs(read(workplace / "one")["acc"] - read(workplace / "whole")["acc"]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run=plain", "tta=2"), "was trained without deformations (data.augment)"),
        (("runs=[a,plain]", "split=val"), "have different val images"),
        (("runs=[a]",), "runs must be at least 2 names"),
        (("runs=[a,b]", "run=a"), "leave out run and checkpoint"),
        (("tta=-1",), "tta must be in [0, 10000], got -1"),
    ],
)
@pytest.mark.slow
def test_what_can_not_be_averaged_is_told_in_a_line(
    arguments: tuple[str, ...], message: str, workplace: Path, command: Run
) -> None:
    done = command("evaluate", *arguments, cwd=workplace)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def tabulate(python: Run) -> Tabulate:
    return functools.partial(python, "-m", "benchmarks.accuracy", cwd=REPOSITORY)


@pytest.mark.slow
def test_the_table_comes_from_the_runs(workplace: Path, command: Run, tabulate: Tabulate) -> None:
    for arguments in (("runs=[a,b]", "output=committee"), ("run=a", "tta=2")):
        assert command("evaluate", *arguments, cwd=workplace).returncode == 0
    folders = [str(workplace / name) for name in ("a", "b", "committee")]
    output = workplace / "table" / "accuracy.md"
    done = tabulate(*folders, "--output", str(output), "--hardware", "a loom")
    assert done.returncode == 0, done.stderr
    table = output.read_text()
    assert "Simard, Steinkraus, Platt 2003" in table
    errors = [100 * (1 - read(workplace / name)["test/acc"]) for name in ("a", "b")]
    rows = [line for line in table.splitlines() if "data/augment=elastic" in line and line[0] == "|"]
    assert len(rows) == 3, "the seeds, their mean, and test-time averaging"
    assert all("| a loom |" in row for row in rows)
    assert f"| {np.mean(errors):.3f} ± {np.std(errors, ddof=1):.3f} | 1: {errors[0]:.2f}, 2: " in table
    committee = 100 * (1 - read(workplace / "committee")["acc"])
    assert any("mean of 2 nets" in row and f"| {committee:.3f} (one run) | 1+2:" in row for row in rows)
    assert any("tta=2" in row for row in rows)
    right = [np.unpackbits(np.load(workplace / n / "test_correct.npy"), count=10_000) for n in ("a", "b")]
    assert [100 - r.mean() * 100 for r in right] == pytest.approx(errors, abs=1e-4)
    (picture,) = output.parent.glob("*.png")
    assert picture.name in table
    with Image.open(picture) as image:
        assert image.size[0] == 960


def test_what_the_table_says_of_other_runs_stays(workplace: Path, tabulate: Tabulate) -> None:
    output = workplace / "kept" / "accuracy.md"
    two, one = [str(workplace / name) for name in ("a", "b")], str(workplace / "plain")
    assert tabulate(*two, "--output", str(output), "--hardware", "a loom").returncode == 0
    before = output.read_text().splitlines()
    assert tabulate(one, "--output", str(output), "--hardware", "an abacus").returncode == 0
    after = output.read_text().splitlines()
    assert set(before) < set(after), "with its row, its command and its picture"
    assert sum("| an abacus |" in line for line in after) == 1
    assert tabulate(*two, "--output", str(output), "--hardware", "a mill").returncode == 0
    again = output.read_text()
    assert "a loom" not in again, "newer runs take the older ones' place"
    assert "a mill" in again


def test_the_published_table_is_as_it_was_written() -> None:
    page = (REPOSITORY / "benchmarks" / "accuracy.md").read_text()
    chapters = accuracy.read_chapters(page)
    assert "default" in chapters
    assert accuracy.write(chapters) == page


def test_without_runs_it_says_so(tmp_path: Path, tabulate: Tabulate) -> None:
    done = tabulate(str(tmp_path))
    assert done.returncode != 0
    assert done.stderr == f"no run under {tmp_path} has a test error\n"
