import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from processes import Fresh, wait_for
from test_imports import COMMANDS, PACKAGE

from mnist_lightning.cli import quote, quote_paths

ODD = "a (1)=b,é #x.png"


def parse(argument: str) -> object:
    """Return the value that Hydra reads from an argument as the user typed it."""
    (quoted,) = quote_paths(["images", "runs"], [argument])
    return OverridesParser.create().parse_override(quoted).value()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (ODD, ODD),
        ("'already quoted, so'", "already quoted, so"),
        ("[a.png,b (2).png]", ["a.png", "b (2).png"]),
        ("[a=1.png, é #x.png]", ["a=1.png", "é #x.png"]),
        ("['a,b.png',c.png]", ["a,b.png", "c.png"]),
        ('["a, b",c]', ["a, b", "c"]),
        (r"'C:\my runs\a'", r"C:\my runs\a"),  # cmd.exe passes these quotes on
        ("'my runs\\'", "my runs\\"),
        ("['my runs\\',b]", ["my runs\\", "b"]),
        ("[one]", ["one"]),
        ("[]", []),
        ("'half", "'half"),
        ("[half", "[half"),
        ("*.png", "*.png"),
        ("$HOME/${x}", "$HOME/${x}"),
        ("null", None),
        ("/home/jürgen/größe.png", "/home/jürgen/größe.png"),
        ("[数字.png,b]", ["数字.png", "b"]),
    ],
)
def test_paths_mean_what_was_typed(typed: str, meant: object) -> None:
    assert unquoted(parse(f"images={typed}")) == meant


def unquoted(value: object) -> object:
    if isinstance(value, list):
        return [unquoted(element) for element in value]
    # OmegaConf removes the escape before "${" when it reads the value
    return getattr(value, "text", value).replace("\\${", "${") if value is not None else None


def test_names_of_existing_files_may_hold_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (ODD, "[x].png", "[1,2]", "a,b,c"):
        (tmp_path / name).touch()
    assert unquoted(parse(f"images=[{ODD},c.png]")) == [ODD, "c.png"]
    assert unquoted(parse(f"images=[c.png,{ODD}]")) == ["c.png", ODD]
    assert unquoted(parse("runs=[a,b,c,d]")) == ["a,b,c", "d"]
    assert unquoted(parse("images=[x].png")) == "[x].png"
    assert unquoted(parse("images=[1,2]")) == "[1,2]"


def test_other_keys_are_left_alone() -> None:
    arguments = ["model.hidden=[1,2]", "images_=a b"]
    assert quote_paths(["images"], arguments) == arguments


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1))
def test_any_text_survives_quoting(text: str) -> None:
    value = OverridesParser.create().parse_override("key=" + quote(text)).value()
    assert unquoted(value) == text.replace("\\${", "${")


@pytest.mark.posix("/dev/full")
@pytest.mark.parametrize("place", ["none", "closed", "full"])
def test_output_that_nobody_reads_ends_no_command(
    place: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """As in ``evaluate | head``, and where there is no output; a full disk is still told."""
    code = (
        "import logging, sys; from mnist_lightning import cli; cli.begin()\n"
        "logging.basicConfig(stream=sys.stdout); logging.warning('one'); print('two' * 10_000, flush=True)\n"
        "assert not (sys.stdin.isatty() or sys.stdout.isatty())\n"
        "open('done', 'w').close()"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed, open("/dev/full", "w") as full:
        file = full if place == "full" else closed
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            stdout=file,
            stderr=subprocess.PIPE,
            preexec_fn=(lambda: os.closerange(0, 2)) if place == "none" else None,
        )
    assert (tmp_path / "done").exists() is (place != "full")
    assert (b"No space left on device" in done.stderr) is (place == "full")
    assert (done.returncode, done.stderr) == (0, b"") or place == "full"


def test_ctrl_c_ends_any_command_without_a_traceback(tmp_path: Path, environment: dict[str, str]) -> None:
    code = "import time; from mnist_lightning.cli import begin; begin(); open('begun', 'w').close(); time.sleep(60)"
    process = Fresh("-c", code, cwd=tmp_path, env=environment)
    wait_for((tmp_path / "begun").exists, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.stderr == ""


@pytest.mark.posix("the removal of a working folder")
def test_a_working_folder_that_is_gone_is_told(tmp_path: Path, environment: dict[str, str]) -> None:
    code = "import os; from mnist_lightning.cli import begin; os.rmdir(os.getcwd()); begin()"
    (tmp_path / "gone").mkdir()
    process = Fresh("-c", code, cwd=tmp_path / "gone", env=environment)
    assert process.wait() == 1
    assert process.stderr.startswith("the working folder can't be used (No such file or directory)")
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.posix("a signal to itself")
def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path: Path, environment: dict[str, str]) -> None:
    wait = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    (tmp_path / "hydra.py").write_text(wait)  # is imported in the place of Hydra
    script = tmp_path / "mnist-train"  # as an installer writes it
    script.write_text("import sys; from mnist_lightning.train import main; sys.exit(main())")
    for arguments in (["-m", "mnist_lightning.train"], [str(script)]):
        process = Fresh(*arguments, cwd=tmp_path, env=environment)
        assert process.wait() == -signal.SIGINT
        assert process.stderr == ""


@pytest.mark.posix("a signal to itself")
def test_ctrl_c_of_another_package_stays_its_own(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "mine").mkdir()
    # what a program in the background begins with is to ignore it
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import mnist_lightning"
    (tmp_path / "mine" / "__init__.py").write_text(begin)
    ask = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (tmp_path / "mine" / "program.py").write_text(ask)
    (tmp_path / "mnist-mine").write_text(f"import mine; {ask}")
    for arguments in (["-m", "mine.program"], ["mnist-mine"]):
        process = Fresh(*arguments, cwd=tmp_path, env=environment)
        assert process.wait() == 0
        assert process.stdout == "True\n"


def test_each_command_begins_in_the_same_way() -> None:
    for name in COMMANDS:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert ast.unparse(main.body[0]) == "begin()", name
