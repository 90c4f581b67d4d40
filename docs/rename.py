"""Give the package another name, in a clone that is to become a project of your own.

    python docs/rename.py my_project

Renames the folders of the package and of its Hydra plugins, and writes the new name into all files of this
repository: imports, ``_target_`` in YAML, console scripts, guides and tests.
"""

import keyword
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OLD = "mnist_lightning"
SCRIPT = re.compile(r"\bmnist-(?=(train|evaluate|predict|compare|visualize|explain|export|report|runs)\b)")
SKIPPED = {".git", ".venv", "logs", "build", "dist"}  # and caches


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python docs/rename.py my_project")
    new = sys.argv[1]
    if not re.fullmatch(r"[a-z][a-z0-9_]*", new) or keyword.iskeyword(new):
        sys.exit(f"{new}: a package's name is lower-case letters, digits and _, and begins with a letter")
    if new in sys.stdlib_module_names or (REPOSITORY / new).exists():
        sys.exit(f"{new}: there is a module or a folder of this name already")
    if not (REPOSITORY / OLD).is_dir():
        sys.exit(f"{REPOSITORY / OLD}: there is no such folder; was it renamed before?")
    changed = sum([replace_name(path, new) for path in list_files(REPOSITORY)])
    for parent in (REPOSITORY, REPOSITORY / "hydra_plugins"):
        (parent / OLD).rename(parent / new)
    print(f"{OLD} is {new} now, in {changed} files; next: pip install -e . && python -m {new}.train")


def list_files(folder: Path) -> Iterator[Path]:
    """The files of a repository, without what git, pip, runs and caches keep there."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if name not in SKIPPED and not name.endswith(("cache", "cache__"))
        ]
        yield from (Path(parent) / name for name in names)


def replace_name(path: Path, new: str) -> bool:
    """Write the new name into a file; whether it held the old one.  Files that are no text are left alone."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    renamed = text.replace(OLD, new).replace(OLD.upper(), new.upper())
    renamed = SCRIPT.sub(f"{new.replace('_', '-')}-", renamed)
    if renamed != text:
        path.write_bytes(renamed.encode())
    return renamed != text


if __name__ == "__main__":
    main()
