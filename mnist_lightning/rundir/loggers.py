"""Log metrics in files that a resumed run continues; a failed write never stops training."""

import csv
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities import rank_zero_only
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch.utils.tensorboard import SummaryWriter

from mnist_lightning import workarounds
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.outside import read_file

log = logging.getLogger(__name__)

MOST_CURVES = 2**30  # bytes of a metrics.csv: about a hundred bytes for each of ten million rows
ENDING = ".ending"  # suffix of the event file with the final metrics
SPLITS = ("train", "val", "test")  # TensorBoard shows each as a run of its own
BY_STEP = {"train/loss_step": "step/loss", "lr": "step/lr"}  # metrics logged every few steps


def is_failed_write(error: BaseException | None) -> bool:
    """Tell whether a failed write caused an error, directly or by way of other errors."""
    while error is not None:
        if isinstance(error, OSError) or "closed file" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


class Silent:
    """Replace a writer that can't be made: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Forgiving:
    """Mixin for a logger: if its files can't be written, for example because the disk is full, it warns once
    and logs nothing more, and training continues."""

    failed = False

    def resume_from(self, step: int) -> None:
        """Drop everything logged at this step and later; call it before anything is logged."""
        raise NotImplementedError

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if not is_failed_write(error):
                raise
            if not self.failed:
                log.warning(
                    "%s can't be written: %s; training continues without it", type(self).__name__, error
                )
            self.failed = True

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.forgiving():
            if not self.failed:
                super().log_metrics(metrics, step)  # type: ignore[misc]

    def log_hyperparams(self, params: Any, *metrics: Any) -> None:
        with self.forgiving():
            if not self.failed:
                super().log_hyperparams(params, *metrics)  # type: ignore[misc]

    def save(self) -> None:
        with self.forgiving():
            if not self.failed:
                super().save()  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        with self.forgiving():
            if not self.failed:
                super().finalize(status)  # type: ignore[misc]


class TensorBoardLogger(Forgiving, lightning_loggers.TensorBoardLogger):
    """Lightning's TensorBoardLogger, writing to ``<save_dir>/tensorboard/``.

    The metrics of training, validation and test are written to three subfolders under the same tags, so that
    TensorBoard draws "epoch/loss" of all three in one chart, and each split in the same colour everywhere.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, *, save_dir: str) -> None:
        # The final metrics are written with the hyper-parameters at the end, not -1 at the start.
        super().__init__(save_dir, name="tensorboard", version="", default_hp_metric=False)
        self.purge_step: int | None = None
        self.writers: dict[str, SummaryWriter] = {}  # one for each split

    def resume_from(self, step: int) -> None:
        self.purge_step = step
        workarounds.drop_from(self, step)
        for path in Path(self.log_dir).glob(f"**/events.*{ENDING}"):
            path.unlink()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics of a split in its subfolder, and all others except "epoch" in the main folder."""
        others: dict[str, float] = {}
        for name, value in metrics.items():
            split, _, tag = ("train/" + name if name in BY_STEP else name).partition("/")
            if split in SPLITS:
                with self.forgiving():
                    if not self.failed:
                        self._writer(split).add_scalar(BY_STEP.get(name, f"epoch/{tag}"), value, step)
            elif name != "epoch":
                others[name] = value
        super().log_metrics(others, step)

    def _writer(self, split: str) -> SummaryWriter:
        if split not in self.writers:
            self.writers[split] = SummaryWriter(Path(self.log_dir) / split, purge_step=self.purge_step)
        return self.writers[split]

    @rank_zero_only
    def log_end(
        self, name: str, settings: Mapping[str, bool | float | str], metrics: Mapping[str, float], step: int
    ) -> None:
        """Log settings and final metrics for the HParams tab, in files that a resumed run replaces.

        No summary of the whole experiment is written, because TensorBoard would use only that of the first
        run; without one, TensorBoard itself finds the settings that differ between runs and shows them first.

        Args:
            name: the run's name in that tab.
            settings: the values to show, by dotted key.
            metrics: final metrics, "val/…" of the best net and "test/…".
            step: the number of optimizer steps done.
        """
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        _, start, end = hparams(dict(settings), {})  # type: ignore[no-untyped-call]
        metadata = start.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(metadata.content)
        content.session_start_info.group_name = name
        metadata.content = content.SerializeToString()
        with self.forgiving():
            if self.failed:
                return
            for split, folder in (("val", Path(self.log_dir)), ("test", Path(self.log_dir) / "test")):
                values = {key: value for key, value in metrics.items() if key.startswith(f"{split}/")}
                if not values and split == "test":
                    continue
                writer = SummaryWriter(folder, filename_suffix=ENDING)
                try:
                    for summary in (start, end) if split == "val" else ():
                        workarounds.add_summary(writer, summary)
                    for key, value in values.items():
                        writer.add_scalar(f"epoch/{key.partition('/')[2]}", value, step)
                finally:
                    writer.close()

    @property
    @rank_zero_experiment
    def experiment(self) -> "SummaryWriter | Silent":
        """TensorBoard's writer, or ``Silent`` if it can't be made."""
        with self.forgiving():
            if not self.failed:
                writer: SummaryWriter = super().experiment
                return writer
        return Silent()

    def save(self) -> None:
        """Write everything logged so far to disk; a checkpoint needs this before it is saved."""
        super().save()
        with self.forgiving():
            if not self.failed:
                for writer in (self.experiment, *self.writers.values()):
                    writer.flush()

    def finalize(self, status: str) -> None:
        super().finalize(status)
        with self.forgiving():
            for writer in self.writers.values():
                writer.close()


@contextmanager
def writing(trainer: L.Trainer) -> Iterator[SummaryWriter | None]:
    """Yield TensorBoard's writer, or None without one; a failed write within the block is only logged."""
    loggers = [one for one in trainer.loggers if isinstance(one, TensorBoardLogger) and not one.failed]
    if not loggers or not trainer.is_global_zero:
        yield None
        return
    with loggers[0].forgiving():
        yield loggers[0].experiment


class CSVLogger(Forgiving, lightning_loggers.CSVLogger):  # type: ignore[misc]
    """Lightning's CSVLogger, writing to ``<save_dir>/csv/metrics.csv``; it continues an existing file instead
    of deleting it.

    Args:
        save_dir: the run's folder.
    """

    def __init__(self, *, save_dir: str) -> None:
        super().__init__(save_dir, name="csv", version="")
        self.purge_step: int | None = None

    def resume_from(self, step: int) -> None:
        self.purge_step = step

    @property
    @rank_zero_experiment
    def experiment(self) -> "ExperimentWriter | Silent":
        with self.forgiving():
            if self._experiment is None and not self.failed:
                self._experiment = AppendingWriter(self.log_dir, self.purge_step)
        return self._experiment if isinstance(self._experiment, AppendingWriter) else Silent()


class AppendingWriter(ExperimentWriter):
    """Write ``metrics.csv`` so that a kill at any moment leaves complete rows.

    Args:
        log_dir: the folder of the file.
        purge_step: drop the rows of an existing file from this step on; None: keep all.
    """

    def __init__(self, log_dir: str, purge_step: int | None) -> None:
        self.purge_step = purge_step
        super().__init__(log_dir)
        self.metrics_keys = self._kept_keys

    def _check_log_dir_exists(self) -> None:
        """Keep the rows before ``purge_step``, but not the test metrics, which a resumed run measures again.

        The parent's method deletes the file.

        Raises:
            OSError: the file can't be read, or has no column "step".
        """
        self._kept_keys: list[str] = []
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        rows = self._read_all()
        if rows:
            self._kept_keys = list(rows[0])
            last = float("inf") if self.purge_step is None else self.purge_step - 1
            ends = [] if self.purge_step is None else [key for key in rows[0] if f"{key}".startswith("test/")]
            whole = [row for row in rows if None not in row.values() and None not in row]
            whole = [row for row in whole if not any(row[key] for key in ends)]
            try:
                kept = [row for row in whole if int(row["step"]) <= last]
            except (KeyError, ValueError) as error:
                raise OSError(f"{path} holds no metrics by step") from error
            self._write_all(kept, self._kept_keys)

    def _read_all(self) -> list[dict[str, Any]]:
        """Read the file's rows.

        Raises:
            OSError: the file can't be read.
        """
        path = Path(self.metrics_file_path)
        try:
            text = read_file(path, most=MOST_CURVES).decode()
            return list(csv.DictReader(io.StringIO(text, newline="")))
        except (ValueError, csv.Error) as error:
            raise OSError(f"{path} can't be read: {error}") from error

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write_all(self._read_all(), fieldnames)

    def _write_all(self, rows: list[dict[str, Any]], fieldnames: list[str]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(Path(self.metrics_file_path), text.getvalue().encode())
