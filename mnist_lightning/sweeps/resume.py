"""Rewrite the command line of ``train`` before Hydra reads it.

``resume=<folder>`` is replaced by the saved settings of a run or, with ``-m``, by the command of a sweep.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from mnist_lightning import trust
from mnist_lightning.cli import quote, quote_paths, retype
from mnist_lightning.config import ConfigError
from mnist_lightning.images.known import KNOWN
from mnist_lightning.images.sources import find_source
from mnist_lightning.rundir import reproduce
from mnist_lightning.rundir.outside import check_links, expand_home
from mnist_lightning.rundir.resume import BASE, KEY, load_settings, resume_run
from mnist_lightning.sweeps.results import find_sweep, own_overrides, read_multirun, split_overrides
from mnist_lightning.targets import KINDS, TARGET

PATHS = ("data.data_dir", "data.path", "hydra.run.dir", "hydra.sweep.dir", "init_from")  # quoted for Hydra
MOVED = {"label_smoothing": "loss.label_smoothing"}  # names of the first edition
SWEEP_FREE = ("hydra.launcher.", "hydra.sweeper.n_trials", "hydra.sweeper.n_jobs")  # may change at resume=
FLAGS = ("-cd", "--config-dir")  # the folder of the user's own config files: must be typed again
# Overrides of Hydra's own settings that a saved command of a sweep may contain; all others must be typed
HYDRA = (
    r"hydra/(launcher=(auto|basic|processes|submitit_local|submitit_slurm|slurm_cpu|slurm_gpu)|sweeper=(grid|optuna))"
    r"|hydra\.launcher\.(n_jobs|jobs_per_gpu|timeout_s|timeout_min|cpus_per_task|gpus_per_node|tasks_per_node|mem_gb|nodes"
    r"|array_parallelism|partition|qos|account|max_num_timeout)=.*"
    r"|hydra\.sweeper\.(n_trials|n_jobs|seed|study_name|max_batch_size|sampler\.[a-z]\w*)=.*"
    r"|hydra\.sweep\.subdir='?(?!/)(?!.*\.\.).*"
    r"|hydra\.sweeper\.params(=null|\.(?!hydra)[\w.]+=.*)"
)


def rewrite_arguments(typed: Sequence[str]) -> list[str]:
    """Return the arguments of ``train`` for Hydra: paths are quoted, and ``folds=``, ``resume=`` and
    ``reproduce=`` are replaced.

    Raises:
        OSError: the run or the sweep does not exist, or the run has no checkpoint.
        ConfigError: an argument uses a name of the first edition, or does not fit the other arguments.
        TrustError: the saved settings name code that is not trusted.
    """
    arguments = list(typed)
    for argument in arguments:
        key, sign, value = argument.lstrip("+").partition("=")
        if sign and key in MOVED:
            raise ConfigError(f"{key} is {MOVED[key]} now: type {MOVED[key]}={value}")
    arguments = expand_folds(arguments)
    reproduced = [
        unquote(one.removeprefix(reproduce.KEY)) for one in arguments if one.startswith(reproduce.KEY)
    ]
    names = [unquote(argument.removeprefix(KEY)) for argument in arguments if argument.startswith(KEY)]
    if reproduced:
        if names or not {"-m", "--multirun"}.isdisjoint(arguments):
            raise ConfigError("reproduce= names one run to train again: give no resume= and no -m with it")
        arguments = reproduce.reproduce_run(reproduced[-1], arguments)
    elif BASE in arguments and (told := [one for one in arguments if one.startswith(reproduce.TOLD)]):
        # a child process of a DDP run has its parent's arguments
        folder = OverridesParser.create().parse_override(told[-1]).value()
        reproduce.give_settings(Path(str(folder)), arguments, trust.typed_trust([]))
    elif names and not {"-m", "--multirun"}.isdisjoint(arguments):
        arguments = resume_sweep(names[-1], arguments)
    elif names and BASE in arguments:  # a child process of a DDP run has its parent's arguments
        folder = OverridesParser.create().parse_override(KEY + names[-1]).value()
        load_settings(Path(str(folder)), arguments, trust.typed_trust([]))
    elif names:
        arguments = resume_run(names[-1], arguments)
    return quote_paths(PATHS, arguments)


def expand_folds(arguments: Sequence[str]) -> list[str]:
    """Expand ``-m folds=3`` for Hydra: ``data.num_folds=3 data.fold=0,1,2``.

    Raises:
        ConfigError: the value is not a whole number in [2, 9999], -m is missing, or another argument sets
            ``data.num_folds`` or ``data.fold``.
    """
    expanded: list[str] = []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key != "folds":
            expanded.append(argument)
            continue
        if not re.fullmatch(r"0*([2-9]|[1-9]\d{1,3})", value):
            raise ConfigError(f"folds must be a whole number in [2, 9999], got {value}")
        if {"-m", "--multirun"}.isdisjoint(arguments):
            raise ConfigError(
                f"folds={value} trains {int(value)} nets: give -m with it, or data.num_folds={value}"
                " data.fold=0 for one of them"
            )
        beside = [one for one in arguments if one.lstrip("+").startswith(("data.num_folds=", "data.fold="))]
        if beside:
            raise ConfigError(
                f"folds={value} stands for data.num_folds={value} and all values of data.fold: give no"
                f" {beside[0].lstrip('+')} with it"
            )
        folds = ",".join(map(str, range(int(value))))
        expanded += [f"data.num_folds={int(value)}", f"data.fold={folds}"]
    return expanded


def unquote(name: str) -> str:
    """Remove the quotes around a folder's name that Windows' cmd.exe, unlike other shells, leaves there."""
    quoted = len(name) > 2 and name[0] == name[-1] and name[0] in "'\""
    return name[1:-1] if quoted and not os.path.exists(name) else name


def resume_sweep(name: str, arguments: list[str]) -> list[str]:
    """Return the command line that continues a sweep: its own command, with another launcher if one is given.

    Args:
        name: a sweep's folder, or "latest".
        arguments: all arguments of the command line.

    Raises:
        OSError: the sweep does not exist.
        ConfigError: other settings are given, or an incompatible earlier version made the sweep.
        TrustError: the saved command has an argument that must be typed.
    """
    folder = find_sweep(name)
    check_links(folder)
    multirun = read_multirun(folder)
    if TARGET not in (multirun.get("model") or {}):
        raise ConfigError(
            f"{folder} can't be resumed: an earlier version of mnist_lightning made it; report still reads it"
        )
    saved = [one for one in own_overrides(multirun) if not one.startswith(trust.KEY)]
    check_overrides(folder, [one for one in saved if one not in arguments])
    values = split_overrides(saved)
    kept: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        if argument in ("-m", "--multirun", *saved) or argument.startswith((KEY, trust.KEY)):
            continue
        if argument in FLAGS and position < len(arguments):
            kept += [argument, arguments[position]]
            position += 1
            continue
        if argument.startswith(tuple(f"{flag}=" for flag in FLAGS)):
            kept.append(argument)
            continue
        key = argument.partition("=")[0]
        if key == "hydra/launcher":
            saved = [one for one in saved if not one.startswith(("hydra/launcher=", "hydra.launcher."))]
        elif not key.startswith(SWEEP_FREE):
            before = f"{key}={values[key]}" if key in values else f"no {key}"
            raise ConfigError(f"{folder} can't be resumed with {argument}: its command has {before}")
        saved = [*(one for one in saved if not one.startswith(f"{key}=")), argument]
    return ["-m", *kept, *saved, f"hydra.sweep.dir={quote(str(folder))}"]


def check_overrides(source: Path, overrides: list[str]) -> None:
    """Check that overrides read from a file in a folder may be used although the user has not typed them.

    The targets that they choose are checked when each job's config is composed.

    Raises:
        TrustError: an override is a flag, changes Hydra's own settings, or reads values from outside.
    """
    for override in overrides:
        text = str(override)
        try:
            parsed = OverridesParser.create().parse_override(text)
            right = not text.startswith("-") and is_harmless(parsed, text, source)
        except (HydraException, OSError):
            right = False
        if not right:
            raise trust.TrustError(
                f"{source} holds {text}, which is used only if it is typed; if it is right, type it:"
                f" {retype(text)}"
            )


def is_harmless(parsed: Override, text: str, folder: Path) -> bool:
    key = parsed.key_or_group
    if "@" in text.partition("=")[0] or "${" in re.sub(trust.OURS, "", text):
        return False
    if key.split(".")[0].split("/")[0] == "hydra":
        return re.fullmatch(HYDRA, text) is not None
    if key == "data.data_dir":  # missing files would be downloaded to it
        path = expand_home(str(parsed.value()))
        return not parsed.is_sweep_override() and any(find_source(name, path).is_whole() for name in KNOWN)
    listed = parsed.is_discrete_sweep() and not parsed.is_range_sweep()  # a range has numbers only, too many
    value = list(parsed.sweep_string_iterator()) if listed else parsed.value()
    inside = (trust.stays_inside(inner, one, folder) for inner, one in trust.find_texts(value, key))
    return key.split(".")[0] not in KINDS or all(inside)
