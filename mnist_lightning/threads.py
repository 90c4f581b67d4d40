"""Choose the number of threads for a computation, and how they wait for each other.

A step of a small net is too short for two threads: on an idle machine they save a third of its time, but on
a busy one they take ten times as long, because OpenMP's threads spin while they wait for a thread whose core
another process uses.  The number depends only on the arithmetic of a step, never on a clock.  So the same
settings give the same number and thus the same weights.  ``docs/speed.md`` has the measurements behind
``WORTH_SHARING``.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

WORTH_SHARING = 1e9  # floating-point operations of a step above which all cores share it
BACKWARD = 2  # a backward pass costs two forward passes: gradients of the weights and of the inputs
# Variables that the OpenMP libraries of GCC, LLVM and Intel read when torch loads them.  GCC's threads spin
# for GOMP_SPINCOUNT turns, some tenths of a millisecond, before they sleep.  With 0 turns, experiment=strong
# takes 1.3 times as long on an idle machine; with GCC's default of 300,000, a large step takes twice as long
# beside other work.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "0"}
CGROUPS = Path("/sys/fs/cgroup")

ask: Callable[[int], object] | None = None
"""A worker of a sweep sets this to a function that waits until so many cores are free for its job."""
waited = 0.0
"""The seconds that this process has spent in ``ask``."""


def wait_passively() -> None:
    """Let torch's threads sleep when they wait long, unless the user's environment says how they wait.

    Call it before torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)


def count_flops(net: "nn.Module", image_shape: Sequence[int], batch_size: int) -> int:
    """Count the floating-point operations of matrix products and convolutions in a forward pass.

    The net is tried on two blank images in eval mode; neither the net nor the random state changes.

    Args:
        net: takes images (B, C, H, W) float32 on the CPU.
        image_shape: (C, H, W).
        batch_size: number of images in the forward pass.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mnist_lightning.network import on_trial

    images = torch.zeros(2, *image_shape)
    with on_trial(net), FlopCounterMode(display=False) as counter:
        net.forward(images)  # net(images) would compile a net that is to be compiled, for these two images
    return int(counter.get_total_flops()) * batch_size // len(images)


def choose(flops: int, *, wanted: int | None = None, processes: int = 1) -> int:
    """Choose the number of threads for a step of ``flops`` floating-point operations.

    Args:
        flops: operations of the step.
        wanted: the user's number, which decides; None: one thread for a small step, else ``most()``.
        processes: number of processes of this run on this machine, which share its cores.
    """
    if wanted is not None:
        return wanted
    return 1 if flops < WORTH_SHARING else max(1, most() // processes)


def most() -> int:
    """Return the number of usable cores, at most ``OMP_NUM_THREADS``."""
    limit = re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    return min(usable_cores(), int(limit[1])) if limit else usable_cores()


@contextmanager
def use(number: int) -> Iterator[None]:
    """Let torch, and processes started within the block, compute on ``number`` threads.

    In a sweep's worker, the block begins when so many cores are free.
    """
    import torch

    global waited
    if ask is not None:
        start = time.monotonic()
        ask(number)
        waited += time.monotonic() - start
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(number)
    os.environ["OMP_NUM_THREADS"] = str(number)  # otherwise Lightning sets a number of its own
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS", None)
        if variable is not None:
            os.environ["OMP_NUM_THREADS"] = variable


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, by its affinity and container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, cpu_quotas())]))


def cpu_quotas() -> Iterator[float]:
    """Yield the CPU quotas of the control groups around this process, in cores.

    The files are described in the kernel's Documentation/admin-guide/cgroup-v2.rst, "cpu.max", and, for
    version 1, in Documentation/scheduler/sched-bwc.rst.
    """
    for folder in control_groups("cpu"):
        try:
            if (folder / "cpu.max").is_file():
                quota, period = read(folder / "cpu.max").split()
            else:
                quota, period = (read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, "max", or not a number
            continue


def free_memory() -> float:
    """Return the bytes of memory that are free on this machine and in this container; inf if unknown."""
    known = [float("inf")]
    with suppress(OSError):
        known += [1024 * int(kib) for kib in re.findall(r"MemAvailable: +(\d+)", read("/proc/meminfo"))]
    for folder in control_groups("memory"):
        version_2 = (folder / "memory.max").is_file()
        most, used = ("max", "current") if version_2 else ("limit_in_bytes", "usage_in_bytes")
        try:
            idle = re.findall(r"^(?:total_)?inactive_file (\d+)", read(folder / "memory.stat"), re.M)
            taken = int(read(folder / f"memory.{used}")) - int(idle[-1])  # cached files can be dropped
            known.append(int(read(folder / f"memory.{most}")) - taken)
        except (OSError, ValueError, IndexError):  # no such file, or "max"
            continue
    return max(0, min(known))


def tell_lack(size: float) -> str | None:
    """Return how much memory is wanted and how much is free, for a message; None if there is enough.

    Args:
        size: the bytes that are wanted.
    """
    free = free_memory()
    return f"{size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are free" if size > free else None


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in, the innermost first.

    In a container they are at the root, whatever name the kernel reports.
    """
    try:
        lines = read("/proc/self/cgroup").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / (controller if controllers else "")  # version 1 has a folder for each controller
        innermost = root / name.lstrip("/")
        yield from (path for path in (innermost, *innermost.parents) if path.is_relative_to(root))


def read(path: Path | str) -> str:
    return Path(path).read_text(encoding="ascii", errors="replace")
