"""Write docs/reference.md anew: every setting of every command, as conf/ and config.py have them.

Types come from the dataclasses, defaults and meanings from the YAML files, and what is allowed from
``check`` itself: each key is given a wrong value, and the message tells what would be right.

    python docs/reference.py
"""

import functools
import inspect
import pickle
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mnist_lightning.config import CONF_DIR, SCHEMAS, ConfigError, check, register
from mnist_lightning.settings_help import find_base, flatten, read_comments, show
from mnist_lightning.workarounds import read_yaml_by_libyaml

CONF = Path(CONF_DIR)
REFERENCE = Path(__file__).with_name("reference.md")
WRONG = (-2, "?")
HEADER = """\
# Reference: every setting

This file is made by `python docs/reference.py` from `conf/` and `mnist_lightning/config.py`; a test holds
the three together. Any setting is given as `key=value` on the command line.

- **default** is what a command takes when nothing is said; `${…}` is filled in from another key.
- **allowed** is in the words of the check; a dash means that the type alone decides.
- Keys of nets, losses, metrics, optimizers, schedules, trainers, callbacks and loggers are arguments of what
  `_target_` names. Its other arguments are added with a `+`: `+optimizer.nesterov=true`.
"""


def main() -> None:
    REFERENCE.write_text(generate(), encoding="utf-8")
    print(REFERENCE)


def generate() -> str:
    read_yaml_by_libyaml()  # composing settings for each choice takes most of the time
    commands = sorted(
        path.stem for path in CONF.glob("*.yaml") if "_schema" in path.read_text(encoding="utf-8")
    )
    commands = ["train", *(name for name in commands if name != "train")]
    lines = [HEADER]
    for command in commands:
        lines += [f"## `{command}`\n", *table_of_command(command)]
        if command == "train":
            for group in find_groups():
                lines += [f"### `{group}=`\n", *table_of_group(group)]
    return "\n".join(lines)


def find_groups() -> list[str]:
    """Ours first, then Hydra's launchers and sweepers, by name."""
    groups = {path.parent.relative_to(CONF).as_posix() for path in CONF.glob("*/**/*.yaml")}
    groups -= {"hydra/job_logging"}
    return sorted(groups, key=lambda group: (group.startswith("hydra/"), group))


def table_of_command(command: str) -> list[str]:
    schema = schema_of(command)
    defaults = read_flat(CONF / f"{command}.yaml")
    meanings = read_comments(CONF / f"{command}.yaml")
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    rows = []
    for key, kind in types_of(schema):
        if key.split(".")[0] not in groups:
            allowed = find_allowed(command, [], key)
            rows.append([f"`{key}`", kind, code(defaults[key]), allowed, meanings.get(key, "")])
    return table(["key", "type", "default", "allowed", "meaning"], rows)


def table_of_group(group: str) -> list[str]:
    default = find_default(group)
    choices = sorted((CONF / group).glob("*.yaml"), key=functools.partial(rank, default=default))
    if choices[0].read_text(encoding="utf-8").startswith("# @package _global_"):
        return table_of_presets(choices)
    types = dict(types_of(schema_of("train")))
    for path in choices:  # a class of ours in a group that takes anybody's
        if (schema := SCHEMAS.get(str(read_flat(path).get("_target_")))) is not None:
            types |= dict(types_of(schema, f"{group}."))
    key_of = group.replace("/", ".")
    rows = []
    for path in choices:
        values, meanings, base = read_flat(path), read_comments(path), find_base(path)
        overrides = [f"{group}={path.stem}"] if not group.startswith("hydra/") else []
        if base is not None:
            rows.append([f"`{path.stem}`", "", "", "", "", f"as `{base.stem}`, with"])
        elif not values:
            rows.append([f"`{path.stem}`", "", "", "", "", "nothing"])
        for position, (key, value) in enumerate(values.items()):
            name = f"{key_of}.{key}"
            allowed = "–" if group.startswith("hydra/") else find_allowed("train", overrides, name)
            kind = types.get(name) or ("" if value is None or "${" in str(value) else type(value).__name__)
            rows.append(
                [
                    f"`{path.stem}`" if position == 0 and base is None else "",
                    f"`{name}`",
                    "name" if key.endswith("_target_") else kind,
                    code(value),
                    allowed,
                    meanings.get(key, ""),
                ]
            )
    return table(["choice", "key", "type", "default", "allowed", "meaning"], rows)


def table_of_presets(choices: list[Path]) -> list[str]:
    """Of the files that set keys of several groups."""
    rows = []
    for path in choices:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
        opening = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        chosen = [
            f"`{key.removeprefix('override ').lstrip('/')}={value}`"
            for entry in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("defaults", [])
            if isinstance(entry, dict)
            for key, value in entry.items()
        ]
        values = [f"`{key}={show(value)}`" for key, value in read_flat(path).items()]
        told = "; ".join(f"`{line}`" if line.startswith("python ") else line for line in opening)
        rows.append([f"`{path.stem}`", told, " ".join(chosen + values)])
    return table(["choice", "what it is", "what it sets"], rows)


@functools.cache  # each key asks for it
def schema_of(command: str) -> Any:
    register()
    node = ConfigStore.instance().load(f"{command}_schema.yaml").node
    return OmegaConf.get_type(node)


def types_of(schema: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their types in words.  A comment beside ``Any`` tells what it stands for."""
    source = "".join(inspect.getsource(kind) for kind in schema.__mro__ if is_dataclass(kind))
    for field in fields(schema):
        if is_dataclass(field.type):
            yield from types_of(field.type, f"{prefix}{field.name}.")
            continue
        kind = getattr(field.type, "__name__", str(field.type)) if field.type is not Any else "Any"
        if " | " in str(field.type):
            kind = str(field.type)
        told = re.search(rf"^    {field.name}: Any  # ([^:\n]+)", source, re.MULTILINE)
        yield prefix + field.name, (told[1] if told else kind).replace("None", "null")


def find_default(group: str) -> str | None:
    """The choice that ``train`` takes when nothing is said."""
    defaults = yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    return next((entry[group] for entry in defaults if isinstance(entry, dict) and group in entry), None)


def rank(path: Path, *, default: str | None) -> tuple[bool, bool, str]:
    """The default comes first, what builds upon others last."""
    return path.stem != default, find_base(path) is not None, path.stem


def read_flat(path: Path) -> dict[str, Any]:
    """A YAML file's own settings, by dotted key."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    content.pop("defaults", None)
    if path.parent == CONF:
        content.pop("hydra", None)
    return flatten(content)


class Loader(yaml.SafeLoader):
    """Reads 1e-3 as OmegaConf does, as a number."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


def find_allowed(command: str, overrides: list[str], key: str) -> str:
    """What the check says must hold for this key."""
    for wrong in WRONG:
        cfg = pickle.loads(compose_command(command, tuple(overrides)))  # faster than a deep copy
        with open_dict(cfg):
            try:
                OmegaConf.update(cfg, key, wrong)
                check(cfg, schema_of(command))
            except ConfigError as error:
                if told := re.match(rf"{re.escape(key)} must be (.+), got ", str(error)):
                    return told[1]
            except OmegaConfBaseException:
                pass  # not of the key's type
            else:
                break  # whatever it is
    return "–"


@functools.cache
def compose_command(command: str, overrides: tuple[str, ...]) -> bytes:
    """A pickled config."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return pickle.dumps(compose(command, list(overrides)))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return [*(f"| {' | '.join(row)} |" for row in cells), ""]


def code(value: Any) -> str:
    return f"`{show(value)}`"


if __name__ == "__main__":
    main()
