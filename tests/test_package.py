"""What is shipped, and who imports whom."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY, Run, Start
from PIL import Image
from processes import wait_for


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(folder),
            str(REPOSITORY),
        ],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


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
    assert "hydra_plugins/__init__.py" not in names, "a namespace package has none"
    assert not [name for name in names if name.startswith(("tests/", "logs/", "benchmarks/"))]


def test_wheel_runs_in_an_empty_folder(wheel: Path, tmp_path: Path, command: Run) -> None:
    """Unpacked and put first on the path, so that the checkout is not what runs."""
    installed, cwd = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(installed)
    cwd.mkdir()
    arguments = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "model.hidden=8")
    done = command("train", *arguments, cwd=cwd, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    saved = next(cwd.glob("logs/train/runs/*/.hydra/hydra.yaml")).read_text()
    assert str(installed / "mnist_lightning" / "conf") in saved


@pytest.mark.slow
def test_a_net_and_data_of_ones_own_run_from_a_wheel(
    wheel: Path, tmp_path: Path, command: Run, start: Start
) -> None:
    """Trained, killed, gone on with, evaluated, compared, exported and swept, with nothing but its module and its YAML files around."""
    installed, cwd = tmp_path / "installed", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(installed)
    shutil.copytree(REPOSITORY / "tests" / "own", cwd)
    for name, grey in (("dark", 60), ("light", 180)):
        (cwd / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (6, 5), (grey + number, grey, 0)).save(cwd / "pictures" / name / f"{number}.png")
    chosen = ("--config-dir", "my_conf", "model=cnn", "loss=focal", "scheduler=none")
    short = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "test=false")
    endless = [one.replace("max_epochs=1", "max_epochs=60") for one in short]
    killed = start(
        *("train", *chosen, *endless, "hydra.run.dir=killed", "logger=none"),
        cwd=cwd,
        PYTHONPATH=str(installed),
    )
    wait_for(lambda: (cwd / "killed" / "checkpoints" / "last.ckpt").exists(), killed)
    killed.kill()
    killed.wait()
    for name, *arguments in (
        ("train", "resume=killed", "trust=my_parts"),
        ("train", *chosen, *short, "hydra.run.dir=run"),
        ("train", "resume=run", "trainer.max_epochs=2", "trust=my_parts"),
        ("evaluate", "run=run", "split=val", "trust=my_parts"),
        ("compare", "runs=[run,killed]", "split=val", "trust=my_parts"),
        ("export", "run=run", "trust=my_parts"),
        ("train", "-m", *chosen, *short, "model.channels=2,3", "hydra.sweep.dir=sweep"),
        ("report", "run=sweep"),
        ("train", "--config-dir", "my_conf", "data=columns", "trainer.max_epochs=1", "hydra.run.dir=columns"),
        ("evaluate", "run=columns", "trust=my_data"),
        ("train", "data=folder", "data.path=pictures", "data.batch_size=4", "hydra.run.dir=pictured"),
        ("predict", "run=pictured", "images=pictures/dark", "output=predicted"),
        ("visualize", "data=folder", "data.path=pictures", "data.batch_size=4"),
    ):
        done = command(name, *arguments, cwd=cwd, PYTHONPATH=str(installed))
        assert done.returncode == 0, done.stderr
    assert str(installed / "mnist_lightning" / "conf") in (cwd / "run" / ".hydra" / "hydra.yaml").read_text()


@pytest.mark.slow
def test_python_and_its_page_from_a_wheel(wheel: Path, tmp_path: Path, python: Run) -> None:
    """A run, a trained net and its scores, as docs/python.md has them."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    page = (REPOSITORY / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)[:3]
    (tmp_path / "page.py").write_text("\n".join([*blocks, "print(train.__file__)"]))
    done = python("page.py", cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "installed" / "mnist_lightning" / "train.py")


def test_checkout_runs_without_being_installed(tmp_path: Path, environment: dict[str, str]) -> None:
    """-S -s would hide the dependencies too, so the checkout is named and must win."""
    done = subprocess.run(
        [sys.executable, "-c", "import mnist_lightning.config as c; print(c.CONF_DIR)"],
        cwd=REPOSITORY,
        env={key: value for key, value in environment.items() if key != "PYTHONPATH"} | {"PWD": os.curdir},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(REPOSITORY / "conf")
