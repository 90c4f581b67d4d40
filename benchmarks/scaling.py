"""Measure how the time and peak memory of a run depend on one setting at a time.

Each run is a process of ``train`` with few epochs and the default settings, except for the one that varies.
Its training time is ``train_seconds`` in its ``metrics.json`` (steps, validation, checkpoints).  Its peak
memory is that reported by the system (``ru_maxrss``), minus the peak of a process that only imports what
``train`` imports.  With two processes (``trainer=ddp``), the memory is that of the larger one, and images per
second are those of both together; each process gets its share of the cores.  bfloat16 for the large net is
left out on a CPU without instructions for it, where a single product of a 256×4096 and a 4096×4096 matrix
took half a minute.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --only threads processes
"""

import argparse
import json
import os
import shutil
import statistics
import sys
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

IMPORTS = "import hydra, lightning, torch, torchvision, matplotlib.figure, torch.utils.tensorboard"
NUM_TRAIN, BATCH_SIZE = 55_000, 256  # in the default run
LARGE = "model.hidden=[2048,2048]"
BF16 = "trainer.precision=bf16-mixed"
# a table's name -> a row's name -> overrides
GROUPS: dict[str, dict[str, list[str]]] = {
    "hidden": {
        f"model.hidden={hidden}": [f"model.hidden={hidden}"]
        for hidden in ("64", "256", "1024", "4096", "[1024,1024]")
    },
    "batch": {f"data.batch_size={size}": [f"data.batch_size={size}"] for size in (32, 64, 256, 1024, 4096)},
    "epochs": {f"trainer.max_epochs={epochs}": [f"trainer.max_epochs={epochs}"] for epochs in (1, 2, 4, 8)},
    "threads": {f"threads={threads}": [f"threads={threads}"] for threads in (1, 2)},
    "processes": {
        f"{name}, batch {size}": [f"trainer={trainer}", f"data.batch_size={size}"]
        for size in (256, 2048)
        for name, trainer in (("1 process", "cpu"), ("2 processes", "ddp"))
    },
    "precision": {
        f"{net}, {name}": [*hidden, *more]
        for net, hidden in (("784-256-10", []), ("784-2048-2048-10", [LARGE]))
        for name, more in (
            ("32-bit", []),
            ("trainer.precision=bf16-mixed", [BF16]),
            ("compile=true", ["compile=true"]),
        )
    },
}


@dataclass
class Run:
    """The result of one run.

    Attributes:
        images: the number of training images, summed over epochs.
        seconds: training time.
        peak: peak memory in MiB of the process, or of the larger one of two.
    """

    images: int
    seconds: float
    peak: float


def run(arguments: list[str], *, images: int) -> Run:
    """Run one whole command; ``images`` is the number of training images in an epoch."""
    with empty_folder() as folder:
        process = start("-m", "mnist_lightning.train", *arguments, cwd=folder)
        peak = wait(process.pid, folder)
        metrics = json.loads((folder / "run" / "metrics.json").read_text())
    return Run(metrics["epochs"] * images, metrics["train_seconds"], peak)


def measure_imports() -> float:
    """Measure the peak memory in MiB of a process that only imports."""
    with empty_folder() as folder:
        return wait(start("-c", IMPORTS, cwd=folder).pid, folder)


def wait(pid: int, folder: Path) -> float:
    """Return the peak memory in MiB of a process, or of the largest process that it has waited for."""
    _, status, usage = os.wait4(pid, 0)
    check_exit(os.waitstatus_to_exitcode(status), folder)
    kibibytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kibibytes / 1024


def computes_bfloat16() -> bool:
    """Tell whether a GPU or the CPU computes bfloat16 in hardware; True if that is unknown."""
    flags = Path("/proc/cpuinfo")
    told = flags.read_text() if flags.exists() else "bf16"
    return "bf16" in told or shutil.which("nvidia-smi") is not None


def tabulate(group: str, runs: dict[str, list[Run]], imports: float) -> Table:
    rows = [
        [
            name,
            spread([one.seconds for one in found]),
            f"{statistics.median(one.images / one.seconds for one in found):,.0f}",
            f"{statistics.median(one.peak for one in found) - imports:+.0f}",
        ]
        for name, found in runs.items()
    ]
    header = ["", "s of training: median (range)", "images a second", f"MiB above the imports' {imports:.0f}"]
    return Table(group, header, rows)


def main() -> None:
    parser = make_parser("scaling", __doc__, repeats=3)
    parser.add_argument(
        "--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="the tables to make"
    )
    parser.add_argument("--rows", type=int, help="number of rows of each table (all)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each run (2)")
    parser.add_argument("--steps", type=int, help="steps of each epoch, at most (all)")
    parser.add_argument("--data-dir", default=os.path.expanduser("~/.pytorch/MNIST_data/"))
    arguments = parser.parse_args()
    tables, samples = [], {}
    imports = statistics.median(measure_imports() for _ in range(arguments.pairs))
    for group in arguments.only:
        rows = dict(list(GROUPS[group].items())[: arguments.rows])
        if not computes_bfloat16():
            rows = {name: more for name, more in rows.items() if not {LARGE, BF16} <= set(more)}
        runs = take_turns({name: make(arguments, more) for name, more in rows.items()}, arguments.pairs)
        tables.append(tabulate(group, runs, imports))
        samples[group] = {name: [asdict(one) for one in found] for name, found in runs.items()}
    publish("scaling", arguments, tables, samples)


def make(arguments: argparse.Namespace, more: list[str]) -> "partial[Run]":
    command = [
        *("hydra.run.dir=run", "test=false", f"data.data_dir={arguments.data_dir}"),
        f"trainer.max_epochs={arguments.epochs}",
        *([] if arguments.steps is None else [f"+trainer.limit_train_batches={arguments.steps}"]),
        *more,
    ]
    sizes = [int(one.partition("=")[2]) for one in more if one.startswith("data.batch_size=")]
    images = NUM_TRAIN if arguments.steps is None else arguments.steps * (sizes or [BATCH_SIZE])[0]
    return partial(run, command, images=min(images, NUM_TRAIN))


if __name__ == "__main__":
    main()
