"""Tests of the table of all runs: its content, filters, averages and deletions, and its index."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import NO_PICTURES, Run, Start

from mnist_lightning import list_runs
from mnist_lightning.cli import CommandError
from mnist_lightning.config import Runs
from mnist_lightning.rundir.index import INDEX, read_value
from mnist_lightning.rundir.record import find_changes, write_patch
from mnist_lightning.rundir.records import average, find_keys, read_filter
from mnist_lightning.rundir.status import Status, lock
from mnist_lightning.runs import delete, put_rare_first, shorten, show, sort

SHORT = (
    *("trainer.max_epochs=1", "+trainer.limit_train_batches=2", NO_PICTURES),
    *("++trainer.limit_val_batches=2", "++trainer.limit_test_batches=2"),
)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder with four single runs, one of them failed, and a sweep of two seeds."""
    base = {"model.hidden": [256], "optimizer.lr": 0.004, "seed": 1, "data.path": None}

    def make(place: str, started: int, overrides: list[str], acc: float | None, **settings: Any) -> None:
        folder = tmp_path / "logs" / "train" / place
        folder.mkdir(parents=True)
        status = Status("completed", None, overrides, 1.77e9 + started, 2.0 + started)
        if acc is None:
            status.state, status.error = "failed", "loss is nan \x1b[31m<b>"
        else:
            status.metrics = {"val/acc": acc, "test/acc": acc - 0.01, "epochs": 8}
        status.write(folder)
        saved = {"choices": {"optimizer": "adamw", "experiment": None}, "settings": base | settings}
        (folder / "settings.json").write_text(json.dumps(saved))

    make("runs/a", 1, [], 0.975)
    make("runs/b", 2, ["model.hidden=[128,64]", "seed=1"], 0.97, **{"model.hidden": [128, 64]})
    make("runs/c", 3, ["optimizer.lr=1e3"], None, **{"optimizer.lr": 1e3})
    make("runs/d", 4, ["seed=1", "model.hidden=256", "data.data_dir=/x"], 0.977)
    make("multiruns/s/0", 5, ["seed=2"], 0.979, seed=2)
    make("multiruns/s/1", 6, ["seed=3"], 0.981, seed=3)
    multirun = "hydra: {overrides: {task: ['seed=2,3'], hydra: []}, sweeper: {params: null}}\nmonitor: {metric: val/acc}\n"
    (tmp_path / "logs" / "train" / "multiruns" / "s" / "multirun.yaml").write_text(multirun)
    return tmp_path / "logs"


def settle(under: Path, **others: Any) -> Runs:
    columns = ["run", "changed", "seed", "val/acc", "state"]
    values = {"filter": None, "sort": "-when", "columns": columns, "average": None, "csv": None}
    return Runs(**({"under": str(under), "delete": [], "yes": False} | values | others))


def names(logs: Path, text: str) -> list[str]:
    records = list_runs(logs)
    conditions = read_filter(text, find_keys(records))
    return sorted(Path(r["run"]).name for r in records if all(holds(r) for holds in conditions))


def test_records_are_plain_and_complete(logs: Path) -> None:
    records = list_runs(logs)
    assert [Path(record["run"]).name for record in records] == ["1", "0", "d", "c", "b", "a"]
    assert len({tuple(record) for record in records}) == 1, "the same keys in the same order"
    failed = records[3]
    assert (failed["state"], failed["val/acc"], failed["optimizer.lr"]) == ("failed", None, 1000.0)
    assert records[0]["sweep"] == str(logs / "train" / "multiruns" / "s")
    assert records[5]["sweep"] is None
    json.dumps(records)


def test_changed_is_told_against_the_defaults(logs: Path) -> None:
    changed = {Path(record["run"]).name: record["changed"] for record in list_runs(logs)}
    assert changed == {
        **{"a": "", "b": "model.hidden=[128,64]", "c": "optimizer.lr=1e3"},
        **{"d": "", "0": "", "1": ""},  # 256 is [256], the default
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("val/acc > 0.975", ["0", "1", "d"]),
        ("val/acc>=0.975 model.hidden=[256]", ["0", "1", "a", "d"]),
        ("model.hidden = 256 and seed < 2 and state = completed", ["a", "d"]),
        ("model.hidden = [128, 64]", ["b"]),
        ("optimizer.lr = 1e3", ["c"]),
        ("state != completed", ["c"]),
        ("error = 'loss is nan \x1b[31m<b>'", ["c"]),
        ("val/acc = null", ["c"]),
        ("optimizer = adamw and val/acc < 0.975", ["b"]),
        ("state > 3", []),
        ("when > 2026-02-02 and seed != 1", ["0", "1"]),
        ("when > 2030", []),
        ("seed = true", []),  # true does not equal 1
    ],
)
def test_filter(logs: Path, text: str, found: list[str]) -> None:
    assert names(logs, text) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hiden = 3", "did you mean model.hidden?"),
        ("val/ac > 0.9", "did you mean val/acc?"),
        ("val/acc >", "can't be read at 'val/acc >'"),
        ("and val/acc > 0.9", "can't be read"),
        ("val/acc > 0.9 or seed = 1", "can't be read at 'or seed = 1'"),
        ("__import__('os').system('x') = 1", "can't be read|no run has"),
    ],
)
def test_filter_that_is_none_is_told(logs: Path, text: str, told: str) -> None:
    with pytest.raises(CommandError, match=re.escape(told) if "|" not in told else told):
        names(logs, text)


def test_values_are_read_as_yaml() -> None:
    read = [
        read_value(text)
        for text in ("1e-3", ".5", "07", "null", "true", "[1, a]", "a: b", "2026-01-02", "mlp")
    ]
    assert read[:2] == [0.001, 0.5]
    assert read[3:6] == [None, True, [1, "a"]]
    assert read[6:] == ["a: b", "2026-01-02", "mlp"] or read[7:] == ["2026-01-02", "mlp"]
    assert read_value("!!python/object/apply:os.system ['x']") == "!!python/object/apply:os.system ['x']"


def test_average_counts_each_seed_once_in_sweeps_and_single_runs(logs: Path) -> None:
    first, second = average(list_runs(logs))
    assert (first["n"], first["model.hidden"]) == (3, [256])  # of the runs with seed 1, the newest, d, counts
    assert first["val/acc"] == pytest.approx((0.977 + 0.979 + 0.981) / 3)
    assert first["val/acc sd"] == pytest.approx(0.002)
    assert (second["n"], second["val/acc sd"]) == (1, None)


def test_sort_puts_what_has_no_value_last(logs: Path) -> None:
    records = list_runs(logs)
    for key, ends in (("val/acc", ("b", "c")), ("-val/acc", ("1", "c"))):
        ordered = [Path(r["run"]).name for r in sort(records, key, find_keys(records))]
        assert (ordered[0], ordered[-1]) == ends


def test_table_and_csv(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(settle(logs, columns=["run", "error", "val/acc", "state"]))
    printed = capsys.readouterr().out
    assert "98.10 %" in printed
    assert "\x1b" not in printed, "a run's error can't act on the terminal"
    assert r"loss is nan \x1b[31m<b>" in printed
    assert printed.rstrip().endswith("6 runs: 5 completed, 1 failed")
    path = tmp_path / "runs.csv"
    show(settle(logs, csv=str(path), average="seed"))
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert float(rows[0]["val/acc sd"]) == pytest.approx(0.002)
    show(settle(logs, csv=str(path)))  # it replaces its own file
    assert len(path.read_text().splitlines()) == 7
    (tmp_path / "mine.csv").write_text("a,b\n")
    with pytest.raises(CommandError, match="is no table of runs"):
        show(settle(logs, csv=str(tmp_path / "mine.csv")))
    assert (tmp_path / "mine.csv").read_text() == "a,b\n"


def test_index_is_used_and_kept_up_to_date(logs: Path) -> None:
    before = list_runs(logs)
    content = json.loads((logs / INDEX).read_text())
    content["runs"]["train/runs/a"]["metrics"]["val/acc"] = 0.5
    (logs / INDEX).write_text(json.dumps(content))
    assert list_runs(logs)[-1]["val/acc"] == 0.5, "nothing was read anew"
    status = Status("completed", None, [], 1.77e9 + 1, 3.0, {"val/acc": 0.6})
    status.write(logs / "train" / "runs" / "a")
    assert list_runs(logs)[-1]["val/acc"] == 0.6
    shutil.rmtree(logs / "train" / "runs" / "a")
    assert list_runs(logs) == before[:-1]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"version": 1, "base": {}, "runs": []}', "[" * 100_000, "\0\xff",
     '{"version": 1, "base": {}, "runs": {"train/runs/a": 3}}', '{"version": 99, "base": {}, "runs": {}}',
     '{"version": 1, "base": {}, "runs": {"train/runs/a": {"state": "completed", "metrics": 3}}}'],
)  # fmt: skip
def test_damaged_index_is_built_anew(logs: Path, content: str) -> None:
    before = list_runs(logs)
    (logs / INDEX).write_text(content)
    assert list_runs(logs) == before
    assert json.loads((logs / INDEX).read_text())["version"] == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_hostile_and_damaged_runs_cost_themselves(logs: Path, tmp_path: Path) -> None:
    runs = logs / "train" / "runs"
    for name, content in (("x", "{"), ("y", "[]"), ("z", '{"state": "odd"}'), ("deep", "[" * 100_000)):
        (runs / name).mkdir()
        (runs / name / "status.json").write_text(content)
    (runs / "odd").mkdir()
    odd = {"state": "failed", "overrides": 3, "metrics": [1], "started": 1e300, "seconds": "x", "error": 4}
    (runs / "odd" / "status.json").write_text(json.dumps(odd))
    (runs / "pipe").mkdir()
    os.mkfifo(runs / "pipe" / "status.json")
    (tmp_path / "elsewhere").mkdir()
    Status("completed", None, [], 1.0, 1.0).write(tmp_path / "elsewhere")
    (runs / "link").symlink_to(tmp_path / "elsewhere")
    (runs / "loop").symlink_to(logs)
    found = {Path(record["run"]).name: record for record in list_runs(logs)}
    assert set(found) == {"a", "b", "c", "d", "0", "1", "odd"}
    assert (found["odd"]["when"], found["odd"]["seconds"], found["odd"]["changed"]) == (None, 0.0, "")


def test_folder_that_can_not_be_written_is_still_read(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list_runs(logs)
    (logs / INDEX).unlink()
    (logs / INDEX).mkdir()  # a folder in the place of the index
    assert list_runs(logs) == before


def test_several_commands_at_once_and_a_killed_write(logs: Path) -> None:
    before = list_runs(logs)
    half = logs / f".writing-{INDEX}-12345"
    half.write_text('{"version": 1, "ba')
    os.utime(half, (0, 0))

    def look(number: int) -> bool:
        with contextlib.suppress(OSError):
            (logs / INDEX).unlink()
        return list_runs(logs) == before

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(40)))
    assert list_runs(logs) == before
    assert json.loads((logs / INDEX).read_text())["version"] == 1
    assert not half.exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions of POSIX")
def test_read_only_logs(logs: Path, start: Start) -> None:
    logs.chmod(0o555)
    try:
        done = start("runs", cwd=logs.parent, heed_permissions=True).finish()
    finally:
        logs.chmod(0o755)
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 runs: 5 completed, 1 failed" in done.stdout
    assert "the index can't be written" in done.stdout
    assert not (logs / INDEX).exists()


def test_delete(logs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = logs / "train" / "runs"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # not a terminal
    with pytest.raises(CommandError, match="confirm with yes=true"):
        delete([str(runs / "a")], logs, yes=False)
    (runs / "link").symlink_to(runs / "a")
    (runs / "b" / "notes.txt").write_text("mine")
    for name, told in (
        ("link", "lies behind, a link"),
        ("b", "holds files that no run writes \\(notes.txt\\)"),
        ("nowhere", "is no run"),
        ("..", "is no run"),
        ("../../..", "is no run"),
    ):
        with pytest.raises(CommandError, match=told):
            delete([str(runs / "a"), str(runs / name)], logs, yes=True)
    assert {path.name for path in runs.iterdir()} == {"a", "b", "c", "d", "link"}, "nothing is deleted"
    (runs / "link").unlink()
    delete([str(runs / "a"), str(runs / "c")], logs, yes=True)
    assert {path.name for path in runs.iterdir()} == {"b", "d"}
    assert "2 deleted" in capsys.readouterr().out


def test_delete_leaves_what_is_under_way(logs: Path) -> None:
    run, sweep = logs / "train" / "runs" / "a", logs / "train" / "multiruns" / "s"
    Status("running").write(run)
    with lock(run), pytest.raises(CommandError, match="a is running"):
        delete([str(run)], logs, yes=True)
    with lock(sweep), pytest.raises(CommandError, match="sweep that is not finished"):
        delete([str(sweep / "0")], logs, yes=True)
    shutil.rmtree(sweep / "1")  # a job that has not started
    with pytest.raises(CommandError, match="not finished: 1 of 2 jobs"):
        delete([str(sweep / "0")], logs, yes=True)
    (sweep / "1").mkdir()
    Status("interrupted").write(sweep / "1")
    with pytest.raises(CommandError, match="not finished: 1 of 2 jobs"):
        delete([str(sweep / "0")], logs, yes=True)
    Status("failed").write(sweep / "1")
    delete([str(sweep / "0"), str(run)], logs, yes=True)
    assert not (sweep / INDEX).exists()
    assert not (sweep / "0").exists()
    assert not run.exists()


def test_where_room_is_short_what_sets_runs_apart_comes_first() -> None:
    changes = [
        "trainer.max_epochs=2 model.hidden=[64, 32] seed=1",
        "trainer.max_epochs=2 model.hidden=8 seed=1",
    ]
    first, second = put_rare_first(changes)
    assert first == "model.hidden=[64, 32] trainer.max_epochs=2 seed=1"
    assert shorten(changes[0], first, 16) == "model.hidden=[6…"
    assert shorten("default", "default", 16) == "default"
    assert second.startswith("model.hidden=8 ")


def test_command(logs: Path, command: Run) -> None:
    cwd = logs.parent
    done = command("runs", "filter=val/acc > 0.97 and model.hidden = [256]", "average=seed", cwd=cwd)
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.split() == ["n", "when", "changed", "val/acc", "test/acc", "epochs", "seconds"]
    assert "97.90 ± 0.20 %" in row
    for arguments, told in (
        (["filter=hiden = 3"], "filter: no run has a hiden; did you mean model.hidden?"),
        (["sort=lr"], "sort: no run has a lr; did you mean optimizer.lr?"),
        (["under=nowhere"], "nowhere holds no runs: there is no such folder"),
        (["average=fold"], "average must be one of seed, got fold"),
        (["delete=logs/train/runs/a"], "delete: 1 run would be deleted: confirm with yes=true"),
    ):
        wrong = command("runs", *arguments, cwd=cwd)
        assert (wrong.returncode, wrong.stderr.strip()) == (1, told)
    assert (logs / "train" / "runs" / "a").is_dir()
    done = command("runs", "delete=logs/train/runs/a", "yes=true", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert not (logs / "train" / "runs" / "a").exists()


def test_a_run_is_repeated_and_its_weights_compared(tmp_path: Path, command: Run) -> None:
    done = command("train", *SHORT, "hydra.run.dir=A", "optimizer=sgd", "model.hidden=16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = command("train", "reproduce=A", "hydra.run.dir=logs/B", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert " was " not in again.stdout  # neither the commit nor versions have changed
    assert f"the weights came out equal to the bit to those of {tmp_path / 'A'}" in again.stdout
    first, second = (json.loads((tmp_path / name / "settings.json").read_text()) for name in ("A", "logs/B"))
    assert first["settings"] | {"reproduce": str(tmp_path / "A")} == second["settings"]
    assert first["choices"]["optimizer"] == "sgd"
    (record,) = list_runs(tmp_path / "logs")
    assert record["changed"].endswith("optimizer=sgd model.hidden=16")
    metrics = json.loads((tmp_path / "A" / "metrics.json").read_text())
    (tmp_path / "A" / "metrics.json").write_text(json.dumps(metrics | {"torch": "1.0"}))
    shutil.copy(tmp_path / "A" / "checkpoints" / "last.ckpt", tmp_path / "kept.ckpt")
    other = command(
        "train", *SHORT, "hydra.run.dir=C", "optimizer=sgd", "model.hidden=16", "seed=2", cwd=tmp_path
    )
    assert other.returncode == 0, other.stderr
    shutil.copy(tmp_path / "C" / "checkpoints" / "last.ckpt", tmp_path / "A" / "checkpoints" / "last.ckpt")
    different = command("train", "reproduce=A", cwd=tmp_path)
    assert "torch was 1.0, is" in different.stdout
    assert re.search(r"the weights came out different: 4 of 4 tensors, by up to 0", different.stdout)
    for argument, told in (
        ("model.hidden=3", "model.hidden can't be given with it"),
        ("resume=A", "give no resume= and no -m with it"),
        ("-m", "give no resume= and no -m with it"),
    ):
        wrong = command("train", "reproduce=A", argument, cwd=tmp_path)
        assert wrong.returncode == 1
        assert told in wrong.stderr
    wrong = command("train", "reproduce=nowhere", cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr) == (1, "nowhere is not a run folder: there is no such folder\n")


def test_a_patch_holds_what_no_commit_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nets_of_mine.py").write_text("answer = 42\n")
    write_patch(tmp_path, ["nets_of_mine", "no_such_module"], package=False)
    assert "+answer = 42" in (tmp_path / "code.patch").read_text()
    (tmp_path / "code.patch").unlink()
    (tmp_path / "nets_of_mine.py").write_text("x = 1\n" * 200_000)
    write_patch(tmp_path, ["nets_of_mine"], package=False)
    assert not (tmp_path / "code.patch").exists()
    assert "leaves out nets_of_mine.py" in caplog.text
    assert list(find_changes(tmp_path / "nowhere")) == []
