"""Code shared by the benchmarks: describe the machine, take turns, and write tables and result files."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path("logs/benchmarks")


@dataclass
class Table:
    """A table whose cells are text."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        """Format the table as Markdown."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]

        def draw(line: Sequence[str]) -> str:
            first, *others = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line))
            return "| " + " | ".join([first, *others]) + " |"

        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join([f"**{self.title}**", "", draw(self.header), draw(rule), *map(draw, self.rows)])


def make_parser(name: str, description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Make a benchmark's parser with the options ``--pairs`` and ``--output``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=repeats, help=f"number of measurements of each ({repeats})"
    )
    parser.add_argument("--output", type=Path, help=f"JSON file for the results ({RESULTS}/{name}.json)")
    return parser


def publish(name: str, arguments: argparse.Namespace, tables: list[Table], samples: Any) -> Path:
    """Print the tables, and write them to a file with all samples, the options and the machine."""
    path: Path = arguments.output or RESULTS / f"{name}.json"
    options = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
    content = {
        "benchmark": name,
        "options": options,
        "machine": describe_machine(),
        "tables": [asdict(table) for table in tables],
        "samples": samples,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    for table in tables:
        print(f"\n{table}")
    print(f"\nwritten to {path}")
    return path


def describe_machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{os.cpu_count()} cores of {models[0] if models else platform.processor()}",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),  # of the last 1, 5 and 15 minutes
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "hydra-core")},
    }


def take_turns(contestants: Mapping[str, Callable[[], Any]], pairs: int) -> dict[str, list[Any]]:
    """Run the contestants in turn (A B A B …), so that other work on the machine slows all of them.

    Returns:
        the results of each contestant's ``pairs`` calls, by its name.
    """
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    for pair in range(pairs):
        for name, run in contestants.items():
            print(f"{pair + 1}/{pairs} {name} …", file=sys.stderr, flush=True)
            results[name].append(run())
    return results


def ratio(values: Sequence[float], references: Sequence[float]) -> float:
    """Return the median of the ratios within each pair."""
    return statistics.median(value / reference for value, reference in zip(values, references, strict=True))


def spread(values: Sequence[float], *, scale: float = 1.0, digits: int = 2) -> str:
    """Format values as ``median (smallest–largest)``."""
    low, middle, high = (scale * x for x in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


@contextmanager
def empty_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def start(*arguments: str, cwd: Path, checkout: Path = REPOSITORY) -> "subprocess.Popen[bytes]":
    """Start ``python *arguments`` in ``cwd`` with a checkout's code; the output goes to ``cwd/output``."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": ""}
    with (cwd / "output").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env=environment, stdout=output, stderr=output
        )


def check_exit(code: int, cwd: Path, *, expected: int = 0) -> None:
    """Check a process's exit code.

    Raises:
        SystemExit: the code is not the expected one; the message holds the process's output.
    """
    if code != expected:
        sys.exit(f"exit code {code}, expected {expected}:\n{(cwd / 'output').read_text()}")
