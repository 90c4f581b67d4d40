"""Tests of a report's page in a real browser, without a network."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Open, Run, check_nothing_leaves, few
from test_report import MULTIRUN, make_sweep

from mnist_lightning.cli import CommandError
from mnist_lightning.config import Report
from mnist_lightning.report import report
from mnist_lightning.rundir.index import list_runs, read_runs
from mnist_lightning.rundir.status import Status, read
from mnist_lightning.sweeps.page import make_page
from mnist_lightning.sweeps.report import compare_with_winner, summarize
from mnist_lightning.sweeps.results import Results, collect, read_sweep

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> $x$ {{7*7}} & \u202e"


def write_page(
    path: Path, results: Results, *, title: str = "A report", command: tuple[str, ...] = ()
) -> Path:
    path.write_bytes(make_page(results, title=title, command=command, data_dir=None, trust=None))
    return path


def read_data(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text.split('id="data">')[1].split("</script>")[0])
    return data


def change(job: Path, **values: Any) -> None:
    status = read(job)
    assert status is not None
    for name, value in values.items():
        setattr(status, name, value)
    status.write(job)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of seven completed jobs and a failed one, with curves of training and validation."""
    folder = make_sweep(tmp_path)
    for number in range(8):
        rows = [f"{epoch},{0.5 + 0.1 * epoch},{0.6 + 0.01 * epoch + 0.001 * number}" for epoch in (1, 2, 3)]
        (folder / str(number) / "csv" / "metrics.csv").write_text(
            "epoch,train/acc,val/acc\n" + "\n".join(rows)
        )
    return folder


def column(page: Any, section: str, number: int) -> list[str]:
    texts: list[str] = page.locator(f"#{section} tbody td:nth-child({number})").all_text_contents()
    return texts


def test_tables_say_what_the_report_says_and_sort(sweep: Path, tmp_path: Path, show: Open) -> None:
    results = read_sweep(sweep)
    page = show(write_page(tmp_path / "page.html", results, command=("-m", "model.hidden=16,32")))
    assert page.title() == "A report"
    assert "8 runs, 7 of them completed, 4 settings" in page.locator("#about").text_content()
    assert column(page, "settings", 4) == ["32", "32", "16", "16"]
    assert column(page, "settings", 2) == ["95.30 ± 0.14", "95.30", "90.40 ± 0.14", "90.30 ± 0.14"]
    assert column(page, "settings", 3)[0] == "the best"
    assert column(page, "settings", 3)[1].startswith("can't be told apart, p = ")
    assert column(page, "settings", 3)[3] == "worse, p < 0.001"
    page.get_by_role("button", name="optimizer.lr").first.click()
    assert column(page, "settings", 5) == ["0.001", "0.001", "0.01", "0.01"]
    page.get_by_role("button", name="optimizer.lr").first.click()
    assert column(page, "settings", 5) == ["0.01", "0.01", "0.001", "0.001"]
    assert page.locator("#settings th[aria-sort=descending]").count() == 1
    button = page.locator("#runs th button", has_text="val/acc")
    button.click()
    values = column(page, "runs", 3)
    assert values[-1] == "–", "what has no value comes last"
    assert values[:-1] == sorted(values[:-1])
    button.click()
    assert column(page, "runs", 3) == [*reversed(values[:-1]), "–"]
    assert "python -m mnist_lightning.train -m model.hidden=16,32" in page.locator("#commands").text_content()
    assert page.locator("#importance li").first.text_content().startswith("model.hidden")
    page.locator("#pairs select").first.select_option("model.hidden")
    page.locator("#pairs select").last.select_option("optimizer.lr")
    assert page.locator("#pairs td").all_text_contents() == ["90.30 %", "90.40 %", "95.30 %", "95.30 %"]


@pytest.mark.slow
def test_curves_and_dots_answer_a_pointer_and_keys(sweep: Path, tmp_path: Path, show: Open) -> None:
    page = show(write_page(tmp_path / "page.html", read_sweep(sweep)))
    assert page.locator("#curves .line.train").count() == page.locator("#curves .line.val").count() == 7
    tip, chart = page.locator("#tip"), page.locator("#curves svg")
    chart.focus()
    page.keyboard.press("ArrowRight")
    first = tip.text_content()
    assert re.fullmatch(
        r"model.hidden=32 .*\(4\)\nepoch 1: (validation 61.40 %|training 60.00 %|, ){3}", first
    )
    page.keyboard.press("ArrowRight")
    assert "epoch 2: " in tip.text_content()
    assert page.locator(".line.hot").count() == 2, "its two curves"
    chart.evaluate("chart => chart.blur()")
    assert tip.is_hidden()
    x, y = page.evaluate("lines.find(line => line.split === 'val' && line.run === 0).points[2]")
    chart.hover(position={"x": x, "y": y})
    assert tip.text_content().endswith("epoch 3: validation 63.00 %, training 80.00 %") or (
        "validation 63.00 %" in tip.text_content()
    )
    page.locator("#curves input[value=train]").uncheck()
    assert page.locator("#curves .line.train").count() == 0
    page.locator("#settings tbody tr").nth(3).click()
    assert page.locator("#curves .line.hot").count() == 2, "of the setting's two seeds"
    assert page.locator("#parameters .dot.hot").count() == 4
    page.locator("#settings tbody tr").nth(3).press("Enter")
    assert page.locator(".hot").count() == 0
    page.locator("#parameters .dot").first.hover()
    assert re.search(r"val/acc \d\d\.\d\d %$", tip.text_content())


def test_texts_of_runs_are_text(sweep: Path, tmp_path: Path, show: Open) -> None:
    """Texts in names of folders, settings, values, errors and the title are never read as markup."""
    for number in range(8):
        job = sweep / str(number)
        status = read(job)
        assert status is not None
        overrides = [*status.overrides, f"model.note={HOSTILE}{number % 2}"]
        change(
            job, overrides=overrides, metrics=status.metrics | {f"val/{HOSTILE}": 0.5, "epochs": float("nan")}
        )
    change(sweep / "7", error=HOSTILE)
    page = show(write_page(tmp_path / "page.html", read_sweep(sweep), title=HOSTILE, command=("-m", HOSTILE)))
    assert page.title() == HOSTILE.replace("\u202e", "\u202e")
    assert page.locator("img").count() == page.locator("script:not(#data)").count() - 1 == 0
    shown = HOSTILE.replace("\u202e", "\\u202e")
    assert shown in column(page, "runs", page.locator("#runs th").count())
    assert page.locator("#pairs option", has_text="model.note").count() == 2
    assert column(page, "settings", 6)[0].startswith(shown)


def test_nothing_leaves_the_page(sweep: Path, tmp_path: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(write_page(tmp_path / "page.html", read_sweep(sweep)).as_uri())
    check_nothing_leaves(page)


@pytest.mark.parametrize(("width", "theme"), few([(390, "light"), (768, "dark"), (1280, "light")], 3))
def test_it_fits_every_screen(width: int, theme: str, sweep: Path, tmp_path: Path, show: Open) -> None:
    page = show(write_page(tmp_path / "page.html", read_sweep(sweep)), width=width, theme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#curves svg").bounding_box()["width"] <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 600) == (theme == "light")


def test_a_hundred_runs_are_small(tmp_path: Path) -> None:
    """Each run has curves of 400 epochs."""
    sweep = tmp_path / "many"
    sweep.mkdir()
    (sweep / "multirun.yaml").write_text(MULTIRUN)
    rng = np.random.default_rng(0)
    rows = [",".join(map(repr, [epoch, *rng.random(4).tolist()])) for epoch in range(1, 401)]
    curves = "epoch,train/acc,train/loss,val/acc,val/loss\n" + "\n".join(rows)
    for number in range(100):
        job = sweep / str(number)
        (job / "csv").mkdir(parents=True)
        (job / "csv" / "metrics.csv").write_text(curves)
        overrides = [f"optimizer.lr={rng.random():.4g}", f"model.hidden={1 + number % 7}"]
        Status("completed", None, overrides, 1e9, 2.0, {"val/acc": float(rng.random())}).write(job)
    page = write_page(tmp_path / "page.html", read_sweep(sweep))
    assert page.stat().st_size < 2_000_000  # the limit is 6 MB with the pictures of three nets
    data = read_data(page)
    assert [len(data["runs"]), len(data["curves"]["acc"]), len(data["curves"]["acc"][0]["values"])] == [
        *(100, 200, 201)
    ]


@pytest.mark.slow
def test_the_best_nets_show_their_mistakes(
    trained_run: Path, tmp_path: Path, data_dir: Path, show: Open
) -> None:
    results = collect(read_runs([trained_run]))
    path = tmp_path / "page.html"
    content = make_page(results, title="one", command=[], data_dir=str(data_dir), trust=None)
    path.write_bytes(content)
    (net,) = read_data(path)["nets"]
    confusion = np.array(net["confusion"])
    status = read(trained_run)
    assert status is not None
    assert confusion.sum() == 5_000
    assert np.trace(confusion) / 5_000 == pytest.approx(status.metrics["val/acc"])
    assert all(one["label"] != one["answer"] for one in net["mistakes"])
    page = show(path)
    assert page.locator("#nets img").count() == 18
    assert page.evaluate("[...document.images].every(image => image.naturalWidth === 28)")
    assert len(content) < 200_000


def test_runs_from_anywhere_are_grouped_by_what_decides_their_weights(tmp_path: Path) -> None:
    """The runs are a sweep of two seeds, single runs, a repeated seed, a run with another default, and a clash."""

    def make(place: str, started: int, overrides: list[str], acc: float, **settings: Any) -> None:
        folder = tmp_path / "logs" / place
        folder.mkdir(parents=True)
        status = Status("completed", None, overrides, 1.77e9 + started, 2.0, {"val/acc": acc})
        status.monitor, status.mode = "val/acc", "max"
        status.write(folder)
        base = {"model.hidden": [256], "optimizer.lr": 0.004, "seed": 1, "data.val_size": 5000, "threads": 1}
        saved = {"choices": {"experiment": None, "optimizer": "adamw"}, "settings": base | settings}
        (folder / "settings.json").write_text(json.dumps(saved))
        np.save(folder / "val_correct.npy", np.packbits(np.arange(1000) < round(1000 * acc)))

    make("s/0", 1, ["seed=1"], 0.90)
    make("s/1", 2, ["seed=2"], 0.92, seed=2)
    (tmp_path / "logs" / "s" / "multirun.yaml").write_text(MULTIRUN)
    make("again", 3, ["seed=1", "threads=2"], 0.91, threads=2)
    make("wide", 4, ["model.hidden=512"], 0.95, **{"model.hidden": [512]})
    make(
        "other",
        5,
        ["model.hidden=512", "seed=2"],
        0.80,
        seed=2,
        **{"model.hidden": [512], "optimizer.lr": 0.1},
    )
    make("less", 6, ["model.hidden=1024"], 0.93, **{"model.hidden": [1024], "data.val_size": 1000})
    results = collect(list_runs(tmp_path / "logs"))
    told = {
        setting.jobs[0].changed: ([job.name for job in setting.jobs], setting.mean)
        for setting in results.settings
    }
    assert told == {
        "model.hidden=512 optimizer.lr=0.004": (["wide"], 0.95),
        "model.hidden=1024 optimizer.lr=0.004": (["less"], 0.93),
        "optimizer.lr=0.004": (["again", "s/1"], pytest.approx(0.915)),
        "model.hidden=512 optimizer.lr=0.1": (["other"], 0.80),
    }, "optimizer.lr was not typed, and yet sets two apart"
    p_values = compare_with_winner(results)
    assert p_values[1] is None, "other validation images"
    assert p_values[2] is not None
    assert p_values[2] < 0.05
    assert "worse, p < 0.001" in summarize(results)
    by_name = read_runs([tmp_path / "logs" / "wide", tmp_path / "logs" / "s" / "0"])
    assert [record["sweep"] for record in by_name] == [None, str(tmp_path / "logs" / "s")]


def test_the_command_writes_the_page(sweep: Path, tmp_path: Path, command: Run) -> None:
    done = command("report", f"run={sweep}", "html=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"written to .*report\.html \(\d+ kB\): open it in a browser, or send it", done.stdout)
    assert done.stdout.count("the page is without the mistakes of") == 3, (
        "none of these jobs has a checkpoint"
    )
    assert all("is not a run folder" in net["told"] for net in read_data(sweep / "report.html")["nets"])


def settle(**others: Any) -> Report:
    nothing = dict.fromkeys(("filter", "output", "data_dir", "trust"))
    return Report(**({"run": "latest", "runs": [], "under": "logs", "html": True} | nothing | others))


def test_runs_that_are_named_and_what_is_refused(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report(settle(runs=[str(sweep / "0"), str(sweep)], output="here.html"))
    assert len(read_data(tmp_path / "here.html")["runs"]) == 8, "each once"
    report(settle(under=str(sweep), filter="seed = 1", output="here.html"))  # it replaces its own page
    assert len(read_data(tmp_path / "here.html")["runs"]) == 4
    (tmp_path / "mine.html").write_text("<p>mine")
    inside = {"under": str(sweep)}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (
            {"run": "a", "filter": "seed=1"},
            "run and filter: each names what to report, give only one of them",
        ),
        ({"html": False, "output": "x.html"}, "output names the page's file: add html=true"),
        ({"output": "mine.html"}, "output=mine.html already exists, and mnist_lightning has not written it"),
        ({"output": str(sweep)}, "is a folder: name a file"),
        ({"runs": ["nowhere"]}, "nowhere is not a run folder: it has no status.json that can be read"),
        ({"filter": "hiden=3", **inside}, "filter: no run has a hiden; did you mean"),
        ({"filter": "seed > 7", **inside}, "filter: no run under"),
        ({"filter": "seed > 7", "under": "nowhere"}, "nowhere holds no runs: there is no such folder"),
    )
    for values, told in cases:
        with pytest.raises((CommandError, ValueError, OSError), match=re.escape(told)):
            report(settle(**values))
    assert (tmp_path / "mine.html").read_text() == "<p>mine"
