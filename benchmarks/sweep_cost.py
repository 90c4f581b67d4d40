"""Measure the time that a sweep takes in addition to training.

The script trains a short sweep with Hydra's basic launcher and prints the time that each job after the first
takes beyond its training.  Then it copies a finished job's folder to a sweep of many jobs and measures the
time to write its tables and its full report.

    python benchmarks/sweep_cost.py --jobs 1000
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mnist_lightning.rundir.status import Status, read
from mnist_lightning.sweeps.report import write_report, write_tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs of the sweep whose report is timed")
    parser.add_argument("--trained", type=int, default=10, help="jobs that are trained")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each trained job")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sweep = train(Path(temporary), arguments.trained, arguments.epochs)
        added = measure_added(sweep)
        print(
            f"a job after the first adds {statistics.median(added):.2f} s to its training"
            f" (median of {len(added)}, {min(added):.2f}–{max(added):.2f} s)"
        )
        multiply(sweep, arguments.jobs)
        write_tables(sweep)  # untimed: imports numpy
        for name, write in (("tables", write_tables), ("full report", write_report)):
            start = time.monotonic()
            write(sweep)
            print(f"{name} of {arguments.jobs:,} jobs: {time.monotonic() - start:.2f} s")


def train(cwd: Path, jobs: int, epochs: int) -> Path:
    seeds = ",".join(map(str, range(1, jobs + 1)))
    command = [sys.executable, "-m", "mnist_lightning.train", "-m", f"seed={seeds}"]
    subprocess.run([*command, f"trainer.max_epochs={epochs}"], cwd=cwd, check=True, stdout=sys.stderr)
    (sweep,) = (cwd / "logs" / "train" / "multiruns").iterdir()
    return sweep


def measure_added(sweep: Path) -> list[float]:
    """Return, for each job but the first, the seconds until the next job's start minus those of training."""
    statuses = [read(sweep / str(number)) for number in range(len(list(sweep.glob("*/status.json"))))]
    known = [status for status in statuses if status is not None]
    return [
        after.started - job.started - job.metrics["train_seconds"]
        for job, after in itertools.pairwise(known[1:])
    ]


def multiply(sweep: Path, jobs: int) -> None:
    """Fill the sweep with copies of its first job under other settings, with three seeds of each setting."""
    source = sweep / "0"
    status = json.loads((source / "status.json").read_text())
    for number in range(jobs):
        target = sweep / str(number)
        if number:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
        setting, seed = divmod(number, 3)
        overrides = [
            f"optimizer.lr={1e-4 * 1.01**setting:.4g}",
            f"seed={seed}",
            f"model.hidden={setting % 9}",
        ]
        Status(**(status | {"overrides": overrides})).write(target)


if __name__ == "__main__":
    main()
