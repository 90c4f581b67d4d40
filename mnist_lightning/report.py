"""Tell what came out of a sweep:  python -m mnist_lightning.report [run=<sweep folder>]"""

import sys

import hydra
from omegaconf import DictConfig

from mnist_lightning.cli import begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, Report, check
from mnist_lightning.sweeps.report import summarize, write_report
from mnist_lightning.sweeps.results import find_sweep


def main() -> None:
    begin()
    sys.argv[1:] = quote_paths(["run"], sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="report")
def run(cfg: DictConfig) -> None:
    settings = check(cfg, Report)
    with compact_errors():
        sweep = write_report(find_sweep(settings.run))
        print(summarize(sweep))


if __name__ == "__main__":
    main()
