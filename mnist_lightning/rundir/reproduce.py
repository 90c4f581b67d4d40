"""``reproduce=<run folder>``: train again with a run's settings and the current code, and compare weights.

The argument is replaced before Hydra composes the config, like ``resume=``.  The command does not check out
the run's commit; it prints what has changed since.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_lightning import trust
from mnist_lightning.cli import quote
from mnist_lightning.config import ConfigError
from mnist_lightning.rundir.find import find_run
from mnist_lightning.rundir.outside import expand_home, read_json
from mnist_lightning.rundir.record import PATCH
from mnist_lightning.rundir.resume import BASE, load_settings

KEY = "reproduce="
TOLD = "++reproduce="  # the form in which the argument is passed to Hydra
MULTIRUN = "multirun.yaml"
# Settings that may be given together with reproduce=
FREE = (
    *("trust", "threads", "data.data_dir", "data.path", "data.num_workers", "trainer.accelerator"),
    *("trainer.devices", "hydra.run.dir"),
)
HYDRA = {"run": {"dir": "logs/train/runs/${now:%Y-%m-%d_%H-%M-%S}"}}


def reproduce_run(name: str, arguments: list[str]) -> list[str]:
    """Return the arguments that make Hydra compose a new run from the settings of an earlier one.

    Args:
        name: a run folder, or "latest".
        arguments: all arguments of the command line.

    Raises:
        OSError: the run does not exist.
        ConfigError: a setting is given that reproduce= does not allow, or the run's settings can't be read.
        TrustError: the run's settings name code that is not trusted.
    """
    folder = expand_home(name)
    if name == "latest" or not (folder / ".hydra" / "config.yaml").is_file():
        folder = find_run(name)
    folder = folder.absolute()
    typed = [argument for argument in arguments if not argument.startswith((KEY, trust.KEY))]
    for argument in typed:
        key = argument.lstrip("+~").partition("=")[0]
        if not key.startswith("-") and key not in FREE and "=" in argument:
            raise ConfigError(
                f"reproduce repeats the settings of {folder}: {key} can't be given with it, only"
                f" {', '.join(FREE)}"
            )
    trusted = trust.typed_trust(arguments)
    give_settings(folder, typed, trusted)
    return [
        *("--config-name", BASE),
        *typed,
        f"{TOLD}{quote(str(folder))}",
        "hydra/job_logging=train",
        "+hydra.callbacks.prepare._target_=mnist_lightning.rundir.claim.Prepare",
    ]


def give_settings(folder: Path, typed: list[str], trusted: tuple[str, ...]) -> None:
    """Give Hydra the settings of the run, with a new run folder.

    Raises:
        OSError, ConfigError, TrustError: see ``reproduce_run``.
    """
    in_sweep = (folder.parent / MULTIRUN).is_file()
    others = {"resume": None, "hydra": HYDRA} | ({"test": False} if in_sweep else {})  # jobs do not test
    load_settings(folder, typed, trusted, others=others)


def tell_changes(folder: Path, now: Mapping[str, Any]) -> str:
    """Say in one line what differs from an earlier run.

    Args:
        folder: the earlier run's folder.
        now: facts about this run, named as in ``metrics.json``: commit, versions, device, threads.
    """
    then = read_metrics(folder)
    if then is None:
        return f"{folder} has no metrics.json that can be read, so changes since then are unknown"
    changed = [
        f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value
    ]
    for place in (folder, folder.parent):
        if "git_commit" in now and str(then.get("git_commit")).endswith("+") and (place / PATCH).is_file():
            changed.append(f"the run's uncommitted code is in {place / PATCH}")
            break
    told = "; ".join(changed)
    return f"changed since {folder}: {told}" if changed else f"unchanged since then: {', '.join(now)}"


def read_metrics(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / "metrics.json")
    except OSError:
        return None


def compare_weights(folder: Path, again: Path) -> str:
    """Say in one line whether two runs have the same weights after their last step."""
    from mnist_lightning.rundir.checkpoint import LAST, load

    try:
        one, other = (load(place / "checkpoints" / LAST) for place in (folder, again))
        weights = [
            {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("net.")}
            for checkpoint in (one, other)
        ]  # without the state of metrics
        steps = [int(checkpoint["global_step"]) for checkpoint in (one, other)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        return f"the weights can't be compared: {error}"
    if steps[0] != steps[1]:
        return f"the weights can't be compared: the run stopped at step {steps[0]}, this one at {steps[1]}"
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in weights]
    if shapes[0] != shapes[1]:
        return "the weights came out different: the nets have different shapes"
    far = {
        name: float((tensor.double() - weights[1][name].double()).abs().max())
        for name, tensor in weights[0].items()
        if not tensor.equal(weights[1][name])
    }
    if not far:
        return f"the weights came out equal to the bit to those of {folder}"
    return (
        f"the weights came out different: {len(far)} of {len(shapes[0])} tensors, by up to"
        f" {max(far.values()):.2g}"
    )
