"""Tests of the benchmark of deformations, in its smallest form."""

import json
from pathlib import Path

from conftest import REPOSITORY, Run


def test_it_measures_each_and_writes_what_it_prints(tmp_path: Path, python: Run) -> None:
    output = tmp_path / "augmentation.json"
    arguments = ("--batch-size", "8", "--rounds", "2", "--output", str(output))
    done = python("-m", "benchmarks.augmentation", *arguments, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert {"ours", "torchvision v2, each image"} <= result["us_per_image"].keys()
    assert result["times_ours"]["ours"] == 1
    for name, value in result["us_per_image"].items():
        assert value > 0
        assert f"{name:28} {value:8.1f}" in done.stdout
