"""What is shipped, and who imports whom."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "mnist_lightning"
COMMANDS = {"train", "evaluate", "visualize", "predict", "compare", "export", "report"}
GROUND = {
    "config",
    "command",
    "files",
    "signals",
    "runs",
    "statistics",
    "status",
    "study",
    "sweep",
    "threads",
}  # import nothing heavy
# module -> the modules of ours that it may import, beside those on the ground
MAY_IMPORT = {
    "config": set(),
    "files": set(),
    "signals": set(),
    "command": set(),
    "runs": {"checkpoint"},
    "statistics": set(),
    "status": set(),
    "study": set(),
    "sweep": set(),
    "threads": set(),
    "resume": {"config"},
    "prepare": {"config", "resume"},
    "network": {"deform"},
    "averaging": set(),
    "data": {"deform"},
    "deform": set(),
    "loggers": set(),
    "pruning": set(),
    "checkpoint": set(),
    "callbacks": {"figures", "network"},
    "profiler": set(),
    "figures": set(),
    "scores": set(),
    "handwriting": set(),
    "pictures": {"figures", "loggers", "network", "scores"},
    "trained": {"checkpoint", "classifier", "data", "deform", "network"},
    "classifier": {"network"},
}


def imports(path: Path, *, at_top: bool = False) -> set[str]:
    """Names of the modules that a file imports; those at its top level only, or all."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_top else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "mnist_lightning":
            names |= {f"mnist_lightning.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports_point_one_way(module: str) -> None:
    ours = {
        name.split(".")[1]
        for name in imports(PACKAGE / f"{module}.py")
        if name.startswith("mnist_lightning.")
    }
    allowed = MAY_IMPORT[module] | (GROUND - {"config", module}) | {"__version__"}
    assert ours <= allowed


@pytest.mark.parametrize("module", sorted((GROUND | COMMANDS) & {path.stem for path in PACKAGE.glob("*.py")}))
def test_commands_import_nothing_heavy_at_the_top(module: str) -> None:
    heavy = {"torch", "lightning", "torchvision", "torchmetrics", "matplotlib", "tensorboard", "numpy"}
    assert not {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py", at_top=True)} & heavy


def test_only_the_edge_knows_the_config() -> None:
    knowing = {path.stem for path in PACKAGE.glob("*.py") if "mnist_lightning.config" in imports(path)}
    assert knowing <= COMMANDS | {"prepare", "resume"}


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


def test_wheel_runs_in_an_empty_folder(wheel: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """Unpacked and put first on the path, so that the checkout is not what runs."""
    installed, cwd = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(installed)
    cwd.mkdir()
    arguments = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "model.hidden=8")
    done = subprocess.run(
        [sys.executable, "-m", "mnist_lightning.train", *arguments],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    saved = next(cwd.glob("logs/train/runs/*/.hydra/hydra.yaml")).read_text()
    assert str(installed / "mnist_lightning" / "conf") in saved


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
