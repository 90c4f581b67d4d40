import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run

from mnist_lightning.compare import differing, judge, tabulate
from mnist_lightning.evaluation.scores import Evaluation, score
from mnist_lightning.rundir.checkpoint import load, serialize
from mnist_lightning.rundir.curves import read_curves


@pytest.fixture(scope="module")
def rivals(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The default run, and a copy of it without the outgoing weights of half of the hidden units."""
    worse = tmp_path_factory.mktemp("rivals") / "a (1)=b,é #x"
    shutil.copytree(trained_run, worse)
    path = worse / "checkpoints" / "best.ckpt"
    checkpoint = load(path)
    checkpoint["state_dict"]["net.layers.3.weight"][:, 128:] = 0
    path.write_bytes(serialize(checkpoint))
    config = worse / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("label_smoothing: 0.0", "label_smoothing: 0.1"))
    return [trained_run, worse]


def test_compare_tells_settings_metrics_curves_and_a_verdict(
    rivals: list[Path], tmp_path: Path, command: Run
) -> None:
    done = command("compare", f"runs=[{rivals[0]},{rivals[1]}]", "output=out, é", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads((tmp_path / "out, é" / "comparison.json").read_text())
    assert result["settings"] == {"loss.label_smoothing": {"A": 0.0, "B": 0.1}}
    test = result["mcnemar"]
    assert test["only_A_right"] > test["only_B_right"]
    assert test["p"] < 0.001
    assert test["sentence"].startswith(
        f"A is better than B: it is right on {test['only_A_right']} images where B"
    )
    assert test["sentence"] in done.stdout
    assert "label_smoothing" in done.stdout
    accuracy = json.loads((rivals[0] / "metrics.json").read_text())["val/acc"]
    assert result["metrics"]["val/acc"]["A"] == f"{100 * accuracy:.2f} %"
    assert "test/" not in done.stdout  # the test images are not used
    assert (tmp_path / "out, é" / "curves.png").stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["out, é"]


def test_a_net_equals_itself_and_the_test_split_has_its_price(
    trained_run: Path, tmp_path: Path, command: Run
) -> None:
    checkpoint = trained_run / "checkpoints" / "best.ckpt"
    done = command("compare", f"runs=[{trained_run},{checkpoint}]", "split=test", "output=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no setting differs" in done.stdout
    assert "No evidence of a difference: only A is right on 0 images, only B on 0, p = 1" in done.stdout
    assert "without bias" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs=[a]"], "runs must be at least 2 names, as in runs=[A,B], got ['a']"),
        (["runs=[a,b]"], "a is not a run folder: there is no such folder"),
        (["runs=[a,b]", "split=train"], "split must be one of val, test, got train"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, command: Run
) -> None:
    done = command("compare", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_nets_with_other_validation_images_are_not_compared(
    trained_run: Path, tmp_path: Path, command: Run
) -> None:
    checkpoint = load(trained_run / "checkpoints" / "best.ckpt")
    checkpoint["datamodule_hyper_parameters"]["split_seed"] = 7
    other = tmp_path / "other.ckpt"
    other.write_bytes(serialize(checkpoint))
    done = command("compare", f"runs=[{trained_run},{other}]", cwd=tmp_path)
    assert done.returncode != 0
    assert "have different val images" in done.stderr
    assert "split=test may work" in done.stderr


def evaluate(wrong: list[int]) -> Evaluation:
    """Return the evaluation of a net that misreads the given ones of 100 images."""
    labels = np.arange(100) % 10
    named = labels.copy()
    named[wrong] = (named[wrong] + 1) % 10
    certain = torch.nn.functional.one_hot(torch.from_numpy(named), 10).float()
    return score(labels, torch.log_softmax(20 * certain, dim=1).numpy())


def test_the_verdict_names_the_better_net() -> None:
    good, bad = evaluate(list(range(2))), evaluate(list(range(1, 14)))
    verdict = judge(bad, good)
    assert verdict["sentence"] == (
        "B is better than A: it is right on 12 images where A is wrong, and wrong on 1 where the other is right,"
        " p = 0.0034 (McNemar's exact test)."
    )
    assert judge(good, evaluate([4, 5]))["sentence"] == (
        "No evidence of a difference: only A is right on 2 images, only B on 2, p = 1 (McNemar's exact test)."
    )


def test_only_differences_are_shown() -> None:
    rows = differing([{"lr": 0.1, "seed": 1}, {"lr": 0.2, "seed": 1, "extra": [1]}])
    assert rows == {"lr": [0.1, 0.2], "extra": ["–", [1]]} | rows
    lines = tabulate(rows, ["A", "B"]).splitlines()
    assert [line.split() for line in lines] == [["A", "B"], ["extra", "–", "[1]"], ["lr", "0.1", "0.2"]]
    assert tabulate({}, ["A", "B"]) == ""


def test_curves_have_a_point_an_epoch(trained_run: Path, tmp_path: Path) -> None:
    epochs = json.loads((trained_run / "metrics.json").read_text())["epochs"]
    history = read_curves(trained_run)
    assert set(history) == {"train/loss", "val/loss", "train/acc", "val/acc"}
    assert all(x == list(range(1, epochs + 1)) for x, _ in history.values())
    assert read_curves(tmp_path) == {}
