"""Measure how long commands take to answer, and compare each with the smallest possible time, its floor.

The floor of ``--help``, ``--cfg job`` and a config error is ``import hydra``; an empty Hydra application with
the same kind of error is measured, too.  All of these are whole processes.  For the end of the first training
step, the floor is the end of ``import torch, lightning``.  The clock always starts before the process does.

    python -m benchmarks.startup
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.callbacks import Callback

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

STAMP = "stamp"
TRAIN = ("-m", "mnist_lightning.train")
EMPTY_APP = "import hydra; hydra.main(version_base='1.3', config_path=None)(lambda cfg: None)()"
WRITE = f"import time; open({STAMP!r}, 'w').write(str(time.time()))"


class FirstStep(Callback):
    """Write the time at the end of the first step to a file, and end the process."""

    def on_train_batch_end(self, *_: Any) -> None:
        with open(STAMP, "w") as file:
            file.write(str(time.time()))
        os._exit(0)


def run_whole(*command: str, code: int = 0) -> float:
    """Measure seconds from the start to the end of a process."""
    with empty_folder() as folder:
        began = time.perf_counter()
        ended_with = start(*command, cwd=folder).wait()
        seconds = time.perf_counter() - began
        check_exit(ended_with, folder, expected=code)
    return seconds


def run_to_stamp(*command: str) -> float:
    """Measure seconds from the start of a process to the time that it writes to a file."""
    with empty_folder() as folder:
        began = time.time()
        check_exit(start(*command, cwd=folder).wait(), folder)
        return float((folder / STAMP).read_text()) - began


def main() -> None:
    parser = make_parser("startup", __doc__, repeats=7)
    parser.add_argument("--data-dir", default=os.path.expanduser("~/.pytorch/MNIST_data/"))
    arguments = parser.parse_args()
    first_step = (
        *(*TRAIN, f"data.data_dir={arguments.data_dir}"),
        "+callbacks.first_step._target_=benchmarks.startup.FirstStep",
    )
    hydra, torch = "import hydra", "import torch, lightning"
    measured: dict[str, tuple[Callable[[], float], str]] = {  # and the name of the floor
        hydra: (partial(run_whole, "-c", hydra), hydra),
        "empty Hydra app: config error": (partial(run_whole, "-c", EMPTY_APP, "x=1", code=1), hydra),
        "empty Hydra app: --help": (partial(run_whole, "-c", EMPTY_APP, "--help"), hydra),
        "train --help": (partial(run_whole, *TRAIN, "--help"), hydra),
        "train --cfg job": (partial(run_whole, *TRAIN, "--cfg", "job"), hydra),
        "train model.dropout=2": (partial(run_whole, *TRAIN, "model.dropout=2", code=1), hydra),
        torch: (partial(run_to_stamp, "-c", f"{torch}; {WRITE}"), torch),
        "train, to the end of its first step": (partial(run_to_stamp, *first_step), torch),
    }
    for run, _ in measured.values():
        run()  # fill the disk cache, compile, unpack
    seconds = take_turns({name: run for name, (run, _) in measured.items()}, arguments.pairs)
    rows = []
    for name, (_, floor) in measured.items():
        above = [one - under for one, under in zip(seconds[name], seconds[floor], strict=True)]
        rows.append([name, spread(seconds[name]), "–" if name == floor else spread(above), floor])
    header = ["", "s: median (range)", "s above its floor", "floor"]
    publish("startup", arguments, [Table("start-up", header, rows)], seconds)


if __name__ == "__main__":
    main()
