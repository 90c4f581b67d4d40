"""``resume=<folder>`` on a command line, of a run and, beside ``-m``, of a sweep.

It is resolved before Hydra composes: the settings that were left are the base.
"""

import re
import sys
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from mnist_lightning import trust
from mnist_lightning.cli import quote, retype
from mnist_lightning.config import ConfigError
from mnist_lightning.images.known import KNOWN
from mnist_lightning.images.sources import find_source
from mnist_lightning.rundir import reproduce
from mnist_lightning.rundir.resume import BASE, KEY, load_settings, resume_run
from mnist_lightning.sweeps.results import find_sweep, own_overrides, read_multirun, split_overrides
from mnist_lightning.targets import KINDS, TARGET

SWEEP_FREE = ("hydra.launcher.", "hydra.sweeper.n_trials", "hydra.sweeper.n_jobs")  # decide no result
FLAGS = ("-cd", "--config-dir")  # where the user's own files lie: typed again, never saved
# Of Hydra's own settings, what a sweep's saved command may say; all else must be typed
HYDRA = (
    r"hydra/(launcher=(auto|basic|processes|submitit_local|submitit_slurm|slurm_cpu|slurm_gpu)|sweeper=(grid|optuna))"
    r"|hydra\.launcher\.(n_jobs|jobs_per_gpu|timeout_s|timeout_min|cpus_per_task|gpus_per_node|tasks_per_node|mem_gb|nodes"
    r"|array_parallelism|partition|qos|account|max_num_timeout)=.*"
    r"|hydra\.sweeper\.(n_trials|n_jobs|seed|study_name|max_batch_size|sampler\.[a-z]\w*)=.*"
    r"|hydra\.sweeper\.params(=null|\.(?!hydra)[\w.]+=.*)"
)


def rewrite_arguments() -> None:
    """Where ``sys.argv`` says ``resume=``, make Hydra compose from the settings that were left.

    Raises:
        OSError: there is no such run or sweep, or the run has no checkpoint.
        ConfigError: a sweep is given other settings.
        TrustError: what was left asks for more than it is trusted with.
    """
    reproduced = [argument for argument in sys.argv[1:] if argument.startswith(reproduce.KEY)]
    names = [argument for argument in sys.argv[1:] if argument.startswith(KEY)]
    if reproduced:
        if names or not {"-m", "--multirun"}.isdisjoint(sys.argv):
            raise ConfigError("reproduce= names one run to train again: give no resume= and no -m beside it")
        sys.argv[1:] = reproduce.reproduce_run(reproduced[-1].removeprefix(reproduce.KEY), sys.argv[1:])
        return
    if not names:
        return
    name = names[-1].removeprefix(KEY)
    if {"-m", "--multirun"}.isdisjoint(sys.argv):
        if BASE in sys.argv:  # a child process of a DDP run has its parent's arguments
            folder = OverridesParser.create().parse_override(KEY + name).value()
            load_settings(Path(str(folder)), sys.argv[1:], trust.typed_trust([]))
        else:
            sys.argv[1:] = resume_run(name, sys.argv[1:])
    else:
        sys.argv[1:] = resume_sweep(name, sys.argv[1:])


def resume_sweep(name: str, arguments: list[str]) -> list[str]:
    """The command line that goes on with a sweep: its own, with another launcher if one is given.

    Raises:
        OSError: there is no such sweep.
        ConfigError: other settings are given beside it, or an earlier version has made it.
        TrustError: its command holds what must be typed.
    """
    folder = find_sweep(name)
    multirun = read_multirun(folder)
    if TARGET not in (multirun.get("model") or {}):
        raise ConfigError(
            f"{folder} can't be resumed: it was made by an earlier version of mnist_lightning; report still"
            " reads it"
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
    """Whether what a folder's file gives as settings of a command line may be followed without being typed.

    The targets that they lead to are checked when each job is composed.

    Raises:
        TrustError: one is a flag, reaches into Hydra's own settings or looks up what is outside.
    """
    for override in overrides:
        text = str(override)
        try:
            parsed = OverridesParser.create().parse_override(text)
            right = not text.startswith("-") and is_harmless(parsed, text, source)
        except HydraException:
            right = False
        if not right:
            raise trust.TrustError(
                f"{source} holds {text}, which is not followed unasked; if it is right, type it:"
                f" {retype(text)}"
            )


def is_harmless(parsed: Override, text: str, folder: Path) -> bool:
    key = parsed.key_or_group
    if "@" in text.partition("=")[0] or "${" in re.sub(trust.OURS, "", text):
        return False
    if key.split(".")[0].split("/")[0] == "hydra":
        return re.fullmatch(HYDRA, text) is not None
    if key == "data.data_dir":  # it would be filled where something is missing
        path = Path(str(parsed.value())).expanduser()
        return not parsed.is_sweep_override() and any(find_source(name, path).is_whole() for name in KNOWN)
    value = list(parsed.sweep_string_iterator()) if parsed.is_discrete_sweep() else parsed.value()
    inside = (trust.stays_inside(inner, one, folder) for inner, one in trust.find_texts(value, key))
    return key.split(".")[0] not in KINDS or all(inside)
