"""Read a run's metrics by epoch."""

import csv
import io
import math
from pathlib import Path

from mnist_lightning.rundir.outside import read_file

MOST_EPOCHS = 10**9  # a larger number means that the file is damaged

Curve = tuple[list[int], list[float]]  # epochs, counted from 1, and the values after them


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read what a run has logged by epoch in its ``csv/metrics.csv``.

    Args:
        folder: the run's folder.  A link in it is not followed.

    Returns:
        The curve of each metric of training and validation, such as "val/acc".  Values that are not finite
        are left out.  Empty if the run has no such file.

    Raises:
        OSError: the file can't be read, or its content is damaged.
    """
    path = folder / "csv" / "metrics.csv"
    if not path.exists() or path.is_symlink() or path.parent.is_symlink():
        return {}
    curves: dict[str, Curve] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_file(path).decode(), newline="")):
            for metric in row:
                if row[metric] and metric.startswith(("train/", "val/")) and metric != "train/loss_step":
                    epoch, value = int(row["epoch"]), float(row[metric])
                    if 0 <= epoch < MOST_EPOCHS and math.isfinite(value):
                        epochs, values = curves.setdefault(metric, ([], []))
                        epochs.append(epoch)
                        values.append(value)
    except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise OSError(f"the curves of {folder} can't be read: {error}") from error
    return curves
