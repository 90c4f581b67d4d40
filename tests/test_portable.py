"""Nothing of this project needs functions that only POSIX systems have; the tests hide them."""

import ast
import contextlib
import json
import ntpath
import os
import posixpath
import signal
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, Run
from PIL import Image, ImageDraw
from processes import Fresh, wait_for
from test_sweeps import find_children, wait_until_gone

from mnist_lightning.rundir import atomic
from mnist_lightning.rundir.checkpoint import load
from mnist_lightning.rundir.outside import as_command, as_word
from mnist_lightning.sweeps.results import shorten

# Code to run before this project is imported: only the project's modules see a system without these.
SITE = """
import builtins, os, signal, sys, types
ABSENT = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"}
LESS = {
    "os": {"fork", "register_at_fork", "getppid", "setpgid", "killpg", "sched_getaffinity", "getuid", "symlink"},
    "signal": {"SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "pthread_kill", "alarm"},
}
everything = builtins.__import__


def without(module, names):
    less = types.ModuleType(module.__name__)
    less.__dict__.update({key: value for key, value in vars(module).items() if key not in names})
    return less


seen = {name: without(everything(name), names) for name, names in LESS.items()}
seen["os"].name = "nt"
renamed = []


def replace(source, target):
    "Each third time another program, one that looks for viruses, has the file open."
    renamed.append(target)
    if len(renamed) % 3 == 1:
        error = PermissionError(13, "Permission denied", str(target))
        error.winerror = 32
        raise error
    os.replace(source, target)


seen["os"].replace = replace


def open_file(path, *arguments):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return os.open(path, *arguments)


seen["os"].open = open_file


def importing(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if (globals or {}).get("__spec__") is not None and importer == "__main__":
        importer = globals["__spec__"].name
    if importer.startswith(("mnist_lightning", "hydra_plugins.mnist_lightning", "optuna.storages.journal")):
        if name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in LESS:
            return seen[name]
    return everything(name, globals, locals, fromlist, level)


builtins.__import__ = importing
"""
SHORT = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5", "model.hidden=8")
ASCII = """
import sys
sys.stdout.reconfigure(encoding="ascii", errors="strict")
sys.stderr.reconfigure(encoding="ascii", errors="backslashreplace")
"""  # as PYTHONIOENCODING=ascii does in a new interpreter


def simulate(name: str) -> str:
    return f"""{SITE}
import runpy
runpy.run_module("mnist_lightning.{name}", run_name="__main__", alter_sys=True)
"""


def test_the_simulation_simulates(python: Run, tmp_path: Path) -> None:
    code = """
import mnist_lightning.threads as t, os
print(hasattr(t.os, "fork"), hasattr(os, "fork"))
from mnist_lightning.rundir.outside import Path, read_file
try:
    read_file(Path("."))
except OSError as error:
    print(error)
"""
    done = python("-c", f"{SITE}\n{code}", cwd=tmp_path)
    assert done.stdout == "False True\n. is not a file\n", done.stderr


# with the quotes that cmd.exe passes on to programs
RUN = ((*SHORT, "hydra.run.dir='a run'", "scheduler=none"), ("resume='a run'", "trainer.max_epochs=2"))
SWEEP = (
    ("-m", "seed=1,2", *SHORT, "hydra.sweep.dir='a (sweep)'"),
    ("-m", "resume='a (sweep)'"),
)


@pytest.mark.parametrize("commands", [RUN, pytest.param(SWEEP, marks=pytest.mark.slow)], ids=["run", "sweep"])
def test_a_run_a_sweep_and_their_resumption_need_no_posix(
    commands: tuple[tuple[str, ...], ...], python: Run, tmp_path: Path
) -> None:
    for arguments in commands:
        done = python("-c", simulate("train"), *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "plugin" not in done.stderr, "Hydra tells of plugins that can't be imported"
    if commands == RUN:
        assert json.loads((tmp_path / "a run" / "metrics.json").read_text())["epochs"] == 2
        assert 'mnist_lightning.export format=html run="a run"   # a page' in done.stdout
        return
    states = [json.loads((tmp_path / "a (sweep)" / job / "status.json").read_text())["state"] for job in "01"]
    assert states == ["completed", "completed"]


@pytest.fixture
def elsewhere(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Environment variables of processes that see such a system, and that pass them on to their children."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    return environment | {"PYTHONPATH": str(tmp_path / "site")}


SWEPT = ("-m", *SHORT, "seed=1,2", "logger=none", "hydra/launcher=processes", "hydra.launcher.n_jobs=2")


@pytest.mark.slow
def test_jobs_run_side_by_side_without_fork(elsewhere: dict[str, str], command: Run, tmp_path: Path) -> None:
    """Jobs run in new processes; their weights equal those of jobs one after the other."""
    module = ("-m", "mnist_lightning.train")
    done = Fresh(*module, *SWEPT, "hydra.sweep.dir=anew", cwd=tmp_path, env=elsewhere).finish()
    assert done.returncode == 0, done.stderr
    assert "2 jobs, 2 at a time" in done.stdout
    assert "plugin" not in done.stderr
    basic = [one for one in SWEPT if "launcher" not in one]
    done = command("train", *basic, "hydra/launcher=basic", "hydra.sweep.dir=basic", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for job in "01":
        nets = [
            load(tmp_path / sweep / job / "checkpoints" / "last.ckpt")["state_dict"]
            for sweep in ("anew", "basic")
        ]
        assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert "epoch 1/1" in (tmp_path / "anew" / "0" / "output.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_workers_without_fork_save_and_leave(
    how: str, elsewhere: dict[str, str], command: Run, tmp_path: Path
) -> None:
    """Workers do so on Ctrl-C, which reaches all processes of a console, and when their parent is gone."""
    long = [one.replace("max_epochs=1", "max_epochs=4000") for one in SWEPT]
    sweeping = Fresh(
        "-m", "mnist_lightning.train", *long, "hydra.sweep.dir=sweep", cwd=tmp_path, env=elsewhere
    )
    saved = [tmp_path / "sweep" / job / "checkpoints" / "last.ckpt" for job in "01"]
    wait_for(lambda: all(path.exists() for path in saved), sweeping)
    children = find_children(sweeping.pid)
    assert len(children) >= 2
    for process in [*children, sweeping.pid] if how == "SIGINT" else [sweeping.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, getattr(signal, how))
    sweeping.communicate()
    wait_until_gone(children)
    states = [json.loads((tmp_path / "sweep" / job / "status.json").read_text())["state"] for job in "01"]
    assert states == ["interrupted", "interrupted"]


@pytest.mark.slow
def test_a_search_and_all_other_commands_need_no_posix(python: Run, tmp_path: Path) -> None:
    """Nor a console that knows more than ASCII."""
    search = ("search=mlp", "hydra.sweeper.n_trials=2", *SHORT[:2], "hydra.sweep.dir=search")
    picture = Image.new("L", (60, 60), 250)
    ImageDraw.Draw(picture).line([(30, 10), (30, 50)], fill=10, width=6)
    picture.save(tmp_path / "one.png")
    for name, *arguments in (
        ("train", "-m", *search),
        ("report", "run=search"),
        ("predict", "images=one.png", "run=search/0"),
        ("evaluate", "run=search/0", "split=val"),
        ("compare", "runs=[search/0,search/1]"),
        ("explain", "run=search/0", "mistakes=1"),
        ("export", "run=search/0", "format=html"),
        ("report", "run=search", "html=true"),
        ("runs", "under=search"),
        ("visualize",),
    ):
        done = python("-c", f"{ASCII}\n{simulate(name)}", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout


@pytest.mark.parametrize(
    ("text", "posix", "windows"),
    [
        ("run=logs/a_1", "run=logs/a_1", "run=logs/a_1"),
        (r"run=C:\me\a-b", r"'run=C:\me\a-b'", r"run=C:\me\a-b"),
        ("-m", "-m", "-m"),
        ("+trainer.max_steps=5", "+trainer.max_steps=5", "+trainer.max_steps=5"),
        ("run=my run", "'run=my run'", '"run=my run"'),
        ("runs=[a,b]", "'runs=[a,b]'", '"runs=[a,b]"'),  # PowerShell makes two arguments of a,b
        ("a&b|(c);{d}@e#", "'a&b|(c);{d}@e#'", '"a&b|(c);{d}@e#"'),
        ("it's", """'it'"'"'s'""", '"it\'s"'),
        ("my folder\\", "'my folder\\'", '"my folder\\\\"'),  # programs read \\" as a quote
        ("${now:%H} it's", """'${now:%H} it'"'"'s'""", "'${now:%H} it''s'"),
        ("“a”", "'“a”'", "'“a”'"),
        ("été", "'été'", "été"),
        ("-cd=a.b", "-cd=a.b", '"-cd=a.b"'),  # PowerShell splits it at the point
        ("", "''", '""'),
    ],
)
def test_commands_are_quoted_for_the_shell(text: str, posix: str, windows: str) -> None:
    assert as_word(text, windows=False) == posix
    assert as_word(text, windows=True) == windows
    assert as_command(["python", text], windows=True) == f"python {windows}"


SOURCES = [
    path
    for folder in ("mnist_lightning", "hydra_plugins", "benchmarks", "docs")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


def find_unportable(source: str) -> set[str]:
    """What a source does that one place does for all, or that means something else on another system: it
    renames a file, quotes for a shell, or reads or writes text in the encoding of the system."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = [one.name for one in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        module = node.module if isinstance(node, ast.ImportFrom) else ""
        found |= {"shlex"} & {module, *names}
        found |= {name for name in names if module in ("os", "shutil") and name in RENAMING}
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {one.arg for one in node.keywords}
        where, _, name = called.rpartition(".")
        if where in ("os", "shutil") and name in RENAMING:
            found.add(called)
        if (
            where and name in ("rename", "replace") and len(node.args) == 1 and not keywords
        ):  # a text's takes two
            found.add(called)
        as_text = name in OPENING and where not in OTHERS
        as_text &= not any(isinstance(one, ast.Constant) and one.value in BINARY for one in node.args)
        if (as_text or "text" in keywords) and "encoding" not in keywords:
            found.add(called)
    return found


RENAMING = ("rename", "renames", "replace", "move")
OPENING = ("open", "fdopen", "read_text", "write_text")
BINARY = ("rb", "wb", "ab", "xb", "r+b", "rb+", "w+b")
OTHERS = ("os", "Image", "gzip")  # whose open() gives bytes


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("os.replace(a, b); os.rename(a, b); shutil.move(a, b)", {"os.replace", "os.rename", "shutil.move"}),
        ("path.rename(b); path.replace(b)", {"path.rename", "path.replace"}),
        ("from os import replace; from shutil import move, copy", {"replace", "move"}),
        ("import shlex", {"shlex"}),
        ("from shlex import quote", {"shlex"}),
        ("open(a); a.open('w'); a.read_text()", {"open", "a.open", "a.read_text"}),
        ("a.write_text(b); subprocess.run(a, text=True)", {"a.write_text", "subprocess.run"}),
        ("text.replace(a, b); replace(a, b); dataclasses.replace(a, b=c)", set()),
        ("open(a, 'rb'); a.open('xb'); a.read_text(encoding='utf-8'); Image.open(a); os.open(a, b)", set()),
    ],
)
def test_the_guard_guards(source: str, found: set[str]) -> None:
    assert find_unportable(source) == found


def test_one_place_renames_one_quotes_and_text_is_utf_8() -> None:
    found = {
        path.name: names for path in SOURCES if (names := find_unportable(path.read_text(encoding="utf-8")))
    }
    assert found == {
        "atomic.py": {"os.replace"},  # it waits for who holds the file
        "outside.py": {"shlex"},  # it knows the user's shell
        "rename.py": {"(parent / OLD).rename"},  # folders of a checkout
        "time_to_accuracy.py": {"shlex"},  # takes a shell's line apart
    }


def test_a_rename_waits_for_who_holds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for ever, and not for a folder that can't be written."""
    tries, place = [], tmp_path / "status.json"
    place.write_text("old")
    reason = PermissionError(13, "Permission denied", str(place))

    def refuse(source: Path, target: Path) -> None:
        tries.append(target)
        raise reason

    monkeypatch.setattr(atomic.os, "replace", refuse)
    for code, patience, least in ((32, 0.2, 3), (5, 0.2, 3), (19, 60.0, 1)):
        reason.winerror = code  # type: ignore[attr-defined]
        monkeypatch.setattr(atomic, "PATIENCE", patience)
        tries.clear()
        with pytest.raises(OSError, match="can't be written: Permission denied"):
            atomic.write_atomic(place, b"new")
        assert (len(tries) >= least) if least > 1 else (len(tries) == 1)
        assert [path.name for path in tmp_path.iterdir()] == ["status.json"], "nothing is left"
        assert place.read_text() == "old"


def test_a_folder_in_the_place_is_told(tmp_path: Path) -> None:
    """Windows would report a denied permission."""
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(IsADirectoryError, match="can't be written: a folder is in its place"):
        atomic.write_atomic(tmp_path / "metrics.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_runs_on_two_drives_have_their_whole_names() -> None:
    here = ["C:\\logs\\a\\1", "C:\\logs\\2"]
    assert shorten(here, paths=ntpath) == ["a\\1", "2"]
    assert shorten([*here, "D:\\3"], paths=ntpath) == [*here, "D:\\3"]
    assert shorten(["/logs/a/1", "/logs/2"], paths=posixpath) == ["a/1", "2"]
