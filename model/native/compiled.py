"""Everything that is compiled, ahead of its first use, and kept for the next start."""

import hashlib
import logging
import os
from pathlib import Path

from numba.core import config
from numba.core.caching import UserProvidedCacheLocator

from model.native.decode import work
from model.native.embedding import look_up
from model.native.experts import choose, mix_silu, mix_swiglu, project
from model.native.flow import mix_flows
from model.native.likeliest import likeliest
from model.native.likely import expect_rows
from model.native.masters import (
    add_concepts,
    add_embedding,
    add_memory,
    add_place,
    attend_flow,
    combine,
    deep_ffn,
    measure,
    norm_rows,
    plain_ffn,
)
from model.native.reading import read

logger = logging.getLogger(__name__)

_ROW, _ROWS, _STACK = "float32[::1]", "float32[:, ::1]", "float32[:, :, ::1]"
_PACKED = "uint8[:, :, :, ::1]"
_NETWORKS = f"Tuple(({_STACK}, {_ROWS}, {_ROWS}, {_STACK}, {_ROWS}, {_ROWS}, {_ROWS}, {_STACK}, {_ROWS}))"
_JOB = ", ".join(
    (
        _ROWS,
        "Tuple((int64[::1], int64[:, ::1]))",
        f"Tuple(({', '.join([_PACKED] * 4)}, {_STACK}))",
        "Tuple((int64[::1], int64[:, :, ::1], int64[:, :, ::1]))",
        f"Tuple((uint8[:, :, ::1], {_ROW}, {_ROWS}))",
        f"Tuple((int8[:, :, :, ::1], {_STACK}, {', '.join([_ROWS] * 4)}))",
        f"Tuple(({_ROWS}, {_ROWS}, float32))",
        "int64, int64",
    )
)
_SELECTED = f"{_ROWS}, int64[:, ::1], {_ROWS}"
_ACTIVE = "boolean[::1]"
_BITS = "uint16[:, ::1]"
_PLACES = "int64[:, ::1]"
_PANELS = "uint32[:, :, :, ::1]"
_READING = ", ".join(
    (
        _ROWS,
        f"Tuple((int64[::1], {_PLACES}, int64[::1], {_PLACES}, {_PLACES}))",
        f"Tuple(({', '.join([_PACKED] * 4)}, {_STACK}))",
        f"Tuple(({_BITS}, {_ROWS}, {_BITS}, {_BITS}, {_PANELS}, {_PANELS}))",
        f"Tuple(({_ROWS}, {_ROWS}, float32))",
        "int64, int64",
    )
)
ENTRIES = {
    work: f"int64[::1], boolean, int64, int64, {_JOB}",
    read: f"int64[::1], boolean, int64, int64, {_READING}",
    look_up: f"uint8[:, :, ::1], int64[::1], {_ROWS}",
    project: f"{_ROWS}, {_ROW}, float32, {_ROWS}, {_ROWS}, {_ROWS}",
    choose: f"{_ROWS}, boolean, {_ROWS}, int64[:, ::1]",
    mix_silu: f"{_SELECTED}, {_STACK}, {_STACK}, {_ROWS}",
    mix_swiglu: f"{_SELECTED}, {_STACK}, {_STACK}, {_STACK}, {_ROWS}",
    expect_rows: f"{_BITS}, {_BITS}, {_ROW}, float32, {_ROWS}",
    likeliest: f"{_ROWS}, int64[::1]",
    mix_flows: f"{_SELECTED}, float32[:, :, :, ::1], {_ROWS}, {_ROW}, float32, {_NETWORKS}, {_ROWS}",
    norm_rows: f"{_ROWS}, {_ROW}, float32, {_ROWS}",
    measure: f"{_ROWS}, {_ROWS}, {_ROWS}, {_ROW}, boolean, float32, {_ROWS}, {_ACTIVE}",
    attend_flow: f"{_ROWS}, {_STACK}, int64, {_ROWS}, {_ROW}, float32, {_ROWS}",
    add_place: f"{_ROWS}, int64[::1], {_ROW}, {_ROWS}, {_ROW}, {_ROWS}",
    add_concepts: f"{_ROWS}, {_ACTIVE}, {', '.join([_ROWS] * 4)}, {_ROW}, {_ROWS}",
    add_embedding: f"{_ROWS}, {_ROW}, {_ROWS}",
    add_memory: f"{_ROWS}, {_STACK}, int64, {_ROW}, {_ROW}, {_ROW}, {_ROWS}",
    plain_ffn: f"{_ROWS}, {_ACTIVE}, {_ROWS}, {_ROWS}, {_ROWS}",
    deep_ffn: f"{_ROWS}, {_ACTIVE}, {', '.join([_ROWS] * 4)}, {_ROWS}",
    combine: f"{_STACK}, {_ROWS}, {_ACTIVE}, {_STACK}, float32, boolean, {_ROW}, {_ROWS}, {_ROW}, {_ROW}, {_ROWS}",
}


def compile_native() -> bool:
    """Compile, or take what `make setup` or an earlier start compiled; whether nothing had to be compiled.

    It is kept beside the sources alone, since it is code as they are, under a name by them that numba does not look
    at. Where that cannot be written it is compiled in memory, and the log says so.
    """
    folder = kept_folder()
    config.CACHE_DIR = str(folder)  # pyright: ignore[reportAttributeAccessIssue] - made at run time
    config.CACHE_LOCATOR_CLASSES = f"{__name__}.{Beside.__name__}"  # pyright: ignore[reportAttributeAccessIssue]
    keeps = writable(folder)
    missed = 0
    for entry, arguments in ENTRIES.items():
        if keeps or folder.exists():
            entry.enable_caching()
        try:
            entry.compile(f"void({arguments})")
        except PermissionError:
            assert not keeps, folder
        missed += not entry.stats.cache_hits
    if missed and not keeps:
        logger.warning("compiled in memory, once more at the next start: %s cannot be written", folder.parent)
    return not missed


def kept_folder() -> Path:
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sorted(here.glob("*.py")))).hexdigest()
    return here / "__pycache__" / f"native-{digest[:16]}"


def writable(folder: Path) -> bool:
    """Whether the folder, or the nearest above it that exists, may be written."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


class Beside(UserProvidedCacheLocator):
    """Numba's own place for what is compiled, which reading need not be able to write."""

    def ensure_cache_path(self) -> None:
        if writable(Path(self.get_cache_path())):
            super().ensure_cache_path()
