"""Handle files and texts that may be damaged or may come from a stranger.

Files are read only up to a size, links out of a folder are refused before anything is written there, and
texts are escaped before they are shown.
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
MOST_YAML = 2**20  # bytes; YAML takes longer to parse
DEEPEST = 100  # levels of nested lists
SOFTWARE = "mnist_lightning"  # the "Software" entry in PNG files of ours (PNG specification, 11.3.4)
FORMULA = ("=", "+", "-", "@")  # a spreadsheet calculates a cell that begins with one of these
# Files and folders that a run opens in its folder and does not replace atomically
OF_A_RUN = (
    *("train.log", "output.log", "fit-profile.txt", ".lock", ".hydra", "checkpoints", "tensorboard"),
    *("tensorboard/train", "tensorboard/val", "tensorboard/test"),
    *("csv", "csv/metrics.csv", "csv/hparams.yaml", "wandb"),
)
OF_A_SWEEP = (".lock", ".report.lock", "figures", "optuna.journal")


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; refuse pipes and devices, which may never end.

    Raises:
        OSError: the file does not exist, can't be read, or is not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except PermissionError as error:
        if path.is_dir():  # Windows denies permission to open a folder
            raise OSError(f"{path} is not a file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, *, most: int = SMALL) -> bytes:
    """Read a file's content.

    Args:
        path: the file.
        most: the largest size in bytes that is accepted.

    Raises:
        OSError: the file does not exist, can't be read, or is too large.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(f"{path} is refused: it has {size:,} bytes, at most {most:,} are read")
        return file.read(most)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        OSError: the file can't be read (see ``read_file``), or does not hold a JSON object.
    """
    content = read_file(path)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is damaged: {as_text(str(error))[:200]}") from error
    if not isinstance(value, dict):
        raise OSError(f"{path} is damaged: it does not hold a JSON object")
    return value


def read_yaml(path: Path) -> str:
    """Read the text of a YAML file, after checking that parsing it can't take unexpectedly long.

    Raises:
        OSError: the file can't be read (see ``read_file``), is not YAML, has aliases, or is too deep.
    """
    content = read_file(path, most=MOST_YAML)
    depth = 0
    try:
        text = content.decode()
        for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):  # ten lines with aliases can stand for a billion values
                raise ValueError("it has an alias, which no run saves")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("its lists are nested too deeply")
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise OSError(f"{path} is damaged: {as_text(' '.join(str(error).split()))[:200]}") from error
    return text


def is_number(value: object) -> bool:
    """Tell whether a value is a float, NaN included, or an int of at most 64 bits."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def expand_home(name: str | Path) -> Path:
    """Return a path in which "~" is replaced by the home folder.

    Raises:
        OSError: the user does not exist, or ``name`` contains a NUL.
    """
    if "\0" in str(name):
        raise OSError(f"{as_text(str(name))} is not a path: it contains a NUL")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise OSError(f"{name}: there is no such home folder") from error


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Check that writing to these names in a folder writes nowhere else.

    Args:
        folder: the folder.
        names: paths relative to the folder; they need not exist.

    Raises:
        OSError: one is a link out of the folder, or neither a file nor a folder.
    """
    home = Path(os.path.realpath(folder))
    for name in names:
        path = folder / name
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
            raise OSError(f"{path} is a link out of its folder, nothing is written through it: remove it")
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
    """Check that a run in this folder writes nowhere else.

    Raises:
        OSError: see ``check_inside``.
    """
    settings = [str(path.relative_to(folder)) for path in (folder / ".hydra").rglob("*")]
    check_inside(folder, [*OF_A_RUN, *settings])


def check_sweep(folder: Path) -> None:
    """Check that a sweep in this folder, and its jobs, write nowhere else.

    Raises:
        OSError: see ``check_inside``.
    """
    check_inside(folder, OF_A_SWEEP)
    for path in folder.iterdir():
        if path.name.isdecimal():
            check_inside(folder, [path.name])
            check_run(path)


def is_our_figure(path: Path) -> bool:
    """Tell whether this project has drawn a figure, by the "Software" entry near the start of the file."""
    try:
        with open_file(path) as file:
            return f"Software\0{SOFTWARE}".encode() in file.read(200)
    except OSError:
        return False


def as_text(text: str, *, lines: bool = False) -> str:
    """Escape the control characters and other unprintable characters of a text: ESC becomes "\\x1b".

    Args:
        text: any text.
        lines: whether to keep line breaks.
    """
    if text.isprintable():
        return text
    kept = " \n" if lines else " "
    return "".join(
        one if one.isprintable() or one in kept else one.encode("unicode_escape").decode("ascii")
        for one in text
    )


def as_cell(value: object) -> object:
    """Return a value for a CSV file, with a "'" before a text that a spreadsheet would read as a formula."""
    if not isinstance(value, str):
        return value
    text = as_text(value)
    is_formula = text.startswith(FORMULA) and not re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", text)
    return f"'{text}" if is_formula else text


def as_code(text: str) -> str:
    """Return a text as inline code for Markdown, so that nothing in it is read as markup."""
    text = as_text(text)
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if longest and (text[0] == "`" or text[-1] == "`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def as_word(text: str, *, windows: bool = os.name == "nt") -> str:
    """Quote a text as one word of a command for the user's shell.

    On Windows, the result works in cmd.exe and in PowerShell, except that a text with "$", a backtick or a
    double quote is quoted for PowerShell only.

    Args:
        text: any text.
        windows: whether the shell is cmd.exe or PowerShell; otherwise it is a POSIX shell.
    """
    if not windows:
        return shlex.quote(text)
    if re.fullmatch(r"[\w+./\\:=][\w+./\\:=-]*|-[\w-]*", text):
        return text
    if re.search('[$`"“”„]', text):  # PowerShell interprets these within double quotes
        return "'" + re.sub("(['‘’‚‛])", r"\1\1", text) + "'"
    return '"' + re.sub(r"(\\+)\Z", r"\1\1", text) + '"'  # programs read \" as a quote


def as_command(words: Iterable[str], *, windows: bool = os.name == "nt") -> str:
    """Join words to a command for the user's shell, each quoted by ``as_word``."""
    return " ".join(as_word(word, windows=windows) for word in words)
