"""Runs ``python -m`` commands in forks of one process that has imported the heavy packages already.

Each line of its input is a command: {"argv": ["-m", module, …] or [script, …], "cwd": …, "path": [folders
to be found first], "output": a file for stdout and stderr}.  It answers with the exit code.  The child is
a process of its own that runs the module as ``python`` does, to the end; what it is spared is half a
minute's worth of imports a dozen times over.  Nothing of this project is imported before the fork.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import sys
from typing import Any

HEAVY = (
    *("torch", "torchvision.datasets", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"),
    *("torchmetrics.classification", "torch.utils.tensorboard", "matplotlib.figure", "optuna"),
    *("hydra", "hydra._internal.hydra", "hydra._internal.utils", "tqdm", "zipfile", "xml.dom.minidom"),
    *("matplotlib.backends.backend_agg", "hydra.core.override_parser.overrides_parser"),
)


def wait() -> dict[str, Any]:
    """Fork for each command; returns in the child."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    for heavy in HEAVY:
        importlib.import_module(heavy)
    gc.freeze()  # the children need not look through what was imported
    request = wait()
    atexit.register(gc.unfreeze)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.chdir(request["cwd"])
    argv = request["argv"]
    sys.path[:1] = [*request["path"], request["cwd"] if argv[0] == "-m" else os.path.dirname(argv[0])]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
