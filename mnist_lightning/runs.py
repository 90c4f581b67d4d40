"""List, average or delete runs:  python -m mnist_lightning.runs [key=value …]"""

import collections
import csv
import gc
import io
import logging
import os
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from mnist_lightning.cli import CommandError, begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Runs, check
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.index import STATES, Record, list_runs
from mnist_lightning.rundir.outside import as_cell, as_text, expand_home, open_file
from mnist_lightning.rundir.records import (
    average,
    check_key,
    choose,
    find_keys,
    is_measured,
)
from mnist_lightning.rundir.status import is_locked, show_value, show_with_unit
from mnist_lightning.sweeps.results import count_jobs
from mnist_lightning.targets import is_finite

log = logging.getLogger(__name__)

NARROWEST = 24  # least width of the column "changed", in characters
# Names in a run's folder that runs and commands write
OURS = re.compile(
    r"\.hydra|\.lock|\.writing-.*|checkpoints|csv|tensorboard|wandb|evaluation|film.*|metrics\.json|status\.json"
    r"|settings\.json|code\.patch|train\.log|output\.log|trial\.json|\w+_correct\.npy|fit-profile.*|lr_range\..*"
    r"|model\.onnx(\.data)?|page\.html"
)


def main() -> None:
    begin()
    gc.disable()  # collections would take a third of the time of this short command with many small records
    paths = ["under", "filter", "sort", "columns", "csv", "delete"]
    sys.argv[1:] = quote_paths(paths, sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="runs")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        settings = check(cfg, Runs)
        if settings.delete:
            delete(settings.delete, expand_home(settings.under), yes=settings.yes)
        else:
            show(settings)


def show(settings: Runs) -> None:
    """Print the table of runs, or write it as CSV.

    Raises:
        OSError: the folder does not exist, or the CSV file can't be written.
        CommandError: a key is unknown, or the filter can't be read.
    """
    nothing_yet = settings.under == "logs" and not Path(settings.under).exists()
    records = [] if nothing_yet else list_runs(settings.under)
    keys = find_keys(records)
    if settings.filter is not None:
        records = choose(records, settings.filter, keys)
    columns = list(settings.columns)
    if settings.average is not None:
        records = average(records)
        columns = [column for column in columns if column not in ("state", "run", "seed", "error", "sweep")]
        columns = list(dict.fromkeys(["n", *columns]))
        keys = keys | {"n"}
    for column in columns:
        check_key("columns", column, keys)
    records = sort(records, settings.sort, keys)
    if settings.csv is not None:
        write_csv(settings.csv, records, columns)
    else:
        print("\n".join(tabulate(records, columns, settings)))


def sort(records: Sequence[Record], key: str, keys: Collection[str]) -> list[Record]:
    """Sort records by a key, in descending order if it begins with "-"; records without a value come last.

    Raises:
        CommandError: no run has such a key.
    """
    name = key.removeprefix("-")
    check_key("sort", name, keys)

    def rank(record: Record) -> tuple[bool, Any]:
        value = record[name]
        return (
            (True, value) if is_finite(value) else (False, value if isinstance(value, str) else repr(value))
        )

    known = [record for record in records if record.get(name) is not None and record[name] == record[name]]
    others = [record for record in records if record.get(name) is None or record[name] != record[name]]
    return [*sorted(known, key=rank, reverse=key.startswith("-")), *others]


def tabulate(records: Sequence[Record], columns: Sequence[str], settings: Runs) -> list[str]:
    if not records:
        if settings.filter is not None:
            return [f"no run under {settings.under} matches {settings.filter}"]
        return [f"no run under {settings.under} yet; python -m mnist_lightning.train starts one"]
    rows = [[show_cell(record, column) for column in columns] for record in records]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    if "changed" in columns and sys.stdout.isatty():
        position = columns.index("changed")
        room = shutil.get_terminal_size().columns - sum(widths) - 2 * (len(widths) - 1)
        widths[position] = max(NARROWEST, min(widths[position], widths[position] + room))
        for row, changed in zip(rows, put_rare_first([row[position] for row in rows]), strict=True):
            row[position] = shorten(row[position], changed, widths[position])
    lines = []
    for row in (list(columns), *rows):
        cells = (
            cell.rjust(width) if column not in ("changed", "when", "state", "run", "error", "sweep")
            else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        )  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    if settings.average is None:
        counts = {state: sum(record["state"] == state for record in records) for state in STATES}
        told = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
        lines += ["", f"{len(records):,} runs: {told}" if len(records) > 1 else f"1 run: {told}"]
    return lines


def put_rare_first(changes: Sequence[str]) -> list[str]:
    """Order each run's changes so that those come first that the fewest runs share."""
    parts = [re.split(r" (?=~?[\w./@]+=)", changed) for changed in changes]
    counts = collections.Counter(part for of_run in parts for part in of_run)
    return [" ".join(sorted(of_run, key=counts.__getitem__)) for of_run in parts]


def shorten(text: str, rare_first: str, width: int) -> str:
    """Return the text if it fits into the width, else the beginning of the other text."""
    return text if len(text) <= width else rare_first[: width - 1] + "…"


def show_cell(record: Record, column: str) -> str:
    """Format a value for the table: accuracies in percent, times in seconds, control characters escaped."""
    value = record.get(column)
    if value is None or value == "":
        return "default" if column == "changed" else "–"
    if "/" in column and is_finite(value):
        deviation = record.get(f"{column} sd")
        if deviation is not None:
            return show_value(column, value, deviation) + (" %" if column.endswith("acc") else "")
        return show_with_unit(column, float(value))
    if column == "when":
        return str(value)[:16]
    if isinstance(value, float):
        return f"{value:.1f}" if is_measured(column) else f"{value:g}"
    return as_text(str(value))


def write_csv(name: str, records: Sequence[Record], columns: Sequence[str]) -> None:
    """Write a CSV table with a row for each run and all digits of the numbers; "-" prints it.

    Raises:
        CommandError: the file exists and is no such table.
        OSError: the file can't be written.
    """
    names = ["run", *(column for column in columns if column != "run")]
    names = [
        one for column in names for one in (column, f"{column} sd") if one in column or has(records, one)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for record in records:
        writer.writerow(["" if record.get(key) is None else as_cell(record[key]) for key in names])
    if name == "-":
        print(text.getvalue(), end="")
        return
    path = expand_home(name)
    if os.path.lexists(path):
        with open_file(path) as file:
            if file.read(4) not in (b"run,", b"run\n", b""):
                raise CommandError(f"csv={path} exists and is no table of runs: give another name")
    write_atomic(path, text.getvalue().encode())
    print(f"{len(records):,} rows written to {path}")


def has(records: Sequence[Record], key: str) -> bool:
    return any(record.get(key) is not None for record in records)


def delete(names: Sequence[str], under: Path, *, yes: bool) -> None:
    """Delete runs, after checking all of them and asking the user.

    Raises:
        CommandError: a run may not be deleted; then none is.
        OSError: a folder can't be deleted.
    """
    runs = {os.path.abspath(record["run"]): record for record in list_runs(under)}
    chosen: dict[Path, Record] = {}
    for name in names:
        path = Path(os.path.abspath(expand_home(name)))
        if any(part.is_symlink() for part in (path, *path.parents) if part != Path(part.anchor)
               and part.is_relative_to(os.path.abspath(under))):  # fmt: skip
            raise CommandError(f"delete: {name} is, or lies behind, a link: name the folder it points to")
        if str(path) not in runs:
            raise CommandError(
                f"delete: {name} is no run under {under}; python -m mnist_lightning.runs lists them"
            )
        check_deletable(name, path, runs[str(path)], runs.values())
        chosen[path] = runs[str(path)]
    for path, record in chosen.items():
        told = record["changed"] or "default"
        print(f"{path}  {record['when']}  {record['state']}  {as_text(told)}")
    if not yes:
        if not sys.stdin.isatty():
            count = "1 run" if len(chosen) == 1 else f"{len(chosen)} runs"
            raise CommandError(f"delete: {count} would be deleted: confirm with yes=true")
        if input("delete for good? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing is deleted")
            return
    for path in chosen:
        shutil.rmtree(path)
    print(f"{len(chosen)} deleted")


def check_deletable(name: str, path: Path, record: Record, records: Collection[Record]) -> None:
    """Check that a run may be deleted.

    Args:
        name: the run as the user named it, for messages.
        path: its folder.
        record: its record.
        records: the records of all runs, including the other jobs of its sweep.

    Raises:
        CommandError: the run is running, its sweep is not finished, or its folder holds other files.
    """
    if record["state"] == "running":
        raise CommandError(f"delete: {name} is running")
    if record["sweep"] is not None:
        sweep = path.parent
        wanted = count_jobs(sweep)
        states = [other["state"] for other in records if other["sweep"] == record["sweep"]]
        finished = sum(state in ("completed", "failed", "pruned") for state in states)
        if is_locked(sweep) or finished < len(states) or (wanted is not None and len(states) < wanted):
            raise CommandError(
                f"delete: {name} is a job of a sweep that is not finished: {finished} of {wanted or '?'} jobs"
                " have ended"
            )
    strange = sorted(one.name for one in path.iterdir() if not OURS.fullmatch(one.name))
    if strange:
        raise CommandError(
            f"delete: {name} holds files that no run writes ({', '.join(strange)}): move them away first"
        )


if __name__ == "__main__":
    main()
