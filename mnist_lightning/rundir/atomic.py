"""Write files atomically."""

import contextlib
import errno
import os
import time
from pathlib import Path

TEMPORARY = ".writing-"  # prefix of a file's name while the file is being written
HELD = (5, 32)  # Windows' ERROR_ACCESS_DENIED and ERROR_SHARING_VIOLATION
PATIENCE = 2.0  # seconds to wait for another program that holds a file open
LONG_LEFT = 60.0  # a temporary file that is older than this many seconds was left by a killed process


def write_atomic(path: Path, content: bytes) -> None:
    """Write a temporary file, flush it to disk, and rename it to ``path``.

    Readers see the old file or the new one, never a part of it, even if this process is killed.  The
    temporary file is in the same folder, and so on the same file system.  If ``path`` is a link, the link is
    replaced, not followed.

    Raises:
        OSError: the folder can't be written, the disk is full, or ``path`` is a folder; the old file is
            unchanged.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        if path.is_dir() and not path.is_symlink():  # Windows would report a denied permission
            raise IsADirectoryError(errno.EISDIR, "a folder is in its place")
        temporary.unlink(missing_ok=True)  # left by a killed process, or a stranger's link
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
    """Rename a file, replacing ``target`` if it exists.

    Windows refuses this while another program, such as a virus scanner, a backup or a viewer, has one of the
    files open.  The function therefore tries again for ``PATIENCE`` seconds.

    Raises:
        OSError: the file can't be renamed.
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
    """Delete the temporary files that killed processes left in a folder and in the folders below it.

    Args:
        folder: the folder; it need not exist.
        age: delete only files last written at least this many seconds ago; use 0 only if no other process
            writes there.
    """
    for path in folder.rglob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()
