"""Files that are whole or not there at all."""

import contextlib
import errno
import os
import time
from pathlib import Path

TEMPORARY = ".writing-"  # what the names of files begin with that are being written
HELD = (5, 32)  # Windows' ERROR_ACCESS_DENIED and ERROR_SHARING_VIOLATION
PATIENCE = 2.0  # seconds that another program may hold a file
LONG_LEFT = 60.0  # seconds without a write, after which a file is left over from a killed process


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside the place, flush to disk, and rename.

    A reader, or whoever comes after a kill, finds the old file or the new one, never a part.  The
    temporary file lies in the same folder and so on the same file system, whatever TMPDIR says.  A link in
    the place is replaced, not followed.

    Raises:
        OSError: the folder can't be written, the disk is full, or a folder lies in the place; what is there
            is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        if path.is_dir() and not path.is_symlink():  # Windows would say that permission is denied
            raise IsADirectoryError(errno.EISDIR, "a folder lies in its place")
        temporary.unlink(missing_ok=True)  # left over from a killed process, or a link put there
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"can't be written: {error.strerror}", str(path)) from error
        raise


def replace(source: Path, target: Path) -> None:
    """Rename a file, in place of another one if there is one.

    Windows refuses that as long as a program has one of them open, as those do that look for viruses, make
    copies or show it: for a while it is tried again.

    Raises:
        OSError: it can't be done.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            os.replace(source, target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in HELD or time.monotonic() > end:
                raise
            time.sleep(PATIENCE / 100)
        else:
            return


def remove_leftovers(folder: Path, *, age: float = 0) -> None:
    """Delete what killed processes left half written, there and in the folders below.

    Args:
        folder: need not exist.
        age: seconds since the last write; 0 only where no other process writes.
    """
    for path in folder.rglob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()
