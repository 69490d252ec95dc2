"""The file that an embedded store lives in: its folder, its lock, and one process at a time."""

import fcntl
import os
from pathlib import Path

from keystore.errors import StoreLocked


def make_folder(path: Path) -> None:
    """Make a folder and those above it; each is in its parent durably before anything is put into it."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def lock(path: Path) -> int:
    """Take a lock file for as long as the returned descriptor is open. Raises StoreLocked, naming the holder."""
    lock_fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock_fd, 32).decode("ascii", "replace").strip()
        os.close(lock_fd)
        raise StoreLocked(
            f"{path} is held by process {holder or 'unknown'}; allowed: one process a file"
        ) from error
    os.ftruncate(lock_fd, 0)
    os.write(lock_fd, f"{os.getpid()}\n".encode("ascii"))
    return lock_fd
