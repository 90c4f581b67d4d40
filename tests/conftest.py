"""What the tests share: real commands in folders of their own, and one home for the unpacked data."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict, read_write

from mnist_lightning.config import CONF_DIR, Train, check, register

REPOSITORY = Path(__file__).parent.parent

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of the subprocesses: a home of their own, so that the user's data folder is not touched."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HYDRA", "PL_", "COV"))}
    return kept | {"HOME": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Run:
    """``command("train", "model.hidden=64", cwd=folder)`` as a user types it."""

    def run(name: str, *arguments: str, cwd: Path, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", f"mnist_lightning.{name}", *arguments],
            cwd=cwd,
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def give_up_roots_rights() -> None:
    """For ``preexec_fn``: the command that follows must heed permissions, even when root runs it."""
    cap_dac_override, cap_dac_read_search, pr_capbset_drop = 1, 2, 24  # linux/capability.h, linux/prctl.h
    for capability in (cap_dac_override, cap_dac_read_search):
        ctypes.CDLL(None).prctl(pr_capbset_drop, capability, 0, 0, 0)


@dataclass
class DefaultRun:
    """``python -m mnist_lightning.train`` with nothing said."""

    folder: Path  # of the run
    logs: Path
    output: str
    errors: str
    returncode: int


@pytest.fixture(scope="session")
def default_run(command: Run, tmp_path_factory: pytest.TempPathFactory) -> DefaultRun:
    cwd = tmp_path_factory.mktemp("default")
    done = command("train", cwd=cwd)
    runs = list((cwd / "logs" / "train" / "runs").iterdir()) if (cwd / "logs").exists() else [cwd]
    return DefaultRun(runs[0], cwd / "logs", done.stdout, done.stderr, done.returncode)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST, unpacked once for the tests that train in this process."""
    return tmp_path_factory.mktemp("data")


def settle(run_dir: Path, *overrides: str) -> Train:
    """Checked settings of a run in ``run_dir``, composed as the command would."""
    register()
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    with read_write(cfg), open_dict(cfg):
        OmegaConf.update(cfg, "hydra.runtime.output_dir", str(run_dir))
    HydraConfig.instance().set_config(cfg)
    return check(cfg, Train)


@pytest.fixture
def fit(tmp_path: Path, data_dir: Path) -> Callable[..., dict[str, object]]:
    """``fit("model.hidden=64", folder="a")``: a run in this process; what its metrics.json holds."""
    from mnist_lightning.train import train

    def run(*overrides: str, folder: str = "run", test: bool = False) -> dict[str, object]:
        run_dir = tmp_path / folder
        run_dir.mkdir(exist_ok=True)
        settings = settle(run_dir, f"data.data_dir='{data_dir}'", *overrides)
        return dict(train(settings, run_dir, test=test))

    return run


@pytest.fixture(scope="session")
def trained_run(default_run: DefaultRun) -> Path:
    """The default run's folder, for the tests of what reads finished runs."""
    assert default_run.returncode == 0, default_run.errors
    return default_run.folder
