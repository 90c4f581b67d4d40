"""Tests of reports of sweep folders with known content."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Run

from mnist_lightning import figures
from mnist_lightning.cli import CommandError
from mnist_lightning.rundir.status import Status, describe, lock, read, track
from mnist_lightning.sweeps.report import format_markdown, try_read_curves, write_report, write_tables
from mnist_lightning.sweeps.results import find_sweep, read_sweep, reproduce

MULTIRUN = """
hydra:
  overrides:
    task: ["model.hidden=16,32", "optimizer.lr=1e-3,1e-2", "seed=1,2", "test=false"]
    hydra: ["hydra.mode=MULTIRUN", "hydra/launcher=processes"]
monitor: {metric: val/acc, mode: max}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_sweep(tmp_path)


def make_sweep(tmp_path: Path) -> Path:
    """Make a sweep of seven completed jobs and a failed one, where 32 units are better and the rate hardly matters."""
    sweep = tmp_path / "sweep (1)"
    sweep.mkdir()
    (sweep / "multirun.yaml").write_text(MULTIRUN)
    number = 0
    for hidden, base in ((16, 0.90), (32, 0.95)):
        for lr, more in (("0.001", 0.0), ("0.01", 0.001)):
            for seed in (1, 2):
                job = sweep / str(number)
                (job / "csv").mkdir(parents=True)
                accuracy = base + more + 0.002 * seed
                overrides = [f"model.hidden={hidden}", f"optimizer.lr={lr}", f"seed={seed}", "test=false"]
                status = Status("completed", None, overrides, 1000.0 + number, 2.0)
                status.metrics = {"val/acc": accuracy, "last/val/acc": accuracy - 0.01, "epochs": 2}
                if number == 7:
                    status = Status("failed", "a | b", overrides, 1007.0, 1.0)
                status.write(job)
                correct = np.arange(1000) < round(1000 * accuracy)
                np.save(job / "val_correct.npy", np.packbits(correct))
                (job / "csv" / "metrics.csv").write_text(
                    f"step,epoch,val/acc\n10,1,0.5\n20,2,{accuracy}\n20,2,\n"
                )
                number += 1
    return sweep


def test_settings_are_grouped_over_seeds_and_ranked(folder: Path) -> None:
    sweep = read_sweep(folder)
    assert sweep.varied == ["model.hidden", "optimizer.lr", "seed"]
    ranked = [(s.params["model.hidden"], s.params["optimizer.lr"], len(s.jobs)) for s in sweep.settings]
    assert ranked == [("32", "0.001", 2), ("32", "0.01", 1), ("16", "0.01", 2), ("16", "0.001", 2)]
    best = sweep.settings[0]
    assert best.mean == pytest.approx(0.953)
    assert best.std == pytest.approx(math.sqrt(2) * 0.001)  # the standard deviation of 0.952 and 0.954
    assert best.last == pytest.approx(0.943)


def test_report_says_what_a_person_asks(folder: Path) -> None:
    write_tables(folder)
    report = (folder / "report.md").read_text()
    assert "8 jobs: 7 completed, 1 failed." in report
    assert "python -m mnist_lightning.train -m model.hidden=16,32" in report
    assert "hydra/launcher=processes" in report
    assert "hydra.mode" not in report
    assert "| `32` | `0.001` | 95.30 ± 0.14 | 94.30 | 2 | 2.0 |" in report
    assert "test=false |" not in report  # it did not vary
    winner = read_sweep(folder).settings[0]
    job = read_sweep(folder).best_job(winner)
    assert reproduce(job) in report
    assert f"evaluate run='{job.folder}'" in report
    assert "this sweep has not used the test images" in report
    alike = report.split("can't be told apart from the winner")[1].split("##")[0]
    assert "model.hidden=32" in alike
    assert "model.hidden=16" not in alike  # it differs in 50 of 1,000 images, all in the same direction
    assert "a \\| b" in report
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == [str(number) for number in range(8)]
    assert rows[7]["state"] == "failed"
    assert rows[7]["val/acc"] == ""


def test_command_draws_and_quotes(folder: Path, command: Run) -> None:
    done = command("report", f"run={folder}", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "model.hidden" in done.stdout
    names = {path.name for path in (folder / "figures").glob("*.png")}
    assert names == {
        "heat_map.png",
        "learning_curves.png",
        "model_hidden_val_acc.png",
        "optimizer_lr_val_acc.png",
    }
    for name in names:
        assert f"(figures/{name})" in (folder / "report.md").read_text()
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}  # no outputs/
    for run, line in (("nowhere", "nowhere is not the folder of a sweep"), ("latest", "there is no sweep")):
        wrong = command("report", f"run={run}", cwd=folder)
        assert wrong.returncode == 1
        assert wrong.stderr.startswith(("latest: ", "nowhere is"))
        assert line in wrong.stderr


def test_tables_need_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mnist_lightning.sweeps.report import write_tables;"
        f"write_tables(Path({str(folder)!r}));"
        "print({'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_sweep_without_a_finished_job(folder: Path) -> None:
    for number in range(7):
        Status("failed", "broken", [f"seed={number}"]).write(folder / str(number))
    sweep = write_report(folder)
    assert not sweep.settings
    assert "## The winner" not in format_markdown(sweep)
    assert "8 jobs: 8 failed." in format_markdown(sweep)


def test_latest_is_the_newest(folder: Path, tmp_path: Path) -> None:
    assert find_sweep("latest", logs=tmp_path) == folder


def test_figures_show_the_numbers(folder: Path) -> None:
    sweep = read_sweep(folder)
    epochs, values = try_read_curves(sweep.jobs[0])["val/acc"]
    assert (epochs, values) == ([1, 2], [0.5, pytest.approx(0.902)])
    axes = figures.parameter("optimizer.lr", ["1e-4", "1e-2", "1e-2"], "val/acc", [0.9, 0.8, 0.7]).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_ydata() == pytest.approx([90, 80, 70])
    assert axes.lines[1].get_ydata() == pytest.approx([90, 75])  # medians
    words = figures.parameter("model.hidden", ["[64,32]", "128"], "val/loss", [0.2, 0.1]).axes[0]
    assert [tick.get_text() for tick in words.get_xticklabels()] == ["[64,32]", "128"]
    heat = figures.heat_map("a", ["1", "2", "1"], "b", ["x", "x", "y"], "val/acc", [0.1, 0.2, 0.3])
    grid = heat.axes[0].images[0].get_array()
    assert grid is not None
    assert grid[0].tolist() == pytest.approx([10, 30])
    assert np.isnan(grid.filled(np.nan)[1, 1])
    curves = figures.learning_curves("val/acc", [(str(n), [1, 2], [0.1, 0.2]) for n in range(9)])
    assert len(curves.axes[0].lines) == 9
    assert "3 more in grey" in curves.legends[0].get_title().get_text()


def test_status_of_runs_that_end_early(tmp_path: Path) -> None:
    with (
        pytest.raises(CommandError, match="ValueError: two lines") as raised,
        track(tmp_path, ["seed=1"], in_sweep=True),
    ):
        raise ValueError("two\nlines")
    cause = raised.value.__context__
    assert isinstance(cause, ValueError)
    assert cause.__traceback__ is None  # otherwise the run's tensors would stay in memory
    status = read(tmp_path)
    assert status is not None
    assert (status.state, status.error, status.overrides) == ("failed", "ValueError: two lines", ["seed=1"])
    assert describe(SystemExit("a line")) == ("failed", "a line")
    assert describe(SystemExit(3)) == ("failed", "something called sys.exit(3)")


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    Status(state="running").write(tmp_path)
    status = read(tmp_path)
    assert status is not None
    assert status.state == "interrupted"  # no process holds the folder
    with lock(tmp_path):
        status = read(tmp_path)
        assert status is not None
        assert status.state == "running"
        with pytest.raises(CommandError, match="another process"), lock(tmp_path):
            pass
