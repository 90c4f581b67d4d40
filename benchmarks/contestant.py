"""Code shared by the contestants of ``benchmarks.time_to_accuracy``; it imports nothing that takes long."""

import argparse
import json
import time
from pathlib import Path


def append(path: Path, accuracy: float) -> None:
    """Append a line of JSON: the time in seconds since 1970-01-01 UTC, and the accuracy in [0, 1]."""
    with path.open("a") as file:
        file.write(json.dumps({"time": time.time(), "accuracy": accuracy}) + "\n")


def parse_arguments(description: str | None, *, epochs: int) -> argparse.Namespace:
    """Parse a contestant's command line: ``data_dir``, ``epochs``, ``steps`` and ``log``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data-dir", type=lambda name: Path(name).expanduser(), default=Path.home() / ".pytorch/MNIST_data"
    )
    parser.add_argument("--epochs", type=int, default=epochs, help=f"number of epochs ({epochs})")
    parser.add_argument("--steps", type=int, help="steps of an epoch, at most (all)")
    parser.add_argument("--log", type=Path, default=Path("test_accuracy.jsonl"), help="file to write to")
    return parser.parse_args()
