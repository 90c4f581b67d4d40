"""Report the results of a sweep or of any runs:  python -m mnist_lightning.report [key=value …]"""

import logging
import os
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from mnist_lightning.cli import CommandError, begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Report, check
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.find import MULTIRUN
from mnist_lightning.rundir.index import Record, list_runs, read_runs
from mnist_lightning.rundir.output import check_file
from mnist_lightning.rundir.outside import expand_home
from mnist_lightning.rundir.records import choose, find_keys
from mnist_lightning.sweeps.page import count, make_page
from mnist_lightning.sweeps.report import summarize, tell_next, write_report
from mnist_lightning.sweeps.results import Results, collect, find_jobs, find_sweep

log = logging.getLogger(__name__)


def main() -> None:
    begin()
    sys.argv[1:] = quote_paths(["run", "runs", "filter", "under", "output", "data_dir"], sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="report")
def run(cfg: DictConfig) -> None:
    with compact_errors():
        report(check(cfg, Report))


def report(settings: Report) -> None:
    """Print the settings, the best first; write a sweep's tables and figures and, if asked, the page.

    Raises:
        CommandError: there is no such run, the filter can't be read, or the output is another kind of file.
        OSError: a folder can't be read or written.
    """
    target = None
    if settings.output is not None:
        target = expand_home(settings.output)
        check_file(target, "report.html")
    if settings.runs or settings.filter is not None:
        records = find_records(settings)
        results = collect(records)
        print(summarize(results))
        title, command = settings.filter or count(len(records), "run"), []
        target = target or Path("logs/report", time.strftime("%Y-%m-%d_%H-%M-%S.html"))
    else:
        results = sweep = write_report(find_sweep(settings.run))
        print(f"{summarize(sweep)}\n{tell_next(sweep)}")
        title, command = f"Sweep {sweep.folder.resolve().name}", sweep.command
        target = target or sweep.folder / "report.html"
    if settings.html:
        write_page(results, target, title, command, settings)


def write_page(results: Results, target: Path, title: str, command: list[str], settings: Report) -> None:
    if results.settings:
        log.info("loading torch and Lightning …")
    content = make_page(
        results, title=title, command=command, data_dir=settings.data_dir, trust=settings.trust
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, content)
    print(f"\nwritten to {target} ({len(content) / 1e3:,.0f} kB): open it in a browser, or send it")


def find_records(settings: Report) -> list[Record]:
    """Find the runs that ``runs`` names or that match ``filter``, the newest first.

    Raises:
        CommandError: no run matches the filter, or the filter can't be read.
        OSError: a name is neither a run nor a sweep.
    """
    if settings.filter is not None:
        records = list_runs(settings.under)
        found = choose(records, settings.filter, find_keys(records))
        if not found:
            raise CommandError(f"filter: no run under {settings.under} matches {settings.filter}")
        return found
    folders: dict[str, Path] = {}
    for name in settings.runs:
        folder = expand_home(name)
        of_name = list(find_jobs(folder)) if (folder / MULTIRUN).is_file() else [folder]
        folders |= {os.path.abspath(one): one for one in of_name}
    return read_runs(folders.values())


if __name__ == "__main__":
    main()
