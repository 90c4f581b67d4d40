"""Any settings lead to a refusal that names a key, or to a run that works."""

import shutil
from pathlib import Path

import pytest
from conftest import settle
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mnist_lightning.config import ConfigError
from mnist_lightning.train import train

numbers = st.one_of(
    st.integers(-2, 300), st.sampled_from([0.0, 0.5, 1e-4, 1e30, -1.0, float("nan"), float("inf")])
)
overrides = st.fixed_dictionaries(
    {},
    optional={
        "model.hidden": st.one_of(numbers, st.lists(st.integers(0, 40), max_size=3)),
        "model.dropout": numbers,
        "model.activation": st.sampled_from(["relu", "leaky_relu", "elu", "gelu", "tanh", "sigmoid"]),
        "model.norm": st.sampled_from(["none", "batch", "layer", "group"]),
        "data.batch_size": st.sampled_from([-1, 0, 1, 7, 1000, 60_000]),
        "data.val_size": st.sampled_from([-1, 0, 1, 59_999, 60_000]),
        "data.split_seed": numbers,
        "data.std": numbers,
        "optimizer": st.sampled_from(["sgd", "adam", "adamw", "rmsprop"]),
        "optimizer.lr": st.sampled_from([1e-3, 0, -1, float("nan"), "fast"]),
        "optimizer.weight_decay": numbers,
        "scheduler": st.sampled_from(["none", "step", "plateau", "cosine", "onecycle"]),
        "callbacks": st.sampled_from(["default", "early_stopping"]),
        "logger": st.sampled_from(["none", "csv", "tensorboard"]),
        "trainer.max_epochs": st.sampled_from([1, 2, 0, -1, 1.5]),
        "loss.label_smoothing": numbers,
        "seed": numbers,
        "checkpoint.every_n_steps": st.sampled_from(["null", 0, 1, 2]),
        "test": st.booleans(),
    },
)


SETTINGS = hypothesis_settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow
@hypothesis_settings(SETTINGS, max_examples=8)
@given(overrides)
def test_a_refusal_or_a_run(tmp_path: Path, data_dir: Path, chosen: dict[str, object]) -> None:
    refuse_or_run(tmp_path, data_dir, chosen)


@pytest.mark.reliability
@hypothesis_settings(SETTINGS, max_examples=40)
@given(overrides)
def test_forty_refusals_or_runs(tmp_path: Path, data_dir: Path, chosen: dict[str, object]) -> None:
    refuse_or_run(tmp_path, data_dir, chosen)


def refuse_or_run(tmp_path: Path, data_dir: Path, chosen: dict[str, object]) -> None:
    run_dir = tmp_path / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir()
    arguments = [f"{key}={value}".replace(" ", "") for key, value in chosen.items()]
    try:
        settings = settle(
            run_dir,
            f"data.data_dir='{data_dir}'",
            "+trainer.limit_train_batches=2",
            "logger=none",
            *arguments,
        )
    except ConfigError as error:
        assert any(key.split(".")[-1] in str(error) for key in chosen), error
        return
    except Exception as error:  # Hydra's own words
        assert any(key in str(error) for key in chosen), error
        return
    try:
        metrics = train(settings, run_dir, test=settings.test)
    except FloatingPointError as error:
        assert "a smaller optimizer.lr may help" in str(error)
        return
    assert metrics["epochs"] == settings.trainer["max_epochs"]
    assert 0 <= metrics["last/train/acc"] <= 1  # type: ignore[operator]


def test_what_the_property_test_would_miss(tmp_path: Path) -> None:
    """The property test is useful only if each bad value is refused by itself."""
    with pytest.raises(ConfigError, match=r"model\.dropout"):
        settle(tmp_path, "model.dropout=-1.0")
