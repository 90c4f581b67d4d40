"""How many threads a computation gets, and how they wait for each other.

A small net's step is too short to be shared: two threads save a third of its time on an idle machine and
cost ten times as much on a busy one, because OpenMP's threads spin while they wait for a thread whose core
another process holds.  So the arithmetic of a step decides, never a clock: the same settings give the same
number, and with it the same weights.  ``docs/speed.md`` has the measurements behind ``WORTH_SHARING``.
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

WORTH_SHARING = 1e9  # floating-point operations of a step, from which on all cores share it
BACKWARD = 2  # forward passes that a backward pass costs: gradients of the weights, and of the inputs
# What OpenMP's libraries (GCC's, LLVM's and Intel's) read when torch loads them.  GCC's waits actively for so
# many turns, some tenths of a millisecond, before it sleeps.  With none, experiment=strong takes 1.3 times as
# long on an idle machine; with its own 300,000, a large step beside other work twice as long.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "0"}
CGROUPS = Path("/sys/fs/cgroup")

ask: Callable[[int], object] | None = None
"""In a worker of a sweep: waits until this many cores are free for its job."""
waited = 0.0
"""Seconds that this process has spent in ``ask``."""


def wait_passively() -> None:
    """Let torch's threads sleep when they wait long, unless the user has said how they are to wait.

    Acts only before torch is imported.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)


def count_flops(net: "nn.Module", image_shape: Sequence[int], batch_size: int) -> int:
    """Floating-point operations of a forward pass, those of matrix products and convolutions.

    The net is tried on two blank images in eval mode; neither it nor the random state is changed.

    Args:
        net: takes images as float32, (B, C, H, W), on the CPU.
        image_shape: (C, H, W).
        batch_size: of the pass whose operations are asked for.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mnist_lightning.network import on_trial

    images = torch.zeros(2, *image_shape)
    with on_trial(net), FlopCounterMode(display=False) as counter:
        net.forward(images)  # not net(images): a net that is to be compiled would be, for these two
    return int(counter.get_total_flops()) * batch_size // len(images)


def choose(flops: int, *, wanted: int | None = None, processes: int = 1) -> int:
    """Choose the number of threads for a step of ``flops`` floating-point operations.

    Args:
        wanted: by the user, who is asked no questions; None: one where the step is too small to be shared,
            else ``most()``.
        processes: of this run on this machine, which share its cores.
    """
    if wanted is not None:
        return wanted
    return 1 if flops < WORTH_SHARING else max(1, most() // processes)


def most() -> int:
    """All usable cores, or as many of them as ``OMP_NUM_THREADS`` allows."""
    limit = re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    return min(usable_cores(), int(limit[1])) if limit else usable_cores()


@contextmanager
def use(number: int) -> Iterator[None]:
    """Let torch, and processes started within the block, compute on ``number`` threads.

    In a sweep's worker it begins when the cores are free.
    """
    import torch

    global waited
    if ask is not None:
        start = time.monotonic()
        ask(number)
        waited += time.monotonic() - start
    before, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(number)
    os.environ["OMP_NUM_THREADS"] = str(number)  # Lightning sets a number of its own where there is none
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS", None)
        if variable is not None:
            os.environ["OMP_NUM_THREADS"] = variable


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity and its container's quota bound them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, cpu_quotas())]))


def cpu_quotas() -> Iterator[float]:
    """The shares of time, in cores, that the control groups around this process allow it.

    Kernel documentation, Documentation/admin-guide/cgroup-v2.rst, "cpu.max", and
    Documentation/scheduler/sched-bwc.rst for version 1.
    """
    for folder in control_groups("cpu"):
        try:
            if (folder / "cpu.max").is_file():
                quota, period = read(folder / "cpu.max").split()
            else:
                quota, period = (read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max", or nonsense
            continue


def free_memory() -> float:
    """Bytes that new processes can still take on this machine, in this container; infinite where unknown."""
    known = [float("inf")]
    with suppress(OSError):
        known += [1024 * int(kib) for kib in re.findall(r"MemAvailable: +(\d+)", read("/proc/meminfo"))]
    for folder in control_groups("memory"):
        version_2 = (folder / "memory.max").is_file()
        most, used = ("max", "current") if version_2 else ("limit_in_bytes", "usage_in_bytes")
        try:
            idle = re.findall(r"^(?:total_)?inactive_file (\d+)", read(folder / "memory.stat"), re.M)
            taken = int(read(folder / f"memory.{used}")) - int(idle[-1])  # without files that it can drop
            known.append(int(read(folder / f"memory.{most}")) - taken)
        except (OSError, ValueError, IndexError):  # no such file, or "max"
            continue
    return max(0, min(known))


def control_groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, the innermost first.

    In a container they lie at the root, whatever name the kernel gives them.
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
