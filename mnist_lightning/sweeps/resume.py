"""``resume=<folder>`` on a command line, of a run and, beside ``-m``, of a sweep.

It is resolved before Hydra composes: the settings that were left are the base.
"""

import sys

from mnist_lightning.cli import quote
from mnist_lightning.config import ConfigError
from mnist_lightning.rundir.resume import KEY, resume_run
from mnist_lightning.sweeps.results import find_sweep, own_overrides, read_multirun, split_overrides

SWEEP_FREE = ("hydra.launcher.", "hydra.sweeper.n_trials", "hydra.sweeper.n_jobs")  # decide no result


def rewrite_arguments() -> None:
    """Where ``sys.argv`` says ``resume=``, make Hydra compose from the settings that were left.

    Raises:
        OSError: there is no such run or sweep, or the run has no checkpoint.
        ConfigError: a sweep is given other settings.
    """
    names = [argument for argument in sys.argv[1:] if argument.startswith(KEY)]
    if not names or "--config-path" in sys.argv:  # the latter: a child process of a DDP run
        return
    resume = resume_run if {"-m", "--multirun"}.isdisjoint(sys.argv) else resume_sweep
    sys.argv[1:] = resume(names[-1].removeprefix(KEY), sys.argv[1:])


def resume_sweep(name: str, arguments: list[str]) -> list[str]:
    """The command line that goes on with a sweep: its own, with another launcher if one is given.

    Raises:
        OSError: there is no such sweep.
        ConfigError: other settings are given beside it.
    """
    folder = find_sweep(name)
    saved = own_overrides(read_multirun(folder))
    values = split_overrides(saved)
    for argument in arguments:
        if argument in ("-m", "--multirun", *saved) or argument.startswith(KEY):
            continue
        key = argument.partition("=")[0]
        if key == "hydra/launcher":
            saved = [one for one in saved if not one.startswith(("hydra/launcher=", "hydra.launcher."))]
        elif not key.startswith(SWEEP_FREE):
            before = f"{key}={values[key]}" if key in values else f"no {key}"
            raise ConfigError(f"{folder} can't be resumed with {argument}: its command has {before}")
        saved = [*(one for one in saved if not one.startswith(f"{key}=")), argument]
    return ["-m", *saved, f"hydra.sweep.dir={quote(str(folder))}"]
