"""Filter the records of runs, and average them over seeds."""

import difflib
import operator
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mnist_lightning.cli import CommandError
from mnist_lightning.rundir.index import Record, equals, find_defaults, read_value
from mnist_lightning.settings_help import WHERE
from mnist_lightning.targets import is_finite

OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "!=": lambda value, wanted: not equals(value, wanted),
    "=": equals,
}
CONDITION = re.compile(
    r"""\s*(?P<key>[^\s=!<>]+)\s*(?P<sign><=|>=|!=|=|<|>)\s*
        (?P<value>'(?:[^'])*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^\s]+)(?=\s|$)""",
    re.VERBOSE,
)
# Settings that have no influence on the weights: runs that differ only in these are averaged
IDLE = re.compile(
    rf"({'|'.join(map(re.escape, WHERE))})$"
    r"|(logger|checkpoint|experiment|search|debug)(\.|$)"
    r"|callbacks(\.(checkpoint|progress|summary|pictures|histograms|film)\b.*)?$"
    r"|trainer(\.(accelerator|default_root_dir|log_every_n_steps|enable_\w+|profiler\b.*|num_sanity_val_steps"
    r"|use_distributed_sampler))?$"
)
FOLD = "data.fold"


def find_keys(records: Sequence[Record]) -> set[str]:
    """Return all keys that a filter may use: those of the records, and every setting."""
    defaults, choices = find_defaults()
    own = {"run", "when", "changed", "state", "seconds", "error", "sweep", "epochs", "train_seconds"}
    scores = {f"{place}{split}/{name}" for place in ("", "last/") for split in ("train", "val", "test")
              for name in ("acc", "loss")}  # fmt: skip
    return own | scores | set(defaults) | set(choices) | {key for record in records for key in record}


def check_key(argument: str, key: str, keys: Collection[str]) -> None:
    """Check that a key exists.

    Args:
        argument: the command's argument that names the key, for the message.
        key: the key.
        keys: all keys, see ``find_keys``.

    Raises:
        CommandError: no run has such a key.
    """
    if key not in keys:
        ends = {re.split(r"[./]", known)[-1]: known for known in sorted(keys)}
        near = difflib.get_close_matches(key, [*keys, *ends], n=1) or [""]
        hint = f"; did you mean {ends.get(near[0], near[0])}?" if near[0] else ""
        raise CommandError(f"{argument}: no run has a {key}{hint}")


def choose(records: Sequence[Record], text: str, keys: Collection[str]) -> list[Record]:
    """Return the records that pass a filter, see ``read_filter``."""
    conditions = read_filter(text, keys)
    return [record for record in records if all(holds(record) for holds in conditions)]


def read_filter(text: str, keys: Collection[str]) -> list[Callable[[Record], bool]]:
    """Parse a filter into conditions; a record passes if all of them are true.

    A condition is ``key op value``, with the operators = != < <= > >=; conditions are joined by spaces or
    ``and``.  The value is parsed as YAML; one that contains a space needs quotes or brackets.  Numbers are
    compared with numbers and texts with texts; < <= > >= are false for all other pairs.

    Args:
        text: the filter, for example "val/acc > 0.98 and model.hidden = [256]".
        keys: all keys, see ``find_keys``.

    Raises:
        CommandError: the text is not a filter, or names an unknown key.
    """
    conditions: list[Callable[[Record], bool]] = []
    position = 0
    while text[position:].strip():
        if conditions and (joined := re.match(r"\s+and(?=\s)", text[position:])):
            position += joined.end()
        match = CONDITION.match(text, position)
        if match is None:
            raise CommandError(
                f"filter can't be read at {text[position:].strip()!r}: write key op value, as in"
                " filter='val/acc > 0.98 and model.hidden = [256]', with = != < <= > >="
            )
        check_key("filter", match["key"], keys)
        conditions.append(make_condition(match["key"], match["sign"], read_quoted(match["value"])))
        position = match.end()
    return conditions


def read_quoted(text: str) -> Any:
    """Parse a value; in single quotes, it is a text even if it looks like a number."""
    if text[0] == "'":
        return text[1:-1]
    return read_value(text)


def make_condition(key: str, sign: str, wanted: Any) -> Callable[[Record], bool]:
    compare = OPERATORS[sign]

    def holds(record: Record) -> bool:
        value = record.get(key)
        if sign in ("=", "!="):
            return compare(value, wanted)
        for kind in (str, (int, float)):
            if all(isinstance(one, kind) and not isinstance(one, bool) for one in (value, wanted)):
                return compare(value, wanted)
        return False

    return holds


def average(records: Sequence[Record]) -> list[Record]:
    """Average the completed runs that differ only in the seed or the fold.

    Of several runs with the same seed and fold, only the newest counts.

    Args:
        records: the records of runs, the newest first.

    Returns:
        a record for each group of runs: its measured numbers are means over the group, "n" is the number of
        runs, and "<key> sd" is the standard deviation with n - 1 in the denominator (None for one run).
    """
    groups: dict[str, dict[Any, Record]] = {}
    for record in records:
        if record["state"] == "completed":
            alike = repr(sorted((key, value) for key, value in record.items() if is_decisive(key, value)))
            groups.setdefault(alike, {}).setdefault((record.get("seed"), record.get(FOLD)), record)
    averaged = []
    for members in groups.values():
        runs = list(members.values())
        mean = dict(runs[0])
        mean["n"] = len(runs)
        for key in mean:
            values = [run[key] for run in runs if is_measured(key) and is_finite(run.get(key))]
            if len(values) == len(runs):
                mean[key] = statistics.fmean(values)
        for key in [key for key in mean if is_measured(key)]:
            values = [run[key] for run in runs if is_finite(run.get(key))]
            mean[f"{key} sd"] = statistics.stdev(values) if 1 < len(values) == len(runs) else None
        averaged.append(mean)
    return averaged


def is_measured(key: str) -> bool:
    """Tell whether a key of a record names a measured number, not a setting."""
    return "/" in key or key in ("seconds", "epochs", "train_seconds", "best_epoch")


def is_decisive(key: str, value: Any) -> bool:
    """Tell whether a key of a record names a setting that influences the weights."""
    told = ("run", "when", "changed", "state", "error", "sweep", "num_parameters", FOLD)
    return not (
        value is None or is_measured(key) or key in told or IDLE.match(key) or key.startswith("data/")
    )
