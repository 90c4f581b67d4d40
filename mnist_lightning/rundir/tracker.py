"""Log to Weights & Biases, a service that keeps runs on a server."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import loggers as lightning_loggers

from mnist_lightning.rundir.loggers import Forgiving, Silent


class WandbLogger(Forgiving, lightning_loggers.WandbLogger):
    """Lightning's WandbLogger, with a W&B run for each run of a process; a resumed run continues its W&B run.

    Metrics logged after the checkpoint at which the run resumes stay in W&B beside those logged again.

    The class has a module of its own because saved settings that name it need ``trust=``: it sends data to a
    server.

    Args:
        save_dir: the run's folder; its name is the name of the W&B run, whose files are in ``wandb/`` in it.
        project: the W&B project.
        entity: the W&B user or team; None: the default of the user who is logged in.
    """

    def __init__(self, *, save_dir: str, project: str, entity: str | None = None) -> None:
        name = Path(save_dir).name
        super().__init__(name=name, save_dir=save_dir, project=project, entity=entity)
        self._wandb_init.pop("anonymous", None)  # W&B warns that it is deprecated

    def resume_from(self, step: int) -> None:
        found = sorted((Path(self.save_dir or "") / "wandb").glob("*run-*"), key=lambda path: path.name)
        ids = [re.fullmatch(r"(?:offline-)?run-(\d{8}_\d{6})-(\w+)", path.name) for path in found]
        if known := sorted((match[1], match[2]) for match in ids if match):
            self._id = self._wandb_init["id"] = known[-1][1]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started at the first access.

        Raises:
            MisconfigurationException: W&B can't start a run, for example because no user is logged in.
        """
        if self._experiment is None and not self.failed:
            import wandb

            if wandb.run is not None:  # left by an earlier run of this process that failed
                wandb.finish(exit_code=1)
            with self.forgiving(), told():
                Path(str(self.save_dir)).mkdir(parents=True, exist_ok=True)
                return super().experiment
        return Silent() if self._experiment is None else self._experiment

    def log_end(self) -> None:
        """Tell W&B that the run is complete."""
        if self._experiment is not None and not isinstance(self._experiment, Silent):
            with self.forgiving():
                self._experiment.finish()
            self.failed = True  # log nothing more


@contextmanager
def told() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        line = " ".join(str(error).split()).rstrip(".")
        raise MisconfigurationException(
            f"logger=wandb can't start a run: {line}; WANDB_MODE=offline keeps it in the run's folder"
        ) from error
