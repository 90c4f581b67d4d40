"""Define the types and limits of all settings; their values are in ``conf/``.

``check`` turns every config, composed or saved, into checked values.  This module imports nothing heavier
than Hydra and OmegaConf, so that a mistake is reported at once.
"""

import ast
import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mnist_lightning.images.known import KNOWN, OF_A_PATH, check_sizes
from mnist_lightning.settings_help import describe_settings, name_changes, without_hydra
from mnist_lightning.targets import TargetError, check_hints, choose_mode, is_finite, is_whole, read_hint

log = logging.getLogger(__name__)

# conf/ is inside the package in a wheel, and beside it in a clone
CONF_DIR = next(
    str(path)
    for path in (Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf")
    if path.is_dir()
)

ACTIVATIONS = ("relu", "leaky_relu", "elu", "gelu", "tanh")
NORMS = ("none", "batch", "layer")
RUN_DIR = "RUN_DIR"  # the value of ${run_dir:}; train replaces it by the run's folder
# Groups that build one object -> whether it is required
GROUPS = {"model": True, "loss": True, "optimizer": True, "scheduler": False, "trainer": True}
RESERVED = ("loss", "loss_step")  # names of curves that every run logs beside its metrics
ACCURACIES = ("torchmetrics.Accuracy", "torchmetrics.classification.MulticlassAccuracy")
DIGITS = tuple(name for name, known in KNOWN.items() if known.class_names == tuple("0123456789"))
PREPROCESS = ("mean", "std", "deskew", "augment")
USELESS = {  # arguments of Trainer that would silently do nothing -> why
    "limit_predict_batches": "is for Trainer.predict, which no run calls",
    "model_registry": "is for Lightning's ModelCheckpoint; a run writes its own checkpoints",
}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16", "None")
MAX_SEED = 2**32 - 1  # the largest seed that NumPy accepts
MAX_THREADS = 1024  # OpenMP's libraries end the process if the system can't start so many threads


class ConfigError(CompactHydraException):
    """A setting can't be used; Hydra prints the message without a traceback."""


@dataclass
class Augment:
    """Amounts by which each training image is deformed at random (``data/augment=``), see ``Deformation``."""

    rotation: float
    scale: float
    shear: float
    shift: float
    elastic: float
    smoothness: float
    flags: float

    def __post_init__(self) -> None:
        for key, most, unit in (("rotation", 180, " degrees"), ("scale", 0.9, ""), ("shear", 60, " degrees")):
            self._check(key, 0, most, unit)
        self._check("flags", 0, 1, "")

    def check_shape(self, height: int, width: int) -> None:
        """Check the amounts in pixels against the size of the images, in pixels.

        Raises:
            ValueError: an amount is too large for images of this size.
        """
        for key in ("shift", "elastic"):
            self._check(key, 0, min(height, width) // 2, " pixels")
        largest = max(height, width)
        self._check("smoothness", 1, largest if self.elastic else max(largest, self.smoothness), " pixels")

    def _check(self, key: str, least: int, most: float, unit: str) -> None:
        value = getattr(self, key)
        require(least <= value <= most, f"data.augment.{key} must be in [{least}, {most}]{unit}, got {value}")

    @property
    def deforms(self) -> bool:
        return any((self.rotation, self.scale, self.shear, self.shift, self.elastic, self.flags))


@dataclass
class Data:
    """Settings of the data set: its source, splits, batches and preprocessing (``data=``)."""

    name: str
    data_dir: str
    batch_size: int
    val_size: int | None
    split_seed: int
    num_workers: int
    mean: Any  # float, list of float, or None
    std: Any  # float, list of float, or None
    deskew: bool
    augment: Augment
    path: str | None = None
    size: int | None = None
    grey: bool = False
    source: Any = None  # dict
    num_folds: int | None = None
    fold: int | None = None
    train_size: int | None = None

    def __post_init__(self) -> None:
        self._check_source()
        at_least("data.batch_size", self.batch_size, 1)
        check_seed("data.split_seed", self.split_seed)
        at_least("data.num_workers", self.num_workers, 0)
        self._check_folds()
        for key, holds, wanted in (
            ("mean", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("std", lambda x: 0 < x <= 1, "in (0, 1]"),
        ):
            value = getattr(self, key)
            for number in value if isinstance(value, list) else [] if value is None else [value]:
                check_number(f"data.{key}", number, holds, wanted)
        if self.source is None and self.name in KNOWN:
            known = KNOWN[self.name]
            self._check_shape(known.image_shape)
            if known.num_train is not None:
                check_sizes(
                    known.num_train,
                    batch_size=self.batch_size,
                    val_size=self.val_size,
                    num_folds=self.num_folds,
                    train_size=self.train_size,
                )
        at_least("data.val_size", self.val_size or 0, 0)
        require(
            not self.augment.flags or (self.source is None and self.name in DIGITS),
            f"data.augment.flags draws strokes on digits 1: it is for data={'/'.join(DIGITS)},"
            f" not for data={self.name}",
        )

    def _check_folds(self) -> None:
        at_least("data.train_size", 1 if self.train_size is None else self.train_size, 1)
        if self.num_folds is None:
            require(self.fold is None, f"data.fold={self.fold} needs data.num_folds, say data.num_folds=5")
            return
        at_least("data.num_folds", self.num_folds, 2)
        require(
            self.fold is not None,
            f"data.num_folds={self.num_folds} needs data.fold, in [0, {self.num_folds - 1}]; -m"
            f" folds={self.num_folds} trains on all of them",
        )
        assert self.fold is not None
        require(
            0 <= self.fold < self.num_folds,
            f"data.fold must be in [0, {self.num_folds - 1}] with data.num_folds={self.num_folds},"
            f" got {self.fold}",
        )

    def _check_source(self) -> None:
        require(
            self.source is None or isinstance(self.source, dict),
            f"data.source must be settings with a _target_, or null, got {self.source!r}",
        )
        self.source = self.source or None
        if self.source is not None or self.name == "own":
            require("_target_" in (self.source or {}), "data.source names no _target_")
        else:
            one_of("data.name", self.name, (*KNOWN, *OF_A_PATH))
        of_a_path = self.source is None and self.name in OF_A_PATH
        require(
            of_a_path == (self.path is not None),
            f"data={self.name} needs data.path=…"
            if of_a_path
            else f"data.path is not for data={self.name}: only data=folder and data=npz read it",
        )
        for key, given in (("size", self.size is not None), ("grey", self.grey)):
            require(self.name == "folder" or not given, f"data.{key} is for data=folder only")
        at_least("data.size", 1 if self.size is None else self.size, 1)

    @property
    def has_validation(self) -> bool:
        return self.num_folds is not None or self.val_size != 0

    def check_shape(self, image_shape: Sequence[int]) -> None:
        """Check the settings against the shape of the images.

        Args:
            image_shape: (C, H, W) of the images that were read.

        Raises:
            ConfigError: a setting does not fit the images.
        """
        try:
            self._check_shape(image_shape)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _check_shape(self, image_shape: Sequence[int]) -> None:
        channels, height, width = image_shape
        self.augment.check_shape(height, width)
        require(
            channels == 1 or not self.deskew,
            f"data.deskew is for grey images, and the images of {self.name} are in colour",
        )
        for key in ("mean", "std"):
            value = getattr(self, key)
            require(
                not isinstance(value, list) or len(value) in (1, channels),
                f"data.{key} must be one number, or one for each of {channels} channels, got {value}",
            )

    def module_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for ``MNISTDataModule``, except ``seed``."""
        return {name: value for name, value in asdict(self).items() if name not in PREPROCESS}

    def preprocess_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for ``Preprocess``."""
        arguments = {name: value for name, value in asdict(self).items() if name in PREPROCESS}
        return arguments if self.augment.deforms else arguments | {"augment": None}


@dataclass
class FeedForward:
    """The settings of ``network.FeedForward`` (``model=mlp``)."""

    hidden: Any  # int or list of int: structured configs have no type for the union of the two
    activation: str
    dropout: float
    norm: str
    input_noise: float
    noise: float

    def __post_init__(self) -> None:
        sizes = self.hidden if isinstance(self.hidden, list) else [self.hidden]
        require(
            all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes),
            f"model.hidden must be a whole number >= 1 or a list of such, got {self.hidden}",
        )
        self.hidden = sizes
        one_of("model.activation", self.activation, ACTIVATIONS)
        one_of("model.norm", self.norm, NORMS)
        require(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), got {self.dropout}")
        for key in ("input_noise", "noise"):
            check_number(f"model.{key}", getattr(self, key), *NOT_NEGATIVE)
        for key, idle in (("dropout", 0), ("norm", "none"), ("noise", 0)):
            value = getattr(self, key)
            require(
                bool(self.hidden) or value == idle,
                f"model.{key}={value} acts on hidden layers, and model.hidden=[] has none",
            )


@dataclass
class DirectionNet(FeedForward):
    """The settings of ``network.DirectionNet`` (``model=directions``)."""

    directions: int
    spacing: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("directions", "spacing"):
            at_least(f"model.{key}", getattr(self, key), 1)


@dataclass
class CrossEntropy:
    """The settings of ``losses.CrossEntropy`` (``loss=cross_entropy``)."""

    label_smoothing: float

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 1,
            f"loss.label_smoothing must be in [0, 1), got {self.label_smoothing}",
        )


@dataclass
class VirtualAdversarial(CrossEntropy):
    """The settings of ``losses.VirtualAdversarial`` (``loss=virtual_adversarial``)."""

    epsilon: float
    weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("epsilon", "weight"):
            check_number(f"loss.{key}", getattr(self, key), *POSITIVE)


# Our classes that a _target_ may name -> the types and limits of their arguments
SCHEMAS: dict[str, type[Any]] = {
    "mnist_lightning.network.FeedForward": FeedForward,
    "mnist_lightning.network.DirectionNet": DirectionNet,
    "mnist_lightning.losses.CrossEntropy": CrossEntropy,
    "mnist_lightning.losses.VirtualAdversarial": VirtualAdversarial,
}


@dataclass
class Monitor:
    """Settings of the validation metric that chooses the best epoch and that a sweep optimises."""

    metric: str
    mode: str | None

    def __post_init__(self) -> None:
        if self.mode is not None:
            one_of("monitor.mode", self.mode, ("max", "min"))


@dataclass
class CheckpointSchedule:
    """How often ``last.ckpt`` is written within an epoch; it is always written at the end of an epoch."""

    every_n_steps: int | None
    every_n_seconds: float | None

    def __post_init__(self) -> None:
        if self.every_n_steps is not None:
            at_least("checkpoint.every_n_steps", self.every_n_steps, 1)
        if self.every_n_seconds is not None:
            check_number("checkpoint.every_n_seconds", self.every_n_seconds, *POSITIVE)


@dataclass
class Train:
    """Settings of ``python -m mnist_lightning.train``.

    ``data`` has types.  Net, loss, metrics, optimizer, schedule, trainer, callbacks and loggers may be any
    class that their ``_target_`` names: ``SCHEMAS`` has the types of our classes, and ``_check_limits``
    checks common arguments of others.
    """

    seed: int
    test: bool
    resume: str | None
    trust: Any  # None, str or list of str; acts on a resumption, see trust.py
    decay_biases: bool
    ema_decay: float | None
    compile: bool
    monitor: Monitor
    checkpoint: CheckpointSchedule
    data: Data
    model: Any
    loss: Any
    metrics: Any
    optimizer: Any
    scheduler: Any
    trainer: Any
    callbacks: Any
    logger: Any
    watch: bool
    threads: int | None
    reproduce: str | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_threads(self.threads)
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay must be in (0, 1), or null for no average, got {self.ema_decay}",
        )
        for group in (*GROUPS, "metrics", "callbacks", "logger"):
            value = getattr(self, group) or {}
            require(
                isinstance(value, dict),
                f"{group} must be a choice of conf/{group}/ or settings of one, got {value!r}",
            )
            if group in GROUPS:
                required = GROUPS[group] or value
                require(not required or bool(value.get("_target_")), f"{group} names no _target_")
            for name, entry in value.items() if group in ("callbacks", "logger") else ():
                require(
                    not entry or isinstance(entry, dict),
                    f"{group}.{name} must be settings with a _target_, or null, got {entry!r}",
                )
                check_ours(f"{group}.{name}", entry or {})
            setattr(self, group, check_ours(group, value))
        self._check_monitor()
        self._check_packages()
        self._check_limits()
        self._check_trainer()
        self._check_combinations()

    @property
    def validates(self) -> bool:
        """Whether the run validates at all."""
        return self.data.has_validation and self.trainer.get("limit_val_batches") != 0

    def _check_monitor(self) -> None:
        names = ["val/loss", *(f"val/{name}" for name, metric in self.metrics.items() if metric)]
        for name, metric in self.metrics.items():
            require(
                name not in RESERVED, f"metrics.{name}: choose another name, every run logs {name} itself"
            )
            require(
                metric is None or (isinstance(metric, dict) and "_target_" in metric),
                f"metrics.{name} names no _target_",
            )
        metric = self.monitor.metric
        one_of("monitor.metric", metric, tuple(names))
        higher_is_better: bool | None = None  # None: only importing the metric would tell
        if metric == "val/loss":
            higher_is_better = False
        elif self.metrics[metric.removeprefix("val/")]["_target_"] in ACCURACIES:
            higher_is_better = True
        if self.monitor.mode or higher_is_better is not None:
            self.monitor.mode = choose_mode(metric, self.monitor.mode, higher_is_better)

    def _check_packages(self) -> None:
        for name, logger in self.logger.items():
            if str((logger or {}).get("_target_")).endswith(".WandbLogger"):
                spec = importlib.util.find_spec("wandb")
                require(
                    spec is not None and spec.origin is not None,  # W&B's folder wandb/ has no origin
                    f"logger.{name} needs the package wandb: pip install 'mnist_lightning[wandb]'",
                )

    def _check_limits(self) -> None:
        given = {key: value for key, value in self.trainer.items() if value is not None}
        for group, settings, limits in (
            ("optimizer", self.optimizer, OPTIMIZER_LIMITS),
            ("scheduler", self.scheduler, SCHEDULER_LIMITS),
            ("trainer", given, TRAINER_LIMITS),
            *(
                (f"callbacks.{name}", callback, EARLY_STOPPING_LIMITS)
                for name, callback in self.callbacks.items()
                if callback and callback.get("_target_") == EARLY_STOPPING
            ),
        ):
            if group == "scheduler" and not str(settings.get("_target_")).startswith("torch.optim."):
                continue  # others' arguments may have these names and another meaning
            for key in sorted(settings.keys() & limits.keys()):
                holds, wanted = limits[key]
                value = settings[key]
                require(holds(value), f"{group}.{key} must be {wanted}, got {value}")

    def _check_trainer(self) -> None:
        """Refuse arguments of Lightning's Trainer that a run can't use; docs/lightning.md lists them."""
        trainer = self.trainer
        for key, group in (("callbacks", "callbacks"), ("logger", "logger")):
            allowed = (None, False) if key == "logger" else (None,)
            require(
                trainer.get(key) in allowed,
                f"trainer.{key} can't be set: +{group}.mine._target_=… adds one, {group}=… chooses a file",
            )
        for key, why in USELESS.items():
            require(trainer.get(key) is None, f"trainer.{key} {why}")
        precision, strategy = str(trainer.get("precision")), str(trainer.get("strategy"))
        require(
            precision in PRECISIONS,
            f"trainer.precision must be one of {', '.join(PRECISIONS[:3])}, got {precision}: checkpoints hold"
            " weights of 32 bits",
        )
        require(
            not (precision in ("16-mixed", "16") and trainer.get("gradient_clip_val"))
            or not self.optimizer.get("fused"),
            "trainer.gradient_clip_val with trainer.precision=16-mixed needs optimizer.fused=false: a fused"
            " optimizer removes the scale of its gradients too late for clipping",
        )
        name = re.match(r"(ddp_(spawn|fork|notebook)|(fsdp|deepspeed|model_parallel|xla))", strategy)
        require(
            name is None,
            f"trainer.strategy={strategy} can't be used: "
            + (
                "its processes can't tell the run which checkpoint is the best; use trainer=ddp"
                if name and name[2]
                else "it splits checkpoints into several files, and a run writes each as one file"
            ),
        )

    def _check_combinations(self) -> None:
        max_epochs = self.trainer.get("max_epochs")
        scheduler = str(self.scheduler.get("_target_", ""))
        if not self.validates:
            has_split = self.data.has_validation
            why = (
                "trainer.limit_val_batches=0 validates nothing"
                if has_split
                else "data.val_size=0 leaves no validation split"
            )
            require("ReduceLROnPlateau" not in scheduler, f"scheduler=plateau watches val/loss, and {why}")
            for name, callback in self.callbacks.items():
                watched = str((callback or {}).get("monitor", self.monitor.metric))
                require(
                    "EarlyStopping" not in str((callback or {}).get("_target_"))
                    or not watched.startswith("val/"),
                    f"callbacks.{name} watches {watched}, and {why}",
                )
        require(
            max_epochs is not None
            or (self.trainer.get("max_steps") or -1) > 0
            or self.trainer.get("max_time") is not None,
            "trainer.max_epochs=null sets no end: give a number, trainer.max_steps or trainer.max_time",
        )
        require(
            not (max_epochs == -1 and "total_steps" in self.scheduler.values()),
            "scheduler needs the number of steps, and trainer.max_epochs=-1 sets no end",
        )
        step_size = self.scheduler.get("step_size")
        if isinstance(step_size, int) and isinstance(max_epochs, int) and 0 < max_epochs <= step_size:
            log.warning(
                "scheduler.step_size=%d has no effect: the run ends before, at trainer.max_epochs=%d",
                step_size,
                max_epochs,
            )


SPLITS = ("test", "val", "train")
MOST_TTA = 10_000  # deformations of each image: hours


@dataclass
class Evaluate:
    """Settings of ``python -m mnist_lightning.evaluate``; ``conf/evaluate.yaml`` explains each."""

    run: str
    checkpoint: str | None
    runs: Any  # list of str
    folds: str | None
    labels: bool
    tta: int
    split: str
    data_dir: str | None
    trust: Any  # None, str or list of str
    output: str | None
    threads: int | None
    device: str
    show: bool

    def __post_init__(self) -> None:
        one_of("split", self.split, SPLITS)
        check_threads(self.threads)
        check_device(self.device)
        check_source(self.run, self.checkpoint)
        require(0 <= self.tta <= MOST_TTA, f"tta must be in [0, {MOST_TTA}], got {self.tta}")
        if self.runs != []:
            self.runs = check_names("runs", self.runs, "runs=[A,B]", at_least=2)
            require(
                self.run == "latest" and self.checkpoint is None,
                "runs already names the nets to average: leave out run and checkpoint",
            )
        if self.folds is not None:
            require(
                self.run == "latest" and self.checkpoint is None and not self.runs,
                "folds already names the sweep whose nets are evaluated: leave out run, runs and checkpoint",
            )
        require(
            self.folds is not None or not self.labels,
            "labels=true needs nets that were not trained on the images they judge: give folds=<sweep folder>"
            " of python -m mnist_lightning.train -m folds=5",
        )


@dataclass
class Predict:
    """Settings of ``python -m mnist_lightning.predict``; ``conf/predict.yaml`` explains each."""

    images: Any  # str or list of str: structured configs have no type for the union of the two
    layout: str
    run: str
    checkpoint: str | None
    trust: Any  # None, str or list of str
    output: str
    threads: int | None
    device: str
    show: bool

    def __post_init__(self) -> None:
        check_threads(self.threads)
        check_device(self.device)
        one_of("layout", self.layout, ("auto", "one", "many"))
        self.images = check_names("images", self.images, "images=my_digit.png", at_least=1)
        check_source(self.run, self.checkpoint)


@dataclass
class Explain:
    """Settings of ``python -m mnist_lightning.explain``; ``conf/explain.yaml`` explains each."""

    images: Any  # str or list of str
    index: Any  # int or list of int
    mistakes: int
    split: str
    run: str
    checkpoint: str | None
    data_dir: str | None
    trust: Any  # None, str or list of str
    output: str
    threads: int | None
    show: bool

    def __post_init__(self) -> None:
        check_threads(self.threads)
        one_of("split", self.split, SPLITS)
        at_least("mistakes", self.mistakes, 0)
        self.index = self.index if isinstance(self.index, list) else [self.index]
        for number in self.index:
            check_number("index", number, *NOT_NEGATIVE, whole=True)
        asked = [self.images != [], self.index != [], self.mistakes > 0]
        require(
            sum(asked) == 1,
            "give one of images=my_digit.png, index=[3,7] and mistakes=12"
            + (", not several" if sum(asked) else ""),
        )
        if self.images != []:
            self.images = check_names("images", self.images, "images=my_digit.png", at_least=1)
        check_source(self.run, self.checkpoint)


@dataclass
class Compare:
    """Settings of ``python -m mnist_lightning.compare``; ``conf/compare.yaml`` explains each."""

    runs: Any  # list of str
    split: str
    data_dir: str | None
    trust: Any  # None, str or list of str
    output: str
    threads: int | None
    device: str
    show: bool

    def __post_init__(self) -> None:
        one_of("split", self.split, ("val", "test"))
        check_threads(self.threads)
        check_device(self.device)
        self.runs = check_names("runs", self.runs, "runs=[A,B]", at_least=2)


@dataclass
class Visualize:
    """Settings of ``python -m mnist_lightning.visualize``; ``conf/visualize.yaml`` explains each."""

    data: Data
    film: str | None
    output: str
    threads: int | None
    show: bool

    def __post_init__(self) -> None:
        check_threads(self.threads)


@dataclass
class Export:
    """Settings of ``python -m mnist_lightning.export``; ``conf/export.yaml`` explains each."""

    format: str
    film: bool
    run: str
    checkpoint: str | None
    data_dir: str | None
    trust: Any  # None, str or list of str
    output: str | None
    threads: int | None

    def __post_init__(self) -> None:
        one_of("format", self.format, ("onnx", "html"))
        require(not self.film or self.format == "html", "film=true is for the page: add format=html")
        require(not self.film or self.checkpoint is None, "film=true needs a run: a checkpoint has no film")
        check_source(self.run, self.checkpoint)
        check_threads(self.threads)


@dataclass
class Report:
    """Settings of ``python -m mnist_lightning.report``; ``conf/report.yaml`` explains each."""

    run: str
    runs: Any  # str or list of str
    filter: str | None
    under: str
    html: bool
    output: str | None
    data_dir: str | None
    trust: Any  # None, str or list of str

    def __post_init__(self) -> None:
        self.runs = check_names("runs", self.runs, "runs=[A,B]", at_least=0)
        given = [
            name
            for name, is_given in (
                ("run", self.run != "latest"),
                ("runs", bool(self.runs)),
                ("filter", self.filter is not None),
            )
            if is_given
        ]
        require(len(given) <= 1, f"{' and '.join(given)}: each names what to report, give only one of them")
        require(
            self.under == "logs" or self.filter is not None,
            f"under={self.under} is where filter searches: give filter",
        )
        require(self.html or self.output is None, "output names the page's file: add html=true")


@dataclass
class Runs:
    """Settings of ``python -m mnist_lightning.runs``; ``conf/runs.yaml`` explains each."""

    under: str
    filter: str | None
    sort: str
    columns: Any  # list of str
    average: str | None
    csv: str | None
    delete: Any  # str or list of str
    yes: bool

    def __post_init__(self) -> None:
        if self.average is not None:
            one_of("average", self.average, ("seed",))
        self.columns = check_names("columns", self.columns, "columns=[run,val/acc]", at_least=1)
        self.delete = check_names("delete", self.delete, "delete=logs/train/runs/A", at_least=0)


Limit = tuple[Callable[[Any], bool], str]  # a predicate, and the allowed values in words

POSITIVE: Limit = (lambda x: x > 0, "> 0")
NOT_NEGATIVE: Limit = (lambda x: x >= 0, ">= 0")
AT_LEAST_ONE: Limit = (lambda x: x >= 1, ">= 1")
# Limits that also check the type: Lightning and torch would take most other values without a word, or tell of
# them in a traceback.
SWITCH: Limit = (lambda x: isinstance(x, bool), "true or false")
COUNT: Limit = (lambda x: is_whole(x) and x >= 1, "a whole number >= 1")
WHOLE: Limit = (lambda x: is_whole(x) and x >= 0, "a whole number >= 0")
RATE: Limit = (lambda x: is_finite(x) and x > 0, "a finite number > 0")
WEIGHT: Limit = (lambda x: is_finite(x) and x >= 0, "a finite number >= 0")
SHARE: Limit = (lambda x: is_finite(x) and 0 <= x <= 1, "a number in [0, 1]")
FRACTION: Limit = (lambda x: is_finite(x) and 0 <= x < 1, "a finite number in [0, 1)")
PLANNED: Limit = (lambda x: COUNT[0](x) or x == "total_steps", "a whole number >= 1, or total_steps")
END: Limit = (lambda x: COUNT[0](x) or (is_whole(x) and x == -1), "a whole number >= 1, or -1 for no end")
OPTIMIZER_LIMITS: Mapping[str, Limit] = {
    "lr": RATE,
    "weight_decay": WEIGHT,
    "momentum": FRACTION,
    "alpha": FRACTION,
    "eps": (lambda x: isinstance(x, list) or RATE[0](x), RATE[1]),  # Adafactor has two
    **dict.fromkeys(("nesterov", "amsgrad", "centered"), SWITCH),
    "fused": (lambda x: x is None or isinstance(x, bool), "true, false or null"),
}
SCHEDULER_LIMITS: Mapping[str, Limit] = {
    **dict.fromkeys(("T_max", "total_steps"), PLANNED),
    **dict.fromkeys(("step_size", "T_0"), COUNT),
    "eta_min": WEIGHT,
    # one rate, or one for each group of weights
    "max_lr": (lambda x: all(map(RATE[0], x if isinstance(x, list) else [x])), RATE[1]),
    **dict.fromkeys(("gamma", "div_factor", "final_div_factor"), RATE),
    **dict.fromkeys(("factor", "pct_start"), SHARE),
    **dict.fromkeys(("patience", "cooldown"), WHOLE),
    "threshold": WEIGHT,
    "milestones": (lambda x: isinstance(x, list) and all(map(COUNT[0], x)), "a list of whole numbers >= 1"),
}
EARLY_STOPPING = "lightning.pytorch.callbacks.EarlyStopping"
EARLY_STOPPING_LIMITS: Mapping[str, Limit] = {"patience": WHOLE, "min_delta": WEIGHT}
AMOUNT: Limit = (
    lambda x: (is_whole(x) and x >= 0) or (isinstance(x, float) and 0 <= x <= 1),
    "a whole number of batches >= 0, or a fraction in [0, 1]",
)
TRAINER_LIMITS: Mapping[str, Limit] = {
    "accelerator": (lambda x: isinstance(x, str), "a name such as cpu"),
    "strategy": (lambda x: isinstance(x, (str, dict)), "a name such as ddp, or settings with a _target_"),
    **dict.fromkeys(("max_epochs", "max_steps"), END),
    "max_time": (lambda x: isinstance(x, (str, dict)), "a time such as 00:00:05:00"),
    **dict.fromkeys(
        ("num_nodes", "log_every_n_steps", "accumulate_grad_batches", "check_val_every_n_epoch"), COUNT
    ),
    **dict.fromkeys(("min_epochs", "min_steps", "reload_dataloaders_every_n_epochs"), WHOLE),
    "num_sanity_val_steps": (lambda x: is_whole(x) and x >= -1, "a whole number >= 0, or -1 for all"),
    **dict.fromkeys(
        ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"), AMOUNT
    ),
    "val_check_interval": (
        lambda x: isinstance(x, (str, dict)) or (AMOUNT[0](x) and x > 0),
        "a whole number of batches >= 1, a fraction in (0, 1], or a time such as 00:00:05:00",
    ),
    "fast_dev_run": (
        lambda x: isinstance(x, bool) or (is_whole(x) and x >= 0),
        "true, false or a number of batches",
    ),
    "gradient_clip_val": WEIGHT,
    "gradient_clip_algorithm": (lambda x: x in ("norm", "value"), "norm or value"),
    "deterministic": (lambda x: isinstance(x, bool) or x == "warn", "true, false or warn"),
    **dict.fromkeys(
        (
            *(
                "enable_checkpointing",
                "enable_progress_bar",
                "enable_model_summary",
                "enable_autolog_hparams",
            ),
            *("benchmark", "inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones"),
            "sync_batchnorm",
        ),
        SWITCH,
    ),
    "profiler": (lambda x: isinstance(x, (str, dict)), "simple, advanced, or settings with a _target_"),
    "default_root_dir": (lambda x: isinstance(x, str), "a folder"),
    "plugins": (lambda x: isinstance(x, list), "a list"),
}

Settings = TypeVar("Settings")


def check(cfg: DictConfig, schema: type[Settings]) -> Settings:
    """Check a composed or saved config, and return its values as an object of the schema.

    Args:
        cfg: the config; Hydra's own node in it is ignored.
        schema: the dataclass of the command, such as ``Train``.

    Raises:
        ConfigError: a key is missing or misspelt, or its value has the wrong type or is out of its limits.
    """
    own = without_hydra(cfg)
    try:
        with open_dict(own):
            settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), own))
    except (OmegaConfBaseException, TargetError, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    assert isinstance(settings, schema)
    for prefix, part in (("", settings), ("data.", getattr(settings, "data", None))):
        for name, value in vars(part).items() if part else ():
            if value == "":
                raise ConfigError(f"{prefix}{name} must not be empty")
    return settings


def register() -> None:
    """Register the schemas with Hydra and the resolvers of ``conf/`` with OmegaConf.

    Hydra then refuses misspelt keys and wrong types itself.  The resolvers are ``${run_dir:}``,
    ``${single_run:}``, ``${changes:}`` and ``${settings:}``.
    """
    for schema in (Train, Visualize, Evaluate, Compare, Predict, Explain, Export, Report, Runs):
        name = f"{schema.__name__.lower()}_schema"
        ConfigStore.instance().store(name=name, node=schema, provider="mnist_lightning")
    OmegaConf.register_new_resolver("run_dir", lambda: RUN_DIR, replace=True)
    OmegaConf.register_new_resolver("settings", lambda _root_: describe_settings(_root_), replace=True)
    OmegaConf.register_new_resolver("single_run", _is_single_run, replace=True)
    OmegaConf.register_new_resolver("changes", name_changes, replace=True)


def _is_single_run() -> bool:
    return not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN


def check_ours(group: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Check a group's settings if its ``_target_`` is one of our classes, and return them.

    Arguments of a class in ``SCHEMAS`` that are not given get their defaults from the class's signature.
    Those of our other classes are checked against their annotations.

    Args:
        group: the name of the group, for messages.
        settings: ``_target_`` and its arguments.

    Raises:
        ValueError: a key is misspelt, or its value has the wrong type or is out of its limits.
    """
    target = str(settings.get("_target_"))
    schema = SCHEMAS.get(target)
    if schema is None:
        if target.startswith("mnist_lightning."):
            check_hints(settings, read_hints(target), group)
            for key, value in settings.items():
                require(value != "", f"{group}.{key} must not be empty")
        return settings
    defaults = read_signature(target)
    given = {key: value for key, value in settings.items() if not key.startswith("_")}
    for key in given:
        require(key in defaults, f"{group}.{key} is no setting of {target}: {', '.join(defaults)}")
    if given.get("num_classes") is not None:
        check_number(f"{group}.num_classes", given["num_classes"], *AT_LEAST_ONE, whole=True)
    names = [field.name for field in fields(schema)]
    values = {key: value for key, value in (defaults | given).items() if key in names}
    try:
        checked = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ValueError(f"{group}.{key}: {str(error).splitlines()[0]}") from error
    return {"_target_": target, **given, **vars(checked)}


@functools.cache
def parse_init(target: str) -> ast.FunctionDef:
    """Parse the constructor of a class of this package.

    Raises:
        OSError, ValueError: there is no such class, or it has no constructor of its own.
    """
    module, _, name = target.removeprefix("mnist_lightning.").rpartition(".")
    source = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    (init,) = (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return init


@functools.cache
def read_hints(target: str) -> dict[str, Any]:
    """Read the types of the arguments of a class of this package, as far as they can be told from its source
    file without an import."""
    try:
        arguments = parse_init(target).args
    except (OSError, ValueError):
        return {}
    every = (*arguments.args, *arguments.kwonlyargs)
    return {one.arg: read_hint(ast.unparse(one.annotation), {}) for one in every if one.annotation}


@functools.cache
def read_signature(target: str) -> dict[str, Any]:
    """Read the arguments of a class of this package and their defaults (None where there is none).

    They are parsed from its source file, because importing it would import torch.
    """
    init = parse_init(target)
    positional = init.args.args[1:]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(init.args.defaults))
    defaults = [*missing, *init.args.defaults, *init.args.kw_defaults]
    values = [None if default is None else ast.literal_eval(default) for default in defaults]
    arguments = [argument.arg for argument in (*positional, *init.args.kwonlyargs)]
    return {
        argument: list(value) if isinstance(value, tuple) else value
        for argument, value in zip(arguments, values, strict=True)
    }


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def check_names(key: str, value: Any, example: str, *, at_least: int) -> list[str]:
    """Check a name or a list of names, and return a list of strings.

    Args:
        key: the setting, for the message.
        value: what the user has given.
        example: a valid setting, for the message.
        at_least: the number of names that are needed.

    Raises:
        ValueError: there are fewer names, or one is empty or no text.
    """
    names = value if isinstance(value, list) else [value]
    holds = len(names) >= at_least and all(
        isinstance(name, (str, int, float)) and str(name) for name in names
    )
    count = {0: "names", 1: "a name"}.get(at_least, f"at least {at_least} names")
    require(holds, f"{key} must be {count}, as in {example}, got {value}")
    return [str(name) for name in names]


def check_source(run: str, checkpoint: str | None) -> None:
    require(
        checkpoint is None or run == "latest",
        f"run and checkpoint name two nets, give only one: run={run} checkpoint={checkpoint}",
    )


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} must be one of {', '.join(choices)}, got {value}")


def at_least(key: str, value: int, least: int) -> None:
    require(value >= least, f"{key} must be >= {least}, got {value}")


def check_seed(key: str, value: int) -> None:
    require(0 <= value <= MAX_SEED, f"{key} must be in [0, 2^32), got {value}")


def check_device(name: str) -> None:
    """Check the name of a device.

    Raises:
        ValueError: torch has no such device.
    """
    known = re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name)
    require(known is not None, f"device must be auto, cpu, cuda, cuda:<number> or mps, got {name}")


def check_threads(value: int | None) -> None:
    require(
        value is None or 1 <= value <= MAX_THREADS,
        f"threads must be in [1, {MAX_THREADS}], or null to let the net decide, got {value}",
    )


def check_number(
    key: str, value: Any, holds: Callable[[Any], bool], wanted: str, *, whole: bool = False
) -> None:
    kind, is_kind = ("whole number", is_whole) if whole else ("finite number", is_finite)
    require(is_kind(value) and holds(value), f"{key} must be a {kind} {wanted}, got {value}")
