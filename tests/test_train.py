"""Tests of the train command as a user runs it."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import NO_PICTURES, REPOSITORY, DefaultRun, Run, few, settle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

Fit = Callable[..., dict[str, object]]
QUICK = ("trainer.max_epochs=1", "+trainer.limit_train_batches=10", "model.hidden=16", NO_PICTURES)


def read_json(path: Path) -> dict[str, float]:
    content: dict[str, float] = json.loads(path.read_text())
    return content


def find_runs(cwd: Path, kind: str = "runs") -> list[Path]:
    return sorted((cwd / "logs" / "train" / kind).iterdir())


def test_default_run_reaches_98_percent(default_run: DefaultRun) -> None:
    assert default_run.returncode == 0, default_run.errors
    assert read_json(default_run.folder / "metrics.json")["test/acc"] >= 0.98


def test_default_run_says_what_happened_and_what_to_do_next(default_run: DefaultRun) -> None:
    accuracy = read_json(default_run.folder / "metrics.json")["test/acc"]
    for expected in (
        f"test accuracy        {100 * accuracy:.2f} %",
        str(default_run.folder.relative_to(default_run.logs.parent)),
        "epoch 8/8   train loss",
        "tensorboard --logdir logs",
        "python -m mnist_lightning.train model.hidden=512",
        "python -m mnist_lightning.evaluate ",
        "python -m mnist_lightning.export format=html ",
    ):
        assert expected in default_run.output
    assert "resume=" not in default_run.output, "nothing is left to resume"
    assert "\x1b" not in default_run.output, "no colours in a pipe"


def test_default_run_is_quiet(default_run: DefaultRun) -> None:
    """There is no warning, no tip of Lightning and no deprecation."""
    assert default_run.errors == ""
    for noise in ("warn", "Warn", "Tip", "deprecat", "GPU", "litlogger"):
        assert noise not in default_run.output


def test_default_run_leaves_everything_in_its_folder(default_run: DefaultRun) -> None:
    folder = default_run.folder
    for file in (
        ".hydra/config.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "metrics.json",
        "csv/metrics.csv",
        "train.log",
    ):
        assert (folder / file).is_file(), file
    metrics = read_json(folder / "metrics.json")
    assert {"val/acc", "val/loss", "test/acc", "test/loss", "last/val/acc", "last/val/loss"} < metrics.keys()
    assert metrics["epochs"] == 8
    assert metrics["num_parameters"] == 203_530
    assert metrics["seed"] == 1
    assert metrics["train_seconds"] > 0
    assert {"git_commit", "python", "torch", "lightning", "mnist_lightning"} < metrics.keys()
    assert "epoch 8/8" in (folder / "train.log").read_text()
    assert sorted(path.name for path in default_run.logs.parent.iterdir()) == ["logs"]


def test_metrics_json_is_of_the_best_epoch(default_run: DefaultRun) -> None:
    with (default_run.folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/acc"]]
    metrics = read_json(default_run.folder / "metrics.json")
    assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
    assert max(float(row["val/acc"]) for row in rows) == metrics["val/acc"]
    assert float(rows[int(metrics["best_epoch"]) - 1]["val/acc"]) == metrics["val/acc"]
    assert float(rows[-1]["val/acc"]) == metrics["last/val/acc"]


def test_checkpoints_hold_plain_data(default_run: DefaultRun) -> None:
    for name in ("best", "last"):
        path = default_run.folder / "checkpoints" / f"{name}.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["hyper_parameters"]["model"]["hidden"] == [256]
        assert checkpoint["hyper_parameters"]["preprocess"]["mean"] == 0.1307
        assert checkpoint["datamodule_hyper_parameters"]["val_size"] == 5000


def test_tensorboard_holds_the_curves_and_the_hyper_parameters(default_run: DefaultRun) -> None:
    """Splits share tags, so each chart shows all splits, and each split has one colour."""
    folder = default_run.folder / "tensorboard"
    kept, train, val, tested = (
        EventAccumulator(str(folder / split)).Reload() for split in ("", "train", "val", "test")
    )
    assert set(kept.Tags()["scalars"]) == set(tested.Tags()["scalars"]) == {"epoch/loss", "epoch/acc"}
    assert set(val.Tags()["scalars"]) == {"epoch/loss", "epoch/acc"}
    assert set(train.Tags()["scalars"]) == {"epoch/loss", "epoch/acc", "step/loss", "step/lr"}
    for events in (train, val):
        assert [event.step for event in events.Scalars("epoch/acc")] == [215 * epoch for epoch in range(1, 9)]
    metrics = read_json(default_run.folder / "metrics.json")
    for events, split in ((kept, "val"), (tested, "test")):
        assert [event.value for event in events.Scalars("epoch/acc")] == pytest.approx(
            [metrics[f"{split}/acc"]]
        )


def test_hparams_are_named_by_what_was_changed_and_compared_by_tensorboard(
    default_run: DefaultRun,
) -> None:
    """Without a summary of an experiment, TensorBoard first shows the settings that differ between runs."""
    events = EventAccumulator(str(default_run.folder / "tensorboard")).Reload()
    assert "_hparams_/experiment" not in events.summary_metadata
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    info = HParamsPluginData.FromString(plugin.content).session_start_info
    assert info.group_name.startswith("defaults (logs/train/runs/")
    values = {key: value.string_value or value.number_value for key, value in info.hparams.items()}
    first = sorted(values)[:3]
    assert [(key, values[key]) for key in first] == [
        *[("changed", "nothing"), ("data.augment", "none"), ("data.batch_size", 256)]
    ]
    assert {"seed", "model.hidden", "optimizer.lr", "scheduler._target_", "trainer.max_epochs"} < set(values)
    assert not any(str(value).startswith("RUN_DIR") for value in values.values())


def test_every_logger_gets_all_settings(default_run: DefaultRun) -> None:
    for folder in ("csv", "tensorboard"):
        told = yaml.safe_load((default_run.folder / folder / "hparams.yaml").read_text())
        assert told["optimizer.lr"] == 0.004
        assert told["scheduler._target_"] == "torch.optim.lr_scheduler.CosineAnnealingLR"
        assert told["trainer.max_epochs"] == 8
        assert told["model.hidden"] == [256]
        assert told["callbacks.checkpoint._target_"].endswith("Checkpoints")


def test_a_run_is_named_by_what_was_typed(command: Run, tmp_path: Path) -> None:
    arguments = ("model.hidden=[8,4]", "optimizer.lr=1e-3", "logger=none", "debug=fast_dev_run", "seed=3")
    done = command("train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = find_runs(tmp_path)
    assert re.fullmatch(r"[\d-]{10}_[\d-]{8}_hidden-8-4_lr-1e-3_debug-fast_dev_run_seed-3", run.name)
    next_lines = done.stdout.partition("next:\n")[2].splitlines()
    assert next_lines == [
        "  python -m mnist_lightning.train optimizer.lr=1e-3 logger=none seed=3 model.hidden=512"
    ], "no TensorBoard, no checkpoint"


QUICK_PRESETS = ("strong", "handwriting", "record_ensemble")  # tests of the others are marked slow


@pytest.mark.slow
def test_tutorial_for_an_epoch(fit: Fit, tmp_path: Path) -> None:
    metrics = fit("experiment=tutorial", "trainer.max_epochs=1", test=True)
    assert metrics["num_parameters"] == 109_386
    assert metrics["test/acc"] > 0.85  # type: ignore[operator]
    assert "val/acc" not in metrics, "all 60,000 images train"
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 938, "60,000 images in batches of 64"
    assert checkpoint["hyper_parameters"]["preprocess"] == {
        **{"mean": 0.5, "std": 0.5, "deskew": False, "augment": None}
    }
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.003
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.9


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK_PRESETS else pytest.mark.slow)
        for path in sorted(REPOSITORY.glob("conf/experiment/*.yaml"))
    ],
)
@pytest.mark.parametrize("width", [64, pytest.param(None, marks=pytest.mark.reliability)])
def test_every_experiment_runs_and_states_its_evidence(path: Path, width: int | None, fit: Fit) -> None:
    """The nets keep their depth, and their width if none is given here."""
    short = ("trainer.max_epochs=1", "+trainer.limit_train_batches=5")
    hidden = settle(Path("unused"), f"experiment={path.stem}").model["hidden"]
    narrow = [] if width is None else [f"model.hidden={[width] * len(hidden)}".replace(" ", "")]
    metrics = fit(f"experiment={path.stem}", *short, *narrow, test=True)
    assert metrics["epochs"] == 1
    opening = path.read_text()
    assert f"python -m mnist_lightning.train experiment={path.stem}" in opening
    assert "seeds" in opening
    assert "±" in opening


@pytest.mark.parametrize(
    "path", few(sorted(REPOSITORY.glob("conf/debug/*.yaml")), 3), ids=lambda path: path.stem
)
def test_every_debug_preset_runs(path: Path, fit: Fit, tmp_path: Path) -> None:
    metrics = fit(f"debug={path.stem}", "model.hidden=64")
    if path.stem == "overfit":
        assert metrics["last/train/acc"] > 0.99  # type: ignore[operator]
    if path.stem == "profile":
        assert "run_training_batch" in (tmp_path / "run" / "fit-profile.txt").read_text()
    if path.stem == "lr_range":
        assert 5e-4 < metrics["suggested_lr"] < 0.05  # type: ignore[operator]
        assert (tmp_path / "run" / "lr_range.png").stat().st_size > 10_000
    if path.stem in ("fast_dev_run", "lr_range"):
        assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_early_stopping_stops(fit: Fit) -> None:
    metrics = fit(
        *("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "scheduler=none"),
        *(
            "+callbacks.early_stopping.min_delta=0.9",
            "trainer.max_epochs=9",
            "+trainer.limit_train_batches=5",
        ),
    )
    assert metrics["epochs"] == 2


def test_any_trainer_argument_can_be_set(fit: Fit) -> None:
    clipped = fit(*QUICK, "+trainer.gradient_clip_val=0.001", "optimizer=sgd", folder="a")
    assert clipped["val/loss"] != fit(*QUICK, "optimizer=sgd", folder="b")["val/loss"]


@pytest.mark.parametrize("logger", ["none", "csv", "tensorboard"])
def test_loggers(logger: str, fit: Fit, tmp_path: Path) -> None:
    fit(*QUICK, f"logger={logger}")
    written = {path.name for path in (tmp_path / "run").iterdir()} & {"csv", "tensorboard"}
    assert written == {"none": set(), "csv": {"csv"}, "tensorboard": {"csv", "tensorboard"}}[logger]


@pytest.mark.slow
def test_multirun(command: Run, tmp_path: Path) -> None:
    done = command("train", "-m", "model.hidden=8,[8,4]", "seed=0,1", *QUICK[:2], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = find_runs(tmp_path, "multiruns")
    jobs = [read_json(sweep / str(number) / "metrics.json") for number in range(4)]
    assert [(job["num_parameters"], job["seed"]) for job in jobs] == [
        (6370, 0),
        (6370, 1),
        (6366, 0),
        (6366, 1),
    ]
    assert all("val/acc" in job and "test/acc" not in job for job in jobs), "the test images are not read"


@pytest.mark.slow
def test_ddp_gives_the_metrics_of_one_process(command: Run, tmp_path: Path) -> None:
    """With the same images in the same batches, losses after 30 steps are equal up to rounding, 1e-4."""
    results = []
    for trainer in ("cpu", "ddp"):
        cwd = tmp_path / trainer
        cwd.mkdir()
        done = command(
            *("train", f"trainer={trainer}", "optimizer=sgd", "model.hidden=32", "data.val_size=4999"),
            *("trainer.max_epochs=1", "+trainer.limit_train_batches=30"),
            cwd=cwd,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("everything is in") == 1
        (run,) = find_runs(cwd)
        results.append(read_json(run / "metrics.json"))
    one, two = results
    for name in ("val/loss", "val/acc", "test/loss", "test/acc", "last/train/loss", "last/train/acc"):
        assert two[name] == pytest.approx(one[name], abs=1e-4), name


def test_two_runs_in_the_same_second(tmp_path: Path) -> None:
    from mnist_lightning.rundir.claim import claim

    folders = {claim(tmp_path / "2026-01-01_00-00-00").name for _ in range(3)}
    assert folders == {"2026-01-01_00-00-00", "2026-01-01_00-00-00-2", "2026-01-01_00-00-00-3"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data.data_dir=file",), "data.data_dir: can't create the folder"),
        (("trainer=gpu",), "No supported gpu backend found"),
        (("+trainer.num_nodes=2",), "trainer.num_nodes=2 waits for processes on other machines: start"),
        (("optimizer.lr=1e30", *QUICK[:1]), "train/loss is nan at step 2"),
        (("hydra.run.dir=file/run",), "can't write to the run's folder"),
    ],
)
def test_errors_after_the_imports_are_a_line(
    arguments: tuple[str, ...], message: str, command: Run, tmp_path: Path
) -> None:
    if arguments == ("trainer=gpu",) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "file").write_text("")
    done = command("train", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_logs_that_is_a_file(command: Run, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    done = command("train", cwd=tmp_path)
    assert done.returncode == 1
    assert "can't write to the run's folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_awkward_names(command: Run, tmp_path: Path) -> None:
    data_dir = tmp_path / "my data (1) = é, #2 'x'"
    done = command("train", f"data.data_dir={data_dir}", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (data_dir / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file()


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("data.val_size=0",), marks=pytest.mark.slow),
        pytest.param((), marks=pytest.mark.reliability),
    ],
)
def test_compiled_run_leaves_an_ordinary_checkpoint(
    more: tuple[str, ...], command: Run, tmp_path: Path
) -> None:
    """The checkpoint can be resumed with and without compilation and evaluated; the net learns as without it."""
    settings = (*QUICK, "scheduler=none", "test=false", "logger=csv", *more)
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        done = command("train", f"compile={compiled}", f"hydra.run.dir={name}", *settings, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    checkpoints = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("eager", "compiled")
    ]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    for key, value in checkpoints[0].items():
        torch.testing.assert_close(value, checkpoints[1][key], rtol=1e-3, atol=1e-4)
    for arguments in (
        ("train", "resume=compiled", "trainer.max_epochs=2"),
        ("train", "resume=compiled", "trainer.max_epochs=3", "compile=false"),
        ("evaluate", "run=compiled"),
    ):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_compiler_is_told_in_a_line(command: Run, tmp_path: Path) -> None:
    arguments = ("compile=true", *QUICK, "trainer.accelerator=cpu")
    variables = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = command("train", *arguments, cwd=tmp_path, **variables)
    assert done.returncode == 1
    assert "compile=true: torch.compile does not work here" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_bfloat16_run_resumes_and_keeps_32_bits(command: Run, tmp_path: Path) -> None:
    settings = (*QUICK, "scheduler=none", "test=false", "trainer.precision=bf16-mixed")
    losses = []
    for more in ((), ("resume=run", "trainer.max_epochs=2")):
        done = command("train", *(more or (*settings, "hydra.run.dir=run")), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        floats = [value for value in checkpoint["state_dict"].values() if value.is_floating_point()]
        assert {value.dtype for value in floats} == {torch.float32}
        losses.append(read_json(tmp_path / "run" / "metrics.json")["last/train/loss"])
    assert checkpoint["global_step"] == 20
    assert losses[1] < losses[0]
