"""SIGTERM and Ctrl-C: finish the step, save, and end with the exit code that a shell expects.

While training (``deferred``), a signal only sets a flag, which ``Checkpoints`` reads at the end of
a step.  At any other time it ends the process at once, as does a second one.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: int | None = None  # signal number
_deferring = False


def install() -> None:
    """Take over SIGTERM and SIGINT; only the main thread may."""
    signal.signal(signal.SIGTERM, _handle)
    signal.signal(signal.SIGINT, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None:
        os._exit(128 + number)
    _received = number
    if not _deferring:
        raise SystemExit(128 + number)


def received() -> bool:
    return _received is not None


def stop_if_asked() -> None:
    """
    Raises:
        SystemExit: with 128 + the signal's number (143 for SIGTERM, 130 for SIGINT) if one has come.
    """
    if _received is not None:
        raise SystemExit(128 + _received)


@contextmanager
def deferred() -> Iterator[None]:
    """A stretch in which a first signal waits until ``stop_if_asked`` is called, at its end at the latest."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    stop_if_asked()
