"""What the contestants of ``benchmarks.time_to_accuracy`` share; it imports nothing that costs them time."""

import argparse
import json
import time
from pathlib import Path


def append(path: Path, accuracy: float) -> None:
    """A line of JSON: seconds since 1970-01-01 UTC, and the accuracy in [0, 1]."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), "accuracy": accuracy}) + "\n")


def parse_arguments(description: str | None, *, epochs: int) -> argparse.Namespace:
    """Of a contestant's script: ``data_dir``, ``epochs``, ``steps`` and ``log``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data-dir", type=lambda name: Path(name).expanduser(), default=Path.home() / ".pytorch/MNIST_data"
    )
    parser.add_argument("--epochs", type=int, default=epochs, help=f"({epochs})")
    parser.add_argument("--steps", type=int, help="of an epoch at most (all)")
    parser.add_argument("--log", type=Path, default=Path("test_accuracy.jsonl"), help="file to write to")
    return parser.parse_args()
