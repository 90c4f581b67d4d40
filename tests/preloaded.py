"""Run Python commands in forks of one process that has already imported the packages of others.

``python preloaded.py <descriptor> <module> …`` imports these modules, reads requests from that socket (see
``processes.Preloaded``, which writes them), and forks for each.  It answers with the child's id, and later with
its exit code and peak memory.  The child runs a module, a script or a piece of code to its end, as ``python``
does, but without the seconds of imports.  Before the fork, nothing of this project is imported and nothing is
computed, because a fork must not inherit a pool of threads.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import types
import weakref
from typing import Any


def give_up_roots_rights() -> None:
    """Make this process, and those that it starts, respect permissions, even if root runs it."""
    cap_dac_override, cap_dac_read_search, pr_capbset_drop = 1, 2, 24  # linux/capability.h, linux/prctl.h
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    for capability in (cap_dac_override, cap_dac_read_search):
        libc.prctl(pr_capbset_drop, capability, 0, 0, 0)
        sets[0] &= ~(1 << capability)  # effective
        sets[1] &= ~(1 << capability)  # permitted
    libc.capset(header, sets)


def wait(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each request, and report each child's end.

    Returns:
        only in a child: what to run, and the descriptors for its standard output and error.
    """
    children: dict[int, int] = {}  # process id -> the descriptor to which its exit code is written
    woken, waker = os.pipe()
    for descriptor in (woken, waker):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # this process ends when the requests end
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if woken in ready:
            os.read(woken, 4096)
            for pid in list(children):
                ended, status, usage = os.wait4(pid, os.WNOHANG)
                if ended:
                    told = children.pop(pid)
                    os.write(told, f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}".encode())
                    os.close(told)
        if requests in ready:
            content, descriptors, _, _ = socket.recv_fds(requests, 2**20, 3)
            if not content:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            *output, told = descriptors
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                selector.close()
                requests.close()
                for descriptor in (woken, waker, told, *children.values()):
                    os.close(descriptor)
                return json.loads(content), output
            children[pid] = told
            os.write(told, f"{pid}\n".encode())
            for descriptor in output:
                os.close(descriptor)


def prepare(request: dict[str, Any], output: list[int]) -> None:
    """Give this child the folder, variables and state that a new interpreter would have."""
    descriptors = (os.open(os.devnull, os.O_RDONLY), *output)
    for descriptor, target in zip(descriptors, (0, 1, 2), strict=True):
        os.dup2(descriptor, target)
    for descriptor in descriptors:
        os.close(descriptor)
    if request["heed_permissions"]:
        give_up_roots_rights()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None  # TMPDIR may have changed
    added = request["env"].get("PYTHONPATH")
    sys.path[1:1] = added.split(os.pathsep) if added else []
    importlib.invalidate_caches()
    if "torch" in sys.modules:
        import numpy as np
        import torch

        np.random.seed()
        threads = int(request["env"].get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
    if "CXX" in os.environ and "torch._inductor.config" in sys.modules:  # its import has read the old CXX
        sys.modules["torch._inductor.config"].cpp.cxx = (None, os.environ["CXX"])
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)


def draw() -> None:
    """Draw a figure once: finding the first letters of a font takes each fork 0.4 s."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow([[0, 1], [1, 0]]), label="a")
    axes.set_title("a", loc="left")
    FigureCanvasAgg(figure).draw()


def run(arguments: list[str]) -> None:
    """Run ``python <arguments>``, in a new module ``__main__``."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = arguments[1:]
        runpy._run_module_as_main(arguments[1])  # type: ignore[attr-defined]  # what python itself calls
    elif arguments[0] == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


exit_code = 1  # the code for an uncaught exception


def leave() -> None:
    """End after the exit handlers, without the 2 s for freeing all imported modules."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    this = sys.modules["__main__"]  # kept, because its functions still run
    atexit.register(leave)  # registered first, so called last
    for module in sys.argv[2:]:
        importlib.import_module(module)
    ours = [name for name in sys.modules if name.startswith(("mnist_lightning", "hydra_plugins.mnist"))]
    assert not ours, ours
    if "matplotlib.backends.backend_agg" in sys.modules:
        draw()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # children need not free torch's operators
    gc.collect()
    gc.freeze()  # nor search the imported modules for garbage
    request, output = wait(socket.socket(fileno=int(sys.argv[1])))
    prepare(request, output)
    try:
        run(request["arguments"])
        exit_code = 0
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
