"""Explain each setting, for ``--help`` and docs/reference.md, by the comment of its line in conf/."""

import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from omegaconf import DictConfig, OmegaConf

WIDTH = 110  # columns of a page of help
# Settings that say where and how, but not what is trained: names and tables of runs leave them out
WHERE = ("seed", "resume", "reproduce", "trust", "test", "threads", "data.data_dir", "data.num_workers")
LONGEST_NAME = 60  # most characters that the typed settings add to a folder's name
COLUMN = 34  # width of "key=value"; a longer one has a line of its own


def describe_settings(config: DictConfig) -> str:
    """Describe each setting of a command in a line: its key, its value, and the comment of its YAML line.

    Args:
        config: the composed config with Hydra's own node, which names the chosen files.
    """
    comments = find_comments(config.hydra)
    settings = flatten(OmegaConf.to_container(without_hydra(config)))
    lines = []
    for key, value in settings.items():
        group = key.rpartition(".")[0]
        if group in comments:  # a comment on the group as a whole
            lines += _line(f"{group}.", comments.pop(group))
        lines += _line(f"{key}={show(value)}", comments.get(key, ""))
    return "\n".join(lines).replace("$", "$$")  # Hydra replaces what follows a single $


def _line(setting: str, comment: str) -> list[str]:
    """Put the comment beside the setting, or below it if the setting is too long."""
    first, *more = textwrap.wrap(comment, WIDTH - COLUMN - 1) or [""]
    beside = [setting, f"{'':{COLUMN}} {first}"] if len(setting) > COLUMN else [f"{setting:{COLUMN}} {first}"]
    return [line.rstrip() for line in (*beside, *(f"{'':{COLUMN}} {text}" for text in more)) if line.strip()]


def find_comments(hydra: DictConfig) -> dict[str, str]:
    """Read the comments of a command's own file and of the chosen files, by dotted key."""
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
    """Read the comment at the end of each key's line, by dotted key, also from the file's base file."""
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
    """Find the first file beside this one that its defaults list names; None if there is none."""
    entries = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
    bases = (path.with_name(f"{entry}.yaml") for entry in entries if isinstance(entry, str))
    return next((base for base in bases if base.is_file()), None)


def without_hydra(config: DictConfig) -> DictConfig:
    """Copy a config without Hydra's own node."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys, as ``{"model.hidden": [256], …}``; an empty node is a value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def drop_places(overrides: Iterable[str]) -> list[str]:
    """Keep the overrides that decide what is trained, including the seed."""
    keys = {override: override.lstrip("+~").partition("=")[0] for override in overrides}
    return [
        override
        for override, key in keys.items()
        if key == "seed" or not (key in WHERE or key.startswith(("hydra", "logger", "watch")))
    ]


def name_changes(overrides: Iterable[str]) -> str:
    """Make the end of a folder's name from the overrides, such as "_hidden-256_lr-0.001".

    It has only letters, digits, "-", "_" and ".", which all shells and file systems accept.
    """
    name = ""
    for override in drop_places(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        short = re.sub(r"[^A-Za-z0-9._]+", "-", f"{key.rpartition('.')[2]}={value}").strip("-.")
        name += f"_{short}"
    return name[:LONGEST_NAME].rstrip("-._")


def show(value: Any) -> str:
    """Format a value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(show, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
