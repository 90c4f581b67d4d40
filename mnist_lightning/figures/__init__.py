"""Draw all figures of the project: each function takes arrays and returns a matplotlib ``Figure``.

The functions open no window, do not use pyplot's global state, and know nothing about trainers or runs.
"""

from mnist_lightning.figures.charts import (
    curves,
    heat_map,
    learning_curves,
    learning_rates,
    parameter,
)
from mnist_lightning.figures.counts import (
    class_counts,
    confusion_matrices,
    confusion_matrix,
    pixel_histogram,
    reliability_diagram,
    risk_coverage,
)
from mnist_lightning.figures.explanations import explanation
from mnist_lightning.figures.film import film_frames
from mnist_lightning.figures.sheets import (
    first_layer,
    first_layers,
    images,
    mean_images,
    mistakes,
    prediction,
    several,
)
from mnist_lightning.figures.style import save, save_animation, show, to_array

__all__ = [
    "class_counts",
    "confusion_matrices",
    "confusion_matrix",
    "curves",
    "explanation",
    "film_frames",
    "first_layer",
    "first_layers",
    "heat_map",
    "images",
    "learning_curves",
    "learning_rates",
    "mean_images",
    "mistakes",
    "parameter",
    "pixel_histogram",
    "prediction",
    "reliability_diagram",
    "risk_coverage",
    "save",
    "save_animation",
    "several",
    "show",
    "to_array",
]
