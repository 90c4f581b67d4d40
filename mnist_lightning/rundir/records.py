"""Query the records of runs: filters, which settings decide the weights, means over seeds."""

import difflib
import math
import operator
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mnist_lightning.cli import CommandError
from mnist_lightning.rundir.index import Record, equals, find_defaults, read_value
from mnist_lightning.settings_help import WHERE

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
# Settings that decide nothing of the weights: runs that differ in them alone are averaged
IDLE = re.compile(
    rf"({'|'.join(map(re.escape, WHERE))})$"
    r"|(logger|checkpoint|experiment|search|debug)(\.|$)"
    r"|callbacks(\.(checkpoint|progress|summary|pictures|histograms|film)\b.*)?$"
    r"|trainer(\.(accelerator|default_root_dir|log_every_n_steps|enable_\w+|profiler\b.*|num_sanity_val_steps"
    r"|use_distributed_sampler))?$"
)
FOLD = "data.fold"


def find_keys(records: Sequence[Record]) -> set[str]:
    """All that can be asked of a run: what a record has, and every setting."""
    defaults, choices = find_defaults()
    own = {"run", "when", "changed", "state", "seconds", "error", "sweep", "epochs", "train_seconds"}
    scores = {f"{place}{split}/{name}" for place in ("", "last/") for split in ("train", "val", "test")
              for name in ("acc", "loss")}  # fmt: skip
    return own | scores | set(defaults) | set(choices) | {key for record in records for key in record}


def check_key(argument: str, key: str, keys: Collection[str]) -> None:
    """
    Raises:
        CommandError: no run has such a key.
    """
    if key not in keys:
        ends = {re.split(r"[./]", known)[-1]: known for known in sorted(keys)}
        near = difflib.get_close_matches(key, [*keys, *ends], n=1) or [""]
        hint = f"; did you mean {ends.get(near[0], near[0])}?" if near[0] else ""
        raise CommandError(f"{argument}: no run has a {key}{hint}")


def choose(records: Sequence[Record], text: str, keys: Collection[str]) -> list[Record]:
    """The records that a filter lets through; see ``read_filter``."""
    conditions = read_filter(text, keys)
    return [record for record in records if all(holds(record) for holds in conditions)]


def read_filter(text: str, keys: Collection[str]) -> list[Callable[[Record], bool]]:
    """The conditions of a filter, all of which are to hold.

    ``key op value``, joined by spaces or ``and``; the value is read as YAML, and one with a space in it
    stands in quotes or brackets.  Numbers are compared with numbers, words with words; all else does not
    hold.

    Raises:
        CommandError: it is none, or names an unknown key.
    """
    conditions: list[Callable[[Record], bool]] = []
    position = 0
    while text[position:].strip():
        if conditions and (joined := re.match(r"\s+and(?=\s)", text[position:])):
            position += joined.end()
        match = CONDITION.match(text, position)
        if match is None:
            raise CommandError(
                f"filter can't be read at {text[position:].strip()!r}: it is key op value, as in"
                " filter='val/acc > 0.98 and model.hidden = [256]', with = != < <= > >="
            )
        check_key("filter", match["key"], keys)
        conditions.append(make_condition(match["key"], match["sign"], read_quoted(match["value"])))
        position = match.end()
    return conditions


def read_quoted(text: str) -> Any:
    """A value, and what is in quotes as a word, whatever it looks like."""
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
    """Runs that differ in nothing but the seed, or the fold, as one: the mean of each number, and "n".

    Of several runs with one seed and one fold the newest counts.  "<key> sd" is the standard deviation
    (n - 1).

    Args:
        records: the newest first.
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
            values = [run[key] for run in runs if is_measured(key) and is_number(run.get(key))]
            if len(values) == len(runs):
                mean[key] = statistics.fmean(values)
        for key in [key for key in mean if is_measured(key)]:
            values = [run[key] for run in runs if is_number(run.get(key))]
            mean[f"{key} sd"] = statistics.stdev(values) if 1 < len(values) == len(runs) else None
        averaged.append(mean)
    return averaged


def is_measured(key: str) -> bool:
    """Whether a key of a record is a number that was measured, and no setting."""
    return "/" in key or key in ("seconds", "epochs", "train_seconds", "best_epoch")


def is_decisive(key: str, value: Any) -> bool:
    """Whether a key of a record is a setting that decides the weights."""
    told = ("run", "when", "changed", "state", "error", "sweep", "num_parameters", FOLD)
    return not (
        value is None or is_measured(key) or key in told or IDLE.match(key) or key.startswith("data/")
    )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
