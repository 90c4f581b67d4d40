"""SIGTERM and Ctrl-C: finish the step, save, and end with the exit code that a shell expects.

While training (``deferred``), a signal only sets a flag, which ``Checkpoints`` reads at the end of
a step.  At any other time it ends the process at once, as does a second one.

Of a run of several processes, each may wait in C++ for the others, where Python's handlers don't run: a
thread then ends it (``listen``).  The processes that such a run adds end with the one that has added them
(``follow_parent``).

In a job of submitit, which runs on a cluster, the signal that tells of the end of its time or of a
pre-emption is deferred in the same way: the newest step is saved before submitit's own handler queues
the job again.  SIGTERM, which such a job must survive (SLURM sends it before), only saves there.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_received: int | None = None  # signal number
_deferring: bool | None = False  # None: in a stretch that defers from ``defer`` on
_ends_process = True  # a second signal: in a process that is not ours it only raises KeyboardInterrupt
_listening = False
PARENT = "MNIST_LIGHTNING_PARENT"  # the variable that tells added processes who has added them
PAUSE = 0.5  # seconds between two looks at the parent
PATIENCE = 1.0  # seconds that a process has to end by itself where it need not finish a step
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


def listen() -> None:
    """In a run of several processes: end this one where a signal finds it waiting for the others.

    A second signal always does; a first one does where no step is to be finished and saved.  The processes
    that this one adds are told of it.
    """
    global _listening
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[PARENT] = str(os.getpid())
    if _listening or threading.current_thread() is not threading.main_thread():
        return
    _listening = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # Python's C handler writes a signal's number
    if hasattr(os, "register_at_fork"):  # a loader's worker would write there too
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def end() -> None:
        count = 0
        while number := os.read(reading, 1)[0]:
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            count += 1
            if count == 1 and not _deferring:
                time.sleep(PATIENCE)
            if count > 1 or not _deferring:
                os._exit(128 + number)

    threading.Thread(target=end, daemon=True).start()


def follow_parent() -> None:
    """In a process that a run of several has added: end as soon as the one that has added it is gone."""
    if PARENT not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        return
    parent = int(os.environ[PARENT])

    def end() -> None:
        while os.getppid() == parent:
            time.sleep(PAUSE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()


def wait_for_parent() -> None:
    """In an added process: let the one that has added it end first, which Lightning would kill otherwise as
    soon as it sees that another has ended."""
    if PARENT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(30 * PATIENCE)  # follow_parent ends it before


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


def defer() -> None:
    """Let a first signal wait from here on, to the end of the stretch that is ``deferred``, if it is one."""
    global _deferring
    _deferring = _deferring is not False


@contextmanager
def deferred(*, at_once: bool = True) -> Iterator[None]:
    """Let a first signal wait until ``stop_if_asked`` is called, or until the block ends.

    Args:
        at_once: False: it does so from ``defer`` on.
    """
    global _deferring
    _deferring = True if at_once else None
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
