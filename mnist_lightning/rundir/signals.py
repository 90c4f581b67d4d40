"""Handle SIGTERM and Ctrl-C: finish the step, save, and exit with the code that a shell expects.

During training (``deferred``), a signal only sets a flag, which ``Checkpoints`` reads at the end of each
step.  At any other time the first signal ends the process at once; a second signal always does.

A process of a distributed run may wait for the others in C++ code, where Python's signal handlers do not
run; a thread ends it then (``listen``).  Added processes end when the process that started them is gone
(``follow_parent``).

A job that submitit runs on a cluster gets a signal before its time ends or it is pre-empted.  That signal is
deferred in the same way: the newest step is saved before submitit's own handler queues the job again.  SLURM
sends SIGTERM before that signal; the job must survive it, so there SIGTERM only saves.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_received: int | None = None  # signal number
_deferring: bool | None = False  # None: in a block that starts to defer when ``defer`` is called
_ends_process = True  # whether a second signal ends the process; otherwise it raises KeyboardInterrupt
_listening = False
PARENT = "MNIST_LIGHTNING_PARENT"  # environment variable with the process id of an added process's parent
PAUSE = 0.5  # seconds between two checks that the parent is alive
PATIENCE = 1.0  # seconds that a process outside training has to end by itself
_requeue: Callable[[int, FrameType | None], object] | None = None  # submitit's handler


def install() -> None:
    """Install the handler for SIGTERM, SIGINT and, in a job of submitit, submitit's signal.

    In a thread other than the main thread, nothing happens.
    """
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

    In a thread other than the main thread, which gets no signals, nothing changes.
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
    """Let a thread end this process of a distributed run when a signal arrives while it waits for others.

    A second signal always ends the process; a first signal does so outside training.  The main process also
    passes its process id on to the processes that it adds.
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
    if hasattr(os, "register_at_fork"):  # otherwise a data loader's worker would write there, too
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
    """End an added process of a distributed run as soon as the process that started it is gone."""
    if PARENT not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        return
    parent = int(os.environ[PARENT])

    def end() -> None:
        while os.getppid() == parent:
            time.sleep(PAUSE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()


def wait_for_parent() -> None:
    """Let the main process end before this added process does.

    Otherwise Lightning kills the main process as soon as it sees that an added process has ended.
    """
    if PARENT in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(30 * PATIENCE)  # follow_parent ends this process earlier


def name_received() -> str:
    """Return the name of the received signal, such as "Ctrl-C" or "SIGTERM"; "" if there was none."""
    if _received is None:
        return ""
    return "Ctrl-C" if _received == signal.SIGINT else signal.Signals(_received).name


def ask() -> None:
    """Ask this process to stop, as a signal would."""
    global _received
    if _received is None:
        _received = signal.SIGTERM


def stop_if_asked() -> None:
    """End the process if a signal was received.

    Raises:
        SystemExit: a signal was received; the code is 128 + its number (143 for SIGTERM, 130 for SIGINT),
            or submitit's own code when submitit has queued the job again.
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
    """Start to defer a first signal, if this is called in a block of ``deferred``."""
    global _deferring
    _deferring = _deferring is not False


@contextmanager
def deferred(*, at_once: bool = True) -> Iterator[None]:
    """Defer a first signal until ``stop_if_asked`` is called or the block ends.

    Args:
        at_once: whether to defer from the start of the block; otherwise from a call of ``defer`` on.
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
    """Stop the block after this many seconds; on Windows, and outside the main thread, there is no limit.

    Raises:
        TimeoutError: the block took too long.  It is a subclass of OSError.
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
