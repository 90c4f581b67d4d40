"""Bad settings are reported in one line that names the key, before torch is imported."""

import dataclasses
import importlib
import inspect
import math
import re
from pathlib import Path

import pytest
import yaml
from conftest import Run, few, settle
from processes import LIGHT, Fresh, Preloaded

from mnist_lightning import config, network
from mnist_lightning.config import Train
from mnist_lightning.config import read_signature as read
from mnist_lightning.targets import TargetError
from mnist_lightning.train import check_parts

# arguments -> the message
MISTAKES = {
    ("model.hidden=0",): "model.hidden must be a whole number >= 1 or a list of such, got 0",
    ("model.hidden=[64,0]",): "model.hidden must be a whole number >= 1 or a list of such, got [64, 0]",
    ("model.hidden=big",): "model.hidden must be a whole number >= 1 or a list of such, got big",
    ("model.dropout=1.5",): "model.dropout must be in [0, 1), got 1.5",
    ("model.dropout=nan",): "model.dropout must be in [0, 1), got nan",
    ("model.activation=foo",): "model.activation must be one of relu, leaky_relu, elu, gelu, tanh, got foo",
    ("model.norm=foo",): "model.norm must be one of none, batch, layer, got foo",
    ("model.hidden=[]", "model.dropout=0.5"): "model.dropout=0.5 acts on hidden layers",
    ("data.val_size=60000",): "data.val_size must be in [0, 59999], got 60000",
    ("data.val_size=-1",): "data.val_size must be in [0, 59999], got -1",
    ("data.batch_size=0",): "data.batch_size must be >= 1, got 0",
    (
        "data.batch_size=60000",
    ): "data.batch_size must be at most the 55000 training images that data.val_size=5000 leaves",
    ("data.num_workers=-1",): "data.num_workers must be >= 0, got -1",
    ("optimizer.weight_decay=-1",): "optimizer.weight_decay must be a finite number >= 0, got -1",
    ("trainer.log_every_n_steps=0",): "trainer.log_every_n_steps must be a whole number >= 1, got 0",
    ("checkpoint.every_n_seconds=0",): "checkpoint.every_n_seconds must be a finite number > 0, got 0",
    ("data.std=0",): "data.std must be a finite number in (0, 1], got 0",
    (
        "data.name=cifar",
    ): "data.name must be one of mnist, fashion_mnist, kmnist, emnist_letters, emnist_balanced, cifar10, folder,"
    " npz, got cifar",
    ("data.augment.rotation=-1",): "data.augment.rotation must be in [0, 180] degrees, got -1",
    ("data.augment.elastic=nan",): "data.augment.elastic must be in [0, 14] pixels, got nan",
    ("data.augment.smoothness=0",): "data.augment.smoothness must be in [1, 28] pixels, got 0",
    ("model.noise=-1",): "model.noise must be a finite number >= 0, got -1",
    ("model.hidden=[]", "model.noise=0.3"): "model.noise=0.3 acts on hidden layers",
    ("model=directions", "model.directions=0"): "model.directions must be >= 1, got 0",
    ("model=directions", "model.spacing=0"): "model.spacing must be >= 1, got 0",
    ("model=directions", "model.spacing=1.5"): "model.spacing: Value '1.5' of type 'float' could not be",
    ("model=directions", "model.dropout=1"): "model.dropout must be in [0, 1), got 1",
    ("ema_decay=1",): "ema_decay must be in (0, 1), or null for no average, got 1",
    ("optimizer.lr=-1",): "optimizer.lr must be a finite number > 0, got -1",
    ("optimizer.lr=nan",): "optimizer.lr must be a finite number > 0, got nan",
    ("optimizer.lr=fast",): "optimizer.lr must be a finite number > 0, got fast",
    ("optimizer=sgd", "optimizer.momentum=1"): "optimizer.momentum must be a finite number in [0, 1), got 1",
    ("trainer.max_epochs=0",): "trainer.max_epochs must be a whole number >= 1, or -1 for no end, got 0",
    ("trainer.max_epochs=null",): "trainer.max_epochs=null sets no end",
    ("trainer.devices=100000",): "trainer.devices=100000 with data.num_workers=0 starts processes that take",
    ("data.num_workers=10000000",): "trainer.devices=1 with data.num_workers=10000000 starts processes",
    ("trust={a:1}",): "trust must be a module or a list of modules, as in trust=my_nets, got {'a': 1}",
    ("data.data_dir=''",): "data.data_dir must not be empty",
    ("logger.csv.save_dir=''",): "logger.csv.save_dir must not be empty",
    ("trainer.profiler={a: 1}",): "Could not override 'trainer.profiler.a'",
    ("hydra.run.dir=''",): "hydra.run.dir must not be empty",
    ("-m", "hydra.sweep.dir=''"): "hydra.sweep.dir must not be empty",
    (
        "hydra.output_subdir=null",
    ): "hydra.output_subdir must be .hydra, from where a run's settings are read again",
    ("hydra.verbose=null",): "hydra.verbose must be true, false, a logger or a list of loggers, got None",
    ("-m", "hydra.sweeper._target_=text"): "hydra.sweeper._target_=text is no plugin of Hydra",
    ("data=1",): "data=1 chooses nothing: data must be one of cifar10,",
    ("trainer.max_epochs=1.5",): "trainer.max_epochs must be a whole number >= 1, or -1 for no end, got 1.5",
    ("trainer.max_epochs=-1",): "scheduler needs the number of steps, and trainer.max_epochs=-1 sets no end",
    ("seed=-1",): "seed must be in [0, 2^32), got -1",
    ("loss.label_smoothing=1",): "loss.label_smoothing must be in [0, 1), got 1",
    ("label_smoothing=0.1",): "label_smoothing is loss.label_smoothing now: type loss.label_smoothing=0.1",
    ("model.dropout=much",): "model.dropout: Value 'much' of type 'str' could not be converted to Float",
    ("+model.hiden=64",): "model.hiden is no setting of mnist_lightning.network.FeedForward: hidden, activ",
    ("loss._target_=null",): "loss names no _target_",
    ("~model._target_",): "model names no _target_",
    ("monitor.metric=test/acc",): "monitor.metric must be one of val/loss, val/acc, got test/acc",
    ("monitor.metric=val/loss", "monitor.mode=max"): "monitor.mode must be min with monitor.metric=val/loss",
    ("monitor.mode=min",): "monitor.mode must be max with monitor.metric=val/acc, got min",
    ("monitor.mode=up",): "monitor.mode must be one of max, min, got up",
    ("metrics.acc=null",): "monitor.metric must be one of val/loss, got val/acc",
    (
        "+metrics.loss._target_=torchmetrics.MeanMetric",
    ): "metrics.loss: choose another name, every run logs loss itself",
    ("+metrics.top.top_k=2",): "metrics.top names no _target_",
    ("+callbacks.x=3",): "callbacks.x must be settings with a _target_, or null, got 3",
    ("+logger.x=[a]",): "logger.x must be settings with a _target_, or null, got ['a']",
    ("checkpoint.every_n_steps=0",): "checkpoint.every_n_steps must be >= 1, got 0",
    ("scheduler=plateau", "data.val_size=0"): "scheduler=plateau watches val/loss",
    ("callbacks=early_stopping", "data.val_size=0"): "callbacks.early_stopping watches val/acc",
    ("resume=nowhere",): "nowhere is not a run folder",
    ("resume=latest",): "no run under",
    # Hydra's own words
    ("modle.hidden=64",): "Could not override 'modle.hidden'",
    ("model.hiden=64",): "Could not override 'model.hiden'",
    ("data.batch_size=many",): "Value 'many' of type 'str' could not be converted to Integer",
    ("optimizer=lion",): "Could not find 'optimizer/lion'",
    # in a multirun, all jobs are checked before the first one starts
    ("-m", "model.hidden=64,0"): "job model.hidden=0: model.hidden must be",
    (
        "-m",
        "seed=range(1000000000)",
    ): "seed=range(1000000000) has more than 100,000 values, the most of a sweep",
    ("-m", "seed=range(1,9,0)"): "seed=range(1,9,0) has more than 100,000 values",
    ("-m", "seed=range(1000)", "data.split_seed=range(1000)"): "data.split_seed=range(1000) makes more than",
    ("-m", "trainer=ddp", "seed=1,2"): "trainer=ddp can't be part of a multirun",
}

# key -> values that Lightning or torch would take without a word, or tell of in a traceback
WRONG = {
    **{
        f"trainer.{key}": [-1, 1.5, math.nan, math.inf, True, "text", [1], {"a": 1}]
        for key in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches")
    },
    "trainer.val_check_interval": [0, -1, 1.5, True, [1]],
    "trainer.num_sanity_val_steps": [-2, 0.5, math.nan, "text", [1], True],
    "trainer.accumulate_grad_batches": [0, 10**20],
    "trainer.gradient_clip_val": [-1, math.nan, math.inf, True, "text"],
    "trainer.gradient_clip_algorithm": ["text", 1, True],
    "trainer.deterministic": ["text", 1, [1]],
    **{
        f"trainer.{key}": [0, 1, "text", [1]]
        for key in (
            "enable_checkpointing",
            "enable_progress_bar",
            "inference_mode",
            "benchmark",
            "sync_batchnorm",
        )
    },
    "trainer.max_steps": [0, -2, "text", 10**20],
    "trainer.min_epochs": [-1, 0.5],
    "trainer.max_time": [-1, True],
    "trainer.accelerator": [[1], 1],
    "trainer.profiler": [1, True],
    "trainer.plugins": ["text"],
    "optimizer.fused": ["text", 1],
    "optimizer.weight_decay": [10**20, True],
    "scheduler.T_max": [0, -1, 1.5, "text"],
    "scheduler.eta_min": [-1, math.nan],
    "scheduler.max_lr": [-1, 0],
    "scheduler.pct_start": [2, math.nan],
    "scheduler.step_size": [0, "text"],
    "scheduler.gamma": [math.nan, -1],
    "scheduler.factor": [2],
    "scheduler.patience": [-1, "text"],
    "scheduler.threshold": [math.nan, "text"],
    "scheduler.milestones": ["text", [0], [1.5], 3],
    "callbacks.early_stopping.patience": [-1, 0.5, "text", None],
    "callbacks.early_stopping.min_delta": [math.nan, -1],
    "callbacks.film.enabled": ["text", 1, None],
    "callbacks.film.path": [-1, None, ["a"]],
    "callbacks.checkpoint._partial_": ["text", 1],
    "logger.csv.save_dir": [1, None],
    "data.source": [0, 1, "text", []],
}
# the same, as the class says that is named: told once it has been imported, and before any data is read
WRONG_TYPES = {
    "scheduler": (
        "torch.optim.lr_scheduler.OneCycleLR",
        {"three_phase": ["text", 1], "base_momentum": [["a"], "text"]},
    ),
    "optimizer": (
        "torch.optim.AdamW",
        {"betas": [0.9, "text", [0.9, "b"]], "maximize": ["text"]},
    ),
    "metrics.acc": (
        "torchmetrics.classification.MulticlassAccuracy",
        {"average": ["text", 1], "validate_args": ["text"], "top_k": [0.5, "text"]},
    ),
    "callbacks.mine": (
        "lightning.pytorch.callbacks.EarlyStopping",
        {"monitor": [3], "strict": ["text"], "stopping_threshold": [math.nan, "text"]},
    ),
    "callbacks.pruning.pruner": ("optuna.pruners.MedianPruner", {"n_startup_trials": ["text", 0.5]}),
    "trainer": (
        "lightning.pytorch.Trainer",
        {"devices": [0.5, {"a": 1}, None], "profiler": [{"a": 1}], "plugins": [[1]]},
    ),
}
RIGHT = {
    "trainer.limit_val_batches": [0, 0.0, 1, 1.0, 7, None],
    "trainer.val_check_interval": [3, 0.5, "00:00:05:00", {"minutes": 5}],
    "trainer.num_sanity_val_steps": [-1, 0, 2],
    "trainer.fast_dev_run": [True, False, 3],
    "trainer.gradient_clip_val": [0, 0.5],
    "trainer.deterministic": [True, "warn"],
    "trainer.max_steps": [-1, 5],
    "trainer.strategy": ["auto", {"_target_": "lightning.pytorch.strategies.DDPStrategy"}],
    "optimizer.fused": [None, False],
    "scheduler.T_max": ["total_steps", 5],
    "scheduler.eta_min": [0, 1e-5],
    "scheduler.max_lr": [0.1, [0.1, 0.2]],
    "optimizer.eps": [1e-8, [1e-30, 0.001]],
}

# runs the command in this interpreter, and prints whether torch was imported
WATCH = """
import runpy, sys
code = 0
try:
    runpy.run_module("mnist_lightning.train", run_name="__main__", alter_sys=True)
except SystemExit as exit:
    code = exit.code
    if isinstance(code, str):
        sys.stderr.write(code)
        code = 1
print("torch imported" if "torch" in sys.modules else "torch not imported")
sys.exit(code)
"""


def test_hydra_imports_no_torch(tmp_path: Path, environment: dict[str, str]) -> None:
    """The processes of the next test start from this state."""
    code = f"import sys, {', '.join(LIGHT)}; sys.exit('torch' in sys.modules)"
    assert Fresh("-c", code, cwd=tmp_path, env=environment).wait() == 0


@pytest.mark.parametrize(
    ("arguments", "message"), few(MISTAKES.items(), 4), ids=lambda value: " ".join(value)
)
def test_mistake_is_told_before_torch_is_imported(
    arguments: tuple[str, ...],
    message: str,
    light: Preloaded,
    tmp_path: Path,
    environment: dict[str, str],
) -> None:
    done = light.start("-c", WATCH, *arguments, cwd=tmp_path, env=environment).finish()
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "torch not imported" in done.stdout
    assert not list(tmp_path.glob("logs/train/*/*/[!.m]*")), "a refused run left something behind"


def set_to(settings: Train, key: str, value: object) -> Train:
    """Return a copy of checked settings with another value for a dotted key."""
    every = dataclasses.asdict(settings)
    *outer, name = key.split(".")
    inner = every
    for one in outer:
        inner = inner.setdefault(one, {})
    inner[name] = value
    group = key.split(".")[0]
    if group == "data":
        every["data"] = config.Data(**(every["data"] | {"augment": settings.data.augment}))
    return dataclasses.replace(settings, **{group: every[group]})


def test_what_lightning_and_torch_would_take_is_refused_by_name(tmp_path: Path) -> None:
    plain = settle(tmp_path, "callbacks=early_stopping")

    for key, values in WRONG.items():
        for value in values:
            with pytest.raises(
                (ValueError, TargetError),
                match=rf"^{re.escape(key)} must be .*, got '?{re.escape(str(value))}'?$",
            ):
                set_to(plain, key, value)
    plain = dataclasses.replace(plain, callbacks={})
    for key, values in RIGHT.items():
        for value in values:
            group, _, name = key.partition(".")
            assert getattr(set_to(plain, key, value), group)[name] == value
    theirs = {"_target_": "my_parts.Noam", "factor": 2.0, "patience": "long"}
    assert dataclasses.replace(plain, scheduler=theirs).scheduler == theirs
    with pytest.raises(ValueError, match=r"^optimizer\.lr must be a finite number > 0, got -1$"):
        dataclasses.replace(plain, optimizer={"_target_": "my_parts.Lion", "lr": -1})


def test_types_are_those_of_the_class_that_is_named(tmp_path: Path) -> None:
    pruner = "pruner: {_target_: optuna.pruners.NopPruner}"
    target = "mnist_lightning.callbacks.pruning.Pruning"
    pruning = f"+callbacks.pruning={{_target_: {target}, run_dir: a, monitor: val/acc, {pruner}}}"
    plain = settle(tmp_path, pruning)
    check_parts(plain)
    for key, (target, arguments) in WRONG_TYPES.items():
        for name, values in arguments.items():
            for value in values:
                others = plain.trainer if key == "trainer" else {"_target_": target, "_partial_": True}
                wrong = set_to(plain, key, {**others, name: value})
                with pytest.raises(
                    TargetError,
                    match=rf"^{re.escape(key)}\.{name} must be .*, got {re.escape(str(value))}$",
                ):
                    check_parts(wrong)
    nested = {"_target_": "lightning.pytorch.profilers.SimpleProfiler", "folder": "x"}
    with pytest.raises(TargetError, match=r"^trainer\.profiler\.folder is no argument of .*SimpleProfiler"):
        check_parts(set_to(plain, "trainer", {**plain.trainer, "profiler": nested}))


def test_our_message_is_one_line(fresh_command: Run, tmp_path: Path) -> None:
    done = fresh_command("train", "model.hidden=0", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_full_error_on_request(command: Run, tmp_path: Path) -> None:
    done = command("train", "model.hidden=0", cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("argument", ["--help", "--cfg=job", "--info=plugins"])
def test_looking_imports_no_torch(argument: str, tmp_path: Path, environment: dict[str, str]) -> None:
    done = Fresh("-c", WATCH, *argument.split("="), cwd=tmp_path, env=environment).finish()
    assert done.returncode == 0, done.stderr
    assert "torch not imported" in done.stdout
    assert {"--help": "model.hidden=", "--cfg=job": "batch_size:", "--info=plugins": "GridSweeper"}[
        argument
    ] in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_hidden_may_be_a_number(tmp_path: Path) -> None:
    assert settle(tmp_path, "model.hidden=64").model["hidden"] == [64]
    assert settle(tmp_path, "model.hidden=[64,32]").model["hidden"] == [64, 32]


def test_choices_are_those_of_the_code() -> None:
    assert list(network.ACTIVATIONS) == list(config.ACTIVATIONS)
    assert list(network.NORMS) == list(config.NORMS)


def test_schemas_are_those_of_the_code() -> None:
    for name, schema in config.SCHEMAS.items():
        module, _, kind = name.rpartition(".")
        parameters = inspect.signature(getattr(importlib.import_module(module), kind)).parameters
        assert {field.name for field in dataclasses.fields(schema)} <= set(parameters)
        told = {key: tuple(value) if isinstance(value, list) else value for key, value in read(name).items()}
        assert told == {key: parameter.default for key, parameter in parameters.items()}


def test_what_is_not_given_is_the_nets_default(tmp_path: Path) -> None:
    settings = settle(tmp_path, "~model.noise", "~model.hidden", "~loss.label_smoothing")
    assert settings.model == settle(tmp_path).model
    assert settings.loss == settle(tmp_path).loss


def test_step_schedule_that_never_acts_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settle(tmp_path, "scheduler=step", "trainer.max_epochs=3")
    assert "scheduler.step_size=3 has no effect" in caplog.text


def test_libyaml_reads_the_configs_as_pyyaml_does() -> None:
    assert yaml.SafeLoader is not yaml.CSafeLoader, "importing the package changes nothing"
    paths = list(Path(config.CONF_DIR).rglob("*.yaml"))
    assert len(paths) > 20
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert yaml.load(text, yaml.CSafeLoader) == yaml.load(text, yaml.SafeLoader)


# a Hydra program that prints its settings, and then how often they were composed
APP = """
import sys
import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from mnist_lightning import workarounds

plain, composed = ConfigLoaderImpl.load_configuration, []

def load_configuration(*arguments, **more):
    composed.append(None)
    return plain(*arguments, **more)

ConfigLoaderImpl.load_configuration = load_configuration
if sys.argv.pop(1) == "once":
    workarounds.compose_once()

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def run(cfg):
    print(OmegaConf.to_yaml(cfg), OmegaConf.to_yaml(HydraConfig.get()))

try:
    run()
finally:
    print(len(composed), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "returncode", "usually", "once"),
    [
        (("a=2", "group=one"), 0, 2, 1),
        pytest.param(("a=2", "hydra.mode=RUN"), 0, 2, 1, marks=pytest.mark.slow),
        (("-m", "a=2,3"), 0, 6, 5),
        (("a=2,3", "hydra.mode=MULTIRUN"), 0, 6, 7),
        pytest.param(("a=2,3", "group=sweep"), 0, 6, 7, marks=pytest.mark.slow),  # the mode is in the file
        pytest.param(("group=sweep",), 0, 4, 4, marks=pytest.mark.slow),
        (("a=2,3",), 1, 2, 2),
        pytest.param(("b=2",), 1, 2, 2, marks=pytest.mark.slow),
        (("group=none",), 1, 2, 2),
    ],
)
def test_composing_once_changes_nothing(
    arguments: tuple[str, ...],
    returncode: int,
    usually: int,
    once: int,
    light: Preloaded,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    (tmp_path / "conf" / "group").mkdir(parents=True)
    (tmp_path / "app.py").write_text(APP)
    folders = "hydra: {run: {dir: run}, sweep: {dir: sweep}}"
    (tmp_path / "conf" / "app.yaml").write_text(
        f"defaults: [_self_, group: one, override hydra/hydra_logging: disabled]\na: 1\n{folders}\n"
    )
    (tmp_path / "conf" / "group" / "one.yaml").write_text("b: ${a}\n")
    (tmp_path / "conf" / "group" / "sweep.yaml").write_text("# @package _global_\nhydra: {mode: MULTIRUN}\n")
    env = environment | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    usual, done = (
        light.start("app.py", how, *arguments, cwd=tmp_path, env=env).finish() for how in ("usual", "once")
    )
    assert done.returncode == usual.returncode == returncode, done.stderr
    assert done.stdout == usual.stdout
    *told, count = done.stderr.splitlines()
    *usually_told, usual_count = usual.stderr.splitlines()
    assert told == usually_told
    assert (int(usual_count), int(count)) == (usually, once)
    assert returncode == 1 or "hydra" in done.stdout
