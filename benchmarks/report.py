"""Put the tables of ``logs/benchmarks/*.json`` into ``benchmarks/README.md``, below its marker.

python -m benchmarks.report
"""

import argparse
import json
from pathlib import Path

from benchmarks.measure import REPOSITORY, RESULTS, Table

MARKER = "<!-- below: written by python -m benchmarks.report -->"


def render(path: Path) -> str:
    """Format a benchmark's tables, and the machine on which it ran, as Markdown."""
    content = json.loads(path.read_text())
    machine = content["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "lightning", "hydra-core"))
    told = f"{machine['date']}, {machine['cpu']}, load {machine['load']} at the end; {versions}."
    options = " ".join(f"--{k.replace('_', '-')}={v}" for k, v in content["options"].items() if k == "pairs")
    tables = [str(Table(**table)) for table in content["tables"]]
    command = f"`python -m benchmarks.{content['benchmark']} {options}`"
    return "\n\n".join([f"### {content['benchmark']}", f"{command}: {told}", *tables])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "benchmarks" / "README.md")
    arguments = parser.parse_args()
    files = sorted(arguments.results.glob("*.json"))
    if not files:
        parser.exit(1, f"no results in {arguments.results}: run a benchmark first\n")
    above, _, _ = arguments.readme.read_text().partition(MARKER)
    arguments.readme.write_text("\n\n".join([above + MARKER, *map(render, files)]) + "\n")
    print(f"{len(files)} results written to {arguments.readme}")


if __name__ == "__main__":
    main()
