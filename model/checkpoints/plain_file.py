"""Files of a checkpoint as bytes: regular ones only, and never more than a limit."""

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from model.errors import CheckpointError


@contextmanager
def opened(path: Path) -> Generator[tuple[BinaryIO, int]]:
    """A regular file and its size in bytes; a link is followed, as Hugging Face's cache is made of them.

    Raises CheckpointError naming the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file, status.st_size


def read_small(path: Path, max_bytes: int) -> bytes:
    """All of a file. Raises CheckpointError when it is larger than it may be."""
    with opened(path) as (file, size):
        if size > max_bytes:
            raise CheckpointError(f"{path} has {size} bytes; allowed: {max_bytes}")
        return file.read(max_bytes)
