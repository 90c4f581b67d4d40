"""A CSV logger whose file outlives its process."""

import csv
import io
from pathlib import Path

from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger as LightningCSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from mnist_lightning.files import write_atomic


class CSVLogger(LightningCSVLogger):
    """Lightning's CSVLogger, but it goes on with a ``metrics.csv`` that is there instead of deleting it.

    Args:
        save_dir: the run's folder; the file is ``<save_dir>/csv/metrics.csv``.
        purge_step: rows of this step and later ones are dropped at the start, as TensorBoard's
            ``purge_step`` does with its points; None keeps all.
    """

    def __init__(self, *, save_dir: str, purge_step: int | None = None) -> None:
        super().__init__(save_dir, name="csv", version="")
        self.purge_step = purge_step

    @property
    @rank_zero_experiment
    def experiment(self) -> FabricWriter:
        if self._experiment is None:
            self._experiment = AppendingWriter(self.log_dir, self.purge_step)
        return self._experiment


class AppendingWriter(ExperimentWriter):
    """Writes ``metrics.csv`` so that a kill at any moment leaves whole rows."""

    def __init__(self, log_dir: str, purge_step: int | None) -> None:
        self.purge_step = purge_step
        super().__init__(log_dir)
        self.metrics_keys = self._kept_keys

    def _check_log_dir_exists(self) -> None:
        self._kept_keys: list[str] = []
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows:
            self._kept_keys = list(rows[0])
            last = float("inf") if self.purge_step is None else self.purge_step - 1
            self._write_all(
                [row for row in rows if row["step"] and int(row["step"]) <= last], self._kept_keys
            )

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with Path(self.metrics_file_path).open(newline="") as file:
            self._write_all(list(csv.DictReader(file)), fieldnames)

    def _write_all(self, rows: list[dict[str, str]], fieldnames: list[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(Path(self.metrics_file_path), text.getvalue().encode())
