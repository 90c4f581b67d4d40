"""Measure training on a machine that does other work at the same time.

**runs** Seconds of training of this project's default net, of the same in a bare torch loop, and of a usual
tutorial's loop: one alone, one beside a process that keeps a core busy, two at once, and four at once (the
slowest counts).  With ``--beside``, another checkout of this project is measured, too.

**sweep** Seconds of a whole sweep of small jobs, by launcher.

**crossover** Milliseconds of a step of bare torch on one thread and on all cores, alone and beside a busy
process, by hidden units and batch size: for which sizes do more threads help?  (``benchmarks.step_time``)

    python -m benchmarks.busy
    python -m benchmarks.busy --only runs --beside ../the-commit-before
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks.measure import (
    REPOSITORY,
    Table,
    check_exit,
    empty_folder,
    make_parser,
    publish,
    ratio,
    spread,
    start,
    take_turns,
)
from mnist_lightning import threads

CONDITIONS = {"alone": (1, 0), "beside a busy process": (1, 1), "two at once": (2, 0), "four at once": (4, 0)}
GROUPS = ("runs", "sweep", "crossover")
LAUNCHERS = ("basic", "processes", "auto")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run ``count`` processes during the block, each of which keeps a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def make_contestants(arguments: argparse.Namespace) -> dict[str, tuple[Path, list[str]]]:
    """Return a checkout and a command that trains, by the contestant's name."""
    data = f"data.data_dir={arguments.data_dir}"
    train = ["-m", "mnist_lightning.train", "hydra.run.dir=run", "test=false", data, *arguments.settings]
    train.append(f"trainer.max_epochs={arguments.epochs}")
    contestants = {"train": (REPOSITORY, train)}
    if arguments.beside:
        contestants["train, the other checkout"] = (arguments.beside.absolute(), train)
    if not arguments.settings:
        more = ["--data-dir", str(arguments.data_dir), "--epochs", "1", "--steps", str(arguments.steps)]
        for name, module in (("bare torch loop", "bare_loop"), ("the tutorial's loop", "tutorial_loop")):
            command = ["-m", f"benchmarks.{module}", *more]
            contestants[f"{name}, {arguments.steps} steps"] = (REPOSITORY, command)
    return contestants


def train(checkout: Path, command: list[str], *, count: int, beside: int) -> float:
    """Measure seconds of training: the slowest of ``count`` processes that run the command at once."""
    with ExitStack() as stack:
        folders = [stack.enter_context(empty_folder()) for _ in range(count)]
        stack.enter_context(busy(beside))
        processes = [start(*command, cwd=folder, checkout=checkout) for folder in folders]
        for process, folder in zip(processes, folders, strict=True):
            check_exit(process.wait(), folder)
        return max(map(read_seconds, folders))


def read_seconds(folder: Path) -> float:
    """Read the seconds of training from ``metrics.json``, or from the last printed line without one."""
    metrics = folder / "run" / "metrics.json"
    if metrics.exists():
        return float(json.loads(metrics.read_text())["train_seconds"])
    return float(re.findall(r"([\d.]+) s$", (folder / "output").read_text(), re.M)[-1])


def sweep(launcher: str, *, jobs: int, data_dir: Path) -> float:
    """Measure seconds of a whole sweep, whose jobs train for one epoch each."""
    seeds = ",".join(map(str, range(1, jobs + 1)))
    with empty_folder() as folder:
        begin = time.perf_counter()
        process = start(
            *("-m", "mnist_lightning.train", "-m", f"seed={seeds}", "trainer.max_epochs=1"),
            *(f"hydra/launcher={launcher}", f"data.data_dir={data_dir}"),
            cwd=folder,
        )
        check_exit(process.wait(), folder)
        return time.perf_counter() - begin


def time_steps(number: int, beside: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure milliseconds of a step, by the text "hidden batch flops"."""
    with empty_folder() as folder, busy(beside):
        seconds = str(arguments.step_seconds)
        more = ("--threads", str(number), "--seconds", seconds)
        check_exit(start("-m", "benchmarks.step_time", *more, cwd=folder).wait(), folder)
        rows = [json.loads(line) for line in (folder / "output").read_text().splitlines()]
    return {f"{row['hidden']} {row['batch']} {row['flops']}": row["ms"] for row in rows}


def measure_runs(arguments: argparse.Namespace) -> tuple[Table, dict[str, list[float]]]:
    contestants = make_contestants(arguments)
    calls: dict[str, Callable[[], float]] = {
        f"{name}: {condition}": partial(train, checkout, command, count=count, beside=beside)
        for name, (checkout, command) in contestants.items()
        for condition, (count, beside) in CONDITIONS.items()
        if condition in arguments.conditions
    }
    found = take_turns(calls, arguments.pairs)
    rows = []
    for name in contestants:
        for condition in arguments.conditions:
            seconds = found[f"{name}: {condition}"]
            cells = [f"{name}: {condition}", spread(seconds)]
            cells.append(f"{ratio(seconds, found[f'{name}: {arguments.conditions[0]}']):.2f} ×")
            same_work = name.startswith("train")
            cells.append(f"{ratio(seconds, found[f'train: {condition}']):.2f} ×" if same_work else "–")
            rows.append(cells)
    header = ["", "s of training: median (range)", f"beside {arguments.conditions[0]}", "beside train"]
    what = " ".join(["default net", *arguments.settings])
    return Table(f"runs, {what}, {arguments.epochs} epochs", header, rows), found


def measure_sweep(arguments: argparse.Namespace) -> tuple[Table, dict[str, list[float]]]:
    calls: dict[str, Callable[[], float]] = {
        launcher: partial(sweep, launcher, jobs=arguments.jobs, data_dir=arguments.data_dir)
        for launcher in LAUNCHERS
    }
    found = take_turns(calls, arguments.pairs)
    rows = [
        [
            f"hydra/launcher={launcher}",
            spread(seconds, digits=1),
            f"{60 * arguments.jobs / sorted(seconds)[len(seconds) // 2]:.0f}",
            f"{ratio(seconds, found['basic']):.2f} ×",
        ]
        for launcher, seconds in found.items()
    ]
    header = ["", "s in all: median (range)", "jobs a minute", "beside basic"]
    return Table(f"sweep of {arguments.jobs} jobs of an epoch", header, rows), found


def measure_crossover(arguments: argparse.Namespace) -> tuple[Table, dict[str, list[dict[str, float]]]]:
    cores = threads.usable_cores()
    calls: dict[str, Callable[[], dict[str, float]]] = {
        f"{number} threads, {name}": partial(time_steps, number, beside, arguments)
        for name, beside in (("alone", 0), ("busy", 1))
        for number in (1, cores)
    }
    found = take_turns(calls, arguments.pairs)
    rows = []
    for cell in sorted(found["1 threads, alone"][0], key=lambda cell: int(cell.split()[2])):
        hidden, batch, flops = cell.split()
        row = [f"{hidden} units, batch {batch}", f"{int(flops) / 1e9:.2f}"]
        for name in ("alone", "busy"):
            one, all_cores = (
                [samples[cell] for samples in found[f"{number} threads, {name}"]] for number in (1, cores)
            )
            row += [spread(one), spread(all_cores), f"{ratio(one, all_cores):.2f} ×"]
        rows.append(row)
    header = ["", "GFLOP of a step"]
    for name in ("alone", "busy"):
        header += [f"ms on 1, {name}", f"ms on {cores}, {name}", f"{cores} as fast as 1"]
    return Table(f"a step on 1 and on {cores} threads", header, rows), found


def main() -> None:
    parser = make_parser("busy", __doc__, repeats=7)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="the tables to make (all)")
    parser.add_argument("--beside", type=Path, help="another checkout of this project to measure in turn")
    parser.add_argument(
        "--conditions",
        nargs="+",
        choices=list(CONDITIONS),
        default=list(CONDITIONS),
        help="conditions of runs (all)",
    )
    parser.add_argument(
        "--settings", nargs="+", default=[], help="overrides for train, such as experiment=strong (none)"
    )
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a run (4)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the two loops (100)")
    parser.add_argument("--jobs", type=int, default=12, help="jobs of the sweep (12)")
    parser.add_argument(
        "--step-seconds", type=float, default=0.5, help="seconds for each cell of crossover (0.5)"
    )
    parser.add_argument("--data-dir", default=os.path.expanduser("~/.pytorch/MNIST_data/"))
    arguments = parser.parse_args()
    arguments.data_dir = Path(arguments.data_dir).absolute()
    tables, samples = [], {}
    measures = {"runs": measure_runs, "sweep": measure_sweep, "crossover": measure_crossover}
    for group in arguments.only:
        table, samples[group] = measures[group](arguments)
        tables.append(table)
    publish("busy", arguments, tables, samples)


if __name__ == "__main__":
    main()
