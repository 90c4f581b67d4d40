"""Use the project from Python: compose settings, train, and load and use trained nets.

``mnist_lightning.train("model.hidden=256")`` calls ``launch``, which composes the settings and then does
what the command does.  The process belongs to the user: after a run, its global state is restored.
"""

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from mnist_lightning import threads, workarounds
from mnist_lightning.config import CONF_DIR, ConfigError, Train, check, register
from mnist_lightning.rundir import signals
from mnist_lightning.rundir.claim import prepare
from mnist_lightning.rundir.curves import read_curves
from mnist_lightning.rundir.find import find_checkpoint, lack_of
from mnist_lightning.rundir.notebook import in_notebook, to_table
from mnist_lightning.rundir.outside import expand_home, read_json
from mnist_lightning.rundir.status import let_go, read, show_with_unit
from mnist_lightning.sweeps.resume import rewrite_arguments

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from mnist_lightning.classifier import DigitClassifier
    from mnist_lightning.data import MNISTDataModule
    from mnist_lightning.evaluation.explanation import Explanation
    from mnist_lightning.evaluation.scores import Evaluation

    Images = str | Path | Sequence[str | Path] | NDArray[Any] | Tensor

log = logging.getLogger(__name__)

ALONE = threading.Lock()  # one run at a time: Lightning and torch keep global state
DATED = "%(asctime)s %(levelname)s %(name)s: %(message)s"  # as in conf/hydra/job_logging/train.yaml
OURS = ("mnist_lightning", "lightning.pytorch", "lightning.fabric")


def compose(*overrides: str) -> Train:
    """Compose and check the settings of a run, as ``python -m mnist_lightning.train`` does.

    Args:
        overrides: arguments as on the command line, such as ``"model.hidden=256"``, ``"experiment=strong"``
            or ``"--config-dir=mine"``.

    Raises:
        ConfigError: a setting can't be used.
        HydraException: an argument names no setting.
    """
    with short_errors():
        config, _ = compose_run(overrides)
        return check(config, Train)


def compose_run(overrides: Sequence[str]) -> tuple[DictConfig, Any]:
    """Compose a run's config, without changing Hydra's state in this process.

    Returns:
        The config with Hydra's own node, and Hydra's config loader.

    Raises:
        ConfigError, HydraException: see ``compose``.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.types import RunMode

    for override in overrides:
        if not isinstance(override, str):
            raise ConfigError(
                f'settings are given as text, as in train("model.hidden=256"), got {override!r}'
            )
    register()
    flags, settings = split_flags(rewrite_arguments(overrides))
    with workarounds.hydra_as_it_was():
        search_path = create_config_search_path(CONF_DIR)
        if "--config-dir" in flags:
            folder = expand_home(flags["--config-dir"]).absolute()
            if why := lack_of("folder", folder):
                raise ConfigError(f"--config-dir={flags['--config-dir']}: {why}")
            search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
        loader = ConfigLoaderImpl(config_search_path=search_path)
        try:
            config = loader.load_configuration(
                config_name=flags.get("--config-name", "train"),
                overrides=settings,
                run_mode=RunMode.RUN,
                from_shell=False,
            )
        except SystemExit as error:  # its value is a line that says what is wrong
            raise ConfigError(str(error)) from error
    return config, loader


def split_flags(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the flags ``--config-dir`` and ``--config-name`` from the settings.

    Returns:
        The flags by long name, and the settings.

    Raises:
        ConfigError: there is another flag, such as ``--multirun``.
    """
    flags: dict[str, str] = {}
    settings: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, sign, value = argument.partition("=")
        name = {"-cd": "--config-dir", "-cn": "--config-name"}.get(name, name)
        if name in ("--config-dir", "--config-name"):
            flags[name] = value if sign else next(rest, "")
        elif name in ("-m", "--multirun"):
            raise ConfigError("train(…) trains one net; python -m mnist_lightning.train -m … runs a sweep")
        elif argument.startswith("-"):
            raise ConfigError(f"{argument} works on the command line only; Python takes --config-dir")
        else:
            settings.append(argument)
    return flags, settings


class Run:
    """A run's results, final or so far.

    Attributes:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def state(self) -> str:
        """The run's state: "completed", "interrupted", "failed", "running", or "unknown" without a status."""
        status = read(self.folder)
        return "unknown" if status is None else status.state

    @property
    def metrics(self) -> dict[str, Any]:
        """The contents of ``metrics.json``; empty if the run has not ended.

        Raises:
            OSError: the file can't be read.
        """
        path = self.folder / "metrics.json"
        return read_json(path) if path.is_file() else {}

    def load(self) -> "TrainedNet":
        """Load the net of the best epoch; see ``load`` for what is raised."""
        return load(self.folder)

    def show(self) -> "Figure":
        """Draw loss and metrics by epoch; a notebook shows the figure if this is a cell's last line.

        Raises:
            OSError: the run has logged no epoch.
        """
        from mnist_lightning import figures

        curves = read_curves(self.folder)
        if not curves:
            raise OSError(
                f"{self.folder} has no curves (csv/metrics.csv): no epoch has ended, or logger=none"
            )
        return figures.curves({self.folder.name: curves})

    def _scores(self) -> list[tuple[str, str]]:
        scores = {key: value for key, value in self.metrics.items() if key.startswith(("test/", "val/"))}
        return [(key, show_with_unit(key, value)) for key, value in scores.items()]

    def __repr__(self) -> str:
        scores = "".join(f", {key} {value}" for key, value in self._scores())
        return f"Run({str(self.folder)!r}): {self.state}{scores}"

    def _repr_html_(self) -> str:
        metrics = self.metrics
        rows = [["state", self.state], *map(list, self._scores())]
        rows += [[key, metrics[key]] for key in ("epochs", "train_seconds") if key in metrics]
        return to_table([*rows, ["folder", self.folder]])


def launch(work: Callable[[Train, Path, Sequence[str]], object], overrides: Sequence[str]) -> Run:
    """Train one net in this process.

    Args:
        work: trains with checked settings, the run's folder and its overrides.
        overrides: arguments as on the command line.

    Returns:
        The run.  Ctrl-C, or interrupting a notebook's cell, ends it early with its last step saved.

    Raises:
        Exception: any error that the command would print as a line.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.utils import run_job
    from hydra.types import HydraContext

    with ALONE, short_errors():
        config, loader = compose_run(overrides)
        settings = check(config, Train)
        strategy = str(settings.trainer.get("strategy", "auto"))
        if strategy != "auto":
            raise ConfigError(
                f"trainer.strategy={strategy} starts more processes, which works on the command line only:"
                f" python -m mnist_lightning.train {' '.join(overrides)}"
            )
        try:
            prepare(config, "run")
        except SystemExit:  # the run that resume= names has finished already
            return Run(str(config.hydra.run.dir))
        folder = Path(str(config.hydra.run.dir))
        errors: list[Exception] = []

        def job(_: DictConfig) -> None:
            try:
                work(settings, folder, list(config.hydra.overrides.task))
            except Exception as error:
                errors.append(error)

        with ExitStack() as stack:
            stack.callback(let_go, folder)  # releases the folder if the run fails early
            stack.enter_context(workarounds.process_as_it_was())
            stack.enter_context(workarounds.hydra_as_it_was())
            stack.enter_context(told(folder / "train.log"))
            stack.enter_context(signals.borrowed())
            try:
                context = HydraContext(config_loader=loader, callbacks=Callbacks())
                run_job(job, config, "hydra.run.dir", None, context, configure_logging=False)
            except (SystemExit, KeyboardInterrupt):
                if not signals.received():
                    raise
        if errors:
            raise errors[0]
        return Run(folder)


@contextmanager
def short_errors() -> Iterator[None]:
    """Make IPython show errors that a command would print as a line as one line, without a traceback."""
    try:
        yield
    except CompactHydraException as error:
        line = f"{type(error).__name__}: {error}"
        vars(error)["_render_traceback_"] = lambda: [line]  # IPython calls this
        raise


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Print this project's and Lightning's messages within the block, and append them to a file.

    Afterwards the loggers are restored.
    """
    handlers: list[logging.Handler] = [
        logging.StreamHandler(sys.stdout),
        logging.FileHandler(file, encoding="utf-8"),
    ]
    if in_notebook():  # a notebook shows the epochs in a line that is drawn anew
        handlers[0].addFilter(lambda record: not record.name.endswith(".progress"))
    handlers[1].setFormatter(logging.Formatter(DATED))
    loggers = [logging.getLogger(name) for name in OURS]
    before = [(one, one.level, one.propagate, one.handlers[:]) for one in loggers]
    for one in loggers:
        one.handlers[:], one.propagate = handlers, False
    loggers[0].setLevel(logging.INFO)
    try:
        yield
    finally:
        for one, level, propagate, its in before:
            one.level, one.propagate, one.handlers[:] = level, propagate, its
        for handler in handlers:
            with contextlib.suppress(OSError):
                handler.close()


@dataclass(frozen=True)
class Prediction:
    """Predicted classes of one image or many; ``labels, probabilities = prediction`` unpacks them.

    Attributes:
        labels: the most probable class of each image, (N,) int64; for one image an int.
        probabilities: the probability of each class, (N, num_classes) float32; for one image (num_classes,).
        class_names: name of each class.
        told: "sure", "not sure" or "no digit" for each image, as ``predict`` prints it; for one image a str.
    """

    labels: "NDArray[np.int64] | int"
    probabilities: "NDArray[np.float32]"
    class_names: tuple[str, ...]
    told: Sequence[str] | str = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.labels, self.probabilities))

    def _rows(self) -> list[tuple[str, str]]:
        import numpy as np

        labels = np.atleast_1d(self.labels)
        largest = np.atleast_2d(self.probabilities).max(axis=1) if len(labels) else []
        each = [self.told] if isinstance(self.told, str) else self.told or ["sure"] * len(labels)
        return [
            (self.class_names[label], f"{100 * probability:.1f} %" + f", {told}" * (told != "sure"))
            for label, probability, told in zip(labels, largest, each, strict=True)
        ]

    def __repr__(self) -> str:
        rows = self._rows()
        more = f", and {len(rows) - 10:,} more" if len(rows) > 10 else ""
        return ", ".join(f"{name} ({probability})" for name, probability in rows[:10]) + more

    def _repr_html_(self) -> str:
        return to_table([list(row) for row in self._rows()[:100]], header=["class", "probability"])


@dataclass(frozen=True)
class Scores:
    """Scores of a net on a split.

    Attributes:
        metrics: the scores, as in the metrics.json of ``evaluate``.
        figures: figures by name; a notebook shows one that is a cell's last line.
        table: the scores as text, as ``evaluate`` prints them.
        class_names: name of each class, in the order of the net's outputs.
    """

    metrics: dict[str, Any]
    figures: "dict[str, Figure]"
    table: str
    class_names: tuple[str, ...]

    def __repr__(self) -> str:
        return self.table

    def _repr_html_(self) -> str:
        plain = {key: value for key, value in self.metrics.items() if isinstance(value, (int, float, str))}
        rows = [[key, f"{value:.4g}" if isinstance(value, float) else value] for key, value in plain.items()]
        columns = ("precision", "recall", "f1", "support")
        if "f1" not in self.metrics:
            return to_table(rows)
        cells = zip(self.class_names, *(self.metrics[column] for column in columns), strict=True)
        by_class = [[name, *map(show_share, shares), count] for name, *shares, count in cells]
        return to_table(rows) + to_table(by_class, header=["class", *columns])


def show_share(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


class TrainedNet:
    """A trained net that can predict, be evaluated and be explained.

    Attributes:
        path: the checkpoint file.
        classifier: the classifier with its net, preprocessing and loss, in eval mode.
        class_names: name of each class, in the order of the net's outputs.
    """

    def __init__(
        self, path: Path, classifier: "DigitClassifier", checkpoint: dict[str, Any], trust: Any
    ) -> None:
        self.path, self.classifier = path, classifier
        self.class_names = tuple(classifier.class_names)
        self._checkpoint, self._trust = checkpoint, trust

    @property
    def settings(self) -> dict[str, Any]:
        """The checkpoint's settings of net, loss, metrics, preprocessing and data, as plain values."""
        return dict(self._checkpoint["hyper_parameters"]) | {
            "data": dict(self._checkpoint["datamodule_hyper_parameters"])
        }

    @functools.cached_property
    def data(self) -> "MNISTDataModule":
        """The run's data in the run's splits; ``data.splits["test"].images`` are (N, H, W) uint8.

        Raises:
            OSError: the data is no longer where the run read it, or has changed since the training.
        """
        from mnist_lightning.evaluation.trained import load_data

        with workarounds.usual_torch():
            return load_data(self.path, self._checkpoint, data_dir=None, trust=self._trust)

    def predict(self, images: "Images") -> Prediction:
        """Predict the class of each image.

        Args:
            images: a picture's file or a list of files, which are prepared as the command ``predict`` does;
                or an array or tensor of the net's image size.  One image is (H, W), (C, H, W) or (H, W, C);
                many are (N, H, W), (N, C, H, W) or (N, H, W, C).  For a net of grey images, three axes always
                mean (N, H, W).  Pixels are uint8 in [0, 255] or floating-point numbers in [0, 1]; the type
                decides which, never the values.

        Raises:
            OSError: a file can't be read.
            ValueError: the images have another shape, type or range, nothing stands out in a picture, or
                the net is a regression.
        """
        import numpy as np
        import torch

        from mnist_lightning.evaluation.confidence import answer

        if not self.classifier.names_classes:
            raise ValueError(f"{self.path} is a regression without classes: call net.classifier(images)")
        stored, single = self._prepare(images)
        if not len(stored):
            nothing = np.empty((0, len(self.class_names)), np.float32)
            return Prediction(nothing.argmax(axis=1), nothing, self.class_names)
        with self._computing(len(stored)):
            said = answer(self.classifier, torch.from_numpy(stored))
        labels = said.probabilities.argmax(axis=1)
        if single:
            return Prediction(int(labels[0]), said.probabilities[0], self.class_names, said.told[0])
        return Prediction(labels, said.probabilities, self.class_names, said.told)

    @contextmanager
    def _computing(self, num_images: int) -> Iterator[None]:
        """Use as many threads as pay for this many images; restore the user's number afterwards."""
        from mnist_lightning.evaluation.trained import choose_threads

        with workarounds.usual_torch(), threads.use(choose_threads([self.classifier], num_images, None)):
            yield

    def _prepare(self, images: "Images") -> "tuple[NDArray[Any], bool]":
        """Convert images to the form in which they are stored, as for ``predict``.

        Returns:
            (N, H, W) or (N, H, W, 3), uint8 or float32 in [0, 255], and whether a single image was given.
        """
        import numpy as np

        if isinstance(images, (str, Path)):
            return self._read(images)[None], True
        if isinstance(images, Sequence):
            return np.stack([self._read(file) for file in images]), False
        channels, height, width = self.classifier.image_shape
        array = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)
        if array.dtype == np.uint8:
            scale = 1
        elif np.issubdtype(array.dtype, np.floating):
            if array.size and not (array.min() >= 0 and array.max() <= 1):  # NaN too
                raise ValueError(
                    f"images of floating-point numbers must be in [0, 1], got {array.min():g} to"
                    f" {array.max():g}: divide by 255, or give uint8"
                )
            scale = 255
        else:
            raise ValueError(f"images must be uint8 in [0, 255] or floats in [0, 1], got {array.dtype}")
        if channels == 1:
            single = array.shape == (height, width)
            array = array[None] if single else array
            if array.shape[1:] in ((1, height, width), (height, width, 1)):
                array = array.reshape(len(array), height, width)
        else:
            single = array.shape in ((channels, height, width), (height, width, channels))
            array = array[None] if single else array
            if array.shape[1:] == (channels, height, width):
                array = np.moveaxis(array, 1, -1)
        if array.shape[1:] != ((height, width) if channels == 1 else (height, width, channels)):
            one = f"({height}, {width})" if channels == 1 else f"({channels}, {height}, {width})"
            raise ValueError(
                f"the net takes images of {one}, one or many (N, …), got {tuple(np.shape(images))};"
                " give a picture of another size as a file: net.predict('picture.png')"
            )
        if scale == 1:
            return np.ascontiguousarray(array), single
        return np.ascontiguousarray(array, np.float32) * np.float32(scale), single

    def _read(self, file: str | Path) -> "NDArray[np.uint8]":
        from mnist_lightning.images.handwriting import read_pixels
        from mnist_lightning.images.known import draws_like_mnist
        from mnist_lightning.images.normalize import NoDigit

        path = expand_home(file)
        data = self._checkpoint["datamodule_hyper_parameters"]
        try:
            _, pixels = read_pixels(path, self.classifier.image_shape, as_mnist=draws_like_mnist(data))
        except NoDigit as error:
            raise ValueError(f"{file}: {error}") from error
        return pixels

    def explain(self, image: "Images", *, nearest: bool = True) -> "Explanation":
        """Explain the net's answer for one image, in words (``print``) and as a figure (``.draw()``).

        Args:
            image: one image, as for ``predict``.
            nearest: whether to find the training images whose last hidden layer is most like the image's.

        Raises:
            OSError: the file can't be read; with ``nearest``, also for the reasons of ``data``.
            ValueError: these are several images; else see ``predict``.
        """
        import torch

        from mnist_lightning.evaluation.explanation import explain, find_nearest

        stored, _ = self._prepare(image)
        if len(stored) != 1:
            raise ValueError(f"explain takes one image, got {len(stored)}")
        training = self.data.splits["train"] if nearest else None
        with self._computing(len(training) if training else 1):
            asked = torch.from_numpy(stored)
            near = find_nearest(self.classifier, asked, training)[0] if training else None
            return explain(self.classifier, asked[0], nearest=near)

    def evaluate(self, split: str = "val") -> Scores:
        """Evaluate the net on a split of its run's data.

        Args:
            split: "train", "val" or "test".  Read the test images only once, at the end of your work.

        Raises:
            OSError: the run had no such split; else see ``data``.
            ValueError: no split has this name.
        """
        from mnist_lightning.evaluate import draw, tabulate, to_metrics
        from mnist_lightning.evaluation.scores import score
        from mnist_lightning.evaluation.trained import compute_outputs, find_split, measure

        if split not in ("train", "val", "test"):
            raise ValueError(f"split must be train, val or test, got {split!r}")
        images = find_split(self.data, split)
        with self._computing(len(images)):
            outputs = compute_outputs(self.classifier, images.images)
            own = measure(self.classifier, outputs, images.labels)
        if not self.classifier.names_classes:
            lines = [f"{key:13} {show_with_unit(key, value)}" for key, value in own.items()]
            return Scores(
                {"split": split, "images": len(images)} | own, {}, "\n".join(lines), self.class_names
            )
        evaluation: Evaluation = score(
            images.labels.numpy(), outputs.log_softmax(dim=1).numpy(), self.classifier.temperature
        )
        title = f"{self.data.name} {split}"
        return Scores(
            {"split": split, "images": len(images)} | to_metrics(evaluation) | {"own": own},
            draw(evaluation, images.images.numpy(), list(self.class_names), title),
            tabulate(evaluation, list(self.class_names)),
            self.class_names,
        )

    def __repr__(self) -> str:
        name = type(self.classifier.net).__name__
        return f"TrainedNet({str(self.path)!r}): {name}, {len(self.class_names)} classes"


def load(run: str | Path = "latest", *, trust: Any = None) -> TrainedNet:
    """Load the trained net of a run.

    Args:
        run: a run's folder, a checkpoint file, or "latest" for the newest run under ``logs/``.
        trust: your modules that the checkpoint may import, such as "my_nets"; a name or a list.

    Raises:
        OSError: there is no such checkpoint, or it can't be read.
        TrustError: the checkpoint names code that is not trusted.
    """
    path = find_checkpoint(str(run))

    from mnist_lightning.evaluation.trained import load_classifier

    with workarounds.usual_torch():
        classifier, checkpoint = load_classifier(path, trust=trust)
    return TrainedNet(path, classifier, checkpoint, trust)
