"""Write the results of commands without overwriting a user's files."""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from mnist_lightning.cli import CommandError
from mnist_lightning.rundir.atomic import replace, write_atomic
from mnist_lightning.rundir.outside import as_text, expand_home, read_file

log = logging.getLogger(__name__)

LONGEST_NAME = 200  # bytes of a file's name, with room for a prefix and a suffix
LARGEST = 2**30  # bytes of the largest file that is compared with what was written
WRITTEN = ".written"  # lists the files that commands have written in its folder, one in each line
MADE_HERE = b'<meta name="generator" content="mnist_lightning'  # in the head of every page of ours
LOGS = "logs"  # every file in this folder was written by this project


def claim_output(output: str, command: str, names: Collection[str]) -> Path:
    """Make the folder that ``output=`` names, and check that the command replaces only files of its own.

    Args:
        output: the folder as typed.
        command: the command's name, for example "evaluate".
        names: the names of the files that the command will write.

    Returns:
        the folder's path.

    Raises:
        CommandError: it is no folder, or holds a file with such a name that the command has not written.
        OSError: the folder can't be made or read.
    """
    folder = expand_home(output)
    if os.path.lexists(folder) and not folder.is_dir():
        raise CommandError(f"output={output} is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if Path(os.path.realpath(LOGS)) in Path(os.path.realpath(folder)).parents:
        return folder
    mark = folder / WRITTEN
    lines = read_lines(mark)
    wanted = [f"{command} {name}" for name in names]
    strange = [
        name
        for name, line in zip(names, wanted, strict=True)
        if line not in lines and os.path.lexists(folder / name)
    ]
    if strange:
        raise CommandError(
            f"output={output} already holds {strange[0]}, which {command} has not written: nothing is"
            " overwritten, name another folder"
        )
    write_atomic(mark, "".join(f"{line}\n" for line in dict.fromkeys([*lines, *wanted])).encode())
    return folder


def read_lines(mark: Path) -> list[str]:
    return read_file(mark).decode(errors="replace").splitlines() if os.path.lexists(mark) else []


def replace_unchanged(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files that are written again and again; one that somebody has changed since, or has put there, is
    kept under another name.

    Args:
        contents: by name, of files in the folder.

    Raises:
        OSError: the folder can't be read or written.
    """
    mark = folder / WRITTEN
    lines = read_lines(mark)
    known = [line for line in lines if re.fullmatch(r"[0-9a-f]{64} \S+", line)]
    now = [f"{hashlib.sha256(content).hexdigest()} {name}" for name, content in contents.items()]
    same: list[str] = []
    changed: list[str] = []
    for path in (folder / name for name in contents):
        if path.is_file() and not path.is_symlink():
            line = f"{hashlib.sha256(read_file(path, most=LARGEST)).hexdigest()} {path.name}"
            (same if line in (*known, *now) else changed).append(line)
    others = [line for line in lines if line not in known]
    kept = [line for line in known if line in same or line.partition(" ")[2] not in contents]
    write_atomic(mark, "".join(f"{line}\n" for line in dict.fromkeys([*others, *kept, *now])).encode())
    for path in (folder / line.partition(" ")[2] for line in changed):
        names = (path.with_stem(f"{path.stem}-changed-{number}") for number in itertools.count(1))
        free = next(name for name in names if not os.path.lexists(name))
        replace(path, free)
        log.warning("%s is not as this project has written it: it is kept as %s", path, free.name)
    for name, content in contents.items():
        write_atomic(folder / name, content)


def check_file(target: Path, name: str) -> None:
    """Check that writing a file overwrites nothing but an earlier result of the same kind.

    Args:
        target: the file to write.
        name: the usual name of such a file, for example "report.html".

    Raises:
        CommandError: ``target`` is a folder, or an existing file of another kind.
    """
    if target.is_dir():
        raise CommandError(f"output={target} is a folder: name a file, for example {target / name}")
    kind = Path(name).suffix
    if os.path.lexists(target) and (target.suffix != kind or not target.is_file()):
        raise CommandError(f"output={target} already exists and is not a *{kind} file: name another file")
    if kind == ".html" and target.is_file():
        with target.open("rb") as file:
            if MADE_HERE not in file.read(1_000):
                raise CommandError(
                    f"output={target} already exists, and mnist_lightning has not written it: name another"
                )


def shorten_stem(stem: str) -> str:
    """Turn a figure's name into a file's name that every file system accepts, of at most 200 bytes."""
    text = "".join("_" if one in '<>:"/\\|?*' else one for one in as_text(stem))
    return text.encode()[:LONGEST_NAME].decode(errors="ignore")
