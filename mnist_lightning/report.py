"""Tell what came out of a sweep:  python -m mnist_lightning.report [run=<sweep folder>]"""

from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from mnist_lightning.cli import begin, compact_errors, quote_paths
from mnist_lightning.config import CONF_DIR, check
from mnist_lightning.sweeps.report import summarize, write_report
from mnist_lightning.sweeps.results import find_sweep


@dataclass
class Report:
    """``python -m mnist_lightning.report``"""

    run: str


ConfigStore.instance().store(name="report_schema", node=Report, provider="mnist_lightning")


def main() -> None:
    begin()
    quote_paths(["run"])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="report")
def run(cfg: DictConfig) -> None:
    settings = check(cfg, Report)
    with compact_errors():
        sweep = write_report(find_sweep(settings.run))
        print(summarize(sweep))


if __name__ == "__main__":
    main()
