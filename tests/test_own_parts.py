"""Tests of users' own nets, losses and metrics, from a module and a YAML file, in all commands."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NO_PICTURES, REPOSITORY, Run, Start, few
from PIL import Image, ImageDraw
from processes import wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import differences

from mnist_lightning.rundir.checkpoint import load

OWN = REPOSITORY / "tests" / "own"
CONF = ("--config-dir", "my_conf")
TINY = ("trainer.max_epochs=2", "+trainer.limit_train_batches=12", "trainer.log_every_n_steps=5")
REGRESSION = ("model=regression", "loss=squared_error", "metrics=error", "monitor.metric=val/error")
# What is brought -> its settings, the module to be trusted, what its run reports, one more setting to sweep over
BROUGHT = {
    "cnn": (("model=cnn", "loss=focal", "scheduler=onecycle"), "my_parts", "val/acc", "model.channels=3,4"),
    "linear": (("model=linear", "ema_decay=0.9"), "my_parts", "val/acc", "model.scale=0.5,1"),
    "regression": (REGRESSION, "my_parts", "val/error", "loss.factor=0.5,1"),
    "resnet": (("model=resnet", "data.batch_size=8"), "torchvision.models", "val/acc", "seed=1,2"),
}

pytestmark = pytest.mark.usefixtures("from_wheel")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    shutil.copytree(OWN, tmp_path / "work")
    return tmp_path / "work"


def retyped(stderr: str) -> list[str]:
    """Return the command at the end of a refusal as arguments of Python."""
    (line,) = [line for line in stderr.splitlines() if "if you trust it:" in line]
    words = shlex.split(line.split("if you trust it:")[1])
    assert words[:2] == ["python", "-m"]
    return words[1:]


@pytest.mark.slow  # the short form is the flow of a folder of pictures, in test_own_data.py
@pytest.mark.parametrize("name", BROUGHT)
def test_from_training_to_report(name: str, work: Path, python: Run, command: Run, start: Start) -> None:
    chosen, module, metric, swept = BROUGHT[name]
    settings = [*CONF, *chosen, *TINY, "checkpoint.every_n_steps=2"]
    settings += ["data.val_size=500", "+trainer.limit_test_batches=4"]
    if name == "resnet":
        settings += ["+trainer.limit_val_batches=1", "data.val_size=8", "test=false", "data.train_size=200"]
        settings = [one.replace("train_batches=12", "train_batches=4") for one in settings]
    done = command("train", *settings, "hydra.run.dir=twin", cwd=work)
    assert done.returncode == 0, done.stderr
    assert f"run=twin trust={module}" in done.stdout
    metrics = json.loads((work / "twin" / "metrics.json").read_text())
    assert metric in metrics
    status = json.loads((work / "twin" / "status.json").read_text())
    assert [status["monitor"], status["mode"]] == [metric, "min" if name == "regression" else "max"]

    process = start("train", *settings, "hydra.run.dir=run", cwd=work)
    wait_for(lambda: any(work.glob("run/checkpoints/last.ckpt")), process)
    process.kill()
    process.wait()
    done = command("train", "resume=run", cwd=work)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"names {'my_parts.' if module == 'my_parts' else module}" in done.stderr
    done = python(*retyped(done.stderr), cwd=work)
    assert done.returncode == 0, done.stderr
    one, two = (load(work / run / "checkpoints" / "last.ckpt") for run in ("twin", "run"))
    assert differences(one, two) == []
    images = EventAccumulator(str(work / "run" / "tensorboard"), size_guidance={"images": 0})
    images.Reload()
    assert "images/training" in images.Tags()["images"]
    assert ("val/confusion_matrix" in images.Tags()["images"]) == (name != "regression")
    assert "can't be written" not in (work / "run" / "train.log").read_text()

    split = "split=val"
    for words in (
        ["evaluate", "run=run", split],
        ["compare", "runs=[run,twin]", split],
        ["export", "run=run"],
    ):
        if name == "resnet" and words[0] == "compare":
            continue  # it uses all validation images, which takes minutes
        arguments = ["-m", f"mnist_lightning.{words[0]}", *words[1:], f"trust={module}"]
        if name == "cnn":
            done = command(*words, cwd=work)
            assert done.returncode == 1, words
            assert len(done.stderr.splitlines()) == 1
            assert retyped(done.stderr) == arguments
        done = python(*arguments, cwd=work)
        assert done.returncode == 0, done.stderr
    evaluated = json.loads((work / "run" / "evaluation" / "val" / "metrics.json").read_text())
    accuracy = evaluated["own"]["error"] if name == "regression" else evaluated["acc"]
    assert accuracy == pytest.approx(metrics[metric], rel=1e-4)
    assert (work / "run" / "model.onnx").stat().st_size > 1000
    draw_seven().save(work / "seven.png")
    done = command("predict", "images=seven.png", "run=run", f"trust=[{module}]", "output=out", cwd=work)
    assert done.returncode == 0, done.stderr
    header = (work / "out" / "predictions.csv").read_text().splitlines()[0]
    assert header.startswith(
        "file,output" if name == "regression" else "file,prediction,probability,answer,distance,p(0)"
    )

    if name == "resnet":
        return
    done = command("train", "-m", *settings, swept, "test=false", "hydra.sweep.dir=sweep", cwd=work)
    assert done.returncode == 0, done.stderr
    report = (work / "sweep" / "report.md").read_text()
    assert metric in report
    values = [
        json.loads((work / f"sweep/{job}/status.json").read_text())["metrics"][metric] for job in range(2)
    ]
    best = (min if name == "regression" else max)(values)
    winner = re.findall(r"^\| 1 \| [^|]+ \| ([\d.]+) \|", report, re.M)
    assert float(winner[0]) == pytest.approx(best if name == "regression" else 100 * best, abs=0.006)


def draw_seven() -> Image.Image:
    picture = Image.new("L", (200, 200), 240)
    ImageDraw.Draw(picture).line([(60, 50), (140, 50), (90, 160)], fill=20, width=14)
    return picture


# A fault -> the settings, and the message
WRONG = {
    "no such module": (
        ("model._target_=my_part.Net",),
        r"model\._target_=my_part\.Net can't be imported: .*my_part",
    ),
    "no such class": (
        ("model._target_=my_parts.Net",),
        r"model\._target_=my_parts\.Net can't be imported: .*Net",
    ),
    "a broken module": (("model._target_=broken.Net",), r"model\._target_=broken\.Net can't be imported: "),
    "no class": (("model._target_=my_parts",), r"model\._target_=my_parts "),
    "another kind": (
        ("model._target_=torch.optim.Adam",),
        r"model\._target_=torch\.optim\.Adam is no torch\.nn\.Module",
    ),
    "no net": (
        ("model._target_=my_parts.squared_error",),
        r"model\.hidden is no argument of my_parts\.squared_error",
    ),
    "misspelt": (
        ("model=cnn", "+model.chanels=3"),
        r"model\.chanels is no argument of my_parts\.ConvNet \(did you mean channels\?\); it takes channels, image_shape,"
        r" num_classes, dropout",
    ),
    "missing": (
        ("model=cnn", "~model.channels"),
        r"model: my_parts\.ConvNet: missing a required argument: 'channels'",
    ),
    "wrong output": (
        ("model=regression", "+model.outputs=7"),
        r"gives \(2, 7\) for 2 images, and must give \(2, 10\)",
    ),
    "one output": (
        ("model=regression",),
        r"loss: mnist_lightning\.losses\.CrossEntropy wants a logit for each class, and ",
    ),
    "wrong channels": (
        ("model=resnet", "model._args_=[{_target_: torchvision.models.resnet18, num_classes: 10}]"),
        r"model: torch\.nn\.Sequential can't take images \(2, 1, 28, 28\): RuntimeError: .*3 channels",
    ),
    "its own error": (("model=linear", "+model.width=3"), r"can't be built: AssertionError: \{'width': 3\}"),
    "a vector": (
        ("loss=focal", "~loss.gamma", "loss._target_=my_parts.per_image"),
        r"loss: my_parts\.per_image gives \(2,\) for a batch, and must give one number",
    ),
    "a table added in training": (
        ("model=cnn", "loss=focal", "~loss.gamma", "loss._target_=my_parts.Lost"),
        r"loss: my_parts\.Lost\.penalize_net gives \(2, 10\) for a batch, and must give one number",
    ),
    "pairs": (
        (*REGRESSION, "loss._target_=my_parts.focal", "~loss.factor", "+loss.gamma=1"),
        r"loss: my_parts\.focal can't take outputs \(2, 1\)",
    ),
    "two values": (
        (*REGRESSION, "metrics.error._target_=my_parts.Each"),
        r"metrics\.error: my_parts\.Each gives \(2,\), and must give one number",
    ),
    "not the metric's shape": (
        ("model=cnn", "metrics=error", "monitor.metric=val/loss"),
        r"metrics\.error: my_parts\.AbsoluteError can't take outputs \(2, 10\) and labels \(2,\): AssertionError",
    ),
    "which is better?": (
        (*REGRESSION, "metrics.error._target_=my_parts.Shy"),
        r"monitor\.mode must be max or min: val/error does not say which is better",
    ),
    "the other way round": (
        (*REGRESSION, "monitor.mode=max"),
        r"monitor\.mode must be min with monitor\.metric=val/error, got max",
    ),
    "no such metric": (
        ("metrics=error",),
        r"monitor\.metric must be one of val/loss, val/error, got val/acc",
    ),
    "optimizer": (
        ("+optimizer.betta=1",),
        r"optimizer\.betta is no argument of torch\.optim\.\S*AdamW \(did you mean betas\?\)",
    ),
}


@pytest.mark.parametrize("what", few(WRONG, 4))
def test_what_does_not_fit_is_told_in_a_line(what: str, work: Path, command: Run) -> None:
    """The message comes before any data is read, and in a sweep before the first job, without importing torch."""
    arguments, line = WRONG[what]
    (work / "broken.py").write_text("import torch\n1 / 0\n")
    done = command("train", *CONF, *arguments, "data.data_dir=nowhere", cwd=work)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(line, done.stderr.splitlines()[-1])
    assert not (work / "nowhere").exists()


# Faults that a sweep finds before its first job, in a separate process
TOLD_BY_A_SWEEP = [pytest.param("no such class", marks=pytest.mark.slow), "misspelt"]
TOLD_BY_A_SWEEP += [pytest.param("which is better?", marks=pytest.mark.slow)]


@pytest.mark.parametrize("what", TOLD_BY_A_SWEEP)
def test_a_sweep_tells_it_before_its_first_job(what: str, work: Path, command: Run) -> None:
    arguments, line = WRONG[what]
    done = command("train", "-m", *CONF, *arguments, "seed=1,2,3", "data.data_dir=nowhere", cwd=work)
    assert done.returncode == 1
    assert re.search(line, done.stderr), done.stderr
    assert done.stdout.count("checking") <= 1, "once for all jobs"
    assert not list(work.glob("logs/train/multiruns/*/*"))


WATCHED = """
import sys
from mnist_lightning import train
sys.argv[0] = "mnist_lightning/train.py"
try:
    train.main()
finally:
    print("torch imported" if "torch" in sys.modules else "torch not imported")
"""


@pytest.mark.slow
def test_the_process_of_a_sweep_never_imports_torch(work: Path, environment: dict[str, str]) -> None:
    arguments = ["-m", *CONF, *REGRESSION, *TINY, "seed=1", "hydra/launcher=processes"]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "torch not imported" in done.stdout


@pytest.mark.slow
def test_a_search_follows_a_metric_of_ones_own(work: Path, command: Run) -> None:
    import optuna

    arguments = (*REGRESSION, *TINY, "search=mlp", "hydra.sweeper.params=null", "hydra.sweeper.n_trials=3")
    swept = "optimizer.lr=interval(1e-4,1e-2)"
    done = command("train", "-m", *CONF, *arguments, swept, "hydra.sweep.dir=search", cwd=work)
    assert done.returncode == 0, done.stderr
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(work / "search" / "optuna.journal"))
    )
    study = optuna.load_study(study_name="mnist_lightning", storage=storage)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    told = {job: json.loads((work / f"search/{job}/status.json").read_text()) for job in range(3)}
    finished = [
        told[trial.number]["metrics"]["val/error"] for trial in study.trials if trial.value is not None
    ]
    assert min(finished) == study.best_value


def test_torchs_own_losses_and_metrics_need_no_module(work: Path, command: Run) -> None:
    arguments = (
        *("model=regression", "loss._target_=torch.nn.MSELoss", "~loss.label_smoothing"),
        *("metrics.acc=null", "+metrics.mae._target_=torchmetrics.MeanAbsoluteError"),
        *("monitor.metric=val/mae", *TINY, "hydra.run.dir=run"),
    )
    done = command("train", *CONF, *arguments, cwd=work)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((work / "run" / "metrics.json").read_text())
    assert 0 < metrics["val/mae"] < 10
    assert metrics["val/mae"] ** 2 < metrics["val/loss"] < 30, "each image with its own label"


def test_weight_decay_leaves_biases_and_norms_alone(work: Path, command: Run) -> None:
    arguments = ("model=cnn", "optimizer=sgd", "optimizer.weight_decay=1", "decay_biases=false")
    done = command("train", *CONF, *arguments, *TINY, NO_PICTURES, "hydra.run.dir=run", cwd=work)
    assert done.returncode == 0, done.stderr
    checkpoint = load(work / "run" / "checkpoints" / "last.ckpt")
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1, 0.0]
    names = [name for name in checkpoint["state_dict"] if re.search(r"net\.\S*(weight|bias)$", name)]
    decayed = [name for name in names if name in ("net.layers.0.weight", "net.layers.5.weight")]
    assert [len(group["params"]) for group in groups] == [len(decayed), len(names) - len(decayed)] == [2, 4]
    done = command("train", "resume=run", "trust=my_parts", "decay_biases=true", cwd=work)
    assert done.returncode == 1
    assert "decay_biases: False -> True" in done.stderr


SCRIPT = """
import sys
from mnist_lightning import train
sys.exit(train.main())
"""


@pytest.mark.slow
def test_a_console_script_finds_what_lies_where_it_is_typed(
    work: Path, tmp_path: Path, python: Run, command: Run
) -> None:
    """A script finds modules as ``python -m`` does, also in the workers of a sweep; refusals name the script."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "mnist-train"
    script.write_text(SCRIPT)
    settings = (*CONF, "model=cnn", "loss=focal", *TINY, "hydra/launcher=processes")
    done = python(str(script), "-m", *settings, "seed=1,2", "hydra.sweep.dir=sweep", cwd=work)
    assert done.returncode == 0, done.stderr
    done = python(str(script), "resume=sweep/0", "trainer.max_epochs=9", cwd=work)
    assert "if you trust it: mnist-train resume=sweep/0 trainer.max_epochs=9 trust=my_parts" in done.stderr


@pytest.mark.slow
def test_two_processes_train_it_and_go_on(work: Path, command: Run) -> None:
    settings = (
        *CONF,
        "model=cnn",
        "~model.channels",
        "+model.channels=4",
        *TINY,
        "trainer=ddp",
        "test=false",
        "scheduler=none",
    )
    done = command("train", *settings, "hydra.run.dir=run", cwd=work)
    assert done.returncode == 0, done.stderr
    one = json.loads((work / "run" / "metrics.json").read_text())
    assert one["val/acc"] > 0.2
    done = command("train", "resume=run", "trust=my_parts", "trainer.max_epochs=3", cwd=work)
    assert done.returncode == 0, done.stderr
    assert json.loads((work / "run" / "metrics.json").read_text())["epochs"] == 3


@pytest.mark.slow
def test_a_clusters_jobs_train_it(work: Path, command: Run) -> None:
    """submitit sends the settings to the processes that it starts."""
    settings = (*CONF, "model=cnn", "loss=focal", *TINY, "hydra/launcher=submitit_local", "seed=1")
    done = command("train", "-m", *settings, "hydra.sweep.dir=sweep", cwd=work)
    assert done.returncode == 0, done.stderr
    assert json.loads((work / "sweep/0/status.json").read_text())["state"] == "completed"
