"""What each setting means, for ``--help`` and for docs/reference.md: the comment of its line in conf/."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from omegaconf import DictConfig, OmegaConf

WIDTH = 110  # columns of a page of help
COLUMN = 34  # of "key=value"; what is longer has a line of its own


def describe_settings(config: DictConfig) -> str:
    """Each setting of a command in a line: its key, its value, and the comment of its YAML line.

    Args:
        config: composed, with Hydra's own node, which names the files that were chosen.
    """
    comments = find_comments(config.hydra)
    settings = flatten(OmegaConf.to_container(without_hydra(config)))
    lines = []
    for key, value in settings.items():
        group = key.rpartition(".")[0]
        if group in comments:  # what its keys have in common
            lines += _line(f"{group}.", comments.pop(group))
        lines += _line(f"{key}={show(value)}", comments.get(key, ""))
    return "\n".join(lines).replace("$", "$$")  # Hydra fills in what follows a single one


def _line(setting: str, comment: str) -> list[str]:
    """The comment beside the setting, or below it where it leaves no room."""
    first, *more = textwrap.wrap(comment, WIDTH - COLUMN - 1) or [""]
    beside = [setting, f"{'':{COLUMN}} {first}"] if len(setting) > COLUMN else [f"{setting:{COLUMN}} {first}"]
    return [line.rstrip() for line in (*beside, *(f"{'':{COLUMN}} {text}" for text in more)) if line.strip()]


def find_comments(hydra: DictConfig) -> dict[str, str]:
    """The comments of a command's own file and of the files that were chosen, by dotted key."""
    folders = [
        Path(unquote(source.path)) for source in hydra.runtime.config_sources if source.schema == "file"
    ]
    files = [("", hydra.job.config_name)]
    for group, choice in hydra.runtime.choices.items():
        if choice is not None and not group.startswith("hydra/"):
            files.append((group.replace("/", ".") + ".", f"{group}/{choice}"))
    comments: dict[str, str] = {}
    for prefix, name in files:
        path = next(
            (folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()), None
        )
        if path is not None:
            comments |= {prefix + key: comment for key, comment in read_comments(path).items()}
    return comments


def read_comments(path: Path) -> dict[str, str]:
    """The comment at the end of each key's line, and of those in the file it builds upon, by dotted key."""
    base = find_base(path)
    comments = read_comments(base) if base else {}
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r'( *)"?([\w.]+)"?:( .*|$)', line)
        if match:
            indent = len(match[1])
            parents = [(depth, key) for depth, key in parents if depth < indent] + [(indent, match[2])]
            _, mark, comment = match[3].partition(" # ")
            if mark:
                comments[".".join(key for _, key in parents)] = comment.strip()
    return comments


def find_base(path: Path) -> Path | None:
    """The file beside it that a choice builds upon."""
    entries = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    bases = (path.with_name(f"{entry}.yaml") for entry in entries if isinstance(entry, str))
    return next((base for base in bases if base.is_file()), None)


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy of a command's own settings."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"model.hidden": [256], …}``; an empty node is a value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
