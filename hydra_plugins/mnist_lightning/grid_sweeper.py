"""Hydra's own sweeper, made careful: a mistake in the last job is told before the first one starts."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig

from mnist_lightning.config import ConfigError, Train, check


class GridSweeper(BasicSweeper):
    """Every combination of the swept values, each checked before the first job starts."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        assert self.hydra_context is not None
        assert self.config is not None
        for overrides in batch:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            check_job(cfg, overrides)


def check_job(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: the job's settings are wrong, or can't be part of a sweep.
    """
    try:
        trainer = check(cfg, Train).trainer
    except ConfigError as error:
        raise ConfigError(f"job {' '.join(overrides)}: {error}") from error
    if trainer.get("devices", 1) != 1 or "ddp" in str(trainer.get("strategy")):
        raise ConfigError(
            "trainer=ddp can't be part of a multirun, its child processes would run the sweep again:"
            " start such runs one by one"
        )
