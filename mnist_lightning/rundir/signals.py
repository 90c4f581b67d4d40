"""SIGTERM and Ctrl-C: finish the step, save, and end with the exit code that a shell expects.

While training (``deferred``), a signal only sets a flag, which ``Checkpoints`` reads at the end of
a step.  At any other time it ends the process at once, as does a second one.

In a job of submitit, which runs on a cluster, the signal that tells of the end of its time or of a
pre-emption is deferred in the same way: the newest step is saved before submitit's own handler queues
the job again.  SIGTERM, which such a job must survive (SLURM sends it before), only saves there.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_received: int | None = None  # signal number
_deferring = False
_ends_process = True  # a second signal: in a process that is not ours it only raises KeyboardInterrupt
_requeue: Callable[[int, FrameType | None], object] | None = None  # submitit's handler


def install() -> None:
    """Take over SIGTERM, SIGINT and, in a job of submitit, its signal; only in the main thread."""
    global _requeue
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, _handle)
    signal.signal(signal.SIGINT, _handle)
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    requeueing = signal.Signals["SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2")]
    handler = signal.getsignal(requeueing)
    if callable(handler) and handler is not _handle:
        _requeue = handler
        signal.signal(requeueing, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        if not _ends_process:
            raise KeyboardInterrupt
        if _requeue is None or signal.SIGTERM not in (number, _received):
            os._exit(128 + number)
        if number == signal.SIGTERM:
            return
    _received = number
    if not _deferring:
        stop_if_asked()


@contextmanager
def borrowed() -> Iterator[None]:
    """Handle Ctrl-C within the block, in a process that is not ours, such as a notebook's.

    Outside the main thread, which alone hears of signals, nothing is changed.
    """
    global _received, _ends_process
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _received, _ends_process = None, False
    try:
        signal.signal(signal.SIGINT, _handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received, _ends_process = None, True


def received() -> bool:
    return _received is not None


def name_received() -> str:
    """The signal that has come, as people call it: "Ctrl-C", "SIGTERM"; empty where none has."""
    if _received is None:
        return ""
    return "Ctrl-C" if _received == signal.SIGINT else signal.Signals(_received).name


def ask() -> None:
    """Ask this process to stop, as a signal would."""
    global _received
    if _received is None:
        _received = signal.SIGTERM


def stop_if_asked() -> None:
    """
    Raises:
        SystemExit: if a signal has come: with 128 + its number (143 for SIGTERM, 130 for SIGINT), or
            with what submitit says when it has queued the job again.
    """
    global _received
    number = _received
    if number is None:
        return
    if _requeue is not None and number == signal.SIGTERM:
        _received = None
        return
    if _requeue is not None and number != signal.SIGINT:
        _requeue(number, None)
    raise SystemExit(128 + number)


@contextmanager
def deferred() -> Iterator[None]:
    """Let a first signal wait until ``stop_if_asked`` is called, or until the block ends."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    stop_if_asked()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A stretch that is broken off when it takes longer, where the system has an alarm (not Windows).

    Raises:
        TimeoutError: it did.  A subclass of OSError.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
