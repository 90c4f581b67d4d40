"""Tests of the installed package."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, Run


def test_wheel_carries_configs_data_and_plugins(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {
        f"mnist_lightning/conf/{path.relative_to(REPOSITORY / 'conf')}"
        for path in REPOSITORY.glob("conf/**/*.yaml")
    }
    assert len(configs) > 20
    assert configs <= names
    assert (
        len(
            [
                name
                for name in names
                if name.startswith("mnist_lightning/datasets/mnist/") and name.endswith(".gz")
            ]
        )
        == 4
    )
    assert "hydra_plugins/mnist_lightning/grid_sweeper.py" in names
    page = {path.name for path in (REPOSITORY / "mnist_lightning" / "page").iterdir() if path.is_file()}
    assert {"page.html", "page.css", "core.js", "net.js", "page.js", "film.js"} <= page
    assert {f"mnist_lightning/page/{name}" for name in page} <= names
    assert "hydra_plugins/__init__.py" not in names, "a namespace package has none"
    assert not [name for name in names if name.startswith(("tests/", "logs/", "benchmarks/"))]


def test_wheel_runs_in_an_empty_folder(installed: Path, tmp_path: Path, command: Run) -> None:
    cwd = tmp_path / "empty"
    cwd.mkdir()
    arguments = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "model.hidden=8")
    done = command("train", *arguments, cwd=cwd, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    saved = next(cwd.glob("logs/train/runs/*/.hydra/hydra.yaml")).read_text()
    assert str(installed / "mnist_lightning" / "conf") in saved


@pytest.mark.slow
def test_python_and_its_page_from_a_wheel(installed: Path, tmp_path: Path, python: Run) -> None:
    """The examples in docs/python.md work: a run, a trained net and its scores."""
    page = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)[:3]
    (tmp_path / "page.py").write_text("\n".join([*blocks, "print(train.__file__)"]))
    done = python("page.py", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(installed / "mnist_lightning" / "train.py")


def test_checkout_runs_without_being_installed(tmp_path: Path, environment: dict[str, str]) -> None:
    """-S -s would also hide the dependencies, so the checkout is named and must come first."""
    done = subprocess.run(
        [sys.executable, "-c", "import mnist_lightning.config as c; print(c.CONF_DIR)"],
        cwd=REPOSITORY,
        env={key: value for key, value in environment.items() if key != "PYTHONPATH"} | {"PWD": os.curdir},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(REPOSITORY / "conf")
