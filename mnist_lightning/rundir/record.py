"""Record a run's settings and uncommitted code, so that the run can be compared and repeated later."""

import contextlib
import importlib.util
import json
import logging
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnist_lightning.config import Train
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.outside import read_json
from mnist_lightning.rundir.status import is_main_process
from mnist_lightning.settings_help import flatten

log = logging.getLogger(__name__)

SETTINGS, PATCH = "settings.json", "code.patch"
MOST = 1_000_000  # bytes in a patch, at most


def write_settings(run_dir: Path, settings: Train, choices: Mapping[str, Any]) -> None:
    """Write ``settings.json``: each setting by its dotted key, and the chosen file of each config group.

    ``.hydra/config.yaml`` holds the same as YAML, which takes a hundred times as long to read.

    Args:
        run_dir: the run's folder.
        settings: the run's settings.
        choices: Hydra's choice in each config group.  For groups without one, the choices of an existing
            ``settings.json`` are kept.
    """
    chosen = {group: choice for group, choice in choices.items() if not group.startswith("hydra/")}
    known = read_settings(run_dir)
    for group, choice in known.get("choices", {}).items():
        chosen.setdefault(group, choice)
    saved = {"choices": chosen, "settings": flatten(asdict(settings))}
    if is_main_process():
        with contextlib.suppress(OSError):  # a disk that is full or read-only stops the training itself
            write_atomic(run_dir / SETTINGS, (json.dumps(saved) + "\n").encode())


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Read the "choices" and "settings" that ``write_settings`` wrote; return {} if they can't be read."""
    try:
        saved = read_json(run_dir / SETTINGS)
    except OSError:
        return {}
    return saved if all(isinstance(saved.get(key), dict) for key in ("choices", "settings")) else {}


def write_patch(folder: Path, modules: Collection[str], *, package: bool) -> None:
    """Write ``code.patch`` with the uncommitted changes of this package and of the user's modules.

    ``git apply code.patch`` turns a checkout of the run's commit into the code of the run.

    Args:
        folder: the folder of a run, or of a sweep, whose jobs share one patch.
        modules: the names of the user's modules that the settings use.
        package: whether this package has uncommitted changes.
    """
    if not is_main_process() or (folder / PATCH).exists():
        return
    places = [Path(__file__).parents[1]] if package else []
    for name in modules:
        with contextlib.suppress(ImportError, ValueError):  # building the net reports a missing module
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.origin is not None and Path(spec.origin).is_file():
                places.append(Path(spec.origin))
    parts: list[str] = []
    left_out: list[str] = []
    size = 0
    for place in places:
        for name, text in find_changes(place):
            size += len(text.encode())
            if size > MOST:
                left_out.append(name)
                size -= len(text.encode())
            else:
                parts.append(text)
    if left_out:
        log.warning("%s leaves out %s: it holds 1 MB at most", PATCH, ", ".join(left_out))
    if parts:
        with contextlib.suppress(OSError):
            write_atomic(folder / PATCH, "".join(parts).encode())


def find_changes(place: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each changed file and its diff to the last commit.

    Args:
        place: a folder or a file; a file that git does not track counts as new.
    """
    folder = place if place.is_dir() else place.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, timeout=10)
        return done.stdout.decode("utf-8", "replace")

    try:
        tracked = git("diff", "HEAD", "--name-only", "--relative", "-z", "--", str(place)).split("\0")
        others = git("ls-files", "--others", "--exclude-standard", "-z", "--", str(place)).split("\0")
        if place.is_file() and not git("ls-files", "--full-name", "--", str(place)):
            others = [place.name]
        plain = ("--no-ext-diff", "--no-textconv", "--no-color")
        for name in filter(None, tracked):
            yield name, git("diff", "HEAD", *plain, "--", name)
        for name in filter(None, others):
            yield name, git("diff", "--no-index", *plain, "--", "/dev/null", name)
    except (OSError, subprocess.TimeoutExpired):  # git is missing, or takes too long
        return
