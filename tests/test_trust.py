"""Reading a stranger's checkpoint or folder runs no code of it, writes nothing for it, and tells it nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DefaultRun, Once, Run, few
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from test_own_parts import CONF, OWN, TINY, retyped

from mnist_lightning import trust
from mnist_lightning.config import register
from mnist_lightning.evaluation.trained import load_classifier
from mnist_lightning.rundir.checkpoint import serialize
from mnist_lightning.rundir.outside import check_links
from mnist_lightning.rundir.resume import BASE, load_settings
from mnist_lightning.sweeps.results import count_jobs, read_space
from mnist_lightning.sweeps.resume import rewrite_arguments
from mnist_lightning.sweeps.study import to_distribution
from mnist_lightning.targets import KINDS, make, strange_modules

SECRET = "a-secret-of-the-environment"
MKDIR = {"_target_": "os.mkdir", "_args_": ["canary"]}  # a target that must not be called
FORWARD = "mnist_lightning.network.FeedForward"

# Recipes of a net, loss or metric in a checkpoint
RECIPES: dict[str, dict[str, Any]] = {
    "a function": {"model": MKDIR},
    "a loader of pickles": {"model": {"_target_": "torch.load", "f": "evil.pt"}},
    "a detour through ours": {"model": {"_target_": "mnist_lightning.network.torch.load", "f": "evil.pt"}},
    "a detour through torch": {
        "model": {"_target_": "torch.nn.modules.module.torch.hub.load", "repo_or_dir": "x"}
    },
    "a writer of torch's by a detour": {
        "model": {
            "_target_": "torch.nn.Sequential",
            "_args_": [{"_target_": "torch.nn.modules.module.torch.package.PackageExporter", "f": "canary"}],
        }
    },
    "a writer of torch's within a metric": {
        "metrics": {
            "acc": {
                "_target_": "torchmetrics.wrappers.MinMaxMetric",
                "base_metric": {
                    "_target_": "torchmetrics.wrappers.minmax.torch._C.PyTorchFileWriter",
                    "_args_": ["canary"],
                },
            }
        }
    },
    "a metric that fetches a model": {
        "metrics": {"acc": {"_target_": "torchmetrics.text.bert.BERTScore", "model_name_or_path": "canary"}}
    },
    "a class by a detour": {"model": {"_target_": "torch.nn.modules.module.OrderedDict"}},
    "one of ours that writes": {
        "model": {"_target_": "mnist_lightning.rundir.atomic.write_atomic", "path": "canary"}
    },
    "one of ours of another kind": {
        "model": {"_target_": "mnist_lightning.callbacks.checkpoints.Checkpoints"}
    },
    "within an argument": {"model": {"_target_": FORWARD, "hidden": MKDIR}},
    "within a list": {"model": {"_target_": FORWARD, "hidden": [8, MKDIR]}},
    "within torch's": {"model": {"_target_": "torch.nn.Sequential", "_args_": [MKDIR]}},
    "a loss": {"loss": MKDIR},
    "a function of torch that is no loss": {"loss": {"_target_": "torch.nn.functional.boolean_dispatch"}},
    "a metric": {"metrics": {"acc": MKDIR}},
    "a metric of another kind": {"metrics": {"acc": {"_target_": "torch.nn.Linear"}}},
    "a name that is none": {"model": {"_target_": 3}},
    "a lookup": {"model": {"_target_": FORWARD, "activation": "${oc.env:SECRET}"}},
    "a lookup in a loss": {
        "loss": {"_target_": "torch.nn.CrossEntropyLoss", "reduction": "${oc.env:SECRET}"}
    },
}


@pytest.mark.parametrize("what", RECIPES)
def test_a_checkpoint_runs_nothing(
    what: str, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", SECRET)
    checkpoint = torch.load(trained_run / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] |= RECIPES[what]
    (tmp_path / "best.ckpt").write_bytes(serialize(checkpoint))
    with pytest.raises((OSError, trust.TrustError)) as told:
        load_classifier(tmp_path / "best.ckpt")
    assert "best.ckpt" in str(told.value)
    assert SECRET not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


ABROAD = "/tmp/mnist_lightning_canary"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
# Values in a run's saved settings, by key
SETTINGS: dict[str, dict[str, Any]] = {
    "a callback": {"callbacks.x": MKDIR},
    "a loader of pickles": {"callbacks.x": {"_target_": "torch.load", "f": "evil.pt"}},
    "a class of another kind": {"callbacks.x": {"_target_": "mnist_lightning.callbacks.checkpoints.Path"}},
    "an optimizer": {"optimizer": MKDIR},
    "within an optimizer": {"optimizer.lr": MKDIR},
    "a schedule": {"scheduler": MKDIR},
    "a trainer": {"trainer._target_": "os.mkdir"},
    "a strategy": {"trainer.strategy": {"_target_": "subprocess.run", "args": "mkdir canary"}},
    "a plugin": {"trainer.plugins": [MKDIR]},
    "a net": {"model._target_": "os.mkdir"},
    "where nothing is built": {"data.augment.rotation": MKDIR},
    "a logger": {"logger.x": MKDIR},
    "a pruner": {"callbacks.x": {"_target_": "mnist_lightning.callbacks.pruning.Pruning", "pruner": MKDIR}},
    "a place": {"callbacks.x": {"_target_": CHECKPOINT, "dirpath": ABROAD}},
    "a place of the user's": {"callbacks.x": {"_target_": CHECKPOINT, "dirpath": "~/canary"}},
    "a place beside it": {"callbacks.x": {"_target_": CHECKPOINT, "dirpath": "${run_dir:}/../canary"}},
    "a place in the working folder": {"callbacks.x": {"_target_": CHECKPOINT, "dirpath": "canary"}},
    "a page's place": {
        "callbacks.x": {"_target_": "mnist_lightning.callbacks.watch.WatchPage", "path": "index.html"}
    },
    "a name that climbs": {"callbacks.x": {"_target_": CHECKPOINT, "filename": "../../canary"}},
    "a logger's place": {"logger.csv.save_dir": ABROAD},
    "a logger's address": {
        "logger.x": {
            "_target_": "lightning.pytorch.loggers.MLFlowLogger",
            "tracking_uri": "http://localhost:1/",
        }
    },
    "another setting's place": {"callbacks.x": {"_target_": CHECKPOINT, "dirpath": "${data.data_dir}"}},
    "a place by two steps": {
        "monitor.metric": "${logger.csv.name}",
        "logger.csv.name": "../../canary",
        "callbacks.x": {"_target_": CHECKPOINT, "dirpath": "${run_dir:}/${monitor.metric}"},
    },
    "a name by a lookup": {"callbacks.x": {"_target_": "${monitor.metric}"}, "monitor.metric": "os.mkdir"},
    "a circle": {"optimizer.lr": "${optimizer.weight_decay}", "optimizer.weight_decay": "${optimizer.lr}"},
    "a trainer's place": {"trainer.default_root_dir": ABROAD},
    "a profiler's place": {
        "trainer.profiler": {"_target_": "lightning.pytorch.profilers.SimpleProfiler", "dirpath": ABROAD}
    },
    "a place for data": {"data.data_dir": ABROAD},
    "a lookup": {"data.data_dir": "${oc.env:SECRET}"},
    "a lookup by a detour": {"data.data_dir": "${${data.name}:SECRET}", "data.name": "oc.env"},
    "a lookup of Hydra's": {"callbacks.x": {"_target_": CHECKPOINT, "dirpath": "${hydra:runtime.cwd}"}},
    "a lookup of a file": {"optimizer.lr": "${oc.decode:${oc.env:SECRET}}"},
    "a huge net": {"model.hidden": [10**5, 10**5]},
    "a net of many layers": {"model.hidden": [1] * 10**4},
    "a metric that takes all memory": {
        "metrics.x": {"_target_": "torchmetrics.classification.BinaryAUROC", "thresholds": 10**10}
    },
    "copies of a metric without end": {
        "metrics.x": {
            "_target_": "torchmetrics.wrappers.MultioutputWrapper",
            "num_outputs": 10**9,
            "base_metric": {"_target_": "torchmetrics.classification.BinaryAUROC"},
        }
    },
    "many processes": {"data.num_workers": 10**5},
    "many devices": {"trainer.devices": "100000"},
    "Hydra's own node": {"hydra": {"callbacks": {"x": MKDIR}}},
    "a list of defaults": {"defaults": [{"override /hydra/launcher": "basic"}]},
}


def edit(path: Path, changes: dict[str, Any]) -> None:
    content = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        *groups, name = key.split(".")
        node = content
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    path.write_text(yaml.safe_dump(content))


@pytest.fixture
def strange(default_run: DefaultRun, tmp_path: Path) -> Path:
    """A working folder with a stranger's run folder in it."""
    (tmp_path / "work").mkdir()
    shutil.copytree(default_run.folder, tmp_path / "work" / "run")
    assert not Path(ABROAD).exists()
    return tmp_path / "work"


@pytest.mark.parametrize("what", few(SETTINGS, 2))
def test_saved_settings_run_nothing_write_nowhere_and_learn_nothing(
    what: str, strange: Path, command: Run
) -> None:
    edit(strange / "run" / ".hydra" / "config.yaml", SETTINGS[what])
    before = sorted(path for path in strange.rglob("*") if path.name not in (".lock", "train.log"))
    done = command("train", "resume=run", "trainer.max_epochs=20", cwd=strange, SECRET=SECRET)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert SECRET not in done.stdout + done.stderr
    after = sorted(path for path in strange.rglob("*") if path.name not in (".lock", "train.log"))
    assert [path for path in after if path not in before and ".hydra" not in path.parts] == []
    assert not Path(ABROAD).exists()
    assert not Path("~/canary").expanduser().exists()


def test_a_trainer_without_a_place_writes_into_the_runs_folder(strange: Path) -> None:
    edit(strange / "run" / ".hydra" / "config.yaml", {"trainer.default_root_dir": None})
    register()
    load_settings(strange / "run", [], ())
    node = ConfigStore.instance().load(f"{BASE}.yaml").node
    assert OmegaConf.to_container(node, resolve=False)["trainer"]["default_root_dir"] == "${run_dir:}"


def test_what_an_earlier_resumption_saved_is_checked_as_well(strange: Path, command: Run) -> None:
    hydra = strange / "run" / ".hydra"
    (hydra / "resume-1").mkdir()
    for name in ("config.yaml", "overrides.yaml"):
        shutil.copy(hydra / name, hydra / "resume-1")
    for hostile, clean in ((hydra / "resume-1", hydra), (hydra, hydra / "resume-1")):
        kept = (clean / "config.yaml").read_text()
        edit(hostile / "config.yaml", {"callbacks.x": MKDIR})
        done = command("train", "resume=run", "trainer.max_epochs=20", cwd=strange)
        assert done.returncode == 1
        assert "its saved callbacks.x._args_[0]=canary" in done.stderr
        (hostile / "config.yaml").write_text(kept)


def test_hydra_looks_for_nothing_in_the_folder(strange: Path, command: Run) -> None:
    """Hydra uses neither config groups in the folder nor a directive at the head of its file."""
    hydra = strange / "run" / ".hydra"
    (hydra / "hydra" / "job_logging").mkdir(parents=True)
    evil = {
        "handlers": {"x": {"()": "os.mkdir", "path": "canary"}},
        "version": 1,
        "root": {"handlers": ["x"]},
    }
    (hydra / "hydra" / "job_logging" / "train.yaml").write_text(yaml.safe_dump(evil))
    config = hydra / "config.yaml"
    config.write_text(f"# @package hydra.callbacks\n{config.read_text()}")
    edit_epochs = ("trainer.max_epochs=9", "scheduler.T_max=9")
    done = command("train", "resume=run", *edit_epochs, cwd=strange)
    assert "can't be resumed with other settings (scheduler.T_max: total_steps -> 9)" in done.stderr
    assert not (strange / "canary").exists()


@pytest.mark.slow
def test_what_is_typed_needs_no_trust(strange: Path, command: Run) -> None:
    """The saved value that a typed value replaces is not checked."""
    (strange / "mine.py").write_text(
        "import pathlib\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Mark(Callback):\n"
        "    def on_fit_end(self, trainer, pl_module):\n"
        "        pathlib.Path('marked').touch()\n"
    )
    edit(strange / "run" / ".hydra" / "config.yaml", {"logger.csv.save_dir": ABROAD, "scheduler": {}})
    shutil.rmtree(strange / "run" / "csv")
    typed = ("+callbacks.mark._target_=mine.Mark", "logger.csv.save_dir=run")
    done = command("train", "resume=run", "trainer.max_epochs=9", *typed, cwd=strange)
    assert done.returncode == 0, done.stderr
    assert (strange / "marked").exists()


# Arguments in a sweep's saved command
OVERRIDES = [
    "--config-dir=/tmp",
    "-cd=/tmp",
    "hydra.callbacks.x._target_=os.mkdir",
    "+hydra.callbacks.x={_target_: os.mkdir, path: canary}",
    "hydra.searchpath=[file:///tmp]",
    "hydra/job_logging=evil",
    "hydra/launcher=evil",
    "hydra.launcher.setup=[mkdir canary]",
    "hydra.launcher._target_=os.mkdir",
    "hydra.sweeper.sampler._target_=os.mkdir",
    f"hydra.sweeper.storage={ABROAD}",
    "hydra.sweeper.params.hydra.launcher.setup=[mkdir canary]",
    "hydra.job.env_set.LD_PRELOAD=evil.so",
    "+experiment@hydra.callbacks.x=fast",
    "+callbacks.x._target_=os.mkdir",
    "+callbacks.x={_target_: os.mkdir, path: canary}",
    f"logger.csv.save_dir={ABROAD}",
    f"+callbacks.x={{_target_: {CHECKPOINT}, dirpath: {ABROAD}}}",
    f"+callbacks.x={{_target_: {CHECKPOINT}, dirpath: a}},{{_target_: {CHECKPOINT}, dirpath: {ABROAD}}}",
    f"data.data_dir={ABROAD}",
    "data.data_dir=${oc.env:SECRET}",
    "model._target_=os.mkdir",
]


@pytest.fixture
def swept(once: Once, command: Run, tmp_path: Path) -> Path:
    """A working folder with a sweep of two jobs, one of which has not run."""

    def make(cwd: Path) -> None:
        typed = (*TINY, "model.hidden=8", "optimizer.weight_decay=${optimizer.lr}", "seed=1,2")
        done = command("train", "-m", *typed, "hydra.sweep.dir=sweep", cwd=cwd)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(cwd / "sweep" / "1")

    shutil.copytree(once("strange sweep", make), tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("override", few(OVERRIDES, 3))
def test_a_sweeps_saved_command_runs_nothing(override: str, swept: Path, command: Run) -> None:
    path = swept / "sweep" / "multirun.yaml"
    content = yaml.safe_load(path.read_text())
    kind = "hydra" if override.lstrip("+").startswith(("hydra", "-")) else "task"
    content["hydra"]["overrides"][kind].append(override)
    path.write_text(yaml.safe_dump(content))
    done = command("train", "-m", "resume=sweep", cwd=swept, SECRET=SECRET)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not (swept / "sweep" / "1").exists()
    assert not (swept / "canary").exists()
    assert not Path(ABROAD).exists()


def test_a_sweep_of_a_billion_jobs_takes_neither_memory_nor_time(swept: Path) -> None:
    path = swept / "sweep" / "multirun.yaml"
    path.write_text(path.read_text().replace("seed=1,2", "seed=range(1000000000)"))
    assert "seed=range(1000000000)" in rewrite_arguments(["-m", f"resume={swept / 'sweep'}"])
    assert count_jobs(swept / "sweep") is None
    with pytest.raises(ValueError, match="more than 100,000 values"):
        to_distribution(read_space(swept / "sweep")["seed"])


def test_nothing_in_a_strangers_folder_leads_out_of_it(swept: Path) -> None:
    """Its settings may write to anything in it: a logger's name, a job's folder of another name."""
    outside = swept / "outside"
    outside.mkdir()
    for folder, mode in ((swept / "sweep" / "0", []), (swept / "sweep", ["-m"])):
        for name in ("link", "a/checkpoints", "0_x/csv"):
            link = folder / name
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(outside)
            with pytest.raises(OSError, match=rf"{name} is a link out of its folder"):
                rewrite_arguments([*mode, f"resume={folder}"])
            link.unlink()
            link.symlink_to(folder / "inside")
            check_links(folder)
            link.unlink()


def test_an_honest_sweep_is_resumed(swept: Path, command: Run) -> None:
    done = command("train", "-m", "resume=sweep", cwd=swept)
    assert done.returncode == 0, done.stderr
    assert (swept / "sweep" / "1" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_a_sweep_of_ones_own_nets_is_resumed_once_they_are_trusted(
    tmp_path: Path, command: Run, python: Run
) -> None:
    work = tmp_path / "work"
    shutil.copytree(OWN, work)
    settings = (*CONF, "model=cnn", *TINY, "seed=1,2", "hydra.sweep.dir=sweep")
    assert command("train", "-m", *settings, cwd=work).returncode == 0
    shutil.rmtree(work / "sweep" / "1")
    done = command("train", "-m", "resume=sweep", *CONF, cwd=work)
    assert done.returncode == 1
    assert "names my_parts.ConvNet (model)" in done.stderr
    done = python(*retyped(done.stderr), cwd=work)
    assert done.returncode == 0, done.stderr
    assert (work / "sweep" / "1" / "checkpoints" / "best.ckpt").exists()
    done = command("train", "-m", "resume=sweep", *CONF, cwd=work, MNIST_LIGHTNING_TRUST="other, my_parts")
    assert done.returncode == 0, "the variable does as well"


def test_an_earlier_editions_sweep_is_not_gone_on_with(swept: Path, command: Run) -> None:
    edit(swept / "sweep" / "multirun.yaml", {"model": {"hidden": 8}})
    done = command("train", "-m", "resume=sweep", cwd=swept)
    assert done.returncode == 1
    assert done.stderr.startswith("sweep can't be resumed: an earlier version")
    assert command("report", "run=sweep", cwd=swept).returncode == 0


@pytest.mark.parametrize(
    ("value", "names"),
    [("a", ("a",)), (["a.b", "c"], ("a.b", "c")), (None, ()), ([], ())],
)
def test_trust_is_a_name_or_a_list(
    value: Any, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    assert trust.read_trust(value) == names
    monkeypatch.setenv(trust.VARIABLE, "x, y.z")
    assert trust.read_trust(value) == (*names, "x", "y.z")


@pytest.mark.parametrize("value", ["a b", "a-b", "../a", 3, {"a": 1}])
def test_what_is_no_module_is_not_trusted(value: Any) -> None:
    with pytest.raises(trust.TrustError, match="trust must be a module or a list"):
        trust.read_trust(value)


def test_a_trusted_module_is_not_its_namesake(trained_run: Path) -> None:
    config = {"model": {"_target_": "my_nets_of_another.Net"}}
    with pytest.raises(trust.TrustError, match="if you trust it"):
        trust.check_targets(config, trained_run, ("my_nets",))
    trust.check_targets({"model": {"_target_": "my_nets.deep.Net"}}, trained_run, ("my_nets",))


def known_things() -> list[tuple[str, str]]:
    """Names that settings use most."""
    return [
        ("model", "torch.nn.Sequential"),
        ("loss", "torch.nn.CrossEntropyLoss"),
        ("loss", "torch.nn.functional.cross_entropy"),
        ("loss", "torch.nn.modules.loss.MSELoss"),
        ("metrics.x", "torchmetrics.Accuracy"),
        ("metrics.x", "torchmetrics.regression.MeanAbsoluteError"),
        ("optimizer", "torch.optim.AdamW"),
        ("optimizer", "torch.optim.adamw.AdamW"),
        ("scheduler", "torch.optim.lr_scheduler.OneCycleLR"),
        ("callbacks.x", "lightning.pytorch.callbacks.LearningRateMonitor"),
        ("callbacks.x", "mnist_lightning.callbacks.histograms.Histograms"),
        ("logger.x", "lightning.pytorch.loggers.CSVLogger"),
        ("trainer", "lightning.Trainer"),
    ]


@pytest.mark.parametrize(("key", "name"), known_things())
def test_what_libraries_define_needs_no_trust(key: str, name: str) -> None:
    config: dict[str, Any] = {}
    group, _, entry = key.partition(".")
    config[group] = {entry: {"_target_": name}} if entry else {"_target_": name}
    assert strange_modules(config) == []
    wrong = {other: config[group] for other in KINDS if other not in (group, "model", "loss", "optimizer")}
    if group not in ("model", "loss"):
        assert all(strange_modules({other: value}) for other, value in wrong.items()), "each where it belongs"


def test_a_builder_sees_through_a_detour() -> None:
    from mnist_lightning.targets import TargetError

    for name, home in (("module.OrderedDict", "collections"), ("container.torch.hub.Path", "pathlib")):
        inner = {"_target_": f"torch.nn.modules.{name}"}
        with pytest.raises(TargetError, match=rf"is not defined in torch.nn: name {home} itself"):
            make({"_target_": "torch.nn.Sequential", "_args_": [inner]}, "model")


JOURNAL: Callable[[Path], Path] = lambda sweep: next(sweep.glob("*/trial.json"))  # noqa: E731


@pytest.mark.slow
def test_a_searchs_unfinished_trial_runs_nothing(tmp_path: Path, command: Run) -> None:
    search = (
        "search=mlp",
        "hydra.sweeper.params=null",
        "hydra.sweeper.n_trials=1",
        "model.hidden=choice(8,9)",
    )
    done = command("train", "-m", *search, *TINY, "hydra.sweep.dir=search", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    journal = tmp_path / "search" / "optuna.journal"
    lines = journal.read_text().splitlines()
    journal.write_text(
        "\n".join(line for line in lines if json.loads(line)["op_code"] != 6) + "\n"
    )  # its end
    shutil.rmtree(tmp_path / "search" / "0" / "checkpoints")
    (tmp_path / "search" / "0" / "status.json").unlink()
    trial = tmp_path / "search" / "0" / "trial.json"
    saved = json.loads(trial.read_text())
    saved["overrides"].append("+callbacks.x={_target_: os.mkdir, path: canary}")
    trial.write_text(json.dumps(saved))
    done = command("train", "-m", "resume=search", cwd=tmp_path)
    assert done.returncode == 1
    assert "os.mkdir" in done.stderr
    assert not list(tmp_path.rglob("canary"))
