"""Nothing of this project needs what only POSIX systems have: a simulation, on a system that has it."""

import json
from pathlib import Path

import pytest
from conftest import Run

# Run before anything of this project, whose modules, and they alone, see a system without these.
SITE = """
import builtins, os, signal, sys, types
ABSENT = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
LESS = {
    "os": {"fork", "register_at_fork", "getppid", "setpgid", "killpg", "sched_getaffinity", "getuid"},
    "signal": {"SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "pthread_kill", "alarm"},
}
everything = builtins.__import__


def without(module, names):
    less = types.ModuleType(module.__name__)
    less.__dict__.update({key: value for key, value in vars(module).items() if key not in names})
    return less


seen = {name: without(everything(name), names) for name, names in LESS.items()}


def importing(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if (globals or {}).get("__spec__") is not None and importer == "__main__":
        importer = globals["__spec__"].name
    if importer.startswith(("mnist_lightning", "hydra_plugins.mnist_lightning")):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in LESS:
            return seen[name]
    return everything(name, globals, locals, fromlist, level)


builtins.__import__ = importing
"""
SHORT = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "model.hidden=8")


TRAIN = (
    SITE
    + """
import runpy
runpy.run_module("mnist_lightning.train", run_name="__main__", alter_sys=True)
"""
)


def test_the_simulation_simulates(python: Run, tmp_path: Path) -> None:
    code = "import mnist_lightning.threads as t; print(hasattr(t.os, 'fork')); import os; print(hasattr(os, 'fork'))"
    done = python("-c", f"{SITE}\n{code}", cwd=tmp_path)
    assert done.stdout == "False\nTrue\n", done.stderr


RUN = ((*SHORT, "hydra.run.dir=run", "scheduler=none"), ("resume=run", "trainer.max_epochs=2"))
SWEEP = (("-m", "seed=1,2", *SHORT, "hydra.sweep.dir=sweep"), ("-m", "resume=sweep"))


@pytest.mark.parametrize("commands", [RUN, pytest.param(SWEEP, marks=pytest.mark.slow)], ids=["run", "sweep"])
def test_a_run_a_sweep_and_their_resumption_need_no_posix(
    commands: tuple[tuple[str, ...], ...], python: Run, tmp_path: Path
) -> None:
    for arguments in commands:
        done = python("-c", TRAIN, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "plugin" not in done.stderr, "Hydra tells of plugins that can't be imported"
    if commands == RUN:
        assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 2
        return
    states = [json.loads((tmp_path / "sweep" / job / "status.json").read_text())["state"] for job in "01"]
    assert states == ["completed", "completed"]
