"""Read files that may be damaged or a stranger's, and the texts in them.

Reading is bounded before it begins, writing follows no link out of a folder, and a text is shown as text.
"""

import json
import os
import re
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

SMALL = 2**24  # bytes: far more than any file of settings, numbers or curves that a run writes
MOST_YAML = 2**20  # bytes of settings, which take longer to parse
DEEPEST = 100  # levels of lists in lists
SOFTWARE = "mnist_lightning"  # what draws a figure, in the PNG file's own words (PNG specification, 11.3.4)
FORMULA = ("=", "+", "-", "@")  # what a spreadsheet calculates, at the beginning of a cell
# What a run opens in its folder and does not replace whole
OF_A_RUN = (
    *("train.log", "output.log", "fit-profile.txt", ".lock", ".hydra", "checkpoints", "tensorboard"),
    *("tensorboard/train", "tensorboard/val", "tensorboard/test"),
    *("csv", "csv/metrics.csv", "csv/hparams.yaml", "wandb"),
)
OF_A_SWEEP = (".lock", ".report.lock", "figures", "optuna.journal")


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; neither a pipe nor a device, which might never end.

    Raises:
        OSError: there is no such file, or it can't be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except PermissionError as error:
        if path.is_dir():  # Windows opens none
            raise OSError(f"{path} is no file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, *, most: int = SMALL) -> bytes:
    """A file's content.

    Args:
        most: bytes that are read.

    Raises:
        OSError: there is no such file, it can't be read, or is larger.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(f"{path} is refused: {size:,} bytes, where {most:,} would be many")
        return file.read(most)


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        OSError: see ``read_file``; or it holds none.
    """
    content = read_file(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged: {as_text(str(error))[:200]}") from error
    if not isinstance(value, dict):
        raise OSError(f"{path} is damaged: it holds no object")
    return value


def read_yaml(path: Path) -> str:
    """The text of a YAML file that can be parsed in the time that its length takes.

    Raises:
        OSError: see ``read_file``; or it is no YAML, or unfolds to more than it holds.
    """
    content = read_file(path, most=MOST_YAML)
    depth = 0
    try:
        text = content.decode()
        for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):  # ten lines of them make a billion values
                raise ValueError("it has an alias, which no run saves")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("it has lists in lists without end")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise OSError(f"{path} is damaged: {as_text(' '.join(str(error).split()))[:200]}") from error
    return text


def is_number(value: object) -> bool:
    """Whether a value is a number, NaN included."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def expand_home(name: str | Path) -> Path:
    """A path, "~" in it replaced by the home folder that it stands for.

    Raises:
        OSError: there is no such user, or it can be no path.
    """
    if "\0" in str(name):
        raise OSError(f"{as_text(str(name))} is no path: it holds a NUL")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise OSError(f"{name}: there is no such home folder") from error


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Whether what is written by these names in a folder is written there and nowhere else.

    Args:
        names: paths in the folder; they need not exist.

    Raises:
        OSError: one is a link that leads out of it, or neither a file nor a folder.
    """
    home = Path(os.path.realpath(folder))
    for name in names:
        path = folder / name
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
            raise OSError(f"{path} is a link out of its folder, through which nothing is written: remove it")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(f"{path} is neither a file nor a folder: remove it")


def check_links(folder: Path) -> None:
    """Whether nothing in a folder that may be a stranger's leads out of it: its settings may name anything in
    it to write to.

    Raises:
        OSError: see ``check_inside``.
    """
    for place, folders, files in os.walk(folder):
        names = [os.path.join(place, name) for name in (*folders, *files)]
        check_inside(folder, [os.path.relpath(name, folder) for name in names if os.path.islink(name)])


def check_run(folder: Path) -> None:
    """Whether a run writes into this folder alone.

    Raises:
        OSError: see ``check_inside``.
    """
    settings = [str(path.relative_to(folder)) for path in (folder / ".hydra").rglob("*")]
    check_inside(folder, [*OF_A_RUN, *settings])


def check_sweep(folder: Path) -> None:
    """Whether a sweep and its jobs write into this folder alone.

    Raises:
        OSError: see ``check_inside``.
    """
    check_inside(folder, OF_A_SWEEP)
    for path in folder.iterdir():
        if path.name.isdecimal():
            check_inside(folder, [path.name])
            check_run(path)


def is_our_figure(path: Path) -> bool:
    """Whether a file is a figure that this project has drawn, as it says itself near its beginning."""
    try:
        with open_file(path) as file:
            return f"Software\0{SOFTWARE}".encode() in file.read(200)
    except OSError:
        return False


def as_text(text: str, *, lines: bool = False) -> str:
    """A text with what a terminal would obey, and what is no letter at all, written out: "\\x1b[2J".

    Args:
        lines: whether it may have several.
    """
    if text.isprintable():
        return text
    kept = " \n" if lines else " "
    return "".join(
        one if one.isprintable() or one in kept else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def as_cell(value: object) -> object:
    """A value for a CSV file: a text that a spreadsheet would take for a formula has a "'" before it."""
    if not isinstance(value, str):
        return value
    text = as_text(value)
    is_formula = text.startswith(FORMULA) and not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", text)
    return f"'{text}" if is_formula else text


def as_code(text: str) -> str:
    """A text for Markdown, as code, in which nothing is markup."""
    text = as_text(text)
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if longest and (text[0] == "`" or text[-1] == "`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def as_word(text: str, *, windows: bool = os.name == "nt") -> str:
    """A text as one word of a command that is typed in the user's shell.

    On Windows as cmd.exe and PowerShell both read it.  Where they have no form in common (a "$", a backtick,
    a double quote) it is PowerShell's.

    Args:
        windows: whether the shell is one of these two, else one of POSIX.
    """
    if not windows:
        return shlex.quote(text)
    if re.fullmatch(r"[\w+./\\:=][\w+./\\:=-]*|-[\w-]*", text):
        return text
    if re.search('[$`"“”„]', text):  # which PowerShell reads within double quotes
        return "'" + re.sub("(['‘’‚‛])", r"\1\1", text) + "'"
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'  # a program takes \" for a quote of the text


def as_command(words: Iterable[str], *, windows: bool = os.name == "nt") -> str:
    """A command as it is typed in the user's shell, see ``as_word``."""
    return " ".join(as_word(word, windows=windows) for word in words)
