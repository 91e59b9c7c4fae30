"""Locks on open files, which free themselves when the process that holds them ends in any way.

On POSIX it is flock, which NFS passes on to its server and so to other hosts; on Windows it is a
byte far behind the end, since what is locked there cannot be read.
"""

from __future__ import annotations

import errno
import os
import sys

_FAR = 1 << 30  # where the byte is that Windows locks
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file; return whether that succeeded, None where the file system has no locks.

    The lock lasts until the descriptor is closed, in this process and in those forked from it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def still_stands(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is still the file that was opened, not deleted or replaced since."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
