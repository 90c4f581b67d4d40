"""Measure the time from pressing Enter to a test accuracy of 97, 97.5, 98 and 99 %.

Each contestant is a new process: Python starts, imports, reads the data and trains.  The clock starts before
the process does.  Each contestant evaluates the 10,000 test images after every epoch and writes down the time
at which it knew the accuracy; this evaluation counts as part of its time.  The project by itself never uses
the test images during training: the benchmark adds a callback on the command line.  An accuracy counts as
reached at the first epoch that shows it; nothing is chosen by it.

The contestants are this project (``--project`` takes its command's arguments, "" is the default run; it can
be repeated), the tutorial's loop for its 15 epochs, and a bare torch loop with the default run's settings.

    python -m benchmarks.time_to_accuracy
    python -m benchmarks.time_to_accuracy --project "" --project "experiment=tutorial"
"""

import argparse
import json
import math
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.measure import (
    Table,
    check_exit,
    empty_folder,
    make_parser,
    publish,
    spread,
    start,
    take_turns,
)
from mnist_lightning.images.sources import unpack

LEVELS = (0.97, 0.975, 0.98, 0.99)
LOG = "test_accuracy.jsonl"


@dataclass
class Run:
    """The result of one process.

    Attributes:
        seconds: from the start of the process to its end.
        curve: for each epoch, the seconds since the start and the test accuracy in [0, 1].
    """

    seconds: float
    curve: list[tuple[float, float]]

    def reached(self, level: float) -> float:
        """Return the seconds until a test accuracy was reached, infinite if it never was."""
        return next((seconds for seconds, accuracy in self.curve if accuracy >= level), math.inf)


def run(command: list[str]) -> Run:
    with empty_folder() as folder:
        began = time.time()
        code = start(*command, cwd=folder).wait()
        seconds = time.time() - began
        check_exit(code, folder)
        lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return Run(seconds, [(line["time"] - began, line["accuracy"]) for line in lines])


def list_contestants(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command line of each contestant, without "python", by its name."""
    data_dir, steps = arguments.data_dir, arguments.steps
    limit = [] if steps is None else ["--steps", str(steps)]
    callback = [
        "+callbacks.epoch_accuracy._target_=benchmarks.epoch_accuracy.EpochAccuracy",
        f"+callbacks.epoch_accuracy.path={LOG}",
    ]
    contestants = {}
    for words in arguments.project or [""]:
        more = [] if steps is None else [f"+trainer.limit_train_batches={steps}"]
        more += [] if arguments.epochs is None else [f"trainer.max_epochs={arguments.epochs}"]
        own = [*shlex.split(words), f"data.data_dir={data_dir}", *callback, *more]
        contestants[f"train {words}".strip()] = ["-m", "mnist_lightning.train", *own]
    for name, module in (("the tutorial's loop", "tutorial_loop"), ("bare torch loop", "bare_loop")):
        epochs = [] if arguments.epochs is None else ["--epochs", str(arguments.epochs)]
        command = ["-m", f"benchmarks.{module}", f"--data-dir={data_dir}", f"--log={LOG}"]
        contestants[name] = [*command, *epochs, *limit]
    return contestants


def tabulate(runs: dict[str, list[Run]]) -> Table:
    rows = []
    for name, found in runs.items():
        cells = []
        for level in LEVELS:
            times = [one.reached(level) for one in found]
            missed = sum(map(math.isinf, times))
            cells.append(
                spread(times, digits=1) if not missed else f"in {len(times) - missed} of {len(times)}"
            )
        best = [100 * one.curve[-1][1] for one in found]
        rows.append([name, *cells, spread([one.seconds for one in found], digits=1), spread(best)])
    header = ["", *(f"s to {100 * level:g} %" for level in LEVELS), "s in all", "% at the end"]
    return Table("whole process, cold: median (range)", header, rows)


def main() -> None:
    parser = make_parser("time_to_accuracy", __doc__, repeats=5)
    parser.add_argument("--project", action="append", help='arguments of train; can be repeated ("")')
    parser.add_argument("--epochs", type=int, help="epochs of each contestant (its own default)")
    parser.add_argument("--steps", type=int, help="steps of each epoch, at most (all)")
    parser.add_argument("--data-dir", default=os.path.expanduser("~/.pytorch/MNIST_data/"))
    arguments = parser.parse_args()
    unpack(Path(arguments.data_dir))  # so that the time to unpack is not measured
    contestants: dict[str, Callable[[], Run]] = {
        name: partial(run, command) for name, command in list_contestants(arguments).items()
    }
    runs = take_turns(contestants, arguments.pairs)
    samples = {name: [asdict(one) for one in found] for name, found in runs.items()}
    publish("time_to_accuracy", arguments, [tabulate(runs)], samples)


if __name__ == "__main__":
    main()
