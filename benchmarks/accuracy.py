"""Write a table of the test errors of feed-forward nets on MNIST, from the folders of finished runs.

Runs that differ only in the seed form one row: the error for each seed, the mean and the standard deviation.
Results of evaluate for the same runs (tta=16, runs=[…]) form rows of their own.  A figure beside the table
shows the images that a preset's nets misread with every seed.  Rows of other presets in the table stay.

    python -m benchmarks.accuracy logs/train/runs logs/evaluate
"""

import argparse
import collections
import json
import re
import statistics
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mnist_lightning import figures
from mnist_lightning.data import MNISTDataModule

# net, test error in %, source
REFERENCES = (
    ("784-128-64-10, SGD, 15 epochs (the tutorial)", "2.5–2.8", "published notebook runs"),
    ("2 × 800, cross-entropy, elastic deformations", "0.70", "Simard, Steinkraus, Platt 2003"),
    ("permutation-invariant: ladder network", "0.57", "arXiv 1511.06430"),
    ("2500-2000-1500-1000-500, deformations, 114 h on a GTX 280", "0.35", "Ciresan 2010, arXiv 1003.0358"),
    ("committee of 7 such nets", "0.31", "Ciresan 2011, arXiv 1103.4487"),
)
TRAIN = "python -m mnist_lightning.train"
DEFAULT = "default"  # the name of runs without overrides
WRONG = "## Wrong in all seeds: "
ASIDE = (
    "seed=",
    "threads=",
    "data.data_dir=",
    "data.num_workers=",
    "hydra",
    "resume=",
    "test=",
    "logger=",
    "callbacks",
)
MOST_SHOWN = 80  # images in a figure


@dataclass(frozen=True)
class Result:
    """The test error of one net, or of several nets together."""

    preset: str  # the overrides of the training, without the seed
    way: str  # how the net was evaluated: "" for the net alone
    seed: str
    error: float  # in %
    seconds: float | None  # training time
    parameters: int | None
    correct: Path | None  # the file that says which test images the net classified correctly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", type=Path, help="folders of runs and evaluations, or their parents"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/accuracy.md"), help="the file of the table"
    )
    parser.add_argument("--hardware", default="not told", help="the machine of the runs, in words")
    parser.add_argument("--data-dir", default="~/.pytorch/MNIST_data/", help="the folder of MNIST")
    arguments = parser.parse_args()
    results = sorted(collect(arguments.folders), key=lambda one: (one.preset, one.way, one.seed))
    if not results:
        sys.exit(f"no run under {', '.join(map(str, arguments.folders))} has a test error")
    groups: dict[tuple[str, str], list[Result]] = collections.defaultdict(list)
    for result in results:
        groups[result.preset, result.way].append(result)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw(groups, arguments.data_dir, arguments.output)
    chapters = (
        read_chapters(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    )
    chapters |= write_chapters(groups, pictures, arguments.hardware)
    arguments.output.write_text(write(dict(sorted(chapters.items()))), encoding="utf-8")
    print(arguments.output, *pictures.values(), sep="\n")


def collect(folders: list[Path]) -> list[Result]:
    paths = {path.resolve() for folder in folders for path in folder.rglob("metrics.json")}
    results = []
    for path in sorted(paths):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if "test/acc" in metrics:
            results.append(_of_training(path.parent, metrics))
        elif metrics.get("split") == "test" and "checkpoints" in metrics:
            results += _of_evaluation(metrics)
    return results


def _of_training(folder: Path, metrics: dict[str, Any]) -> Result:
    return Result(
        preset=name_preset(folder),
        way="",
        seed=str(metrics["seed"]),
        error=100 * (1 - metrics["test/acc"]),
        seconds=metrics.get("train_seconds"),
        parameters=metrics.get("num_parameters"),
        correct=path if (path := folder / "test_correct.npy").is_file() else None,
    )


def _of_evaluation(metrics: dict[str, Any]) -> list[Result]:
    """Read the result of an evaluation; return [] for one net without tta, because its training tested it."""
    runs = [Path(checkpoint).parent.parent for checkpoint in metrics["checkpoints"]]
    ways = [f"mean of {len(runs)} nets"] * (len(runs) > 1) + [f"tta={metrics['tta']}"] * bool(metrics["tta"])
    reports = [run / "metrics.json" for run in runs]
    if not ways:
        return []
    if missing := [str(report) for report in reports if not report.is_file()]:
        print(f"left out, because these files are missing: {', '.join(missing)}", file=sys.stderr)
        return []
    told = [json.loads(report.read_text(encoding="utf-8")) for report in reports]
    seconds = [one["train_seconds"] for one in told if "train_seconds" in one]
    return [
        Result(
            preset=" and ".join(sorted({name_preset(run) for run in runs})),
            way=", ".join(ways),
            seed="+".join(str(one["seed"]) for one in told),
            error=100 * metrics["mistakes"] / metrics["images"],
            seconds=sum(seconds) if len(seconds) == len(runs) else None,
            parameters=sum(one["num_parameters"] for one in told),
            correct=None,
        )
    ]


def name_preset(run: Path) -> str:
    """Return a run's overrides, without those that do not influence the accuracy."""
    saved = run / ".hydra" / "overrides.yaml"
    overrides = yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else ["unknown"]
    kept = [one for one in overrides if not one.lstrip("+").startswith(ASIDE)]
    return " ".join(sorted(kept, key=lambda one: (not one.startswith("experiment="), one))) or DEFAULT


@dataclass(frozen=True)
class Chapter:
    """The part of the page about one preset."""

    rows: list[str]  # rows of the table
    command: str
    picture: str  # Markdown, or "" without a picture


def write_chapters(
    groups: dict[tuple[str, str], list[Result]], pictures: dict[str, Path], hardware: str
) -> dict[str, Chapter]:
    chapters = {}
    for preset in dict.fromkeys(preset for preset, _ in groups):
        rows = [
            write_row(preset, way, results, hardware)
            for (other, way), results in groups.items()
            if other == preset
        ]
        seeds = " ".join(result.seed for result in groups.get((preset, ""), []))
        chosen = "" if preset == DEFAULT else f" {preset}"
        picture = f"![the images]({pictures[preset].name})" if preset in pictures else ""
        chapters[preset] = Chapter(rows, f"for seed in {seeds}; do {TRAIN}{chosen} seed=$seed; done", picture)
    return chapters


def write_row(preset: str, way: str, results: list[Result], hardware: str) -> str:
    errors = [result.error for result in results]
    spread = f" ± {statistics.stdev(errors):.3f}" if len(errors) > 1 else " (one run)"
    each = ", ".join(f"{result.seed}: {result.error:.2f}" for result in results)
    seconds = [result.seconds for result in results if result.seconds is not None]
    duration = "–"
    if seconds:  # the range, not the mean, because other work on the machine slows some runs
        ends = dict.fromkeys(f"{end:,.0f}" for end in (min(seconds), max(seconds)))
        duration = f"{' to '.join(ends)} s"
    parameters = f"{results[0].parameters:,}" if results[0].parameters else "–"
    name = f"**{preset}**" + (f", {way}" if way else "")
    cells = [name, f"{statistics.mean(errors):.3f}{spread}", each, duration, hardware, parameters]
    return "| " + " | ".join(cells) + " |"


def read_chapters(page: str) -> dict[str, Chapter]:
    """Read the chapters that ``write`` has written to a page, word for word."""
    rows: dict[str, list[str]] = collections.defaultdict(list)
    for row in re.finditer(r"^\| \*\*(.+?)\*\*.*$", page, re.MULTILINE):
        rows[row[1]].append(row[0])
    command = re.compile(
        rf"^for seed in .*; do {re.escape(TRAIN)}(?: (.+))? seed=\$seed; done$", re.MULTILINE
    )
    commands = {one[1] or DEFAULT: one[0] for one in command.finditer(page)}
    pictures = dict(re.findall(rf"^{re.escape(WRONG)}(.+)\n\n(.+)$", page, re.MULTILINE))
    return {preset: Chapter(rows[preset], commands[preset], pictures.get(preset, "")) for preset in rows}


def write(chapters: dict[str, Chapter]) -> str:
    lines = [
        "# Accuracy on MNIST's 10,000 test images",
        "",
        "Written by `python -m benchmarks.accuracy` from run folders; not typed.  Fully connected layers",
        "only; `directions` also has a fixed filter.  Mean ± standard deviation over seeds; the protocol is",
        "in `docs/records.md`.",
        "",
        "| net | test error in % | each seed | training | on | parameters |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {net}; {source} | {error} | – | – | – | – |" for net, error, source in REFERENCES]
    lines += [row for chapter in chapters.values() for row in chapter.rows]
    lines += ["", "## Commands", "", "```", *(chapter.command for chapter in chapters.values()), "```"]
    for preset, chapter in chapters.items():
        if chapter.picture:
            lines += ["", f"{WRONG}{preset}", "", chapter.picture]
    return "\n".join(lines) + "\n"


def draw(groups: dict[tuple[str, str], list[Result]], data_dir: str, output: Path) -> dict[str, Path]:
    """Draw, for each preset, the test images that its nets misread with every seed; return the files."""
    shared = {"batch_size": 1, "val_size": 0, "split_seed": 0, "num_workers": 0, "seed": 0}
    datamodule = MNISTDataModule(name="mnist", data_dir=data_dir, **shared)
    datamodule.prepare_data()
    datamodule.setup("test")
    digits = datamodule.splits["test"]
    drawings, titles = {}, {}
    for (preset, way), results in groups.items():
        paths = [result.correct for result in results if result.correct is not None]
        if way or len(paths) < 2:
            continue
        right = np.array([np.unpackbits(np.load(path), count=len(digits)) for path in paths])
        wrong = (~right.any(axis=0)).nonzero()[0]
        name = "".join(c if c.isalnum() else "_" for c in preset.removeprefix("experiment="))
        titles[preset] = f"{output.stem}_{name}"
        short = textwrap.shorten(preset, 50, placeholder=" …")
        drawings[titles[preset]] = figures.images(
            digits.images[wrong[:MOST_SHOWN]].numpy(),
            [f"{digits.labels[index]}   #{index}" for index in wrong[:MOST_SHOWN]],
            title=f"{short}: {len(wrong)} test images wrong in all {len(paths)} seeds; label and index",
        )
    written = figures.save(drawings, output.parent)
    return dict(zip(titles, written, strict=True))


if __name__ == "__main__":
    main()
