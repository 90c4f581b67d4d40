"""Metrics, checkpoints and resumption are exact at every moment of a run and with every limit."""

import csv
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import NO_PICTURES, Once, Run, Start, few, settle
from faults import SlowSaves
from keep_checkpoints import Keep
from omegaconf import OmegaConf
from processes import wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import differences

from mnist_lightning.classifier import get_random_state, set_random_state
from mnist_lightning.config import ConfigError
from mnist_lightning.rundir.checkpoint import load
from mnist_lightning.rundir.resume import check_resumption
from mnist_lightning.rundir.status import Status, read

Fit = Callable[..., dict[str, object]]
SMALL = ("model.hidden=8", "logger=csv", "callbacks.summary=null")
TEN = "+trainer.limit_train_batches=10"
KEEP = f"+callbacks.keep._target_={Keep.__module__}.Keep"


def read_rows(run: Path) -> list[dict[str, str]]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def steps_of(run: Path, key: str) -> list[int]:
    return [int(row["step"]) for row in read_rows(run) if row.get(key)]


RARE = {  # settings -> optimizer steps with a validation, epoch of best.ckpt
    ("+trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"): ([20], 2),
    ("trainer.max_epochs=-1", "+trainer.max_steps=7", "scheduler=none"): ([], 1),
    ("+trainer.limit_val_batches=0", "trainer.max_epochs=2"): ([], 2),
    ("+trainer.val_check_interval=15", "+trainer.check_val_every_n_epoch=null", "trainer.max_epochs=2"): (
        [15],
        2,
    ),
    ("trainer.max_epochs=3", "+trainer.max_steps=13"): ([10], 1),
    ("trainer.max_epochs=1", "+trainer.val_check_interval=0.4", "trainer.num_sanity_val_steps=2"): (
        [4, 8],
        1,
    ),
}


@pytest.mark.parametrize(
    ("settings", "expected"), few(RARE.items(), 2), ids=lambda one: " ".join(map(str, one))
)
def test_the_best_is_chosen_among_what_was_validated(
    settings: tuple[str, ...], expected: tuple[list[int], int], fit: Fit, tmp_path: Path
) -> None:
    validated, best_epoch = expected
    metrics = fit(*SMALL, TEN, *settings, test=True)
    assert steps_of(tmp_path / "run", "val/acc") == validated
    assert metrics["best_epoch"] == best_epoch
    best, last = (load(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert last["global_step"] == metrics["steps"] == max(last["global_step"], *validated, 0)
    scores = {
        int(row["step"]): float(row["val/acc"]) for row in read_rows(tmp_path / "run") if row.get("val/acc")
    }
    best_step = max(scores, key=lambda step: scores[step]) if scores else last["global_step"]
    assert best["global_step"] == best_step
    if scores:
        assert metrics["val/acc"] == scores[best_step], "best.ckpt is the net that was measured"
    assert ("last/val/acc" in metrics) == (max(validated, default=0) > 10 * (metrics["epochs"] - 1))  # type: ignore[operator]
    assert ("val/acc" in metrics) == ("limit_val_batches=0" not in " ".join(settings))


def test_no_validation_at_all_is_said(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(*SMALL, "trainer.max_epochs=-1", "+trainer.max_steps=3", "scheduler=none")
    assert "no epoch was validated before training ended: best.ckpt has the last weights" in caplog.text


@pytest.mark.parametrize("more", ["scheduler=plateau", "callbacks=early_stopping"])
def test_what_watches_validation_is_refused_without_it(more: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit_val_batches=0 validates nothing"):
        settle(tmp_path, "+trainer.limit_val_batches=0", more)


def test_curves_count_optimizer_steps(fit: Fit, tmp_path: Path) -> None:
    fit(
        *SMALL,
        TEN,
        "trainer.max_epochs=2",
        "+trainer.accumulate_grad_batches=4",
        "trainer.log_every_n_steps=2",
        test=True,
    )
    assert steps_of(tmp_path / "run", "train/loss_step") == [2, 3, 5, 6], (
        "each second step, and an epoch's end"
    )
    assert steps_of(tmp_path / "run", "val/acc") == [3, 6]
    assert steps_of(tmp_path / "run", "test/acc") == [6]


MOMENTS = {
    "validated within epochs": (
        "+trainer.val_check_interval=4",
        "checkpoint.every_n_steps=2",
        "scheduler=plateau",
    ),
    "accumulated": (
        "+trainer.accumulate_grad_batches=4",
        "+trainer.val_check_interval=3",
        "trainer.log_every_n_steps=1",
    ),
    "reloaded": ("+trainer.reload_dataloaders_every_n_epochs=1", "checkpoint.every_n_steps=3"),
    "accumulation that changes": (
        *("+callbacks.g._target_=lightning.pytorch.callbacks.GradientAccumulationScheduler",),
        *("+callbacks.g.scheduling={1:3}", "checkpoint.every_n_steps=2"),
    ),
}
QUICK = ("accumulation that changes",)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.reliability)])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(settings, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, settings in MOMENTS.items()
    ],
)
def test_resumed_from_any_checkpoint_it_ends_the_same(
    settings: tuple[str, ...], every: int, fit: Fit, tmp_path: Path
) -> None:
    """Weights, states of callbacks, metrics and curves are equal, including the rows at the run's end."""
    common = (*SMALL, TEN, "trainer.max_epochs=2", "model.dropout=0.2", KEEP, *settings)
    kept = tmp_path / "kept"
    kept.mkdir()
    whole = fit(*common, f"+callbacks.keep.folder='{kept}'", folder="whole", test=True)
    last = load(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    moments = sorted(kept.iterdir())
    for moment in sorted({*moments[::every], moments[-1]}):
        folder = tmp_path / moment.stem
        shutil.copytree(tmp_path / "whole", folder)  # as if killed later: later rows must be dropped
        (folder / "checkpoints" / "previous.ckpt").unlink(missing_ok=True)
        if load(moment)["global_step"] < load(folder / "checkpoints" / "best.ckpt")["global_step"]:
            (folder / "checkpoints" / "best.ckpt").unlink()
        (folder / "checkpoints" / "last.ckpt").write_bytes(moment.read_bytes())
        again = fit(*common, f"resume='{folder}'", folder=moment.stem, test=True)
        assert differences(last, load(folder / "checkpoints" / "last.ckpt")) == [], moment
        assert differences(whole, again) == []
        assert read_rows(folder) == read_rows(tmp_path / "whole")


def test_saves_that_take_longer_than_the_interval_leave_time_for_training(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: SlowSaves.seconds)
    monkeypatch.setattr("mnist_lightning.callbacks.checkpoints.time", clock)
    slow = "+callbacks.slow._target_=faults.SlowSaves"
    kept = f"+callbacks.keep.folder='{tmp_path}'"
    fit(*SMALL, TEN, "trainer.max_epochs=1", "checkpoint.every_n_seconds=3", slow, KEEP, kept)
    assert {load(path)["global_step"] for path in tmp_path.glob("*.ckpt")} == {3, 6, 9, 10}


HOOKS = (
    *("on_test_batch_end", "setup", "on_fit_start", "on_train_start", "on_load_checkpoint"),
    *("on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end"),
    *("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start"),
    *("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end", "on_save_checkpoint"),
    *("on_train_end", "on_fit_end", "on_test_start", "on_test_epoch_start", "on_test_batch_start"),
    *("on_test_epoch_end", "on_test_end", "teardown"),
)
BEFORE = ("on_fit_start", "on_train_start", "on_load_checkpoint")  # for training: only in a resumed run


@pytest.mark.parametrize(
    "hook", [HOOKS[0], *(pytest.param(one, marks=pytest.mark.reliability) for one in HOOKS[1:])]
)
def test_killed_in_any_hook_it_ends_the_same(hook: str, command: Run, once: Once, tmp_path: Path) -> None:
    settings = (*SMALL, TEN, NO_PICTURES, "trainer.max_epochs=2", "model.dropout=0.2", "hydra.run.dir=run")
    fault, paths = "+callbacks.fault._target_=faults.KillAt", {"PYTHONPATH": str(Path(__file__).parent)}

    def make(cwd: Path) -> None:
        done = command("train", *settings, fault, "+callbacks.fault.hook=null", cwd=cwd, **paths)
        assert done.returncode == 0, done.stderr

    first = "on_train_epoch_start" if hook in BEFORE else hook
    again = ("train", "resume=run", "trust=faults")
    killed = command("train", *settings, fault, f"+callbacks.fault.hook={first}", cwd=tmp_path, **paths)
    if hook in BEFORE:
        killed = command(*again, f"callbacks.fault.hook={hook}", cwd=tmp_path, **paths)
    assert killed.returncode == -9, killed.stdout + killed.stderr
    done = command(*again, "callbacks.fault.hook=null", cwd=tmp_path, **paths)
    assert done.returncode == 0, done.stderr
    one, two = once("twin of the killed", make) / "run", tmp_path / "run"
    checkpoints = [load(run / "checkpoints" / "last.ckpt") for run in (one, two)]
    assert differences(*checkpoints) == []
    reports = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert differences(*({**report, "git_commit": None} for report in reports)) == []
    assert read_rows(one) == read_rows(two)
    assert not list(two.rglob(".writing-*"))


WEIGHING = (  # arguments that influence the weights, each with a value that is not the default
    *("+trainer.accumulate_grad_batches=3", "+trainer.gradient_clip_val=0.1", "trainer.precision=bf16-mixed"),
    *("+trainer.overfit_batches=3", "+trainer.limit_val_batches=1", "+trainer.val_check_interval=3"),
    *("+trainer.check_val_every_n_epoch=2", "+trainer.reload_dataloaders_every_n_epochs=1", "seed=7"),
    *("ema_decay=0.9", "decay_biases=false", "data.batch_size=100", "data.deskew=true", "data.val_size=1000"),
    *("data/augment=elastic", "data.num_workers=2", "model.norm=batch", "model.input_noise=0.3"),
    *("optimizer=sgd", "optimizer.weight_decay=0.3", "optimizer.fused=false", "loss.label_smoothing=0.1"),
    *("scheduler=none", "scheduler=onecycle", "scheduler=plateau", "monitor.metric=val/loss"),
    "callbacks=early_stopping",
)


@pytest.mark.reliability
@pytest.mark.parametrize("argument", WEIGHING)
def test_whatever_decides_the_weights_is_resumed_and_kept(
    argument: str, fit: Fit, tmp_path: Path, data_dir: Path
) -> None:
    """A run resumed within an epoch ends the same; with the argument's default value, it is refused."""
    common = (*SMALL, TEN, "trainer.max_epochs=2", "checkpoint.every_n_steps=2", KEEP)
    kept = tmp_path / "kept"
    kept.mkdir()
    whole = fit(*common, argument, f"+callbacks.keep.folder='{kept}'", folder="whole")
    last = load(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    moments = sorted(kept.iterdir())
    moment = moments[len(moments) // 2]
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(moment.read_bytes())
    again = fit(*common, argument, f"resume='{tmp_path / 'run'}'")
    parts = [
        {key: one[key] for key in ("state_dict", "optimizer_states", "measured")}
        for one in (last, load(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    ]
    assert differences(*parts) == []
    assert again["steps"] == whole["steps"]
    if argument in ("data.num_workers=2", "callbacks=early_stopping"):
        return  # it influences no weight and can only end a run
    settings = settle(tmp_path / "run", *common, argument)
    (tmp_path / "run" / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create(asdict(settings)), tmp_path / "run" / ".hydra" / "config.yaml")
    with pytest.raises(ConfigError, match="can't be resumed"):
        check_resumption(settle(tmp_path / "run", *common, f"resume='{tmp_path / 'run'}'"), [])


def test_an_early_stopped_run_stays_stopped_until_it_may_go_on(fit: Fit, tmp_path: Path) -> None:
    """The run is killed in its final evaluation; a changed patience lets it continue."""
    settings = (
        *(*SMALL, TEN, "trainer.max_epochs=4", "callbacks=early_stopping", "scheduler=none"),
        "+callbacks.early_stopping.min_delta=0.9",
    )
    first = fit(*settings, "callbacks.early_stopping.patience=1")
    assert first["epochs"] == 2
    (tmp_path / "run" / "metrics.json").unlink()
    again = fit(*settings, "callbacks.early_stopping.patience=1", f"resume='{tmp_path / 'run'}'")
    assert differences(first, again) == []
    more = fit(*settings, "callbacks.early_stopping.patience=9", f"resume='{tmp_path / 'run'}'")
    assert more["epochs"] == 4


@pytest.mark.parametrize(
    "limit",
    [
        ("+trainer.max_steps=13",),
        pytest.param(
            ("+callbacks.timer._target_=faults.StepTimer", "+callbacks.timer.step=13"), marks=pytest.mark.slow
        ),
    ],
    ids=["max_steps", "max_time"],
)
def test_a_run_that_a_limit_has_cut_short_goes_on_within_its_epoch(
    limit: tuple[str, ...], fit: Fit, tmp_path: Path
) -> None:
    settings = (*SMALL, TEN, "trainer.max_epochs=3", "scheduler=none", "model.dropout=0.2")
    whole = fit(*settings, folder="whole")
    cut = fit(*settings, *limit)
    assert cut["steps"] == 13
    again = fit(*settings, f"resume='{tmp_path / 'run'}'")
    assert again["steps"] == 30
    a, b = (load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "run"))
    for part in ("state_dict", "optimizer_states", "measured"):
        assert differences(a[part], b[part]) == []
    assert again["last/train/acc"] == whole["last/train/acc"], "of the whole epoch, not of its second part"


DECIDING = {
    "trainer.precision=bf16-mixed": "trainer.precision: 32-true -> bf16-mixed",
    "+trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches: None -> 2",
    "trainer.limit_train_batches=3": "trainer.limit_train_batches: 10 -> 3",
    "+trainer.gradient_clip_val=0.5": "trainer.gradient_clip_val: None -> 0.5",
    "+trainer.overfit_batches=2": "trainer.overfit_batches: None -> 2",
    "+trainer.val_check_interval=5": "trainer.val_check_interval: None -> 5",
    "+trainer.limit_val_batches=1": "trainer.limit_val_batches: None -> 1",
    "+trainer.max_steps=5": "is planned for None steps",
    "ema_decay=0.9": "ema_decay: None -> 0.9",
    "+callbacks.g._target_=lightning.pytorch.callbacks.GradientAccumulationScheduler": "callbacks.g._target_: None ->",
}
FREE = ("trainer.log_every_n_steps=3", "trainer.accelerator=cpu", "callbacks.progress=null", "test=false")


@pytest.fixture(scope="session")
def finished(once: Once, command: Run) -> Path:
    def make(cwd: Path) -> None:
        done = command(
            "train", "model.hidden=8", TEN, "trainer.max_epochs=1", NO_PICTURES, "hydra.run.dir=run", cwd=cwd
        )
        assert done.returncode == 0, done.stderr

    return once("finished", make) / "run"


def resume(run: Path, folder: Path, *more: str) -> None:
    """Check settings as at the start of a resumed run."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    arguments = ("model.hidden=8", TEN, "trainer.max_epochs=1", NO_PICTURES, *more)
    check_resumption(settle(folder, *arguments, f"resume='{folder}'"), list(more))


@pytest.mark.parametrize("argument", few(DECIDING, 2))
def test_what_decides_the_weights_is_refused(argument: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resume(finished, tmp_path, argument)
    assert DECIDING[argument] in str(caught.value)


@pytest.mark.parametrize("argument", FREE)
def test_what_decides_no_weight_is_not(argument: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        resume(finished, tmp_path, argument)
    assert caught.value.code == 0, "it has finished"


def test_a_run_that_was_killed_before_its_end_was_written_has_not_finished(
    finished: Path, command: Run, tmp_path: Path
) -> None:
    """After a kill later than metrics.json, curves, HParams and status are written again, once."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    status = read(run)
    assert status is not None
    Status(**{**vars(status), "state": "running"}).write(run)
    done = command("train", "resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    again = read(run)
    assert again is not None
    assert again.state == "completed"
    assert again.overrides == status.overrides
    assert read_rows(run) == read_rows(finished)
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, run))
    assert differences(before, after) == []
    for folder in (finished, run):
        kept, tested = (EventAccumulator(str(folder / "tensorboard" / split)) for split in ("", "test"))
        for events in (kept, tested):
            assert len(events.Reload().Scalars("epoch/acc")) == 1
        assert b"model.hidden" in kept.SummaryMetadata("_hparams_/session_start_info").plugin_data.content


def test_a_named_folder_takes_one_run(finished: Path, command: Run, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = command("train", "seed=2", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "run holds an earlier run (checkpoints/best.ckpt): resume=run continues it" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_second_process_writes_nothing_in_a_folder_that_is_taken(
    start: Start, command: Run, tmp_path: Path
) -> None:
    settings = ("model.hidden=8", NO_PICTURES, "hydra.run.dir=run")
    first = start("train", *settings, "trainer.max_epochs=500", cwd=tmp_path)
    config = tmp_path / "run" / ".hydra" / "config.yaml"
    wait_for(lambda: (tmp_path / "run" / "status.json").is_file(), first)
    before = config.read_text()
    done = command("train", *settings, "seed=7", cwd=tmp_path)
    assert done.returncode == 1
    assert "another process is using" in done.stderr or "holds an earlier run" in done.stderr
    assert config.read_text() == before


@pytest.mark.slow
def test_a_resumption_that_came_to_nothing_is_no_base_of_the_next(
    finished: Path, command: Run, tmp_path: Path
) -> None:
    """One resumption was killed while it wrote its settings; another had a setting that can't be used."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / ".hydra" / "resume-1").mkdir()
    bad = command("train", "resume=run", "+callbacks.mine._target_=lightning.no.such", cwd=tmp_path)
    assert bad.returncode == 1
    assert "lightning.no.such" in bad.stderr
    done = command("train", "resume=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 1


@pytest.mark.slow
def test_interpolations_of_a_path_are_followed(command: Run, tmp_path: Path, data_dir: Path) -> None:
    settings = ("model.hidden=8", TEN, "trainer.max_epochs=1", NO_PICTURES, "test=false")
    folder = "hydra.run.dir=out/${now:%Y}_${seed}"
    done = command(
        "train", *settings, folder, "data.data_dir=${oc.env:MINE}", cwd=tmp_path, MINE=str(data_dir)
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "out").iterdir()
    assert run.name.endswith("_1")
    assert run.name[:4].isdecimal()
    assert not list(tmp_path.glob("$*"))
    literal = tmp_path / "${seed}"
    literal.mkdir()
    named = ("data.data_dir=${seed}", "hydra.run.dir=${seed}/run")
    done = command("train", *settings, *named, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (literal / "MNIST").is_dir(), "a name that exists wins"
    assert (literal / "run" / "metrics.json").is_file(), "and so does what lies in it"
    done = command("train", "resume=${seed}/run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), "its settings are read as they were meant"
    assert "${seed}/run has finished: 1 epochs" in done.stdout


def test_random_states_are_those_of_a_kind_of_device(caplog: pytest.LogCaptureFixture) -> None:
    states = get_random_state(torch.device("cpu"))
    drawn = torch.rand(3)
    set_random_state({**states, "cuda": states["cpu"]}, torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)
    set_random_state(states, torch.device("cuda"))
    assert "no random state of a cuda" in caplog.text
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.slow
def test_a_plain_csv_logger_can_be_resumed(fit: Fit, tmp_path: Path) -> None:
    settings: tuple[Any, ...] = (
        *("model.hidden=8", TEN, "scheduler=none", "logger=none"),
        *("+logger.mine._target_=lightning.pytorch.loggers.CSVLogger", f"+logger.mine.save_dir='{tmp_path}'"),
    )
    fit(*settings, "trainer.max_epochs=1")
    metrics = fit(*settings, "trainer.max_epochs=2", f"resume='{tmp_path / 'run'}'", test=True)
    assert metrics["epochs"] == 2
    assert "test/acc" in (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").read_text()
