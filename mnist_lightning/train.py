"""Train a feed-forward net on MNIST:  python -m mnist_lightning.train [key=value …]"""

import functools
import importlib
import io
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mnist_lightning import __version__, threads, workarounds
from mnist_lightning.cli import begin, compact_errors, retype
from mnist_lightning.config import CONF_DIR, RUN_DIR, Train, check, register
from mnist_lightning.images.known import KNOWN
from mnist_lightning.rundir import signals
from mnist_lightning.rundir.atomic import write_atomic
from mnist_lightning.rundir.find import as_typed, find_checkpoint
from mnist_lightning.rundir.outside import as_word
from mnist_lightning.rundir.record import write_patch, write_settings
from mnist_lightning.rundir.reproduce import TOLD, compare_weights, tell_changes
from mnist_lightning.rundir.resume import find_stops, on_trial, resume_job
from mnist_lightning.rundir.status import is_main_process, read, show_with_unit, track
from mnist_lightning.settings_help import WHERE, drop_places, flatten, show
from mnist_lightning.sweeps.resume import rewrite_arguments
from mnist_lightning.targets import PARTS, check_arguments, check_types, choose_mode, make, strange_modules
from mnist_lightning.trust import write_trust

if TYPE_CHECKING:
    import lightning as L
    from torch import Tensor

    from mnist_lightning.classifier import DigitClassifier
    from mnist_lightning.data import MNISTDataModule
    from mnist_lightning.evaluation.trained import Bounded
    from mnist_lightning.python import Run

log = logging.getLogger(__name__)

TOLD_OF_NODES = {"MASTER_ADDR", "SLURM_NTASKS", "LSB_DJOB_RANKFILE", "OMPI_COMM_WORLD_SIZE"}  # variables

Metrics = dict[str, float | int | str | None]


def main() -> None:
    begin()
    signals.follow_parent()
    workarounds.start_others_as("mnist_lightning.train")
    with compact_errors():
        sys.argv[1:] = rewrite_arguments(sys.argv[1:])
    run()


@hydra.main(version_base="1.3", config_path=CONF_DIR, config_name="train")
def run(cfg: DictConfig) -> float | None:
    """Train one net, and return ``monitor.metric`` of its best epoch for a sweeper."""
    register()  # a cluster's job begins here, without main()
    logging.raiseExceptions = False  # a full disk must not print a traceback for each log message
    settings = check(cfg, Train)
    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    if in_sweep:
        settings.resume = resume_job(run_dir)
    with compact_errors(in_sweep=in_sweep):
        metrics = follow(settings, run_dir, hydra_cfg.overrides.task, in_sweep=in_sweep)
    if is_main_process() and not in_sweep:
        lines = list_results(metrics, settings, run_dir) + list_next(metrics, settings, run_dir)
        if settings.reproduce is not None:
            earlier, now = Path(settings.reproduce), {key: metrics[key] for key in ("threads", "device")}
            lines += ["", tell_changes(earlier, now), compare_weights(earlier, run_dir)]
        log.info("%s", "\n".join(lines))
    value = metrics.get(settings.monitor.metric)
    return value if isinstance(value, float) else None


def follow(
    settings: Train, run_dir: Path, overrides: Sequence[str], *, in_sweep: bool, told: bool = True
) -> Metrics:
    """Train in a locked folder, keep the run's state in ``status.json``, and return its metrics.

    Args:
        settings: checked.
        run_dir: the run's folder.
        overrides: the overrides of the command line.
        in_sweep: whether the run is a job of a sweep, which does not read the test images.
        told: whether an error that the user can correct ends the process with a line; else it is raised.
    """
    raised = in_sweep or not told
    log_file, resumed = run_dir / "train.log", settings.resume is not None
    overrides = find_overrides(overrides, settings)
    with track(run_dir, overrides, in_sweep=in_sweep, resumed=resumed) as status:
        with compact_errors(log_file=log_file, in_sweep=raised), on_trial(run_dir, resumed=resumed):
            choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
            write_settings(run_dir, settings, choices)
            write_patch(
                run_dir.parent if in_sweep else run_dir,
                strange_modules(asdict(settings)),
                package=(find_commit() or "").endswith("+"),
            )
            if settings.reproduce is not None:
                log.info("%s", tell_changes(Path(settings.reproduce), find_versions()))
            metrics = train(settings, run_dir, test=settings.test and not in_sweep)
        status.monitor, status.mode = settings.monitor.metric, settings.monitor.mode
        status.metrics = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    return metrics


def train_here(*overrides: str) -> "Run":
    """Train one net, as ``python -m mnist_lightning.train`` does with these arguments.

    ``run = mnist_lightning.train("model.hidden=256", "trainer.max_epochs=3")`` writes the same files to a
    new folder under ``logs/``, prints the same messages, and returns a ``Run`` with ``run.metrics``,
    ``run.load()`` and ``run.show()``.  Ctrl-C, or interrupting a notebook's cell, saves the step and returns
    the run.  If several threads call this function, their runs take turns.

    Raises:
        ConfigError: a setting can't be used.
        CommandError: a file, number or device can't be used; the message is what the command prints.
    """
    from mnist_lightning.python import launch

    return launch(work, overrides)


class TrainModule(ModuleType):
    """Make this module callable: ``mnist_lightning.train`` is both the command and the function."""

    __call__ = staticmethod(train_here)


def work(settings: Train, run_dir: Path, overrides: Sequence[str]) -> None:
    """Train a net for Python code, and log the results."""
    metrics = follow(settings, run_dir, overrides, in_sweep=False, told=False)
    log.info("%s", "\n".join(list_results(metrics, settings, run_dir)))


def find_overrides(typed: Sequence[str], settings: Train) -> list[str]:
    """Return the overrides of a run, after those of the run that it reproduces, if any."""
    if settings.reproduce is None:
        return list(typed)
    earlier = read(Path(settings.reproduce))
    told = earlier.overrides if earlier else []
    return [*told, *(one for one in typed if not one.startswith(TOLD))]


def train(settings: Train, run_dir: Path, *, test: bool) -> Metrics:
    """Train one net with these settings, from reading the data to writing ``metrics.json``.

    Args:
        settings: checked.
        run_dir: an existing folder for all files of the run.
        test: whether to read the official test images at the end.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        OSError: a file or folder can't be read or written, or a download failed.
        FloatingPointError: the loss or a weight became NaN or infinite.
        TargetError: a ``_target_`` can't be used.
        MisconfigurationException: Lightning can't use the settings on this machine.
    """
    first = None
    if settings.init_from is not None and settings.resume is None:
        first = find_checkpoint(settings.init_from)  # before torch is imported
    log.info("loading torch and Lightning …")

    import lightning as L
    import torch
    from lightning.pytorch.callbacks import Checkpoint

    from mnist_lightning.callbacks.checkpoints import Checkpoints
    from mnist_lightning.callbacks.lr_range import LearningRateRange
    from mnist_lightning.data import MNISTDataModule
    from mnist_lightning.evaluation.trained import Bounded, check_net, check_numbers, describe_device
    from mnist_lightning.rundir.checkpoint import (
        BEST,
        LocalCheckpointIO,
        check_resumable,
        find_newest,
        taking_up,
    )

    unplaced = settings
    settings = place(settings, run_dir)  # a copy that shares monitor, whose mode status.json needs
    workarounds.quiet_lightning()
    workarounds.skip_device_probe()
    workarounds.quiet_tensorboard()
    L.seed_everything(settings.seed, workers=True, verbose=False)
    data = settings.data
    check_parts(settings)
    check_nodes(settings.trainer.get("num_nodes") or 1)
    datamodule = MNISTDataModule(**data.module_arguments(), seed=settings.seed)
    if data.num_folds is not None and data.val_size != 0:
        log.info(
            "data.num_folds=%d: fold %d is the validation split, val_size is ignored",
            data.num_folds,
            data.fold,
        )
    if not datamodule.is_known or None in (data.mean, data.std):  # otherwise try net and loss before reading
        datamodule.prepare_data()
        datamodule.setup("fit")
        data.check_shape(datamodule.image_shape)
    newest, resumed_at, bounds = None, None, None
    if settings.resume is not None:
        newest, checkpoint = find_newest(run_dir / "checkpoints")
        check_resumable(newest, checkpoint)
        resumed_at = checkpoint["global_step"] + 1  # in the curves' unit, optimizer steps
        log.info("resuming from %s, step %d", newest, checkpoint["global_step"])
        check_net(settings.model, newest, checkpoint, **sizes_of(datamodule))
        check_numbers(settings.metrics, newest)
        parts = {key: getattr(settings, key) for key in PARTS}
        bounds = None if strange_modules(parts) else Bounded(checkpoint)
    classifier = make_classifier(settings, datamodule, bounds=bounds)
    if bounds and newest:
        bounds.check_batch(data.batch_size, newest)
    classifier.logs_evaluations = False
    for part in (classifier, datamodule):  # the run gives loggers all settings itself
        part.save_hyperparameters(dict(part.hparams), logger=False)
    if first is not None:
        take_weights(classifier, first)
    monitor = settings.monitor
    monitor.mode = choose_mode(monitor.metric, monitor.mode, classifier.higher_is_better(monitor.metric))
    with signals.deferred():  # torch calls the counter from C++, where an exception would abort the process
        flops = threads.count_flops(classifier.net, classifier.image_shape, data.batch_size)
    if settings.compile:
        classifier.net.compile()  # in place: the checkpoint's keys stay the same
    callbacks = make_callbacks(settings, run_dir)
    accelerator = settings.trainer.get("accelerator", "auto")
    if accelerator == "auto":  # Lightning's auto would also use Apple's GPU, which nobody has measured
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    trainer: L.Trainer = make(
        settings.trainer
        | ({} if settings.validates else {"limit_val_batches": 0})
        | {
            "accelerator": accelerator,
            # GPUs add numbers in a random order, unless they are asked not to; CPUs do not
            "deterministic": settings.trainer.get("deterministic", None if accelerator == "cpu" else "warn"),
            "callbacks": callbacks,
            "enable_checkpointing": settings.trainer.get(
                "enable_checkpointing", any(isinstance(callback, Checkpoint) for callback in callbacks)
            ),
            "logger": make_loggers(settings, resumed_at),
            "plugins": [LocalCheckpointIO(run_dir), *settings.trainer.get("plugins", [])],
        },
        "trainer",
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(list_parameters(unplaced))
    number = choose_threads(settings, flops, trainer)
    alone = trainer.world_size == 1
    if not alone:
        signals.listen()
    with threads.use(number):
        with signals.deferred(at_once=alone), compiler_errors(), taking_up(newest):
            trainer.fit(classifier, datamodule=datamodule, ckpt_path=newest, weights_only=True)

        kept = trainer.checkpoint_callback if isinstance(trainer.checkpoint_callback, Checkpoints) else None
        last: Metrics = {}
        if kept:  # read these now: evaluating best.ckpt restores the state that callbacks had at its epoch
            last = {f"last/{name}": value for name, value in sorted(kept.metrics.items())}
            last |= {"best_epoch": kept.best_epoch, "train_seconds": round(kept.train_seconds, 3)}
            if settings.validates and kept.best_score == -math.inf:
                log.warning("no epoch was validated before training ended: best.ckpt has the last weights")
        best = kept.folder / BEST if kept else None
        ckpt_path = best if best and best.exists() else None  # debug=fast_dev_run writes none
        metrics: Metrics = {}
        evaluations = [trainer.validate] * settings.validates + [trainer.test] * test
        for evaluate in evaluations:
            with taking_up(ckpt_path):
                evaluate(
                    classifier, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False, weights_only=True
                )
            stage = "test/" if evaluate == trainer.test else "val/"
            values = sorted(trainer.callback_metrics.items())
            metrics |= {name: value.item() for name, value in values if name.startswith(stage)}
        evaluated = ["val"] * data.has_validation + ["test"] * test
        evaluated = [] if classifier.may_diverge else evaluated
        for split in evaluated if trainer.is_global_zero and classifier.names_classes else []:
            images = datamodule.splits[split]
            classifier.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
            outputs = save_correct(classifier, images.images, images.labels, run_dir / f"{split}_correct.npy")
            if split == "val" and ckpt_path and settings.validates:
                save_confidence(ckpt_path, classifier, outputs, datamodule)
        metrics |= last
        if trainer.limit_val_batches == 1.0:
            metrics |= {f"{split}_images": len(datamodule.splits[split]) for split in evaluated}
        metrics |= {
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "num_parameters": sum(parameter.numel() for parameter in classifier.parameters()),
            "seed": settings.seed,
            "threads": number,
            "device": describe_device(trainer.strategy.root_device),
        }
        for callback in callbacks:
            if isinstance(callback, LearningRateRange) and callback.suggestion is not None:
                metrics["suggested_lr"] = callback.suggestion
        metrics |= find_versions()
        if trainer.is_global_zero:
            write_atomic(run_dir / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
            write_results(trainer, unplaced, run_dir, metrics)
    return metrics


def check_parts(settings: Train) -> None:
    """Check each ``_target_`` and its arguments before any data is read.

    Raises:
        TargetError: a ``_target_`` can't be used, or takes arguments of other names or types.
    """
    parts = {key: getattr(settings, key) for key in ("model", "loss", "optimizer", "scheduler", "trainer")}
    parts |= {f"metrics.{name}": metric for name, metric in settings.metrics.items()}
    for group in ("callbacks", "logger"):
        parts |= {f"{group}.{name}": one for name, one in getattr(settings, group).items()}
    for key, config in (parts | {"data.source": settings.data.source}).items():
        if config:
            check_arguments(config, key)
            check_types(config, key)


def check_nodes(number: int) -> None:
    """Check that a training on several machines does not wait for machines that nothing has started.

    Raises:
        MisconfigurationException: neither a cluster nor the user has told this process of the others.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if number > 1 and not os.environ.keys() & TOLD_OF_NODES:
        raise MisconfigurationException(
            f"trainer.num_nodes={number} waits for processes on other machines: start this command on each,"
            " with MASTER_ADDR, MASTER_PORT and NODE_RANK set, or let SLURM start it"
        )


def sizes_of(datamodule: "MNISTDataModule") -> dict[str, Any]:
    """What is offered to a net, a loss and metrics of the data they are for."""
    return {"image_shape": list(datamodule.image_shape), "num_classes": len(datamodule.class_names)}


def check_memory(model: dict[str, Any], sizes: dict[str, Any]) -> None:
    """Whether a net can be trained on this machine; before memory is taken for it.

    Raises:
        MisconfigurationException: there is none for its weights and their gradients.
        TargetError: it can't be built.
    """
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with torch.device("meta"):
        weights = make(model, "model", **sizes).parameters()
    if lack := threads.tell_lack(2 * sum(weight.nbytes for weight in weights)):
        raise MisconfigurationException(f"model: its weights and their gradients take {lack}")


def make_classifier(
    settings: Train, datamodule: "MNISTDataModule", *, bounds: "Bounded | None" = None
) -> "DigitClassifier":
    """Make a classifier of net, loss, metrics and optimizer, and try it on two blank images.

    Args:
        bounds: of memory and time in which a stranger's parts are made and tried; None: no bounds.

    Raises:
        TargetError: a ``_target_`` can't be used, or takes other arguments.
        MisconfigurationException: a part does not fit the data or the others.
    """
    from mnist_lightning.classifier import DigitClassifier
    from mnist_lightning.images.preprocess import Preprocess

    sizes = sizes_of(datamodule)
    scheduler, pixels = settings.scheduler, settings.data.preprocess_arguments()
    if None in (pixels["mean"], pixels["std"]):
        measured = dict(zip(("mean", "std"), datamodule.measure_pixels(), strict=True))
        pixels |= {name: value for name, value in measured.items() if pixels[name] is None}
    if not strange_modules({"model": settings.model}):
        check_memory(settings.model, sizes)
    net = make(settings.model, "model", **sizes)
    with bounds or nullcontext():
        classifier = DigitClassifier(
            net,
            preprocess=Preprocess(**pixels),
            loss=make(settings.loss, "loss", **sizes),
            metrics={
                name: make(metric, f"metrics.{name}", **sizes)
                for name, metric in settings.metrics.items()
                if metric
            },
            optimizer=make(settings.optimizer, "optimizer"),
            scheduler=make(scheduler, "scheduler") if scheduler else None,
            decay_biases=settings.decay_biases,
            seed=settings.seed,
            class_names=datamodule.class_names,
            image_shape=datamodule.image_shape,
        )
        classifier.check()
    return classifier


def take_weights(classifier: "DigitClassifier", path: Path) -> None:
    """Copy those weights of another net that have the same name and shape, and log which.

    Args:
        classifier: gets the weights.
        path: the other net's checkpoint.

    Raises:
        OSError: the checkpoint can't be read, or no weight fits.
    """
    from mnist_lightning.rundir.checkpoint import load

    own = classifier.net.state_dict()
    saved = {
        name.removeprefix("net."): value
        for name, value in load(path)["state_dict"].items()
        if name.startswith("net.")
    }
    fitting = {name: value for name, value in saved.items() if name in own and own[name].shape == value.shape}
    others = [
        f"{name} {tuple(value.shape)}"
        + (f" instead of {tuple(saved[name].shape)}" if name in saved else ", which it lacks")
        for name, value in own.items()
        if name not in fitting
    ]
    if not fitting:
        raise OSError(f"init_from={path}: no weight fits this net ({'; '.join(others)})")
    classifier.net.load_state_dict(fitting, strict=False)
    log.info("%d of %d weights are from %s: %s", len(fitting), len(own), path, ", ".join(fitting))
    if others:
        log.info("initialised at random: %s", "; ".join(others))


def place(settings: Train, run_dir: Path) -> Train:
    """Copy the settings, with the run's folder in place of ``${run_dir:}``."""

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: put(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [put(inner) for inner in value]
        if isinstance(value, str) and value.partition("/")[0] == RUN_DIR:
            return str(run_dir) + value.removeprefix(RUN_DIR)
        return value

    groups = {group: put(getattr(settings, group)) for group in ("trainer", "callbacks", "logger")}
    return replace(settings, **groups)


def choose_threads(settings: Train, flops: int, trainer: "L.Trainer") -> int:
    """Choose the number of threads for the steps of each process of a run.

    Args:
        settings: have the user's number, if any.
        flops: floating-point operations of a forward pass of a whole batch.
        trainer: knows the processes and the device.
    """
    flops_here = flops // trainer.world_size if trainer.strategy.root_device.type == "cpu" else 0
    return threads.choose(
        (1 + threads.BACKWARD) * flops_here, wanted=settings.threads, processes=trainer.num_devices
    )


def make_callbacks(settings: Train, run_dir: Path) -> "list[L.Callback]":
    """Make the callbacks; those with ``_partial_`` also get arguments from the run's other settings."""
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar

    from mnist_lightning.callbacks.ema import ExponentialMovingAverage

    facts: dict[str, Any] = {
        "dirpath": str(run_dir / "checkpoints"),
        "monitor": settings.monitor.metric
        if settings.validates
        else None,  # None: best.ckpt is the last epoch's
        "mode": settings.monitor.mode,
        "stops": find_stops(settings),
        **asdict(settings.checkpoint),
    }
    switches = {"enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar}
    off = tuple(kind for switch, kind in switches.items() if settings.trainer.get(switch) is False)
    made: list[L.Callback] = []
    for name, config in settings.callbacks.items():
        if config:
            watched = str(config.get("monitor", facts["monitor"]))
            # EarlyStopping must check after validation, not at the end of each training epoch
            offered = {"check_on_train_epoch_end": not watched.startswith("val/")}
            offered |= facts if config.get("_partial_") else {}
            whole = {key: value for key, value in config.items() if key != "_partial_"}
            callback = make(whole, f"callbacks.{name}", **offered)
            if not isinstance(callback, off):
                made.append(callback)
    if settings.ema_decay is not None:
        made.append(ExponentialMovingAverage(decay=settings.ema_decay))
    if settings.watch:
        from mnist_lightning.callbacks.watch import WatchPage

        made.append(WatchPage(path=str(run_dir / "page.html")))
    return made


def make_loggers(settings: Train, resumed_at: int | None) -> "list[L.pytorch.loggers.Logger]":
    """Make the loggers.

    Args:
        settings: checked.
        resumed_at: the next step of a resumed run; our loggers drop what was logged from this step on.
    """
    from mnist_lightning.rundir.loggers import Forgiving

    wanted = {} if settings.trainer.get("logger") is False else settings.logger
    loggers = [make(logger, f"logger.{name}") for name, logger in wanted.items() if logger]
    for logger in loggers:
        if resumed_at is not None and isinstance(logger, Forgiving):
            logger.resume_from(resumed_at)
    return loggers


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Turn a failure of torch.compile within the block into one line.

    Raises:
        MisconfigurationException: compile=true is set, and torch.compile does not work on this machine.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except workarounds.compiler_failure() as error:
        cause = str(error).strip().partition("\n")[0]
        raise MisconfigurationException(
            f"compile=true: torch.compile does not work here ({cause}); it needs a C++ compiler (g++ or"
            " clang++) on a CPU and Triton on a GPU; compile=false needs neither"
        ) from error


def save_correct(classifier: "DigitClassifier", images: "Tensor", labels: "Tensor", path: Path) -> "Tensor":
    """Save which images the net classifies correctly, for paired tests, and return its outputs.

    Args:
        classifier: the trained classifier.
        images: (N, H, W) or (N, H, W, 3) uint8.
        labels: (N,) int64.
        path: the file to write: one bit for each image (``numpy.packbits``), as an npy array.

    Returns:
        The net's outputs, (N, C) float.
    """
    import numpy as np

    from mnist_lightning.evaluation.trained import compute_outputs

    outputs = compute_outputs(classifier.eval(), images)
    content = io.BytesIO()
    np.save(content, np.packbits((outputs.argmax(1) == labels).numpy()))
    write_atomic(path, content.getvalue())
    return outputs


def save_confidence(
    path: Path, classifier: "DigitClassifier", outputs: "Tensor", datamodule: "MNISTDataModule"
) -> None:
    """Fit the net's confidence on the validation images, and add it to a checkpoint.

    Args:
        path: the checkpoint, which is replaced as a whole.
        classifier: has the checkpoint's weights.
        outputs: the net's outputs for the validation images, (N, C) float.
        datamodule: has the training and the validation images.

    Raises:
        OSError: the file can't be read or written.
    """
    from mnist_lightning.evaluation import confidence
    from mnist_lightning.images.known import draws_like_mnist
    from mnist_lightning.rundir.checkpoint import load, serialize

    checkpoint, splits = load(path), datamodule.splits
    kept = confidence.fit(outputs, splits["val"].labels)
    if draws_like_mnist(checkpoint["datamodule_hyper_parameters"]):
        temperature = kept["temperature"]
        kept |= confidence.fit_likeness(classifier, splits["train"], splits["val"], temperature)
    write_atomic(path, serialize(checkpoint | {"confidence": kept}))


def find_versions() -> dict[str, str | None]:
    """Return the git commit of this package, and the versions of Python and of the main packages."""
    names = ("torch", "lightning", "torchmetrics")
    versions = {"git_commit": find_commit(), "python": platform.python_version()}
    return versions | {name: version(name) for name in names} | {"mnist_lightning": __version__}


@functools.cache
def find_commit() -> str | None:
    """Return the git commit of this package's code, followed by "+" if the code has been changed."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
        )

    try:
        if git("ls-files", "--error-unmatch", __file__).returncode:
            return None  # installed from a wheel, perhaps inside another repository
        commit = git("rev-parse", "HEAD").stdout.strip()
        return commit + ("+" if git("status", "--porcelain", "--", ".").stdout else "")
    except (OSError, subprocess.TimeoutExpired):
        return None  # there is no git


def list_parameters(settings: Train) -> dict[str, Any]:
    """Return all settings by dotted key for loggers, except those that name the run's own folder."""
    flat = flatten(asdict(settings))
    mine = [key for key, value in flat.items() if str(value).partition("/")[0] == RUN_DIR]
    return {key: value for key, value in flat.items() if key not in (*mine, "resume", "reproduce")}


def list_hparams(settings: Train, typed: str) -> dict[str, bool | float | str]:
    """Return the run's columns of TensorBoard's HParams tab.

    Args:
        settings: checked.
        typed: the overrides that decide what is trained.
    """
    augment = settings.data.augment
    deforms = [f"{key}={value:g}" for key, value in vars(augment).items() if value and augment.deforms]
    columns: dict[str, Any] = {"changed": typed or "nothing", "data.augment": " ".join(deforms) or "none"}
    groups = ("data", "model", "loss", "metrics", "optimizer", "scheduler", "trainer")
    for key, value in list_parameters(settings).items():
        if key in ("seed", "ema_decay", "decay_biases") or (
            key.split(".")[0] in groups
            and not key.startswith(("data.augment.", "trainer.profiler", "trainer._target_"))
            and key not in WHERE
        ):
            columns[key] = value
    return {key: one if isinstance(one, (bool, int, float)) else show(one) for key, one in columns.items()}


def write_results(trainer: "L.Trainer", settings: Train, run_dir: Path, metrics: Metrics) -> None:
    """Give the test metrics to all loggers, and settings and final metrics to TensorBoard's HParams tab.

    A run that is killed before the end of this has not finished, and a resumption does it again.
    """
    from mnist_lightning.rundir.loggers import TensorBoardLogger
    from mnist_lightning.rundir.tracker import WandbLogger

    finals = {
        key: value
        for key, value in metrics.items()
        if key.startswith(("val/", "test/")) and isinstance(value, float)
    }
    tests = {key: value for key, value in finals.items() if key.startswith("test/")}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            status = read(run_dir)
            typed = " ".join(drop_places(status.overrides)) if status else ""
            name = f"{typed or 'defaults'} ({as_typed(run_dir)})"
            logger.log_end(name, list_hparams(settings, typed), finals, trainer.global_step)
        elif tests:
            logger.log_metrics({"epoch": trainer.current_epoch, **tests}, step=trainer.global_step)
            logger.save()
        if isinstance(logger, WandbLogger):
            logger.log_end()


def list_results(metrics: Metrics, settings: Train, run_dir: Path) -> list[str]:
    """Return the lines of the summary that is printed at the end of a run."""
    name = settings.monitor.metric.removeprefix("val/")
    words = "accuracy" if name == "acc" else name
    keys = {"test": f"test/{name}", "validation": f"val/{name}", "train": f"last/train/{name}"}
    lines = [
        "",
        *(
            f"{f'{split} {words}':20} {show_with_unit(name, value)}"
            for split, key in keys.items()
            if isinstance(value := metrics.get(key), float)
        ),
    ]
    if "train_seconds" in metrics:
        lines.append(f"{'training':20} {metrics['epochs']} epochs in {metrics['train_seconds']:.1f} s")
    return [*lines, f"{'everything is in':20} {as_typed(run_dir)}"]


def list_next(metrics: Metrics, settings: Train, run_dir: Path) -> list[str]:
    """Return lines with commands to try after a run, as its net, its loggers and its end allow."""
    if "lr_range" in settings.callbacks:
        return list_suggestion(metrics, settings)
    lines = []
    shown = as_typed(run_dir)
    usual = shown.parts[0] == "logs"  # commands look for runs in logs/
    if (run_dir / "tensorboard").is_dir():
        lines.append(f"tensorboard --logdir {'logs' if usual else as_word(str(shown))}")
    if settings.resume is None and settings.reproduce is None and "hidden" in settings.model:
        lines.append(retype("model.hidden=512", without=("hydra.run.dir", "debug")))
    if any((run_dir / "checkpoints").glob("*.ckpt")):
        parts = {key: getattr(settings, key) for key in PARTS}
        named = "" if usual else f" run={as_word(str(shown))}"
        foreign = strange_modules(parts)
        trust = named + (f" {as_word(write_trust(foreign))}" if foreign else "")
        known = None if settings.data.source else KNOWN.get(settings.data.name)
        grey = settings.data.grey if known is None else known.image_shape[0] == 1
        split = "" if settings.test else " split=val" * settings.data.has_validation
        lines += [
            f"python -m mnist_lightning.evaluate{split}{trust}   # each class, and the mistakes",
            f"python -m mnist_lightning.predict images=my_picture.png{trust}",
        ]
        if grey and settings.model["_target_"] == "mnist_lightning.network.FeedForward":
            lines.append(f"python -m mnist_lightning.export format=html{trust}   # a page to draw on")
        lines += list_left(metrics, settings, shown)
    return ["", "next:", *(f"  {line}" for line in lines)] if lines else []


def list_suggestion(metrics: Metrics, settings: Train) -> list[str]:
    """Return lines with the command that trains with the learning rate that a range test has suggested."""
    if "suggested_lr" not in metrics:
        return []
    rate = f"{'' if 'lr' in settings.optimizer else '+'}optimizer.lr={metrics['suggested_lr']:g}"
    own = ("debug", "trainer.max_steps", "callbacks.lr_range.min_lr", "callbacks.lr_range.max_lr")
    return ["", "next:", f"  {retype(rate, without=('hydra.run.dir', *own))}"]


def list_left(metrics: Metrics, settings: Train, run_dir: Path) -> list[str]:
    """Return the command that resumes a run which reached ``max_time`` before its last epoch or step."""
    limits = {"epochs": settings.trainer.get("max_epochs"), "steps": settings.trainer.get("max_steps")}
    done = [limit is not None and 0 < limit <= int(str(metrics[name])) for name, limit in limits.items()]
    if settings.trainer.get("max_time") is None or any(done):
        return []
    foreign = strange_modules(asdict(settings))
    trust = f" {as_word(write_trust(foreign))}" if foreign else ""
    folder = as_word(str(run_dir))
    return [
        f"python -m mnist_lightning.train resume={folder} trainer.max_time=null{trust}   # its time was over"
    ]


if __name__ == "__main__":
    module = importlib.import_module("mnist_lightning.train")
    module.main()  # by its own name, not as __main__: a cluster's launcher sends the name
else:
    sys.modules[__name__].__class__ = TrainModule
